"""Checks of doctor: damaged checkpoints, and files that a killed driver left."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from orchestrator.finding import Finding
from orchestrator.holder import Hold
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import OVER
from orchestrator.who_runs import holder_of
from trainers import checkpoint_files

# Hidden names under which files and folders grow until they are whole.
_UNFINISHED = re.compile(r"^\.(.*\.\d+\.partial|.*\.\d+\.pulled|snapshot-.*|upload-.*|rebuilt-ledger\..*)$")


def check_checkpoints(layout: SweepLayout, ledger: Ledger, *, running: bool) -> Iterator[Finding]:
    """Every checkpoint has its checksum; of a running sweep only those of trials that are over."""
    for row in ledger.rows(in_plan_only=False):
        if running and row.state not in OVER:
            continue
        for path in checkpoint_files.by_step(layout.trial(row.trial_id).checkpoint_folders()):
            with contextlib.suppress(FileNotFoundError):  # the trial has just written a newer one
                if not checkpoint_files.is_whole_file(path):
                    what = f"{row.name}: the checkpoint does not have its checksum"
                    mend = partial(checkpoint_files.set_aside, path)
                    yield Finding("checkpoints", str(path), what, "sets it aside as .damaged", mend)


def check_leftovers(layout: SweepLayout, ledger: Ledger) -> Iterator[Finding]:
    """No unfinished files, and no requests to stop of trials that do not run; call it where nobody runs the sweep."""
    for folder in dict.fromkeys((layout.root, layout.ledger.parent)):
        for path in sorted(folder.rglob(".*")):
            if _UNFINISHED.match(path.name):
                yield Finding(
                    "leftovers", str(path), "was never finished by who wrote it", "removes it", partial(_remove, path)
                )
    for row in ledger.rows(in_plan_only=False):
        request = layout.trial(row.trial_id).stop_request
        if row.state != "stopped" and request.exists():
            what = f"{row.name}: a request to stop is left over; the trial is {row.state}"
            yield Finding("leftovers", str(request), what, "removes it", partial(_remove, request))


def check_lock(layout: SweepLayout) -> Iterator[Finding]:
    """The lock names nobody who does not hold it."""
    holder = holder_of(layout.lock)
    if holder is not None and not holder.alive:
        what = f"{holder} ran the sweep and ended without giving it back; nobody holds it now"
        yield Finding("lock", str(layout.lock), what, "empties the lock file", lambda: _release(layout.lock))


def _release(lock: Path) -> None:
    Hold(lock).release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
