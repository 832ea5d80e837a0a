"""Rows of arrays and strings on disk: written as streams, hashed on the way, read as memory maps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Texts(Sequence[str]):
    """n strings in a memory map of UTF-8: opening millions costs nothing."""

    def __init__(self, utf8: Array, ends: Array) -> None:
        self._utf8, self._ends = utf8, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        position = range(len(self))[index]
        start = int(self._ends[position - 1]) if position else 0
        return self._utf8[start : int(self._ends[position])].tobytes().decode("utf-8", "surrogateescape")


class RowHash:
    """What describes rows that come one after another, which are not kept."""

    def __init__(self, first: Array) -> None:
        self.rows, self._dtype, self._inner = 0, first.dtype, first.shape[1:]
        self._hash = hashlib.sha256()

    def append(self, rows: Array) -> None:
        """Adds rows; they have the type and shape of those before."""
        if (rows.dtype, rows.shape[1:]) != (self._dtype, self._inner):
            raise ValueError(f"rows are {rows.dtype} {rows.shape[1:]}, those before {self._dtype} {self._inner}")
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._hash.update(data)
        self._keep(data)
        self.rows += len(rows)

    def close(self) -> str:
        """A description of the content: type, shape, hash."""
        return f"{self._dtype.str} {(self.rows, *self._inner)} {self._hash.hexdigest()}"

    def release(self) -> None:
        """Ends without a description."""

    def _keep(self, data: memoryview) -> None:
        """What becomes of the bytes of rows."""


class RowStream(RowHash):
    """One .npy file that grows by rows. Written, not mapped: on a full disk a write raises, a map kills the process."""

    def __init__(self, path: Path, first: Array) -> None:
        super().__init__(first)
        self._file = path.open("wb")
        self._write_header()

    def _keep(self, data: memoryview) -> None:
        self._file.write(data)

    def close(self) -> str:
        """Syncs the file and returns a description of its content: type, shape, hash."""
        self._write_header()
        os.fsync(self._file.fileno())
        self._file.close()
        return super().close()

    def release(self) -> None:
        """Closes the file without completing it."""
        self._file.close()

    def _write_header(self) -> None:
        # The header's length does not depend on the number of rows: numpy leaves room for any.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._inner)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)
        self._file.flush()
