"""A published sweep made up on disk: every number in it is chosen, so that every number of a table is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.schemas import METRICS, TOKEN_NORMS, TOKEN_STATISTICS

REGISTERS = "model.num_registers"
OUTLIERS = "tokens/last/outlier_fraction"
TOP1 = "test/linear/top1"
LAYERS = 5  # 4 blocks, and what enters the first
IMAGES, GRID = 25, (4, 4)
PATCHES = 400  # of all images


@dataclass
class Trial:
    """One trial that `publish` writes; `scores` are its values at the last step."""

    cell: dict[str, Any]
    seed: int
    scores: dict[str, float] = field(default_factory=dict)
    status: str = "finished"
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    peak: float = 20.0  # norm of the outliers in the last layer; the bulk lies evenly between 18 and 22
    outliers: int = 0  # of the 400 patches
    details: bool = False  # whether it leaves what measurements besides norms give

    @property
    def trial_id(self) -> str:
        cell = "-".join(str(value) for value in self.cell.values())
        return "".join(c for c in f"id-{cell}-{self.seed}" if c.isalnum() or c in "-.")


def registers_sweep(
    counts: Sequence[int] = (0, 1, 2, 4), seeds: Sequence[int] = (0, 1, 2), details: bool = False
) -> list[Trial]:
    """Outliers fall by exactly 0.01 · min(r, 3) and by a known amount a seed; top-1 differs by noise alone."""
    noise = {0: 0.0, 1: 0.001, 2: 0.003, 3: 0.002}
    wobble = {0: 0.01, 1: -0.01, 2: 0.004, 3: -0.006}
    return [
        Trial(
            cell={REGISTERS: count},
            seed=seed,
            scores={
                OUTLIERS: 0.05 - 0.01 * min(count, 3) + noise[seed] * (1 if count == 0 else 0.5),
                TOP1: 0.70 + wobble[(seed + count) % 4],
                "train/loss": 1.0 + 0.1 * seed,
            },
            peak=200.0 if count == 0 else 100.0 / count,
            outliers=20 - 4 * min(count, 3),
            details=details,
        )
        for count in counts
        for seed in seeds
    ]


def publish(
    folder: Path,
    trials: Sequence[Trial],
    *,
    axes: Mapping[str, Sequence[Any]] | None = None,
    baseline: Mapping[str, Any] | None = None,
    primary: Sequence[str] = (TOP1, OUTLIERS),
    question: str = "How many registers does a small ViT need?",
    written: Sequence[int] | None = None,
    first_seeds: Sequence[int] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the sweep into `folder`, trials in the order `written` (indices), as the orchestrator would.

    With `first_seeds`, cells with other seeds as well got those by the variance of the first ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(trials[0].cell) if trials else []
    found = {axis: list({json.dumps(t.cell[axis]): t.cell[axis] for t in trials}.values()) for axis in names}
    plan = {
        "sweep": folder.name,
        "question": question,
        "axes": dict(axes) if axes is not None else found,
        "seeds": sorted({trial.seed for trial in trials}) if first_seeds is None else list(first_seeds),
        **({} if first_seeds is None else {"more_seeds": {"first": len(first_seeds)}}),
        "baseline": baseline,
        "primary": list(primary),
        "scheduler": None if scheduler is None else dict(scheduler),
        "cost": {},
        "trials": [
            {"trial_id": t.trial_id, "name": f"deit3 nano {i} seed{t.seed}", "cell": t.cell, "seed": t.seed}
            for i, t in enumerate(trials)
        ],
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    runs = {trial.trial_id: f"run-{trial.trial_id}" for trial in trials}
    place = {"tracking_uri": "sqlite:///mlflow.db", "experiment_id": "1", "parent_run_id": "p", "runs": runs}
    (folder / "mlflow.json").write_text(json.dumps(place), encoding="utf-8")
    for index in written if written is not None else range(len(trials)):
        _publish_trial(folder / "trials" / trials[index].trial_id, trials[index])
    return folder


def _publish_trial(folder: Path, trial: Trial) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(trial)), encoding="utf-8")
    if trial.status == "missing":
        return
    result = {
        "trial_id": trial.trial_id,
        "status": trial.status,
        "attempts": 1,
        "started": "2024-05-01T12:00:00+00:00",
        "seconds": 36.0,
        "gpu_seconds": 0.0,
        "images_per_second": 500.0 + trial.seed,
        "steps": 20,
        "device": "cpu",
        "threads": 2,
        "git_commit": "abc123",
        "versions": {"torch": "2.14.1", "timm": "1.0.31"},
        "data_fingerprint": "0123456789abcdef",
        "error": None,
    }
    (folder / "result.json").write_text(json.dumps(result | trial.result), encoding="utf-8")
    # Earlier steps hold values that must not be taken for the score.
    rows = [(step, name, value if step == 20 else 9.0) for step in (10, 20) for name, value in trial.scores.items()]
    columns = list(zip(*sorted(rows), strict=True)) or [(), (), ()]
    table = {"step": columns[0], "name": columns[1], "value": columns[2]}
    schema = pa.schema([METRICS.field(name) for name in table])
    pq.write_table(pa.table(table, schema=schema), folder / "metrics.parquet")
    pq.write_table(pa.Table.from_pylist(_norm_rows(trial), schema=TOKEN_NORMS), folder / "token_norms.parquet")
    norms = np.full((2, *GRID), 20.0, dtype=np.float32)
    norms[:, 1, 2] = trial.peak
    np.savez(folder / "norm_map.npz", images=pixels(), norms=norms, layer=np.int64(LAYERS - 1))
    if trial.details:
        _publish_details(folder, trial)


def pixels() -> NDArray[np.uint8]:
    """The two images that maps are drawn over, [2, 16, 16, 3]."""
    return np.linspace(0, 255, 2 * 16 * 16 * 3).astype(np.uint8).reshape(2, 16, 16, 3)


def statistic_rows(trial: Trial) -> list[dict[str, Any]]:
    """Kurtosis of every layer, and attention on outliers of two heads, at the last step."""
    keys = {"trial_id": trial.trial_id, "step": 20, "weights": "raw", "layer": None, "head": None, "token": None}
    attention = [{"layer": layer, "head": head, "value": 0.1 * head} for layer in (1, 2) for head in (0, 1)]
    return [
        *(keys | {"name": "attention/cls/outliers"} | place for place in attention),
        *(keys | {"name": "channels/kurtosis", "layer": layer, "value": 2.0 * layer} for layer in range(LAYERS)),
        keys | {"name": "location/row_cv", "layer": 4, "token": "patch", "value": 0.5},
    ]


def _publish_details(folder: Path, trial: Trial) -> None:
    """What measurements besides norms leave: statistics, and arrays with all outliers at row 1, column 2."""
    table = pa.Table.from_pylist(statistic_rows(trial), schema=TOKEN_STATISTICS)
    pq.write_table(table, folder / "token_statistics.parquet")
    counts = np.zeros(GRID, np.int64)
    counts[1, 2] = trial.outliers
    np.savez(folder / "location.npz", counts=counts, images=np.full(GRID, IMAGES), threshold=30.0, layer=LAYERS - 1)
    outlier, normal = np.zeros(200, np.int64), np.zeros(200, np.int64)
    outlier[-10:-6] = trial.outliers // 4
    normal[100:195] = np.arange(95)
    np.savez(folder / "neighbors.npz", edges=np.linspace(-1, 1, 201), mean_outlier=outlier, mean_normal=normal)
    registers = int(trial.cell.get(REGISTERS) or 0)
    tokens = ["cls", *(f"register_{number}" for number in range(registers))]
    maps = np.full((2, len(tokens), *GRID), 0.01, np.float32)
    for number in range(len(tokens)):
        maps[:, number, number % 4, (number // 4) % 4] = 0.4
    np.savez(
        folder / "attention.npz",
        images=pixels(),
        maps=maps,
        average=maps.mean(axis=0),
        averaged_images=np.int64(IMAGES),
        tokens=np.array(tokens),
        layer=np.int64(LAYERS - 1),
        head_reduction=np.array("mean"),
    )


def _config(trial: Trial) -> dict[str, Any]:
    nested: dict[str, Any] = {
        "method": "deit3",
        "seed": trial.seed,
        "precision": "fp32",
        "model": {"size": "nano", "patch_size": 8, "num_registers": 0, "reg_init_std": None},
        "data": {"train": "scenes"},
        "optim": {"steps": 20, "lr": 0.001},
        "evaluation": {"probes": ["linear", "knn"]},
    }
    for name, value in {**trial.cell, **trial.config}.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    if nested["model"]["num_registers"]:
        nested["model"]["reg_init_std"] = nested["model"]["reg_init_std"] or 0.02
    return nested


def patch_norms(trial: Trial, layer: int = LAYERS - 1, step: int = 20) -> NDArray[np.float64]:
    """The norms of all patches, [400]: the bulk evenly within a tenth of its middle, then outliers, by layer and step.

    The bulk's middle grows by 2.5 a layer and outliers as steadily to the trial's peak, of half the height at step 10.
    """
    bulk = 10.0 + 2.5 * layer
    top = bulk + (trial.peak - 20.0) * layer / (LAYERS - 1) * step / 20
    return np.concatenate(
        [np.linspace(0.9 * bulk, 1.1 * bulk, PATCHES - trial.outliers), np.full(trial.outliers, max(top, bulk))]
    )


def sparse(norms: NDArray[np.float64]) -> list[dict[str, int]]:
    """The occupied bins of the grid of token_norms, worked out anew: 512 bins a decade from 1e-3 to 1e5."""
    bins = np.clip(np.floor((np.log10(norms) + 3) * 512), -1, 4096).astype(int) + 1
    return [
        {"bin": int(bin_), "count": int(count)}
        for bin_, count in zip(*np.unique(bins, return_counts=True), strict=True)
    ]


def norm_row(norms: NDArray[np.float64], **keys: Any) -> dict[str, Any]:
    """The row of token_norms of some norms, by numpy alone; what the analysis only copies is made up."""
    median = float(np.median(norms))
    threshold = max(median + 5 * 1.4826 * float(np.median(np.abs(norms - median))), 1.5 * median)
    return {
        "source": "probe",
        "weights": "raw",
        **keys,
        "count": len(norms),
        "mean": float(norms.mean()),
        "median": median,
        **dict(zip(("p90", "p98", "p99", "p999"), np.quantile(norms, (0.9, 0.98, 0.99, 0.999)).tolist(), strict=True)),
        "max": float(norms.max()),
        "max_over_median": norms.max() / median,
        "kurtosis": 3.0,
        "kurtosis_log": 3.0,
        "outlier_fraction": float((norms > threshold).mean()),
        "outlier_fraction_150": float((norms > 150).mean()),
        "otsu_threshold": None,
        "histogram": sparse(norms),
    }


def _norm_rows(trial: Trial) -> list[dict[str, Any]]:
    rows = []
    registers = int(trial.cell.get(REGISTERS) or 0)
    for step in (10, 20):
        for layer in range(LAYERS):
            patches = patch_norms(trial, layer, step)
            single = np.linspace(0.95, 1.05, IMAGES) * (10.0 + 2.5 * layer)
            tokens = {
                "cls": single,
                **{f"register_{i}": single * (2.0 + i) for i in range(registers)},
                "patch": patches,
            }
            rows += [
                norm_row(norms, trial_id=trial.trial_id, step=step, layer=layer, token=token)
                for token, norms in tokens.items()
            ]
    return sorted(rows, key=lambda row: (row["step"], row["layer"], row["token"]))
