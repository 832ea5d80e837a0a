"""Small fake data sets in the real layouts: directory names, index files and encodings as they are published.

Every function writes under a root and returns it. Images are 12 × 10 px and all different; a red value of
20 × class + 10 says the class.
"""

import csv
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

SYNSETS = ("n01440764", "n01443537", "n01484850")  # the first three of ILSVRC2012


class Painter:
    """Makes images that differ, so that none is taken for another one."""

    def __init__(self) -> None:
        self.made = 0

    def bytes(self, number: int, kind: str = "PNG") -> bytes:
        self.made += 1
        colour = (20 * (number % 12) + 10, self.made % 256, self.made // 256 % 256)
        buffer = io.BytesIO()
        Image.new("RGB", (12, 10), colour).save(buffer, kind, **({"quality": 100} if kind == "JPEG" else {}))
        return buffer.getvalue()

    def save(self, path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.bytes(number))  # PNG under any name: decoders look at the content


def class_of(pixel: np.ndarray[Any, Any]) -> int:
    """The class that an image's colour says."""
    return round((int(pixel[0]) - 10) / 20)


def fgvc_aircraft(root: Path, draw: Painter) -> Path:
    base, names = root / "fgvc-aircraft-2013b" / "data", ("707-320", "Boeing 717", "A300B4")
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("".join(f"{name}\n" for name in names))
    for s, split in enumerate(("train", "val", "test")):
        lines = []
        for c, name in enumerate(names):
            for i in range(4):
                image = f"{s}{c}{i:05}"
                draw.save(base / "images" / f"{image}.jpg", c)
                lines.append(f"{image} {name}\n")
        (base / f"images_variant_{split}.txt").write_text("".join(lines))
    return root


def stanford_cars(root: Path, draw: Painter) -> Path:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2007")
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)})
    for split, file in (
        ("train", base / "devkit" / "cars_train_annos.mat"),
        ("test", base / "cars_test_annos_withlabels.mat"),
    ):
        rows = [(f"{c * 10 + i + 1:05}.jpg", c + 1) for c in range(3) for i in range(6)]
        kind = [(corner, "O") for corner in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
        table = np.zeros((1, len(rows)), np.dtype([*kind, ("class", "O"), ("fname", "O")]))
        for i, (name, number) in enumerate(rows):
            table[0, i] = (1, 1, 5, 5, number, name)
            draw.save(base / f"cars_{split}" / name, number - 1)
        savemat(file, {"annotations": table})
    return root


def dtd(root: Path, draw: Painter) -> Path:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for s, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{name}_{s}{i:03}.jpg" for name in ("banded", "blotchy", "braided") for i in range(3)]
        for row, line in enumerate(lines):
            draw.save(base / "images" / line, row // 3)
        (base / "labels" / f"{split}1.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def flowers102(root: Path, draw: Painter) -> Path:
    """Three of the 102 classes: the numbers 1, 2 and 3."""
    base = root / "flowers-102"
    base.mkdir(parents=True)
    labels = np.array([1 + i // 9 for i in range(27)], np.uint8)
    for i, label in enumerate(labels, 1):
        draw.save(base / "jpg" / f"image_{i:05}.jpg", int(label) - 1)
    ids = np.arange(1, 28, dtype=np.uint16)
    savemat(base / "imagelabels.mat", {"labels": labels[None]})
    splits = {name: ids[(ids - 1) % 3 == k][None] for k, name in enumerate(("trnid", "valid", "tstid"))}
    savemat(base / "setid.mat", splits)
    return root


def food101(root: Path, draw: Painter) -> Path:
    base, names = root / "food-101", ("baby_back_ribs", "apple_pie", "beet_salad")  # in no order
    (base / "meta").mkdir(parents=True)
    for s, split in enumerate(("train", "test")):
        listed = {name: [f"{name}/{s}{i:04}" for i in range(6)] for name in names}
        for c, name in enumerate(sorted(names)):
            for path in listed[name]:
                draw.save(base / "images" / f"{path}.jpg", c)
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
    return root


def oxford_pets(root: Path, draw: Painter) -> Path:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for s, split in enumerate(("trainval", "test")):
        lines = []
        for c, (name, species) in enumerate((("Abyssinian", 1), ("american_bulldog", 2), ("Bombay", 1))):
            for i in range(6):
                draw.save(base / "images" / f"{name}_{s}{i}.jpg", c)
                lines.append(f"{name}_{s}{i} {c + 1} {species} 1\n")
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    return root


def sun397(root: Path, draw: Painter, partition: bool = True) -> Path:
    base = root / "SUN397"
    names = ("/a/abbey", "/a/apartment_building/outdoor", "/y/yard")
    base.mkdir(parents=True)
    (base / "ClassName.txt").write_text("".join(f"{name}\n" for name in names))
    lists: dict[str, list[str]] = {"Training_01.txt": [], "Testing_01.txt": []}
    for c, name in enumerate(names):
        for i in range(10):
            image = f"{name}/sun_{'abcdefghij'[i]}{c}.jpg"
            draw.save(base / image[1:], c)
            lists["Training_01.txt" if i < 6 else "Testing_01.txt"].append(image)
    for file, lines in lists.items() if partition else ():
        (base / file).write_text("".join(f"{line}\n" for line in lines))
    return root


def caltech101(root: Path, draw: Painter, names: Sequence[str], count: int = 33) -> Path:
    base = root / "caltech101" / "101_ObjectCategories"
    for c, name in enumerate(names):
        for i in range(count if c == 0 else 3):
            draw.save(base / name / f"image_{i + 1:04}.jpg", c)
    draw.save(base / "BACKGROUND_Google" / "image_0001.jpg", 0)
    return root


def cub200(root: Path, draw: Painter) -> Path:
    base = root / "CUB_200_2011"
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    files = [f"{name}/{name[4:]}_{i:04}.jpg" for name in names for i in range(8)]
    for row, file in enumerate(files):
        draw.save(base / "images" / file, row // 8)
    lists = {
        "images.txt": files,
        "classes.txt": names,
        "image_class_labels.txt": [row // 8 + 1 for row in range(24)],
        "train_test_split.txt": [int(row % 8 < 5) for row in range(24)],
    }
    for name, values in lists.items():
        (base / name).write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, 1)))
    return root


def places205(root: Path, draw: Painter) -> Path:
    lists = root / "trainvalsplit_places205"
    lists.mkdir(parents=True)
    for s, name in enumerate(("train", "val")):
        lines = []
        for c, folder in enumerate(("a/abbey", "a/apartment_building/outdoor", "v/volcano")):
            for i in range(6):
                image = f"{folder}/gsun_{s}{i:03}.jpg"
                draw.save(root / "data/vision/torralba/deeplearning/images256" / image, c)
                lines.append(f"{image} {c}\n")
        (lists / f"{name}_places205.csv").write_text("".join(lines))
    return root


def _batch(draw: Painter, classes: Sequence[int], key: str) -> dict[str, Any]:
    colours = []
    for number in classes:
        draw.made += 1
        colours.append((20 * number + 10, draw.made % 256, 7))
    planes = np.array(colours, np.uint8)[:, :, None].repeat(1024, axis=2)
    return {"data": planes.reshape(-1, 3072), key: list(classes)}


def cifar10(root: Path, draw: Painter) -> Path:
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (base / name).write_bytes(pickle.dumps(_batch(draw, [*range(10)] * 2, "labels"), protocol=2))
    return root


def cifar100(root: Path, draw: Painter) -> Path:
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    meta = {"fine_label_names": ["apple", "aquarium_fish", "baby"], "coarse_label_names": ["fish", "fruit"]}
    (base / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    for name in ("train", "test"):
        batch = _batch(draw, [0, 1, 2] * 5, "fine_labels") | {"coarse_labels": [0] * 15}
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """An archive of files, written where a path is given, and its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def synset_images(draw: Painter, synset: str, number: int, count: int) -> list[tuple[str, bytes]]:
    return [(f"{synset}_{i}.JPEG", draw.bytes(number)) for i in range(count)]


def devkit(classes: Sequence[int]) -> list[tuple[str, bytes]]:
    """The files of the development kit: numbers of synsets are not those of classes, and one has children."""
    numbers = {0: 3, 1: 1, 2: 2}  # ILSVRC2012_ID by class
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    table = np.zeros((4, 1), np.dtype(kind))
    for number, synset in enumerate(SYNSETS):
        table[numbers[number] - 1, 0] = (numbers[number], synset, "words", "gloss", 0)
    table[3, 0] = (1001, "n00001740", "entity", "that which is", 3)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    truth = "".join(f"{numbers[c]}\n" for c in classes).encode()
    base = "ILSVRC2012_devkit_t12/data"
    return [(f"{base}/meta.mat", meta.getvalue()), (f"{base}/ILSVRC2012_validation_ground_truth.txt", truth)]


def imagenet1k_folders(root: Path, draw: Painter, synsets: Sequence[str] = SYNSETS) -> Path:
    for c, synset in enumerate(synsets):
        for name, content in synset_images(draw, synset, c, 10):
            path = root / "train" / synset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for i in range(2):
            draw.save(root / "val" / synset / f"ILSVRC2012_val_{2 * c + i + 1:08}.JPEG", c)
    return root


def imagenet1k_archives(root: Path, draw: Painter) -> Path:
    inner = []
    for c, synset in enumerate(SYNSETS):
        content = tar(root / "inner.tar", synset_images(draw, synset, c, 10))
        inner.append((f"{synset}.tar", content))
    (root / "inner.tar").unlink()
    tar(root / "ILSVRC2012_img_train.tar", inner)
    classes = (2, 0, 1, 1, 0, 2)
    images = [(f"ILSVRC2012_val_{i:08}.JPEG", draw.bytes(c)) for i, c in enumerate(classes, 1)]
    tar(root / "ILSVRC2012_img_val.tar", reversed(images))
    tar(root / "ILSVRC2012_devkit_t12.tar.gz", devkit(classes), "w:gz")
    return root


def imagenet22k_archives(root: Path, draw: Painter) -> Path:
    for c, synset in enumerate(("n00004475", "n02084071", "n03931044")):  # the last one is not in fall11
        tar(root / f"{synset}.tar", synset_images(draw, synset, c, 10))
    return root


def shards(root: Path, draw: Painter, split: str = "train", count: int = 8) -> Path:
    """Two shards; the captions are the index, in text or in JSON."""
    for shard in range(2):
        files = []
        for i in range(count):
            index = shard * count + i
            files.append((f"{index:06}.jpg", draw.bytes(index)))
            caption = f"picture {index}"
            files.append((f"{index:06}.other.txt", b"another part of the same sample"))
            files.append(
                (f"{index:06}.txt", caption.encode())
                if i % 2
                else (f"{index:06}.json", json.dumps({"caption": caption, "url": "x"}).encode())
            )
        tar(root / split / f"{shard:05}.tar", files)
    return root


def table(root: Path, draw: Painter, name: str = "train.csv", columns: tuple[str, str] = ("filepath", "title")) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with (root / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writerow(("id", *columns))
        for i in range(12):
            draw.save(root / "images" / f"{i}.png", i)
            writer.writerow((i, f"images/{i}.png", f"picture {i}, with a comma"))
    return root


CLASSIFICATION: dict[str, Callable[[Path, Painter], Path]] = {
    "fgvc_aircraft": fgvc_aircraft,
    "stanford_cars": stanford_cars,
    "dtd": dtd,
    "flowers102": flowers102,
    "food101": food101,
    "oxford_pets": oxford_pets,
    "sun397": sun397,
    "cub200": cub200,
    "places205": places205,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet1k": imagenet1k_archives,
    "imagenet22k": imagenet22k_archives,
}
