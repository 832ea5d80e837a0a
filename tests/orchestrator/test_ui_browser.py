"""The addresses that `orchestrate ui` prints, opened in a real browser: runs, params, metrics, note and report."""

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import Recorded, needs_browser, page
from tests.orchestrator.sweeps import ORCHESTRATE, Small, environment

pytestmark = [pytest.mark.slow, needs_browser]

NAMES = ["deit3 nano reg0 seed0", "deit3 nano reg0 seed1", "deit3 nano reg2 seed0", "deit3 nano reg2 seed1"]
QUESTION = "Does <b>it</b> run & *compare*?"
SIZE = {"width": 1600, "height": 1200}
WAIT_MS = 60_000.0  # MLflow's pages load megabytes of scripts, and tests may share the machine

# What MLflow 3.17's own pages leave in the console of an undisturbed browser:
OWN_CONSOLE = re.compile(
    r"^AG Grid: "  # its table names deprecated options, and sizes columns of a page that was left
    r"|ResizeObserver loop completed"  # of its charts, harmless
    r"|GPU stall due to ReadPixels"  # of its charts, without a GPU
    r"|status of 404"  # of the request below
)
OWN_FAILED = re.compile(r"404 .*/ajax-api/2\.0/mlflow/users/current$|net::ERR_ABORTED")  # no users; pages left early


@dataclass(frozen=True)
class Served:
    """A sweep in MLflow's user interface, and the addresses that were printed."""

    base: str
    curves: str
    side_by_side: str
    artifacts: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    small = Small(tmp_path_factory.mktemp("ui"))
    small.write(question=QUESTION)
    done = small.run("--in-process")
    assert done.returncode == 0, done.stderr
    with _served(small.storage) as found:
        yield found


@contextmanager
def _served(storage: Path) -> Iterator[Served]:
    """`orchestrate ui small` until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*ORCHESTRATE, "ui", "small", "--storage", str(storage), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith(f"MLflow at http://127.0.0.1:{port} ")
            said = [process.stdout.readline().strip().split(": ", 1) for _ in range(3)]
            assert [label for label, _ in said] == ["comparison of small", "side by side", "tables, figures, report"]
            yield Served(f"http://127.0.0.1:{port}", *(address for _, address in said))
        finally:
            process.terminate()
            process.wait(30)


def _check(recorded: Recorded, base: str) -> None:
    """Nothing went wrong but what is MLflow's own, and nothing was asked of any other machine."""
    assert [text for text in recorded.console if not OWN_CONSOLE.search(text)] == []
    assert [text for text in recorded.failed if not OWN_FAILED.search(text)] == []
    assert [text for text in recorded.errors if not OWN_CONSOLE.search(text)] == []
    assert recorded.dialogs == []
    assert [url for url in recorded.requests if not url.startswith((base, "data:", "blob:"))] == []


def test_the_comparison_draws_the_metrics_of_all_trials_by_name(served: Served) -> None:
    with page(size=SIZE) as opened:
        opened.page.goto(served.curves)
        for name in NAMES:
            expect(opened.page.get_by_role("link", name=name)).to_be_visible(timeout=WAIT_MS)
        expect(opened.page.get_by_text("4 matching runs")).to_be_visible(timeout=WAIT_MS)  # the sweep's own is left out
        assert _order(opened.page) == NAMES
        opened.page.get_by_role("searchbox", name="Search metric charts").fill("test/linear/top1")
        expect(opened.page.get_by_role("heading", name="test/linear/top1")).to_be_visible(timeout=WAIT_MS)
        for name in NAMES:
            expect(opened.page.get_by_text(f"{name} (test/linear/top1)")).to_be_attached(timeout=WAIT_MS)
        _check(opened.recorded, served.base)


def _order(page: Page) -> list[str]:
    """The names of runs from top to bottom."""
    links = page.get_by_role("link", name=re.compile("seed")).all()
    placed = sorted((box["y"], link.inner_text()) for link in links if (box := link.bounding_box()) is not None)
    return [name for _, name in placed]


def test_side_by_side_stand_names_params_and_metrics_of_all_trials(served: Served) -> None:
    with page(size=SIZE) as opened:
        opened.page.goto(served.side_by_side)
        expect(opened.page.get_by_text("Comparing 4 Runs from 1 Experiment")).to_be_visible(timeout=WAIT_MS)
        for name in NAMES:
            expect(opened.page.get_by_text(name).first).to_be_attached(timeout=WAIT_MS)
        registers = opened.page.get_by_role("row", name=re.compile(r"^model\.num_registers\s"))
        expect(registers).to_be_attached(timeout=WAIT_MS)
        assert registers.inner_text().split() == ["model.num_registers", "0", "0", "2", "2"]
        metric = opened.page.get_by_text("attention/last/sink_score", exact=True)  # lower ones only after scrolling
        expect(metric.first).to_be_attached(timeout=WAIT_MS)
        _check(opened.recorded, served.base)


def test_the_sweeps_run_shows_question_answer_table_and_report(served: Served) -> None:
    with page(size=SIZE) as opened:
        opened.page.goto(served.artifacts.removesuffix("/artifacts"))
        expect(opened.page.get_by_text(QUESTION)).to_be_visible(timeout=WAIT_MS)  # as text, not as markup
        expect(opened.page.get_by_text("Answer.", exact=True)).to_be_visible()
        expect(opened.page.get_by_role("columnheader", name=re.compile("top-1"))).to_be_visible()
        opened.page.goto(f"{served.artifacts}/report.html")
        for name in ("tables", "figures", "plan.json"):
            expect(opened.page.get_by_text(name, exact=True).first).to_be_visible(timeout=WAIT_MS)
        report = opened.page.frame_locator("iframe")
        expect(report.get_by_role("heading", name=QUESTION)).to_be_visible(timeout=WAIT_MS)
        expect(report.locator("table").first).to_be_visible()
        _check(opened.recorded, served.base)


def test_a_trial_shows_its_data_set(served: Served) -> None:
    with page(size=SIZE) as opened:
        opened.page.goto(served.curves)
        opened.page.get_by_role("link", name=NAMES[2]).click(timeout=WAIT_MS)
        used = opened.page.get_by_role("button", name=re.compile(r"^scenes \([0-9a-f]{16}\)"))
        expect(used).to_be_visible(timeout=WAIT_MS)
        expect(used.get_by_role("status")).to_have_text("training")
        _check(opened.recorded, served.base)
