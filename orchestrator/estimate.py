"""What a plan costs before anything runs: FLOPs, hours, memory and disk, from formulas and assumed speeds; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.plan import PlannedTrial
from trainers.catalog import MODEL_SIZES, ModelSize
from trainers.config import TrialConfig

MLP_RATIO = 4
NUM_CLASSES = 1_000  # assumed: the head is under 0.1 % of the FLOPs of all but the smallest models

# Assumed sustained FLOP/s, since nothing has been measured yet: a GPU at about a fifth of an H100's bf16 peak, as the
# best published ViT-S trainings reach, and one CPU core at three quarters of its fp32 matrix rate.
ASSUMED_GPU_FLOPS = 1.5e14
ASSUMED_CPU_FLOPS = 6.0e10  # of a core
ASSUMED_TRIAL_SECONDS = 2.0  # fixed share of a trial: set-up, writing, small models' overhead

_TRAINING_STEP = 3  # forward, and backward at twice its cost
_ACTIVATION_BYTES = 34  # per token, width and block in 16 bits, attention not kept (Korthikanti et al. 2022, eq. 1)


@dataclass(frozen=True)
class Cost:
    """Estimate of a list of trials; hours are of devices, not of the wall clock."""

    trials: int
    flops: float
    gpu_hours: float
    cpu_core_hours: float  # of trials that ask for no GPU
    checkpoint_bytes: int  # all checkpoints that are kept, of all trials
    memory_bytes: int  # of the largest trial: weights, gradients, optimiser, activations
    parameters: int  # of the largest backbone
    assumed: str

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, as plan.json holds them."""
        return asdict(self)


def forward_flops(
    size: ModelSize, num_patches: int, num_registers: int = 0, patch_size: int = 16, num_classes: int = NUM_CLASSES
) -> float:
    """FLOPs of one image's forward pass, two per multiply-add.

    F(T) = L·[(8 + 4ρ)·T·D² + 4·T²·D] + 6·p²·N·D + 2·D·C with T = N + 1 + R tokens (see docs on performance):
    projections and MLP, attention, patch embedding of three channels, head.
    """
    tokens, width = num_patches + 1 + num_registers, size.width
    blocks = size.depth * ((8 + 4 * MLP_RATIO) * tokens * width**2 + 4 * tokens**2 * width)
    return float(blocks + 6 * patch_size**2 * num_patches * width + 2 * width * num_classes)


def parameters(size: ModelSize, num_patches: int, num_registers: int = 0, patch_size: int = 16) -> int:
    """Parameters of the backbone without a head: embeddings, registers, blocks, final norm; no LayerScale."""
    width = size.width
    embedding = 3 * patch_size**2 * width + width + (num_patches + 1) * width + width + num_registers * width
    block = (4 + 2 * MLP_RATIO) * width**2 + (4 + MLP_RATIO + 1 + 4) * width
    return embedding + size.depth * block + 2 * width


def trial_flops(config: TrialConfig) -> float:
    """FLOPs of a trial: its training steps, and the forward passes of probes and token statistics."""
    forward = _forward(config)
    training = _TRAINING_STEP * forward * config.optim.steps * config.optim.batch_size
    evaluation = config.evaluation
    images = config.tokens.probe_images + (evaluation.train_images if evaluation.probes else 0)
    return training + evaluation.points * images * forward


def memory_bytes(config: TrialConfig) -> int:
    """Rough peak memory of a rank: fp32 weights, gradients, optimiser state and EMA, and the activations of a batch."""
    size, optim = MODEL_SIZES[config.model.size], config.optim
    copies = 2 + _optimizer_copies(config) + (optim.ema_decay is not None)
    micro = optim.micro_batch_size if isinstance(optim.micro_batch_size, int) else optim.batch_size
    tokens = _patches(config) + 1 + config.model.num_registers
    precision = 2 if config.precision == "fp32" else 1
    return 4 * copies * _parameters(config) + _ACTIVATION_BYTES * precision * micro * tokens * size.width * size.depth


def checkpoint_bytes(config: TrialConfig) -> int:
    """Disk of a trial's kept checkpoints: fp32 weights, optimiser state and EMA."""
    copies = 1 + _optimizer_copies(config) + (config.optim.ema_decay is not None)
    return 4 * copies * _parameters(config) * config.execution.keep_checkpoints


def estimate(trials: Sequence[PlannedTrial]) -> Cost:
    """The cost of `trials`; those that ask for a GPU are priced on one, the others on CPU cores."""
    flops = [trial_flops(trial.config) for trial in trials]
    on_gpu = [f for f, trial in zip(flops, trials, strict=True) if trial.resources.gpus > 0]
    on_cpu = [f for f, trial in zip(flops, trials, strict=True) if trial.resources.gpus == 0]
    return Cost(
        trials=len(trials),
        flops=sum(flops),
        gpu_hours=_hours(on_gpu, ASSUMED_GPU_FLOPS),
        cpu_core_hours=_hours(on_cpu, ASSUMED_CPU_FLOPS),
        checkpoint_bytes=sum(checkpoint_bytes(trial.config) for trial in trials),
        memory_bytes=max((memory_bytes(trial.config) for trial in trials), default=0),
        parameters=max((_parameters(trial.config) for trial in trials), default=0),
        assumed=f"{ASSUMED_GPU_FLOPS / 1e12:.0f} TFLOP/s on a GPU, {ASSUMED_CPU_FLOPS / 1e9:.0f} GFLOP/s on a CPU core",
    )


def _hours(flops: Sequence[float], speed: float) -> float:
    return (sum(flops) / speed + len(flops) * ASSUMED_TRIAL_SECONDS) / 3600


def _patches(config: TrialConfig) -> int:
    assert isinstance(config.model.image_size, int), "the configuration is not resolved"
    return (config.model.image_size // config.model.patch_size) ** 2


def _forward(config: TrialConfig) -> float:
    model = config.model
    return forward_flops(MODEL_SIZES[model.size], _patches(config), model.num_registers, model.patch_size)


def _parameters(config: TrialConfig) -> int:
    model = config.model
    return parameters(MODEL_SIZES[model.size], _patches(config), model.num_registers, model.patch_size)


def _optimizer_copies(config: TrialConfig) -> int:
    return 1 if config.optim.optimizer == "sgd" else 2
