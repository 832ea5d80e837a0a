"""Multinomial logistic regression with an L2 penalty, solved to a proven optimum for one C or for many.

The objective is that of scikit-learn's `LogisticRegression(C=c)`: C · Σ cross-entropy + ½ ‖W‖², with intercepts free of
penalty, and with one weight vector where there are two classes. The solver is a truncated Newton method (Lin, Weng and
Keerthi 2008, "Trust Region Newton Method for Logistic Regression"), here with a line search: a step comes from
conjugate gradients, whose products with the Hessian are two matrix products each.

What makes it quick: features are centred and rotated to their principal components (with fewer samples than features
that loses nothing: the optimum lies in the samples' span), where the Hessian's diagonal is a good preconditioner;
products with the Hessian are in float32, while objective and gradient, which decide where the optimum is, are in
float64; and along a path of C the start is extrapolated from the last three solutions.
Shapes: n samples, F features, r features after rotation and one constant, K classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

log = logging.getLogger(__name__)

TOLERANCE = 1e-8  # proven relative distance from the least objective

_EXACT = torch.float64
_QUICK = torch.float32
_CHUNK = 2**17  # logits that a CPU works on at once, so that they stay in its cache
_GPU_CHUNK = 2**24
_LEAST_CHUNK = 1_024  # samples, so that matrix products stay efficient
_NEWTON_STEPS = 200
_CG_STEPS = 500
_FORCING = 0.1  # by how much conjugate gradients reduce the residual, unless the optimum needs less
_ARMIJO = 1e-4
_HALVINGS = 40
_ROUNDING = 1e-14  # of the objective, relative
_BALANCE_STEPS = 50
_BALANCED = 1e-12  # of the number of samples


@dataclass(frozen=True)
class Classifier:
    """A fitted model on the features as they were given.

    Attributes:
        weight_KF: float64; of two classes the rows are -w / 2 and w / 2, w being scikit-learn's `coef_`.
        bias_K: float64.
        classes: int64 [K], rising: those that occurred in training.
        c: inverse strength of the penalty.
        objective: C · Σ cross-entropy + ½ ‖W‖² (of two classes ½ ‖w‖²).
        gap: by how much at most the objective exceeds its least value.
    """

    weight_KF: Tensor
    bias_K: Tensor
    classes: Tensor
    c: float
    objective: float
    gap: float

    def predict(self, features_nF: Tensor) -> Tensor:
        """Classes, int64 [n]; of equal logits the lowest."""
        return self.classes[torch.addmm(self.bias_K, features_nF.to(_EXACT), self.weight_KF.T).argmax(dim=1)]


def fit(
    features_nF: Tensor,
    labels_n: Tensor,
    c: float,
    *,
    tolerance: float = TOLERANCE,
    start: Classifier | None = None,
) -> Classifier:
    """The optimum for one C; see `path`."""
    return next(path(features_nF, labels_n, [c], tolerance=tolerance, start=start))


@torch.no_grad()
def path(
    features_nF: Tensor,
    labels_n: Tensor,
    cs: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    start: Classifier | None = None,
) -> Iterator[Classifier]:
    """The optimum for each C in turn; quickest in rising order with small steps.

    Args:
        features_nF: floating point, on a CPU or GPU, where they are copied in float64 and float32, and n · K
            probabilities with them.
        labels_n: int64 on the same device, any numbers.
        cs: inverse strengths of the penalty, positive.
        tolerance: the proven relative distance from the least objective at which a solution is good enough.
        start: a solution of a similar problem to begin with, if it is of the same classes and better than none.

    Raises:
        ValueError: fewer than two classes, numbers of features and labels that differ, or a C that is not positive.
        FloatingPointError: features are NaN or infinite.
    """
    if len(features_nF) != len(labels_n):
        raise ValueError(f"there are features of {len(features_nF)} samples and labels of {len(labels_n)}")
    if wrong := [c for c in cs if not (c > 0 and math.isfinite(c))]:
        raise ValueError(f"C is {wrong[0]}; allowed: positive numbers")
    classes, index = torch.unique(labels_n, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"logistic regression needs at least two classes; there is {len(classes)}")
    if not bool(features_nF.isfinite().all()):
        raise FloatingPointError("features are not finite")
    problem = _Problem(features_nF, index, len(classes))
    halves = 2.0 if len(classes) == 2 else 1.0  # softmax of ∓w/2 at C / 2 has half the objective of w at C
    begins = [problem.origin()]
    if start is not None and torch.equal(start.classes, classes):
        begins.append(problem.from_features(start.weight_KF, start.bias_K))
    solved: list[tuple[float, _Point]] = []
    for c in cs:
        point = _solve(problem, _start(problem, c / halves, solved, begins), tolerance)
        solved = [*solved, (math.log(point.c), replace(point, probabilities=[]))][-3:]  # which are large
        weight, bias = problem.in_features(point.weight_Kr)
        yield Classifier(weight, bias, classes, c, halves * point.objective, halves * point.gap)


def fit_best(
    features_nF: Tensor,
    labels_n: Tensor,
    cs: Sequence[float],
    held_out_n: Tensor,
    *,
    tolerance: float = TOLERANCE,
) -> Classifier:
    """The optimum on all samples for the C that does best on those held out, learned without them.

    Of equally many right answers the first C wins, as in dinov2:dinov2/eval/log_regression.py.

    Args:
        features_nF, labels_n, cs, tolerance: see `path`.
        held_out_n: bool on the same device; at least one sample is and two classes are left.
    """
    held_out_features, held_out_labels = features_nF[held_out_n], labels_n[held_out_n]
    best, most = None, -1
    for model in path(features_nF[~held_out_n], labels_n[~held_out_n], cs, tolerance=tolerance):
        right = int((model.predict(held_out_features) == held_out_labels).sum())
        if right > most:
            best, most = model, right
    if best is None:
        raise ValueError("there is no C to choose from")
    return fit(features_nF, labels_n, best.c, tolerance=tolerance, start=best)


def can_choose(labels_n: NDArray[np.int64], held_out_n: NDArray[np.bool_]) -> bool:
    """Whether `fit_best` can choose C: a sample is held out, and two classes are left."""
    return bool(held_out_n.any()) and len(np.unique(labels_n[~held_out_n])) > 1


@dataclass(frozen=True)
class _Point:
    """Weights, and the objective and its gradient there; the last column of both is the intercept."""

    weight_Kr: Tensor
    loss: float  # Σ cross-entropy
    penalty: float
    c: float
    gradient_Kr: Tensor
    probabilities: list[Tensor]  # [K, m] of every chunk of samples

    @property
    def objective(self) -> float:
        return self.objective_at(self.c)

    def objective_at(self, c: float) -> float:
        """What the objective would be here for another C."""
        return c * self.loss + self.penalty

    @property
    def gap(self) -> float:
        """How far the objective is from its least value at most, where intercepts are at their optimum for the weights.

        Minimised over intercepts, the objective is 1-strongly convex in the weights, as the penalty is; its gradient
        there is g, so that its least value is at most ½ ‖g‖² below.
        """
        return 0.5 * float(self.gradient_Kr[:, :-1].square().sum())


class _Problem:
    """Features in the basis in which they are solved for, and objective, gradient and Hessian there."""

    def __init__(self, features_nF: Tensor, index_n: Tensor, num_classes: int) -> None:
        self._mean_F = features_nF.mean(dim=0, dtype=_EXACT)
        # A million samples of 1,536 features are 16 GB: no more copies are alive at a time than must be.
        self._basis_Fr, x_rn = _principal(features_nF.to(_EXACT) - self._mean_F)
        size = max(_LEAST_CHUNK, (_CHUNK if x_rn.device.type == "cpu" else _GPU_CHUNK) // num_classes)
        self.x = [torch.cat([part, torch.ones_like(part[:1])]) for part in torch.split(x_rn, size, dim=1)]
        self.quick_x = [part.to(_QUICK) for part in self.x]
        self._index = torch.split(index_n, size)
        self.counts_K = torch.bincount(index_n, minlength=num_classes).to(_EXACT)
        self.penalised_r = x_rn.new_ones(len(x_rn) + 1)
        self.penalised_r[-1] = 0.0

    def origin(self) -> Tensor:
        """No weights, and the intercepts that are best then: the limit for small C."""
        weight_Kr = self.counts_K.new_zeros(len(self.counts_K), len(self.penalised_r))
        share = self.counts_K.log()
        weight_Kr[:, -1] = share - share.mean()
        return weight_Kr

    def evaluate(self, weight_Kr: Tensor, c: float) -> _Point:
        """Objective and gradient; where almost all of a probability is one class's, to all digits of the rest."""
        loss = weight_Kr.new_zeros(())
        gradient_Kr = torch.zeros_like(weight_Kr)
        probabilities = []
        for x_rm, index_m in zip(self.x, self._index, strict=True):
            label_1m = index_m[None]
            logits_Km = weight_Kr @ x_rm
            normaliser_m = logits_Km.logsumexp(dim=0)
            surprise_m = normaliser_m - logits_Km.gather(0, label_1m)[0]
            probabilities.append(logits_Km.sub_(normaliser_m).exp_())
            residual_Km = probabilities[-1].scatter(0, label_1m, 0.0)
            wrong_m = residual_Km.sum(dim=0)  # 1 - p of the label
            loss += torch.where(wrong_m < 0.5, -torch.log1p(-wrong_m), surprise_m).sum()
            residual_Km.scatter_(0, label_1m, -wrong_m[None])
            gradient_Kr.addmm_(residual_Km, x_rm.T)
        penalised_Kr = weight_Kr * self.penalised_r
        gradient_Kr.mul_(c).add_(penalised_Kr)
        total, penalty = torch.stack([loss, 0.5 * penalised_Kr.square().sum()]).tolist()
        return _Point(weight_Kr, total, penalty, c, gradient_Kr, probabilities)

    def balance(self, point: _Point) -> _Point:
        """The same weights with the best intercepts, by Newton's method: as many of a class are expected as there are.

        The Hessian of the intercepts is a graph's Laplacian, whose diagonal is summed from the rest of it, since
        1 - p loses its digits where p is almost 1.
        """
        shift_K, identity_KK = torch.zeros_like(self.counts_K), torch.eye(len(self.counts_K)).to(self.counts_K)
        probabilities = point.probabilities
        bound = _BALANCED * float(self.counts_K.sum())
        for _ in range(_BALANCE_STEPS):
            excess_K = torch.stack([p.sum(dim=1) for p in probabilities]).sum(dim=0) - self.counts_K
            if float(excess_K.abs().max()) <= bound:
                break
            overlap_KK = torch.zeros_like(identity_KK)
            for p in probabilities:
                overlap_KK.addmm_(p, p.T)
            degree_K = overlap_KK.fill_diagonal_(0.0).sum(dim=1)
            scale = float(degree_K.max())
            if scale == 0.0:
                break
            # Every logit may shift alike, which the Laplacian does not see: 1 / K fixes the sum of the shifts at 0.
            regular_KK = scale * (_ROUNDING * identity_KK + 1.0 / len(shift_K))
            step_K = torch.linalg.solve(degree_K.diag() - overlap_KK + regular_KK, -excess_K)
            step_K /= step_K.abs().max().clamp(min=1.0)
            shift_K += step_K
            scaled = [p * step_K.exp()[:, None] for p in probabilities]
            probabilities = [p / p.sum(dim=0) for p in scaled]
        if probabilities is point.probabilities:
            return point
        weight_Kr = point.weight_Kr.clone()
        weight_Kr[:, -1] += shift_K - shift_K.mean()
        return self.evaluate(weight_Kr, point.c)

    def from_features(self, weight_KF: Tensor, bias_K: Tensor) -> Tensor:
        """The reverse of `in_features`, but for what the samples have no part in."""
        return torch.cat([weight_KF @ self._basis_Fr, (bias_K + weight_KF @ self._mean_F)[:, None]], dim=1)

    def in_features(self, weight_Kr: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [K, F] and bias [K] for features as they were given."""
        weight_KF = weight_Kr[:, :-1] @ self._basis_Fr.T
        return weight_KF, weight_Kr[:, -1] - weight_KF @ self._mean_F


def _principal(centred_nF: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis [F, r] of principal components, r = min(n, F), and the features in it, [r, n]."""
    samples, width = centred_nF.shape
    if samples >= width:
        basis_Fr = torch.linalg.eigh(centred_nF.T @ centred_nF).eigenvectors
        return basis_Fr, basis_Fr.T @ centred_nF.T
    span_Fn, triangle_nn = torch.linalg.qr(centred_nF.T)
    principal_nn = torch.linalg.eigh(triangle_nn @ triangle_nn.T).eigenvectors
    return span_Fn @ principal_nn, principal_nn.T @ triangle_nn


class _Hessian:
    """The objective's second derivative at a point, in float32, and its diagonal as a preconditioner."""

    def __init__(self, problem: _Problem, point: _Point) -> None:
        self._x, self._c = problem.quick_x, point.c
        self._penalised_r = problem.penalised_r.to(_QUICK)
        self._probabilities = [p.to(_QUICK) for p in point.probabilities]
        self._likeliest = [p.argmax(dim=0, keepdim=True) for p in point.probabilities]
        diagonal_Kr = self._penalised_r.expand(point.weight_Kr.shape).clone()
        for p, x_rm in zip(point.probabilities, self._x, strict=True):
            diagonal_Kr.addmm_((p * (1.0 - p)).to(_QUICK), x_rm.square().T, alpha=self._c)
        self._diagonal_Kr = diagonal_Kr.clamp_(min=torch.finfo(_QUICK).tiny)

    def times(self, direction_Kr: Tensor) -> Tensor:
        """Its product with a direction.

        Logits are taken relative to the likeliest class's: products with a probability of almost 1 would else cancel,
        and leave of samples that are classified well nothing but float32's rounding.
        """
        product_Kr = torch.zeros_like(direction_Kr)
        for p_Km, likeliest_1m, x_rm in zip(self._probabilities, self._likeliest, self._x, strict=True):
            change_Km = direction_Kr @ x_rm
            change_Km.sub_(change_Km.gather(0, likeliest_1m)).mul_(p_Km)
            change_Km.addcmul_(p_Km, change_Km.sum(dim=0), value=-1)
            product_Kr.addmm_(change_Km, x_rm.T)
        return product_Kr.mul_(self._c).addcmul_(direction_Kr, self._penalised_r)

    def precondition(self, residual_Kr: Tensor) -> Tensor:
        """The inverse of the diagonal, on directions that change no class's logit relative to the mean over classes."""
        scaled_Kr = residual_Kr / self._diagonal_Kr
        return scaled_Kr - scaled_Kr.mean(dim=0)


def _start(problem: _Problem, c: float, solved: Sequence[tuple[float, _Point]], begins: Sequence[Tensor]) -> _Point:
    """The solution extrapolated in log C from the last ones, where that is better than the last one itself.

    Without any the best of `begins`.
    """
    if not solved:
        return min((problem.evaluate(weight_Kr, c) for weight_Kr in begins), key=lambda point: point.objective)
    last = solved[-1][1]
    point = problem.evaluate(_extrapolated(math.log(c), solved), c)
    return point if point.objective <= last.objective_at(c) else problem.evaluate(last.weight_Kr, c)


def _extrapolated(at: float, solved: Sequence[tuple[float, _Point]]) -> Tensor:
    """Lagrange's polynomial through the weights by log C."""
    weight_Kr = torch.zeros_like(solved[0][1].weight_Kr)
    for this, point in solved:
        share = math.prod((at - other) / (this - other) for other, _ in solved if other != this)
        weight_Kr.add_(point.weight_Kr, alpha=share)
    return weight_Kr


def _solve(problem: _Problem, point: _Point, tolerance: float) -> _Point:
    """The optimum, from a start."""
    for _ in range(_NEWTON_STEPS):
        if point.gap <= tolerance * point.objective:
            point = problem.balance(point)
            if point.gap <= tolerance * point.objective:
                return point
        stepped = _newton_step(problem, point, tolerance)
        if stepped is None:
            break
        point = stepped
    point = problem.balance(point)
    log.warning(
        "logistic regression at C = %g got no closer to the optimum than %.1e of its objective",
        *(point.c, point.gap / point.objective),
    )
    return point


def _newton_step(problem: _Problem, point: _Point, tolerance: float) -> _Point | None:
    """A step to a smaller objective, halved until it falls as it should; None where no step makes it fall."""
    enough = math.sqrt(0.5 * tolerance * point.objective)  # a gradient that leaves a quarter of the gap allowed
    step_Kr = _conjugate_gradients(_Hessian(problem, point), -point.gradient_Kr.to(_QUICK), enough).to(_EXACT)
    slope = float((point.gradient_Kr * step_Kr).sum())
    for halvings in range(_HALVINGS):
        length = 0.5**halvings
        there = problem.evaluate(point.weight_Kr + length * step_Kr, point.c)
        if there.objective <= point.objective + _ARMIJO * length * slope + _ROUNDING * abs(point.objective):
            return there
    return None


def _conjugate_gradients(hessian: _Hessian, residual_Kr: Tensor, enough: float) -> Tensor:
    """A direction that the Hessian takes to `residual_Kr`, nearly: until little of it, or `enough`, is left."""
    solution_Kr = torch.zeros_like(residual_Kr)
    scaled_Kr = hessian.precondition(residual_Kr)
    size = first = float((residual_Kr * scaled_Kr).sum())
    direction_Kr = scaled_Kr
    for _ in range(_CG_STEPS):
        product_Kr = hessian.times(direction_Kr)
        curvature = float((direction_Kr * product_Kr).sum())
        if not curvature > 0:  # rounding alone is left
            break
        solution_Kr.add_(direction_Kr, alpha=size / curvature)
        residual_Kr = residual_Kr.sub(product_Kr, alpha=size / curvature)
        scaled_Kr = hessian.precondition(residual_Kr)
        left, norm = torch.stack([(residual_Kr * scaled_Kr).sum(), torch.linalg.vector_norm(residual_Kr)]).tolist()
        if left <= _FORCING**2 * first or norm <= enough:
            break
        direction_Kr = torch.add(scaled_Kr, direction_Kr, alpha=left / size)
        size = left
    return solution_Kr
