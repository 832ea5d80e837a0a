"""What a person sees of a running sweep: a live line, messages, the final table and where everything lies."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.tracking_records import redact

if TYPE_CHECKING:
    from rich.progress import Progress

    from orchestrator.recorder import Live, Recorder

_REFRESH_S = 0.5
_PLAIN_S = 30.0  # between two lines where the output is not a terminal


class Screen:
    """Shows one sweep. On a terminal a live line is redrawn; elsewhere a line is printed now and then."""

    def __init__(self, name: str, quiet: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=False, quiet=quiet, soft_wrap=not sys.stdout.isatty())
        self._name = name
        self._begun = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()

    def say(self, text: str) -> None:
        """One message of its own line."""
        self._console.print(text, markup=False, highlight=False)

    def data(self, what: str, done: int, total: int) -> None:
        """Progress of decoding a data set: a bar on a terminal, elsewhere its beginning and end."""
        if not self._console.is_terminal:
            if done in (0, total):
                self.say(what if not total else f"{what}: {done:,} of {total:,}")
            return
        from rich.progress import Progress

        if self._bar is None:
            self._bar = Progress(console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task(what, total=total or None)
        self._bar.update(self._bar.task_ids[0], description=what, total=total or None, completed=done)
        if total and done >= total:
            self._bar.stop()
            self._bar = None
            self.say(f"{what}: {total:,}")

    def watch(self, ledger: Ledger, recorder: Recorder) -> None:
        """Show the state of `ledger` and the speed of `recorder`'s trials until `table` or the end."""
        self._thread = threading.Thread(target=self._loop, args=(ledger, recorder), name="progress", daemon=True)
        self._thread.start()

    def _loop(self, ledger: Ledger, recorder: Recorder) -> None:
        from rich.live import Live as LiveLine

        if self._console.is_terminal:
            with LiveLine(console=self._console, refresh_per_second=2, transient=True) as line:
                while not self._ended.wait(_REFRESH_S):
                    line.update(describe(self._name, ledger, recorder, time.monotonic() - self._begun))
        else:
            while not self._ended.wait(_PLAIN_S):
                self.say(describe(self._name, ledger, recorder, time.monotonic() - self._begun))

    def table(self, renderable: Any) -> None:
        """End the live line and print a table."""
        self._finish()
        self._console.print(renderable)

    def where(self, layout: SweepLayout, tracking_uri: str | None) -> None:
        """Where tables, report and MLflow's UI are; without a password that the tracking URI may hold."""
        self.say(f"tables    {layout.tables}/*.parquet")
        self.say(f"report    {layout.report}")
        command = f"orchestrate ui {layout.name} --state {layout.state}"
        if tracking_uri is None:
            self.say(f"MLflow UI {command}")
        elif tracking_uri.startswith("http"):
            self.say(f"MLflow UI {redact(tracking_uri)}")
        else:
            self.say(f"MLflow UI {command} --tracking-uri {redact(tracking_uri)}")

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def describe(name: str, ledger: Ledger, recorder: Recorder, elapsed: float) -> str:
    """One line: trials done, running, failed, images per second, time left."""
    counts = ledger.counts()
    total = sum(counts.values())
    over = total - counts["planned"] - counts["running"]
    bad = counts["failed"] + counts["diverged"]
    live = list(recorder.live.values())
    now = time.monotonic()
    speed = sum(trial.images_per_second(now) for trial in live)
    parts = [f"{name}: {over}/{total} trials", f"{counts['running']} running", f"{bad} failed"]
    parts.append(f"{speed:,.0f} images/s")
    left = seconds_left(live, counts["planned"], speed)
    parts.append(f"{_clock(elapsed)} so far")
    parts.append("time left not known yet" if left is None else f"about {_clock(left)} left")
    return ", ".join(parts)


def seconds_left(live: list[Live], planned: int, speed: float) -> float | None:
    """Images that are still to be trained on over the present speed; planned trials count as long as live ones."""
    known = [(t.steps, t.step, t.batch_size) for t in live if t.steps is not None and t.batch_size is not None]
    if speed <= 0 or not known or len(known) < len(live):
        return None
    running = sum((steps - step) * batch_size for steps, step, batch_size in known)
    average = sum(steps * batch_size for steps, _, batch_size in known) / len(known)
    return (running + planned * average) / speed


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
