"""Weights that trials start from or measure: whether they are here, before any trial begins; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.plan import PlannedTrial
from trainers import released
from trainers.config import TrialConfig


def check(trials: Sequence[PlannedTrial], storage: Path) -> None:
    """That the weights of all trials are here, as far as files show it; only timm knows what timm has.

    Raises:
        ValueError: a file or a checkpoint of another trial is missing; one line.
    """
    for trial in trials:
        for problem in _missing(trial.config, storage):
            raise ValueError(f"{trial.name}: {problem}")


def absent(trials: Sequence[PlannedTrial], storage: Path) -> list[str]:
    """What is missing, each once, for a plan, which needs nothing of it."""
    return list(dict.fromkeys(problem for trial in trials for problem in _missing(trial.config, storage)))


def _missing(config: TrialConfig, storage: Path) -> Iterator[str]:
    if config.command is not None:  # it finds its weights by itself
        return
    init, weights, execution = config.model.init_from, config.model.weights, config.execution
    root = Path(execution.trials_root or storage)
    if init is not None and init.file is not None and not Path(init.file).expanduser().is_file():
        yield f"model.init_from.file {init.file} is not there"
    if init is not None and init.trial is not None and not _has_step(root, init.trial, f"{init.step:09d}"):
        yield (
            f"trial {init.trial} under {root} keeps no checkpoint of step {init.step}; name the step in its "
            "execution.keep_steps before it trains"
        )
    source = released.Source() if weights is None else released.source(weights)
    if source.file is not None:
        path = Path(execution.weights_root or ".").expanduser() / Path(source.file).expanduser()
        if not path.is_file():
            yield f"model.weights {source.file} is not there: {path} does not exist; execution.weights_root says where"
    step = "*" if source.step is None else f"{source.step:09d}"
    if source.trial is not None and not _has_step(root, source.trial, step):
        yield f"model.weights {weights}: no such checkpoint of that trial under {root}"


def _has_step(root: Path, trial: str, step: str) -> bool:
    return any(root.glob(f"**/trials/{trial}/**/step_{step}.pt"))
