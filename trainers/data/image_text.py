"""The data set `image_text`: images with captions, in tar shards (WebDataset) or listed in tables."""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS
from trainers.data.archives import Member, members, packed_texts, referable, remembered, texts
from trainers.data.cache import Source
from trainers.data.encoded import leads_out
from trainers.data.encoded import member as reference
from trainers.data.listing import SUFFIXES, Description, Listing, root_of, source, stamps
from trainers.data.tables import TABLES, rows

FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
LONGEST = 10_000  # characters of a caption that are kept; CLIP's tokeniser keeps 77 tokens
_LARGEST_TEXT = 2**24  # bytes of a text file that are read

logger = logging.getLogger(__name__)


@dataclass
class Pairs:
    """Images and captions in the order in which they were found, and by name and reason what could not be used."""

    paths: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    cut: int = 0

    def add(self, path: str, caption: bytes | str | None) -> None:
        """Adds a pair, or says why it is none."""
        try:
            text = caption.decode("utf-8") if isinstance(caption, bytes) else caption or ""
            text.encode("utf-8")
        except UnicodeError:
            self.faults.append((path, "caption is not UTF-8"))
            return
        text = " ".join(text.replace("\0", " ").split())
        if not text:
            self.faults.append((path, "caption is empty"))
            return
        self.cut += len(text) > LONGEST
        self.paths.append(path)
        self.captions.append(text[:LONGEST])

    def extend(self, other: Pairs) -> None:
        """Adds all of another one."""
        self.paths += other.paths
        self.captions += other.captions
        self.faults += other.faults
        self.cut += other.cut

    def listing(self) -> Listing:
        """What was found; of several captions of one image the first, the others become faults."""
        first = {path: row for row, path in reversed(list(enumerate(self.paths)))}
        kept = [row for row, path in enumerate(self.paths) if first[path] == row]
        self.faults += [
            (path, "another caption of the same image") for row, path in enumerate(self.paths) if first[path] != row
        ]
        return Listing(tuple(self.paths[row] for row in kept), {"captions": tuple(self.captions[row] for row in kept)})


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of the pairs under `execution.data_root`: shards *.tar or tables *.csv, *.tsv, *.parquet.

    They lie in folders train, validation (or val) and test, or are tables of those names, or lie in the root and are
    divided by `data.validation_fraction`. In a shard an image and a text are a pair when their names are equal up to
    the first dot: NAME.jpg with NAME.txt, or the "caption" of NAME.json. A table has a column path, filepath
    or image, relative to its folder, and a column caption, title or text.

    White space in captions is joined. Captions longer than LONGEST characters are cut and counted. What has no caption,
    an empty one or one that is not UTF-8, and images or texts without the other, are left out, named, and count as
    unreadable; so do further captions of the same image.

    Raises:
        ValueError: there are neither shards nor tables, both, or a damaged one.
    """
    root = root_of(config, execution)
    files = {split: found for split in SPLITS if (found := _files(root, split))} or {"train": _in(root)}
    if not files.get("train"):
        raise ValueError(
            f"{root} has no shards (*.tar) and no tables (*{', *'.join(TABLES)}), neither itself nor in a folder train"
        )
    listings, faults, cut = {}, [], 0
    for split, chosen in files.items():
        pairs = Pairs()
        for file in chosen:
            pairs.extend(_shard(root, file, cache) if file.suffix == ".tar" else _table(root, file))
        listings[split] = pairs.listing()
        faults += pairs.faults
        cut += pairs.cut
    notes = (f"{cut:,} captions are longer than {LONGEST:,} characters and cut there",) if cut else ()
    for note in notes:
        logger.warning("%s: %s", config.name, note)
    if not len(listings["train"]):
        why = f"{faults[0][0]}: {faults[0][1]}" if faults else f"{files['train'][0].name} is empty"
        raise ValueError(f"{root} has no pair of image and caption; {why}")
    digest = stamps(root, [file.relative_to(root).as_posix() for chosen in files.values() for file in chosen])
    if files["train"][0].suffix != ".tar":
        digest += stamps(root, [path for listing in listings.values() for path in listing.paths])
    described = Description(facts={"notes": notes}, key={"longest": LONGEST}, faults=tuple(faults))
    return source(config, execution, root, listings, described, digest, side)


def _files(root: Path, split: str) -> list[Path]:
    """The shards or tables of a split, where it has its own."""
    folders = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
    tables = [path for name in FOLDERS[split] for suffix in TABLES if (path := root / f"{name}{suffix}").is_file()]
    found = [file for folder in folders for file in _in(folder)] + tables
    if len({file.parent if file.suffix == ".tar" else file for file in found}) > 1:
        raise ValueError(
            f"{root} has several sources of its {split} split: {', '.join(str(f.relative_to(root)) for f in found[:3])}"
            "; allowed is one folder of shards, or one table"
        )
    return found


def _in(folder: Path) -> list[Path]:
    """The shards, or else tables, of a folder, in the order of their names."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    return [path for path in files if path.suffix == ".tar"] or [path for path in files if path.suffix in TABLES]


def _table(root: Path, file: Path) -> Pairs:
    pairs = Pairs()
    folder = file.parent.relative_to(root)
    for number, (path, caption) in enumerate(rows(file), 1):
        if not path or "://" in path:
            pairs.faults.append((f"{file.relative_to(root)} row {number}", f"{path or 'nothing'} is no path of a file"))
            continue
        inner = posixpath.normpath((folder / path).as_posix())
        if leads_out(inner):
            pairs.faults.append((f"{file.relative_to(root)} row {number}", f"{path!a} leads out of the data set"))
            continue
        pairs.add(inner, caption)
    return pairs


def _shard(root: Path, archive: Path, cache: Path) -> Pairs:
    """The pairs of a shard; its texts are read once and remembered with the index."""
    name = referable(root, archive)
    found = remembered(cache, archive, f"pairs {LONGEST}", lambda: _indexed(archive))
    pairs = Pairs(cut=int(found["cut"]))
    places = zip(texts(found["names"]), found["offsets"].tolist(), found["sizes"].tolist(), strict=True)
    pairs.paths = [reference(name, offset, size, image) for image, offset, size in places]
    pairs.captions = texts(found["captions"])
    reasons = zip(texts(found["faulty"]), texts(found["reasons"]), strict=True)
    pairs.faults = [(f"{name}/{faulty}", reason) for faulty, reason in reasons]
    return pairs


def _indexed(archive: Path) -> Mapping[str, npt.NDArray[Any]]:
    """What `_shard` needs, as arrays."""
    grouped: dict[str, dict[str, Member]] = {}
    for found in members(archive):
        folder, slash, base = found.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if stem:
            grouped.setdefault(folder + slash + stem, {})[f".{suffix.lower()}"] = found
    pairs, images = Pairs(), {}
    for key, parts in grouped.items():
        image = next((parts[suffix] for suffix in parts if suffix in SUFFIXES), None)
        text = parts.get(".txt") or parts.get(".json")
        if image is not None and text is not None:
            images[image.name] = image
            pairs.add(image.name, _caption(archive, text))
        elif image is not None or ".txt" in parts:
            alone = image or parts[".txt"]
            pairs.faults.append((alone.name, "has no caption" if image else "has no image"))
        else:
            pairs.faults += [(part.name, f"is no part of a pair ({key})") for part in parts.values()]
    kept = [images[path] for path in pairs.paths]
    return {
        "names": packed_texts([image.name for image in kept]),
        "offsets": np.array([image.offset for image in kept], np.int64),
        "sizes": np.array([image.size for image in kept], np.int64),
        "captions": packed_texts(pairs.captions),
        "faulty": packed_texts([path for path, _ in pairs.faults]),
        "reasons": packed_texts([reason for _, reason in pairs.faults]),
        "cut": np.array(pairs.cut),
    }


def _caption(archive: Path, text: Member) -> bytes | str | None:
    """The bytes of a text member, or the caption of a JSON one."""
    with archive.open("rb") as file:
        file.seek(text.offset)
        content = file.read(min(text.size, _LARGEST_TEXT))
    if not text.name.lower().endswith(".json"):
        return content
    try:
        value = json.loads(content)
    except UnicodeDecodeError:
        return content  # whoever decodes it says so
    except (ValueError, RecursionError):
        return None
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption if isinstance(caption, str) else None
