"""report.html as a parser sees it: its order, its tables and their numbers, the way back to runs, hostile input."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from analysis import report, report_facts
from analysis.collect import Mlflow, collect
from analysis.results import evaluate
from analysis.run import Analysis, analyse
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.page_reader import Page

BASELINE = {REGISTERS: 0}
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def page_of(analysis: Analysis) -> Page:
    return Page(analysis.report.read_text(encoding="utf-8"))


def html_of(folder: Path) -> str:
    """The page without pictures."""
    return report.render(evaluate(collect(folder)), (), ())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """The analysis of a sweep of 4 register counts × 3 seeds, of which the last trial diverged."""
    trials = registers_sweep()
    trials[-1].status = "diverged"
    return analyse(publish(tmp_path_factory.mktemp("whole") / "quick", trials, baseline=BASELINE))


def test_the_page_needs_no_network_and_is_accessible(whole: Analysis) -> None:
    page = page_of(whole)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not any("http:" in text or "@import" in text for text in page.text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    labelled = {value for _, own in page.tags for name, value in own.items() if name in ("aria-labelledby", "for")}
    assert labelled <= set(ids)
    images = [image for image in page.of("img") if image.get("src")]
    assert len(images) == len(whole.figures) // 2
    assert all(len(image["alt"]) > 40 for image in images)
    assert any("0: 5.13 %; 1: 4.07 %" in image["alt"] for image in images)  # 0.154/3 and 0.122/3
    assert all("scope" in head for head in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) > 8
    assert len(page.of("h1")) == len(page.of("main")) == len(page.of("header")) == len(page.of("nav")) == 1
    assert page.of("a")[0] == {"class": "skip", "href": "#results"}
    assert page.of("html")[0]["lang"] == "en"


def test_only_its_own_script_may_run(whole: Analysis) -> None:
    html = whole.report.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in Page(html).of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "base-uri 'none'" in policy


def test_question_answer_and_compact_table_come_first(whole: Analysis) -> None:
    page = page_of(whole)
    order = [
        "How many registers does a small ViT need? deit3 · nano · scenes · 20 steps · 3 seeds",
        "Answer Outlier fraction (last layer) is lower with 1, 2 and 4",
        "12 trials planned 11 finished 1 diverged",
        "registers trials top-1 (linear probe, test), % outlier fraction (last layer), %",
        "In numbers",
        "Warnings",
        "Statistics",
        "Learning curves",
        "Figures",
        "Reference, not reproduced Values of the paper",
        "Cost Cost of the accepted results",
        "Settings Main settings",
        "Provenance Provenance",
        "Trials behind each number The folder",
        "Exploratory metrics",
    ]
    words = page.words
    places = []
    for text in order:
        places.append(words.find(text, places[-1] if places else 0))
        assert places[-1] != -1, text
    assert page.tables["summary"][0] == [
        *("registers", "trials"),
        *("top-1 (linear probe, test), %", "outlier fraction (last layer), %"),
    ]
    assert page.tables["summary"][1][:2] == ["0", "3"]
    assert page.tables["summary"][1][3] == "5.13 ± 0.15 baseline"
    assert page.tables["summary"][2][3].startswith("4.07 ± 0.08 −1.07 [−")
    assert page.tables["summary"][4][1] == "2/3"


def test_numbers_lead_to_their_trials(whole: Analysis) -> None:
    page = page_of(whole)
    words = page.words
    for text in ("abc123", "0123456789abcdef", "sqlite:///mlflow.db", "reg_init_std", "orchestrate ui"):
        assert text in words
    trials = page.tables["trials-table"]
    assert len(trials) == 13
    one = dict(zip(trials[0], trials[5], strict=True))
    assert (one["cell"], one["seed"], one["trial id"], one["MLflow run"]) == (
        *("1 register", "1", "id-1-1"),
        "run-id-1-1",
    )
    assert one["outlier fraction (last layer), %"] == "4.05"  # 0.05 - 0.01 + 0.001 / 2
    assert trials[12][3] == "diverged"
    rows = [own for name, own in page.tags if name == "tr" and "data-group" in own]
    assert [own.get("id") for own in rows[:4]] == ["cell-1", None, None, "cell-2"]
    targets = [own["href"] for own in page.of("a") if own.get("aria-label", "").endswith("trials of 1 register")]
    assert set(targets) == {"#cell-2"}
    assert page.tables["reference-table"][2] == [
        *("linear top-1 on ImageNet-1k, % (Table 2a)", "deit3, ViT-B, ImageNet-22k, 4 registers", "84.7"),
        *("deit3, nano, scenes, 4 registers", "70", "test/linear/top1"),  # of the seeds 0.71 and 0.69
    ]
    assert ["CPU core hours (hours × threads)", "0.24"] in page.tables["cost-table"]  # 12 trials × 36 s × 2 threads


def test_corrections_are_named_by_table(whole: Analysis) -> None:
    page = page_of(whole)
    assert "corrected p" in page.tables["metric"][0] and "p, Holm" in page.tables["along"][0]
    assert "p, Benjamini–Hochberg" in page.tables["exploratory-table"][0] and "Holm" in page.words
    assert page.tables["along"][2][1:5] == ["num_registers", "4", "2", "falls"]
    elimination = page.tables["along-2"]
    assert [row[elimination[0].index("limit")] for row in elimination[1:]] == ["0.50"] * (len(elimination) - 1)


def test_without_primary_metrics_no_correction_is_named_that_was_not_made(tmp_path: Path) -> None:
    page = Page(html_of(publish(tmp_path / "s", registers_sweep(), baseline=BASELINE, primary=())))
    for table in ("metric", "along"):
        assert "p, Benjamini–Hochberg" in page.tables[table][0]
    assert "Holm" not in page.words


def test_every_primary_metric_has_a_table_of_its_own(tmp_path: Path) -> None:
    trials = registers_sweep()
    primary = [f"test/knn/k{k}/top1" for k in (1, 2, 3, 4, 5)]
    for trial in trials:
        trial.scores |= dict.fromkeys(primary, trial.scores[TOP1])
    page = Page(html_of(publish(tmp_path / "s", trials, baseline=BASELINE, primary=primary)))
    assert len(page.tables["summary"][0]) == 2 + 4 and "1 more primary metric: under Statistics" in page.words
    assert all("corrected p" in page.tables[name][0] for name in ("metric", *(f"metric-{n}" for n in range(2, 6))))
    assert not any("k = 5" in row[0] for row in page.tables["exploratory-table"])


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/experiments/7/runs/r%2F1"),
        ("https://host/mlflow/?q=<x>#y", "https://host/mlflow/#/experiments/7/runs/r%2F1"),
        ("https://host/a b\"'", "https://host/a%20b%22%27/#/experiments/7/runs/r%2F1"),
        ("sqlite:////tmp/mlflow.db", ""),
        ("javascript:alert(1)", ""),
        ("javascript://host/%0aalert(1)", ""),
        ("JAVASCRIPT:alert(1)", ""),
        ("data:text/html,x", ""),
        ("http://", ""),
        ("http://[broken", ""),
        ("https://user:secret@host", ""),
        ("databricks", ""),
    ],
)
def test_runs_are_linked_where_a_browser_can_open_them(uri: str, address: str) -> None:
    assert report_facts.run_address(Mlflow(uri, "7", {}), "r/1") == address


def test_a_server_is_linked(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0,), seeds=(0,)), baseline=BASELINE)
    place = json.loads((folder / "mlflow.json").read_text()) | {"tracking_uri": "http://127.0.0.1:5000"}
    (folder / "mlflow.json").write_text(json.dumps(place))
    page = Page(html_of(folder))
    (link,) = [own for own in page.of("a") if not own["href"].startswith("#")]
    assert link["href"] == "http://127.0.0.1:5000/#/experiments/1/runs/run-id-0-0"
    assert link["rel"] == "noopener noreferrer"
    assert "orchestrate ui" not in page.words


def test_nothing_from_outside_becomes_html(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1))
    for trial in trials:
        trial.cell["method"] = '"><script>$x_{</script>'
        trial.scores["<b>bold</b>"] = 1.0
        trial.config["data.name"] = EVIL
    trials[0].result = {"error": {"type": "E", "message": EVIL}, "device": EVIL}
    analysis = analyse(publish(tmp_path / "s", trials, baseline=BASELINE, question=EVIL, primary=[TOP1, "<b>bold</b>"]))
    page = page_of(analysis)
    assert [own.get("type") for own in page.of("script")] == ["application/json", None]  # the page's own
    assert not page.of("b")
    assert len(page.of("img")) == len(analysis.figures) // 2 + 1  # and that of the dialog
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) >= 3
    assert '"><script>' not in page.text  # the only value of an axis tells nothing apart, so it is not named


def test_curves_cannot_end_their_element(tmp_path: Path) -> None:
    trials = [Trial({"method": "</script><b>"}, seed, {"val/</script>": 0.5, TOP1: 0.5}) for seed in (0, 1)]
    trials += [Trial({"method": "&'\"\\"}, 0, {TOP1: 0.5})]
    html = html_of(publish(tmp_path / "s", trials))
    (text,) = re.findall(r'<script type="application/json" id="curves-data">(.*?)</script>', html, re.DOTALL)
    assert not set("<>&'") & set(text)
    data = json.loads(text)
    assert sorted(data["cells"]) == sorted(["</script><b>", "&'\"\\"])
    assert "val/</script>" in [metric["name"] for metric in data["metrics"]]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain $x_{\\", "plain $x_{\\"),
        ("שלום", "שלום"),  # is read from right to left by itself
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("a\x00b\x1bc\nd", "a\\x00b\\x1bc\nd"),
        ("naïve ±", "naïve ±"),
    ],
)
def test_what_cannot_be_seen_is_shown_as_an_escape(text: str, seen: str) -> None:
    assert report.visible(text) == seen


class Named(Trial):
    """A trial whose id fits the name of a folder, whatever its cell."""

    @property
    def trial_id(self) -> str:
        return f"id-{self.cell['method'][-1]}-{self.seed}"


def test_long_texts_are_shortened(tmp_path: Path) -> None:
    long = "x" * 5_000
    trials = [Named({"method": f"{long}{end}"}, 0, {TOP1: 0.5, f"val/{long}": 0.5}) for end in ("a", "b")]
    trials[0].status, trials[0].result = "failed", {"error": {"type": "E", "message": long}}
    page = Page(html_of(publish(tmp_path / "s", trials, baseline=None, question=long)))
    assert max(len(word) for word in page.words.split()) <= 500
    assert {row[0][-1] for row in page.tables["summary"][1:]} == {"a", "b"}  # still told apart


@pytest.mark.parametrize("status", ["missing", "failed"])
def test_without_a_finished_trial(tmp_path: Path, status: str) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1))
    for trial in trials:
        trial.status = status
    page = Page(html_of(publish(tmp_path / "s", trials, baseline=BASELINE)))
    assert "Answer No answer yet: none of 4 trials has finished with a score. 4 trials planned" in page.words
    assert f"4 {status}" in page.words
    assert page.tables["summary"][1] == ["0", "0/2", f"2 {status} baseline", f"2 {status} baseline"]


def test_without_any_trial(tmp_path: Path) -> None:
    page = Page(html_of(publish(tmp_path / "s", [], axes={})))
    assert "No trial is planned, so there is nothing to show." in page.words
    assert "There is nothing to draw yet." in page.words
    assert "summary" not in page.tables and "trials-table" not in page.tables


def test_one_cell_and_one_seed(tmp_path: Path) -> None:
    one = Page(html_of(publish(tmp_path / "one", registers_sweep(counts=(4,)), baseline=BASELINE)))
    assert one.tables["summary"][1][:2] == ["4", "3"]
    assert [row[0] for row in one.tables["metric"]] == ["cell", "the only cell"]
    seed = Page(html_of(publish(tmp_path / "seed", registers_sweep(seeds=(0,)), baseline=BASELINE)))
    assert "one seed gives no interval" in seed.words
    assert seed.tables["summary"][2][3].startswith("4.00")


def test_problems_and_warnings_are_counted_above_the_table(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0, 4), seeds=(0,)), baseline=BASELINE)
    results = evaluate(collect(folder))
    page = Page(report.render(results, (), [f"problem {number}" for number in range(60)]))
    flags = {flag for row in results.rows if row["primary"] for flag in row["flags"]} - {"baseline"}
    assert "one_seed" in flags
    assert f"{60 + len(flags)} warnings" in page.words
    assert "problem 49 and 10 more" in page.words


def test_pictures_and_measurements_stand_under_their_headings(tmp_path: Path) -> None:
    trials = [
        Trial({"method": method, REGISTERS: count}, 0, {TOP1: 0.5, "locality/position/normal/top1": 0.4}, details=True)
        for method in ("deit3", "dino")
        for count in (0, 4)
    ]
    for trial in trials:
        trial.outliers, trial.peak = 8, 90.0
    html = analyse(publish(tmp_path / "s", trials, baseline=BASELINE)).report.read_text(encoding="utf-8")
    page = Page(html)
    headings = {"Scores and training", "Norms of tokens", "Where outliers are", "Attention"}
    assert headings <= set(re.findall(r"<h3>([^<]*)</h3>", html))
    sections = [own["id"] for own in page.of("section")]
    assert sections[-7:] == ["measurements", "reference", "cost", "settings", "provenance", "trials", "exploratory"]
    assert re.search(r"dino: \d+ pictures", page.words)
    (local,) = [rows for rows in page.tables.values() if "top-1 of the position probe, normal patches, %" in rows[0]][
        :1
    ]
    assert local[1] == ["deit3", "0", "40.00"]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {"figure-norm_histogram", "figure-norm_histogram_2", "figure-attention_average_2"} <= ids


def test_exploratory_metrics_come_in_their_order_and_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("train/loss", "val/knn/top1", "zebra", "attention/last/own", "tokens/own", "test/knn/top1")
    trials = [Trial({REGISTERS: count}, 0, dict.fromkeys((*names, TOP1), 0.5)) for count in (0, 4)]
    folder = publish(tmp_path / "s", trials, baseline=BASELINE, primary=[TOP1])
    firsts = [row[0] for row in Page(html_of(folder)).tables["exploratory-table"][1:]]
    kinds = ["top-1 (k-NN, k = 20, test), %", "tokens/own", "attention/last/own", "zebra"]
    kinds += ["top-1 (k-NN, k = 20, validation), %", "loss (training)"]
    assert [first for first in firsts if "threshold" not in first] == [kind for kind in kinds for _ in (0, 4)]
    monkeypatch.setattr(report, "_MOST_ROWS", 3)
    page = Page(html_of(folder))
    assert len(page.tables["exploratory-table"]) == 4
    assert f"3 rows that were not declared primary ({len(firsts) - 3} more in tables/ablation.parquet)" in page.words


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
    folder = publish(tmp_path / "s", trials, baseline={"model.weights": "dinov2_g"}, primary=[TOP1])
    page = Page(html_of(folder))
    ours = {(row[2], row[3], row[4]) for row in page.tables["reference-table"]}
    assert ("41.7", "dinov2_g, pretrained, giant, scenes, 0 registers", "40") in ours
    assert ("65.8", "dinov2_l_reg4, pretrained, giant, scenes, 4 registers", "40") in ours
    assert "observational : released weights differ in more than the axis" in page.words


def large_sweep(folder: Path) -> Path:
    """300 cells of 2 seeds, with 30 exploratory metrics."""
    scores: dict[str, Any] = {f"val/own_{number}": 0.5 for number in range(30)}
    trials = [
        Trial({REGISTERS: count, "optim.lr": rate / 1000, "method": method}, seed, {**scores, TOP1: 0.5 + seed / 100})
        for count in (0, 1, 2, 4, 8, 16)
        for rate in range(25)
        for method in ("deit3", "dino")
        for seed in (0, 1)
    ]
    for trial in trials:
        trial.scores |= {OUTLIERS: 0.01, "train/loss": 1.0}
    return publish(folder, trials, baseline=BASELINE)


@pytest.mark.slow
def test_a_page_of_300_cells_stays_small(tmp_path: Path) -> None:
    html = html_of(large_sweep(tmp_path / "s"))
    assert len(html) < 3_500_000
    page = Page(html)
    assert len(page.tables["summary"]) == 301
    assert len(page.tables["trials-table"]) == 601
    assert "To keep this page small, these are left out: curves of single seeds" in page.words


def test_the_first_screen_says_what_was_trained_and_what_an_outlier_is(tmp_path: Path) -> None:
    frames = collect(publish(tmp_path / "s", registers_sweep(), baseline={REGISTERS: 0}))
    page = report.render(evaluate(frames), (), ())
    above = page[: page.index("<table")]
    assert "deit3 · nano · scenes · 20 steps · 3 seeds" in above
    assert "An outlier is a patch token" in page
    frames = collect(publish(tmp_path / "t", registers_sweep(), baseline={REGISTERS: 0}, primary=[TOP1]))
    assert "An outlier is a patch token" not in report.render(evaluate(frames), (), ())
