"""Fixed, stratified splits for data sets that come without a validation or test set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def uniforms(seed: int, stream: int, start: int, stop: int, draws: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), [stop - start, draws], where row i depends only on (seed, stream, start + i).

    Counter-based: Philox's raw stream, which numpy guarantees not to change, one run of counters for each row.
    """
    counters = -(-draws // 4)  # a counter gives four numbers
    philox = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=start * counters)
    raw = philox.random_raw((stop - start) * counters * 4).reshape(stop - start, -1)
    numbers: npt.NDArray[np.float64] = (raw[:, :draws] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def held_out(classes: npt.NDArray[np.int64], fraction: float, seed: int, stream: int) -> npt.NDArray[np.bool_]:
    """Which images (bool [n]) a random split holds out: `fraction` of all, and of each class to within one image."""
    order = np.lexsort((uniforms(seed, stream, 0, len(classes), 1)[:, 0], classes))
    position = np.arange(len(classes) + 1)
    taken = np.diff(np.floor(position * fraction + 0.5)) > 0  # every 1/fraction-th along the classes
    held = np.zeros(len(classes), bool)
    held[order[taken]] = True
    return held
