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

from analysis.schemas import METRICS, TOKEN_NORMS

REGISTERS = "model.num_registers"
OUTLIERS = "tokens/last/outlier_fraction"
TOP1 = "test/linear/top1"
LAYERS = 5  # 4 blocks, and what enters the first


@dataclass
class Trial:
    """One trial that `publish` writes; `scores` are its values at the last step."""

    cell: dict[str, Any]
    seed: int
    scores: dict[str, float] = field(default_factory=dict)
    status: str = "finished"
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    peak: float = 20.0  # highest norm of a patch in the last layer; the bulk is at 20

    @property
    def trial_id(self) -> str:
        cell = "-".join(str(value) for value in self.cell.values())
        return "".join(c for c in f"id-{cell}-{self.seed}" if c.isalnum() or c in "-.")


def registers_sweep(counts: Sequence[int] = (0, 1, 2, 4), seeds: Sequence[int] = (0, 1, 2)) -> list[Trial]:
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
) -> Path:
    """Writes the sweep into `folder`, trials in the order `written` (indices), as the orchestrator would."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(trials[0].cell) if trials else []
    found = {axis: list({json.dumps(t.cell[axis]): t.cell[axis] for t in trials}.values()) for axis in names}
    plan = {
        "sweep": folder.name,
        "question": question,
        "axes": dict(axes) if axes is not None else found,
        "seeds": sorted({trial.seed for trial in trials}),
        "baseline": baseline,
        "primary": list(primary),
        "scheduler": None,
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
    images = np.linspace(0, 255, 2 * 16 * 16 * 3).astype(np.uint8).reshape(2, 16, 16, 3)
    norms = np.full((2, 4, 4), 20.0, dtype=np.float32)
    norms[:, 1, 2] = trial.peak
    np.savez(folder / "norm_map.npz", images=images, norms=norms, layer=np.int64(LAYERS - 1))


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


def _norm_rows(trial: Trial) -> list[dict[str, Any]]:
    rows = []
    registers = int(trial.cell.get(REGISTERS) or 0)
    for step in (10, 20):
        for layer in range(LAYERS):
            bulk = 10.0 + 2.5 * layer
            top = bulk + (trial.peak - 20.0) * layer / (LAYERS - 1)
            for token in ("cls", *(f"register_{i}" for i in range(registers)), "patch"):
                median = bulk * (2.0 if token.startswith("register") else 1.0)
                rows.append(
                    {
                        "trial_id": trial.trial_id,
                        "step": step,
                        "layer": layer,
                        "token": token,
                        "source": "probe",
                        "weights": "raw",
                        "count": 512,
                        "mean": median,
                        "median": median,
                        "p90": median * 1.1,
                        "p98": median * 1.2,
                        "p99": median * 1.3,
                        "p999": max(top, median),
                        "max": max(top, median * 1.3),
                        "max_over_median": top / bulk,
                        "kurtosis": 3.0,
                        "kurtosis_log": 3.0,
                        "outlier_fraction": 0.0,
                        "outlier_fraction_150": 0.0,
                        "otsu_threshold": None,
                        "histogram": [{"bin": 5, "count": 512}],
                    }
                )
    return sorted(rows, key=lambda row: (row["step"], row["layer"], row["token"]))
