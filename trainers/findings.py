"""What measurements and probes find of a backbone, and which files it goes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Metric(NamedTuple):
    """A number of the trial at this step, reported and tracked under its name, such as `tokens/location/share`."""

    name: str
    value: float


class Statistic(NamedTuple):
    """A row of token_statistics.parquet: a number of a layer, head or kind of token, where these make sense."""

    name: str
    value: float
    layer: int | None = None  # 0 enters the first block, l is the output of block l; of attention the block, 1 … L
    head: int | None = None
    token: str | None = None  # "cls", "register_0" …, "patch"


class PerImage(NamedTuple):
    """A number of each of the first validation images; kept at the end of a trial, in per_image.parquet."""

    name: str
    values: NDArray[np.floating]


class Score(NamedTuple):
    """A probe's metric of a split, and what it is of each image, [n], NaN where an image has none; or None.

    Of the test set the end of a trial keeps the latter in per_image.parquet.
    """

    name: str
    value: float
    per_image: NDArray[np.floating] | None = None


class Arrays(NamedTuple):
    """Arrays that the end of a trial leaves as NAME.npz; no objects."""

    name: str
    arrays: Mapping[str, NDArray[Any]]


class Picture(NamedTuple):
    """A picture that the end of a trial leaves as attention/NAME.png."""

    name: str
    png: bytes
