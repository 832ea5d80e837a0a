"""The command `evaluate`: statistics and probes of one set of weights, as a sweep of one trial that trains nothing."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import driver, inspect, overrides, spec, sweep_run, yaml_file
from orchestrator.layout import SweepLayout
from orchestrator.ledger import TrialRow
from orchestrator.plan import build_plan
from orchestrator.problems import Problem, SpecError
from trainers import catalog, released
from trainers.config import ExecutionConfig, flatten
from trainers.explain import shown

PREFIX = "evaluate_"
_PRIMARY = ("test/linear/top1", "tokens/last/outlier_fraction")
_SHOWN = (
    *("model.size", "model.patch_size", "model.num_registers", "model.pre_norm", "model.layer_scale"),
    "model.weights_fingerprint",
)
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
    if code == sweep_run.DONE and not options.quiet:
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
    _refuse_unknown_activation(found, options)
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
            asked = spec.read_sweep(path, options.overrides, options.name)
        except SpecError as error:  # the file is ours: what can be wrong in it is the model or an option
            said = [Problem(model, None, p.message) if p.file == str(path) else p for p in error.problems]
            raise SpecError(said) from error
    _refuse_misfits(found, asked)
    return asked


def _find(model: str, options: driver.Options) -> _Model:
    if catalog.is_dotted_path(model):
        return _own(model, options)
    path = Path(model).expanduser()
    if path.exists() or released.source(model).file is not None:
        return _of_path(path.resolve())
    trial = released.source(model).trial or model
    matches = inspect.matching(trial, options.storage, options.state) if ":" not in trial else []
    if not matches:
        return _described(model, {}, model)
    return _of_trial(*inspect.one_of(matches, trial), model if trial != model else None)


def _of_path(path: Path) -> _Model:
    """A file of weights, or a folder that timm loads.

    Raises:
        ValueError: it is neither.
    """
    if (path / "config.json").is_file():
        return _described(f"local-dir:{path}", {}, path.name)
    if not path.is_dir() and released.source(path.name).file is None:
        raise ValueError(f"{path}: the type {path.suffix or 'without a suffix'} is not known; {released.SUFFIXES}")
    return _described(
        str(path) if path.is_dir() else path.name, {"execution.weights_root": str(path.parent)}, path.stem
    )


def _of_trial(layout: SweepLayout, row: TrialRow, weights: str | None) -> _Model:
    """A trial that is over, on its own data; `weights` names one of its steps or kinds, else they are its evaluated.

    Raises:
        ValueError: the trial is not finished.
    """
    if row.state != "finished":
        raise ValueError(f"{row.name} is {row.state}; only a finished trial is evaluated")
    data = {f"data.{name}": value for name, value in row.config["data"].items() if value is not None}
    root = row.config["execution"]["data_root"]
    place = {"execution.trials_root": str(layout.storage)} | ({} if root is None else {"execution.data_root": root})
    words = row.name if weights is None else f"{row.name} {weights.removeprefix(row.trial_id)}"
    return _described(weights or row.trial_id, {**data, **place}, words)


def _described(weights: str, settings: dict[str, Any], words: str) -> _Model:
    from trainers.pretrained import describe

    execution = {name.partition(".")[2]: v for name, v in settings.items() if name.startswith("execution.")}
    return _Model("model.weights", weights, {**describe(weights, ExecutionConfig(**execution)), **settings}, words)


def _own(factory: str, options: driver.Options) -> _Model:
    """A user's own backbone, which is built once here, as the trial will build it, to be asked for its registers.

    Raises:
        ValueError: it cannot be loaded or built.
    """
    from trainers.config import resolve
    from trainers.dotted import load
    from trainers.streams import Streams

    given = {path[1]: value for path, value, _ in map(overrides.parse, options.overrides) if path[:1] == ("trial",)}
    config = resolve({**given, "method": "pretrained", "model.factory": factory})
    build = load(factory)
    try:
        built: Any = build(config.model, Streams(0))
    except Exception as error:
        raise ValueError(f"{factory} fails to build a backbone: {type(error).__name__}: {error}") from error
    registers = getattr(built, "num_registers", 0)
    return _Model("model.factory", factory, {"model.num_registers": registers}, factory.replace(":", "."))


def _refuse_unknown_activation(model: _Model, options: driver.Options) -> None:
    """CLIP's towers come with either activation and epsilon, which change every number."""
    given = {path[-1] for path, _, _ in map(overrides.parse, options.overrides) if path[:1] == ("trial",)}
    wanted = {
        "model.mlp": "gelu, or quick_gelu for weights of OpenAI and others that kept it",
        "model.norm_eps": "1e-5",
    }
    for setting, advice in wanted.items():
        if model.setting == "model.weights" and setting not in {*model.settings, *given}:
            raise ValueError(f"{model.value}: tensors of CLIP do not show {setting}; give --set {setting}={advice}")


def _refuse_misfits(model: _Model, asked: spec.Sweep) -> None:
    """What tensors show cannot be set otherwise, nor what only a trial's settings say and plain weights lack."""
    if model.setting != "model.weights":
        return
    config = flatten(build_plan(asked).trials[0].config.model_dump())
    plain = {"model.sink": "none", "model.register_mask": "full" if config["model.num_registers"] else None}
    for name in (*_SHOWN, *plain):
        own = model.settings.get(name, plain.get(name, config[name]))
        if own != config[name]:
            raise ValueError(f"{model.value}: the weights have {name} {shown(own)}, not {shown(config[name])}")


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
