"""One sweep from its file to its table: plan, ledger, executor, tracking, analysis."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator import estimate, local, publish, recorder, spec
from orchestrator.attempt import TRAIN, Job
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, PlannedTrial, build_plan
from orchestrator.progress import Screen
from orchestrator.recorder import Recorder
from trainers.files import write_whole

log = logging.getLogger(__name__)

DONE, SOME_FAILED, WRONG_INPUT = 0, 1, 2
LEAVE_SECONDS = 25.0  # after a signal, for trials to checkpoint
TRACKING_SECONDS = 60.0  # at the end, for MLflow to catch up


@dataclass(frozen=True)
class Options:
    """What the command line says about a run of a sweep."""

    file: Path
    storage: Path
    state: Path
    tracking_uri: str | None = None
    overrides: Sequence[str] = ()
    name: str | None = None
    address: str | None = None
    max_concurrent: int | None = None
    in_process: bool = False
    smoke: bool = False
    rerun: bool = False
    accept_data_change: bool = False
    quiet: bool = False
    train: str = TRAIN


@dataclass
class Stop:
    """Whether the driver should leave, and the file that tells trials so."""

    file: Path
    signal: int | None = None
    since: float = field(default=0.0)

    def __call__(self) -> bool:
        return self.signal is not None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """First signal: trials checkpoint and leave. Second: this process ends at once."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal, self.since = number, time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()


def sweep(options: Options) -> int:
    """Run what is missing of the sweep and bring tables, figures, report and MLflow up to date; the exit code.

    Raises:
        SpecError: the sweep file is wrong.
        SweepHeld: another process runs this sweep.
        ValueError: data, cluster or tracking URI cannot be used.
    """
    asked = spec.read_sweep(options.file, smoke_overrides(options), options.name)
    if (reason := spec.unsupported(asked)) is not None:
        raise ValueError(f"{options.file}: {reason}")
    plan = build_plan(asked)
    layout = SweepLayout(options.storage.resolve(), options.state.resolve(), asked.name)
    layout.ledger.parent.mkdir(parents=True, exist_ok=True)
    with Ledger.open(layout.ledger) as ledger, Screen(asked.name, quiet=options.quiet) as screen:
        return _Run(options, asked, plan, layout, ledger, screen).execute()


def smoke_overrides(options: Options) -> list[str]:
    """The overrides of the command line, with those of --smoke, which make every trial one step long."""
    short = ["optim.steps=1", "evaluation.points=1", "seeds=[0]"] if options.smoke else []
    return [*options.overrides, *short]


class _Run:
    """One run of the sweep command."""

    def __init__(
        self,
        options: Options,
        asked: spec.Sweep,
        plan: Plan,
        layout: SweepLayout,
        ledger: Ledger,
        screen: Screen,
    ) -> None:
        self.options, self.asked, self.plan = options, asked, plan
        self.layout, self.ledger, self.screen = layout, ledger, screen
        self.stop = Stop(layout.state / asked.name / f".stop-{uuid.uuid4().hex[:8]}")

    def execute(self) -> int:
        options, layout = self.options, self.layout
        pending = self._prepare()
        self._check_data(pending)
        with self._tracking() as sink:
            if pending:
                self._train(pending, sink.notify)
            self._publish_rest()
            sink.flush(TRACKING_SECONDS if self.stop.signal is None else 2.0)
            sink.publish_map(layout.mlflow_map)
            code = self._conclude(sink)
        self.stop.file.unlink(missing_ok=True)
        if not options.quiet:
            self.screen.where(layout, options.tracking_uri)
        return code

    def _prepare(self) -> list[PlannedTrial]:
        """Bring ledger and plan files up to date; the trials that have to run."""
        ledger, layout = self.ledger, self.layout
        ledger.release_running()
        ledger.plan(self.plan.trials)
        states = {row.trial_id: row.state for row in ledger.rows()}
        for trial in self.plan.trials:
            state = states[trial.trial_id]
            if (self.options.rerun and state != "planned") or state == "failed":
                ledger.reset(trial.trial_id)
                layout.trial(trial.trial_id).result.unlink(missing_ok=True)
            elif state == "planned" and not self.options.rerun and recorder.adopt(ledger, layout, trial.trial_id):
                self.screen.say(f"{trial.name}: finished in another sweep, adopted")
            layout.trial(trial.trial_id).stop_request.unlink(missing_ok=True)
        self._publish_rest()
        write_whole(layout.sweep_file, spec.dump(self.asked).encode())
        cost = estimate.estimate(self.plan.trials).to_json()
        write_whole(layout.plan, (json.dumps(self.plan.to_json(cost), indent=1) + "\n").encode())
        states = {row.trial_id: row.state for row in ledger.rows()}
        return [trial for trial in self.plan.trials if states[trial.trial_id] == "planned"]

    def _publish_rest(self) -> None:
        """Publish what a driver that died between ledger and files left out."""
        layouts = {row.trial_id: self.layout.trial(row.trial_id) for row in self.ledger.rows()}
        for trial_id in publish.missing(self.ledger, layouts):
            publish.trial(self.ledger, layouts[trial_id], trial_id)

    def _check_data(self, pending: Sequence[PlannedTrial]) -> None:
        """Decode the data sets of pending trials here, once and with a progress bar, where trials run here too.

        Raises:
            ValueError: files are missing, or what lies under a name is no longer what trials were trained on.
        """
        if self.options.address is not None:
            return
        from trainers.data import open_data

        known: dict[str, str] = dict(self.ledger.meta("data") or {})
        opened: set[str] = set()
        for trial in pending:
            data, model = trial.config.data, trial.config.model
            key = f"{data.model_dump_json()} {model.image_size}"
            if key in opened:
                continue
            opened.add(key)
            assert isinstance(model.image_size, int)
            found = open_data(data, trial.config.execution, model.image_size, self.layout.cache, self.screen.data)
            before = known.get(key, found.fingerprint)
            if before != found.fingerprint and not self.options.accept_data_change:
                raise ValueError(
                    f"data set {found.name}: its content has changed (fingerprint {before} before, "
                    f"{found.fingerprint} now); give it another data.name, or pass --accept-data-change"
                )
            known[key] = found.fingerprint
        self.ledger.set_meta("data", known)

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[Any]:
        from orchestrator.tracking import Sink, default_tracking_uri

        uri = self.options.tracking_uri or default_tracking_uri(self.layout.state)
        key = str(self.layout.storage)
        sink = Sink(self.ledger, uri, self.asked.name, key, state=self.layout.state, description=self.asked.question)
        sink.start()
        lacking = 0
        try:
            yield sink
        finally:
            lacking = sink.close(TRACKING_SECONDS if self.stop.signal is None else 3.0)
        if lacking:
            self.screen.say(f"MLflow still lacks {lacking} records; the next run of this command delivers them")

    def _train(self, pending: Sequence[PlannedTrial], notify: Callable[[], None]) -> None:
        provenance = publish.provenance()
        gpus = {trial.trial_id: trial.resources.gpus for trial in pending}
        record = Recorder(self.ledger, self.layout, provenance, gpus, notify)
        self.screen.watch(self.ledger, record)
        if self.options.in_process:
            with _signals(self.stop):
                local.run([self._job(t, os.cpu_count() or 1) for t in pending], record.handle, self.stop)
            return
        from orchestrator import run

        # Signals are taken over after connecting, since Ray sets a handler of its own for SIGTERM.
        with run.cluster(self.options.address) as ray, _signals(self.stop):
            requests = self._requests(run, run.nodes(ray), pending)
            jobs = [self._job(trial, max(1, int(requests[trial.trial_id].cpus))) for trial in pending]
            run.run(ray, jobs, requests, record.handle, lambda: self._may_leave(record), self.options.max_concurrent)

    def _may_leave(self, record: Recorder) -> bool:
        """Whether Tune may end: a signal came, and every trial has left or had its time to."""
        if self.stop.signal is None:
            return False
        return not record.live or time.monotonic() - self.stop.since > LEAVE_SECONDS

    def _requests(
        self, run: Any, nodes: Sequence[Mapping[str, float]], pending: Sequence[PlannedTrial]
    ) -> dict[str, Any]:
        """Resources by trial id, cut to the largest node; what is cut is said once."""
        requests, said = {}, set()
        for trial in pending:
            asked = run.Request(trial.resources.cpus, trial.resources.gpus)
            given = requests[trial.trial_id] = run.clip(asked, nodes)
            if given != asked and (asked, given) not in said:
                said.add((asked, given))
                self.screen.say(
                    f"a trial asks for {asked.cpus:g} CPUs and {asked.gpus:g} GPUs; "
                    f"the largest node gives {given.cpus:g} and {given.gpus:g}"
                )
        return requests

    def _job(self, trial: PlannedTrial, threads: int) -> Job:
        return Job(
            trial_id=trial.trial_id,
            name=trial.name,
            config=trial.config.model_dump(mode="json"),
            folder=str(self.layout.trial(trial.trial_id).root),
            cache=str(self.layout.cache),
            stop_file=str(self.stop.file),
            threads=threads,
            train=self.options.train,
        )

    def _conclude(self, sink: Any) -> int:
        """Tables, figures and report; the exit code."""
        if self.stop.signal is not None:
            self.screen.say("interrupted; the same command goes on from the checkpoints")
            return 128 + self.stop.signal
        from analysis.run import analyse

        analysis = analyse(self.layout.root)
        sink.log_artifacts([self.layout.tables, self.layout.figures, self.layout.report])
        self.screen.table(analysis.terminal)
        counts = self.ledger.counts()
        return DONE if counts["finished"] == len(self.plan.trials) else SOME_FAILED


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask trials to leave, while the block runs."""
    before = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
