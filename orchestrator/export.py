"""The command `export`: weights of a trial's newest checkpoint, or of its scoring step, as a folder that timm loads."""

from __future__ import annotations

from pathlib import Path

from orchestrator.inspect import find
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import TrialRow
from orchestrator.remote import Remote
from orchestrator.remote_trial import Mirror, pull_step

EVALUATED = "evaluated"  # whatever the trial's method evaluates


def export(trial: str, to: Path | None, weights: str, storage: Path, state: Path, remote: str | None = None) -> None:
    """Write model.safetensors and config.json to `to` (default: beside the trial's other files) and say how to load.

    Where `storage` is this machine's copy of a `remote` one (its URI), the newest checkpoint comes from there.

    Raises:
        ValueError: no trial, or more than one, is meant; it has no whole checkpoint or not these weights; or timm has
            no such model.
    """
    layout, row = find(trial, storage, state)
    from trainers import catalog, checkpoint
    from trainers import export as timm_folder  # torch: not before the trial is known to exist
    from trainers.config import TrialConfig

    config = TrialConfig.model_validate(row.config)
    if weights == EVALUATED:
        weights = catalog.METHODS[config.method].weights if config.method in catalog.METHODS else "raw"
    if remote is not None:
        pull_step(Mirror(Remote(remote), layout.storage), row.trial_id)
    saved = checkpoint.load_newest(_checkpoint_folders(layout, row))
    if saved is None:
        raise ValueError(f"{row.name} is {row.state} and has no checkpoint to export")
    stored = timm_folder.scored(saved)
    found = timm_folder.weights_in(stored)
    if weights not in found:
        raise ValueError(f"{row.name} has no {weights} weights; its checkpoint has: {', '.join(found) or 'none'}")
    tensors, configuration = timm_folder.to_timm(found[weights], config.model)
    folder = (to or layout.trial(row.trial_id).root / "export" / weights).resolve()
    timm_folder.write(folder, tensors, configuration)
    print(f"{row.name}: {weights} weights of step {stored['step']} are in {folder}")
    if not timm_folder.resizes_alike(config.model):
        print(
            f"note: for images of {config.model.image_size} px only, since timm resizes position embeddings otherwise"
        )
    print(f'model = timm.create_model("local-dir:{folder}", pretrained=True)')


def _checkpoint_folders(layout: SweepLayout, row: TrialRow) -> list[Path]:
    """Where checkpoints of a trial may lie: with the sweep, or where it was adopted from, with another one."""
    own = layout.trial(row.trial_id)
    others = [other for other in layout.published(row.trial_id) if other != own]
    found = next((one for one in (own, *others) if _has_checkpoints(one)), own)
    return found.checkpoint_folders()


def _has_checkpoints(trial: TrialLayout) -> bool:
    return any(path for folder in trial.checkpoint_folders() if folder.is_dir() for path in folder.glob("step_*.pt"))
