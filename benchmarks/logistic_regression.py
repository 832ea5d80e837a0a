"""Logistic regression over all C of DINOv2's protocol, against scikit-learn; whether both find the same, too."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.turns import Side
from trainers.probes import logistic_regression
from trainers.probes.logistic_regression import Classifier

CS = tuple(10.0 ** np.linspace(-6, 5, 45))
SAMPLES = 2_000
# Width and classes → one of how many C is solved. All C of the larger take scikit-learn a quarter of an hour; with few
# of them our path begins each farther from its solution, so that the ratio is rather lower than for all.
SHAPES = {(192, 10): 1, (768, 100): 11}
SECONDS = 280.0  # after which there are no more pairs, per shape
AT_LEAST = 3.0  # times as quick


def measure(settings: Settings) -> Report:
    """scikit-learn's seconds over ours, by width and number of classes."""
    torch.set_num_threads(settings.threads)
    comparisons, counts = [], {}
    for (width, classes), every in SHAPES.items():
        race = _Race(*tokens(SAMPLES, width, classes), CS[::every])
        with threadpool_limits(settings.threads):
            theirs, ours = _in_turns(race.theirs, race.ours, settings.pairs)
        name = f"{SAMPLES} tokens of width {width}, {classes} classes, {len(CS[::every])} C"
        sides = (
            "scikit-learn's LogisticRegression, lbfgs, tol 1e-12, max_iter 1000, one C after another",
            "trainers.probes.logistic_regression.path for the same, each to a proven 1e-8 of the objective",
        )
        comparisons.append(Comparison(name, sides, theirs, ours, "s", Goal(AT_LEAST, at_most=False)))
        counts[name] = race.counts()
    return Report(comparisons, counts)


def tokens(samples: int, width: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Clouds of a power-law spectrum that overlap, each sample of length √width, as tokens are after the final norm."""
    random = np.random.Generator(np.random.PCG64(0))
    labels = random.integers(0, classes, samples)
    axes = np.arange(1, width + 1) ** -0.5
    turn = np.linalg.qr(random.normal(size=(width, width)))[0]
    middles = 0.3 * random.normal(size=(classes, width)) * axes
    drawn = (middles[labels] + random.normal(size=(samples, width)) * axes) @ turn + 0.5 * random.normal(size=width)
    drawn *= np.sqrt(width) / np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn.astype(np.float32), labels


class _Race:
    """Both sides on the same tokens, and what they found last."""

    def __init__(self, features: NDArray[np.float32], labels: NDArray[np.int64], cs: Sequence[float]) -> None:
        self._features, self._labels, self._cs = features, labels, cs
        self._theirs: list[LogisticRegression] = []
        self._ours: list[Classifier] = []

    def theirs(self) -> float:
        """As dinov2:dinov2/eval/log_regression.py asks cuML for it: in float64, for every C from the beginning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # for large C it does not get there in 1,000 steps
            started = time.perf_counter()
            exact = self._features.astype(np.float64)
            self._theirs = [
                LogisticRegression(C=c, tol=1e-12, max_iter=1_000).fit(exact, self._labels) for c in self._cs
            ]
            return time.perf_counter() - started

    def ours(self) -> float:
        """The same from the same arrays."""
        started = time.perf_counter()
        features, labels = torch.from_numpy(self._features), torch.from_numpy(self._labels)
        self._ours = list(logistic_regression.path(features, labels, self._cs))
        return time.perf_counter() - started

    def counts(self) -> dict[str, float]:
        """By how much either objective exceeds the other at most, relative; the least share of equal predictions."""
        features, exact = torch.from_numpy(self._features), self._features.astype(np.float64)
        excess = [
            one.objective / self._objective(other) - 1 for one, other in zip(self._ours, self._theirs, strict=True)
        ]
        equal = [
            float(np.mean(one.predict(features).numpy() == other.predict(exact)))
            for one, other in zip(self._ours, self._theirs, strict=True)
        ]
        return {
            "largest_excess_of_ours": max(0.0, *excess),
            "largest_excess_of_scikit_learns": max(0.0, *(-value for value in excess)),
            "c_at_which_they_agree_to_1e-6": sum(bool(abs(value) < 1e-6) for value in excess),
            "least_share_of_equal_predictions": min(equal),
        }

    def _objective(self, model: LogisticRegression) -> float:
        logits = model.decision_function(self._features.astype(np.float64))
        loss = logsumexp(logits, axis=1) - logits[np.arange(len(logits)), self._labels]
        return float(model.C) * float(loss.sum()) + 0.5 * float(np.square(model.coef_).sum())


def _in_turns(first: Side, second: Side, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, pair by pair; one pair at least."""
    deadline = time.perf_counter() + SECONDS
    rows = [(first(), second())]
    while len(rows) < pairs and time.perf_counter() < deadline:
        rows.append((first(), second()))
    return [row[0] for row in rows], [row[1] for row in rows]
