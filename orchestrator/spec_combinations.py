"""Checks what only shows in the cells of a sweep, and the parts that depend on them: resources and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.cells import Cell
from orchestrator.draft import Draft, Path, nearest
from orchestrator.spec_checks import Parts
from orchestrator.sweep import MAX_TRIALS, MoreSeeds, Resources, is_metric
from trainers.catalog import MEASUREMENTS, MODEL_SIZES, PROBES, is_dotted_path, short_name
from trainers.config import TrialConfig, resolve
from trainers.explain import ConfigError, Fault, did_you_mean, shown

MAX_COMBINATIONS = 50  # distinct impossible combinations that are listed

# First parts of metric names, and what the probe `linear` measures besides, after `val/` and `test/`.
_METRIC_ROOTS = ("train", "val", "test", "tokens", *MEASUREMENTS)
_METRIC_FAMILIES = ("linear_mean_patch",)
_RESOURCES_OF_SIZE = "a mapping, as in {cpus: 4, gpus: 0.5}"
_RESOURCES = f"{_RESOURCES_OF_SIZE}, or one for each model size"
_DERIVED = ("outlier_fraction_frozen", "common_bias/corloc")  # by the analysis, from all trials together


@dataclass
class _Impossible:
    """One impossible combination: its place and sentence, in how many cells, and in which one first."""

    path: Path
    message: str
    first: Cell
    count: int = 1


def check_cells(draft: Draft, parts: Parts, num_seeds: int) -> list[TrialConfig]:
    """The resolved configurations of all cells; each impossible combination is reported once."""
    trials = parts.grid().size() * num_seeds
    if trials > MAX_TRIALS:
        draft.report(("axes",), f"axes and seeds make {trials:,} trials; allowed: at most {MAX_TRIALS:,}")
        return []
    configs: list[TrialConfig] = []
    found: dict[tuple[Path, str], _Impossible] = {}
    total = 0
    for cell in parts.grid().cells():
        total += 1
        try:
            configs.append(resolve(cell.settings))
        except ConfigError as error:
            for fault in error.faults:
                _collect(found, parts, cell, fault)
            if len(found) >= MAX_COMBINATIONS:
                break
    if total == 0:
        draft.report(("exclude",), "exclude leaves no cell")
    for impossible in found.values():
        draft.report(impossible.path, impossible.message + _in_cells(impossible, total))
    return configs


def check_baseline_cells(draft: Draft, parts: Parts, baseline: Mapping[str, Any]) -> None:
    """`exclude` leaves a cell that others differ from; that some others have none a plan notes."""
    cells = parts.grid().cells()
    if not any(all(cell.values[name] == value for name, value in baseline.items()) for cell in cells):
        message = f"exclude leaves no cell of the baseline {shown(dict(baseline))}, so there is nothing to differ from"
        draft.report(("baseline",), message)


def _collect(found: dict[tuple[Path, str], _Impossible], parts: Parts, cell: Cell, fault: Fault) -> None:
    path = blame(parts, cell, fault.fields)
    if (path, fault.message) in found:
        found[path, fault.message].count += 1
    else:
        found[path, fault.message] = _Impossible(path, fault.message, cell)


def _in_cells(impossible: _Impossible, total: int) -> str:
    if impossible.count == total:
        return "" if total == 1 else " (in every cell)"
    where = ", ".join(f"{name}: {shown(value).strip(chr(39))}" for name, value in impossible.first.values.items())
    return f" (in {impossible.count} of {total} cells, first in {{{where}}})"


def blame(parts: Parts, cell: Cell, settings: Iterable[str]) -> Path:
    """Where the first of `settings` is given: as an axis value, else in `when`, else in the base configuration."""
    names = list(settings)
    for name in names:
        if name in cell.values:
            return parts.value_paths[name, cell.values[name]]
    for name in names:
        for entry, paths in zip(reversed(parts.when), reversed(parts.when_paths), strict=True):
            if name in paths and name in entry.settings and entry.settings[name] == cell.settings.get(name):
                return paths[name]
    for name in names:
        if name in parts.trial_paths:
            return parts.trial_paths[name]
    return ("axes",)


def check_resources(draft: Draft, configs: list[TrialConfig]) -> Resources | dict[str, Resources]:
    """What a trial asks for, one for all or by model size; every size of the sweep must then be named."""
    raw = draft.raw.get("resources")
    if raw is None:
        return Resources()
    if not isinstance(raw, dict):
        draft.report(("resources",), f"resources is {shown(raw)}; allowed: {_RESOURCES}")
        return Resources()
    by_size = bool(raw) and (set(raw) & set(MODEL_SIZES) or _all_mappings(raw))
    if not by_size:
        return draft.validated(Resources, raw, ("resources",)) or Resources()
    for size, value in raw.items():
        if not isinstance(value, dict):
            draft.report(("resources", size), f"resources.{size} is {shown(value)}; allowed: {_RESOURCES_OF_SIZE}")
    mappings = {size: value for size, value in raw.items() if isinstance(value, dict)}
    given = {size: draft.validated(Resources, value, ("resources", size)) for size, value in mappings.items()}
    for size in raw:
        if size not in MODEL_SIZES:
            draft.report(
                ("resources", size), f"resources names {size}, which is no model size{nearest(size, MODEL_SIZES)}"
            )
    for size in dict.fromkeys(config.model.size for config in configs):
        if size not in raw:
            draft.report(("resources",), f"resources has nothing for model.size {size}; it has {', '.join(raw)}")
    return {size: resources for size, resources in given.items() if resources is not None}


def _all_mappings(raw: dict[str, Any]) -> bool:
    return all(isinstance(value, dict) for value in raw.values())


def check_primary(draft: Draft, configs: list[TrialConfig]) -> None:
    """Metrics that were declared beforehand are ones that some cell measures."""
    raw = draft.raw.get("primary")
    primary = raw if isinstance(raw, list) else []
    for index, name in enumerate(primary):
        if not is_metric(name):
            continue  # reported by the schema
        if name in primary[:index]:
            draft.report(("primary", index), f"primary has {name} twice")
        elif (wrong := not_measured(name, configs)) is not None:
            draft.report(("primary", index), f"primary has {name}{wrong}")


def check_more_seeds(draft: Draft, more: MoreSeeds, configs: list[TrialConfig]) -> None:
    """There is a baseline that cells differ from, and the metric that decides is one that trials report."""
    if more.most < more.first:
        draft.report(("seeds", "most"), f"seeds.most is {more.most}; allowed: from seeds.first, {more.first}, on")
    if not draft.raw.get("baseline"):
        message = "seeds.until is about differences to the baseline, and the file has no baseline"
        draft.report(("seeds", "until"), message)
    name = more.until.metric
    derived = "; it is derived from all trials at the end, so none reports it"
    wrong = derived if name.endswith(_DERIVED) else not_measured(name, configs)
    if wrong is not None:
        draft.report(("seeds", "until", "metric"), f"seeds.until.metric is {name}{wrong}")


def not_measured(name: str, configs: list[TrialConfig]) -> str | None:
    """What is wrong with a metric's name, to be said after it; None where some cell may measure it."""
    if any(config.command is not None for config in configs):
        return None  # what a program measures only it knows
    run = {probe for config in configs for probe in config.evaluation.probes}
    measured = {name for config in configs for name in config.tokens.measurements}
    root, family, *_ = name.split("/")
    if root not in _METRIC_ROOTS:
        return f"; metrics begin with one of {', '.join(_METRIC_ROOTS)}"
    if root in ("val", "test"):
        probe = "linear" if family in _METRIC_FAMILIES else family
        own = _own_probes(run) or any(is_dotted_path(config.method) for config in configs)
        if probe not in PROBES:
            guess = did_you_mean(family, PROBES) or nearest(family, [*PROBES, *_METRIC_FAMILIES])
            return None if own or not configs else f", and there is no probe {family}{guess}"
        if run and probe not in run and not own:
            return f", but evaluation.probes ({', '.join(sorted(run))}) lacks {probe}"
        if (wrong := _wrong_metric(name, probe, configs)) is not None:
            return f", {wrong}"
    elif root in MEASUREMENTS and measured and root not in measured:
        return f", but tokens.measurements ({', '.join(sorted(measured))}) lacks {root}"
    return None


def _wrong_metric(name: str, probe: str, configs: Iterable[TrialConfig]) -> str | None:
    """Why the probe has no metric of that name; None where it has."""
    *between, last = name.split("/")[2:] or [""]
    metrics = PROBES[probe].metrics
    if last not in metrics:
        return f"and probe {probe} has no metric {last!r}{did_you_mean(last, metrics)}; it has {', '.join(metrics)}"
    first = {
        short_name(data) for config in configs for data in getattr(getattr(config.evaluation, probe), "data", ())[:1]
    }
    if between and between[0] in first:
        short = "/".join(part for part in name.split("/") if part != between[0])
        return f"but the first data set of evaluation.{probe}.data has the short names: {short}"
    return None


def _own_probes(names: set[str]) -> bool:
    return bool(names - set(PROBES))
