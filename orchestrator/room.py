"""Waiting for space on a full disk, as long as nobody asks the sweep to leave."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orchestrator.attempt import is_disk_full

log = logging.getLogger(__name__)

_TRY_SECONDS, _SAY_SECONDS = 1.0, 60.0  # between two tries, and between two words about it
_Given = TypeVar("_Given")


def when_there_is_room(act: Callable[[], _Given], folder: Path, leaving: Callable[[], bool]) -> _Given:
    """What `act`, which must bear being repeated, returns; while the disk of `folder` is full it is tried again.

    Raises:
        OSError, sqlite3.OperationalError: it failed for another reason, or the disk is full and the sweep leaves.
    """
    said = -math.inf
    while True:
        try:
            return act()
        except (OSError, sqlite3.OperationalError) as error:
            if leaving() or not is_disk_full(error):
                raise
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                log.warning("the disk of %s is full; the sweep waits for space", folder)
            time.sleep(_TRY_SECONDS)
