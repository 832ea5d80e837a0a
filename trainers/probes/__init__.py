"""The seam of probes: downstream metrics on the frozen backbone, each a file that yields (name, value).

`trainers.catalog.PROBES` lists the classes; a user's own is named by a dotted path. Each is called as
`Class(settings, context)`, where `settings` is its section of `evaluation` (None for a user's own), and has `reads` and
`fit` as `Probe` says. Names begin with the probe's own, such as `linear/top1`; `val/` or `test/` is put before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from trainers.findings import Arrays, Picture, Score
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams


@dataclass(frozen=True)
class Context:
    """What a probe may know of its trial besides its settings.

    Attributes:
        streams: for draws; take fresh generators from `streams.seed_for`, so that training draws the same.
        method: of the trial, whose text tower zero-shot classification asks; None where there is none.
        name: of the method.
    """

    streams: Streams
    method: nn.Module | None
    name: str


class HeadDiverged(ArithmeticError):
    """A probe learned nothing finite, though what it read is: its metrics are left out, and the trial goes on."""


class Fitted(Protocol):
    """What a probe has learned."""

    def score(self, seen: SeenSplit) -> Iterator[Score | Arrays | Picture]:
        """Metrics of a split as a backbone sees it; it may be another backbone than it was fitted on.

        Arrays and pictures are kept of the test set at the end of a trial.

        Raises:
            FloatingPointError: tokens are NaN or infinite.
        """
        ...


class Probe(Protocol):
    """A probe before it has learned.

    Attributes:
        reads: which of trainers.probes.features.READS it takes from `SeenSplit.features`; none where it makes passes
            of its own.
        transfers: whether what is fitted on the first of several data sets serves all of them.

    A probe whose attribute `learns` is False looks at no features of training images; they are not computed for it.
    """

    reads: frozenset[str]
    transfers: bool

    def fit(self, train: SeenSplit, validation: SeenSplit) -> Fitted:
        """Learn from training images; validation may serve to choose. What is not looked at is never computed.

        The result depends on what is seen, the settings and the seed alone, not on what was drawn before.

        Raises:
            FloatingPointError: tokens are NaN or infinite.
            HeadDiverged: they are not, but what was learned is.
        """
        ...
