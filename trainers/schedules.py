"""Values that change with the step: warm-up and cosine as the official DINO and DINOv2 code count them; no torch."""

from __future__ import annotations

import math


def cosine(
    step: int, *, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0, freeze: int = 0
) -> float:
    """A cosine from `base` to `final` after a linear warm-up, at the step after `step` steps are done.

    0 during the first `freeze` steps; then `warmup` steps from `start` to `base`, both included; then, i steps later,
    final + (base - final) · (1 + cos(π · i / n)) / 2 where n is the rest of `total`; from `total` on `final`. So the
    value is `base` twice, and is not yet `final` at the last step.
    Equals CosineScheduler (facebookresearch/dinov2:dinov2/utils/utils.py) and, with freeze = 0, cosine_scheduler
    (facebookresearch/dino:utils.py).
    """
    if step >= total:
        return final
    if step < freeze:
        return 0.0
    if step < freeze + warmup:
        return linear_then_constant(step - freeze, start, base, warmup)
    done = (step - freeze - warmup) / (total - freeze - warmup)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * done))


def linear_then_constant(step: int, start: float, end: float, warmup: int) -> float:
    """`warmup` values from `start` to `end`, both included, then `end`; with a warm-up of one step, `start` is it.

    As the teacher temperature of DINO and DINOv2 (facebookresearch/dino:main_dino.py, facebookresearch/dinov2:
    dinov2/train/train.py), counted in steps in both.
    """
    if step >= warmup or (step == warmup - 1 and warmup > 1):
        return end
    return start + (end - start) * step / max(1, warmup - 1)
