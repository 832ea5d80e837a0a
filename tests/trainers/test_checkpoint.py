"""Checkpoints come back whole or not at all."""

import random
from pathlib import Path

import pytest
import torch

from trainers import checkpoint


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
