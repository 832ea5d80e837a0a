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


class Room:
    """Waits for space on the disk of a folder, and says so now and then."""

    def __init__(self, folder: Path, leaving: Callable[[], bool] = lambda: False) -> None:
        """Once `leaving` is true nothing waits."""
        self._folder, self._leaving = folder, leaving
        self._said = -math.inf

    def wait_for(self, act: Callable[[], _Given]) -> _Given:
        """What `act`, which must bear being repeated, returns; while the disk is full it is tried again.

        Raises:
            OSError, sqlite3.OperationalError: it failed for another reason, or the disk is full and the sweep leaves.
        """
        while True:
            try:
                return act()
            except (OSError, sqlite3.OperationalError) as error:
                if self._leaving() or not is_disk_full(error):
                    raise
                self.say_full()
                time.sleep(_TRY_SECONDS)

    def say_full(self) -> None:
        """Warn that the disk is full, once a minute."""
        if time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            log.warning("the disk of %s is full; the sweep waits for space", self._folder)
