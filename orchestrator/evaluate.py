"""The command `evaluate`: statistics and probes of one set of weights, as a sweep of one trial that trains nothing."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import driver, inspect, overrides, spec, yaml_file
from orchestrator.layout import SweepLayout
from orchestrator.problems import Problem, SpecError
from trainers import catalog, released
from trainers.config import ExecutionConfig

PREFIX = "evaluate_"
_PRIMARY = ("test/linear/top1", "tokens/last/outlier_fraction")
_NEED_OUR_VIT = ("interventions", "test_time_registers")


@dataclass(frozen=True)
class _Model:
    """What is measured: a setting's name and value, settings that go with it, and words for the sweep's name."""

    setting: str
    value: str
    settings: dict[str, Any]
    words: str


def evaluate(model: str, options: driver.Options) -> int:
    """Measure `model` with everything that the data set allows, and print where the results lie; the exit code.

    Args:
        model: a timm name, a file of weights, a finished trial (its id, the beginning of it, or its name), or a
            backbone of the user's own as package.module:build.
        options: `file` is not read; `overrides` may choose data, resolution, probes and measurements.

    Raises:
        ValueError: there are no such weights, they are no ViT that is known here, or settings are wrong.
    """
    asked = _sweep(model, options)
    code = driver.run_sweep(asked, options)
    if code == driver.DONE and not options.quiet:
        _print_metrics(SweepLayout(options.storage.resolve(), options.state.resolve(), asked.name).tables)
    return code


def _print_metrics(tables: Path) -> None:
    """Every metric of the only trial, since there is nothing to compare it with."""
    import pyarrow.parquet as pq
    from rich.console import Console
    from rich.table import Table

    shown = Table("metric", "value")
    for row in pq.read_table(tables / "ablation.parquet", columns=["metric", "mean"]).to_pylist():
        shown.add_row(row["metric"], "–" if row["mean"] is None else f"{row['mean']:.5g}")
    Console().print(shown)


def _sweep(model: str, options: driver.Options) -> spec.Sweep:
    found = _find(model, options)
    document = {
        "name": options.name or _name(found.words),
        "question": f"What do the tokens of {model} hold?",
        "trial": {"method": "pretrained", **found.settings, "tokens.measurements": _measurements(found, options)},
        "axes": {found.setting: [found.value]},
        "seeds": [0],
        "primary": list(_PRIMARY) if "classes" in _provided(options) else [_PRIMARY[-1]],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluate.yaml"
        path.write_text(yaml_file.dump(document))
        try:
            return spec.read_sweep(path, options.overrides, options.name)
        except SpecError as error:  # the file is ours: what can be wrong in it is the model or an option
            said = [Problem(model, None, p.message) if p.file == str(path) else p for p in error.problems]
            raise SpecError(said) from error


def _find(model: str, options: driver.Options) -> _Model:
    if catalog.is_dotted_path(model):
        return _own(model)
    if released.source(model).file is not None:
        path = Path(model).expanduser().resolve()
        return _described(path.name, {"execution.weights_root": str(path.parent)}, path.stem)
    matches = inspect.matching(model, options.storage, options.state) if ":" not in model else []
    if not matches:
        return _described(model, {}, model)
    layout, row = inspect.one_of(matches, model)
    others = {name: row.config["data"][name] for name in ("train", "name", "seed", "decode_size", "scenes")}
    data = {f"data.{name}": value for name, value in others.items() if value is not None}
    root = row.config["execution"]["data_root"]
    place = {"execution.trials_root": str(layout.storage)} | ({} if root is None else {"execution.data_root": root})
    return _described(row.trial_id, {**data, **place}, row.name)


def _described(weights: str, settings: dict[str, Any], words: str) -> _Model:
    from trainers.pretrained import describe

    execution = {name.partition(".")[2]: v for name, v in settings.items() if name.startswith("execution.")}
    return _Model("model.weights", weights, {**describe(weights, ExecutionConfig(**execution)), **settings}, words)


def _own(factory: str) -> _Model:
    """A user's own backbone, which is built once here to be asked for its registers."""
    from trainers.config import ModelConfig
    from trainers.dotted import load
    from trainers.streams import Streams

    built: Any = load(factory)(ModelConfig(), Streams(0))
    registers = getattr(built, "num_registers", 0)
    return _Model("model.factory", factory, {"model.num_registers": registers}, factory.replace(":", "."))


def _measurements(model: _Model, options: driver.Options) -> list[str]:
    """Every measurement that the data set and the backbone allow."""
    provided = _provided(options)
    return [
        name
        for name, entry in catalog.MEASUREMENTS.items()
        if set(entry.needs) <= set(provided) and not (model.setting == "model.factory" and name in _NEED_OUR_VIT)
    ]


def _provided(options: driver.Options) -> Sequence[str]:
    """What the data set provides; a user's own is taken to provide classes."""
    chosen = [value for path, value, _ in map(overrides.parse, options.overrides) if path == ("trial", "data.train")]
    return catalog.provides(str(chosen[-1]) if chosen else "scenes") or ("classes",)


def _name(words: str) -> str:
    return (PREFIX + re.sub(r"[^A-Za-z0-9_.-]+", "_", words))[:60].rstrip("._-")
