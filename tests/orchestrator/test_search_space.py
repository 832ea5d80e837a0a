"""The space of a search: order, conditions, grids, whole numbers; and what the samplers make of it."""

import copy
import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from orchestrator.search_history import History, Sample, asked, best, pareto_front, restarted, told, warmed
from orchestrator.search_sampler import suggest
from orchestrator.search_space import Entry, Space, in_order, is_whole
from orchestrator.sweep import Range, Search

LR = {"low": 1e-5, "high": 1e-1, "log": True}
CONDITIONAL = {
    "optim.min_lr": {"choices": [0.0, 1e-6], "if": {"optim.optimizer": "lamb"}},
    "optim.optimizer": {"choices": ["adamw", "lamb", "sgd"]},
    "deit3.flip": {"choices": [True, False], "if": {"optim.optimizer": ["lamb", "sgd"], "optim.min_lr": 1e-6}},
}


def ranges(raw: Mapping[str, Any]) -> dict[str, Range]:
    return {name: Range.model_validate(given) for name, given in raw.items()}


def space(raw: Mapping[str, Any]) -> Space:
    return Space(ranges(raw))


def search(raw: Mapping[str, Any], **parts: Any) -> Search:
    defaults = {"name": "tpe", "samples": 20, "metric": "val/knn/top1", "startup": 4}
    return Search.model_validate({**defaults, "space": raw, **parts})


class TestSpace:
    def test_entries_come_behind_what_they_depend_on(self) -> None:
        assert in_order(ranges(CONDITIONAL)) == ["optim.optimizer", "optim.min_lr", "deit3.flip"]
        assert space(CONDITIONAL).conditional
        assert not space({"optim.lr": LR}).conditional

    def test_circles_are_refused(self) -> None:
        circle = {"a": {"choices": [1], "if": {"b": 1}}, "b": {"choices": [1], "if": {"a": 1}}, "c": {"choices": [1]}}
        with pytest.raises(ValueError, match="circle") as caught:
            in_order(ranges(circle))
        assert caught.value.args[1] == ("a", "b")

    def test_the_grid_has_each_combination_that_can_be_suggested_once(self) -> None:
        assert space(CONDITIONAL).grid == [
            {"optim.optimizer": "adamw"},
            {"optim.min_lr": 0.0, "optim.optimizer": "lamb"},
            {"optim.min_lr": 1e-6, "optim.optimizer": "lamb", "deit3.flip": True},
            {"optim.min_lr": 1e-6, "optim.optimizer": "lamb", "deit3.flip": False},
            {"optim.optimizer": "sgd"},
        ]
        assert space(CONDITIONAL).size(10) == 5
        assert space(CONDITIONAL).size(2) == 3  # it counts no further

    def test_steps_are_exact_decimals(self) -> None:
        entry = Entry("optim.lr", Range(low=0.1, high=0.5, step=0.1), whole=False)
        assert entry.listed == [0.1, 0.2, 0.3, 0.4, 0.5]  # 0.1 + 0.1 + 0.1 is 0.30000000000000004

    def test_restricted_to_a_space_a_configuration_is_a_suggestion_or_none(self) -> None:
        whole = space({"optim.steps": {"low": 10, "high": 20}, "optim.lr": LR, **CONDITIONAL})
        config = {"optim.steps": 15, "optim.lr": 0.01, "optim.optimizer": "adamw", "optim.min_lr": 0.5, "seed": 3}
        assert whole.restricted(config) == {"optim.steps": 15, "optim.lr": 0.01, "optim.optimizer": "adamw"}
        assert whole.restricted({**config, "optim.optimizer": "lamb"}) is None  # min_lr 0.5 is no choice
        assert whole.restricted({**config, "optim.steps": 21}) is None
        assert whole.restricted({**config, "optim.steps": True}) is None
        assert whole.restricted({"optim.lr": 0.01}) is None

    @pytest.mark.parametrize(
        ("name", "bounds", "whole"),
        [
            ("optim.steps", {"low": 10, "high": 20}, True),
            ("optim.steps", {"low": 10.0, "high": 20.0}, True),  # the setting knows
            ("optim.lr", {"low": 1, "high": 2}, False),
            ("optim.lr", {"low": 0.5, "high": 2}, False),
            ("deit3.flip", {"choices": [True, False]}, False),
            ("program.layers", {"low": 1, "high": 8}, True),  # a free setting: as the range is written
            ("program.dropout", {"low": 0.0, "high": 1.0}, False),
            ("program.dropout", {"low": 0, "high": 1, "step": 0.25}, False),
        ],
    )
    def test_whole_numbers_are_known_by_their_setting(self, name: str, bounds: dict[str, Any], whole: bool) -> None:
        assert is_whole(name, Range.model_validate(bounds)) is whole


class TestHistory:
    def test_it_is_what_the_events_say(self) -> None:
        events = [
            warmed([({"a": 1}, (0.5,), "before")]),
            asked(0, {"a": 2}),
            asked(1, {"a": 3}),
            told(1, "complete", (0.25,), 10),
            told(0, "fail", reason="diverged"),
        ]
        history = History.of(events)
        assert history.warm == (Sample(0, {"a": 1}, "complete", (0.5,)),)
        assert history.samples == [
            Sample(0, {"a": 2}, "fail", reason="diverged"),
            Sample(1, {"a": 3}, "complete", (0.25,), 10),
        ]
        assert History.of([*events, restarted()]) == History()

    def test_best_and_front_by_hand(self) -> None:
        values = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (0.5, 1.0), (2.0, 4.0)]
        samples = [Sample(number, {}, "complete", value) for number, value in enumerate(values)]
        samples.append(Sample(5, {}, "pruned", (9.0, 0.0)))
        assert best(samples, ("max", "min")) == samples[1]  # 2.0 thrice; 4.0 is least; the earlier of the two
        assert [sample.number for sample in pareto_front(samples, ("max", "min"))] == [1, 3, 4]
        assert best(samples, ("min", "min")) == samples[3]
        assert best(samples[5:], ("max", "max")) is None


def drawn(asked_for: Search, count: int, value: Any = lambda params: 0.0, cell: str = "cell") -> list[dict[str, Any]]:
    """`count` suggestions, each told its value before the next is asked for."""
    history = History()
    whole = Space(asked_for.space)
    for number in range(count):
        params = suggest(asked_for, whole, cell, history)
        if params is None:
            break
        history.apply(asked(number, params))
        values = value(params)
        values = values if isinstance(values, tuple) else (values,)
        history.apply(told(number, "complete", values, 1))
    return [sample.params for sample in history.samples]


def quadratic(params: Mapping[str, Any]) -> float:
    """Best at lr = 1e-3."""
    return -(float(np.log10(params["optim.lr"]) + 3) ** 2)


class TestSamplers:
    @pytest.mark.parametrize("name", ["grid", "random", "tpe"])
    def test_what_comes_next_depends_on_the_history_alone(self, name: str) -> None:
        raw = CONDITIONAL if name == "grid" else {"optim.lr": LR, "optim.steps": {"low": 5, "high": 9}, **CONDITIONAL}
        first, again = (drawn(search(raw, name=name), 12) for _ in range(2))
        assert first == again
        assert len({repr(params) for params in first}) == (5 if name == "grid" else 12)
        if name != "grid":
            assert drawn(search(raw, name=name, seed=1), 3) != first[:3]
            assert drawn(search(raw, name=name), 3, cell="other") != first[:3]

    def test_conditions_whole_numbers_and_lists(self) -> None:
        lists = {
            "evaluation.knn.k": {"choices": [[10], [10, 20]]},
            "optim.batch_size": {"low": 8, "high": 32, "step": 8},
        }
        raw = {"optim.steps": {"low": 1, "high": 900, "log": True}, **CONDITIONAL, **lists}
        for params in drawn(search(raw), 30, lambda params: float(params["optim.steps"])):
            assert type(params["optim.steps"]) is int
            assert 1 <= params["optim.steps"] <= 900
            assert params["evaluation.knn.k"] in ([10], [10, 20])
            assert params["optim.batch_size"] in (8, 16, 24, 32)
            assert ("optim.min_lr" in params) == (params["optim.optimizer"] == "lamb")
            assert ("deit3.flip" in params) == (params.get("optim.min_lr") == 1e-6)

    def test_tpe_learns_from_how_far_pruned_ones_came(self) -> None:
        def after(values: list[float]) -> list[Mapping[str, Any]]:
            """What is suggested by ten streams after pruned suggestions of these values at rising learning rates."""
            history = History()
            for number, value in enumerate(values):
                history.apply(asked(number, {"optim.lr": 10.0 ** (number - 5)}))
                history.apply(told(number, "pruned", (value,), 50, "pruned"))
            return [
                suggest(search({"optim.lr": LR}, seed=s), space({"optim.lr": LR}), "cell", history) or {}
                for s in range(10)
            ]

        low, high = (
            float(np.mean([np.log10(p["optim.lr"]) for p in after(v)])) for v in ([5.0, 4, 3, 2, 1], [1.0, 2, 3, 4, 5])
        )
        assert low < high - 0.5

    @pytest.mark.parametrize(("parallel", "apart"), [(1, False), (4, True)])
    def test_what_runs_keeps_the_next_ones_away_where_several_run(self, parallel: int, apart: bool) -> None:
        history = History()
        for number, lr in enumerate((1e-5, 1e-4, 9e-4, 1e-3, 1.1e-3, 1e-2, 1e-1)):
            history.apply(asked(number, {"optim.lr": lr}))
            history.apply(told(number, "complete", (quadratic({"optim.lr": lr}),), 50))
        running = copy.deepcopy(history)
        for number in range(7, 12):
            running.apply(asked(number, {"optim.lr": 1e-3}))

        def near(known: History) -> int:
            """How many of thirty suggestions lie within half a decade of the best so far, where five run."""
            drawn = [
                suggest(search({"optim.lr": LR}, seed=s, parallel=parallel), space({"optim.lr": LR}), "cell", known)
                for s in range(30)
            ]
            return sum(abs(np.log10((params or {})["optim.lr"]) + 3) < 0.5 for params in drawn)

        assert (near(running) < near(history) - 5) == apart

    def test_tpe_learns_and_random_does_not(self) -> None:
        def distance(name: str) -> float:
            late = [
                p
                for seed in range(4)
                for p in drawn(search({"optim.lr": LR}, name=name, seed=seed), 40, quadratic)[20:]
            ]
            return float(np.mean([abs(np.log10(params["optim.lr"]) + 3) for params in late]))

        assert distance("tpe") < 0.65  # one TPESampler that is kept over a study: 0.5
        assert distance("random") > 0.8  # uniform on [-2, 2]: 1 on average

    def test_what_failed_or_runs_is_not_taken_for_good(self) -> None:
        raw, whole = {"optim.lr": LR}, space({"optim.lr": LR})
        history = History()
        for number in range(12):
            history.apply(asked(number, {"optim.lr": 10 ** (-5 + number * 0.3)}))
            history.apply(
                told(number, "complete", (float(-abs(number - 6)),), 1) if number % 2 else told(number, "fail")
            )
        history.apply(asked(12, {"optim.lr": 1e-3}))
        history.apply(asked(13, {"optim.lr": 2e-3}))
        history.apply(told(13, "pruned", (0.1,), 4))
        assert suggest(search(raw), whole, "cell", history) == suggest(search(raw), whole, "cell", history)

    def test_several_metrics(self) -> None:
        both = search({"optim.lr": LR}, metric=["val/knn/top1", "val/knn/loss"], mode=["max", "min"])
        late = drawn(both, 40, lambda params: (quadratic(params), -quadratic(params)))[25:]
        assert np.mean([abs(np.log10(params["optim.lr"]) + 3) for params in late]) < 0.8
        conditional = search({"optim.lr": LR, **CONDITIONAL}, metric=["val/knn/top1", "val/linear/top1"])
        assert len(drawn(conditional, 15, lambda params: (quadratic(params), 1.0))) == 15

    def test_earlier_sweeps_count_as_experience(self) -> None:
        known = [({"optim.lr": lr}, (quadratic({"optim.lr": lr}),), "before") for lr in np.logspace(-4.9, -1.1, 40)]
        warm = History.of([warmed(known)])
        near = suggest(search({"optim.lr": LR}), space({"optim.lr": LR}), "cell", warm)
        assert near is not None
        assert abs(np.log10(near["optim.lr"]) + 3) < 0.5

    def test_nothing_global_changes(self, caplog: pytest.LogCaptureFixture) -> None:
        import optuna

        before = (random.getstate(), _numpy_state(), optuna.logging.get_verbosity())
        with caplog.at_level(logging.INFO, "optuna"):
            drawn(search({"optim.lr": LR, **CONDITIONAL}), 8, quadratic)
            drawn(search(CONDITIONAL, name="grid"), 8)
        assert before == (random.getstate(), _numpy_state(), optuna.logging.get_verbosity())
        assert caplog.records == []


def _numpy_state() -> str:
    return repr(np.random.get_state())  # noqa: NPY002 - the one that libraries share
