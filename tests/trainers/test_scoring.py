"""The scoring step: which one a rule chooses, that its weights are those that are scored, and surviving a kill."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tests.conftest import tiny_trial
from tests.trainers.runs import Reports, run, training
from trainers import checkpoint, export
from trainers.config import TrialConfig, identity, resolve, trial_id
from trainers.explain import ConfigError
from trainers.optim import EMA
from trainers.score_settings import ScoreConfig
from trainers.scoring import Scoring
from trainers.tokens import statistics as token_statistics
from trainers.tokens import table as token_table

KNN = "val/knn/top1"
OUTLIERS = "tokens/last/outlier_fraction"
LARGEST = "tokens/last/max_over_median"
# Norms grow while this trains, so the smallest maximum is that of the first evaluation, at step 4 of 12.
RULE = {"evaluation.score.best": LARGEST, "evaluation.score.mode": "min"}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tiny_trial("deit3", execution__keep_steps=[4, 5])


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> tuple[Path, Reports]:
    """The trial scored at its last step: its folder and its reports."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(settings, folder, data_cache)[1]


@pytest.fixture(scope="module")
def ruled(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> tuple[Path, Reports]:
    """The same trial scored where RULE says."""
    folder = tmp_path_factory.mktemp("ruled")
    result, reports = run({**settings, **RULE}, folder, data_cache)
    assert (result.status, result.steps) == ("finished", 12)
    return folder, reports


def at_step(settings: dict[str, Any], step: int, kept: Path, folder: Path, cache: Path) -> dict[str, float]:
    """What the weights of a checkpoint that another trial kept score on both sets, with nothing trained since."""
    one = training(settings, folder, cache)
    one.stepper.load_state_dict(checkpoint.read(kept / "checkpoints" / checkpoint.name_of(step)))
    found: dict[str, float] = one._measure(("validation", "test"), step)
    return found


def test_the_chosen_step_alone_is_tested_and_nothing_that_is_trained_changes(
    plain: tuple[Path, Reports], ruled: tuple[Path, Reports]
) -> None:
    reports = ruled[1]
    assert min((4, 8, 12), key=lambda step: reports[step][LARGEST]) == 4
    tested = [step for step, metrics in reports.items() if any(name.startswith("test/") for name in metrics)]
    assert tested == [4]
    assert [step for step, metrics in reports.items() if "score/step" in metrics] == [4]
    assert reports[4]["score/step"] == 4.0
    for step, metrics in plain[1].items():
        before = {n: v for n, v in metrics.items() if not n.startswith("test/") and n != "tokens/onset_step"}
        assert {name: reports[step].get(name) for name in before} == before


@pytest.mark.parametrize(("rule", "step"), [(RULE, 4), ({"evaluation.score.step": 5}, 5)])
def test_the_score_is_that_of_the_weights_of_that_step(
    rule: dict[str, Any],
    step: int,
    settings: dict[str, Any],
    plain: tuple[Path, Reports],
    tmp_path: Path,
    data_cache: Path,
) -> None:
    _, reports = run({**settings, **rule}, tmp_path / "1", data_cache)
    expected = at_step(settings, step, plain[0], tmp_path / "2", data_cache)
    assert {name: reports[step][name] for name in expected} == expected
    per_image = pq.read_table(tmp_path / "1" / "per_image.parquet").to_pandas()
    assert per_image[per_image.metric == "test/knn/top1"].value.mean() == pytest.approx(expected["test/knn/top1"])
    assert any(reports[step][name] != plain[1][12][name] for name in expected)  # else this would show nothing


def test_every_statistic_stands_once(ruled: tuple[Path, Reports]) -> None:
    rows = token_table.read(ruled[0] / "token_norms.parquet")
    keys = Counter((row.step, row.layer, row.token, row.source, row.weights) for row in rows)
    assert set(keys.values()) == {1}
    assert {(step, source, weights) for step, _, _, source, weights in keys} == {
        (step, *kind) for step in (4, 8, 12) for kind in (("probe", "raw"), ("probe", "ema"), ("train", "raw"))
    }
    found = token_statistics.read(ruled[0] / "token_statistics.parquet")
    again = Counter((row.step, row.weights, row.name, row.layer, row.head, row.token) for row in found)
    assert set(again.values()) == {1} and {row.step for row in found} == {4, 8, 12}
    probes = pq.read_table(ruled[0] / "probes.parquet").to_pandas()
    assert not probes.duplicated(["step", "name"]).any() and probes.step.is_monotonic_increasing


@pytest.mark.parametrize("stop_after", [3, 6, 11])
def test_a_run_that_was_asked_to_stop_chooses_the_same_step(
    stop_after: int, settings: dict[str, Any], ruled: tuple[Path, Reports], tmp_path: Path, data_cache: Path
) -> None:
    calls = iter(range(100))
    stop = {"should_stop": lambda: "interrupted" if next(calls) == stop_after else None}
    assert run({**settings, **RULE}, tmp_path / "1", data_cache, **stop)[0].status == "interrupted"
    _, again = run({**settings, **RULE}, tmp_path / "1", data_cache)
    assert again == ruled[1]


def test_a_run_killed_after_its_last_step_scores_the_same(
    settings: dict[str, Any], ruled: tuple[Path, Reports], tmp_path: Path, data_cache: Path
) -> None:
    _, again = run({**settings, **RULE}, tmp_path, data_cache, resume_from=[ruled[0] / "checkpoints"])
    assert again == ruled[1]
    assert token_table.read(tmp_path / "token_norms.parquet") == token_table.read(ruled[0] / "token_norms.parquet")


def test_the_newest_checkpoint_gives_the_scored_weights(ruled: tuple[Path, Reports]) -> None:
    newest = checkpoint.load_newest([ruled[0] / "checkpoints"])
    assert newest is not None and newest["step"] == 12
    fourth = checkpoint.read(ruled[0] / "checkpoints" / checkpoint.name_of(4))
    scored = export.scored(newest)
    assert scored["step"] == 4
    for kind, tensors in export.weights_in(fourth).items():
        ours, last = export.weights_in(scored)[kind], export.weights_in(newest)[kind]
        assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
        assert not all(torch.equal(last[name], tensor) for name, tensor in tensors.items())
    assert export.scored({"step": 3, "method": {}}) == {"step": 3, "method": {}}  # of older versions


class TestRule:
    @staticmethod
    def following(**rule: Any) -> tuple[Scoring, nn.Linear]:
        module = nn.Linear(1, 1)
        return Scoring(ScoreConfig(**rule), module, EMA(module, 0.5)), module

    def chosen(self, values: list[float], **rule: Any) -> int:
        """The step that is chosen where the metric has these values at steps 1, 2, …, which are the weights as well."""
        scoring, module = self.following(**rule)
        for step, value in enumerate(values, 1):
            nn.init.constant_(module.weight, step)
            scoring.after_step(step)
            scoring.after_evaluation(step, {} if value == 0 else {rule.get("best", "x"): value})
        found = scoring.restore()
        assert module.weight.item() == found
        return found

    def test_the_best_is_the_earliest_of_equals(self) -> None:
        assert self.chosen([0.1, 0.3, 0.3, 0.2], best=OUTLIERS, mode="max") == 2
        assert self.chosen([0.3, 0.1, 0.2, 0.1], best=OUTLIERS, mode="min") == 2

    def test_what_is_not_finite_or_absent_is_never_the_best(self) -> None:
        nan, infinite = float("nan"), float("inf")
        assert self.chosen([nan, 0.1, infinite, 0, 0.05], best=OUTLIERS, mode="max") == 2

    def test_a_declared_step_is_that_one(self) -> None:
        assert self.chosen([0.1, 0.9, 0.2], step=3) == 3
        assert self.chosen([0.1, 0.9, 0.2], step=1) == 1

    def test_a_metric_that_was_never_defined_chooses_nothing(self) -> None:
        with pytest.raises(ValueError, match=f"score.best is {OUTLIERS}, which was not defined at any evaluation"):
            self.chosen([float("nan"), 0], best=OUTLIERS, mode="max")

    def test_a_validation_metric_that_nobody_reports_is_said_at_the_first_evaluation(self) -> None:
        scoring, _ = self.following(best="val/own/score", mode="max")
        with pytest.raises(ValueError, match="val/own/score, which no evaluation reports; reported are val/knn/top1"):
            scoring.after_evaluation(1, {KNN: 0.5, "train/loss": 1.0})

    def test_what_is_kept_does_not_follow_training(self) -> None:
        scoring, module = self.following(step=1)
        nn.init.constant_(module.weight, 7.0)
        scoring.after_step(1)
        kept = scoring.state_dict()
        nn.init.constant_(module.weight, 8.0)
        assert kept is not None and kept["method"]["weight"].item() == 7.0


class TestSettings:
    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ({"best": "test/knn/top1"}, "score.best is 'test/knn/top1'; allowed: a metric that begins with val/"),
            ({"best": "train/loss"}, "score.best is 'train/loss'; allowed: val/PROBE/METRIC"),
            ({"best": "tokens/last/outlier_fracton"}, "did you mean tokens/last/outlier_fraction?"),
            ({"best": KNN, "step": 5}, "has both best (val/knn/top1) and step (5)"),
            ({"step": 13}, "evaluation.score.step 13 is more than optim.steps 12"),
            ({"best": OUTLIERS}, "evaluation.score.mode is not given"),
            ({"best": "val/depth/rmse"}, "evaluation.probes (linear, knn) lacks depth"),
            ({"best": "val/knn/top2"}, "probe knn has no metric 'top2'; it has top1"),
        ],
    )
    def test_rules_that_cannot_be_followed_are_refused(
        self, rule: dict[str, Any], message: str, tiny: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            resolve({**tiny, **{f"evaluation.score.{name}": value for name, value in rule.items()}})
        assert message in str(caught.value)

    def test_a_probe_that_runs_at_the_end_alone_chooses_nothing(self, tiny: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"measured at the end alone; set evaluation\.knn\.at to every"):
            resolve({**tiny, "evaluation.score.best": KNN, "evaluation.knn.at": "end"})

    @pytest.mark.parametrize("rule", [{"score.step": 12}, {"score": None}, {"score.mode": "max"}])
    def test_the_last_step_is_no_rule_and_leaves_ids_as_they_were(
        self, rule: dict[str, Any], tiny: dict[str, Any]
    ) -> None:
        given = resolve({**tiny, **{f"evaluation.{name}": value for name, value in rule.items()}})
        assert given.evaluation.score is None and trial_id(given) == trial_id(resolve(tiny))
        assert not any(name.startswith("evaluation.score") for name in identity(given))

    def test_a_rule_is_part_of_the_identity_with_its_mode(self, tiny: dict[str, Any]) -> None:
        rule = {"evaluation.score.best": KNN}
        assert trial_id(resolve({**tiny, **rule})) != trial_id(resolve(tiny))
        spelled = {**rule, "evaluation.score.mode": "max"}
        assert trial_id(resolve({**tiny, **rule})) == trial_id(resolve({**tiny, **spelled}))
        assert resolve({**tiny, "evaluation.score.step": 5}).evaluation.score == ScoreConfig(step=5, mode=None)

    def test_less_error_is_better(self, tiny: dict[str, Any]) -> None:
        depth = {"evaluation.probes": ["depth"], "evaluation.depth.data": ["nyu_depth"], "evaluation.depth.at": "every"}
        for metric, mode in (("val/depth/rmse", "min"), ("val/depth/delta1", "max")):
            score = resolve({**tiny, **depth, "evaluation.score.best": metric}).evaluation.score
            assert score is not None and score.mode == mode

    def test_weights_that_are_only_measured_have_one_step(self) -> None:
        weights = {"method": "pretrained", "model.weights": "vit_small_patch14_dinov2.lvd142m"}
        assert resolve({**weights, "evaluation.score.best": KNN}).evaluation.score is None
        assert isinstance(resolve({**weights, "evaluation.score.step": 7}), TrialConfig)


RANKS = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from trainers.config import TrialConfig
from trainers.train import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, reports = Path(sys.argv[2]), {}
calls = iter(range(100))
stop = (lambda: "interrupted" if next(calls) == int(sys.argv[4]) else None) if len(sys.argv) > 4 else (lambda: None)
def report(step, metrics):
    reports.setdefault(step, {}).update(metrics)
config = TrialConfig.model_validate_json(Path(sys.argv[1]).read_text())
train(config, report, folder / "trial", cache=Path(sys.argv[3]), should_stop=stop)
if dist.get_rank() == 0:
    (folder / "reports.json").write_text(json.dumps(reports))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_choose_and_resume_as_one_does(
    settings: dict[str, Any], ruled: tuple[Path, Reports], tmp_path: Path, data_cache: Path
) -> None:
    (tmp_path / "config.json").write_text(resolve({**settings, **RULE}).model_dump_json())
    (tmp_path / "run.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    found = []
    for stops in (["7"], []):
        arguments = ["config.json", str(tmp_path), str(data_cache), *stops]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / "reports.json").read_text()))
    assert "8" not in found[0]
    assert {step for step, metrics in found[1].items() if "test/knn/top1" in metrics} == {"4"}
    assert found[1]["4"]["score/step"] == 4.0
    assert found[1]["4"][LARGEST] == pytest.approx(ruled[1][4][LARGEST], rel=1e-3)
