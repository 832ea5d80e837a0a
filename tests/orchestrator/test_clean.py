"""The command clean on a real sweep: what goes, what stays, and that nothing is run again for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import clean, inspect
from orchestrator.holder import Hold
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.plan import build_plan
from orchestrator.spec import read_sweep
from tests.orchestrator.sweeps import ORCHESTRATE, Small, run
from trainers import checkpoint_files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A sweep of two trials that has finished, keeping steps 6 and 12, with a copy of its storage aside."""
    small = Small(tmp_path_factory.mktemp("clean"), registers=(0,))
    small.write()
    done = small.run("--in-process", "--quiet", *KEEP)
    assert done.returncode == 0, done.stderr
    shutil.copytree(small.storage, small.folder / "pristine")
    return small


KEEP = ("--set", "execution.keep_steps=[6]")


@pytest.fixture
def small(finished: Small) -> Iterator[Small]:
    """The sweep as it was when it had finished."""
    yield finished
    shutil.rmtree(finished.storage)
    shutil.copytree(finished.folder / "pristine", finished.storage)


def layout_of(small: Small) -> SweepLayout:
    return SweepLayout(small.storage.resolve(), small.storage.resolve(), "small")


def rows_of(small: Small) -> list[TrialRow]:
    with Ledger.open(layout_of(small).ledger, writer=False) as ledger:
        return ledger.rows()


def options(small: Small, **changes: object) -> clean.Options:
    return clean.Options(**{"sweep": "small", "storage": small.storage, "state": small.storage, **changes})  # type: ignore[arg-type]


def steps(small: Small, index: int = 0) -> list[int]:
    folders = layout_of(small).trial(rows_of(small)[index].trial_id).checkpoint_folders()
    return [checkpoint_files.step_of(path) for path in checkpoint_files.by_step(folders)]


def files(small: Small) -> dict[Path, int]:
    """Sizes of all files, without those that SQLite makes for readers of a ledger."""
    found = (path for path in small.storage.rglob("*") if path.is_file())
    return {path: path.stat().st_size for path in found if not path.name.endswith(("-shm", "-wal"))}


@pytest.mark.parametrize(("keep", "left"), [("last", [12, 6]), ("kept", [6]), ("none", [])])
def test_checkpoints_go_by_rule(small: Small, keep: clean.Keep, left: list[int]) -> None:
    assert steps(small) == [12, 6]
    clean.clean(options(small, keep=keep))
    assert [steps(small, index) for index in (0, 1)] == [left, left]
    folder = layout_of(small).trial(rows_of(small)[0].trial_id).checkpoints
    assert len(list(folder.iterdir())) == 2 * len(left), "checksums go with their checkpoints"


def test_what_is_freed_is_what_is_said(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(small)
    clean.clean(options(small, keep="none", dry_run=True))
    dry = capsys.readouterr().out
    assert files(small) == before, "a dry run changes nothing"
    clean.clean(options(small, keep="none"))
    said, freed = capsys.readouterr().out, sum(before.values()) - sum(files(small).values())
    assert dry.replace("would be freed", "freed") == said
    assert said.splitlines()[-1] == f"{freed / 1e6:,.2f} MB freed"
    assert freed > 1_000_000 and " 0.00 " not in said
    shown = [clean._shown(count) for count in (0, 12, 1_234, 250_000_000)]
    assert shown == ["0.00 GB", "12.00 bytes", "1.23 kB", "0.25 GB"]


def test_records_and_logs_stay_and_nothing_is_run_again(small: Small) -> None:
    published = {path: path.read_bytes() for path in small.root.glob("trials/*/*.*") if path.is_file()}
    tables, attempts = small.tables(), small.attempts()
    clean.clean(options(small, keep="none", orphans=True, cache=True))
    assert not (small.storage / "cache").exists() or not list((small.storage / "cache").glob("scenes-*"))
    left = [path for path in small.root.glob("trials/*/attempts/*/*") if path.is_file()]
    assert {path.name for path in left} == {"log.txt"} and len(left) == 2
    done = small.run("--in-process", "--quiet", *KEEP)
    assert done.returncode == 0, done.stderr
    assert small.attempts() == attempts
    assert small.tables() == tables
    assert {path: path.read_bytes() for path in published} == published


def test_a_record_that_was_not_published_yet_stays_with_its_attempt(small: Small) -> None:
    trial = layout_of(small).trial(rows_of(small)[0].trial_id)
    (trial.root / "token_norms.parquet").unlink()
    clean.clean(options(small))
    assert [path.name for path in trial.attempt(1).glob("*.parquet")] == ["token_norms.parquet"]


def test_trials_of_another_status_or_that_are_too_young_stay(small: Small) -> None:
    clean.clean(options(small, keep="none", statuses=("failed",)))
    assert steps(small) == [12, 6]
    clean.clean(options(small, keep="none", older_than_days=1.0))
    assert steps(small) == [12, 6]
    clean.clean(options(small, keep="none", older_than_days=0.0))
    assert steps(small) == []
    with pytest.raises(ValueError, match="--status planned: trials that are not over keep theirs"):
        clean.clean(options(small, statuses=("planned",)))


def test_trials_that_are_not_over_keep_everything(small: Small) -> None:
    with Ledger.open(layout_of(small).ledger) as ledger:
        ledger.reset(rows_of(small)[0].trial_id)
    clean.clean(options(small, keep="none"))
    assert (steps(small, 0), steps(small, 1)) == ([12, 6], [])


def test_a_running_sweep_is_not_touched(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    hold = Hold(layout_of(small).lock)
    try:
        clean.clean(options(small, keep="none"))
    finally:
        hold.release()
    assert steps(small) == [12, 6]
    assert "small: nothing is freed; small is being run by process" in capsys.readouterr().out


def test_checkpoints_that_another_sweep_starts_from_stay(small: Small, tmp_path: Path) -> None:
    key = rows_of(small)[0].trial_id
    other = small.write(
        name="other", trial={"model": {"size": "nano", "patch_size": 8, "weights": key}, "method": "pretrained"}
    )
    plan = build_plan(read_sweep(other))
    with Ledger.open(small.storage / "other" / "ledger.db") as ledger:
        ledger.plan(plan.trials)
    clean.clean(options(small, keep="none"))
    small.write()
    assert (steps(small, 0), steps(small, 1)) == ([12, 6], [])


def test_orphans_without_a_result_go_when_asked_to(small: Small) -> None:
    orphan, ended = (layout_of(small).trial(key) for key in ("0123456789abcdef", "fedcba9876543210"))
    for trial in (orphan, ended):
        (trial.attempt(1) / "checkpoints").mkdir(parents=True)
    ended.result.write_text("{}")
    clean.clean(options(small))
    assert orphan.root.is_dir()
    clean.clean(options(small, orphans=True))
    assert (orphan.root.exists(), ended.root.exists()) == (False, True)


def test_caches_of_trials_that_are_still_to_run_stay(small: Small) -> None:
    decoded = next((small.storage / "cache").glob("scenes-*"))
    unused = decoded.with_name("cifar10-0123456789abcdef")
    unused.mkdir()
    with Ledger.open(layout_of(small).ledger) as ledger:
        ledger.reset(rows_of(small)[0].trial_id)
    clean.clean(options(small, cache=True))
    assert (decoded.is_dir(), unused.is_dir()) == (True, False)


def test_the_command_line_reaches_it_and_refuses_what_it_does_not_know(small: Small) -> None:
    command = [*ORCHESTRATE, "clean", "small", "--keep", "none", "--dry-run", "--storage"]
    done = run([*command, str(small.storage)])
    assert done.returncode == 0 and "would be freed" in done.stdout, done.stderr
    assert steps(small) == [12, 6]
    done = run([*command, "s3://bucket/prefix"])
    assert done.returncode == 2 and "clean works on folders" in done.stderr
    assert len(list(inspect.sweeps(small.storage, small.storage))) == 1
