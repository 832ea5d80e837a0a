"""ImageNet as folders and as archives: the same images either way, read in place, and what is wrong is named."""

from __future__ import annotations

import re
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainers import layouts_data as layouts
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, archives, open_data
from trainers.data.imagenet import _by_synset


def opened(root: Path, cache: Path, name: str = "imagenet1k", **settings: Any) -> DataSet:
    values = {"train": name, "decode_size": 8, "scenes": None, "validation_fraction": 0.2, **settings}
    return open_data(DataConfig(**values), ExecutionConfig(data_root=str(root), threads=2), 224, cache)


def name_of(reference: str) -> str:
    """Of a file, or of a member of an archive."""
    return re.split("[@/]", reference)[-1]


def images(data: DataSet) -> dict[str, set[tuple[str, bytes]]]:
    """By split: names of files with their pixels."""
    found = {}
    for split in SPLITS:
        part = getattr(data, split)
        found[split] = {(name_of(path), image.tobytes()) for path, image in zip(part.paths, part.images, strict=True)}
    return found


def unpacked(root: Path, to: Path) -> Path:
    """As the archives unpack: a folder for each synset, validation images without folders."""
    unpack(root / "ILSVRC2012_img_train.tar", to / "inner")
    for inner in (to / "inner").iterdir():
        unpack(inner, to / "train" / inner.stem)
    unpack(root / "ILSVRC2012_img_val.tar", to / "val")
    unpack(root / "ILSVRC2012_devkit_t12.tar.gz", to)
    return to


def unpack(archive: Path, to: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 was the first to have one
        tar.extractall(to)


def test_folders_and_archives_are_the_same_data_set(tmp_path: Path) -> None:
    root = layouts.imagenet1k_archives(tmp_path / "archives", layouts.Painter())
    packed = opened(root, tmp_path / "cache")
    assert len(packed.train.paths[0].split("@")) == 3
    for split in SPLITS:
        part = getattr(packed, split)
        assert [layouts.class_of(image[0, 0]) for image in part.images] == part.targets["classes"].tolist()
    folders = unpacked(root, tmp_path / "folders")
    flat = opened(folders, tmp_path / "cache")
    assert images(flat) == images(packed)
    assert flat.class_names == packed.class_names
    for path, number in zip(flat.test.paths, flat.test.targets["classes"], strict=True):  # as valprep.sh sorts them
        (folders / "val" / layouts.SYNSETS[number]).mkdir(exist_ok=True)
        (folders / path).rename(folders / "val" / layouts.SYNSETS[number] / Path(path).name)
    sorted_ = opened(folders, tmp_path / "cache")
    assert images(sorted_) == images(packed)
    assert {Path(path).parent.name for path in sorted_.test.paths} == set(layouts.SYNSETS)


def test_the_published_validation_set_is_the_test_split(tmp_path: Path) -> None:
    root = layouts.imagenet1k_archives(tmp_path / "archives", layouts.Painter())
    data = opened(root, tmp_path / "cache")
    numbers = {name_of(p)[15:23]: int(c) for p, c in zip(data.test.paths, data.test.targets["classes"], strict=True)}
    # as the ground truth says; the archive has them in another order
    assert numbers == {f"{i:08}": c for i, c in enumerate((2, 0, 1, 1, 0, 2), 1)}


def test_classes_keep_their_numbers_where_some_are_missing(tmp_path: Path) -> None:
    synsets = ("n01440764", "n01484850")  # 0 and 2
    root = layouts.imagenet1k_folders(tmp_path / "root", layouts.Painter(), synsets)
    data = opened(root, tmp_path / "cache")
    assert set(data.train.targets["classes"].tolist()) == {0, 2}
    assert len(data.class_names) == 1000


def test_an_image_named_after_another_class_is_left_out_and_named(tmp_path: Path) -> None:
    root = layouts.imagenet1k_folders(tmp_path / "root", layouts.Painter())
    moved = root / "train" / "n01440764" / "n01443537_3.JPEG"
    (root / "train" / "n01443537" / "n01443537_3.JPEG").rename(moved)
    with pytest.raises(ValueError, match=r"1 of 36 images cannot be read.*train/n01440764/n01443537_3.JPEG"):
        opened(root, tmp_path / "cache")
    data = opened(root, tmp_path / "cache", max_unreadable=0.1)
    assert data.unreadable == ("train/n01440764/n01443537_3.JPEG",)
    assert sum(len(getattr(data, split)) for split in SPLITS) == 35


WRONG: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda r: (r / "train" / "n00000001").mkdir() or layouts.Painter().save(r / "train/n00000001/a.png", 0),
        "is none of the 1,000",
    ),
    (lambda r: (r / "train" / "tench").mkdir(), "tench is no synset; allowed are folders such as n01440764"),
    (lambda r: (r / "val" / "extra").mkdir(), "extra is no synset"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_unknown_folders_are_named(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    root = layouts.imagenet1k_folders(tmp_path / "root", layouts.Painter())
    change(root)
    with pytest.raises(ValueError, match=message):
        opened(root, tmp_path / "cache")


def test_a_validation_image_without_ground_truth_is_named(tmp_path: Path) -> None:
    root = layouts.imagenet1k_archives(tmp_path / "root", layouts.Painter())
    layouts.tar(root / "ILSVRC2012_devkit_t12.tar.gz", layouts.devkit((2, 0, 1, 1, 0)), "w:gz")
    with pytest.raises(ValueError, match=r"ILSVRC2012_val_00000006.JPEG is none of the 5 validation images"):
        opened(root, tmp_path / "cache")
    layouts.tar(root / "ILSVRC2012_devkit_t12.tar.gz", [("data/meta.mat", b"x")], "w:gz")
    with pytest.raises(ValueError, match="devkit_t12 is damaged or not the published one"):
        opened(root, tmp_path / "cache")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_damaged_archives_are_named(name: str, tmp_path: Path) -> None:
    root = layouts.imagenet1k_archives(tmp_path / "root", layouts.Painter())
    whole = (root / name).read_bytes()
    second = whole.find(b"ILSVRC2012_val_00000005" if "val" in name else b"n01440764_7.JPEG")
    damaged = (
        whole[: second + 600],  # ends in the middle of an image
        whole[: second + 100],  # ends in the middle of a header
        whole[: second + 30] + b"\xff" * 20 + whole[second + 50 :],  # a header whose sum is wrong
        b"\x1f\x8b" + whole,
        b"",
    )
    for content in damaged:
        (root / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no whole uncompressed tar archive") as raised:
            opened(root, tmp_path / "cache")
        assert "\n" not in str(raised.value)


def test_imagenet22k_as_folders_archives_or_one_archive(tmp_path: Path) -> None:
    root = layouts.imagenet22k_archives(tmp_path / "archives", layouts.Painter())
    packed = opened(root, tmp_path / "cache", "imagenet22k")
    layouts.tar(
        tmp_path / "one" / "fall11_whole.tar", [(f.name, f.read_bytes()) for f in sorted(root.iterdir(), reverse=True)]
    )
    folders = tmp_path / "folders" / "winter21_whole"
    for archive in root.iterdir():
        unpack(archive, folders / archive.stem)
    for other in (tmp_path / "one", tmp_path / "folders"):
        data = opened(other, tmp_path / "cache", "imagenet22k")
        assert images(data) == images(packed)
        assert data.class_names == packed.class_names
        for split in SPLITS:
            part = getattr(data, split)
            assert [layouts.class_of(image[0, 0]) for image in part.images] == part.targets["classes"].tolist()


def test_an_archive_is_indexed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.imagenet22k_archives(tmp_path / "root", layouts.Painter())
    archive = root / "n00004475.tar"
    first = archives.index(tmp_path / "cache", archive)
    assert [found.name for found in first] == [f"n00004475_{i}.JPEG" for i in range(10)]
    content = archive.read_bytes()
    for found in first:
        assert content[found.offset : found.offset + found.size].startswith(b"\x89PNG")
    read: list[Path] = []
    real = archives.members
    monkeypatch.setattr(archives, "members", lambda path: read.append(path) or real(path))
    assert archives.index(tmp_path / "cache", archive) == first
    assert read == []
    layouts.tar(archive, [("other.JPEG", b"x")])
    assert [found.name for found in archives.index(tmp_path / "cache", archive)] == ["other.JPEG"]
    assert read == [archive]
    for file in (tmp_path / "cache" / "indexes").iterdir():
        file.write_bytes(b"damaged")
    assert [found.name for found in archives.index(tmp_path / "cache", archive)] == ["other.JPEG"]


def test_names_of_any_characters_and_length_are_members(tmp_path: Path) -> None:
    names = ["ä/ö@1+2@ü.jpg", "long/" * 40 + "name.jpg", "line\nbreak.jpg"]
    layouts.tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    found = archives.index(tmp_path / "cache", tmp_path / "a.tar")
    assert [member.name for member in found] == names
    content = (tmp_path / "a.tar").read_bytes()
    assert [content[m.offset : m.offset + m.size].decode() for m in found] == names


def test_an_archive_with_an_at_sign_in_its_name_is_refused(tmp_path: Path) -> None:
    root = layouts.imagenet22k_archives(tmp_path / "root", layouts.Painter())
    (root / "winter21@whole").mkdir()
    with pytest.raises(ValueError, match="has an @ in its name; rename it"):
        archives.referable(root, root / "winter21@whole" / "n00004475.tar")


def test_folders_and_links_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.DIRTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "d.jpg"
            tar.addfile(entry)
        tar.addfile(tarfile.TarInfo("d.jpg"))
    assert [member.name for member in archives.members(tmp_path / "a.tar")] == ["d.jpg"]


def test_synsets_come_in_their_order_and_only_one_is_sorted_at_a_time() -> None:
    def images() -> Iterator[tuple[str, str, str]]:
        for synset in range(400, 0, -1):
            for number in range(50, 0, -1):
                name = f"n{synset:08}_{number}.JPEG"
                yield f"n{synset:08}", name, f"{synset:08}/{name}"

    tracemalloc.start()
    found = _by_synset(images())
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(found) == [f"n{number:08}" for number in range(1, 401)]
    names = sorted(f"n00000007_{number}.JPEG" for number in range(1, 51))
    assert found["n00000007"].paths == [f"00000007/{name}" for name in names]
    assert peak < held + 100_000  # bytes: 20,000 tuples with their names take 2.6 MB
