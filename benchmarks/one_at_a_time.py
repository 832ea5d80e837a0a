"""The orchestrator's own path for a plan of trials, one at a time, held up between two trials for the other side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from orchestrator import publish, run, spec
from orchestrator.attempt import TRAIN
from orchestrator.control import Control
from orchestrator.delivery import Delivery
from orchestrator.dispatch import Dispatch
from orchestrator.jobs import job_of
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.queue import Queue
from orchestrator.recorder import Recorder
from orchestrator.run_request import Request
from orchestrator.tracking import Sink, default_tracking_uri

CPUS = 0.5  # of a trial, logical: leaves room for another side on a machine of one core
FLUSH_SECONDS = 30.0

Between = Callable[[PlannedTrial, float], None]  # the trial that has just ended, and its seconds


def sweep(
    ray: Any,
    folder: Path,
    trial: Mapping[str, Any],
    seeds: Sequence[int],
    between: Between,
    *,
    train: str = TRAIN,
    flush_every: int = 1,
    stop_after: float = 150.0,
) -> None:
    """Run one trial per seed with Ray Tune, ledger, published files and MLflow sink, as the driver does.

    After each trial `between` is called with its seconds: from the moment when the call before returned until the
    trial's end was recorded and published. While `between` works, Tune waits and all rank processes are idle. Before
    every `flush_every`-th call, what MLflow still lacks is delivered; the processor seconds that this takes are added
    to the trial's, though in a real sweep it goes on beside the next trial. No trial begins
    once `stop_after` seconds are over, so that a busy machine gives fewer of them rather than later.

    Raises:
        RuntimeError: a trial did not finish.
    """
    layout = SweepLayout(folder / "runs", folder / "runs", "benchmark")
    plan = _plan(folder, trial, seeds)
    layout.ledger.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger.open(layout.ledger))
        ledger.plan(plan)
        sink = Sink(ledger, default_tracking_uri(layout.state), "benchmark", "benchmark", state=layout.state)
        sink.start()
        stack.callback(sink.close, FLUSH_SECONDS)
        delivery = stack.enter_context(Delivery(layout, ledger))
        recorder = Recorder(ledger, layout, publish.provenance(), lambda _trial_id: 0.0, delivery.begin, sink.notify)
        turns = _Turns(
            recorder, delivery, sink, {planned.trial_id: planned for planned in plan}, between, flush_every, stop_after
        )
        queue = Queue(limit=1)
        queue.add(plan)
        dispatch = Dispatch(ledger, queue, [], lambda _trial: None, turns.over)
        request = Request(CPUS, 0.0)
        dispatch.make_job = lambda trial: (
            job_of(trial, ledger.row(trial.trial_id), layout, request, train=train),
            request,
        )
        run.run(ray, dispatch, turns.handle, Control(), turns.over)
        turns.check(len(plan))


def _plan(folder: Path, trial: Mapping[str, Any], seeds: Sequence[int]) -> Sequence[PlannedTrial]:
    file = folder / "benchmark.yaml"
    content = {
        "name": "benchmark",
        "question": "What does a sweep cost?",
        "trial": dict(trial),
        "axes": {"model.num_registers": [4]},
        "seeds": list(seeds),
        "primary": ["test/linear/top1"],
        "resources": {"cpus": 1},
    }
    file.write_text(yaml.safe_dump(content))
    return build_plan(spec.read_sweep(file)).trials


class _Turns:
    """The handler of events: records as the driver does, then lets the other side work.

    Tune's callback logs what its handler raises, so errors are kept here and stop the sweep.
    """

    def __init__(
        self,
        recorder: Recorder,
        delivery: Delivery,
        sink: Sink,
        plan: Mapping[str, PlannedTrial],
        between: Between,
        flush_every: int,
        stop_after: float,
    ) -> None:
        self._recorder, self._sink, self._plan, self._between = recorder, sink, plan, between
        self._delivery = delivery
        self._flush_every = flush_every
        self._since = time.perf_counter()
        self._deadline = self._since + stop_after
        self._done = 0
        self._error: BaseException | None = None

    def handle(self, trial_id: str, event: Mapping[str, Any]) -> None:
        try:
            self._recorder.handle(trial_id, event)
            if event["kind"] in ("started", "report"):
                return
            if event["kind"] != "ended" or event["outcome"]["status"] != "finished":
                raise RuntimeError(f"trial {trial_id} did not finish: {event}")
            seconds = time.perf_counter() - self._since
            self._done += 1
            if self._done % self._flush_every == 0:
                seconds += self._flush()
            self._between(self._plan[trial_id], seconds)
        except Exception as error:
            self._error = error
            raise
        finally:
            self._since = time.perf_counter() if event["kind"] == "ended" else self._since

    def _flush(self) -> float:
        before = time.process_time()
        self._delivery.complete()
        if lacking := self._sink.flush(FLUSH_SECONDS):
            raise RuntimeError(f"MLflow lacks {lacking} records after {FLUSH_SECONDS:.0f} s")
        return time.process_time() - before

    def over(self) -> bool:
        """Whether no more trials should begin."""
        return self._error is not None or self._late()

    def check(self, wanted: int) -> None:
        if self._error is not None:
            raise RuntimeError("the sweep broke") from self._error
        if self._done != wanted and not self._late():
            raise RuntimeError(f"{self._done} of {wanted} trials finished")

    def _late(self) -> bool:
        return time.perf_counter() > self._deadline
