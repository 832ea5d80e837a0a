"""Object discovery by LOST on a frozen backbone: CorLoc, its whole curve over biases, and pictures of the stages.

CorLoc is the share of images whose one predicted box overlaps some true box by half or more (paper.md §1, Table 3).
Shapes: n images, K biases, N patches on a grid of h × w, D width, J true boxes, S side of square images in px.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from trainers import catalog
from trainers.augment import standardise
from trainers.config import ObjectDiscoveryConfig
from trainers.data import DataSet
from trainers.findings import Arrays, Picture, Score
from trainers.probes import Context, lost, lost_pictures
from trainers.probes.features import evaluating, taps
from trainers.probes.lost_pictures import Example, Stages
from trainers.probes.seen import SeenSplit

NAME = "object_discovery"
OVERLAP = 0.5  # of the predicted box with a true one, from which on the object counts as found

_OF_VALUES = ("deit3", "openclip")  # methods whose values the paper takes; of DINOv2, and DINO in LOST, it is keys
_KINDS = ("queries", "keys", "values")
_CHUNK_VALUES = 2**24  # products of patches of the images that are looked at together
_MOST_TOGETHER = 256  # of them


class ObjectDiscovery:
    """The probe `object_discovery`: see trainers.probes.Probe. Nothing is trained; the bias is chosen.

    Features are those of the patches in the last block, heads side by side; class token and registers never enter.
    `features: auto` takes the values for deit3 and openclip, and the keys for all others, released weights included:
    what `method: pretrained` was trained by is not known here.

    The bias is the one of highest CorLoc on the first data set's validation images, of several the one nearest to 0.
    With `protocol_splits` it is chosen and reported on the images that the literature reports, such as VOC 2007's
    trainval, as nothing else can have been done for the paper; then the value on the first data set is the best of a
    curve.
    """

    transfers = True
    learns = False

    def __init__(self, settings: ObjectDiscoveryConfig, context: Context) -> None:
        self._settings = settings
        chosen = settings.features
        self.kind = chosen if chosen != "auto" else "values" if context.name in _OF_VALUES else "keys"
        self.reads = frozenset[str]() if settings.whole else frozenset({self.kind})

    def fit(self, train: SeenSplit, validation: SeenSplit) -> Discovery:
        """Choose the bias.

        Raises:
            ValueError: no image has a box.
        """
        splits = validation.data.protocol_splits if self._settings.protocol_splits else (validation.split,)
        curve = _curve(validation, splits, self.kind, self._settings)
        if not curve.counted:
            raise ValueError(f"{validation.data.name} has no boxes in {' and '.join(splits)} to choose a bias on")
        return Discovery(self._settings, self.kind, curve.best, curve, validation.backbone, validation.data)


@dataclass(frozen=True)
class Curve:
    """What was found in n images under each of K biases.

    Attributes:
        splits: of which images these are.
        biases: K.
        found_Kn: 1 where the box overlaps a true one enough, else 0; NaN for images without any true box.
        whole_n: the same of a box around the whole image.
    """

    splits: tuple[str, ...]
    biases: tuple[float, ...]
    found_Kn: NDArray[np.float64]
    whole_n: NDArray[np.float64]

    @property
    def counted(self) -> int:
        """How many images have a box."""
        return int(np.isfinite(self.whole_n).sum())

    @property
    def corloc_K(self) -> NDArray[np.float64]:
        """CorLoc under each bias."""
        means: NDArray[np.float64] = np.nanmean(self.found_Kn, axis=1)
        return means

    @property
    def best(self) -> float:
        """The bias of highest CorLoc; of several the one nearest to 0."""
        ranked = zip(self.corloc_K.tolist(), self.biases, strict=True)
        return min(ranked, key=lambda pair: (-pair[0], abs(pair[1]), pair[1]))[1]


@dataclass(frozen=True)
class Discovery:
    """A chosen bias, and the curve on which it was chosen."""

    settings: ObjectDiscoveryConfig
    kind: str
    bias: float
    chosen_on: Curve
    backbone: nn.Module
    data: DataSet

    def score(self, seen: SeenSplit) -> Iterator[Score | Arrays | Picture]:
        """Metrics, and of test images the curves as arrays and pictures of the stages.

        object_discovery/corloc                 at the chosen bias
        object_discovery/bias                   the chosen one
        object_discovery/bias_B/corloc          at each bias B
        object_discovery/whole_image/corloc     of a box around the whole image: what knowing nothing gives
        object_discovery/images_without_boxes   how many are left out
        Where no image has a box there is only the last.

        Raises:
            FloatingPointError: no patch of an image has features that are numbers.
        """
        at_test = seen.split == "test"
        splits = seen.data.protocol_splits if at_test and self.settings.protocol_splits else (seen.split,)
        curve = self._known(seen, splits) or _curve(seen, splits, self.kind, self.settings)
        if curve.counted:
            rows = curve.found_Kn[curve.biases.index(self.bias)]
            own = splits == (seen.split,)
            yield Score(f"{NAME}/corloc", float(np.nanmean(rows)), _filled(rows, len(seen)) if own else None)
            yield Score(f"{NAME}/bias", self.bias)
            for bias, value in zip(curve.biases, curve.corloc_K.tolist(), strict=True):
                yield Score(f"{NAME}/bias_{bias + 0.0}/corloc", value)  # + 0.0: there is one zero
            yield Score(f"{NAME}/whole_image/corloc", float(np.nanmean(curve.whole_n)))
        yield Score(f"{NAME}/images_without_boxes", float(len(curve.whole_n) - curve.counted))
        if at_test and curve.counted:
            yield Arrays(NAME, self._arrays(curve))
        if at_test and self.settings.pictures:
            yield self._picture(seen, splits)

    def _known(self, seen: SeenSplit, splits: tuple[str, ...]) -> Curve | None:
        """The curve of these images, where the bias was chosen on them."""
        same = seen.backbone is self.backbone and seen.data is self.data and splits == self.chosen_on.splits
        return self.chosen_on if same else None

    def _arrays(self, curve: Curve) -> dict[str, NDArray[np.generic]]:
        """The curve on which the bias was chosen and that of these images, [K], and what they are of."""
        return {
            "biases": np.array(curve.biases),
            "corloc": curve.corloc_K,
            "chosen_on_corloc": self.chosen_on.corloc_K,
            "chosen_bias": np.array(self.bias),
            "images": np.array(curve.counted),
            "splits": np.array(curve.splits),
            "features": np.array(self.kind),
            "normalized": np.array(self.settings.normalize),
        }

    def _picture(self, seen: SeenSplit, splits: tuple[str, ...]) -> Picture:
        part = seen if splits[0] == seen.split else seen.sibling(splits[0])
        examples = []
        with torch.no_grad(), evaluating(seen.backbone):
            for position in range(min(len(part), self.settings.pictures)):
                looked = _look(part, position, self.settings.whole)
                read = taps(seen.backbone, looked.input, _KINDS)
                of_kinds = {kind: self._stages(read[kind], looked) for kind in _KINDS}
                examples.append(Example(looked.padded, looked.truth, of_kinds))
        length = "of length 1" if self.settings.normalize else "as they are"
        title = f"Object discovery by LOST: features {length}, bias {self.bias:g}; metrics are of {self.kind}"
        return Picture(NAME, lost_pictures.draw(title, examples))

    def _stages(self, features_1ND: Tensor, looked: _Looked) -> Stages:
        features, there = lost.prepare(features_1ND, normalize=self.settings.normalize)
        (found,) = lost.discover(features, there, (self.bias,), looked.grid, self.settings.patches)
        patch = looked.input.shape[-1] / looked.grid[1]
        box = lost.boxes(found.cells_B4.numpy(), (patch, patch), looked.truth_size)[0]
        return lost_pictures.stages(features[0], found, self.bias, looked.grid, box)


def _filled(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Values of the first images, NaN for the rest."""
    return np.concatenate([values, np.full(count - len(values), np.nan)])


def _curve(seen: SeenSplit, splits: Sequence[str], kind: str, settings: ObjectDiscoveryConfig) -> Curve:
    """Of the images of some splits of a data set together, at most `images` of each."""
    found, whole = [], []
    for split in splits:
        part = seen if split == seen.split else replace(seen.sibling(split), reads=frozenset({kind}))
        parts = list(_of_whole(part, kind, settings) if settings.whole else _of_squares(part, kind, settings))
        found += [found_Kb for found_Kb, _ in parts]
        whole += [whole_b for _, whole_b in parts]
    return Curve(tuple(splits), settings.biases, np.concatenate(found, axis=1), np.concatenate(whole))


Judged = tuple[NDArray[np.float64], NDArray[np.float64]]  # found_Kn and whole_n of some images


def _of_squares(seen: SeenSplit, kind: str, settings: ObjectDiscoveryConfig) -> Iterator[Judged]:
    """Of the squares that other probes see too, whose features are extracted once."""
    count = min(len(seen), settings.images)
    if settings.images < len(seen) and seen.reads == {kind}:  # nobody else reads the rest
        seen = replace(seen, indices=seen.indices[:count])
    features_nND, grid = seen.features[kind], seen.grid
    truth_nJ4, size = _truth(seen, slice(count)), (float(seen.image_size),) * 2
    chunk = max(1, min(_MOST_TOGETHER, _CHUNK_VALUES // features_nND.shape[1] ** 2))
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        features_BND = features_nND[part].to(seen.device)
        yield _judge(features_BND, truth_nJ4[part], grid, seen.model.patch_size, size, settings)


def _of_whole(seen: SeenSplit, kind: str, settings: ObjectDiscoveryConfig) -> Iterator[Judged]:
    """Of images at their own size, one at a time."""
    with torch.no_grad(), evaluating(seen.backbone):
        for position in range(min(len(seen), settings.images)):
            looked = _look(seen, position, whole=True)
            features_1ND = taps(seen.backbone, looked.input, {kind})[kind]
            yield _judge(
                features_1ND, looked.truth[None], looked.grid, seen.model.patch_size, looked.truth_size, settings
            )


def _judge(
    features_BND: Tensor,
    truth_BJ4: NDArray[np.floating],
    grid: tuple[int, int],
    patch_size: int,
    size: tuple[float, float],
    settings: ObjectDiscoveryConfig,
) -> Judged:
    """What LOST finds in images of one size, under each bias, and what a box around everything finds."""
    features, there = lost.prepare(features_BND, normalize=settings.normalize)
    found = lost.discover(features, there, settings.biases, grid, settings.patches)
    predicted = [lost.boxes(of.cells_B4.numpy(), (patch_size, patch_size), size) for of in found]
    predicted.append(np.tile([0.0, 0.0, size[1], size[0]], (len(features), 1)))
    overlaps = np.stack([lost.overlap(boxes_B4, truth_BJ4) for boxes_B4 in predicted])
    right = np.where(np.isnan(overlaps), np.nan, overlaps >= OVERLAP)
    return right[:-1], right[-1]


@dataclass(frozen=True)
class _Looked:
    """An image as the backbone takes it: float32 [1, 3, padded H, padded W], its pixels, and boxes [J, 4] in px."""

    input: Tensor
    pixels: NDArray[np.uint8]
    truth: NDArray[np.floating]
    grid: tuple[int, int]

    @property
    def padded(self) -> NDArray[np.uint8]:
        """The pixels with the padding of the input, white, so that maps of patches lie over them."""
        missing = [(0, max(0, size - own)) for size, own in zip(self.input.shape[2:], self.pixels.shape, strict=False)]
        return np.pad(self.pixels, [*missing, (0, 0)], constant_values=255)

    @property
    def truth_size(self) -> tuple[float, float]:
        """Height and width of the image without its padding."""
        return float(self.pixels.shape[0]), float(self.pixels.shape[1])


def _look(seen: SeenSplit, position: int, whole: bool) -> _Looked:
    """Image `position`: the square, or the whole image, zero-padded below and on the right to whole patches.

    Padding is added to the normalised image, as in valeoai/LOST:main_lost.py.
    """
    index, patch = int(seen.indices[position]), seen.model.patch_size
    if not whole:
        at = np.array([position])
        pixels = _back(seen.view(at), seen.model.normalization)
        truth_J4 = _truth(seen, slice(position, position + 1))[0]
        return _Looked(seen.view(at), pixels, truth_J4[~np.isnan(truth_J4).any(axis=1)], seen.grid)
    image = seen.part.whole(index)
    planes = torch.from_numpy(np.array(image.pixels)).to(seen.device).permute(2, 0, 1)[None].float()
    height, width = planes.shape[2:]
    padded = functional.pad(
        standardise(planes, normalization=seen.model.normalization), (0, -width % patch, 0, -height % patch)
    )
    grid = (padded.shape[2] // patch, padded.shape[3] // patch)
    return _Looked(padded, np.asarray(image.pixels), np.asarray(image.targets["boxes"])[:, :4], grid)


def _truth(seen: SeenSplit, positions: slice) -> NDArray[np.float64]:
    """True boxes of some square images as the backbone sees them, [n, J, 4] in px of S; rows of NaN hold none."""
    indices = seen.indices[positions]
    boxes_nJ5 = np.asarray(seen.part.targets["boxes"][indices], np.float64)
    scaled: NDArray[np.float64] = boxes_nJ5[..., :4] * (seen.image_size / seen.part.images.shape[1])
    return scaled


def _back(view_13SS: Tensor, normalization: str) -> NDArray[np.uint8]:
    """The pixels of one normalised image, uint8 [S, S, 3]."""
    mean, std = (view_13SS.new_tensor(values)[:, None, None] for values in catalog.NORMALIZATIONS[normalization])
    levels = ((view_13SS[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()
