"""The whole analysis of a made-up sweep: files, bytes, the page as a browser's parser sees it, odd sweeps."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from analysis import publish as publishing
from analysis.run import Analysis, analyse
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.page_reader import Page

BASELINE = {REGISTERS: 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """The analysis of a sweep of 4 register counts × 3 seeds, of which the last trial diverged."""
    trials = registers_sweep()
    trials[-1].status = "diverged"
    return analyse(publish(tmp_path_factory.mktemp("whole") / "quick", trials, baseline=BASELINE))


def page_of(analysis: Analysis) -> Page:
    return Page(analysis.report.read_text(encoding="utf-8"))


def terminal_text(analysis: Analysis, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(analysis.terminal)
    return stream.getvalue()


def test_everything_is_written(whole: Analysis) -> None:
    assert whole.problems == ()
    names = {"runs", "metrics", "token_norms", "token_statistics", "ablation"}
    names |= {"trends", "elimination", "thresholds", "aggregates"}
    assert {name: path.name for name, path in whole.tables.items()} == {name: f"{name}.parquet" for name in names}
    for path in whole.tables.values():
        assert b"pandas" not in (pq.read_schema(path).metadata or {})
    stems = {"outlier_fraction", "top1", "train_loss", "norm_map", "norm_histogram", "outliers_by_threshold"}
    stems |= {f"norms_by_{what}" for what in ("layer", "step", "kind", "cell")}
    stems |= {"differences", "learning_curves", "cost_test_linear_top1", "cost_tokens_last_outlier_fraction"}
    assert {path.name for path in whole.figures} == {f"{s}.{kind}" for s in stems for kind in ("png", "svg")}
    for path in whole.figures:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.size[0] > 600
    assert not [path for path in whole.report.parent.rglob(".*") if path.is_file()]  # no temporary file is left


def test_the_same_trials_give_the_same_bytes(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1), details=True)
    order = list(np.random.default_rng(0).permutation(len(trials)))
    first = publish(tmp_path / "a" / "s", trials, baseline=BASELINE)
    other = publish(tmp_path / "b" / "s", trials[::-1], axes={REGISTERS: [4, 0]}, baseline=BASELINE, written=order)
    for path in other.glob("trials/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(np.random.default_rng(1).permutation(table.num_rows)), path)
    analyses = [analyse(first), analyse(other), analyse(first)]
    for name in analyses[0].tables:
        assert len({analysis.tables[name].read_bytes() for analysis in analyses}) == 1, name
    assert len(analyses[0].figures) == 38  # 19 pictures as PNG and as SVG
    for paths in zip(*(analysis.figures for analysis in analyses), strict=True):
        assert len({path.read_bytes() for path in paths}) == 1, paths[0].name
    assert analyses[0].report.read_bytes() == analyses[2].report.read_bytes()


@pytest.mark.parametrize("status", ["missing", "failed"])
def test_a_sweep_without_a_finished_trial(tmp_path: Path, status: str) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1))
    for trial in trials:
        trial.status = status
    analysis = analyse(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert analysis.answer == "No answer yet: none of 4 trials has finished with a score."
    assert {path.stem for path in analysis.figures} <= {"train_loss"}  # of trials that broke off too
    assert f"4 {status}" in " ".join(page_of(analysis).text)
    assert "0/4" not in terminal_text(analysis)
    assert terminal_text(analysis).count("0/2") == 2


def test_an_empty_plan(tmp_path: Path) -> None:
    analysis = analyse(publish(tmp_path / "s", [], axes={}))
    assert analysis.answer.startswith("No answer yet: none of 0 trials")
    assert pq.read_table(analysis.tables["ablation"]).num_rows == 0


def test_losses_of_several_methods_stand_in_panels_of_their_own(tmp_path: Path) -> None:
    trials = [
        Trial({"method": method, "optim.lr": lr}, seed, {TOP1: 0.5, "train/loss": 2.0})
        for method in ("deit3", "dino")
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    analysis = analyse(publish(tmp_path / "s", trials, baseline={"optim.lr": 0.1}))
    losses = next(path for path in analysis.figures if path.name == "train_loss.svg").read_text()
    for words in (">deit3<", ">dino<", ">lr = 0.1<", ">lr = 0.2<", ">training loss<", ">step<"):
        assert words in losses, words
    texts = [image["alt"] for image in page_of(analysis).of("img") if "training loss" in image["alt"]]
    assert len(texts) == 1 and "deit3: from" in texts[0] and "lr = 0.1: from" not in texts[0]


def test_other_axes_make_series_and_stale_pictures_go(tmp_path: Path) -> None:
    trials = [
        Trial({"method": method, REGISTERS: count}, seed, {TOP1: 0.5 + 0.01 * seed, OUTLIERS: 0.02, "train/loss": 2.0})
        for method in ("deit3", "dino")
        for count in (0, 4)
        for seed in (0, 1)
    ]
    analysis = analyse(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert {"norms_by_layer_2.png", "norm_map_2.svg"} <= {path.name for path in analysis.figures}
    assert "deit3: 0: 50.50 %; 4: 50.50 %. dino: 0:" in analysis.report.read_text()
    again = analyse(publish(tmp_path / "s", []))
    assert again.figures == ()
    assert not list((tmp_path / "s" / "figures").iterdir())


def test_a_broken_norm_map_is_said(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0, 1), seeds=(0,)), baseline=BASELINE)
    (folder / "trials" / "id-0-0" / "norm_map.npz").write_bytes(b"no zip")
    np.savez(folder / "trials" / "id-1-0" / "norm_map.npz", images=np.zeros((1, 2, 2, 3), np.uint8), layer=4)
    problems = analyse(folder).problems
    assert [problem[:35] for problem in problems] == [
        "trial id-0-0: norm_map.npz is unrea",
        "trial id-1-0: norm_map.npz is unrea",
        "norm maps are not drawn: no finishe",
    ]


def test_the_terminal_table(whole: Analysis) -> None:
    text = terminal_text(whole, width=100)
    assert max(len(line) for line in text.splitlines()) <= 100
    lines = [re.sub(r"\s+", " ", line) for line in text.splitlines()]
    (one,) = [number for number, line in enumerate(lines) if line.startswith("│ 1 │ 3 │")]
    assert "4.07 ± 0.08" in lines[one]
    assert "−1.07 [−1.40, −0.73]" in lines[one + 1]
    assert any(line.startswith("│ 4 │ 2/3 │") for line in lines)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = publishing.publish_bytes(tmp_path / "file", b"old")

    def fail(stream: object) -> None:
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        publishing.publish(path, fail)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_plan_of_one_axis_that_is_not_registers(tmp_path: Path) -> None:
    trials = [Trial({"model.size": size}, s, {TOP1: 0.5}) for size in ("nano", "tiny") for s in (0, 1)]
    analysis = analyse(publish(tmp_path / "s", trials, baseline={"model.size": "nano"}, primary=[TOP1]))
    assert "equal in every pair" in analysis.answer
    assert "Top-1 (linear probe, test) against size" in analysis.report.read_text()
    assert "the outlier fraction is not drawn: no finished trial has it" in analysis.problems
    assert json.loads((tmp_path / "s" / "plan.json").read_text())["axes"] == {"model.size": ["nano", "tiny"]}
