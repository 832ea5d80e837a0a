"""Measured speeds and memory: samples of ledgers and files, prices by the nearest, shares of a GPU that hold a peak."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import dry_steps, measured
from orchestrator.estimate import (
    ASSUMED_TRIAL_SECONDS,
    by_formula,
    memory_bytes,
    state_bytes,
    training_flops,
    trial_flops,
)
from orchestrator.ledger import Ledger
from orchestrator.measured import SPARE, Need, Sample, need, price, read, samples_of_ledgers, settled, shape_of
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.sweep import Resources, Sweep
from trainers.config import TrialConfig, resolve

NANO = {"preset": "short", "model.size": "nano", "model.patch_size": 8}
GB = 10**9


def config(**settings: Any) -> TrialConfig:
    return resolve({**NANO, **{name.replace("__", "."): value for name, value in settings.items()}})


def planned(resources: Resources, **settings: Any) -> PlannedTrial:
    trial = {**NANO, **{name.replace("__", "."): value for name, value in settings.items()}}
    registers = trial.pop("model.num_registers", 0)
    axes: dict[str, tuple[object, ...]] = {"model.num_registers": (registers,)}
    return build_plan(Sweep(name="x", trial=trial, axes=axes, resources=resources)).trials[0]


def sample(speed: float = 100.0, device: str = "cuda", share: float = 1.0, **more: Any) -> Sample:
    of = more.pop("of", config())
    return Sample(shape_of(of), device, share, speed, **more)


class TestPrices:
    def test_without_samples_of_the_device_a_formula_decides(self) -> None:
        trial = planned(Resources(gpus=1.0))
        assert price(trial, []) == by_formula(trial)
        assert price(trial, [sample(device="cpu")]) == by_formula(trial)

    def test_steps_at_the_measured_speed_and_the_rest_as_it_was(self) -> None:
        trial = planned(Resources(gpus=0.5))
        images = trial.config.optim.steps * trial.config.optim.batch_size
        work = trial_flops(trial.config) - images * training_flops(trial.config)
        found = price(trial, [sample(200.0, share=0.5, rest_seconds=30.0, rest_flops=work, source="earlier")])
        assert found is not None
        assert found.seconds == pytest.approx(images / 200 + 30)
        assert found.device_seconds == pytest.approx(found.seconds / 2)
        assert found.basis == "the same shape on cuda (earlier)"

    def test_registers_scale_with_their_flops(self) -> None:
        trial = planned(Resources(gpus=1.0), model__num_registers=16)
        images = trial.config.optim.steps * trial.config.optim.batch_size
        ratio = training_flops(trial.config) / training_flops(config())
        rest = (trial_flops(trial.config) - images * training_flops(trial.config)) / (100 * training_flops(config()))
        found = price(trial, [sample(100.0)])
        assert found is not None and ratio > 1.2
        assert found.seconds == pytest.approx(images / 100 * ratio + rest + ASSUMED_TRIAL_SECONDS)

    def test_the_same_shape_goes_before_nearer_flops_and_the_same_method_before_others(self) -> None:
        trial = planned(Resources(gpus=1.0), model__num_registers=4)
        other = config(optim__batch_size=32, model__num_registers=4)  # equal FLOPs, another batch
        dino = resolve({**NANO, "method": "dino"})
        far = config(model__size="tiny")
        assert price(trial, [sample(of=other, source="a"), sample(source="b")]) == price(trial, [sample(source="b")])
        assert price(trial, [sample(of=dino, source="a"), sample(of=other, source="b")]) == price(
            trial, [sample(of=other, source="b")]
        )
        found = price(trial, [sample(of=far, source="a")])
        assert found is not None and found.basis == "the nearest shape by FLOPs on cuda (a)"

    def test_the_nearest_share_is_taken_and_others_keep_device_time(self) -> None:
        trial = planned(Resources(gpus=0.25))
        near, whole = sample(50.0, share=0.25, source="near"), sample(100.0, source="whole")
        chosen, scaled = price(trial, [whole, near]), price(trial, [whole])
        assert chosen is not None and scaled is not None
        assert chosen.basis.endswith("(near)")
        assert scaled.seconds == pytest.approx(4 * scaled.device_seconds)

    def test_cpu_cores_are_shares_too(self) -> None:
        trial = planned(Resources(cpus=4.0))
        found = price(trial, [sample(100.0, device="cpu", share=2.0)])
        assert found is not None
        assert found.device_seconds == pytest.approx(4 * found.seconds)


class TestLedgers:
    def ledger(self, path: Path, results: list[dict[str, Any]]) -> None:
        plan = build_plan(Sweep(name="x", trial=NANO, axes={"model.num_registers": (0,)}, seeds=(0, 1, 2)))
        with Ledger.open(path) as ledger:
            ledger.plan(plan.trials)
            for trial, result in zip(plan.trials, results, strict=False):
                ledger.start_attempt(trial.trial_id, 1, "host", 1, gpus=1.0)
                ledger.finish(trial.trial_id, 1, "finished", result, None)

    def test_alike_trials_are_one_sample_of_median_speed(self, tmp_path: Path) -> None:
        own = config()
        images = own.optim.steps * own.optim.batch_size
        result = {"seconds": images / 100 + 7, "gpu_seconds": (images / 100 + 7) / 4, "device": "cuda", "attempts": 1}
        slow = {**result, "images_per_second": 50.0, "seconds": images / 50 + 7, "gpu_seconds": (images / 50 + 7) / 4}
        fast = {**result, "images_per_second": 400.0, "attempts": 2}  # its seconds have lost ones in them
        self.ledger(tmp_path / "a.db", [{**result, "images_per_second": 100.0}, slow, fast])
        (found,), notes = samples_of_ledgers([("first", tmp_path / "a.db")])
        assert (found.images_per_second, found.share, found.source, notes) == (100.0, 0.25, "first", [])
        assert found.rest_seconds == pytest.approx(7.0)
        assert found.shape == shape_of(own)

    def test_results_without_a_speed_say_nothing(self, tmp_path: Path) -> None:
        unknown = {"seconds": 5.0, "gpu_seconds": 0.0, "images_per_second": None, "device": "cpu", "threads": 2}
        self.ledger(tmp_path / "a.db", [unknown, {}, {**unknown, "images_per_second": 3.0}])
        (found,), _ = samples_of_ledgers([("first", tmp_path / "a.db")])
        assert (found.device, found.share, found.images_per_second) == ("cpu", 2.0, 3.0)

    def test_a_damaged_ledger_is_said_and_the_others_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "bad.db").write_text("no database")
        own = {"seconds": 5.0, "images_per_second": 3.0, "device": "cpu", "threads": 1}
        self.ledger(tmp_path / "a.db", [own])
        found, notes = samples_of_ledgers([("bad", tmp_path / "bad.db"), ("good", tmp_path / "a.db")])
        assert [one.source for one in found] == ["good"]
        assert len(notes) == 1 and notes[0].startswith("speeds of bad are left out: ")


class TestFile:
    def test_what_is_kept_is_read_and_replaced_by_shape_and_device(self, tmp_path: Path) -> None:
        assert read(tmp_path) == []
        one, other = sample(1.0, peak=5, capacity=9), sample(2.0, of=config(model__num_registers=4))
        measured.keep(tmp_path, [one, other])
        assert read(tmp_path) == [one, other]
        newer = dataclasses.replace(one, images_per_second=3.0)
        on_cpu = sample(4.0, device="cpu")
        measured.keep(tmp_path, [newer, on_cpu])
        assert read(tmp_path) == [other, newer, on_cpu]

    @pytest.mark.parametrize(
        "text", ["", "[]", '{"version": 2, "measured": {}}', '{"version": 1, "measured": {"a": [1]}}']
    )
    def test_another_file_is_refused_and_left_alone(self, tmp_path: Path, text: str) -> None:
        measured.measured_file(tmp_path).write_text(text)
        for use in (lambda: read(tmp_path), lambda: measured.keep(tmp_path, [sample()])):
            with pytest.raises(ValueError, match=r"measured\.json cannot be read"):
                use()
        assert measured.measured_file(tmp_path).read_text() == text


class TestMemory:
    def test_the_next_larger_of_the_group_holds_and_the_formula_scales_beyond(self) -> None:
        few, some, many = (config(model__num_registers=n) for n in (0, 4, 16))
        both = [sample(of=few, peak=2 * GB, capacity=80 * GB), sample(of=many, peak=3 * GB, capacity=80 * GB)]
        assert need(few, both, on_gpu=True) == Need(2 * GB, "cuda", 80 * GB)
        assert need(some, both, on_gpu=True) == Need(3 * GB, "cuda", 80 * GB)
        scaled = need(many, both[:1], on_gpu=True)
        assert scaled.peak == pytest.approx(2 * GB * memory_bytes(many) / memory_bytes(few), rel=1e-6)

    def test_other_groups_and_devices_say_nothing(self) -> None:
        own = config()
        others = [
            sample(of=config(optim__batch_size=32), peak=GB, capacity=GB),
            sample(device="cpu", peak=GB, capacity=GB),
            sample(),
        ]
        assert need(own, others, on_gpu=True) == Need(memory_bytes(own), None, None)

    def test_of_two_kinds_of_gpus_the_smaller_decides(self) -> None:
        two = [
            sample(device="H100", peak=11 * GB, capacity=80 * GB),
            sample(device="T4", peak=9 * GB, capacity=16 * GB),
        ]
        assert need(config(), two, on_gpu=True) == Need(9 * GB, "T4", 16 * GB)


class TestAuto:
    AUTO = Resources(gpus="auto", cpus=2.0)

    @pytest.mark.parametrize(
        ("peak", "share"),
        [(1, 0.125), (8, 0.125), (8.7, 0.25), (16, 0.25), (17.5, 0.3333), (25, 0.5), (34, 0.5), (35, 1.0), (69, 1.0)],
    )
    def test_the_smallest_share_that_holds_the_peak_and_15_percent(self, peak: float, share: float) -> None:
        samples = [sample(peak=round(peak * GB), capacity=80 * GB)]
        found = settled(self.AUTO, config(), samples)
        assert found == Resources(gpus=share, cpus=2.0)
        assert SPARE * peak <= 80 * share + 0.01

    def test_more_gpus_where_one_does_not_hold_it(self) -> None:
        own = config(optim__batch_size=64)
        state = state_bytes(own)
        samples = [sample(of=own, peak=state + 90 * GB, capacity=80 * GB)]
        found = settled(self.AUTO, own, samples)
        assert (found.gpus, found.num_ranks) == (2.0, 2)
        samples = [sample(of=own, peak=state + 150 * GB, capacity=80 * GB)]
        assert settled(self.AUTO, own, samples).gpus == 4.0  # 3 do not divide 64 images

    def test_weights_that_fit_nowhere_are_said(self) -> None:
        own = config()
        samples = [sample(peak=state_bytes(own) + 10, capacity=state_bytes(own))]
        with pytest.raises(ValueError, match="fits on no number of GPUs"):
            settled(self.AUTO, own, samples)

    def test_without_a_measurement_one_line_names_the_command(self) -> None:
        with pytest.raises(ValueError, match=r"^resources\.gpus is auto.*plan FILE --measure.*$") as error:
            settled(self.AUTO, config(), [sample(), sample(device="cpu", peak=1, capacity=2)])
        assert "\n" not in str(error.value)

    def test_a_number_stays(self) -> None:
        asked = Resources(gpus=0.5)
        assert settled(asked, config(), []) is asked

    def test_an_unsettled_share_has_no_number(self) -> None:
        with pytest.raises(ValueError, match="--measure"):
            _ = self.AUTO.num_gpus
        assert self.AUTO.num_ranks == 1


class TestDrySteps:
    def test_the_extremes_of_each_group_are_measured(self) -> None:
        axes: dict[str, tuple[object, ...]] = {"model.size": ("nano", "tiny"), "model.num_registers": (4, 0, 16, 8)}
        plan = build_plan(Sweep(name="x", trial={"preset": "short", "model.patch_size": 8}, axes=axes, seeds=(0, 1)))
        found = [(t.config.model.size, t.config.model.num_registers) for t in dry_steps.shapes(plan.trials)]
        assert found == [("nano", 0), ("nano", 16), ("tiny", 0), ("tiny", 16)]

    def test_what_trains_nothing_has_no_steps(self) -> None:
        weights: dict[str, tuple[object, ...]] = {"model.weights": ("dinov2_vits14_pretrain.pth",)}
        plan = build_plan(Sweep(name="x", trial={"method": "pretrained"}, axes=weights))
        assert dry_steps.shapes(plan.trials) == []

    def test_a_dry_configuration_has_the_steps_of_the_trial_and_none_of_its_data(self) -> None:
        own = resolve(
            {
                **NANO,
                "method": "dinov2",
                "data.train": "image_folder",
                "data.name": "birds",
                "execution.data_root": "/nowhere",
                "evaluation.probes": ["linear", "segmentation"],
                "evaluation.segmentation.data": ["ade20k"],
                "model.init_from": {"file": "absent.pth"},
            }
        )
        found = dry_steps.dry(own)
        assert (found.data.train, found.evaluation.probes, found.model.init_from) == ("scenes", (), None)
        assert shape_of(found) == shape_of(own)
        assert found.optim.steps == own.optim.steps
        short = dry_steps.dry(resolve({**NANO, "optim.steps": 1}))
        assert short.optim.steps == dry_steps.WARM_UP + dry_steps.STEPS + 1  # as many as are counted

    def test_a_step_takes_the_median_after_the_first_ones(self) -> None:
        watch = dry_steps._Watch(lambda: None)
        watch.moments = [0.0, 50.0, 60.0, 61.0, 62.0, 69.0]  # two steps to warm up, then 1, 1 and 7 seconds
        assert watch.seconds() == 1.0
        watch.moments = [0.0, 50.0]
        assert watch.seconds() == 50.0

    @pytest.mark.slow
    def test_dry_steps_of_a_real_trial(self, tmp_path: Path) -> None:
        trial = planned(Resources(cpus=1.0), optim__batch_size=8)
        found = dry_steps.measure(trial, tmp_path)
        assert (found.device, found.shape, found.source) == ("cpu", shape_of(trial.config), "dry steps")
        assert found.images_per_second > 1
        assert found.peak is not None and found.capacity is not None
        assert 10**8 < found.peak < found.capacity  # PyTorch alone takes hundreds of MB
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
        json.dumps(dataclasses.asdict(found))

    @pytest.mark.slow
    def test_a_gpu_that_is_not_there_is_said(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(ValueError, match="asks for a GPU and this machine has none"):
            dry_steps.measure(planned(Resources(gpus=1.0)), tmp_path)
