"""References to files and to members of archives, read from real tar files."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.data.encoded import encoded_size, file_of, leads_out, member, opened
from trainers.data.pictures import decode_whole


def archive(root: Path, names: list[str]) -> dict[str, str]:
    """A tar archive of pictures, the i-th of them 2 + i px wide; references by name, as its headers have them."""
    with tarfile.open(root / "a.tar", "w") as tar:
        for i, name in enumerate(names):
            file = io.BytesIO()
            Image.new("RGB", (2 + i, 3), (i, 50, 100)).save(file, "PNG")
            entry = tarfile.TarInfo(name)
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    with tarfile.open(root / "a.tar") as tar:
        return {entry.name: member("a.tar", entry.offset_data, entry.size, entry.name) for entry in tar}


def test_members_are_read_in_place(tmp_path: Path) -> None:
    names = ["x/1.png", "with @ and +3@.png", "line\nbreak.png", "ä.png"]
    references = archive(tmp_path, names)
    assert list(references) == names
    for i, reference in enumerate(references.values()):
        pixels = decode_whole(opened(tmp_path, reference))
        assert pixels.shape == (3, 2 + i, 3)
        assert (pixels == (i, 50, 100)).all()


def test_archives_that_end_early_and_empty_members_are_said(tmp_path: Path) -> None:
    first, last = archive(tmp_path, ["first.png", "last.png"]).values()
    offset = int(last.split("@")[1].partition("+")[0])
    os.truncate(tmp_path / "a.tar", offset + 10)
    assert decode_whole(opened(tmp_path, first)).shape == (3, 2, 3)
    with pytest.raises(OSError, match=r"ends \d+ bytes before its member last\.png does"):
        opened(tmp_path, last)
    os.truncate(tmp_path / "a.tar", 540)  # in the first member, which begins at 512
    with pytest.raises(OSError, match=r"before its member first\.png does"):
        opened(tmp_path, first)
    with pytest.raises(OSError, match="is empty"):
        opened(tmp_path, member("a.tar", 0, 0, "x.png"))


def test_files_are_given_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "odd@name.png").write_bytes(b"x")
    assert opened(tmp_path, "odd@name.png") == tmp_path / "odd@name.png"
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(OSError, match="is empty"):
        opened(tmp_path, "empty.png")
    for name in ("missing.png", "missing.tar@0+5@x.png", "."):
        with pytest.raises(OSError, match="is not a file"):
            opened(tmp_path, name)


def test_whole_archives_hold_what_arrays_held(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG")
        (tmp_path / "p.png").write_bytes(file.getvalue())
        tar.add(tmp_path / "p.png", "deep/p.png")
    with tarfile.open(tmp_path / "b.tar") as tar:
        entry = tar.getmember("deep/p.png")
    reference = member("b.tar", entry.offset_data, entry.size, entry.name)
    np.testing.assert_array_equal(decode_whole(opened(tmp_path, reference)), values)


@pytest.mark.parametrize("path", ["../out.png", "/etc/passwd", "a/../../out.png", "../a.tar@0+4@x.png"])
def test_nothing_outside_of_the_root_is_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "root").mkdir()
    for name in ("out.png", "a.tar"):
        (tmp_path / name).write_bytes(b"secret")
    with pytest.raises(OSError, match="leads out of the folder"):
        opened(tmp_path / "root", path)


def test_a_file_whose_name_looks_like_a_member_is_a_file(tmp_path: Path) -> None:
    name = "x@1+99@y.png"
    (tmp_path / name).write_bytes(b"12345")
    assert opened(tmp_path, name) == tmp_path / name
    assert (encoded_size(tmp_path, name), file_of(name)) == (5, name)


def test_what_a_reference_is_follows_from_its_text() -> None:
    """However long a member's name is: no file system is asked."""
    for reference, file in (
        ("a.tar@1+99@y.png", "a.tar"),
        (member("d/a.tar", 0, 9, "n" * 4_000), "d/a.tar"),
        ("a.tar/x@1+99@y.png", "a.tar/x@1+99@y.png"),
        ("img@2x.jpg", "img@2x.jpg"),
    ):
        assert file_of(reference) == file


def test_paths_that_may_lead_out_are_known() -> None:
    assert [leads_out(path) for path in ("/x", "../x", "a/../x", "a/..x", "a..")] == [True, True, True, False, False]
