"""The data cache: content, fingerprint, damage, several processes at once, crashes and messages."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainers.data import SPLITS
from trainers.data.cache import Source, Writer, open_source
from trainers.data.rows import RowStream, Texts

Fill = Callable[[Writer, object], None]

COUNTS = {"train": 7, "validation": 2, "test": 3}


def quiet(*_: object) -> None:
    pass


def rows(split: str) -> tuple[np.ndarray, dict[str, object], list[str]]:
    rng = np.random.default_rng(len(split))
    n = COUNTS[split]
    images = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
    depth = rng.random((n, 4, 4)).astype(np.float16)
    targets = {"classes": np.arange(n) % 2, "depth": depth, "captions": [f"{split} ü {i}" for i in range(n)]}
    return images, targets, [f"{split}/{i}.png" for i in range(n)]


def fill(writer: Writer, _: object, chunk: int = 100) -> None:
    for split in SPLITS:
        images, targets, paths = rows(split)
        for i in range(0, len(images), chunk):
            part = {name: values[i : i + chunk] for name, values in targets.items()}
            writer.append(split, images[i : i + chunk], part, paths[i : i + chunk])


def source(write: Fill = fill) -> Source:
    return Source("toy", {"version": 1}, ("even", "odd"), write)


def test_what_was_appended_is_what_is_opened(tmp_path: Path) -> None:
    data = open_source(source(), tmp_path, quiet)
    for name in SPLITS:
        split, (images, targets, paths) = getattr(data, name), rows(name)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.targets["classes"], targets["classes"])
        np.testing.assert_array_equal(split.targets["depth"], targets["depth"])
        assert list(split.targets["captions"]) == targets["captions"]
        assert list(split.paths) == paths
        assert len(split) == len(images)
        assert split.images.flags.writeable is False
        assert isinstance(split.images.base, np.memmap)
    assert data.provides == ("classes", "depth", "captions")
    assert data.class_names == ("even", "odd")


def test_rows_written_in_parts_are_the_file_that_numpy_saves(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(20, 3)
    stream = RowStream(tmp_path / "parts.npy", array[:1])
    for start, stop in ((0, 1), (1, 9), (9, 20)):
        stream.append(array[start:stop])
    stream.close()
    np.save(tmp_path / "whole.npy", array)
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_the_fingerprint_is_of_content_alone(tmp_path: Path) -> None:
    def changed(target: str) -> Fill:
        def write(writer: Writer, _: object) -> None:
            for split in SPLITS:
                images, targets, paths = rows(split)
                if split == "test":
                    if target == "pixel":
                        images[2, 3, 3, 2] ^= 1
                    elif target == "paths":
                        paths = [f"elsewhere/{path}" for path in paths]
                    elif target == "captions":
                        targets["captions"] = ["other", *list(targets["captions"])[1:]]
                    else:
                        targets["classes"] = 1 - np.arange(len(images)) % 2
                writer.append(split, images, targets, paths)

        return write

    def fingerprint(write: Fill, name: str) -> str:
        return open_source(source(write), tmp_path / name, quiet).fingerprint

    reference = fingerprint(fill, "reference")
    assert len(reference) == 16
    assert int(reference, 16) >= 0
    assert fingerprint(lambda writer, p: fill(writer, p, chunk=2), "parts") == reference
    assert fingerprint(changed("paths"), "paths") == reference
    different = [fingerprint(changed(what), what) for what in ("pixel", "captions", "classes")]
    assert len({reference, *different}) == 4


def test_it_is_built_once_and_again_where_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = []

    def write(writer: Writer, progress: object) -> None:
        built.append(1)
        fill(writer, progress)

    first = open_source(source(write), tmp_path, quiet)
    open_source(source(write), tmp_path, quiet)
    assert len(built) == 1
    folder = tmp_path / source().folder_name

    def truncate() -> None:
        with (folder / "train.images.npy").open("r+b") as file:
            file.truncate(100)

    def lengthen() -> None:
        with (folder / "test.images.npy").open("ab") as file:
            file.write(b"x")

    damages = [
        truncate,
        lengthen,
        (folder / "test.classes.npy").unlink,
        (folder / "meta.json").unlink,
        lambda: (folder / "meta.json").write_text("{"),
        lambda: (folder / "meta.json").write_text("[]"),
        lambda: (folder / "meta.json").write_text('{"files": {}}'),
    ]
    for count, damage in enumerate(damages, start=2):
        damage()
        caplog.clear()
        assert open_source(source(write), tmp_path, quiet).fingerprint == first.fingerprint
        assert len(built) == count
        assert "built again" in caplog.text


def test_other_settings_are_another_folder(tmp_path: Path) -> None:
    names = {source().folder_name, replace(source(), key={"version": 2}).folder_name}
    names.add(replace(source(), class_names=("a", "b")).folder_name)
    assert len(names) == 3
    hostile = replace(source(), name="../../etc/passwd").folder_name
    assert "/" not in hostile
    assert not hostile.startswith(".")
    open_source(source(), tmp_path, quiet)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [source().folder_name]


def test_texts_are_a_sequence_of_any_strings(tmp_path: Path) -> None:
    strings = ["", "ü", "\udcff undecodable", "a\nb", "", "最"]

    def write(writer: Writer, _: object) -> None:
        for split in SPLITS:
            images = np.zeros((6, 2, 2, 3), np.uint8)
            for part in (slice(0, 2), slice(2, 6)):
                writer.append(split, images[part], {"classes": np.zeros(6, np.int64)[part], "captions": strings[part]})

    texts = open_source(source(write), tmp_path, quiet).test.targets["captions"]
    assert isinstance(texts, Texts)
    assert list(texts) == strings
    assert (texts[-1], texts[1:3], len(texts)) == ("最", strings[1:3], 6)
    with pytest.raises(IndexError):
        texts[6]


SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from trainers.data import SPLITS
from trainers.data.cache import Source, open_source
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def write(writer, progress):
    with (folder / "built").open("a") as file:
        file.write("x")
    for split in SPLITS:
        writer.append(split, np.full((5, 4, 4, 3), 7, np.uint8), {"classes": np.zeros(5, np.int64)})
        (folder / "writing").touch()
        time.sleep(seconds)

data = open_source(Source("slow", {}, ("only",), write), folder / "cache", lambda *told: print(told[0], flush=True))
print(data.fingerprint, int(data.test.images.sum()))
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "built").read_text() == "x"
    results = {out.splitlines()[-1] for out, _ in outputs}
    assert len(results) == 1
    assert results.pop().endswith(f" {5 * 4 * 4 * 3 * 7}")
    assert sum("waiting for slow" in out for out, _ in outputs) == 1


def test_a_killed_build_leaves_only_a_hidden_folder_that_the_next_removes(tmp_path: Path) -> None:
    with start(tmp_path, 60) as process:
        while not (tmp_path / "writing").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert any(name.endswith(".building") for name in left)
    assert all(name.startswith(".") for name in left)
    with start(tmp_path, 0) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "waiting" not in out
    assert (tmp_path / "built").read_text() == "xx"
    hidden = [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]
    assert [name for name in hidden if not name.endswith(".lock")] == []


def test_a_failed_build_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    def full(writer: Writer, progress: object) -> None:
        fill(writer, progress)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ValueError, match=r"cannot be cached in .*No space left") as raised:
        open_source(source(full), tmp_path, quiet)
    assert "\n" not in str(raised.value)
    assert all(path.name.endswith(".lock") for path in tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be cached in"):
        open_source(source(), tmp_path / "file", quiet)


def test_builders_that_break_the_contract_are_told(tmp_path: Path) -> None:
    def write(kind: str) -> Fill:
        def inner(writer: Writer, _: object) -> None:
            for split in SPLITS[: 2 if kind == "missing" else 3]:
                images, targets, _paths = rows(split)
                if kind == "uneven" and split == "test":
                    targets.pop("depth")
                if kind == "short":
                    targets["classes"] = targets["classes"][1:]
                writer.append(split, images, targets)

        return inner

    for kind, message in (
        ("missing", "no images left for its test split"),
        ("uneven", "test has"),
        ("short", "6 classes for 7 images"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(source(write(kind)), tmp_path / kind, quiet)


def test_unreadable_files_are_named_up_to_the_limit(tmp_path: Path) -> None:
    def write(writer: Writer, progress: object) -> None:
        fill(writer, progress)
        writer.skip("train/bad\nname.png", "broken:\n everywhere")

    tolerant = replace(source(write), candidates=13, max_unreadable=0.1)  # 13 × 0.1 allows 1
    data = open_source(tolerant, tmp_path, quiet)
    assert data.unreadable == ("train/bad\nname.png",)
    folder = tmp_path / tolerant.folder_name
    assert (folder / "unreadable.txt").read_text() == "train/bad\\nname.png\tbroken: everywhere\n"
    strict = replace(tolerant, max_unreadable=0.07)  # allows none, also of what is cached already
    for cache in (tmp_path, tmp_path / "anew"):
        with pytest.raises(ValueError, match=r"1 of 13 images .* data\.max_unreadable 0\.07") as e:
            open_source(strict, cache, quiet)
        named = str(e.value).rpartition("named in ")[2]
        assert Path(named).read_text().startswith("train/bad\\nname.png\t")
        assert "\n" not in str(e.value)


def test_it_stops_early_where_nearly_all_is_unreadable(tmp_path: Path) -> None:
    tried = []

    def write(writer: Writer, _: object) -> None:
        for i in range(10_000):
            tried.append(i)
            writer.skip(f"{i}.png", "broken")

    with pytest.raises(ValueError, match="cannot be read"):
        open_source(replace(source(write), candidates=10_000, max_unreadable=0.001), tmp_path, quiet)
    assert len(tried) == 111  # the 10 allowed, 100 more to be named, and the one that ends it


def test_meta_is_readable_and_lists_every_file(tmp_path: Path) -> None:
    data = open_source(source(), tmp_path, quiet)
    folder = tmp_path / source().folder_name
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["fingerprint"] == data.fingerprint
    assert {*meta["files"], "meta.json"} == {path.name for path in folder.iterdir()}
