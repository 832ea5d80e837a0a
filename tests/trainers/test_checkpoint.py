"""Checkpoints come back whole or not at all."""

import random
from pathlib import Path

import pytest
import torch

from trainers import checkpoint, checkpoint_files


def state(step: int) -> dict[str, object]:
    weights = torch.randn(100, generator=torch.Generator().manual_seed(step))
    return {"step": step, "weights": weights, "nested": {"text": "x", "list": [1, 2.5]}}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, state(3))
    loaded = checkpoint.load_newest([tmp_path])
    assert loaded is not None
    assert loaded["nested"] == {"text": "x", "list": [1, 2.5]}
    assert torch.equal(loaded["weights"], state(3)["weights"])


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest([tmp_path, tmp_path / "absent"]) is None


def test_the_newest_of_all_folders_is_used_and_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path / "a", step, state(step), keep=2)
    checkpoint.save(tmp_path / "b", 5, state(5))
    loaded = checkpoint.load_newest([tmp_path / "b", tmp_path / "a"])
    assert loaded is not None and loaded["step"] == 10
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"step_{n:09d}.pt{end}" for n in (2, 10) for end in ("", ".sha256")]


def test_a_checksum_of_another_file_is_none(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, state(3))
    checksum = checkpoint_files.checksum_path(path)
    assert checkpoint_files.is_whole_file(path)
    checksum.write_text(checksum.read_text().replace("step_000000003", "step_000000004"))
    assert not checkpoint_files.is_whole_file(path)


def test_flipped_and_truncated_files_are_never_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    for case in range(200):
        folder = tmp_path / str(case)
        checkpoint.save(folder, 1, state(1), keep=2)
        path = checkpoint.save(folder, 2, state(2), keep=2)
        payload = bytearray(path.read_bytes())
        if case % 2:
            payload[draw.randrange(len(payload))] ^= 1 << draw.randrange(8)
        else:
            del payload[draw.randrange(len(payload)) :]
        path.write_bytes(payload)
        loaded = checkpoint.load_newest([folder])
        assert loaded is not None and loaded["step"] == 1
        assert (folder / f"{path.name}.damaged").exists()
    assert "is damaged" in caplog.text


def test_a_partial_file_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / ".step_000000009.pt.1.partial").write_bytes(b"half")
    assert checkpoint.load_newest([tmp_path]) is None


def test_steps_that_others_start_from_are_never_removed(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, state(step), keep=1, keep_steps=(2, 5, 99))
    kept = checkpoint.steps([tmp_path, tmp_path / "absent", tmp_path])
    assert {step: [path.name for path in paths] for step, paths in kept.items()} == {
        7: ["step_000000007.pt"],
        5: ["step_000000005.pt"],
        2: ["step_000000002.pt"],
    }
    assert list(kept) == [7, 5, 2]
    assert len(list(tmp_path.iterdir())) == 6, "each with its checksum"
    for step, (path,) in kept.items():
        assert checkpoint.read(path)["step"] == step
    loaded = checkpoint.load_newest([tmp_path])
    assert loaded is not None and loaded["step"] == 7


def test_a_damaged_checkpoint_that_is_only_read_stays_where_it_is(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, state(3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step_000000003\.pt is damaged: .* step_000000003\.pt\.sha256"):
        checkpoint.read(path)
    assert path.is_file()
    path.unlink()
    with pytest.raises(ValueError, match=r"step_000000003\.pt cannot be read: No such file"):
        checkpoint.read(path)


def test_folders_of_a_trial_are_those_that_exist(tmp_path: Path) -> None:
    assert checkpoint.folders_of(tmp_path) == []
    for folder in ("attempts/1/checkpoints", "attempts/2", "checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    assert checkpoint.folders_of(tmp_path) == [tmp_path / "checkpoints", tmp_path / "attempts" / "1" / "checkpoints"]
