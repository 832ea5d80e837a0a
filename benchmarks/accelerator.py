"""Images per second and MFU of our training step on an accelerator: `python -m benchmarks.accelerator`.

Synthetic uint8 images that lie on the device go through the real augmentation, model, losses, optimiser and token
statistics; only the reading of images is left out. One JSON line per size, number of registers and mode. Needs torch,
torchvision, timm, pyarrow and pydantic, but neither Ray nor MLflow, so that it runs where only a GPU was lent. Exits
with 2 on a machine without a GPU, unless `--device cpu` asks for a small trial run of the script itself.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks import flops, report
from benchmarks.report import Comparison, Goal, Report
from trainers import catalog, vit
from trainers.config import TrialConfig, resolve
from trainers.dotted import load
from trainers.explain import ConfigError
from trainers.loader import batches
from trainers.methods import Batch, Method, Upcoming
from trainers.step import Stepper
from trainers.streams import Streams

NUM_CLASSES = 1_000
DECODED = 256  # px, of the synthetic images
KEPT = 4  # synthetic batches
WARM_UP = 3  # steps, the first of them compiles
BLOCK_SECONDS = 1.0

# Dense bf16 FLOP/s by (part of) the device's name, from the vendor's data sheets; other devices are measured.
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "A100": 312e12}

# Images per second of one H100 that are aimed at, compiled, with at most 4 registers.
TARGETS = {
    "deit3": {"small": 8_000.0, "base": 2_200.0, "large": 700.0},
    "dinov2": {"small": 1_500.0, "base": 420.0, "large": 120.0},
}
TARGET_REGISTERS = 4

BATCHES = {
    "deit3": {"nano": 64, "tiny": 512, "small": 512, "base": 256, "large": 128},
    "dinov2": {"nano": 32, "tiny": 128, "small": 128, "base": 64, "large": 32},
}

# The recipes that are measured, and the settings of theirs that must divide the batch of a device.
PRESETS = {"deit3": "imagenet21k", "dinov2": "imagenet1k"}
GROUPS = {
    "deit3": {"deit3.mix_group_size": 64},
    "dinov2": {"model.drop_path_group": 32, "dinov2.koleo.group_size": 32, "dinov2.mask_group_size": 64},
}


def main(arguments: list[str] | None = None) -> int:
    """0 when all points were measured, 1 when one ran out of memory, 2 without a GPU."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("this machine has no usable GPU; --device cpu tries the script itself", file=sys.stderr)
        return 2
    device = torch.device(asked.device)
    peak, source = peak_flops(device)
    points = itertools.product(asked.methods, asked.sizes, asked.modes, asked.registers)
    failed = False
    for method, size, mode, registers in points:
        started = time.monotonic()
        own = dict(pair.partition("=")[::2] for pair in asked.set)
        settings = {name: yaml.safe_load(value) for name, value in own.items()}
        try:
            config = configuration(method, size, registers, mode == "compiled", asked.batch, settings)
        except ConfigError as error:
            parser.error(str(error))
        facts = report.machine(torch.get_num_threads(), _name(device), asked.commit)
        try:
            measured = measured_point(config, device, peak, source, asked.blocks)
        except torch.OutOfMemoryError as error:
            print(f"{method} {size}, batch {config.optim.batch_size}: {error}", file=sys.stderr)
            failed = True
            continue
        finally:
            torch.cuda.empty_cache()
        print(report.line("accelerator", measured, facts, time.monotonic() - started), flush=True)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    sizes = list(BATCHES["deit3"])
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["small", "base", "large"])
    parser.add_argument("--registers", nargs="+", type=int, default=[0, 4, 16])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--batch", type=int, help="images per step; default by method and size")
    parser.add_argument("--blocks", type=int, default=10, help=f"of about {BLOCK_SECONDS:.0f} s that are measured")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="of this code, where the repository itself is not at hand")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the trial")
    return parser


def configuration(
    method: str, size: str, registers: int, compiled: bool, batch: int | None, settings: Mapping[str, Any]
) -> TrialConfig:
    """The official recipe of a method at 224 px with another model and batch; `settings` are dotted names."""
    batch = batch or BATCHES[method][size]
    given = {
        "method": method,
        "preset": PRESETS[method],
        **{name: math.gcd(group, batch) for name, group in GROUPS[method].items()},
        "model.size": size,
        "model.num_registers": registers,
        "model.patch_size": 16,
        "data.decode_size": DECODED,
        "optim.batch_size": batch,
        "precision": "bf16",
        "compile": compiled,
        **settings,
    }
    return resolve(given)


def measured_point(config: TrialConfig, device: torch.device, peak: float, source: str, blocks: int) -> Report:
    """MFU as the headline, and images per second against the target where there is one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = Steps(config, device)
    warm_up = steps(WARM_UP)
    per_block = max(1, round(BLOCK_SECONDS / steps(1)))
    seconds = [steps(per_block) for _ in range(blocks)]
    steps.close()
    rates = [per_block * config.optim.batch_size / s for s in seconds]
    of_image = flops.per_image(config, NUM_CLASSES)
    mode = "compiled" if config.compile else "eager"
    shape = f"{config.method} {config.model.size}/{config.model.patch_size}, {config.model.num_registers} registers"
    own = f"trainers.step.Stepper, {shape}, {mode}, bf16, batch {config.optim.batch_size}, synthetic images augmented"
    achieved = [rate * of_image / 1e12 for rate in rates]
    comparisons = [
        Comparison(f"{shape}, {mode}: MFU", (own, source), achieved, [peak / 1e12] * blocks, "TFLOP/s", None)
    ]
    if (target := _target(config, device)) is not None:
        goal, aimed = Goal(1.0, at_most=False), "what is aimed at on one H100"
        comparisons.append(Comparison("images/s", (own, aimed), rates, [target] * blocks, "images/s", goal))
    counts = {
        "method": config.method,
        "size": config.model.size,
        "registers": config.model.num_registers,
        "compiled": config.compile,
        "batch_size": config.optim.batch_size,
        "steps_per_block": per_block,
        "images_per_second": report.rounded(float(np.median(rates))),
        "gflop_per_image": report.rounded(of_image / 1e9),
        "warm_up_seconds": round(warm_up, 1),
        "memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1) if device.type == "cuda" else None,
    }
    return Report(comparisons, counts)


def _target(config: TrialConfig, device: torch.device) -> float | None:
    is_comparable = config.compile and config.model.num_registers <= TARGET_REGISTERS
    if not is_comparable or not any(name in _name(device) for name in ("H100", "H200")):
        return None
    return TARGETS[config.method].get(config.model.size)


class Steps:
    """A method's training steps on synthetic images; prepares its batches in a thread, as the loader does."""

    def __init__(self, config: TrialConfig, device: torch.device) -> None:
        self._size, self._device = config.optim.batch_size, device
        streams = Streams(config.seed)
        build = cast(Callable[..., Method], load(catalog.METHODS[config.method].build))
        method = build(config, vit.build(config.model, streams), NUM_CLASSES, streams)
        self._method = method.to(device).train()
        if config.compile:
            for module in self._method.modules():
                if isinstance(module, vit.ViT):
                    module.compile_blocks()
        self._stepper = Stepper(config, self._method, streams, device)
        shape = (KEPT, self._size, DECODED, DECODED, 3)
        self._images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self._classes = torch.randint(NUM_CLASSES, (self._size,), device=device)
        self._batches: Iterator[Batch] = batches(self._read, 0, config.optim.steps)
        self._step = 0

    def _read(self, step: int) -> Batch:
        prepared = self._method.prepare(Upcoming(step, self._size, np.arange(self._size)))
        moved = {name: self._moved(tensor) for name, tensor in prepared.items()}
        return Batch(self._images[step % KEPT], {"classes": self._classes}, moved)

    def _moved(self, tensor: Tensor) -> Tensor:
        is_cuda = self._device.type == "cuda"
        return tensor.pin_memory().to(self._device, non_blocking=True) if is_cuda else tensor

    def __call__(self, count: int) -> float:
        """Seconds of so many steps, until the device has done them.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        gc.disable()
        started = time.perf_counter()
        for _ in range(count):
            self._stepper([next(self._batches)], self._step)
            self._step += 1
        losses = self._stepper.take_losses()  # waits for the device
        seconds = time.perf_counter() - started
        gc.enable()
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"losses after {self._step} steps: {losses}")
        return seconds

    def close(self) -> None:
        """End the thread."""
        self._batches = iter(())


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Dense bf16 FLOP/s that MFU is a share of, and in words where the number is from."""
    known = [peak for part, peak in PEAKS.items() if part in _name(device)]
    if device.type == "cuda" and known:
        return known[0], f"dense bf16 peak of {_name(device)}"
    side = 8_192 if device.type == "cuda" else 1_024
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        float(torch.mm(left, right)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds), f"measured bf16 product of {side} x {side} matrices"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main())
