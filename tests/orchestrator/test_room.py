"""Waiting for space on a full disk."""

import errno
import sqlite3
from pathlib import Path

import pytest

from orchestrator import room
from orchestrator.attempt import failure


def test_a_full_disk_is_told_from_other_errors_also_behind_them() -> None:
    for error in (OSError(errno.ENOSPC, "no"), OSError(errno.EDQUOT, "no"), sqlite3.OperationalError("disk is full")):
        assert failure(error).disk_full
        try:
            raise RuntimeError("a checkpoint could not be written") from error
        except RuntimeError as behind:
            assert failure(behind).disk_full
    assert not failure(OSError(errno.EIO, "no")).disk_full


def test_who_leaves_waits_for_no_space(tmp_path: Path) -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, "no")

    with pytest.raises(OSError, match="no"):
        room.Room(tmp_path, leaving=lambda: True).wait_for(fill)
