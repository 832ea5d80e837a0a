"""Logistic regression against scikit-learn: objective, weights, predictions; the proven gap; the choice of C."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from trainers.probes import logistic_regression
from trainers.probes.logistic_regression import Classifier

Problem = tuple[NDArray[np.float64], NDArray[np.int64]]

CS = [1e-6, 1e-3, 1e-1, 10.0, 1e3, 1e5]


def clouds(samples: int, width: int, classes: int, apart: float, seed: int = 0) -> Problem:
    """Clouds whose axes differ in length by a hundred, as those of real features do, `apart` from one another."""
    random = np.random.Generator(np.random.PCG64(seed))
    labels = random.integers(0, classes, samples)
    axes = np.geomspace(3.0, 0.03, width)
    middles = random.normal(size=(classes, width)) * axes * apart
    turn = np.linalg.qr(random.normal(size=(width, width)))[0]
    features = (middles[labels] + random.normal(size=(samples, width)) * axes) @ turn + random.normal(size=width)
    return features, labels


def unbalanced() -> Problem:
    features, labels = clouds(120, 6, 3, 0.7, seed=3)
    labels = np.where(np.arange(120) % 10 < 9, 4, labels)
    labels[0] = 9  # a class of one sample
    return features, labels


def duplicated() -> Problem:
    features, labels = clouds(90, 5, 3, 0.7, seed=4)
    return np.concatenate([features, features, features[:, :2]], axis=1), labels


def one_hot() -> Problem:
    labels = np.arange(60) % 4
    return np.eye(4)[labels], labels


def mislabelled() -> Problem:
    """A sample that is wrong with certainty: its label's probability is below float64's rounding of 1."""
    features = np.concatenate([np.full(1_200, -1.0), np.full(1_200, 1.0), [7.0]])[:, None]
    return features, np.repeat([0, 1, 0], [1_200, 1_200, 1])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "separable": lambda: clouds(100, 12, 4, 3.0),
    "overlapping": lambda: clouds(200, 8, 4, 0.3),
    "noise": lambda: (clouds(150, 5, 3, 0.0)[0], np.arange(150) % 3),
    "fewer samples than features": lambda: clouds(30, 45, 3, 0.5),
    "unbalanced": unbalanced,
    "duplicated columns": duplicated,
    "two classes": lambda: clouds(80, 7, 2, 0.8),
    "two classes that overlap": lambda: clouds(120, 4, 2, 0.2),
    "one-hot": one_hot,
    "mislabelled": mislabelled,
    "far from the origin": lambda: (clouds(80, 5, 3, 1.0)[0] + 100.0, clouds(80, 5, 3, 1.0)[1]),
}


def as_tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(problem[0]), torch.from_numpy(problem[1])


def objective(problem: Problem, weight: NDArray[Any], bias: NDArray[Any], c: float, classes: NDArray[Any]) -> float:
    """scikit-learn's, from its `coef_` and `intercept_`: one row where there are two classes."""
    features, labels = problem
    logits = features @ weight.T + bias
    if len(weight) == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    index = np.searchsorted(classes, labels)
    loss = logsumexp(logits, axis=1) - logits[np.arange(len(labels)), index]
    return float(c * loss.sum() + 0.5 * (weight**2).sum())


def as_scikit_learn(model: Classifier) -> tuple[NDArray[Any], NDArray[Any]]:
    weight, bias = model.weight_KF.numpy(), model.bias_K.numpy()
    return (weight[1:] - weight[:1], bias[1:] - bias[:1]) if len(bias) == 2 else (weight, bias)


def reference(problem: Problem, c: float) -> LogisticRegression:
    """The exact solver of scikit-learn, whose steps solve with the whole Hessian."""
    features, labels = problem
    middle = features.mean(axis=0)  # the objective is the same, and its Hessian better conditioned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it says so too where rounding alone is left
        warnings.simplefilter("ignore", RuntimeWarning)
        fitted = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-9, max_iter=300).fit(
            features - middle, labels
        )
    fitted.intercept_ = fitted.intercept_ - fitted.coef_ @ middle
    return fitted


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_objective_is_scikit_learns_and_so_are_the_predictions_but_for_ties(name: str) -> None:
    problem = PROBLEMS[name]()
    features, labels = as_tensors(problem)
    for c, model in zip(CS, logistic_regression.path(features, labels, CS), strict=True):
        theirs = reference(problem, c)
        ours = objective(problem, *as_scikit_learn(model), c, theirs.classes_)
        wanted = objective(problem, theirs.coef_, theirs.intercept_, c, theirs.classes_)
        assert ours == pytest.approx(wanted, rel=1e-6), c
        assert model.objective == pytest.approx(ours, rel=1e-9), c
        assert model.classes.tolist() == theirs.classes_.tolist()
        assert model.gap <= 1e-8 * ours
        assert ours - wanted <= model.gap + 1e-9 * wanted  # the bound holds
        logits = np.sort(problem[0] @ model.weight_KF.numpy().T + model.bias_K.numpy(), axis=1)
        clear = logits[:, -1] - logits[:, -2] > 1e-4 * np.abs(logits).max()
        assert (model.predict(features).numpy() == theirs.predict(problem[0]))[clear].all(), c


@pytest.mark.parametrize("c", [1e-4, 0.1, 10.0])
def test_it_agrees_with_the_solver_that_the_protocol_uses(c: float) -> None:
    problem = clouds(150, 10, 5, 0.5)
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=20_000).fit(*problem)
    model = logistic_regression.fit(*as_tensors(problem), c)
    wanted = objective(problem, theirs.coef_, theirs.intercept_, c, theirs.classes_)
    assert model.objective == pytest.approx(wanted, rel=1e-6)
    assert model.predict(torch.from_numpy(problem[0])).tolist() == theirs.predict(problem[0]).tolist()


def test_weights_are_scikit_learns_of_several_classes_and_of_two() -> None:
    for classes in (3, 2):
        problem = clouds(100, 6, classes, 0.5, seed=classes)
        model, theirs = logistic_regression.fit(*as_tensors(problem), 1.0, tolerance=1e-14), reference(problem, 1.0)
        weight, bias = as_scikit_learn(model)
        np.testing.assert_allclose(weight, theirs.coef_, atol=1e-6)
        if classes == 2:
            np.testing.assert_allclose(bias, theirs.intercept_, atol=1e-6)
        else:  # any number may be added to all of them
            np.testing.assert_allclose(bias - bias[0], theirs.intercept_ - theirs.intercept_[0], atol=1e-6)


def test_where_it_starts_does_not_matter() -> None:
    problem = clouds(100, 12, 4, 1.0, seed=5)
    features, labels = as_tensors(problem)
    path = list(logistic_regression.path(features, labels, CS))
    for c, along in zip(CS, path, strict=True):
        cold = logistic_regression.fit(features, labels, c)
        warm = logistic_regression.fit(features, labels, c, start=path[-1])
        assert cold.objective == pytest.approx(along.objective, rel=1e-7)
        assert warm.objective == pytest.approx(along.objective, rel=1e-7)
    falling = list(logistic_regression.path(features, labels, [*CS[::-1], CS[0]]))
    for along, back in zip(path, falling[:-1][::-1], strict=True):
        assert back.objective == pytest.approx(along.objective, rel=1e-7)


def test_even_a_start_that_is_certain_and_wrong_leads_there() -> None:
    features, labels = as_tensors(clouds(100, 12, 4, 1.0, seed=5))
    best = logistic_regression.fit(features, labels, 1.0)
    wrong = replace(best, weight_KF=-1e4 * best.weight_KF)
    found = logistic_regression.fit(features, labels, 1.0, start=wrong)
    assert found.objective == pytest.approx(best.objective, rel=1e-7)


def test_a_start_of_other_classes_is_left_aside() -> None:
    problem = clouds(60, 6, 3, 1.0)
    features, labels = as_tensors(problem)
    of_two = logistic_regression.fit(features[labels < 2], labels[labels < 2], 1.0)
    alone = logistic_regression.fit(features, labels, 1.0)
    assert logistic_regression.fit(features, labels, 1.0, start=of_two).objective == alone.objective


def test_features_without_information_give_the_shares_of_the_classes() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    for features in (torch.zeros(10, 3), torch.full((10, 3), 7.0)):
        for model in logistic_regression.path(features, labels, CS):
            assert model.weight_KF.abs().max() < 1e-12
            shares = torch.softmax(features.double() @ model.weight_KF.T + model.bias_K, dim=1)
            torch.testing.assert_close(shares[0], torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e3, 1e-6])
def test_features_of_any_scale_are_solved_to_the_end(scale: float) -> None:
    features, labels = as_tensors(clouds(150, 12, 4, 1.0))
    for model in logistic_regression.path(features * scale, labels, CS):
        assert bool(model.weight_KF.isfinite().all())
        assert model.gap <= 1e-8 * model.objective


def test_many_samples_are_worked_through_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = as_tensors(clouds(90, 8, 4, 0.5))
    whole = [model.objective for model in logistic_regression.path(features, labels, CS)]
    monkeypatch.setattr(logistic_regression, "_CHUNK", 1)
    monkeypatch.setattr(logistic_regression, "_LEAST_CHUNK", 40)
    in_portions = [model.objective for model in logistic_regression.path(features, labels, CS)]
    assert in_portions == pytest.approx(whole, rel=1e-7)


def test_what_cannot_be_solved_is_said() -> None:
    features, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    with pytest.raises(ValueError, match="at least two classes; there is 1"):
        logistic_regression.fit(features, torch.zeros(6, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="6 samples and labels of 5"):
        logistic_regression.fit(features, labels[:5], 1.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="allowed: positive numbers"):
            logistic_regression.fit(features, labels, wrong)
    features[2, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        logistic_regression.fit(features, labels, 1.0)


def test_steps_that_run_out_are_said_and_the_gap_is_still_a_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    features, labels = as_tensors(clouds(100, 12, 4, 1.0))
    best = logistic_regression.fit(features, labels, 100.0)
    monkeypatch.setattr(logistic_regression, "_NEWTON_STEPS", 2)
    early = logistic_regression.fit(features, labels, 100.0)
    assert "got no closer to the optimum" in caplog.text
    assert 1.01 * best.objective < early.objective <= best.objective + early.gap


def test_the_c_that_does_best_on_the_held_out_samples_is_refitted_on_all() -> None:
    features, labels = as_tensors(clouds(120, 30, 5, 0.3, seed=1))
    held_out = torch.arange(120) % 4 == 1
    cs = [1e-6, 1e-2, 1e-1, 1e4]
    right = [
        int((model.predict(features[held_out]) == labels[held_out]).sum())
        for model in logistic_regression.path(features[~held_out], labels[~held_out], cs)
    ]
    best = right.index(max(right))
    assert 0 < best < 3 and right.count(max(right)) == 1  # else this would show nothing
    model = logistic_regression.fit_best(features, labels, cs, held_out)
    assert model.c == cs[best]
    assert model.objective == pytest.approx(logistic_regression.fit(features, labels, cs[best]).objective, rel=1e-7)


def test_of_equally_good_c_the_first_is_chosen() -> None:
    features, labels = as_tensors(one_hot())
    held_out = torch.arange(len(labels)) % 5 == 0
    assert logistic_regression.fit_best(features, labels, [1.0, 1e2, 1e4], held_out).c == 1.0
    with pytest.raises(ValueError, match="no C to choose from"):
        logistic_regression.fit_best(features, labels, [], held_out)


def test_a_choice_needs_a_held_out_sample_and_two_classes_besides() -> None:
    labels = np.array([0, 0, 1, 1])
    assert logistic_regression.can_choose(labels, np.array([True, False, False, False]))
    assert not logistic_regression.can_choose(labels, np.zeros(4, bool))
    assert not logistic_regression.can_choose(labels, np.array([False, False, True, True]))
    assert not logistic_regression.can_choose(labels, np.ones(4, bool))
    assert not logistic_regression.can_choose(labels[:0], np.zeros(0, bool))
