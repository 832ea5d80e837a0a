"""The weights that a trial is scored with, where a rule chooses another step than the last: kept while it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainers.optim import EMA
from trainers.score_settings import ScoreConfig


class Scoring:
    """Chooses the scoring step by the rule and holds the weights of that step, on the CPU of the first rank.

    They are part of every checkpoint, so that they are as whole as it is and a resumed trial chooses the same step.
    """

    def __init__(self, rule: ScoreConfig, method: nn.Module, ema: EMA | None) -> None:
        """`rule`: of a resolved configuration; `method` and `ema` are what trains."""
        self._rule, self._method, self._ema = rule, method, ema
        self._kept: dict[str, Any] | None = None  # step, value of the metric (null with `step`), method, ema

    def after_step(self, step: int) -> None:
        """Keep the weights where the rule names this step."""
        if step == self._rule.step:
            self._keep(step, None)

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the weights where the rule's metric is finite and better than at every evaluation before.

        Raises:
            ValueError: it is a validation metric that is not among `metrics`; a user's own probe may have any names.
        """
        name = self._rule.best
        if name is None:
            return
        if name not in metrics and name.startswith("val/"):
            known = ", ".join(sorted(metric for metric in metrics if metric.startswith("val/")))
            raise ValueError(f"evaluation.score.best is {name}, which no evaluation reports; reported are {known}")
        value = metrics.get(name, math.nan)
        before = None if self._kept is None else self._kept["value"]
        if math.isfinite(value) and (
            before is None or (value > before if self._rule.mode == "max" else value < before)
        ):
            self._keep(step, value)

    def restore(self) -> int:
        """Give method and averaged weights the values of the scoring step, which is returned.

        Raises:
            ValueError: the rule's metric was never defined.
        """
        if self._kept is None:
            raise ValueError(f"evaluation.score.best is {self._rule.best}, which was not defined at any evaluation")
        self._method.load_state_dict(self._kept["method"])
        if self._ema is not None:
            self._ema.load_state_dict(self._kept["ema"])
        return int(self._kept["step"])

    def state_dict(self) -> dict[str, Any] | None:
        """What has been kept so far; None before anything was."""
        return self._kept

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state_dict` gave."""
        self._kept = state

    def _keep(self, step: int, value: float | None) -> None:
        ema = None if self._ema is None else _copied(self._ema.state_dict())
        self._kept = {"step": step, "value": value, "method": _copied(self._method.state_dict()), "ema": ema}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` on the CPU; training changes tensors in place."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }
