"""The whole analysis of a made-up sweep: files, bytes, the page as a browser's parser sees it, odd sweeps."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from analysis import publish as publishing
from analysis import report
from analysis.answer import answer, supported
from analysis.cells import cells, varying
from analysis.collect import collect
from analysis.results import evaluate
from analysis.run import Analysis, analyse
from analysis.tables import ablation
from analysis.thresholds import METRIC as FROZEN
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep

BASELINE = {REGISTERS: 0}


class Page(HTMLParser):
    """Collects what the tests ask about a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


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
    assert {name: path.name for name, path in whole.tables.items()} == {
        name: f"{name}.parquet" for name in ("runs", "metrics", "token_norms", "token_statistics", "ablation")
    }
    for path in whole.tables.values():
        assert b"pandas" not in (pq.read_schema(path).metadata or {})
    stems = {"outlier_fraction", "top1", "train_loss", "norm_map", "norm_histogram", "outliers_by_threshold"}
    stems |= {f"norms_by_{what}" for what in ("layer", "step", "kind", "cell")}
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
    for name in ("runs", "metrics", "token_norms", "token_statistics", "ablation"):
        assert len({analysis.tables[name].read_bytes() for analysis in analyses}) == 1, name
    assert len(analyses[0].figures) == 30  # 15 pictures as PNG and as SVG
    for paths in zip(*(analysis.figures for analysis in analyses), strict=True):
        assert len({path.read_bytes() for path in paths}) == 1, paths[0].name
    assert analyses[0].report.read_bytes() == analyses[2].report.read_bytes()


def test_the_page_needs_no_network_and_is_accessible(whole: Analysis) -> None:
    page = page_of(whole)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not any("http:" in text or "@import" in text for text in page.text)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    images = page.of("img")
    assert len(images) == 10
    assert all(len(image["alt"]) > 40 for image in images)
    assert any("0: 5.13 %; 1: 4.07 %" in image["alt"] for image in images)  # 0.154/3 and 0.122/3
    assert all("scope" in head for head in page.of("th"))
    assert len(page.of("h1")) == 1
    assert page.of("html")[0]["lang"] == "en"


def test_numbers_lead_to_their_trials(whole: Analysis) -> None:
    page = page_of(whole)
    words = " ".join(" ".join(page.text).split())
    for text in ("id-0-0", "id-4-1", "run-id-4-1", "abc123", "0123456789abcdef", "sqlite:///mlflow.db", "reg_init_std"):
        assert text in words
    assert "deit3, ViT-B, ImageNet-22k, 4 registers 84.7 test/linear/top1 deit3, nano, scenes, 4 registers" in words
    assert "CPU core hours (hours × threads) 0.24" in words  # 12 trials × 36 s × 2 threads
    assert "1 diverged" in words


def test_nothing_from_outside_becomes_html(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1))
    for trial in trials:
        trial.cell["method"] = '"><script>$x_{</script>'
        trial.scores["<b>bold</b>"] = 1.0
        trial.config["data.name"] = evil
    trials[0].result = {"error": {"type": "E", "message": evil}, "device": evil}
    analysis = analyse(publish(tmp_path / "s", trials, baseline=BASELINE, question=evil, primary=[TOP1, "<b>bold</b>"]))
    page = page_of(analysis)
    assert len(page.of("script")) == 1  # the page's own
    assert not page.of("b")
    assert len(page.of("img")) == 11
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert evil in page.text
    assert '"><script>' not in page.text  # the only value of an axis tells nothing apart, so it is not named
    assert evil not in terminal_text(analysis)


def said_about(folder: Path) -> str:
    frames = collect(folder)
    return answer(frames.plan, ablation(frames).to_pylist(), varying(frames.plan.axes, cells(frames.plan)))


def test_the_answer_claims_what_intervals_support(tmp_path: Path) -> None:
    said = said_about(publish(tmp_path / "s", registers_sweep(), baseline=BASELINE))
    assert said.startswith(
        "Compared with num_registers = 0, over 3 paired seeds: for top-1 (linear probe, test) the data"
    )
    assert "the data cannot tell (95 % intervals span [−" in said
    assert "outlier fraction (last layer) is lower with num_registers = 1, 2, 4 by 1.07 to 3.07 points" in said


@pytest.mark.parametrize(
    ("p_adjusted", "low", "high", "claimed"),
    [
        (0.04, 0.1, 0.3, True),
        (0.04, -0.3, -0.1, True),
        (0.06, 0.1, 0.3, False),
        (0.04, -0.1, 0.3, False),
        (None, 0.1, 0.1, False),
    ],
)
def test_a_claim_needs_both_the_corrected_p_and_the_interval(
    p_adjusted: float | None, low: float, high: float, claimed: bool
) -> None:
    row = {"p_adjusted": p_adjusted, "p_value": 0.01, "delta_low": low, "delta_high": high}
    assert supported(row) == claimed


def test_the_answer_may_be_that_it_cannot_tell(tmp_path: Path) -> None:
    plan_of = {
        "noise": {"primary": [TOP1], "baseline": BASELINE},
        "no_baseline": {"baseline": None},
        "no_primary": {"primary": [], "baseline": BASELINE},
    }
    said = {
        name: said_about(publish(tmp_path / name, registers_sweep(), **plan))  # type: ignore[arg-type]
        for name, plan in plan_of.items()
    }
    said["one_seed"] = said_about(publish(tmp_path / "one", registers_sweep(seeds=(0,)), baseline=BASELINE))
    assert all(sentence.startswith("Cannot tell") for sentence in said.values()), said
    assert "one seed gives no interval" in said["one_seed"]
    assert "no baseline" in said["no_baseline"]
    assert "no primary metric" in said["no_primary"]


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
    assert "−1.07 [−1.26, −0.88]" in lines[one + 1]
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


def test_pictures_and_measurements_stand_under_their_headings(tmp_path: Path) -> None:
    trials = [
        Trial({"method": method, REGISTERS: count}, 0, {TOP1: 0.5, "locality/position/normal/top1": 0.4}, details=True)
        for method in ("deit3", "dino")
        for count in (0, 4)
    ]
    for trial in trials:
        trial.outliers, trial.peak = 8, 90.0
    analysis = analyse(publish(tmp_path / "s", trials, baseline=BASELINE))
    page = page_of(analysis)
    words = " ".join(" ".join(page.text).split())
    order = [
        "Scores and training Top-1",
        "Norms of tokens Histogram of patch norms: deit3",
        "dino: 4 pictures",
        "Where outliers are Norm map over images: deit3",
        "dino: 3 pictures",
        "Attention Attention of the class token: deit3",
        "Measurements",
        "Local information: what patches know of their position and pixels method num_registers top-1 of the position",
        "deit3 0 40.00",
        "Reference, not reproduced",
        "position probe, normal patches, top-1, % (Fig. 5b) DINOv2 ViT-g/14, 0 registers 41.7",
        "Exploratory metrics",
    ]
    places = [words.find(text) for text in order]
    assert -1 not in places and places == sorted(places)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"norm_histogram", "norm_histogram_2", "attention_average_2", "filter"} <= set(ids)


def test_exploratory_metrics_come_in_their_order_and_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("train/loss", "val/knn/top1", "zebra", "attention/last/own", "tokens/own", "test/knn/top1")
    trials = [Trial({REGISTERS: count}, 0, dict.fromkeys((*names, TOP1), 0.5)) for count in (0, 4)]
    folder = publish(tmp_path / "s", trials, baseline=BASELINE, primary=[TOP1])
    titles = exploratory(rendered(folder))
    kinds = ["test/knn/top1", FROZEN, "tokens/own", "attention/last/own", "zebra", "val/knn/top1", "train/loss"]
    assert titles == [kind for kind in kinds for _ in (0, 4)]
    monkeypatch.setattr(report, "_MOST_ROWS", 3)
    page = rendered(folder)
    assert exploratory(page) == ["test/knn/top1", "test/knn/top1", FROZEN]
    assert "3 rows that were not declared primary (11 more in tables/ablation.parquet)" in "".join(page.text)


def rendered(folder: Path) -> Page:
    """The page without pictures."""
    frames = collect(folder)
    return Page(report.render(evaluate(frames), (), ()))


def exploratory(page: Page) -> list[str]:
    """The metrics of the exploratory rows, from their titles."""
    return [head["title"] for head in page.of("th") if head.get("scope") == "row" and "title" in head]


def test_released_weights_stand_beside_the_paper_by_their_own_settings(tmp_path: Path) -> None:
    weights = {"dinov2_g": 0, "dinov2_l_reg4": 4}
    trials = [
        Trial(
            {"model.weights": name},
            0,
            {"locality/position/normal/top1": 0.4, TOP1: 0.5},
            config={"method": "pretrained", REGISTERS: registers, "model.size": "giant"},
        )
        for name, registers in weights.items()
    ]
    analysis = analyse(publish(tmp_path / "s", trials, baseline={"model.weights": "dinov2_g"}, primary=[TOP1]))
    words = " ".join(" ".join(page_of(analysis).text).split())
    assert "41.7 locality/position/normal/top1 dinov2_g, pretrained, giant, scenes, 0 registers 40" in words
    assert "65.8 locality/position/normal/top1 dinov2_l_reg4, pretrained, giant, scenes, 4 registers 40" in words
    assert "observational : released weights differ in more than the axis" in words
