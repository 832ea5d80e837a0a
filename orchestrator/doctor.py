"""The command doctor: checks sweeps, their files and this machine, and with --fix mends what can be mended."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import (
    doctor_files,
    doctor_ledger,
    doctor_machine,
    doctor_processes,
    doctor_tracking,
    remote_sweep,
)
from orchestrator.finding import Finding
from orchestrator.holder import SweepHeld
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.rebuild import Clock
from orchestrator.remote import Remote
from orchestrator.remote_delivery import RemoteDelivery
from orchestrator.remote_sweep import DrivenElsewhere, Keeper
from orchestrator.remote_trial import Mirror
from orchestrator.who_runs import holder_of

WELL, FINDINGS_LEFT = 0, 1


@dataclass(frozen=True)
class Options:
    """What the command line says: which sweep (None: all), where, and whether to mend."""

    sweep: str | None
    storage: Path
    state: Path
    remote: str | None = None  # URI of the storage, of which `storage` then is this machine's copy
    tracking_uri: str | None = None
    fix: bool = False
    as_json: bool = False


@dataclass
class Report:
    """What was found, in order, and what became of it: the sweep (None: the machine), the finding, whether mended."""

    say: Callable[[str], None]
    fix: bool
    found: list[tuple[str | None, Finding, bool]] = field(default_factory=list)

    def take(self, sweep: str | None, findings: Iterable[Finding], *, fix: bool | None = None) -> bool:
        """Say every finding, mend it where that is asked for and possible; whether none is left."""
        well = True
        for finding in findings:
            mended = self._mend(finding) if (self.fix if fix is None else fix) else False
            self.found.append((sweep, finding, mended))
            self.say(_line(sweep, finding, mended))
            well = well and mended
        return well

    def _mend(self, finding: Finding) -> bool:
        if finding.mend is None:
            return False
        try:
            finding.mend()
        except (OSError, ValueError, sqlite3.Error) as error:
            self.say(f"  could not be mended: {error}")
            return False
        return True


def doctor(options: Options) -> int:
    """Check one sweep or all, and this machine; the exit code: 0 where all is well or mended, 1 where findings stay.

    Raises:
        ValueError: there is no such sweep, or the tracking URI is of a kind that is not supported.
        OSError: remote storage does not answer.
    """
    report = Report((lambda _line: None) if options.as_json else print, options.fix)
    report.take(None, _machine(options))
    for layout in _layouts(options):
        try:
            _sweep(layout, options, report)
        except (SweepHeld, DrivenElsewhere) as held:  # on another machine, or begun just now
            report.take(layout.name, [Finding("lock", str(layout.root), str(held), "try again when it is over")])
    left = sum(not mended for _, _, mended in report.found)
    if options.as_json:
        print(json.dumps([finding.to_json(sweep, mended) for sweep, finding, mended in report.found], indent=1))
    elif not report.found:
        print("all is well")
    else:
        print(f"{len(report.found)} findings, {len(report.found) - left} mended{_hint(report) if left else ''}")
    return FINDINGS_LEFT if left else WELL


def _hint(report: Report) -> str:
    fixable = any(finding.mend is not None for _, finding, mended in report.found if not mended)
    return "; --fix mends what it can" if fixable and not report.fix else ""


def _line(sweep: str | None, finding: Finding, mended: bool) -> str:
    about = f"{finding.where}: {finding.what}"
    if mended:
        return f"{sweep or 'machine'} {finding.check}: {about} — mended: {finding.remedy}"
    advice = f"--fix {finding.remedy}" if finding.mend is not None else finding.remedy
    return f"{sweep or 'machine'} {finding.check}: {about} — {advice}"


def _layouts(options: Options) -> list[SweepLayout]:
    storage, state = options.storage.resolve(), options.state.resolve()
    if options.sweep is not None:
        layout = SweepLayout(storage, state, options.sweep)
        if options.remote is None and not _is_sweep(layout):
            raise ValueError(
                f"there is no sweep {options.sweep!r} under {' or '.join(dict.fromkeys(map(str, (storage, state))))}"
            )
        return [layout]
    folders = {entry.name for place in (storage, state) if place.is_dir() for entry in place.iterdir()}
    return [layout for name in sorted(folders) if _is_sweep(layout := SweepLayout(storage, state, name))]


def _is_sweep(layout: SweepLayout) -> bool:
    inside = layout.root.parent == layout.storage and layout.ledger.parent.parent == layout.state
    return inside and (layout.ledger.exists() or any(path.is_file() for path in (layout.plan, layout.sweep_file)))


def _machine(options: Options) -> Iterator[Finding]:
    yield from doctor_machine.check_versions(doctor_machine.requirements())
    for folder in dict.fromkeys((options.storage.resolve(), options.state.resolve())):
        yield from doctor_machine.check_disk(folder, 0, "")
    mounts = Path("/proc/mounts")
    if mounts.is_file():
        yield from doctor_machine.check_file_system(options.state, mounts.read_text())
    yield from doctor_processes.check_orphans()


def _sweep(layout: SweepLayout, options: Options, report: Report) -> None:
    """Check a sweep; one that runs is not touched, and of it only what stands still is checked."""
    holder = holder_of(layout.lock)
    if holder is not None and holder.alive:
        report.say(f"{layout.name} is being run by {holder}: only what stands still is checked, nothing is mended")
        if report.take(layout.name, doctor_ledger.check_file(layout), fix=False):
            with Ledger.open(layout.ledger, writer=False) as ledger:
                checkpoints = doctor_files.check_checkpoints(layout, ledger, running=True)
                report.take(layout.name, checkpoints, fix=False)
                report.take(layout.name, doctor_machine.check_room(layout, ledger), fix=False)
        return
    mirror = None if options.remote is None else Mirror(Remote(options.remote), layout.storage)
    if mirror is not None and options.fix:
        remote_sweep.restore(mirror, layout)
    report.take(layout.name, doctor_files.check_lock(layout))
    if not report.take(layout.name, doctor_ledger.check_file(layout)):
        return
    clock = Clock()
    with Ledger.open(layout.ledger, writer=options.fix, clock=clock) as ledger:
        if mirror is None or not options.fix:
            _checks(layout, ledger, clock, options, report)
            return
        with Keeper(mirror, layout) as keeper, RemoteDelivery(mirror, layout, ledger) as delivery:
            _checks(layout, ledger, clock, options, report)
            delivery.complete()
            keeper.push()


def _checks(layout: SweepLayout, ledger: Ledger, clock: Clock, options: Options, report: Report) -> None:
    """All checks of a sweep that nobody runs, each after the one before has mended what it found."""
    is_whole = options.remote is None or options.fix  # else this machine has only a part of the sweep's files
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        lambda: doctor_processes.check_processes(ledger),
        lambda: doctor_processes.check_programs(layout.root),
        lambda: doctor_ledger.check_running(ledger),
        lambda: doctor_ledger.check_folders(layout, ledger, clock),
        lambda: doctor_ledger.check_published(layout, ledger),
        lambda: doctor_ledger.check_recorded(layout, ledger) if is_whole else iter(()),
        lambda: doctor_files.check_checkpoints(layout, ledger, running=False),
        lambda: doctor_files.check_leftovers(layout, ledger),
        lambda: doctor_machine.check_room(layout, ledger),
        lambda: _tracking(layout, ledger, options),
    )
    for check in checks:
        report.take(layout.name, check())


def _tracking(layout: SweepLayout, ledger: Ledger, options: Options) -> Iterator[Finding]:
    tracked = doctor_tracking.Tracked.of(layout, ledger, options.tracking_uri, options.remote)
    yield from doctor_tracking.check_runs(tracked, ledger)
