"""One sweep from its file to its table: plan, ledger, executor, tracking, analysis."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator import data_sets, estimate, local, publish, recorder, spec, starting_points
from orchestrator.attempt import TRAIN, Job
from orchestrator.control import Control
from orchestrator.dispatch import Dispatch
from orchestrator.growth import Growth
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.plan import Plan, PlannedTrial, build_plan
from orchestrator.progress import Screen
from orchestrator.queue import Queue
from orchestrator.recorder import Recorder
from orchestrator.run_request import Request, clip
from orchestrator.tracking_records import check_tracking_uri
from orchestrator.watch import Watch
from trainers.catalog import is_dotted_path
from trainers.dotted import load
from trainers.files import write_whole

log = logging.getLogger(__name__)

DONE, SOME_FAILED = 0, 1
LEAVE_SECONDS = 20.0  # after a signal, for trials to checkpoint
TRACKING_SECONDS = 15.0  # without any record delivered at the end, after which MLflow is given up for this run


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
    """Whether the driver should leave."""

    signal: int | None = None
    since: float = field(default=0.0)

    def __call__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Leave what has no checkpoints to write.

        Raises:
            Interrupted: a signal came.
        """
        if self.signal is not None:
            raise Interrupted

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """First signal: trials checkpoint and leave. Second: this process ends at once."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal, self.since = number, time.monotonic()


class Interrupted(Exception):
    """A signal came at a moment when no trial was running."""


def sweep(options: Options) -> int:
    """Run what is missing of the sweep and bring tables, figures, report and MLflow up to date; the exit code.

    Raises:
        SpecError: the sweep file is wrong.
        SweepHeld: another process runs this sweep.
        ValueError: data, cluster or tracking URI cannot be used.
    """
    return run_sweep(spec.read_sweep(options.file, smoke_overrides(options), options.name), options)


def run_sweep(asked: spec.Sweep, options: Options) -> int:
    """`sweep` for one that has been read already.

    Raises:
        As `sweep` does.
    """
    if (reason := spec.unsupported(asked)) is not None:
        raise ValueError(f"{options.file}: {reason}")
    check_tracking_uri(options.tracking_uri or "sqlite:///")
    plan = build_plan(asked)
    if options.address is None:
        _check_own_parts(plan)
    layout = SweepLayout(options.storage.resolve(), options.state.resolve(), asked.name)
    for folder in (layout.root, layout.ledger.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the folder {folder} cannot be made ({error.strerror}); give another --storage"
            ) from error
    stop = Stop()
    try:
        with _signals(stop), Ledger.open(layout.ledger) as ledger, Screen(asked.name, quiet=options.quiet) as screen:
            return _Run(options, asked, plan, layout, ledger, screen, stop).execute()
    except Interrupted:
        return 128 + (stop.signal or signal.SIGINT)


def smoke_overrides(options: Options) -> list[str]:
    """The overrides of the command line, with those of --smoke, which make every trial one step long."""
    one_step = ["optim.steps=1", "optim.warmup_steps=0", "evaluation.points=1", "seeds=[0]"]
    short = one_step if options.smoke else []
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
        stop: Stop,
    ) -> None:
        self.options, self.asked, self.plan = options, asked, plan
        self.layout, self.ledger, self.screen, self.stop = layout, ledger, screen, stop
        self.queue, self.control = Queue(options.max_concurrent), Control()
        self.fingerprints: dict[str, str] = {}
        self.said: set[tuple[Request, Request]] = set()
        self.requests: dict[str, Request] = {}
        self.dispatch = Dispatch(ledger, self.queue, self._growths(), self._adopt, stop)

    def _growths(self) -> list[Growth]:
        """What adds trials while the sweep runs."""
        return []

    def execute(self) -> int:
        options, layout = self.options, self.layout
        pending = self._prepare()
        if options.address is None:  # another machine may have what this one lacks
            starting_points.check(pending, layout.storage)
        with self._tracking() as sink:
            if pending:
                self._train(pending, sink.notify)
            self._publish_rest()
            self._flush(sink)
            sink.publish_map(layout.mlflow_map)
            if self.stop.signal is not None:
                self.screen.say("interrupted; the same command (without --rerun) goes on from the checkpoints")
                return 128 + self.stop.signal
            code = self._conclude(sink)
        self.screen.where(layout, options.tracking_uri)
        return code

    def _flush(self, sink: Any) -> None:
        """Wait for MLflow to have everything, as long as it gets further or may still come back."""
        lacking, since = sink.flush(0.5), time.monotonic()
        while lacking and self.stop.signal is None and time.monotonic() - since < TRACKING_SECONDS:
            before, lacking = lacking, sink.flush(0.5)
            since = time.monotonic() if lacking < before else since

    def _prepare(self) -> list[PlannedTrial]:
        """Bring ledger and plan files up to date; the trials that have to run."""
        ledger, layout = self.ledger, self.layout
        ledger.release_running()
        ledger.plan(self.plan.trials)
        for row in ledger.rows():
            self._renew(row)
        planned = {row.trial_id for row in ledger.rows() if row.state == "planned"}
        self.fingerprints = self._check_data([trial for trial in self.plan.trials if trial.trial_id in planned])
        for trial in self.plan.trials:
            self._adopt(trial)
        self._publish_rest()
        write_whole(layout.sweep_file, spec.dump(self.asked).encode())
        self.dispatch.grow()
        self._write_plan()
        trials = {trial.trial_id: trial for trial in self.plan.trials} | self.dispatch.grown
        return [trials[row.trial_id] for row in ledger.rows() if row.state == "planned"]

    def _renew(self, row: TrialRow) -> None:
        """A failed trial runs again, with --rerun every one; a request to stop it is forgotten."""
        folder = self.layout.trial(row.trial_id)
        folder.stop_request.unlink(missing_ok=True)
        if self.options.rerun:
            publish.forget(folder)
        if row.state == "failed" or (self.options.rerun and row.state != "planned"):
            folder.result.unlink(missing_ok=True)
            self.ledger.reset(row.trial_id)

    def _adopt(self, trial: PlannedTrial) -> None:
        """Take a trial over that has finished in another sweep under the same storage."""
        if self.options.rerun or self.ledger.row(trial.trial_id).state != "planned":
            return
        if recorder.adopt(self.ledger, self.layout, trial.trial_id, self.fingerprints.get(trial.trial_id)):
            self.screen.say(f"{trial.name}: finished in another sweep, adopted")

    def _write_plan(self) -> None:
        cost = estimate.estimate(self.plan.trials).to_json()
        write_whole(self.layout.plan, (json.dumps(self.plan.to_json(cost), indent=1) + "\n").encode())

    def _publish_rest(self) -> None:
        """Publish what a driver that died between ledger and files left out."""
        layouts = {row.trial_id: self.layout.trial(row.trial_id) for row in self.ledger.rows()}
        for trial_id in publish.missing(self.ledger, layouts):
            publish.trial(self.ledger, layouts[trial_id], trial_id)

    def _check_data(self, pending: Sequence[PlannedTrial]) -> dict[str, str]:
        """Decode the data sets of pending trials here, once and with a progress bar, where trials run here too.

        Returns:
            The fingerprint of each trial's data by trial id; nothing where trials run elsewhere.

        Raises:
            ValueError: files are missing, or what lies under a name is no longer what trials were trained on.
        """
        if self.options.address is not None:
            return {}

        def progress(what: str, done: int, total: int) -> None:
            self.stop.check()
            self.screen.data(what, done, total)

        known: dict[str, str] = dict(self.ledger.meta("data") or {})
        check = data_sets.DataCheck(self.layout.cache, known, self.options.accept_data_change, progress)
        fingerprints = check.fingerprints(pending)
        self.ledger.set_meta("data", {**known, **check.found})
        return fingerprints

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
        dispatch = self.dispatch
        record = Recorder(self.ledger, self.layout, publish.provenance(), self._gpus_of, notify)
        dispatch.add(pending)
        self.screen.watch(self.ledger, record)
        with Watch(self.layout, self.queue, self.control, self.stop, self._spent, self.screen.say):
            if self.options.in_process:
                whole = Request(os.cpu_count() or 1, 1.0)
                dispatch.make_job = lambda trial: self._job(trial, whole)
                local.run(dispatch, record.handle, self.control, self.stop)
                return
            from orchestrator import run

            self.stop.check()
            # Signals are taken over again after connecting, since Ray sets a handler of its own for SIGTERM.
            with run.cluster(self.options.address) as ray, _signals(self.stop):
                dispatch.make_job = lambda trial: self._job(trial, self._request(trial, run.nodes(ray)))
                run.run(ray, dispatch, record.handle, self.control, lambda: self._may_leave(record))

    def _spent(self) -> str | None:
        """Why the budget is used up, or None."""
        return None

    def _gpus_of(self, trial_id: str) -> float:
        return self.requests[trial_id].gpus if trial_id in self.requests else 0.0

    def _may_leave(self, record: Recorder) -> bool:
        """Whether Tune may end: a signal came, and every trial has left or had its time to."""
        if self.stop.signal is None:
            return False
        return not record.live or time.monotonic() - self.stop.since > LEAVE_SECONDS

    def _request(self, trial: PlannedTrial, nodes: Sequence[Mapping[str, float]]) -> Request:
        """What a trial asks for, cut to what the cluster has; what is cut is said once."""
        asked = Request(trial.resources.cpus, trial.resources.gpus, trial.resources.num_ranks)
        given = clip(asked, nodes)
        if given != asked and (asked, given) not in self.said:
            self.said.add((asked, given))
            self.screen.say(f"a trial asks for {asked}; the cluster gives {given}")
        return given

    def _job(self, trial: PlannedTrial, request: Request) -> tuple[Job, Request]:
        row = self.ledger.row(trial.trial_id)
        self.requests[trial.trial_id] = request
        job = Job(
            trial_id=trial.trial_id,
            name=trial.name,
            config=trial.config.model_dump(mode="json"),
            folder=str(self.layout.trial(trial.trial_id).root),
            cache=str(self.layout.cache),
            threads=max(1, int(request.cpus / request.ranks)),
            attempts=row.attempts,
            last_step=row.last_step or 0,
            stalled=row.stalled,
            gpus=request.gpus / request.ranks,
            ranks=request.ranks,
            train=self.options.train,
        )
        return job, request

    def _conclude(self, sink: Any) -> int:
        """Tables, figures and report; the exit code."""
        from analysis.run import analyse

        analysis = analyse(self.layout.root)
        made = (self.layout.tables, self.layout.figures, self.layout.report)
        sink.log_artifacts([path for path in made if path.exists()])
        self.screen.table(analysis.terminal)
        for line in (analysis.answer, *(f"note: {problem}" for problem in analysis.problems)):
            self.screen.say(line)
        for line in failures(self.ledger.rows(), self.asked.name):
            self.screen.say(line)
        return DONE if self._is_complete() else SOME_FAILED

    def _is_complete(self) -> bool:
        """Whether every trial of the table is finished."""
        return all(row.state == "finished" for row in self.ledger.rows() if row.role == "cell")


def failures(rows: Sequence[TrialRow], sweep: str) -> list[str]:
    """One line for each reason for which trials have failed or diverged, most frequent first, and where to look."""
    reasons = [
        f"{row.state}: {str(row.error.get('message') or row.error.get('type')).splitlines()[0][:200]}"
        for row in rows
        if row.error is not None
    ]
    lines = [f"{count} of {len(rows)} trials {reason}" for reason, count in Counter(reasons).most_common()]
    return [*lines, f"tracebacks: orchestrate status {sweep} --failures"] if lines else []


def _check_own_parts(plan: Plan) -> None:
    """Import what users named by dotted path, so that a typing error is found before any trial begins.

    Raises:
        ValueError: there is no such module or attribute.
    """
    named: set[str] = set()
    for trial in plan.trials:
        config = trial.config
        named |= {config.method, config.data.train, config.model.factory or ""}
        named |= {*config.evaluation.probes, *config.tokens.measurements}
    for path in sorted(filter(is_dotted_path, named)):
        load(path)


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 (the warning of Slurm and spot machines) ask trials to leave, while the block runs.

    It must run in the main thread, as Python has it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
