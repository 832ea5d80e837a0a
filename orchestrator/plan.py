"""From a sweep to its trials: cells times seeds, identities and readable names; pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import match
from orchestrator.cells import Cell, Grid
from orchestrator.ledger_schema import Role
from orchestrator.sweep import Resources, Sweep
from orchestrator.trial_names import trial_names
from trainers import released
from trainers.catalog import MODEL_SIZES
from trainers.config import TrialConfig, resolve, trial_id

# Student's t at 0.975 for 1 … 30 degrees of freedom, as handbooks list it; scipy takes too long to load for a plan.
_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z_975 = 1.959964
_MOST_LISTED = 32  # cells that one note lists


@dataclass(frozen=True)
class PlannedTrial:
    """One trial: a cell with one seed. `cell` has each axis by dotted name, null where the axis has no effect.

    Trials of the role `search` are those by which a search chooses settings; tables leave them out.
    """

    trial_id: str
    name: str
    cell: dict[str, Any]
    seed: int
    config: TrialConfig
    resources: Resources
    role: Role = "cell"


@dataclass(frozen=True)
class Plan:
    """All trials of a sweep in the order of its file, and its cells; `notes` says what a user should know.

    With a search there are no trials yet: they follow from it while the sweep runs. `settings` has what holds in each
    cell by dotted name.
    """

    sweep: Sweep
    trials: tuple[PlannedTrial, ...]
    cells: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...] = ()

    def to_json(self, cost: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of plan.json: this plan only, every value as JSON has it."""
        sweep = self.sweep.model_dump(mode="json")
        trials = [
            {
                "trial_id": t.trial_id,
                "name": t.name,
                "cell": plain_cell(t.cell),
                "seed": t.seed,
                "training_flops": match.training_flops(t.config),
            }
            for t in self.trials
        ]
        more_seeds = {} if self.sweep.more_seeds is None else {"more_seeds": sweep["more_seeds"]}
        return {
            "sweep": self.sweep.name,
            **{key: sweep[key] for key in ("question", "axes", "seeds", "baseline", "primary")},
            **{key: sweep[key] for key in ("match", "score", "outlier_limit", "scheduler")},
            **more_seeds,
            "cost": dict(cost or {}),
            "model_sizes": {name: {"width": size.width, "depth": size.depth} for name, size in MODEL_SIZES.items()},
            "trials": trials,
        }


def build_plan(sweep: Sweep) -> Plan:
    """The plan of `sweep`.

    Cells that differ only in settings without effect are one: `reg_init_std` at 0 registers is null, and the first
    of such cells stands for all. Two cells that are the same trial for another reason (`auto` beside the value that it
    becomes) are one too, which a note says.

    Raises:
        ConfigError: a cell's configuration is impossible; `read_sweep` finds that earlier, with the line.
    """
    cells: dict[str, tuple[dict[str, Any], TrialConfig]] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    notes: list[str] = []
    for cell, config in _resolved(sweep):
        values = match.effective(cell, config)
        key = trial_id(config)
        known = cells.setdefault(key, (values, config))
        settings.setdefault(key, cell.settings)
        if known[0] != values:
            notes.append(
                f"the cells {cell_text(known[0])} and {cell_text(values)} are the same trial; the first is kept"
            )
    notes += _without_effect(sweep, [values for values, _ in cells.values()])
    kept = list(cells.values())
    configs = [config for _, config in kept]
    notes += _mixed_recipes(configs) + _enlarged(configs) + _nameless(configs)
    notes += _stopped_early(sweep) + _searched(sweep, len(kept)) + _matched(sweep, kept) + _scored(sweep)
    trials = () if sweep.search is not None else _trials(sweep, kept)
    return Plan(sweep, trials, tuple(values for values, _ in kept), tuple(notes), tuple(settings.values()))


def _resolved(sweep: Sweep) -> list[tuple[Cell, TrialConfig]]:
    """Every cell with its configuration, as long as `match` makes it."""
    seed = {"seed": sweep.seeds[0]}
    cells = list(Grid(sweep.base, sweep.axes, sweep.when, sweep.exclude).cells())
    configs = [resolve({**cell.settings, **seed}) for cell in cells]
    if sweep.match == "flops" and sweep.baseline is not None:
        longer = match.with_equal_flops(cells, configs, sweep.baseline)
        configs = [
            config if new is old else resolve({**new.settings, **seed})
            for old, new, config in zip(cells, longer, configs, strict=True)
        ]
        cells = longer
    return list(zip(cells, configs, strict=True))


def _mixed_recipes(configs: Sequence[TrialConfig]) -> list[str]:
    """That cells of one method follow different presets, as they do where an axis over sizes includes nano."""
    presets: dict[str, set[str]] = {}
    for config in configs:
        presets.setdefault(config.method, set()).add(config.preset)
    return [
        f"cells of {method} follow the presets {' and '.join(sorted(names))}; set trial.preset for one recipe"
        for method, names in presets.items()
        if len(names) > 1
    ]


def _enlarged(configs: Sequence[TrialConfig]) -> list[str]:
    """That images are decoded to a smaller size than the model is trained on."""
    sizes = {(config.data.decode_size, config.model.image_size) for config in configs}
    return [
        f"data.decode_size {decoded} is below model.image_size {size}: images are enlarged, which adds no detail"
        for decoded, size in sorted(sizes, key=str)
        if isinstance(decoded, int) and isinstance(size, int) and decoded < size
    ]


def _nameless(configs: Sequence[TrialConfig]) -> list[str]:
    """That of some measured weights nothing but the file says what model they are of."""
    ours = [config for config in configs if config.command is None]
    models = {config.model.weights: config.model for config in ours if config.model.weights is not None}
    return [
        f"model.weights {name} is no name of released weights: it must be of model.size {model.size}, patch size "
        f"{model.patch_size}, {model.num_registers} registers, as stated or by default"
        for name, model in models.items()
        if name is not None and not released.settings(name)
    ]


def _stopped_early(sweep: Sweep) -> list[str]:
    """That cells are censored by early stopping, or what their searches are."""
    if sweep.scheduler is None:
        return []
    name = sweep.scheduler.name
    if sweep.search is not None:
        return [f"{name} stops suggestions early, which are not scored then; the chosen ones run to their end"]
    return [f"{name} stops trials early, so cells are censored: they are scored by the trials that were left to finish"]


def _matched(sweep: Sweep, cells: Sequence[tuple[dict[str, Any], TrialConfig]]) -> list[str]:
    """How long each cell trains so that all cost the same, and what cells of other lengths do not share."""
    if sweep.match != "flops":
        return []
    listed = [f"{cell_text(values)} {config.optim.steps}" for values, config in cells]
    more = [f"{len(listed) - _MOST_LISTED} more"] if len(listed) > _MOST_LISTED else []
    return [
        f"match: flops makes optim.steps {', '.join([*listed[:_MOST_LISTED], *more])}",
        "cells of other lengths share initial weights, and data order and augmentations as far as the shorter one "
        "goes; learning rate and other schedules follow each cell's own length",
    ]


def _scored(sweep: Sweep) -> list[str]:
    """That the rule of `score` leaves a metric optimistic."""
    if sweep.score is None or sweep.score.best is None:
        return []
    return [f"trials are scored where {sweep.score.best} is best, so that metric itself is optimistic there"]


def _searched(sweep: Sweep, num_cells: int) -> list[str]:
    """What a search will run."""
    search = sweep.search
    if search is None:
        return []
    seeds = search.seeds_beside(sweep.seeds)
    samples = "every suggestion" if search.samples is None else f"{search.samples} suggestions"
    return [
        f"{search.name} search in each of {num_cells} cells: {samples} on seeds {list(seeds)}, then the best anew on "
        f"seeds {list(sweep.seeds)}"
    ]


def _trials(sweep: Sweep, cells: Sequence[tuple[dict[str, Any], TrialConfig]]) -> tuple[PlannedTrial, ...]:
    """Every cell with every seed, named so that people can tell them apart."""
    seeded = [(values, config.model_copy(update={"seed": seed})) for values, config in cells for seed in sweep.seeds]
    names = trial_names([(values, config) for values, config in seeded])
    return tuple(
        PlannedTrial(trial_id(config), name, values, config.seed, config, sweep.resources_of(config.model.size))
        for name, (values, config) in zip(names, seeded, strict=True)
    )


def _without_effect(sweep: Sweep, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Axes that change nothing in any cell."""
    return [
        f"{name} has no effect in any cell"
        for name, values in sweep.axes.items()
        if len(values) > 1 and all(cell[name] is None for cell in cells)
    ]


def interval_half_width(num_seeds: int) -> float | None:
    """Half the width of the paired 95 % t interval, in standard deviations of the paired differences.

    It is t(0.975, n - 1) / sqrt(n): a difference smaller than that cannot be told from none. None for one seed,
    which has no interval. Quantiles beyond 30 degrees of freedom by Fisher's expansion (Abramowitz & Stegun 26.7.5).
    """
    degrees = num_seeds - 1
    if degrees < 1:
        return None
    if degrees <= len(_T_975):
        quantile = _T_975[degrees - 1]
    else:
        z = _Z_975
        terms = (z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z, 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z)
        quantile = z + terms[0] / (4 * degrees) + terms[1] / (96 * degrees**2) + terms[2] / (384 * degrees**3)
    return quantile / math.sqrt(num_seeds)


def plain_cell(values: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as JSON has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def canonical(values: Any) -> str:
    """JSON that equal values share, whatever the order of their names; names of studies are made of it."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def cell_text(values: Mapping[str, Any]) -> str:
    """A cell as a user reads it on one line."""
    return "{" + ", ".join(f"{name}: {'null' if value is None else value}" for name, value in values.items()) + "}"
