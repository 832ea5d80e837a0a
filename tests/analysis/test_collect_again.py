"""What is kept of trials that were read: the frames are the same with and without, whatever changes in between."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import collect as collecting
from analysis import shards, trial_files
from analysis.collect import CACHE, Frames, collect
from tests.analysis.fabricated import Trial, publish, registers_sweep


def same(one: Frames, other: Frames) -> bool:
    names = ("runs", "metrics", "token_norms", "token_statistics")
    tables = all(
        getattr(one, name).equals(getattr(other, name), check_metadata=True)
        and getattr(one, name).schema == getattr(other, name).schema
        and chunks(getattr(one, name)) == chunks(getattr(other, name))  # of which a file's bytes depend
        for name in names
    )
    return tables and (one.plan, one.mlflow, one.problems) == (other.plan, other.mlflow, other.problems)


def chunks(table: pa.Table) -> list[int]:
    """Rows of each chunk of the first column."""
    return [len(chunk) for chunk in table.column(0).chunks]


def kept(folder: Path) -> list[Path]:
    return sorted((folder / CACHE).glob("*.trials"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials whose files are read, from now on."""
    found: list[str] = []

    def watched(folder: str, trial: Any) -> trial_files.Record:
        found.append(trial.trial_id)
        return trial_files.read_trial(folder, trial)

    monkeypatch.setattr(collecting, "read_trial", watched)
    return found


def details_sweep() -> list[Trial]:
    return registers_sweep(counts=(0, 1), seeds=(0, 1), details=True)


def test_nothing_is_read_twice(tmp_path: Path, read: list[str]) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    first = collect(folder)
    assert sorted(read) == ["id-0-0", "id-0-1", "id-1-0", "id-1-1"]
    read.clear()
    again = collect(folder)
    assert read == []
    assert same(first, again)
    assert same(again, collect(folder, keep=False))
    assert len(read) == 4  # without
    assert len(kept(folder)) == 1


def test_only_what_has_changed_is_read_again(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_CHUNK", 2)
    folder = publish(tmp_path / "s", details_sweep())
    collect(folder)
    path = folder / "trials" / "id-1-0" / "metrics.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "value", pa.array([0.25] * table.num_rows)), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    read.clear()
    frames = collect(folder)
    assert read == ["id-1-0"]
    mine = frames.metrics.filter(pa.compute.equal(frames.metrics["trial_id"], "id-1-0"))
    assert set(mine["value"].to_pylist()) == {0.25}
    assert same(frames, collect(folder, keep=False))


def test_new_content_of_equal_size_and_time_is_seen(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    path = folder / "trials" / "id-0-0" / "result.json"
    before = path.stat()
    collect(folder)
    path.write_text(path.read_text().replace('"attempts": 1', '"attempts": 7'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert collect(folder).runs["attempts"].to_pylist() == [7, 1, 1, 1]


def test_a_problem_is_said_again_each_time_and_is_over_when_it_is(tmp_path: Path, read: list[str]) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    place = folder / "trials" / "id-0-1"
    whole = (place / "token_norms.parquet").read_bytes()
    (place / "token_norms.parquet").write_bytes(whole[:200])
    (place / "config.json").unlink()
    first, again = collect(folder), collect(folder)
    assert [problem.split(": ")[1] for problem in again.problems] == [
        "config.json is missing",
        "token_norms.parquet is unreadable",
    ]
    assert same(first, again)
    assert len(read) == 4
    (place / "token_norms.parquet").write_bytes(whole)
    assert len(collect(folder).problems) == 1


def test_what_the_plan_knows_of_a_trial_without_settings_is_asked_anew(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    for name in ("config.json", "token_norms.parquet"):
        (folder / "trials" / "id-0-1" / name).unlink()
    assert len(collect(folder).problems) == 2
    plan = json.loads((folder / "plan.json").read_text())
    next(trial for trial in plan["trials"] if trial["trial_id"] == "id-0-1")["cell"]["command"] = "./train"
    (folder / "plan.json").write_text(json.dumps(plan))
    frames = collect(folder)
    assert same(frames, collect(folder, keep=False))
    assert frames.problems == ("trial id-0-1: config.json is missing",)  # a program need not have norms


def test_a_file_that_could_not_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    path = folder / "trials" / "id-0-0" / "metrics.parquet"
    kept_aside = path.read_bytes()
    path.unlink()
    path.mkdir()  # opening a folder fails, and says nothing of its content
    assert [problem[:45] for problem in collect(folder).problems] == ["trial id-0-0: metrics.parquet is unreadable: "]
    stamp = trial_files.stamps(str(path.parent))
    path.rmdir()
    path.write_bytes(kept_aside)
    monkeypatch.setattr(
        collecting, "stamps", lambda place: stamp if place.endswith("id-0-0") else trial_files.stamps(place)
    )
    assert collect(folder).problems == ()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
        lambda path: path.write_bytes(path.read_bytes()[:-300] + b"\0" * 300),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_shard_is_made_anew(tmp_path: Path, read: list[str], spoil: Callable[[Path], object]) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    whole = collect(folder, keep=False)
    collect(folder)
    spoil(kept(folder)[0])
    read.clear()
    assert same(collect(folder), whole)
    assert len(read) == 4
    assert same(collect(folder), whole)


def test_a_bit_that_flips_where_arrow_does_not_see_it_is_seen(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    whole = collect(folder)
    (path,) = kept(folder)
    content = path.read_bytes()
    for place in range(len(content) - 100, 0, -7):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            shard = shards._from_bytes(flipped, path)
        except (ValueError, KeyError, OSError, pa.ArrowException):
            continue
        if any(not shard.tables[table.name].equals(getattr(whole, table.name)) for table in trial_files.TABLES):
            break
    else:
        pytest.fail("every flipped bit is seen by Arrow")
    path.write_bytes(flipped)
    assert same(collect(folder), whole)


def test_foreign_shards_and_those_of_other_code_are_not_used(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    whole = collect(folder)
    monkeypatch.setattr(shards, "_version", lambda: b"other")
    read.clear()
    assert same(collect(folder), whole)
    assert len(read) == 4
    assert len(kept(folder)) == 1  # the older one is gone
    foreign = b"not a shard at all"
    (folder / CACHE / f"{zlib.crc32(foreign):08x}-{len(foreign)}.trials").write_bytes(foreign)
    assert same(collect(folder), whole)
    assert len(kept(folder)) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, read: list[str]) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    whole = collect(folder, keep=False)
    (folder / CACHE).write_text("a file is in the way, for root as well")
    assert same(collect(folder), whole)
    assert same(collect(folder), whole)
    assert len(read) == 12


@pytest.mark.parametrize("chunk", [2, 128])
def test_a_trial_that_leaves_the_plan_leaves_the_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(collecting, "_CHUNK", chunk)
    folder = publish(tmp_path / "s", details_sweep())
    collect(folder)
    whole = (folder / "plan.json").read_text()
    plan = json.loads(whole)
    plan["trials"] = [trial for trial in plan["trials"] if trial["trial_id"] != "id-0-1"]
    (folder / "plan.json").write_text(json.dumps(plan))
    frames = collect(folder)
    assert frames.runs["trial_id"].to_pylist() == ["id-0-0", "id-1-0", "id-1-1"]
    assert set(frames.metrics["trial_id"].to_pylist()) == {"id-0-0", "id-1-0", "id-1-1"}
    (folder / "plan.json").write_text(whole)
    assert same(collect(folder), collect(folder, keep=False))


def test_few_shards_are_left_however_often_a_trial_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_CHUNK", 4)
    trials = registers_sweep(counts=(0, 1, 2), seeds=(0, 1, 2, 3))
    folder = publish(tmp_path / "s", trials, written=[])
    for trial in trials:
        publish(folder, trials, written=[trials.index(trial)])
        frames = collect(folder)
    assert same(frames, collect(folder, keep=False))
    assert len(kept(folder)) <= 6  # 12 trials in shards that are at least half full
    assert not [path for path in (folder / CACHE).iterdir() if path.name.startswith(".")]


def test_analyses_at_the_same_time_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_CHUNK", 3)
    trials = registers_sweep(counts=(0, 1, 2), seeds=(0, 1, 2))
    folder = publish(tmp_path / "s", trials)
    whole = collect(folder, keep=False)
    wrong: list[Frames] = []

    def often() -> None:
        wrong.extend(frames for frames in (collect(folder) for _ in range(6)) if not same(frames, whole))

    threads = [threading.Thread(target=often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):  # and somebody who removes what is kept
        for path in kept(folder):
            path.unlink(missing_ok=True)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert same(collect(folder), whole)


CHANGES = ("publish", "remove result", "remove config", "damage metrics", "remove norms", "leave plan", "damage shard")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 5)), max_size=6))
def test_the_frames_are_the_same_with_and_without_after_any_changes(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int]]
) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1, 2))
    folder = publish(tmp_path_factory.mktemp("sweeps") / "s", trials, written=[0, 2, 4])
    collect(folder)
    for change, number in changes:
        _change(folder, trials, change, number)
        assert same(collect(folder), collect(folder, keep=False)), (change, number)


def _change(folder: Path, trials: list[Trial], change: str, number: int) -> None:
    place = folder / "trials" / trials[number].trial_id
    if change == "publish":
        trials[number].result = {"attempts": trials[number].result.get("attempts", 1) + 1}
        publish(folder, trials, written=[number])
    elif change == "leave plan":
        plan = json.loads((folder / "plan.json").read_text())
        plan["trials"] = [trial for trial in plan["trials"] if trial["trial_id"] != trials[number].trial_id]
        (folder / "plan.json").write_text(json.dumps(plan))
    elif change == "damage shard":
        for path in kept(folder)[:1]:
            path.write_bytes(path.read_bytes()[:-number] if number else b"")
    elif change == "damage metrics" and (place / "metrics.parquet").exists():
        (place / "metrics.parquet").write_bytes(b"PAR1")
    elif change.startswith("remove"):
        name = {"result": "result.json", "config": "config.json", "norms": "token_norms.parquet"}[change.split()[1]]
        (place / name).unlink(missing_ok=True)


def test_text_that_no_column_can_hold_is_a_problem(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", details_sweep())
    place = folder / "trials" / "id-0-0"
    result = json.loads((place / "result.json").read_text())
    (place / "result.json").write_text(json.dumps(result | {"error": "\ud800"}))
    frames = collect(folder)
    assert same(frames, collect(folder))
    assert len(frames.problems) == 1 and "result.json is unreadable" in frames.problems[0]
