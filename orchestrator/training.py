"""The bridge from an attempt to `trainers.train`: a job in, an outcome out; above it nothing imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout
from trainers import released

if TYPE_CHECKING:
    from trainers.config import ExecutionConfig, TrialConfig


def run(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Train `job` as attempt `number`, from the newest checkpoint of any earlier attempt."""
    import torch

    from trainers.config import TrialConfig
    from trainers.train import train

    config = TrialConfig.model_validate(job.config)
    config = config.model_copy(update={"execution": _execution(config, job, layout)})
    torch.set_num_threads(config.execution.threads or job.threads)
    if 0 < job.gpus < 1 and torch.cuda.is_available():  # Ray's fractions are not enforced
        torch.cuda.set_per_process_memory_fraction(job.gpus)
    result = train(
        config,
        report,
        layout.attempt(number),
        cache=Path(job.cache),
        resume_from=layout.checkpoint_folders(),
        should_stop=should_stop,
    )
    return Outcome(
        status=result.status,
        steps=result.steps,
        images_per_second=result.images_per_second,
        device=result.device,
        threads=torch.get_num_threads(),
        data_fingerprint=result.data_fingerprint,
        data_sets=tuple(result.data_sets),
        error=result.error,
    )


def _fetch_start(config: TrialConfig, remote: str, layout: TrialLayout) -> None:
    """Bring the checkpoint that the trial starts from or measures; one that is not there is said by who reads it."""
    from orchestrator.remote import Remote
    from orchestrator.remote_trial import Mirror, pull_step

    mirror = Mirror.of_trial(Remote(remote), layout)
    init, weights = config.model.init_from, config.model.weights
    if init is not None and init.trial is not None:
        pull_step(mirror, init.trial, init.step)
    source = None if weights is None else released.source(weights)
    if source is not None and source.trial is not None:
        pull_step(mirror, source.trial, source.step)


def _execution(config: TrialConfig, job: Job, layout: TrialLayout) -> ExecutionConfig:
    """How the trial is executed, with what only its place decides: its device, and where other trials lie."""
    placed: dict[str, Any] = {}
    if job.gpus == 0 and config.execution.device == "auto":
        placed["device"] = "cpu"
    if job.save_memory:
        placed["activation_checkpointing"] = True
    init, weights = config.model.init_from, config.model.weights
    of_trial = (init is not None and init.trial is not None) or (
        weights is not None and released.source(weights).trial is not None
    )
    if of_trial and config.execution.trials_root is None:
        placed["trials_root"] = str(layout.root.parents[2])  # STORAGE/SWEEP/trials/ID
        if job.remote is not None:
            _fetch_start(config, job.remote, layout)
    return config.execution.model_copy(update=placed)
