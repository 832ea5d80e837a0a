"""What a plan costs before anything runs: FLOPs, hours, memory and disk, by formulas and assumed speeds; pure."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.catalog import METHODS, MODEL_SIZES, ModelSize
from trainers.config import ExecutionConfig, HeadConfig, OpenCLIPConfig, TrialConfig

if TYPE_CHECKING:
    from orchestrator.plan import PlannedTrial

MLP_RATIO = 4  # also of gated MLPs, which are narrower by a third and have three matrices
NUM_CLASSES = 1_000  # assumed: the head is under 0.1 % of the FLOPs of all but the smallest models

# Assumed sustained FLOP/s, since nothing has been measured yet: a GPU at about a fifth of an H100's bf16 peak, as the
# best published ViT-S trainings reach, and one CPU core at three quarters of its fp32 matrix rate.
ASSUMED_GPU_FLOPS = 1.5e14
ASSUMED_CPU_FLOPS = 6.0e10  # of a core
ASSUMED_TRIAL_SECONDS = 2.0  # fixed share of a trial: set-up, writing, small models' overhead

FORMULA = "formulas"  # the basis of a price that nothing measured stands behind

_TRAINING_STEP = 3  # forward, and backward at twice its cost
_GLOBAL_CROPS = 2  # of DINO and DINOv2; the teacher sees no other
_VOCABULARY = 49_408  # tokens of open_clip's own tokeniser
_ACTIVATION_BYTES = 34  # per token, width and block in 16 bits, attention not kept (Korthikanti et al. 2022, eq. 1)
_DEPTH_CROP = (416, 544)  # px, of DINOv2's training for NYU depth
_EVALUATED = 64  # images in a forward pass of an evaluation
_INPUT_BYTES = 2  # of these the block's input, which is all that activation checkpointing keeps


@dataclass(frozen=True)
class Cost:
    """Estimate of a list of trials; hours are of devices, not of the wall clock.

    Programs of others are left out, since nothing is known of what they do.
    """

    trials: int
    flops: float
    gpu_hours: float
    cpu_core_hours: float  # of trials that ask for no GPU
    checkpoint_bytes: int  # all checkpoints that are kept, of all trials
    memory_bytes: int  # of the largest trial: weights, gradients, optimiser, activations
    parameters: int  # of the largest backbone
    assumed: str
    not_known: int = 0  # trials that are programs

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, as plan.json holds them; null where all trials are programs, so that nothing is known."""
        known = asdict(self)
        if self.not_known < self.trials or not self.trials:
            return known
        return {name: known[name] if name in ("trials", "not_known", "assumed") else None for name in known}


class _Head(NamedTuple):
    """A projection head and how many tokens of an image the student's and the teacher's are applied to."""

    settings: HeadConfig
    student: float
    teacher: float


def forward_flops(
    size: ModelSize, num_patches: int, num_registers: int = 0, patch_size: int = 16, num_classes: int = NUM_CLASSES
) -> float:
    """FLOPs of one image's forward pass, two per multiply-add.

    F(T) = L·[(8 + 4ρ)·T·D² + 4·T²·D] + 6·p²·N·D + 2·D·C with T = N + 1 + R tokens (see docs on performance):
    projections and MLP, attention, patch embedding of three channels, head.
    """
    blocks = _block_flops(size.depth, size.width, num_patches + 1 + num_registers)
    return float(blocks + 6 * patch_size**2 * num_patches * size.width + 2 * size.width * num_classes)


def _block_flops(depth: int, width: int, tokens: int) -> int:
    return depth * ((8 + 4 * MLP_RATIO) * tokens * width**2 + 4 * tokens**2 * width)


def training_flops(config: TrialConfig) -> float:
    """FLOPs that one image costs in a training step, the optimiser and the losses left out.

    deit3, and methods of a user's own: 3·F, forward and backward. openclip: 3·F of both towers, captions as long as the
    context. dino and dinov2: 3·F of the student on two global and all local crops, F of the teacher on the global ones,
    and the heads on class tokens and, in dinov2, on masked patches. Batch-subset stochastic depth takes away its rate
    from the student's blocks; activation checkpointing and accumulation over cached features add a forward pass.
    """
    passes = _TRAINING_STEP + config.execution.activation_checkpointing
    text = config.openclip
    if text is not None:
        passes += config.optim.micro_batch_size != config.optim.batch_size
        return passes * (_forward(config, text.embed_dim) + _text_flops(text))
    if not _heads(config):
        return passes * (_forward(config) - _saved_by_subsets(config, _patches(config)))
    student = sum(n * (_crop_flops(config, p) - _saved_by_subsets(config, p)) for p, n in _crops(config))
    heads = sum(
        _head_flops(config, head.settings) * (_TRAINING_STEP * head.student + head.teacher) for head in _heads(config)
    )
    return passes * student + _GLOBAL_CROPS * _crop_flops(config, _patches(config)) + heads


def step_flops(config: TrialConfig) -> float:
    """`training_flops` of a whole step, as the trial is defined and not as it is executed: what activation
    checkpointing computes twice counts once, since nothing is learned by it.
    """
    plain = config.model_copy(update={"execution": ExecutionConfig()})
    return training_flops(plain) * config.optim.batch_size


def _crop_flops(config: TrialConfig, patches: int) -> float:
    """Forward pass of one crop through the backbone, which has no classifier."""
    model = config.model
    return forward_flops(MODEL_SIZES[model.size], patches, model.num_registers, model.patch_size, num_classes=0)


def _saved_by_subsets(config: TrialConfig, patches: int) -> float:
    size = MODEL_SIZES[config.model.size]
    return (1 - _kept(config)) * _block_flops(size.depth, size.width, patches + 1 + config.model.num_registers)


def _kept(config: TrialConfig) -> float:
    """The share of images that a residual branch is computed for."""
    rate, group = config.model.drop_path, config.model.drop_path_group
    return 1.0 if group is None else max(int(group * (1 - rate)), 1) / group


def _text_flops(text: OpenCLIPConfig) -> float:
    """Forward pass of one caption, its projection included."""
    blocks = _block_flops(text.text_layers, text.text_width, text.context_length)
    return float(blocks + 2 * text.text_width * text.embed_dim)


def _heads(config: TrialConfig) -> list[_Head]:
    """The projection heads of DINO and DINOv2; none for other methods."""
    settings = config.dino or config.dinov2
    if settings is None:
        return []
    heads = [_Head(settings.head, _GLOBAL_CROPS + settings.crops.num_local, _GLOBAL_CROPS)]
    if config.dinov2 is not None and config.dinov2.ibot_weight > 0:
        share = config.dinov2.mask_probability * sum(config.dinov2.mask_ratio) / 2
        masked = _GLOBAL_CROPS * share * _patches(config)
        heads.append(_Head(config.dinov2.ibot_head or settings.head, masked, masked))
    return heads


def _head_flops(config: TrialConfig, head: HeadConfig) -> float:
    """One token through a head: two per weight."""
    return 2.0 * sum(a * b for a, b in _head_layers(config, head))


def _head_layers(config: TrialConfig, head: HeadConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of the MLP and, last, of the prototypes."""
    sizes = [MODEL_SIZES[config.model.size].width, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return list(itertools.pairwise(sizes))


def parameters(size: ModelSize, num_patches: int, num_registers: int = 0, patch_size: int = 16) -> int:
    """Parameters of the backbone without a head: embeddings, registers, blocks, final norm; no LayerScale."""
    width = size.width
    embedding = 3 * patch_size**2 * width + width + (num_patches + 1) * width + width + num_registers * width
    block = (4 + 2 * MLP_RATIO) * width**2 + (4 + MLP_RATIO + 1 + 4) * width
    return embedding + size.depth * block + 2 * width


def trial_flops(config: TrialConfig) -> float:
    """FLOPs of a trial: its training steps, and the forward passes of probes and token statistics."""
    training = training_flops(config) * config.optim.steps * config.optim.batch_size
    evaluation = config.evaluation
    images = config.tokens.probe_images + (evaluation.train_images if evaluation.probes else 0)
    return training + (evaluation.points * images + _measured_images(config)) * _forward(config) + _probed_flops(config)


def _probed_flops(config: TrialConfig) -> float:
    """Forward passes of probes that see other views of images at each of their steps, once, at the end of a trial.

    Those on evaluated images are left out, whose number is not known here.
    """
    linear, segmentation, depth = (getattr(config.evaluation, name) for name in ("linear", "segmentation", "depth"))
    flops = 0.0
    if linear is not None and linear.crops:
        flops += linear.steps * linear.batch_size * _forward(config)
    if segmentation is not None and segmentation.whole:
        side = segmentation.side or config.model.side
        flops += segmentation.steps * segmentation.batch_size * _forward_of(config, side, side)
    if depth is not None and depth.whole:
        flops += depth.steps * depth.batch_size * _forward_of(config, *_DEPTH_CROP)
    return flops


def _forward_of(config: TrialConfig, height: int, width: int) -> float:
    """Forward pass of an image of other sides in px, padded to whole patches."""
    model = config.model
    patches = math.ceil(height / model.patch_size) * math.ceil(width / model.patch_size)
    return forward_flops(MODEL_SIZES[model.size], patches, model.num_registers, model.patch_size, num_classes=0)


def _measured_images(config: TrialConfig) -> int:
    """Images that the measurements of a trial pass through the backbone, most of them at its end.

    Interventions and test-time registers score validation and test sets, whose size is not known here: left out.
    """
    tokens, images = config.tokens, 0
    if tokens.recurrence is not None:
        images += tokens.probe_images * (3 + 2 * len(tokens.recurrence.scales))
    for settings in (tokens.locality, tokens.single_token):
        if settings is not None:
            images += settings.train_images + settings.test_images
    details = {"attention", "channels", "similarity"} & set(tokens.measurements)
    return images + config.evaluation.points * len(details) * tokens.detail_images


def memory_bytes(config: TrialConfig) -> int:
    """Rough peak memory of a rank that trains alone.

    In fp32 weights, gradients and optimiser state of all that learns, the averaged backbone, and the teacher; the
    activations of the student's blocks and of the text tower; and logits over prototypes or pairs.
    """
    if not _trains(config):
        return 4 * _parameters(config) + round(
            _activation_bytes(config, _tokens(config), _width(config), 1) * _EVALUATED
        )
    optim = config.optim
    micro = optim.micro_batch_size if isinstance(optim.micro_batch_size, int) else optim.batch_size
    size, text = MODEL_SIZES[config.model.size], config.openclip
    activations = _activation_bytes(config, _tokens(config) * micro * _kept(config), size.width, size.depth)
    if text is not None:
        activations += _activation_bytes(config, text.context_length * micro, text.text_width, text.text_layers)
        activations += 4 * 2 * micro * optim.batch_size
    for head in _heads(config):  # the student's logits and their gradient, and the teacher's
        activations += 4 * micro * head.settings.prototypes * (2 * head.student + head.teacher)
    return state_bytes(config) + round(activations)


def state_bytes(config: TrialConfig) -> int:
    """The part of `memory_bytes` that every rank holds whole: weights, gradients, optimiser state, copies."""
    if not _trains(config):
        return 4 * _parameters(config)
    return 4 * ((2 + _optimizer_copies(config)) * _trained(config) + _copies(config))


def _activation_bytes(config: TrialConfig, tokens: float, width: int, depth: int) -> float:
    precision = 2 if config.precision == "fp32" else 1
    kept = _ACTIVATION_BYTES * depth
    if config.execution.activation_checkpointing:
        kept = _INPUT_BYTES * depth + _ACTIVATION_BYTES
    return kept * precision * tokens * width


def _trains(config: TrialConfig) -> bool:
    return config.method not in METHODS or METHODS[config.method].trains


def _width(config: TrialConfig) -> int:
    return MODEL_SIZES[config.model.size].width


def checkpoint_bytes(config: TrialConfig) -> int:
    """Disk of a trial's kept checkpoints: fp32 weights, optimiser state, averaged backbone and teacher."""
    if not _trains(config):
        return 0
    count = config.execution.keep_checkpoints + len(config.execution.keep_steps)
    copies = 1 + _optimizer_copies(config)
    scored = 0 if config.evaluation.score is None else _trained(config) + _copies(config)  # weights of another step
    return 4 * (copies * _trained(config) + _copies(config) + scored) * count


def _trained(config: TrialConfig) -> int:
    """Parameters that learn: of the backbone, of projection heads, and of the text tower with both projections.

    DeiT-III's classifier is left out, since the number of classes is not known here.
    """
    text = config.openclip
    heads = {id(head.settings): _head_layers(config, head.settings) for head in _heads(config)}
    # Every layer of a head has biases but the prototypes.
    count = _parameters(config) + sum(a * b + b for layers in heads.values() for a, b in layers[:-1])
    count += sum(layers[-1][0] * layers[-1][1] for layers in heads.values())
    if text is not None:
        width = text.text_width
        block = (4 + 2 * MLP_RATIO) * width**2 + (4 + MLP_RATIO + 1 + 4) * width
        count += (_VOCABULARY + text.context_length) * width + text.text_layers * block + 2 * width
        count += (width + MODEL_SIZES[config.model.size].width) * text.embed_dim
    return count


def _copies(config: TrialConfig) -> int:
    """Parameters that follow others: of the averaged backbone, and of the teacher."""
    averaged = _parameters(config) if config.optim.ema_decay is not None else 0
    return averaged + (_trained(config) if _heads(config) else 0)


def _tokens(config: TrialConfig) -> int:
    """Tokens of an image for which activations are kept: of all crops that the student sees."""
    return sum(count * (patches + 1 + config.model.num_registers) for patches, count in _crops(config))


class Price(NamedTuple):
    """What one trial takes: seconds of the clock, seconds times its GPUs or CPU cores, and where that is known from."""

    seconds: float
    device_seconds: float
    basis: str


def by_formula(trial: PlannedTrial) -> Price | None:
    """The price at the assumed speeds, where several GPUs or cores, and shares of a GPU, are as fast as they are many.

    None for a program, of which nothing is known.
    """
    if trial.config.command is not None:
        return None
    gpus = num_gpus(trial)
    speed, share = (ASSUMED_GPU_FLOPS, gpus) if gpus else (ASSUMED_CPU_FLOPS, trial.resources.cpus)
    device_seconds = trial_flops(trial.config) / speed + ASSUMED_TRIAL_SECONDS
    return Price(device_seconds / share, device_seconds, FORMULA)


def num_gpus(trial: PlannedTrial) -> float:
    """GPUs of a trial; one where the share is not settled yet."""
    return 1.0 if trial.resources.gpus == "auto" else trial.resources.gpus


def estimate(trials: Sequence[PlannedTrial], prices: Sequence[Price | None] | None = None) -> Cost:
    """The cost of `trials`; those that ask for a GPU are priced on one, the others on CPU cores.

    `prices` are of each of them, None where nothing is known; without, all are by formula.
    """
    prices = [by_formula(trial) for trial in trials] if prices is None else prices
    known = [(trial, price) for trial, price in zip(trials, prices, strict=True) if price is not None]
    configs = [trial.config for trial, _ in known]
    return Cost(
        trials=len(trials),
        flops=sum(map(trial_flops, configs)),
        gpu_hours=sum(price.device_seconds for trial, price in known if num_gpus(trial) > 0) / 3600,
        cpu_core_hours=sum(price.device_seconds for trial, price in known if num_gpus(trial) == 0) / 3600,
        checkpoint_bytes=sum(map(checkpoint_bytes, configs)),
        memory_bytes=max(map(memory_bytes, configs), default=0),
        parameters=max(map(_parameters, configs), default=0),
        assumed=f"{ASSUMED_GPU_FLOPS / 1e12:.0f} TFLOP/s on a GPU, {ASSUMED_CPU_FLOPS / 1e9:.0f} GFLOP/s on a CPU core",
        not_known=len(trials) - len(known),
    )


def wall_seconds(prices: Sequence[Price], at_a_time: int) -> float:
    """The clock's time for all trials in their order, `at_a_time` of them running: each begins where one ends first.

    Raises:
        ValueError: `at_a_time` is below 1.
    """
    if at_a_time < 1:
        raise ValueError(f"at_a_time is {at_a_time}; allowed: a whole number from 1")
    ends = [0.0] * min(at_a_time, max(1, len(prices)))
    for price in prices:
        heapq.heapreplace(ends, ends[0] + price.seconds)
    return max(ends)


def _patches(config: TrialConfig) -> int:
    return math.prod(config.model.grid)


def _crops(config: TrialConfig) -> list[tuple[int, int]]:
    """Patches of a crop and how many such crops of an image the method trains on; the image itself is one."""
    settings = config.dino or config.dinov2
    if settings is None:
        return [(_patches(config), 1)]
    assert isinstance(settings.crops.local_size, int), "the configuration is not resolved"
    local = (settings.crops.local_size // config.model.patch_size) ** 2
    return [(_patches(config), _GLOBAL_CROPS), (local, settings.crops.num_local)]


def _forward(config: TrialConfig, num_classes: int = NUM_CLASSES) -> float:
    model = config.model
    size = MODEL_SIZES[model.size]
    return forward_flops(size, _patches(config), model.num_registers, model.patch_size, num_classes)


def _parameters(config: TrialConfig) -> int:
    model = config.model
    return parameters(MODEL_SIZES[model.size], _patches(config), model.num_registers, model.patch_size)


def _optimizer_copies(config: TrialConfig) -> int:
    return 1 if config.optim.optimizer == "sgd" else 2
