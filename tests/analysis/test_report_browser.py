"""report.html in a real browser: first screens, sorting, filters, curves, figures, keyboard, print, hostile input."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from analysis import report
from analysis.collect import collect
from analysis.results import evaluate
from analysis.run import analyse
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.test_report import large_sweep
from tests.browser import LAPTOP, PHONE, Opened, needs_browser, page
from tests.orchestrator.sweeps import Small

pytestmark = needs_browser
BASELINE = {REGISTERS: 0}

# Contrasts of all texts to what lies behind them (WCAG 2.2, relative luminance), the lowest for each kind of element.
CONTRASTS = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const part = value => { const x = value / 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), isSvg = element.namespaceURI.endsWith("svg");
    const pair = [light(parse(isSvg ? style.fill : style.color)), light(behind(element))].sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), `${element.tagName}.${element.getAttribute("class")}`]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the report of 4 register counts × 3 seeds, of which the last trial failed."""
    trials = registers_sweep()
    trials[-1].status, trials[-1].result = "failed", {"error": {"type": "ValueError", "message": "lost"}}
    return analyse(publish(tmp_path_factory.mktemp("whole") / "quick", trials, baseline=BASELINE)).report.as_uri()


@pytest.fixture
def opened(whole: str) -> Iterator[Opened]:
    """The report on a laptop; afterwards nothing has gone wrong, and nothing but the file itself was asked for."""
    with page() as found:
        found.page.goto(whole)
        yield found
        assert_quiet(found, whole)


def assert_quiet(found: Opened, address: str) -> None:
    seen = found.recorded
    assert (seen.console, seen.errors, seen.dialogs, seen.failed) == ([], [], [], [])
    assert {one.split("#")[0] for one in seen.requests if not one.startswith("data:")} == {address}


def column(found: Page, table: str, number: int) -> list[str]:
    """The texts of a column of the rows that are shown."""
    texts: list[str] = found.locator(f"#{table} tbody tr:not([hidden]) > :nth-child({number})").all_inner_texts()
    return texts


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_the_first_screen_answers_the_question(whole: str, size: dict[str, int]) -> None:
    with page(size=size) as found:
        found.page.goto(whole)
        for shown in ("h1", ".answer", ".chips", "#summary thead", "#summary tbody tr:nth-child(3)"):
            box = found.page.locator(shown).bounding_box()
            assert box is not None and box["y"] + box["height"] <= size["height"], shown
        cell = found.page.locator("#summary tbody tr:nth-child(2) td:last-child").bounding_box()
        assert cell is not None and cell["x"] + cell["width"] <= size["width"] + 1  # both metrics, without scrolling
        assert found.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        expect(found.page.locator(".answer")).to_contain_text("is lower with 1, 2 and 4 registers, by 1.07 to 3.02")
        assert_quiet(found, whole)


def test_a_table_is_sorted_and_says_so(opened: Opened) -> None:
    heads = opened.page.locator("#summary thead th")
    assert column(opened.page, "summary", 1) == ["0", "1", "2", "4"]
    heads.nth(3).get_by_role("button").click()
    assert column(opened.page, "summary", 1) == ["4", "2", "1", "0"]  # by their outliers
    expect(heads.nth(3)).to_have_attribute("aria-sort", "ascending")
    heads.nth(3).get_by_role("button").click()
    assert column(opened.page, "summary", 1) == ["0", "1", "2", "4"]
    expect(heads.nth(3)).to_have_attribute("aria-sort", "descending")
    heads.nth(0).get_by_role("button").click()
    assert opened.page.locator("#summary th[aria-sort]").count() == 1


def test_null_is_last_whichever_way(opened: Opened) -> None:
    head = opened.page.locator("#trials-table thead button").nth(5)  # outliers, which the failed trial has not
    for _ in range(2):
        head.click()
        assert column(opened.page, "trials-table", 6)[-1] == "–"


def test_rows_are_filtered(opened: Opened) -> None:
    part = opened.page.locator("#trials")
    part.get_by_role("searchbox").fill("FAILED")
    assert column(opened.page, "trials-table", 1) == ["4 registers"]
    expect(part.locator(".filter output")).to_have_text("1 of 12 rows")
    # A link to a cell shows its trials in spite of the filter, and marks them.
    opened.page.get_by_role("link", name="3 trials of 1 register").click()
    assert len(column(opened.page, "trials-table", 1)) == 12
    expect(opened.page.locator("tr.target")).to_have_count(3)
    expect(opened.page.locator("tr.target").first).to_be_in_viewport()


def test_a_figure_opens_and_escape_closes_it(opened: Opened) -> None:
    button = opened.page.get_by_role(
        "button", name="Enlarge: Outlier fraction (last layer) against number of registers"
    )
    button.click()
    dialog = opened.page.locator("dialog")
    expect(dialog).to_be_visible()
    assert opened.page.evaluate("document.querySelector('dialog img').naturalWidth") > 600
    opened.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()
    button.click()
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_curves_are_chosen_and_read(opened: Opened) -> None:
    paths, readout = opened.page.locator("#curves-plot path"), opened.page.locator("#curves-readout")
    expect(paths).to_have_count(16)  # 4 means and 12 seeds; of the failed one, too, as far as it came
    expect(readout).to_contain_text("Step 20: 0 registers: 1.1; 1 register: 1.1; 2 registers: 1.1; 4 registers: 1.05")
    opened.page.get_by_role("checkbox", name="1 register").uncheck()
    expect(opened.page.locator("#curves-plot path[data-cell='1']")).to_have_count(0)
    expect(paths).to_have_count(12)
    expect(readout).not_to_contain_text("1 register:")
    opened.page.get_by_role("checkbox", name="single seeds").uncheck()
    expect(paths).to_have_count(3)
    opened.page.get_by_label("Metric", exact=True).select_option("outlier fraction (last layer), %")
    expect(readout).to_contain_text("Step 20: 0 registers: 5.13 %; 2 registers: 3.07 %")
    slider = opened.page.get_by_label("Step", exact=True)
    slider.focus()
    opened.page.keyboard.press("Home")
    expect(readout).to_contain_text("Step 10: 0 registers: 900.00 %")  # what the made-up sweep has before its end
    expect(slider).to_have_attribute("aria-valuetext", "step 10")
    opened.page.locator("#curves-plot svg").hover(position={"x": 1000, "y": 100})
    expect(readout).to_contain_text("Step 20:")
    opened.page.get_by_role("button", name="none", exact=True).click()
    expect(opened.page.locator("#curves-plot")).to_contain_text("No cell is chosen")


def test_everything_is_reached_by_keyboard(opened: Opened) -> None:
    press = opened.page.keyboard.press
    press("Tab")
    skip = opened.page.locator("a.skip")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    press("Enter")
    press("Tab")  # into the table's region, then to its first heading
    press("Tab")
    focused = opened.page.locator("#summary thead button").first
    expect(focused).to_be_focused()
    assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    press("Enter")
    press("Enter")
    assert column(opened.page, "summary", 1) == ["4", "2", "1", "0"]
    picture = opened.page.locator("button.enlarge").first
    picture.focus()
    press("Enter")
    expect(opened.page.locator("dialog")).to_be_visible()
    press("Escape")
    expect(picture).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_both_schemes(whole: str, scheme: str) -> None:
    with page(scheme) as found:
        found.page.goto(whole)
        with Image.open(io.BytesIO(found.page.screenshot())) as image:
            corner = image.convert("L").getpixel((5, 700))
        assert isinstance(corner, int) and (corner > 240 if scheme == "light" else corner < 40)
        found.page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        contrasts = found.page.evaluate(CONTRASTS)
        assert len(contrasts) > 500
        low = {what: ratio for ratio, what in contrasts if ratio < 4.5}
        assert not low
        assert_quiet(found, whole)


def test_it_prints(whole: str) -> None:
    with page() as found:
        found.page.goto(whole)
        found.page.emulate_media(media="print")
        expect(found.page.locator("nav")).to_be_hidden()
        expect(found.page.locator("#curves-metric")).to_be_hidden()
        expect(found.page.locator("#curves-plot svg")).to_be_visible()
        assert found.page.locator("details:not([open])").count() > 0
        found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert found.page.locator("details:not([open])").count() == 0
        assert found.page.pdf().startswith(b"%PDF-")
        found.page.evaluate("dispatchEvent(new Event('afterprint'))")  # as printing itself may have sent
        assert found.page.locator("details[open]").count() == 0


def test_it_is_read_without_scripts(whole: str) -> None:
    with page(java_script_enabled=False) as found:
        found.page.goto(whole)
        expect(found.page.locator("#summary tbody tr")).to_have_count(4)
        expect(found.page.locator("#curves")).to_contain_text("These curves need JavaScript")
        expect(found.page.locator("figure img").first).to_be_visible()


class Named(Trial):
    """A trial with a safe id, whatever its cell."""

    @property
    def trial_id(self) -> str:
        return f"id-{self.cell[REGISTERS]}-{self.seed}"


def test_nothing_from_outside_runs(tmp_path: Path) -> None:
    evils = (
        "</script><script>alert(1)</script>",
        "<img src=http://127.0.0.1:9/x onerror=alert(2)>",
        "\"'><svg onload=alert(3)>",
        "javascript:alert(4) $x_{\\frac \u202e\u05e9\u05dc\u05d5\u05dd",
    )
    trials = []
    for number, evil in enumerate(evils):
        scores = {TOP1: 0.5, OUTLIERS: 0.01, f"val/{evil}": 0.25, "train/loss": 1.0}
        for seed in (0, 1):
            one = Named({"method": evil, REGISTERS: number}, seed, dict(scores), config={"data.name": evil})
            one.result = {"error": {"type": evil, "message": evil}, "device": evil, "versions": {evil: evil}}
            one.status = "failed" if number == 1 else "finished"
            trials.append(one)
    folder = publish(
        tmp_path / "s", trials, baseline={"method": evils[0]}, primary=[TOP1, f"val/{evils[0]}"], question=evils[0] * 9
    )
    place = {
        "tracking_uri": "javascript:alert(5)//",
        "experiment_id": evils[2],
        "runs": {t.trial_id: "r" for t in trials},
    }
    (folder / "mlflow.json").write_text(json.dumps(place), encoding="utf-8")
    address = analyse(folder).report.as_uri()
    with page() as found:
        found.page.goto(address)
        found.page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        for index in range(found.page.locator("#curves-metric option").count()):
            found.page.locator("#curves-metric").select_option(str(index))
        found.page.locator("#trials").get_by_role("searchbox").fill("<img")
        assert len(column(found.page, "trials-table", 1)) == 2
        assert found.page.locator("script").count() == 2
        assert found.page.locator("svg:not(#curves-plot svg):not(.swatch), [onload], [onerror]").count() == 0
        assert found.page.locator("a:not([href^='#'])").count() == 0
        found.page.locator("button.enlarge").first.click()
        assert_quiet(found, address)


@pytest.mark.parametrize("kind", ["empty", "missing", "failed", "one_cell", "one_seed"])
def test_odd_sweeps_show_no_error(tmp_path: Path, kind: str) -> None:
    counts = (4,) if kind == "one_cell" else (0, 4)
    trials = [] if kind == "empty" else registers_sweep(counts=counts, seeds=(0,) if kind == "one_seed" else (0, 1))
    for trial in trials:
        trial.status = kind if kind in ("missing", "failed") else "finished"
    folder = publish(tmp_path / "s", trials, axes=None if trials else {}, baseline=BASELINE if trials else None)
    path = folder / "report.html"
    path.write_text(report.render(evaluate(collect(folder)), (), ()), encoding="utf-8")
    with page() as found:
        found.page.goto(path.as_uri())
        expect(found.page.locator(".answer")).to_contain_text(
            "No answer yet" if kind in ("empty", "missing", "failed") else "Cannot tell"
        )
        assert_quiet(found, path.as_uri())


@pytest.mark.slow
def test_300_cells_load_quickly(tmp_path: Path) -> None:
    folder = large_sweep(tmp_path / "s")
    path = folder / "report.html"
    path.write_text(report.render(evaluate(collect(folder)), (), ()), encoding="utf-8")
    with page() as found:
        started = time.monotonic()
        found.page.goto(path.as_uri())
        assert time.monotonic() - started < 10  # about 1 s on an idle core
        rows: Any = found.page.locator("#summary tbody tr")
        expect(rows).to_have_count(300)
        expect(rows.first).to_be_in_viewport()
        found.page.locator("#summary thead button").nth(1).click()
        expect(rows.first.locator("th").nth(1)).to_have_text("0.0")
        assert_quiet(found, path.as_uri())


@pytest.mark.slow
def test_the_report_of_a_real_sweep(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write()
    done = small.run("--in-process")
    assert done.returncode == 0, done.stdout + done.stderr
    address = (small.root / "report.html").as_uri()
    with page() as found:
        found.page.goto(address)
        expect(found.page.locator("h1")).to_have_text("Does it run?")
        assert column(found.page, "summary", 1) == ["0", "2"]
        assert found.page.locator("#curves-metric option").count() > 3
        assert found.page.locator("figure img").count() > 8
        assert found.page.evaluate("[...document.images].slice(0, -1).every(image => image.naturalWidth > 0)")
        assert_quiet(found, address)
