"""What the command doctor finds wrong: what, where, and what --fix does about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Something that is wrong; `mend` sets it right, and is None where only a person can.

    `remedy` says what `mend` does or, without one, what a person may do.
    """

    check: str
    where: str
    what: str
    remedy: str
    mend: Callable[[], None] | None = None

    def to_json(self, sweep: str | None, mended: bool) -> dict[str, Any]:
        """Plain values; `sweep` is None for what concerns the machine."""
        said = {"check": self.check, "where": self.where, "what": self.what, "remedy": self.remedy}
        return {"sweep": sweep, **said, "fixable": self.mend is not None, "mended": mended}


def shortened(names: Sequence[str]) -> str:
    """The first names of a list, and how many follow."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
