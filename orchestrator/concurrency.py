"""The command `set`: how many trials of a running sweep run at a time, changed from another terminal."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.layout import SweepLayout
from orchestrator.who_runs import holder_of
from trainers.files import write_whole


def set_concurrency(sweep: str, max_concurrent: int, storage: Path, state: Path) -> None:
    """Ask the driver of `sweep` to run at most so many trials at a time from now on; 0 starts none until another word.

    Running trials go on to their end, also where there are more of them than that.

    Raises:
        ValueError: there is no such sweep, or nobody runs it.
    """
    layout = SweepLayout(storage.resolve(), state.resolve(), sweep)
    if not layout.ledger.is_file():
        raise ValueError(f"there is no sweep {sweep!r} under {state}")
    holder = holder_of(layout.lock)
    if holder is None or not holder.alive:
        raise ValueError(f"{sweep} is not running; give --max-concurrent to orchestrate sweep")
    write_whole(layout.settings, json.dumps({"max_concurrent": max_concurrent}).encode())
    print(f"{sweep} (process {holder.pid} on {holder.host}) will run at most {max_concurrent} trials at a time")
