"""One sweep from its file to its table: plan, ledger, executor, tracking, analysis."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator import data_sets, estimate, local, publish, recorder, spec, starting_points
from orchestrator.attempt import TRAIN, Job
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.plan import Plan, PlannedTrial, build_plan
from orchestrator.progress import Screen
from orchestrator.recorder import Recorder
from orchestrator.tracking_records import check_tracking_uri
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
    """Whether the driver should leave, and the file that tells trials so."""

    file: Path
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
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()


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
    stop = Stop(layout.state / asked.name / f".stop-{uuid.uuid4().hex[:8]}")
    try:
        with _signals(stop), Ledger.open(layout.ledger) as ledger, Screen(asked.name, quiet=options.quiet) as screen:
            return _Run(options, asked, plan, layout, ledger, screen, stop).execute()
    except Interrupted:
        return 128 + (stop.signal or signal.SIGINT)
    finally:
        stop.file.unlink(missing_ok=True)


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
            folder = layout.trial(row.trial_id)
            folder.stop_request.unlink(missing_ok=True)
            if self.options.rerun:
                publish.forget(folder)
            if row.state == "failed" or (self.options.rerun and row.state != "planned"):
                folder.result.unlink(missing_ok=True)
                ledger.reset(row.trial_id)
        planned = {row.trial_id for row in ledger.rows() if row.state == "planned"}
        fingerprints = self._check_data([trial for trial in self.plan.trials if trial.trial_id in planned])
        for trial in () if self.options.rerun else self.plan.trials:
            expected = fingerprints.get(trial.trial_id)
            if trial.trial_id in planned and recorder.adopt(ledger, layout, trial.trial_id, expected):
                self.screen.say(f"{trial.name}: finished in another sweep, adopted")
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
        provenance = publish.provenance()
        gpus = {trial.trial_id: trial.resources.gpus for trial in pending}
        record = Recorder(self.ledger, self.layout, provenance, gpus, notify)
        self.screen.watch(self.ledger, record)
        if self.options.in_process:
            local.run([self._job(t, os.cpu_count() or 1, False) for t in pending], record.handle, self.stop)
            return
        from orchestrator import run

        self.stop.check()
        # Signals are taken over again after connecting, since Ray sets a handler of its own for SIGTERM.
        with run.cluster(self.options.address) as ray, _signals(self.stop):
            requests = self._requests(run, run.nodes(ray), pending)
            given = [(trial, requests[trial.trial_id]) for trial in pending]
            jobs = [self._job(trial, max(1, int(request.cpus)), request.gpus == 0) for trial, request in given]
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

    def _job(self, trial: PlannedTrial, threads: int, cpu_only: bool) -> Job:
        return Job(
            trial_id=trial.trial_id,
            name=trial.name,
            config=trial.config.model_dump(mode="json"),
            folder=str(self.layout.trial(trial.trial_id).root),
            cache=str(self.layout.cache),
            stop_file=str(self.stop.file),
            threads=threads,
            attempts=self.ledger.row(trial.trial_id).attempts,
            cpu_only=cpu_only,
            train=self.options.train,
        )

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
        return DONE if self.ledger.counts()["finished"] == len(self.plan.trials) else SOME_FAILED


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
    """SIGINT and SIGTERM ask trials to leave, while the block runs (in the main thread, as Python has it)."""
    before = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
