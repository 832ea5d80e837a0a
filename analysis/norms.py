"""Which rows of token_norms say how a trial ended: probe images, evaluated weights, scored step, last layer; pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.collect import Frames
from analysis.histograms import Histogram, read
from analysis.scoring import scoring_steps, until_scored

PATCH = "patch"
_WEIGHTS = ("teacher", "raw", "ema")  # the first of these that a trial has at its end is what its recipe evaluates
_SERIES = ("trial_id", "step", "median", "p90", "p99", "max", "outlier_fraction")


@dataclass(frozen=True)
class TokenNorms:
    """One kind of token in the last layer at the end of a trial; `otsu` is None where there are no two clear modes."""

    step: int
    layer: int
    histogram: Histogram
    otsu: float | None


class EvaluatedNorms:
    """The rows of `frames.token_norms` of probe images and evaluated weights, of finished trials."""

    def __init__(self, frames: Frames) -> None:
        runs = frames.runs
        finished = runs.filter(pc.equal(runs["status"], "finished"))["trial_id"]
        self._histograms = frames.token_norms["histogram"]  # by far the most of the table: only few are looked at
        norms = frames.token_norms.drop_columns(["histogram"])
        norms = norms.append_column("row", pa.array(np.arange(norms.num_rows)))
        norms = norms.filter(pc.and_(pc.equal(norms["source"], "probe"), pc.is_in(norms["trial_id"], finished)))
        norms = until_scored(norms, scoring_steps(frames.metrics))
        trials, steps = _codes(norms["trial_id"]), np.asarray(norms["step"], np.int64)
        rank = np.asarray(pc.index_in(norms["weights"], pa.array(_WEIGHTS)).fill_null(len(_WEIGHTS)), np.int64)
        at_end = steps == _reduced(np.maximum, trials, steps)[trials]
        best = _reduced(np.minimum, trials[at_end], rank[at_end])
        kept = rank == best[trials]
        self._norms = norms.filter(pa.array(kept))
        trials, at_end, layers = trials[kept], at_end[kept], np.asarray(self._norms["layer"], np.int64)
        self._at_end = pa.array(at_end)
        self._last_layer = pa.array(layers == _reduced(np.maximum, trials, layers)[trials])

    def last_layer(self, token: str | None = None) -> dict[str, dict[str, TokenNorms]]:
        """The last layer at the end, by trial and kind of token; tokens whose norms are all missing are left out.

        With `token`, of that kind of token only.
        """
        rows = self._norms.filter(pc.and_(self._at_end, self._last_layer))
        if token is not None:
            rows = rows.filter(pc.equal(rows["token"], token))
        looked_at = np.zeros(len(self._histograms), np.bool_)
        looked_at[np.asarray(rows["row"], np.int64)] = True
        histograms = read(self._histograms.filter(pa.array(looked_at)), rows["max"].to_pylist())
        found: dict[str, dict[str, TokenNorms]] = {}
        columns = (rows[name].to_pylist() for name in ("trial_id", "token", "step", "layer", "otsu_threshold"))
        for trial_id, token, step, layer, otsu, histogram in zip(*columns, histograms, strict=True):
            if histogram is not None:
                found.setdefault(trial_id, {})[token] = TokenNorms(step, layer, histogram, otsu)
        return found

    def layers(self, trials: Collection[str]) -> dict[str, list[dict[str, Any]]]:
        """Rows of all layers and kinds of token at the end, without histograms, by trial."""
        rows = self._norms.drop_columns(["row"]).filter(self._at_end)
        return _by_trial(rows.filter(pc.is_in(rows["trial_id"], pa.array(trials, pa.string()))))

    def steps(self, trials: Collection[str]) -> dict[str, list[dict[str, Any]]]:
        """Quantiles of the last layer's patches at every evaluated step, by trial."""
        rows = self._norms.select([*_SERIES, "token"]).filter(self._last_layer)
        mine = pc.and_(pc.equal(rows["token"], PATCH), pc.is_in(rows["trial_id"], pa.array(trials, pa.string())))
        return _by_trial(rows.filter(mine))


def patches(norms: Mapping[str, Mapping[str, TokenNorms]]) -> dict[str, TokenNorms]:
    """The patches of each trial that has any."""
    return {trial_id: tokens[PATCH] for trial_id, tokens in norms.items() if PATCH in tokens}


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.combine_chunks().dictionary_encode().indices, np.int64)


def _reduced(ufunc: np.ufunc, groups: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """`ufunc` over the values of each group, [groups]."""
    start = np.iinfo(np.int64).min if ufunc is np.maximum else np.iinfo(np.int64).max
    found = np.full(int(groups.max(initial=-1)) + 1, start)
    ufunc.at(found, groups, values)
    return found


def _by_trial(rows: pa.Table) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["trial_id"], []).append(row)
    return found
