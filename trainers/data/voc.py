"""PASCAL VOC in its own layout: the data sets `voc2007`, `voc2012` and, with masks, `voc20*_segmentation`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import numpy.typing as npt

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data.cache import Source
from trainers.data.labels import lines_of, read_class_numbers, unique
from trainers.data.listing import Description, Listing, root_of, source, stamps

CLASS_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
)
CLASSES = tuple(CLASS_NAMES.split())
SEGMENTATION_NAMES = ("background", *CLASSES)
VOID = 255  # of masks: borders of objects, and what is too difficult

# The published lists that are our splits. Annotations of VOC 2012's test set are secret, so its published validation
# set is the test split, and validation is held out of training.
LISTS = {
    "2007": {"train": "train", "validation": "val", "test": "test"},
    "2012": {"train": "train", "test": "val"},
}
# Object discovery is reported on the published trainval (valeoai/LOST:main_lost.py).
PROTOCOL = {"2007": ("train", "validation"), "2012": ("train", "validation", "test")}

_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # of an image in lists; no folder
_LARGEST_XML = 2**20  # bytes; published ones have at most 30,000


class Annotation(NamedTuple):
    """What an XML file says: boxes float32 [K, 5], which of them are difficult, and the image's width and height."""

    boxes: npt.NDArray[np.float32]
    difficult: npt.NDArray[np.bool_]
    size: tuple[int, int] | None


def detection(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of VOC's images with boxes, ROOT/VOCdevkit/VOCYEAR/{JPEGImages,Annotations,ImageSets/Main}.

    Boxes are of all objects, difficult and truncated ones too (valeoai/LOST:datasets.py, extract_gt_VOC), in px from 0:
    xmin − 1, ymin − 1, xmax, ymax. The class of an image is that of its largest object that is not difficult; where all
    are, of its largest. The literature reports mAP over several classes of an image instead.

    Raises:
        ValueError: files are missing or lists are damaged.
    """
    year = config.train[3:7]
    root, base = _base(config, execution, year)
    found, faults, sizes, files = {}, [], {}, [f"{base}ImageSets/Main/{name}.txt" for name in LISTS[year].values()]
    for split, name in LISTS[year].items():
        paths, classes, boxes = [], [], []
        for image in _listed(root / base / "ImageSets" / "Main" / f"{name}.txt"):
            path, xml = f"{base}JPEGImages/{image}.jpg", f"{base}Annotations/{image}.xml"
            files += [path, xml]
            try:
                annotation = read_annotation(root / xml)
                classes.append(_class_of(annotation))
            except ValueError as error:
                faults.append((path, f"its annotation {xml}: {error}"))
                continue
            paths.append(path)
            boxes.append(annotation.boxes)
            if annotation.size is not None:
                sizes[path] = annotation.size
        found[split] = Listing(tuple(paths), {"classes": np.array(classes, np.int64), "boxes": tuple(boxes)})
    _require_disjoint(found, year)
    facts = {"protocol_splits": PROTOCOL[year]}
    described = Description(CLASSES, facts=facts, faults=tuple(faults), sizes=sizes)
    return source(config, execution, root, found, described, stamps(root, tuple(files)), side)


def segmentation(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of VOC's images with masks, ROOT/VOCdevkit/VOCYEAR/{JPEGImages,SegmentationClass,ImageSets/…}.

    21 classes, the background first; void pixels (255) do not count. Only part of VOC's images have masks.

    Raises:
        ValueError: files are missing or lists are damaged.
    """
    year = config.train[3:7]
    root, base = _base(config, execution, year)
    found, files = {}, [f"{base}ImageSets/Segmentation/{name}.txt" for name in LISTS[year].values()]
    for split, name in LISTS[year].items():
        images = list(_listed(root / base / "ImageSets" / "Segmentation" / f"{name}.txt"))
        paths = tuple(f"{base}JPEGImages/{image}.jpg" for image in images)
        masks = tuple(f"{base}SegmentationClass/{image}.png" for image in images)
        files += [*paths, *masks]
        found[split] = Listing(paths, maps={"segmentation": masks})
    _require_disjoint(found, year)
    described = Description(
        read={"segmentation": partial(read_class_numbers, count=len(SEGMENTATION_NAMES), ignored=VOID)},
        facts={"segmentation_names": SEGMENTATION_NAMES},
    )
    return source(config, execution, root, found, described, stamps(root, tuple(files)), side)


def read_annotation(path: Path) -> Annotation:
    """What one of VOC's XML files says; x0 and y0 count from 0, x1 and y1 are exclusive.

    Raises:
        ValueError: it is missing, damaged or has what such a file has no use for.
    """
    try:
        if path.stat().st_size > _LARGEST_XML:
            raise ValueError(f"has more than {_LARGEST_XML:,} bytes")
        root = _parsed(path.read_bytes())
    except OSError as error:
        raise ValueError("is not a file" if isinstance(error, FileNotFoundError) else str(error.strerror)) from error
    except expat.ExpatError as error:
        raise ValueError(f"is no XML: {error}") from error
    # Parts of persons have names and boxes too: only children of the object itself count.
    objects = root.findall("object")
    boxes = [_box(item) for item in objects]
    difficult = [_text(item, "difficult", "0") != "0" for item in objects]
    width, height = (_number(root, f"size/{name}", "0") for name in ("width", "height"))
    size = (int(width), int(height)) if width > 0 and height > 0 else None
    return Annotation(np.array(boxes, np.float32).reshape(-1, 5), np.array(difficult, bool), size)


def _parsed(content: bytes) -> Element:
    """The root element. Declarations of types and entities are refused: the latter can grow without bound."""

    def refuse(*_: object) -> NoReturn:
        raise ValueError("declares a document type, which no annotation needs")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(content, True)
    return builder.close()


def _box(item: Element) -> tuple[float, ...]:
    name = _text(item, "name")
    if name not in CLASSES:
        raise ValueError(f"has an object of class {name!a}, which is none of VOC's")
    x0, y0, x1, y1 = (_number(item, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax"))
    return x0 - 1, y0 - 1, x1, y1, CLASSES.index(name)


def _text(item: Element, path: str, otherwise: str | None = None) -> str:
    found = item.findtext(path, otherwise)
    if found is None:
        raise ValueError(f"has no {item.tag}/{path}")
    return found.strip()


def _number(item: Element, path: str, otherwise: str | None = None) -> float:
    text = _text(item, path, otherwise)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"has {text[:50]!a} as {item.tag}/{path}, which is no number") from None


def _class_of(annotation: Annotation) -> int:
    """That of the largest object, of those that are not difficult where there are any."""
    boxes, plain = annotation.boxes, ~annotation.difficult
    if not len(boxes):
        raise ValueError("has no object, so the image has no class")
    extent = (boxes[:, 2:4] - boxes[:, :2]).clip(0)
    return int(boxes[np.where(plain | ~plain.any(), extent.prod(axis=1), -1).argmax(), 4])


def _base(config: DataConfig, execution: ExecutionConfig, year: str) -> tuple[Path, str]:
    """The root, and how paths in the folder of a year begin there."""
    root = root_of(config, execution)
    bases = [f"VOCdevkit/VOC{year}/", f"VOC{year}/", ""]
    for base in bases:
        if (root / base / "JPEGImages").is_dir() and (root / base / "ImageSets").is_dir():
            return root, base
    raise ValueError(
        f"{root} has no VOCdevkit/VOC{year} with JPEGImages and ImageSets; {catalog.DATASETS[config.train].how_to_get}"
    )


def _listed(path: Path) -> Iterator[str]:
    names = [line.split()[0] for line in lines_of(path)]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{path} names {name[:100]!a}, which is no image of VOC")
    return unique(names, str(path))


def _require_disjoint(found: dict[str, Listing], year: str) -> None:
    names: dict[str, str] = {}
    for split, listing in found.items():
        for path in listing.paths:
            if names.setdefault(path, split) != split:
                raise ValueError(f"VOC {year}: {path} is in the lists of {names[path]} and of {split}")
