"""The data set `coco20k`: images of COCO's train2014 that a list names, with their boxes, for object discovery."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data.archives import packed_texts, remembered, texts
from trainers.data.cache import Source
from trainers.data.labels import lines_of, unique
from trainers.data.listing import Description, Listing, root_of, source, stamps

LIST = "coco_20k_filenames.txt"  # 19,817 lines train2014/COCO_train2014_000000560992.jpg (valeoai/LOST:datasets)
ANNOTATIONS = "annotations/instances_train2014.json"
BASES = ("", "coco/", "COCO/")
IMAGES = ("train2014", "images/train2014")

_FILE = re.compile(r"COCO_train2014_(\d{12})\.jpg")
_LARGEST = float(np.finfo(np.float32).max)  # px that the index of boxes can hold


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of COCO 20k: ROOT/{train2014/,annotations/instances_train2014.json,coco_20k_filenames.txt}.

    Boxes are of all objects but crowds, their corners rounded to whole px (valeoai/LOST:datasets.py, extract_gt_COCO);
    their classes are COCO's categories in the order of their ids. Images that have none are left out; a note says
    how many. There is one list: validation and test are fixed fractions of it, and object discovery is reported on all.

    The annotations, 450 MB, are read once, in about 1 GB of memory; what is needed of them is kept in the cache.

    Raises:
        ValueError: files are missing or damaged.
    """
    root = root_of(config, execution)
    how = catalog.DATASETS[config.train].how_to_get
    base = next((base for base in BASES if (root / (base + ANNOTATIONS)).is_file()), None)
    if base is None:
        raise ValueError(f"{root} has no {ANNOTATIONS}; {how}")
    images = next((folder for folder in IMAGES if (root / base / folder).is_dir()), None)
    if images is None:
        raise ValueError(f"{root / base} has no folder {IMAGES[0]}; {how}")
    listed = next((at for at in (base + LIST, LIST) if (root / at).is_file()), None)
    if listed is None:
        raise ValueError(f"{root} has no {LIST}; {how}")
    return _source(config, execution, side, cache, root, root / (base + ANNOTATIONS), root / listed, base + images)


def _source(
    config: DataConfig,
    execution: ExecutionConfig,
    side: int,
    cache: Path,
    root: Path,
    annotations: Path,
    listed: Path,
    prefix: str,
) -> Source:
    ids = _ids(listed)
    chosen = hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()
    index = remembered(cache, annotations, f"coco boxes {chosen}", lambda: read_boxes(annotations, frozenset(ids)))
    boxes = dict(zip(index["ids"].tolist(), np.split(index["boxes"], index["ends"][:-1]), strict=True))
    sizes = dict(zip(index["ids"].tolist(), map(tuple, index["sizes"].tolist()), strict=True))
    paths = {number: f"{prefix}/COCO_train2014_{number:012}.jpg" for number in ids}
    unknown = [number for number in ids if number not in boxes]
    faults = tuple((paths[number], f"{annotations.name} does not know it: missing annotation") for number in unknown)
    kept = [number for number in ids if len(boxes.get(number, ()))]
    empty = len(ids) - len(unknown) - len(kept)
    notes = (f"{empty:,} of {len(ids):,} images have no object that is no crowd, and are left out",) if empty else ()
    listing = Listing(tuple(paths[number] for number in kept), {"boxes": tuple(boxes[number] for number in kept)})
    described = Description(
        tuple(texts(index["names"])),
        facts={"protocol_splits": ("train", "validation", "test"), "notes": notes},
        faults=faults,
        sizes={paths[number]: sizes[number] for number in kept if min(sizes[number]) > 0},
    )
    files = (str(annotations.relative_to(root)), str(listed.relative_to(root)), *listing.paths)
    return source(config, execution, root, {"train": listing}, described, stamps(root, files), side)


def _ids(path: Path) -> list[int]:
    """Numbers of the images that the list names, in its order."""
    numbers = []
    for name in unique((line.rpartition("/")[2] for line in lines_of(path)), str(path)):
        found = _FILE.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{path} names {name[:100]!a}; needed: names like train2014/COCO_train2014_000000560992.jpg"
            )
        numbers.append(int(found[1]))
    return numbers


def read_boxes(path: Path, chosen: frozenset[int]) -> dict[str, npt.NDArray[Any]]:
    """What COCO's annotations say of chosen images.

    Returns:
        "ids" int64 [n], ascending; "sizes" int64 [n, 2], width and height in px, 0 where they are not said; "boxes"
        float32 [M, 5] as trainers.data.listing.Listing has them, those of image i before "ends" int64 [n]; "names" of
        the categories, packed.

    Raises:
        ValueError: it is no JSON, or not COCO's.
    """
    content = _loaded(path, chosen)
    try:
        categories = {int(item["id"]): str(item["name"]) for item in content["categories"]}
        images = {item["id"]: item for item in content["images"] if item is not None}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no images and categories of COCO: {error!r}") from error
    order = {number: place for place, number in enumerate(sorted(categories))}
    boxes: dict[int, list[tuple[float, ...]]] = {number: [] for number in sorted(images)}
    for item in content.get("annotations", ()):
        if item is None or item.get("iscrowd"):
            continue
        if item["image_id"] in boxes:
            boxes[item["image_id"]].append(_box(item, order, path))
    return {
        "ids": np.array(list(boxes), np.int64),
        "sizes": np.array([_size(images[number]) for number in boxes], np.int64).reshape(-1, 2),
        "boxes": np.array([box for several in boxes.values() for box in several], np.float32).reshape(-1, 5),
        "ends": np.cumsum([len(several) for several in boxes.values()], dtype=np.int64),
        "names": packed_texts([categories[number].replace("\0", " ") for number in order]),
    }


def _loaded(path: Path, chosen: frozenset[int]) -> Mapping[str, Any]:
    """The content without outlines and without what belongs to other images, which is dropped as soon as it is read."""

    def needed(item: dict[str, Any]) -> dict[str, Any] | None:
        if "image_id" in item:
            return None if item["image_id"] not in chosen else {k: v for k, v in item.items() if k != "segmentation"}
        if "file_name" in item:
            return item if item.get("id") in chosen else None
        return None if "counts" in item else item  # outlines of crowds

    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=needed)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of COCO: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON of COCO: {type(content).__name__} instead of an object")
    return content


def _box(item: Mapping[str, Any], order: Mapping[int, int], path: Path) -> tuple[float, ...]:
    """x0, y0, x1, y1, NaN where they are not finite, and class, NaN where it is not listed.

    Corners are rounded as Python does, halves to even. What is NaN is dropped and remarked on when its image is decoded
    (trainers.data.labels.boxes_within): the image's other boxes stay.
    """
    box, category = item.get("bbox"), item.get("category_id")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        raise ValueError(f"{path}: annotation {item.get('id')} has {str(box)[:100]} as bbox; needed: four numbers")
    if not isinstance(category, int):
        raise ValueError(f"{path}: annotation {item.get('id')} has {category!a} as category_id; needed: a number")
    return (*_corners(box), order.get(category, math.nan))


def _corners(box: Sequence[float]) -> tuple[float, ...]:
    """Corners of x, y, width and height; all are NaN where one is beyond what the index holds."""
    try:
        x, y, width, height = map(float, box)
    except OverflowError:  # an integer of hundreds of digits
        return (math.nan,) * 4
    corners = (x, y, x + width, y + height)
    if not all(abs(value) <= _LARGEST for value in corners):
        return (math.nan,) * 4
    return tuple(float(round(value)) for value in corners)


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)
