"""Images with captions: shards and tables give the same pairs; what is no pair is named and never becomes one."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainers import layouts_data as layouts
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, archives, open_data, source_of
from trainers.data.image_text import LONGEST


def config(**settings: Any) -> DataConfig:
    values = {"train": "image_text", "name": "pairs", "decode_size": 8, "scenes": None, "validation_fraction": 0.2}
    return DataConfig(**values | settings)


def opened(root: Path, cache: Path, **settings: Any) -> DataSet:
    return open_data(config(**settings), ExecutionConfig(data_root=str(root), threads=2), 224, cache)


def pairs(data: DataSet) -> dict[str, int]:
    """The class that the colour of each image says, by caption."""
    found = {}
    for split in SPLITS:
        part = getattr(data, split)
        assert len(part.targets["captions"]) == len(part)
        for image, caption in zip(part.images, part.targets["captions"], strict=True):
            found[caption] = layouts.class_of(image[0, 0])
    return found


def test_shards_give_every_image_its_caption(tmp_path: Path) -> None:
    root = layouts.shards(tmp_path / "root", layouts.Painter())
    data = opened(root, tmp_path / "cache")
    assert data.provides == ("captions",)
    assert data.class_names == ()
    assert [len(getattr(data, split)) for split in SPLITS] == [10, 3, 3]  # 16: 3.2, then 0.2 × 13
    assert pairs(data) == {f"picture {i}": i % 12 for i in range(16)}
    whole = data.test.whole(0)
    assert layouts.class_of(whole.pixels[0, 0]) == int(data.test.targets["captions"][0].split()[1]) % 12


def test_shards_of_their_own_make_a_split(tmp_path: Path) -> None:
    draw = layouts.Painter()
    root = tmp_path / "root"
    for split, count in (("train", 8), ("val", 2), ("test", 3)):
        layouts.shards(root, draw, split, count)
    data = opened(root, tmp_path / "cache")
    assert [len(getattr(data, split)) for split in SPLITS] == [16, 4, 6]
    assert all(path.startswith("test/") for path in data.test.paths)
    flat = tmp_path / "flat"
    layouts.shards(flat, layouts.Painter(), ".")
    assert sum(len(getattr(opened(flat, tmp_path / "cache"), split)) for split in SPLITS) == 16


@pytest.mark.parametrize(
    "columns", [("filepath", "title"), ("path", "caption"), ("image", "text"), ("Image", " Caption")]
)
@pytest.mark.parametrize("name", ["train.csv", "anything.tsv"])
def test_tables_give_every_image_its_caption(name: str, columns: tuple[str, str], tmp_path: Path) -> None:
    root = layouts.table(tmp_path / "root", layouts.Painter(), name, columns)
    data = opened(root, tmp_path / "cache")
    assert pairs(data) == {f"picture {i}, with a comma": i for i in range(12)}


def parquet(root: Path, captions: list[bytes | None], name: str = "train.parquet") -> Path:
    draw = layouts.Painter()
    paths = [f"images/{i}.png" for i in range(len(captions))]
    for i, path in enumerate(paths):
        draw.save(root / path, i)
    texts = pa.array(captions, pa.binary()).view(pa.string())  # unchecked, as other writers do
    pq.write_table(pa.table({"path": paths, "caption": texts}), root / name)
    return root


def test_parquet_gives_every_image_its_caption(tmp_path: Path) -> None:
    root = parquet(tmp_path / "root", [f"picture {i}".encode() for i in range(12)])
    assert pairs(opened(root, tmp_path / "cache")) == {f"picture {i}": i for i in range(12)}


BAD: dict[str, tuple[bytes | None, str]] = {
    "3": (b"", "caption is empty"),
    "4": (b" \n\t ", "caption is empty"),
    "5": (b"caf\xe9", "caption is not UTF-8"),
    "6": (b"\xff\xfe\x00", "caption is not UTF-8"),
}


def check_bad(data_set: Callable[..., DataSet], folder: Path, names: dict[str, str]) -> None:
    """All good pairs are there with their captions, and each bad one is named with its reason."""
    data = data_set(max_unreadable=0.9)
    assert pairs(data) == {f"picture {i}": i for i in range(12) if str(i) not in names}
    assert len(data.unreadable) == len(names)
    (file,) = (path / "unreadable.txt" for path in folder.iterdir() if path.name.startswith("pairs-"))
    listed = dict(line.split("\t") for line in file.read_text().splitlines())
    for part, reason in names.items():
        (name,) = (name for name in listed if f"{part}.png" in name or f"{int(part):06}" in name)
        assert listed[name] == reason
    with pytest.raises(
        ValueError, match=f"{len(names)} of 12 images cannot be read, more than data.max_unreadable 0.001"
    ):
        data_set()


def test_bad_captions_in_tables_are_named(tmp_path: Path) -> None:
    names = {row: reason for row, (_, reason) in BAD.items()}
    captions = [BAD[str(i)][0] if str(i) in BAD else f"picture {i}".encode() for i in range(12)]
    captions[7] = None
    root = parquet(tmp_path / "parquet", captions)
    check_bad(lambda **s: opened(root, tmp_path / "a", **s), tmp_path / "a", {**names, "7": "caption is empty"})
    lines = [b"path,caption"] + [
        b'images/%d.png,"%s"' % (i, caption) for i, caption in enumerate(captions) if caption is not None
    ]
    (root / "train.parquet").unlink()
    (root / "train.csv").write_bytes(b"\n".join([*lines, b"images/7.png"]))  # a row that ends early
    check_bad(lambda **s: opened(root, tmp_path / "b", **s), tmp_path / "b", {**names, "7": "caption is empty"})


def test_bad_captions_and_parts_alone_in_shards_are_named(tmp_path: Path) -> None:
    draw, files = layouts.Painter(), []
    for i in range(12):
        files.append((f"{i:06}.jpg", draw.bytes(i)))
        files.append((f"{i:06}.txt", BAD[str(i)][0] if str(i) in BAD else f"picture {i}".encode()))
    del files[2 * 8 + 1]  # no text
    del files[2 * 7]  # no image
    files[-2:] = [(files[-2][0], files[-2][1]), ("000011.json", b"[1")]
    root = tmp_path / "root"
    layouts.tar(root / "train" / "0.tar", files)
    names = {row: reason for row, (_, reason) in BAD.items()}
    names |= {"7": "has no image", "8": "has no caption", "11": "caption is empty"}
    for _ in range(2):  # the second time from the index
        check_bad(lambda **s: opened(root, tmp_path / "cache", **s), tmp_path / "cache", names)


def test_a_json_without_caption_or_not_utf_8_is_named(tmp_path: Path) -> None:
    draw = layouts.Painter()
    texts = [json.dumps({"caption": f"picture {i}"}).encode() for i in range(12)]
    texts[0], texts[1], texts[2] = b'{"title": "x"}', b'{"caption": 7}', b'{"caption": "caf\xe9"}'
    texts[3] = b'{"caption": "half \\ud83d of a pair"}'
    texts[4] = b"[" * 100_000
    files = [part for i in range(12) for part in ((f"{i:06}.jpg", draw.bytes(i)), (f"{i:06}.json", texts[i]))]
    layouts.tar(tmp_path / "root" / "train" / "0.tar", files)
    empty, encoding = "caption is empty", "caption is not UTF-8"
    names = {"0": empty, "1": empty, "2": encoding, "3": encoding, "4": empty}
    check_bad(lambda **s: opened(tmp_path / "root", tmp_path / "cache", **s), tmp_path / "cache", names)


def test_long_captions_are_cut_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captions = [f"picture {i}".encode() for i in range(12)]
    captions[2] = b"two\0\n  words " + "é".encode() * (LONGEST + 50)
    captions[3] = "é".encode() * LONGEST
    root = parquet(tmp_path / "root", captions)
    with caplog.at_level(logging.WARNING):
        data = opened(root, tmp_path / "cache")
    found = {caption for split in SPLITS for caption in getattr(data, split).targets["captions"]}
    assert ("two words " + "é" * LONGEST)[:LONGEST] in found
    assert "é" * LONGEST in found
    (note,) = source_of(config(), ExecutionConfig(data_root=str(root)), 224, tmp_path).notes
    assert note == "1 captions are longer than 10,000 characters and cut there"
    assert note in caplog.text


def test_several_captions_of_an_image_are_named(tmp_path: Path) -> None:
    root = layouts.table(tmp_path / "root", layouts.Painter(), "train.csv", ("path", "caption"))
    with (root / "train.csv").open("a", newline="") as file:
        csv.writer(file).writerows([(99, "images/3.png", "a second one"), (100, "https://x.org/a.jpg", "elsewhere")])
    data = opened(root, tmp_path / "cache", max_unreadable=0.2)
    assert pairs(data) == {f"picture {i}, with a comma": i for i in range(12)}
    assert sorted(data.unreadable) == ["images/3.png", "train.csv row 14"]


def test_a_missing_image_is_unreadable_and_its_caption_goes_with_it(tmp_path: Path) -> None:
    root = layouts.table(tmp_path / "root", layouts.Painter())
    (root / "images" / "5.png").unlink()
    data = opened(root, tmp_path / "cache", max_unreadable=0.1)
    assert data.unreadable == ("images/5.png",)
    assert pairs(data) == {f"picture {i}, with a comma": i for i in range(12) if i != 5}


WRONG: list[tuple[Callable[[Path], object], str]] = [
    (lambda r: (r / "train.csv").unlink(), r"has no shards \(\*.tar\) and no tables"),
    (
        lambda r: (r / "train.csv").write_text("a,b\n1,2\n"),
        "has no column of paths; allowed: path, filepath, image; there",
    ),
    (
        lambda r: (r / "train.csv").write_text("path,b\n1,2\n"),
        "has no column of captions; allowed: caption, title, text",
    ),
    (lambda r: (r / "train.csv").write_text('path,caption\n"a,b\n'), "train.csv is no table: line 2"),
    (lambda r: (r / "train.csv").write_text("path,caption\n"), "has no pair of image and caption; train.csv is empty"),
    (lambda r: (r / "train.csv").rename(r / "train.parquet"), "train.parquet is no table of texts"),
    (
        lambda r: (r / "train.tsv").write_text("path\tcaption\n"),
        "has several sources of its train split: train.csv, train.tsv",
    ),
    (lambda r: layouts.tar(r / "train" / "0.tar", []), "several sources of its train split"),
    (
        lambda r: [(r / "train.csv").unlink(), (r / "a.tar").write_bytes(b"\x1f\x8b0")],
        "a.tar is no whole uncompressed tar archive",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_layouts_are_said_in_one_line(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    root = layouts.table(tmp_path / "root", layouts.Painter())
    change(root)
    with pytest.raises(ValueError, match=message) as raised:
        opened(root, tmp_path / "cache")
    assert "\n" not in str(raised.value)


def test_texts_of_a_shard_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.shards(tmp_path / "root", layouts.Painter())
    first = opened(root, tmp_path / "cache")
    monkeypatch.setattr(archives.tarfile, "open", lambda *_, **__: pytest.fail("an archive was read again"))
    assert opened(root, tmp_path / "cache").fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_fields_longer_than_csv_allows_by_itself_are_read(name: str, tmp_path: Path) -> None:
    root = layouts.table(tmp_path / "root", layouts.Painter(), name, ("path", "caption"))
    limit = csv.field_size_limit()
    text = (root / name).read_text()
    (root / name).write_text(text.replace("picture 3,", "x" * 200_000))
    found = {
        caption for split in SPLITS for caption in getattr(opened(root, tmp_path / "cache"), split).targets["captions"]
    }
    assert "x" * LONGEST in found
    assert csv.field_size_limit() == limit


def test_rows_that_lead_out_of_the_data_set_are_named(tmp_path: Path) -> None:
    layouts.Painter().save(tmp_path / "out.png", 1)
    root = layouts.table(tmp_path / "root", layouts.Painter(), "train.csv", ("path", "caption"))
    inner = opened(root, tmp_path / "a")
    with (root / "train.csv").open("a") as file:
        file.write(f"12,../out.png,one\n13,{tmp_path / 'out.png'},two\n14,x/../../out.png,three\n")
    data = opened(root, tmp_path / "b", max_unreadable=0.9)
    assert pairs(data) == pairs(inner)
    assert data.unreadable == ("train.csv row 13", "train.csv row 14", "train.csv row 15")
    (file,) = (tmp_path / "b").glob("pairs-*/unreadable.txt")
    assert file.read_text().count("leads out of the data set") == 3


def test_a_table_in_a_folder_may_name_files_beside_it(tmp_path: Path) -> None:
    root = layouts.table(tmp_path / "root", layouts.Painter(), "train.csv", ("path", "caption"))
    inner = pairs(opened(root, tmp_path / "cache"))
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train").mkdir()
    (root / "train" / "list.csv").write_text("\n".join(lines).replace("images/", "../images/"))
    (root / "train.csv").unlink()
    assert pairs(opened(root, tmp_path / "cache")) == inner
