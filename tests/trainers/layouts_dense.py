"""Small fake data sets with masks, depth and boxes in the real layouts: folders, lists and encodings are theirs.

Each image is a bright rectangle, the object, on a dark ground; `object_box` says where. So a probe can learn something.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainers.data.voc import CLASSES

WIDTH, HEIGHT = 48, 36  # px; an object lies within the centre square, x from 6 to 42
Box = tuple[int, int, int, int]


def object_box(number: int) -> Box:
    """x0, y0, x1, y1 in px (x1 and y1 exclusive) of the object of image `number`."""
    draw = np.random.default_rng(number)
    width, height = (int(length) for length in draw.integers(10, 18, 2))
    x0, y0 = int(draw.integers(8, 40 - width)), int(draw.integers(2, HEIGHT - 2 - height))
    return x0, y0, x0 + width, y0 + height


def pixels(number: int, box: Box) -> npt.NDArray[np.uint8]:
    """The picture uint8 [HEIGHT, WIDTH, 3]: noise around 40, around 200 in the object."""
    noise = np.random.default_rng(1_000 + number).integers(-20, 21, (HEIGHT, WIDTH, 3))
    x0, y0, x1, y1 = box
    noise[y0:y1, x0:x1] += 160
    return (noise + 40).astype(np.uint8)


def save(path: Path, image: npt.NDArray[np.generic] | Image.Image, **options: object) -> None:
    """Writes a picture, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}), **options)


def palette(numbers: npt.NDArray[np.uint8]) -> Image.Image:
    """A palette image as VOC's masks are: colours that have nothing to do with the class numbers."""
    image = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    image.putpalette([(37 * i + channel * 91) % 256 for i in range(256) for channel in range(3)])
    return image


def voc_xml(box: Box, name: str, difficult: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT), more: str = "") -> str:
    """An annotation as VOC has them: corners from 1, both inclusive."""
    x0, y0, x1, y1 = box
    return (
        f"<annotation><folder>VOC</folder><filename>x.jpg</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{more}<object><name>{name}</name><truncated>0</truncated>"
        f"<difficult>{difficult}</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object></annotation>"
    )


def voc(root: Path, year: str, counts: dict[str, int]) -> Path:
    """VOCdevkit/VOCYEAR with `counts` images in each of the published lists (train, val, test); all have masks.

    Image i is of class i % 20; the object is surrounded by a border of void pixels in its mask.
    """
    base = root / "VOCdevkit" / f"VOC{year}"
    number = 0
    for name, count in counts.items():
        ids = [f"{year}_{number + i:06}" for i in range(count)]
        for kind in ("Main", "Segmentation"):
            path = base / "ImageSets" / kind / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{image}\n" for image in ids))
        for i, image in enumerate(ids, number):
            box, c = object_box(i), i % len(CLASSES)
            save(base / "JPEGImages" / f"{image}.jpg", pixels(i, box))
            (base / "Annotations").mkdir(exist_ok=True)
            (base / "Annotations" / f"{image}.xml").write_text(voc_xml(box, CLASSES[c]))
            x0, y0, x1, y1 = box
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = 255
            mask[y0:y1, x0:x1] = c + 1
            save(base / "SegmentationClass" / f"{image}.png", palette(mask))
        number += count
    return root


def ade20k(root: Path, train: int, validation: int) -> Path:
    """ADEChallengeData2016: grounds are class 1 ("wall"), objects 2 + i % 149, the first row is 0 (other)."""
    base = root / "ADEChallengeData2016"
    names = "".join(f"{i}\t0.1\t10\t2\tname {i}, also {i} \n" for i in range(1, 151))
    base.mkdir(parents=True)
    (base / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)
    for split, short, count, start in (("training", "train", train, 0), ("validation", "val", validation, train)):
        for i in range(count):
            box = object_box(start + i)
            x0, y0, x1, y1 = box
            mask = np.ones((HEIGHT, WIDTH), np.uint8)
            mask[y0:y1, x0:x1] = 2 + i % 149
            mask[0] = 0
            name = f"ADE_{short}_{i + 1:08}"
            save(base / "images" / split / f"{name}.jpg", pixels(start + i, box))
            save(base / "annotations" / split / f"{name}.png", mask)
    return root


def depth_of(number: int) -> npt.NDArray[np.uint16]:
    """Millimetres uint16 [HEIGHT, WIDTH]: 4 m, objects 1.5 m + 1 mm · number, not known in the first two columns."""
    x0, y0, x1, y1 = object_box(number)
    depth = np.full((HEIGHT, WIDTH), 4_000, np.uint16)
    depth[y0:y1, x0:x1] = 1_500 + number
    depth[:, :2] = 0
    return depth


def nyu_depth(root: Path, scenes: int, frames: int, test: int) -> Path:
    """Lists and images as cleinc/bts prepares them: sync/SCENE/ and official_splits/test/SCENE/."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    places = [("train", "sync", f"scene_{i // frames:04}", i) for i in range(scenes * frames)]
    places += [("test", "official_splits/test", "office", scenes * frames + i) for i in range(test)]
    for split, folder, scene, i in places:
        save(root / folder / scene / f"rgb_{i:05}.jpg", pixels(i, object_box(i)))
        save(root / folder / scene / f"sync_depth_{i:05}.png", depth_of(i))
        slash = "/" if split == "train" else ""  # the published lists differ in this
        lines[split].append(f"{slash}{scene}/rgb_{i:05}.jpg {slash}{scene}/sync_depth_{i:05}.png 518.8579\n")
    for split, listed in lines.items():
        (root / f"nyudepthv2_{split}_files_with_gt.txt").write_text("".join(listed))
    return root


def nyu_labelled(root: Path, count: int, test: list[int]) -> Path:
    """The .mat files as MATLAB writes them: axes in reverse, names of scenes as references to arrays of characters."""
    import h5py
    from scipy.io import savemat

    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        images = np.stack([pixels(i, object_box(i)) for i in range(count)])
        file["images"] = images.transpose(0, 3, 2, 1)
        raw = np.stack([depth_of(i) for i in range(count)]).astype(np.float32) / 1000
        raw[:, 5, 10:13] = [np.nan, np.inf, -1]
        file["rawDepths"] = raw.transpose(0, 2, 1)
        file["depths"] = np.full(raw.transpose(0, 2, 1).shape, 9, np.float32)  # in-painted: not read
        names = [f"scene_{i // 3:04}" for i in range(count)]
        for i, name in enumerate(names):
            file[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in name], np.uint16)
        file["scenes"] = np.array([[file[f"#refs#/{i}"].ref for i in range(count)]], h5py.ref_dtype)
    train = [i for i in range(count) if i not in test]
    splits = {"trainNdxs": train, "testNdxs": test}
    savemat(root / "splits.mat", {name: np.array(numbers)[:, None] + 1 for name, numbers in splits.items()})
    return root


def coco20k(root: Path, count: int, extra: Sequence[dict[str, object]] = ()) -> Path:
    """train2014/, annotations/ and the list: object i of category 18 or 44, besides a crowd; images are 100 + i."""
    (root / "annotations").mkdir(parents=True)
    images, annotations, listed = [], list(extra), []
    for i in range(count):
        x0, y0, x1, y1 = object_box(i)
        name = f"COCO_train2014_{100 + i:012}.jpg"
        save(root / "train2014" / name, pixels(i, (x0, y0, x1, y1)))
        images.append({"id": 100 + i, "file_name": name, "width": WIDTH, "height": HEIGHT})
        common = {"image_id": 100 + i, "area": 1.0}
        polygon = [[x0, y0, x1, y0, x1, y1]]
        box = [x0 + 0.3, y0 - 0.3, x1 - x0 - 0.5, y1 - y0 + 0.2]
        annotations += [
            {"id": 2 * i, "category_id": (18, 44)[i % 2], "bbox": box, "iscrowd": 0, "segmentation": polygon, **common},
            {
                "id": 2 * i + 1,
                "category_id": 1,
                "bbox": [0, 0, WIDTH, HEIGHT],
                "iscrowd": 1,
                "segmentation": {"counts": [0, 9], "size": [HEIGHT, WIDTH]},
                **common,
            },
        ]
        listed.append(f"train2014/{name}\n")
    images.append({"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 9, "height": 9})  # not listed
    annotations.append({"id": -1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0})
    categories = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories, "info": {"year": 2014}}
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    (root / "coco_20k_filenames.txt").write_text("".join(listed))
    return root
