"""Configurations: resolving, identity, and what is said about wrong settings."""

import pytest
from pydantic import ValidationError

from trainers import catalog, config, presets
from trainers.config import (
    TrialConfig,
    fields,
    flatten,
    identity,
    is_execution,
    nest,
    resolve,
    trial_id,
)
from trainers.explain import ConfigError, did_you_mean
from trainers.settings import check

SETTINGS = {
    "model.size": "nano",
    "model.patch_size": 8,
    "model.num_registers": 4,
    "data.decode_size": 32,
    "optim.lr": 3e-3,
    "optim.steps": 600,
    "seed": 1,
    "preset": "short",
}
DINO = {"method": "dino", "model.patch_size": 8}
DINOV2 = {**DINO, "method": "dinov2"}


def faults(settings: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(settings)
    return [fault.message for fault in caught.value.faults]


class TestIdentity:
    def test_it_does_not_change_by_accident(self) -> None:
        # Every finished trial of every user is found by its id. A change here must be meant: a new setting names in
        # AS_BEFORE the value that means "as before", and then this id stays.
        assert trial_id(resolve(SETTINGS)) == "9e4db4811743d8e4"
        assert trial_id(resolve({**SETTINGS, "model.num_registers": 0})) == "359e818bf22c3304"

    def test_values_as_before_are_the_defaults_of_existing_settings(self) -> None:
        defaults = flatten(TrialConfig().model_dump())
        assert {name: defaults[name] for name in config.AS_BEFORE} == config.AS_BEFORE
        everything = resolve({**SETTINGS, **config.AS_BEFORE})
        assert trial_id(everything) == trial_id(resolve(SETTINGS))

    def test_the_way_a_trial_is_written_does_not_matter(self) -> None:
        assert trial_id(resolve(nest(SETTINGS))) == trial_id(resolve(SETTINGS))
        assert trial_id(resolve({**SETTINGS, "optim.lr": 1})) == trial_id(resolve({**SETTINGS, "optim.lr": 1.0}))
        assert trial_id(resolve({**SETTINGS, "optim.min_lr": -0.0})) == trial_id(
            resolve({**SETTINGS, "optim.min_lr": 0})
        )

    def test_defaults_presets_and_auto_are_expanded(self) -> None:
        spelled = {**SETTINGS, "precision": "fp32", "optim.warmup_steps": 30, "model.image_size": 32}
        assert trial_id(resolve(spelled)) == trial_id(resolve(SETTINGS))
        recipe = presets.PRESETS["deit3"]["imagenet21k"]
        assert trial_id(resolve(recipe)) == trial_id(resolve({"preset": "imagenet21k"}))

    def test_how_a_trial_is_executed_is_no_part_of_it(self) -> None:
        other = {
            "execution.device": "cuda",
            "execution.threads": 3,
            "execution.data_root": "/elsewhere",
            "execution.checkpoint_seconds": 1.0,
            "execution.keep_checkpoints": 9,
            "execution.keep_steps": [300],
            "execution.trials_root": "/elsewhere",
            "execution.weights_root": "/elsewhere",
            "execution.activation_checkpointing": True,
            "execution.network_interface": "eth0",
            "execution.no_progress_seconds": 60.0,
            "execution.program_root": "/elsewhere",
        }
        assert set(other) == {name for name in fields() if name.startswith("execution.")}
        assert trial_id(resolve({**SETTINGS, **other})) == trial_id(resolve(SETTINGS))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("seed", 2),
            ("precision", "bf16"),
            ("optim.micro_batch_size", 64),
            ("data.decode_size", 40),
            ("data.seed", 1),
            ("compile", True),
            ("model.sink", "softmax1"),
            ("model.register_mask", "detached"),
            ("model.init_from.timm", "vit_tiny_patch16_224"),
            ("optim.schedule", "dino"),
            ("optim.decay_registers", False),
            ("optim.decay_tokens", "all"),
            ("optim.weight_decay_end", 0.4),
            ("deit3.repeats", 2),
            ("deit3.mix_group_size", 64),
        ],
    )
    def test_what_a_trial_computes_is_part_of_it(self, name: str, value: object) -> None:
        assert trial_id(resolve({**SETTINGS, name: value})) != trial_id(resolve(SETTINGS))

    def test_a_setting_at_its_value_as_before_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = identity(resolve(SETTINGS))
        monkeypatch.setattr(config, "AS_BEFORE", {**config.AS_BEFORE, "optim.beta2": 0.999})
        assert identity(resolve(SETTINGS)) == {key: value for key, value in before.items() if key != "optim.beta2"}
        assert identity(resolve({**SETTINGS, "optim.beta2": 0.9})) == {**before, "optim.beta2": 0.9}

    def test_settings_without_effect_are_null_and_left_out(self) -> None:
        plain = resolve({**SETTINGS, "model.num_registers": 0, "model.reg_init_std": 1e-6})
        assert plain.model.reg_init_std is None
        assert trial_id(plain) == trial_id(resolve({**SETTINGS, "model.num_registers": 0}))
        own = resolve({"method": "my.own:Method", "data.train": "fashion_mnist", "data.name": "x", "deit3.flip": False})
        assert (own.deit3, own.data.scenes, own.data.name) == (None, None, None)
        assert resolve({"evaluation.probes": ["knn"]}).evaluation.linear is None

    @pytest.mark.parametrize(
        ("settings", "other"),
        [
            ({"model.num_registers": 0}, {"model.register_mask": "detached"}),
            ({"model.num_registers": 0}, {"optim.decay_registers": False}),
            ({"optim.weight_decay": 0.0}, {"optim.decay_registers": False, "optim.decay_tokens": "all"}),
            ({}, {"model.drop_path_group": 16}),
            ({}, {"optim.weight_decay_end": 0.05}),
            ({"optim.optimizer": "sgd"}, {"optim.eps": 1e-4}),
            ({"optim.schedule": "open_clip"}, {"optim.min_lr": 1e-4, "optim.warmup_lr": 1e-4}),
            ({"deit3.cutmix": 0.0}, {"deit3.mix_group_size": 16}),
            ({}, {"deit3.mix_group_size": 128}),  # the whole batch
            ({}, {"model.init_from.timm": None}),
            ({**DINO, "dino.crops.num_local": 0}, {"dino.crops.local_size": 8, "dino.crops.local_scale": [0.1, 0.2]}),
            ({**DINO, "dino.teacher_temp": 0.07}, {"dino.warmup_teacher_temp": 0.05}),
            ({**DINO, "dino.teacher_temp": 0.04}, {"dino.warmup_teacher_temp_steps": 9}),
            ({**DINOV2, "dinov2.separate_heads": False}, {"dinov2.ibot_head.prototypes": 64}),
            ({**DINOV2, "dinov2.separate_heads": False}, {"dinov2.separate_heads": True, "dinov2.ibot_head": None}),
            ({**DINOV2, "dinov2.ibot_weight": 0}, {"dinov2.ibot_head.hidden": 64}),
            ({**DINOV2, "dinov2.koleo.weight": 0}, {"dinov2.koleo.group_size": 16}),
            (
                {**DINOV2, "dinov2.mask_probability": 0, "dinov2.ibot_weight": 0},
                {"dinov2.mask_ratio": [0.2, 0.3]},
            ),
            ({**DINOV2, "dinov2.centering": "softmax"}, {"dinov2.sinkhorn_iterations": 5}),
            ({**DINOV2, "dinov2.centering": "sinkhorn"}, {"dinov2.center_momentum": 0.5}),
        ],
        ids=str,
    )
    def test_new_settings_without_effect_make_no_other_trial(
        self, settings: dict[str, object], other: dict[str, object]
    ) -> None:
        assert trial_id(resolve({**settings, **other})) == trial_id(resolve(settings))

    def test_settings_get_an_effect_back_with_what_they_belong_to(self) -> None:
        plain = resolve({"model.num_registers": 0, "optim.optimizer": "sgd", "optim.schedule": "open_clip"})
        assert (plain.optim.eps, plain.optim.min_lr, plain.optim.warmup_lr) == (None, None, None)
        given = {**flatten(plain.model_dump()), "optim.optimizer": "adamw", "optim.schedule": "timm"}
        again = resolve({**given, "model.num_registers": 4})
        assert (again.optim.eps, again.optim.min_lr, again.optim.warmup_lr) == (1e-8, 1e-5, 1e-6)
        assert (again.model.register_mask, again.optim.decay_registers) == ("full", True)
        soft = resolve({**DINOV2, "dinov2.centering": "softmax"}).dinov2
        assert soft is not None and (soft.center_momentum, soft.sinkhorn_iterations) == (0.9, None)

    def test_resolving_twice_changes_nothing(self) -> None:
        nano = {"model.size": "nano", "data.train": "fashion_mnist"}
        other = {"data.train": "image_folder", "data.name": "own"}
        shared = {**DINOV2, "dinov2.separate_heads": False, "dinov2.koleo.weight": 0}
        for settings in (SETTINGS, {"preset": "imagenet21k"}, nano, other, DINO, DINOV2, shared):
            once = resolve(settings)
            assert resolve(once.model_dump()) == once


class TestResolving:
    def test_auto_is_decided_from_the_other_settings(self) -> None:
        assert resolve({"data.train": "fashion_mnist", "model.patch_size": 8}).model.image_size == 24
        assert resolve({"model.patch_size": 14}).model.image_size == 56  # of the 64 px of scenes
        assert resolve({"data.train": "image_folder", "data.name": "x"}).data.decode_size == 256
        assert resolve({"optim.steps": 1000}).optim.warmup_steps == 50
        assert resolve({"optim.batch_size": 96}).optim.micro_batch_size == 96
        assert resolve({"optim.ema_decay": "auto", "optim.steps": 1000}).optim.ema_decay == pytest.approx(0.99)
        assert resolve({"model.num_registers": 1}).model.reg_init_std == 0.02
        assert resolve({"preset": "imagenet21k", "model.num_registers": 1}).model.reg_init_std == 1e-6

    def test_nothing_stays_auto(self) -> None:
        for settings in (SETTINGS, {"preset": "imagenet21k"}, {"data.train": "my.own:build"}):
            flat = flatten(resolve(settings).model_dump())
            assert "auto" not in {v for k, v in flat.items() if isinstance(v, str) and not is_execution(k)}

    def test_what_is_given_goes_before_the_preset(self) -> None:
        assert resolve({"preset": "imagenet21k", "optim.lr": 0.5}).optim.lr == 0.5

    def test_every_method_and_size_resolves(self) -> None:
        for method in catalog.METHODS:
            needs = {} if method in catalog.TRAINING_METHODS else {"model.weights": "weights.pth"}
            for size in catalog.MODEL_SIZES:
                assert resolve({"method": method, "model.size": size, **needs}).model.size == size

    def test_a_section_that_is_null_goes_before_what_the_preset_has_in_it(self) -> None:
        shared = resolve({**DINOV2, "dinov2.ibot_head": None, "dinov2.koleo": None}).dinov2
        assert shared is not None and (shared.ibot_head, shared.koleo, shared.separate_heads) == (None, None, False)

    def test_local_crops_are_three_sevenths_of_the_image_in_whole_patches(self) -> None:
        for image_size, patch_size, expected in ((224, 16, 96), (224, 14, 98), (32, 8, 16), (16, 16, 16)):
            sizes = {"model.image_size": image_size, "model.patch_size": patch_size}
            settings = resolve({**DINO, **sizes}).dino
            assert settings is not None and settings.crops.local_size == expected

    def test_crops_that_are_not_blurred_may_be_smaller(self) -> None:
        small = {**DINO, "model.patch_size": 4, "dino.crops.local_size": 4, "dino.crops.blur": False}
        settings = resolve(small).dino
        assert settings is not None and settings.crops.local_size == 4

    def test_without_dinos_loss_there_are_no_local_crops(self) -> None:
        both = [resolve({**DINOV2, "dinov2.dino_weight": 0, "dinov2.crops.num_local": n}) for n in (0, 8)]
        assert trial_id(both[0]) == trial_id(both[1])
        assert both[1].dinov2 is not None and both[1].dinov2.crops.num_local == 0

    def test_a_configuration_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError):
            resolve(SETTINGS).seed = 3  # type: ignore[misc]


class TestMessages:
    def test_everything_wrong_is_said_at_once(self) -> None:
        assert faults({"model.num_registers": 17, "optim.lr": float("nan"), "method": "deit4"}) == [
            "method is 'deit4', which does not exist; did you mean deit3?; allowed: deit3, openclip, dino, dinov2, "
            "pretrained, package.module:Class of your own",
            "model.num_registers is 17; allowed: a whole number from 0 to 16",
            "optim.lr is .nan; allowed: a number above 0, at most 10",
        ]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model.num_register": 1}, "model.num_register is not a field of model; did you mean num_registers?"),
            ({"model": 5}, "model is 5; allowed: a section with size, patch_size"),
            ({"optim.batch_size": True}, "optim.batch_size is true; allowed: a whole number from 1 to 1000000"),
            ({"optim.ema_decay": 1}, "optim.ema_decay is 1; allowed: a number of at least 0, below 1 or auto or null"),
            ({"model.image_size": 2000}, "model.image_size is 2000; allowed: a whole number from 1 to 1024 or auto"),
            ({"deit3.loss": "bbce"}, "deit3.loss is 'bbce'; allowed: bce or soft_ce; did you mean bce?"),
            ({"evaluation.probes": "knn"}, "evaluation.probes is 'knn'; allowed: a list of names"),
            ({"evaluation.probes": ["knn", "knn"]}, "evaluation.probes is [knn, knn]; each may be named once"),
            ({"data.name": "a/b"}, "data.name is 'a/b'; allowed: a text that matches ^[A-Za-z0-9]"),
            ({"preset": "x"}, "preset 'x' does not exist for method 'deit3'; allowed: short, nano, imagenet1k"),
            ({"deit3": None, "deit3.flip": True}, "deit3 is set to a value and to fields of its own at once"),
            ({"model.image_size": 100}, "model.patch_size 16 does not divide model.image_size 100"),
            ({"deit3": None}, "deit3 is null; method deit3 needs it"),
            ({"evaluation.knn": None}, "evaluation.knn is null; evaluation.probes names it"),
            ({"data.train": "image_folder"}, "data.name is missing: data.train image_folder needs a logical name"),
            ({"deit3.mix_group_size": 48}, "deit3.mix_group_size 48 does not divide optim.micro_batch_size 128"),
            (
                {"model.drop_path": 0.1, "model.drop_path_group": 48},
                "model.drop_path_group 48 does not divide optim.micro_batch_size 128",
            ),
            ({"method": "openclip", "data.train": "fashion_mnist"}, "method openclip needs captions; data.train fash"),
            (
                {"method": "openclip", "openclip.text_heads": 5},
                "openclip.text_heads 5 does not divide openclip.text_width 256",
            ),
            ({**DINO, "dino.teacher_temp": 0}, "dino.teacher_temp is 0; allowed: a number above 0, at most 10"),
            (
                {**DINOV2, "dinov2.teacher_temp": -1.0},
                "dinov2.teacher_temp is -1.0; allowed: a number above 0, at most 10",
            ),
            (
                {**DINO, "dino.crops.local_size": 72},
                "dino.crops.local_size 72 is larger than model.image_size 64, the side of the global crops",
            ),
            (
                {**DINOV2, "dinov2.crops.local_size": 20},
                "model.patch_size 8 does not divide dinov2.crops.local_size 20",
            ),
            (
                {**DINO, "dino.crops.global_scale": [0.5, 0.4]},
                "dino.crops.global_scale is [0.5, 0.4]; allowed: two rising numbers from 0.0001 to 1",
            ),
            (
                {**DINOV2, "optim.batch_size": 48},
                "dinov2.koleo.group_size 32 does not divide optim.micro_batch_size 48",
            ),
            (
                {**DINO, "optim.micro_batch_size": 32},
                "optim.micro_batch_size 32 is not optim.batch_size 128: the losses of method dino couple all images",
            ),
            (
                {**DINOV2, "dinov2.dino_weight": 0, "dinov2.ibot_weight": 0},
                "dinov2.dino_weight and dinov2.ibot_weight are both 0, so that nothing would be learned",
            ),
            (
                {**DINOV2, "dinov2.mask_probability": 0},
                "dinov2.mask_probability is 0, so that iBOT with dinov2.ibot_weight 1.0 has nothing to predict",
            ),
            (
                {**DINOV2, "model.image_size": 32, "model.patch_size": 16, "dinov2.mask_ratio": (0.1, 0.2)},
                "dinov2.mask_ratio [0.1, 0.2] masks none of the 4 patches of an image",
            ),
            (
                {**DINO, "model.patch_size": 4, "dino.crops.local_size": 4},
                "dino.crops.local_size 4 is too small to be blurred; allowed: from 7, or dino.crops.blur false",
            ),
            (
                {"model.init_from.file": "a.pth", "model.init_from.timm": "vit_tiny_patch16_224"},
                "model.init_from wants one of file, timm and trial; it has file and timm",
            ),
            (
                {"model.init_from.trial": "0123456789abcdef"},
                "model.init_from.step is null; it goes with model.init_from.trial alone",
            ),
            (
                {"model.init_from.file": "a.pth", "model.init_from.step": 0},
                "model.init_from.step is 0; it goes with model.init_from.trial alone",
            ),
            ({"model.init_from.trial": "../x"}, "model.init_from.trial is '../x'; allowed: a text that matches ^[0-9"),
            (
                {"model.factory": "my.own:build", "model.sink": "softmax1"},
                "model.sink 'softmax1' is what the built-in ViT can do; model.factory names another backbone, so leave",
            ),
            (
                {"model.factory": "my.own:build", "model.init_from.timm": "vit_tiny_patch16_224"},
                "model.init_from loads into the built-in ViT only",
            ),
        ],
    )
    def test_each_says_what_is_allowed(self, settings: dict[str, object], message: str) -> None:
        (found,) = faults(settings)
        assert message in found

    def test_impossible_combinations_are_all_said_and_name_their_settings(self) -> None:
        with pytest.raises(ConfigError) as caught:
            resolve({"model.image_size": 100, "optim.micro_batch_size": 3, "optim.warmup_steps": 2000})
        assert [fault.fields for fault in caught.value.faults] == [
            ("model.patch_size", "model.image_size"),
            ("optim.micro_batch_size", "optim.batch_size"),
            ("optim.warmup_steps", "optim.steps"),
        ]

    def test_a_factory_is_given_what_it_can_follow(self) -> None:
        own = {"method": "openclip", "model.factory": "my.own:build", "model.num_registers": 4}
        assert resolve(own).model.pre_norm

    def test_needs_that_the_data_do_not_meet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needy = catalog.MethodEntry(build="x:X", needs=("classes", "captions"), weights="raw", section="deit3")
        monkeypatch.setitem(catalog.METHODS, "deit3", needy)
        assert resolve({}).method == "deit3"  # scenes have captions
        message = "method deit3 needs captions; data.train fashion_mnist provides classes"
        assert faults({"data.train": "fashion_mnist"}) == [message]

    def test_the_nearest_name_is_found(self) -> None:
        names = ["model.num_registers", "model.size", "optim.lr"]
        assert did_you_mean("model.num_registres", names) == "; did you mean model.num_registers?"
        assert did_you_mean("registers", names) == "; did you mean model.num_registers?"
        assert did_you_mean("captions", names) == ""


class TestProbePresets:
    def test_a_preset_gives_what_is_not_given(self) -> None:
        linear = resolve({"evaluation.linear": {"preset": "paper", "steps": 7}}).evaluation.linear
        assert linear is not None
        assert (linear.steps, linear.batch_size, linear.blocks, linear.crops, linear.at) == (
            7,
            1_024,
            (1, 4),
            True,
            "end",
        )
        assert len(linear.learning_rates) == 13 and (linear.learning_rates[0], linear.learning_rates[-1]) == (1e-5, 0.1)

    def test_beside_the_preset_of_a_method(self) -> None:
        linear = resolve(
            {"method": "dinov2", "model.size": "nano", "evaluation.linear.preset": "grid"}
        ).evaluation.linear
        assert linear is not None and linear.blocks == (1, 4)

    def test_names_are_no_part_of_the_identity_but_their_values_are(self) -> None:
        plain, named, grid = (
            resolve({"evaluation.linear": given}) for given in ({}, {"preset": "fast"}, {"preset": "grid"})
        )
        assert trial_id(plain) == trial_id(named) != trial_id(grid)
        by_hand = {"learning_rates": list(grid.evaluation.linear.learning_rates), "blocks": [1, 4]}
        assert trial_id(grid) == trial_id(resolve({"evaluation.linear": by_hand}))
        assert not [name for name in identity(grid) if name.endswith("preset")]

    @pytest.mark.parametrize("probe", catalog.PROBES)
    def test_every_probe_has_a_paper_preset_that_runs_at_the_end_alone(self, probe: str) -> None:
        named = {"evaluation": {"probes": [probe], probe: {"preset": "paper"}}, "method": "openclip"}
        assert getattr(resolve(named).evaluation, probe).at == "end"

    def test_an_unknown_preset_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"evaluation.linear.preset is 'papers'; .* did you mean paper"):
            resolve({"evaluation.linear.preset": "papers"})

    def test_a_probe_that_is_off_needs_none(self) -> None:
        config = resolve({"evaluation": {"probes": ["knn"], "linear": {"preset": "paper"}}})
        assert config.evaluation.linear is None
        assert trial_id(config) == trial_id(resolve({"evaluation.probes": ["knn"]}))


class TestDataOfProbes:
    def test_what_a_probe_needs_its_own_data_must_provide(self) -> None:
        settings = {"evaluation.probes": ["segmentation"], "data.train": "fashion_mnist"}
        with pytest.raises(
            ConfigError, match=r"probe segmentation needs segmentation; data.train fashion_mnist provides"
        ):
            resolve(settings)
        assert resolve({**settings, "evaluation.segmentation.data": ["scenes"]}).data.train == "fashion_mnist"
        with pytest.raises(ConfigError, match=r"needs depth; evaluation.depth.data fashion_mnist provides classes"):
            resolve({"evaluation.probes": ["depth"], "evaluation.depth.data": ["fashion_mnist"]})

    @pytest.mark.parametrize(
        "name", ["image_folder", "image_folder/", "image_folder/a b", "scenes/x", "sceness", "a/b:c"]
    )
    def test_names_that_are_no_data_set(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"evaluation.knn.data"):
            resolve({"evaluation.knn.data": [name]})

    @pytest.mark.parametrize("name", ["image_folder/photographs", "scenes", "my.module:build"])
    def test_names_of_data_sets(self, name: str) -> None:
        assert resolve({"evaluation.knn.data": [name]}).evaluation.knn.data == (name,)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"evaluation.knn.data": ["mine:build", "other:build"]}, "metrics would be knn/build/"),
            ({"evaluation.knn.data": ["scenes", "image_folder/k10"]}, "metrics would be knn/k10/"),
            (
                {"evaluation": {"probes": ["segmentation"], "segmentation": {"whole": True, "side": 48, "stride": 49}}},
                "evaluation.segmentation.stride 49 leaves gaps between windows of 48 px; at most 48",
            ),
            (
                {"evaluation": {"probes": ["depth"], "depth": {"min_depth": 5.0, "max_depth": 5.0}}},
                "evaluation.depth.min_depth 5.0 is not below evaluation.depth.max_depth 5.0",
            ),
        ],
    )
    def test_settings_that_leave_nothing_to_predict_or_to_tell_apart(
        self, settings: dict[str, object], message: str
    ) -> None:
        (fault,) = faults(settings)
        assert message in fault

    def test_zero_shot_needs_a_text_tower(self) -> None:
        with pytest.raises(ConfigError, match="probe zero_shot needs method openclip; method is deit3"):
            resolve({"evaluation.probes": ["zero_shot"]})
        assert resolve({"evaluation.probes": ["zero_shot"], "method": "openclip"}).evaluation.zero_shot is not None


class TestSingleSettings:
    def test_values_are_held_as_a_configuration_holds_them(self) -> None:
        assert check("optim.lr", 1) == (1.0, [])
        assert check("evaluation.knn.k", [1, 2]) == ((1, 2), [])
        assert check("model.image_size", 100) == (100, [])  # that no patch divides it shows with the patch size

    def test_every_setting_accepts_its_default(self) -> None:
        defaults = flatten(TrialConfig().model_dump())
        null = ("model.init_from", "evaluation.score")  # the sections that are null by default
        assert [defaults.pop(name) for name in null] == [None, None]
        assert list(defaults) == [name for name in fields() if name.rpartition(".")[0] not in null]
        for name, value in defaults.items():
            assert check(name, value) == (value, [])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("model.num_register", "model.num_register is not a setting of model; did you mean model.num_registers?"),
            ("lr", "lr is not a setting; did you mean optim.lr?"),
            ("steps", "steps is not a setting; did you mean optim.steps or evaluation.linear.steps"),
            ("epochs", "epochs is not a setting; did you mean optim.steps?"),
            ("registers", "registers is not a setting; did you mean model.num_registers?"),
            ("model.reg_tokens", "model.reg_tokens is not a setting of model; did you mean model.num_registers?"),
            ("dinov2.koleo", "dinov2.koleo is a section; its settings are dinov2.koleo.weight, dinov2.koleo.group_siz"),
            ("model", "model is a section; its settings are model.size, model.patch_size"),
            ("model.size.x", "model.size.x does not exist; model.size is a setting without fields of its own"),
            ("zzz", "zzz is not a setting; allowed: method, preset, seed"),
        ],
    )
    def test_unknown_names_are_explained(self, name: str, message: str) -> None:
        _, (fault,) = check(name, 1)
        assert fault.message.startswith(message)
