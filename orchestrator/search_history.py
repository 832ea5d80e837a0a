"""What a search has suggested and been told, from the events that the ledger keeps of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.search_space import Params

Event = Mapping[str, Any]
Ending = Literal["complete", "pruned", "fail"]


@dataclass(frozen=True)
class Sample:
    """One suggestion: its values by metric in the order of the search once it is complete.

    Of a pruned one `values` has how far it had come at `step`, where the metrics were known by then.
    """

    number: int
    params: Params
    state: Ending | None = None  # None while its trials run
    values: tuple[float, ...] | None = None
    step: int | None = None
    reason: str | None = None


@dataclass
class History:
    """The suggestions of one study since it began, or was begun anew.

    `warm` are those of earlier sweeps that it learns from; None before they have been looked for.
    """

    warm: tuple[Sample, ...] | None = None
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """The history that `events` make, in the order in which they came."""
        history = cls()
        for event in events:
            history.apply(event)
        return history

    def apply(self, event: Event) -> None:
        """Take up one more event."""
        kind = event["kind"]
        if kind == "restart":
            self.warm, self.samples = None, []
        elif kind == "warm":
            self.warm = tuple(
                Sample(number, dict(known["params"]), "complete", tuple(known["values"]))
                for number, known in enumerate(event["samples"])
            )
        elif kind == "ask":
            self.samples.append(Sample(event["number"], dict(event["params"])))
        else:
            asked = self.samples[event["number"]]
            values = event.get("values")
            self.samples[event["number"]] = Sample(
                asked.number,
                asked.params,
                event["state"],
                None if values is None else tuple(values),
                event.get("step"),
                event.get("reason"),
            )


def restarted() -> Event:
    """The event after which a study begins anew."""
    return {"kind": "restart"}


def warmed(samples: Iterable[tuple[Params, tuple[float, ...], str]]) -> Event:
    """The event that a study learns from suggestions of other sweeps: params, values by metric, sweep."""
    listed = [{"params": params, "values": list(values), "sweep": sweep} for params, values, sweep in samples]
    return {"kind": "warm", "samples": listed}


def asked(number: int, params: Params) -> Event:
    """The event of a suggestion, which comes before any of its trials exists."""
    return {"kind": "ask", "number": number, "params": params}


def told(
    number: int,
    state: Ending,
    values: tuple[float, ...] | None = None,
    step: int | None = None,
    reason: str | None = None,
) -> Event:
    """The event that all trials of a suggestion are over."""
    found = {"values": None if values is None else list(values), "step": step, "reason": reason}
    return {"kind": "tell", "number": number, "state": state, **{k: v for k, v in found.items() if v is not None}}


def mean(values: Sequence[float]) -> float:
    """Of one or more values, rounded once, so that their order does not matter."""
    return math.fsum(values) / len(values)


def best(samples: Iterable[Sample], modes: tuple[str, ...]) -> Sample | None:
    """The complete suggestion that is best in the first metric, then in the next ones, then the earliest.

    It is on the Pareto front, since whatever beats it in all metrics would be better in the first.
    """
    complete = [sample for sample in samples if sample.state == "complete"]
    return min(complete, key=lambda sample: (*_losses(sample, modes), sample.number), default=None)


def pareto_front(samples: Iterable[Sample], modes: tuple[str, ...]) -> list[Sample]:
    """The complete suggestions that no other one beats: as good in every metric and better in one."""
    complete = [(sample, _losses(sample, modes)) for sample in samples if sample.state == "complete"]
    return [
        sample
        for sample, own in complete
        if not any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for _, other in complete)
    ]


def _losses(sample: Sample, modes: tuple[str, ...]) -> tuple[float, ...]:
    assert sample.values is not None, "a complete suggestion has values"
    return tuple(-value if mode == "max" else value for value, mode in zip(sample.values, modes, strict=True))
