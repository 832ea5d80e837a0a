"""Goal 8: of 1,000 flips and truncations of a real checkpoint none is loaded, and the one before is."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small
from trainers import checkpoint

pytestmark = pytest.mark.slow

NUM_DAMAGED = 1_000


def flip_a_bit(payload: bytearray, draw: random.Random) -> None:
    payload[draw.randrange(len(payload))] ^= 1 << draw.randrange(8)


def truncate(payload: bytearray, draw: random.Random) -> None:
    del payload[draw.randrange(len(payload)) :]


def flip_near_an_end(payload: bytearray, draw: random.Random) -> None:
    """In the headers of the archive, which a reader might repair or skip."""
    place = draw.randrange(512)
    payload[place if draw.random() < 0.5 else len(payload) - 1 - place] ^= 1 << draw.randrange(8)


def zero_a_block(payload: bytearray, draw: random.Random) -> None:
    """As a file system leaves it that has recorded the size before the content."""
    start = draw.randrange(len(payload)) // 4096 * 4096
    before = payload[start : start + 4096]
    payload[start : start + 4096] = bytes(len(before)) if any(before) else b"\xff" * len(before)


def append(payload: bytearray, draw: random.Random) -> None:
    payload += draw.randbytes(1 + draw.randrange(64))


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flip_a_bit, truncate, flip_a_bit, truncate, flip_near_an_end),
    *(zero_a_block, append),
)


@pytest.fixture(scope="module")
def real(undisturbed: Small) -> Path:
    """The last checkpoint of a trial that a sweep has run."""
    paths = sorted(undisturbed.root.glob("trials/*/checkpoints/step_*.pt"))
    assert len(paths) == 2
    return paths[0]


def copy_of(real: Path, folder: Path) -> tuple[Path, Path]:
    """Two checkpoints in `folder`, an older and a newer one; the older by its name alone."""
    newer = folder / real.name
    shutil.copy(real, newer)
    shutil.copy(real.with_name(real.name + ".sha256"), folder)
    older = checkpoint.save(folder, 1, {"step": 1}, keep=2)
    return older, newer


def test_no_damaged_checkpoint_is_loaded(real: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(8)
    _, newer = copy_of(real, tmp_path)
    whole = newer.read_bytes()
    for case in range(NUM_DAMAGED):
        payload = bytearray(whole)
        DAMAGES[case % len(DAMAGES)](payload, draw)
        assert payload != whole
        newer.write_bytes(payload)
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.read(newer)
        loaded = checkpoint.load_newest([tmp_path])
        assert loaded == {"step": 1}, f"case {case}"
        newer.with_name(newer.name + ".damaged").replace(newer)
    assert len(caplog.records) == NUM_DAMAGED
    newer.write_bytes(whole)
    loaded = checkpoint.load_newest([tmp_path])
    assert loaded is not None and loaded["step"] == 8


@pytest.mark.parametrize("case", ["absent", "empty", "of another file", "cut", "flipped"])
def test_a_checkpoint_without_its_own_checksum_is_not_loaded(case: str, real: Path, tmp_path: Path) -> None:
    _, newer = copy_of(real, tmp_path)
    checksum = newer.with_name(newer.name + ".sha256")
    text = checksum.read_text()
    if case == "absent":
        checksum.unlink()
    elif case == "of another file":
        checksum.write_text(text.replace(newer.name, "step_000000009.pt"))
    else:
        flipped = f"{int(text[0], 16) ^ 1:x}{text[1:]}"
        checksum.write_text({"empty": "", "cut": text[:40], "flipped": flipped}[case])
    assert checkpoint.load_newest([tmp_path]) == {"step": 1}


def test_where_all_are_damaged_the_trial_starts_from_scratch(real: Path, tmp_path: Path) -> None:
    for path in copy_of(real, tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.load_newest([tmp_path]) is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".damaged", ".sha256"}
