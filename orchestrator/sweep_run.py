"""One run of a sweep from its ledger to its table: what is missing, executor, tracking, analysis."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator import (
    data_sets,
    estimate,
    import_results,
    local,
    measured,
    publish,
    recorder,
    remote_sweep,
    spec,
    starting_points,
)
from orchestrator.attempt import Job, is_disk_full
from orchestrator.budget import Budget
from orchestrator.control import PRUNED, Control
from orchestrator.delivery import Delivery
from orchestrator.dispatch import Dispatch
from orchestrator.early import EarlyStopping, steps_of
from orchestrator.growth import Growth
from orchestrator.jobs import job_of
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, State, TrialRow
from orchestrator.plan import Plan, PlannedTrial
from orchestrator.progress import Screen
from orchestrator.queue import Handler, Queue
from orchestrator.recorder import Recorder
from orchestrator.remote_delivery import RemoteDelivery
from orchestrator.remote_sweep import Keeper
from orchestrator.room import Room
from orchestrator.run_options import Interrupted, Options, Stop, signals
from orchestrator.run_request import Request, clip
from orchestrator.search import SearchGrowth
from orchestrator.search_plan import expected, plan_json
from orchestrator.seeds import SeedGrowth
from orchestrator.watch import Watch
from trainers.files import write_whole

DONE, SOME_FAILED = 0, 1
LEAVE_SECONDS = 15.0  # after a signal, for trials to checkpoint
TRACKING_SECONDS = 15.0  # without any record delivered at the end, after which MLflow is given up for this run


class SweepRun:
    """One run of the sweep command: what is missing is trained, and everything is brought up to date."""

    def __init__(
        self,
        options: Options,
        asked: spec.Sweep,
        plan: Plan,
        layout: SweepLayout,
        ledger: Ledger,
        screen: Screen,
        stop: Stop,
        keeper: Keeper | None = None,
    ) -> None:
        """`keeper` keeps the sweep's copy where storage is remote."""
        self.options, self.asked, self.plan = options, asked, plan
        self.layout, self.ledger, self.screen, self.stop = layout, ledger, screen, stop
        self.queue, self.control = Queue(options.max_concurrent), Control()
        self.fingerprints: dict[str, str] = {}
        self.said: set[tuple[Request, Request]] = set()
        self.gpus: dict[str, float] = {}
        self.search = None if asked.search is None else SearchGrowth(plan, layout.state)
        self.early = EarlyStopping.of(asked)
        self.seeds = None if asked.more_seeds is None else SeedGrowth(plan)
        growths: list[Growth] = [growth for growth in (self.search, self.seeds) if growth is not None]
        self.budget = Budget(asked.budget, ledger)
        self.room = Room(layout.root, stop)
        self.keeper = keeper
        if keeper is None:
            self.delivery = Delivery(layout, ledger, leaving=stop)
        else:
            self.delivery = RemoteDelivery(keeper.mirror, layout, ledger, stop)
        self.dispatch = Dispatch(ledger, self.queue, growths, self._settle, stop, self.budget.may_begin)

    def execute(self) -> int:
        """Run what is missing and bring everything up to date; the exit code.

        Raises:
            Interrupted: a signal came, and what is left cannot be written since the disk is full; the next start does.
        """
        try:
            with self.delivery:
                return self._execute()
        except (OSError, sqlite3.OperationalError) as error:
            if self.stop.signal is None or not is_disk_full(error):
                raise
            raise Interrupted(self.stop.signal) from error

    def _execute(self) -> int:
        options, layout = self.options, self.layout
        pending = self._prepare()
        if options.address is None and self.keeper is None:  # the machine that trains may have what this one lacks
            starting_points.check(pending, layout.storage)
        with self._tracking() as sink:
            sink.log_artifacts([layout.plan])  # by which the analysis reads a sweep from MLflow alone
            if pending:
                with self.budget:
                    self._train(pending, sink.notify)
            self.room.wait_for(self.delivery.complete)
            self._copy()
            self._flush(sink)
            self.room.wait_for(lambda: sink.publish_map(layout.mlflow_map))
            if self.stop.signal is not None:
                self.screen.say("interrupted; the same command (without --rerun) goes on from the checkpoints")
                return 128 + self.stop.signal
            code = self._conclude(sink)
            self._copy()
        self.screen.where(layout, options.tracking_uri)
        return code

    def _copy(self) -> None:
        """Bring the copy of ledger, plan, tables and report in remote storage up to date."""
        if self.keeper is not None:
            self.keeper.push()

    def _flush(self, sink: Any) -> None:
        """Wait for MLflow to have everything, as long as it gets further or may still come back."""
        lacking, since = sink.flush(0.5), time.monotonic()
        while lacking and self.stop.signal is None and time.monotonic() - since < TRACKING_SECONDS:
            before, lacking = lacking, sink.flush(0.5)
            since = time.monotonic() if lacking < before else since

    def _prepare(self) -> list[PlannedTrial]:
        """Bring ledger and plan files up to date; the trials that have to run."""
        ledger, layout = self.ledger, self.layout
        self.samples = measured.read(layout.state)
        for trial in expected(self.plan):  # a share that cannot be settled is said before anything begins
            measured.settled(trial.resources, trial.config, self.samples)
        ledger.release_running()
        ledger.plan(self.plan.trials)
        for trial_id, state in ledger.states().items():
            self._renew(trial_id, state)
        states = ledger.states()
        to_run = [trial for trial in expected(self.plan) if states.get(trial.trial_id, "planned") == "planned"]
        self.fingerprints = self._check_data(to_run)
        if self.keeper is not None:
            remote_sweep.pull_finished(self.keeper.mirror, layout, [trial.trial_id for trial in to_run])
        for trial in self.plan.trials:
            if states[trial.trial_id] == "planned":
                self._adopt(trial)
        self.delivery.complete()
        write_whole(layout.sweep_file, spec.dump(self.asked).encode())
        if self.search is not None:
            for trial_id in self.search.restart(ledger, everything=self.options.rerun):
                self._renew(trial_id, ledger.row(trial_id).state, again=True)
        import_results.keep(ledger, self.plan)
        self.dispatch.grow()
        if self.early is not None:
            self.early.replay(ledger, ledger.rows())
        self._write_plan()
        trials = {trial.trial_id: trial for trial in self.plan.trials} | self.dispatch.grown
        return [trials[trial_id] for trial_id, state in ledger.states().items() if state == "planned"]

    def _renew(self, trial_id: str, state: State, *, again: bool = False) -> None:
        """A failed trial runs again, with --rerun (or `again`) every one; a request to stop it is forgotten."""
        again = again or self.options.rerun
        folder = self.layout.trial(trial_id)
        folder.stop_request.unlink(missing_ok=True)
        if again:
            publish.forget(folder)
        if isinstance(self.delivery, RemoteDelivery) and (again or state == "failed"):
            self.delivery.renew(trial_id, from_first_step=again)
        if state == "failed" or (again and state != "planned"):
            folder.result.unlink(missing_ok=True)
            self.ledger.reset(trial_id)

    def _settle(self, trial: PlannedTrial) -> None:
        """A trial that follows from others: what it came to in an earlier run or another sweep is looked at.

        Those by which a search chooses have been counted by it already, failed ones too.
        """
        if trial.role == "cell":
            self._renew(trial.trial_id, self.ledger.row(trial.trial_id).state)
        self._adopt(trial)

    def _adopt(self, trial: PlannedTrial) -> None:
        """Take a trial over that has finished in another sweep under the same storage."""
        if self.options.rerun or self.ledger.row(trial.trial_id).state != "planned":
            return
        if recorder.adopt(self.ledger, self.layout, trial.trial_id, self.fingerprints.get(trial.trial_id)):
            self.screen.say(f"{trial.name}: finished in another sweep, adopted")

    def _write_plan(self) -> None:
        cost = estimate.estimate(expected(self.plan)).to_json()
        content = plan_json(self.plan, self.ledger.rows(), self.ledger, cost)
        write_whole(self.layout.plan, (json.dumps(content, indent=1) + "\n").encode())

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
        remote = self.options.remote
        key = str(self.layout.storage) if remote is None else remote.partition("?")[0]
        sink = Sink(self.ledger, uri, self.asked.name, key, state=self.layout.state, description=self.asked.question)
        sink.start()
        try:
            yield sink
        finally:
            lacking = sink.close(TRACKING_SECONDS if self.stop.signal is None else 3.0)
        if lacking:
            self.screen.say(f"MLflow still lacks {lacking} records; the next run of this command delivers them")

    def _train(self, pending: Sequence[PlannedTrial], notify: Callable[[], None]) -> None:
        dispatch = self.dispatch
        record = Recorder(self.ledger, self.layout, publish.provenance(), self._gpus_of, self.delivery.begin, notify)
        handle = self._handler(record)
        dispatch.add(pending)
        self.screen.watch(self.ledger, record)
        with Watch(self.layout, self.queue, self.control, self.stop, self.budget.exhausted, self.screen.say):
            if self.options.in_process:
                whole = Request(os.cpu_count() or 1, 1.0)
                dispatch.make_job = lambda trial: self._job(trial, whole)
                local.run(dispatch, handle, self.control, self.stop)
                return
            from orchestrator import run

            self.stop.check()
            # Signals are taken over again after connecting, since Ray sets a handler of its own for SIGTERM.
            with run.cluster(self.options.address) as ray, signals(self.stop):
                nodes = run.Nodes(ray)
                dispatch.make_job = lambda trial: self._job(trial, self._request(trial, nodes()))
                run.run(ray, dispatch, handle, self.control, lambda: self._may_leave(record))

    def _handler(self, record: Recorder) -> Handler:
        """Every event is recorded; reports are also judged by the rule of early stopping, where there is one."""
        early, control, rows = self.early, self.control, dict[str, TrialRow]()
        if early is None:
            return record.handle

        def handle(trial_id: str, event: Mapping[str, Any]) -> None:
            record.handle(trial_id, event)
            if event["kind"] != "report":
                return
            if trial_id not in rows:
                rows[trial_id] = self.ledger.row(trial_id)
            row = rows[trial_id]
            if early.report(trial_id, row.cell, row.role, steps_of(row.config), event["step"], event["metrics"]):
                control.ask(trial_id, PRUNED)

        return handle

    def _gpus_of(self, trial_id: str) -> float:
        """What a trial has, of what it asked for: a GPU that is merely there in this process is no GPU-hour."""
        return self.gpus.get(trial_id, 0.0)

    def _may_leave(self, record: Recorder) -> bool:
        """Whether Tune may end: a signal came, and every trial has left or had its time to."""
        if self.stop.signal is None:
            return False
        return not record.live or time.monotonic() - self.stop.since > LEAVE_SECONDS

    def _request(self, trial: PlannedTrial, nodes: Sequence[Mapping[str, float]]) -> Request:
        """What a trial asks for, cut to what the cluster has; what is cut is said once."""
        resources = measured.settled(trial.resources, trial.config, self.samples)
        assert resources.gpus != "auto", "the share is settled"
        asked = Request(resources.cpus, resources.gpus, resources.num_ranks)
        given = clip(asked, nodes)
        if given != asked and (asked, given) not in self.said:
            self.said.add((asked, given))
            self.screen.say(f"a trial asks for {asked}; the cluster gives {given}")
        return given

    def _job(self, trial: PlannedTrial, request: Request) -> tuple[Job, Request]:
        row = self.ledger.row(trial.trial_id)
        self.gpus[trial.trial_id] = request.gpus if trial.resources.gpus else 0.0
        self.budget.begin(trial.trial_id)
        options = self.options
        job = job_of(
            trial,
            row,
            self.layout,
            request,
            train=options.train,
            remote=options.remote,
            system_metrics=options.system_metrics,
        )
        return job, request

    def _conclude(self, sink: Any) -> int:
        """Tables, figures and report; the exit code."""
        from analysis.run import analyse

        self.room.wait_for(self._write_plan)
        analysis = self.room.wait_for(lambda: analyse(self.layout.root))
        made = (self.layout.plan, self.layout.tables, self.layout.figures, self.layout.report)
        sink.log_artifacts([path for path in made if path.exists()])
        sink.describe(analysis.note)
        self.screen.table(analysis.terminal)
        for line in (analysis.answer, *(f"note: {problem}" for problem in analysis.problems)):
            self.screen.say(line)
        rows = self.ledger.rows()
        mute = self._mute(rows)
        for line in (*failures(rows, self.asked.name), *left_early(rows), *mute):
            self.screen.say(line)
        left = self.budget.left_out(sum(row.state == "planned" for row in rows))
        barren = [] if self.search is None else self.search.barren(self.ledger)
        lacking = None if self.seeds is None else self.seeds.left_out()
        for line in filter(None, [*barren, self.queue.closed, left, lacking]):
            self.screen.say(line)
        over = lacking is None and (self.search is None or (self.search.is_over(self.ledger) and not barren))
        done = all(row.state in ("finished", "pruned") for row in rows if row.role == "cell")
        return DONE if over and done and not mute else SOME_FAILED

    def _mute(self, rows: Sequence[TrialRow]) -> list[str]:
        """A line for each primary metric that finished trials never reported, which programs may misspell."""
        finished = [row.trial_id for row in rows if row.state == "finished" and row.role == "cell"]
        lines = []
        for metric in self.asked.primary:
            have = self.ledger.reported(metric)
            if lacking := [trial_id for trial_id in finished if trial_id not in have]:
                lines.append(
                    f"{len(lacking)} of {len(finished)} finished trials never reported {metric}; what was left out of "
                    f"their reports is in their logs, as in: orchestrate logs {lacking[0]}"
                )
        return lines


def left_early(rows: Sequence[TrialRow]) -> list[str]:
    """Lines for trials that ended before their last step, as they were told to."""
    states = Counter[str](row.state for row in rows)
    said = {"pruned": "pruned by the rule of early stopping", "stopped": "stopped on request; --rerun runs all again"}
    return [f"{states[state]} of {len(rows)} trials {what}" for state, what in said.items() if states[state]]


def failures(rows: Sequence[TrialRow], sweep: str) -> list[str]:
    """One line for each reason for which trials have failed or diverged, most frequent first, and where to look."""
    reasons = [
        f"{row.state}: {str(row.error.get('message') or row.error.get('type')).splitlines()[0][:200]}"
        for row in rows
        if row.error is not None
    ]
    lines = [f"{count} of {len(rows)} trials {reason}" for reason, count in Counter(reasons).most_common()]
    return [*lines, f"tracebacks: orchestrate status {sweep} --failures"] if lines else []
