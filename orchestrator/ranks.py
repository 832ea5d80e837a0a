"""The rank actors of one trial inside its placement group: started together, listened to, ended together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.attempt import Job, Outcome, Place
from orchestrator.rank import Event, Rank

PLACED_SECONDS = 60.0  # for the ranks' processes to be there, after which their place is given back
_LAST_SECONDS = 60.0  # for the other ranks to end after the first
_FAILED_SECONDS = 5.0  # for the other ranks to end after one has failed, since they may wait for it
_MOST_BEAT_SECONDS = 10.0

# What gloo, NCCL and PyTorch's store say where another rank is gone.
_OF_ANOTHER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket closed|remote process|Timed? ?out|ProcessGroup|NCCL|gloo"
)


class NotPlaced(RuntimeError):
    """The ranks' processes did not come in time: their node may be gone and no other have room."""


@dataclass(frozen=True)
class Lost:
    """A rank process is gone, and why."""

    reason: str


@dataclass(frozen=True)
class Hung:
    """The ranks have made no progress for too long."""

    reason: str


@dataclass(frozen=True)
class Ended:
    """The last events of the first rank, and what became of the attempt."""

    events: list[Event]
    outcome: Outcome
    whole: bool  # all ranks have ended, so that their processes can be used again
    rank: int = 0  # whose outcome it is


class Ranks:
    """The processes that train one trial together; they stay warm from one attempt to the next."""

    def __init__(self, count: int) -> None:
        """Ask for the processes, each in its bundle of the placement group that this process runs in.

        Raises:
            NotPlaced: they are not there within a minute.
        """
        self._actors = [_actor(bundle) for bundle in range(1, count + 1)]
        self._streams: dict[int, Any] = {}  # of the ranks that have not ended
        self._heard = 0.0
        self._limit = 0.0
        self._attempt = ("", 0)  # the trial and the number of its attempt that runs
        self._told = False
        self._processes: list[tuple[str, int, tuple[str, ...]]] = []
        ready = [actor.process.remote() for actor in self._actors]
        if len(ray.wait(ready, num_returns=count, timeout=PLACED_SECONDS, fetch_local=False)[0]) < count:
            self.end()
            raise NotPlaced(f"{count} training processes could not be placed within {PLACED_SECONDS:.0f} s")
        self._processes = ray.get(ready)

    def devices(self, rank: int | None = None) -> list[str]:
        """The GPUs of one rank, or of all."""
        return [gpu for at, (_, _, gpus) in enumerate(self._processes) if rank in (None, at) for gpu in gpus]

    def start(self, job: Job, number: int) -> None:
        """Begin an attempt on all ranks.

        Raises:
            RayTaskError: the first rank has no address on the network that the trial names.
            RayError: the first rank is gone.
        """
        interface = job.config["execution"].get("network_interface")
        self._limit = float(job.config["execution"].get("no_progress_seconds") or 1_800.0)
        address, port = "127.0.0.1", 0
        if len(self._actors) > 1:
            address, port = ray.get(self._actors[0].address.remote(interface))
        beat = min(_MOST_BEAT_SECONDS, self._limit / 4)
        for rank, actor in enumerate(self._actors):
            place = Place(rank, len(self._actors), address, port, interface)
            run = actor.run.options(num_returns="streaming")
            self._streams[rank] = run.remote(asdict(job), number, asdict(place), beat)
        self._heard, self._attempt, self._told = time.monotonic(), (job.trial_id, number), False

    def leave(self, reason: str) -> None:
        """Tell the running attempt to leave, once."""
        if not self._told:
            self._told = True
            for actor in self._actors:
                actor.leave.remote(*self._attempt, reason)

    def next_events(self, seconds: float) -> list[Event] | Ended | Lost | Hung:
        """What the first rank yields within `seconds` (nothing: an empty list), or what became of the attempt."""
        ready, _ = ray.wait(list(self._streams.values()), num_returns=1, timeout=seconds, fetch_local=False)
        if not ready:
            silent = time.monotonic() - self._heard
            return Hung(f"no step and no report for {silent:.0f} s") if silent > self._limit else []
        rank = next(rank for rank, stream in self._streams.items() if stream is ready[0])
        events = self._read(rank)
        if isinstance(events, Lost):
            return events
        if rank == 0:
            self._heard = time.monotonic()
        if events[-1]["kind"] == "ended":
            return self._one_ended(rank, events)
        return [event for event in events if event["kind"] == "report"] if rank == 0 else []

    def _read(self, rank: int) -> list[Event] | Lost:
        try:
            events: list[Event] = ray.get(next(self._streams[rank]))
        except StopIteration as error:
            return Lost(f"rank {rank} ended without a result: {error}")
        except ray.exceptions.RayError as error:  # whatever took it: itself, its node, memory, the network
            return Lost(f"rank {rank}: {error}")
        return events

    def _one_ended(self, rank: int, events: list[Event]) -> list[Event] | Ended | Lost:
        """One rank has ended: the first one's word decides, or that of one that failed while others wait for it."""
        del self._streams[rank]
        outcome = Outcome(**events[-1]["outcome"])
        if outcome.status != "failed" and rank != 0:
            return []
        outcomes, lost = [(rank, outcome)], None
        for other, late in self._rest(_FAILED_SECONDS if outcome.status == "failed" else _LAST_SECONDS):
            if isinstance(late, Lost):
                lost = late
            else:
                outcomes.append((other, late))
        if lost is not None and outcome.status == "failed":
            return lost
        failed = [(other, late) for other, late in outcomes if late.status == "failed"]
        own = [(other, late) for other, late in failed if not _is_of_another(late)]
        if failed and not own and len(self._actors) > 1:  # each blames another, which left no word
            return Lost(str(dict(failed[0][1].error or {}).get("message")))
        reports = [event for event in events[:-1] if event["kind"] == "report"] if rank == 0 else []
        whose, outcome = (own or outcomes)[0]
        return Ended(reports, outcome, whole=lost is None and not self._streams, rank=whose)

    def _rest(self, seconds: float) -> Iterator[tuple[int, Outcome | Lost]]:
        """How the ranks end that have not yet, for so many seconds."""
        deadline = time.monotonic() + seconds
        while self._streams and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(self._streams.values()), num_returns=1, timeout=left, fetch_local=False)
            for rank in [rank for rank, stream in self._streams.items() if stream in ready]:
                events = self._read(rank)
                if isinstance(events, Lost):
                    del self._streams[rank]
                    yield rank, events
                elif events[-1]["kind"] == "ended":
                    del self._streams[rank]
                    yield rank, Outcome(**events[-1]["outcome"])

    def end(self, *, hung: bool = False) -> None:
        """End all processes, which may be alive although their node or the network was taken for lost.

        Hung ones do not hear Ray; those of this node are ended by the system.
        """
        nobody = [("", 0, ())] * len(self._actors)
        for actor, (host, pid, _) in zip(self._actors, self._processes or nobody, strict=True):
            if hung and host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ray.kill(actor)
        self._actors, self._streams = [], {}


def _is_of_another(outcome: Outcome) -> bool:
    """Whether a rank failed because another one did, as far as its message shows."""
    return _OF_ANOTHER.search(str(dict(outcome.error or {}).get("message"))) is not None


def _actor(bundle: int) -> Any:
    group: PlacementGroup | None = ray.util.get_current_placement_group()
    assert group is not None, "a trial runs inside its placement group"
    wanted = group.bundle_specs[bundle]
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    # The second thread hears `leave` while the first runs an attempt.
    options = {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "max_concurrency": 2}
    return ray.remote(Rank).options(scheduling_strategy=place, **options).remote()
