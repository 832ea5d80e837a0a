"""Opens the data sets of pending trials once, before any of them starts, and notices when their content has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.plan import PlannedTrial
from trainers.catalog import DATASETS
from trainers.config import DataConfig, TrialConfig


@dataclass
class DataCheck:
    """The fingerprints of data sets, those known from earlier runs and those found now.

    Attributes:
        cache: folder of decoded data sets.
        known: fingerprints from before, by `key`.
        accept_change: whether other content under a known name is taken.
        progress: told while images are decoded.
        found: fingerprints found now, by `key`.
    """

    cache: Path
    known: Mapping[str, str]
    accept_change: bool
    progress: Callable[[str, int, int], None]
    found: dict[str, str] = field(default_factory=dict)

    def fingerprints(self, pending: Sequence[PlannedTrial]) -> dict[str, str]:
        """The fingerprint of each trial's data by trial id, of what it trains on and what its probes run on.

        Raises:
            ValueError: files are missing, or what lies under a name is no longer what trials were trained on.
        """
        from trainers.data import evaluation_configs, fingerprint_of

        result = {}
        for trial in pending:
            if trial.config.command is not None:  # what a program trains on only it knows
                continue
            own = self._open(trial.config, trial.config.data)
            others = {name: self._open(trial.config, data) for name, data in evaluation_configs(trial.config).items()}
            result[trial.trial_id] = fingerprint_of(own, others)
        return result

    def _open(self, config: TrialConfig, data: DataConfig) -> str:
        """The fingerprint of a data set, which is decoded where that was not done yet."""
        from trainers.data import open_data

        name = key(data, config.model.side)
        if name not in self.found:
            opened = open_data(data, config.execution, config.model.side, self.cache, self.progress)
            before = self.known.get(name)
            if before not in (None, opened.fingerprint) and not self.accept_change:
                named = DATASETS[data.train].needs_name if data.train in DATASETS else False
                raise ValueError(
                    f"data set {opened.name}: its content has changed (fingerprint {before} before, "
                    f"{opened.fingerprint} now); {'give it another data.name, or ' if named else ''}pass "
                    "--accept-data-change"
                )
            self.found[name] = opened.fingerprint
        return self.found[name]


def key(data: DataConfig, image_size: int) -> str:
    """What decides the content of a data set, besides the files themselves."""
    settings = data.model_dump(mode="json", exclude={"max_unreadable"})
    if settings["fit"] == "crop":  # known under this key since before there was a choice
        del settings["fit"]
    return json.dumps([settings, image_size], sort_keys=True)
