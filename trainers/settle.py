"""Decides every `auto` of a configuration from its other settings, and nulls the settings that have no effect in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers import catalog
from trainers.method_settings import DinoConfig, DinoV2Config
from trainers.score_settings import mode_of

if TYPE_CHECKING:
    from trainers.config import TrialConfig

Values = dict[str, Any]


def settle(config: TrialConfig) -> Values:
    """Nested values of `config` without `auto`, and null where a setting has no effect.

    A setting without effect that cannot be null has one value that stands for all: its default, or what it would end
    at. Settings that were there before this rule keep their values, since finished trials are found by them.
    """
    values = config.model_dump()
    _untrained(config, values)
    _sizes(config, values)
    _registers(values["model"], values["optim"])
    _lengths(values["optim"])
    _optimiser(values["optim"])
    _model(values["model"])
    if values["precision"] == "auto":
        large = catalog.MODEL_SIZES[config.model.size].width >= 384 and values["model"]["image_size"] >= 160
        values["precision"] = "bf16" if large else "fp32"  # bf16 is slower for small shapes on CPUs
    if config.data.train != "scenes":
        values["data"]["scenes"] = None
    if config.data.train in catalog.DATASETS:
        entry = catalog.DATASETS[config.data.train]
        values["data"]["name"] = values["data"]["name"] if entry.needs_name else None
        values["data"]["fit"] = values["data"]["fit"] if entry.needs_root else "crop"
    for name in catalog.PROBES:
        if name not in config.evaluation.probes:
            values["evaluation"][name] = None
    _tokens(values["tokens"])
    _score(values["evaluation"], values["optim"]["steps"])
    _methods(config, values)
    return values


def _untrained(config: TrialConfig, values: Values) -> None:
    """What only training would see, where nothing is trained."""
    if config.method not in catalog.METHODS or catalog.METHODS[config.method].trains:
        return
    values["optim"] = {**type(config.optim)().model_dump(), "steps": 0}
    values["precision"], values["compile"] = "fp32", False
    values["tokens"]["training_stream"] = False
    values["evaluation"]["points"] = 1
    plain = type(config.model)()
    for name in ("reg_init_std", "cls_init_std", "drop_path"):
        values["model"][name] = getattr(plain, name)


def _sizes(config: TrialConfig, values: Values) -> None:
    model, data = values["model"], values["data"]
    native = catalog.DATASETS[config.data.train].decode_size if config.data.train in catalog.DATASETS else None
    if model["image_size"] == "auto":
        side = data["decode_size"] if isinstance(data["decode_size"], int) else (native or 224)
        model["image_size"] = max(side // model["patch_size"], 1) * model["patch_size"]
    if data["decode_size"] == "auto":
        data["decode_size"] = native or max(model["image_size"] * 8 // 7, 8)  # the usual 256 px for 224 px


def _model(model: Values) -> None:
    if model["drop_path"] == 0.0:
        model["drop_path_group"] = None
    if not any((model["init_from"] or {}).values()):
        model["init_from"] = None


def _registers(model: Values, optim: Values) -> None:
    if model["num_registers"] == 0:
        model["reg_init_std"] = model["register_mask"] = optim["decay_registers"] = None
        return
    if model["reg_init_std"] in ("auto", None):
        model["reg_init_std"] = 0.02
    _default(model, "register_mask", "full")
    _default(optim, "decay_registers", True)


def _lengths(optim: Values) -> None:
    if optim["warmup_steps"] == "auto":
        optim["warmup_steps"] = optim["steps"] // 20
    if optim["micro_batch_size"] == "auto":
        optim["micro_batch_size"] = optim["batch_size"]
    if optim["ema_decay"] == "auto":
        optim["ema_decay"] = max(0.0, 1.0 - 10.0 / max(optim["steps"], 1))  # the initialisation weighs e^-10 at the end


def _optimiser(optim: Values) -> None:
    if optim["schedule"] == "open_clip":
        optim["min_lr"] = optim["warmup_lr"] = None
    else:
        _default(optim, "min_lr", 1e-5)
        _default(optim, "warmup_lr", 1e-6)
    if optim["optimizer"] == "sgd":
        optim["eps"] = None
    else:
        _default(optim, "eps", 1e-8)
    if optim["weight_decay_end"] == optim["weight_decay"]:
        optim["weight_decay_end"] = None
    if optim["weight_decay"] == 0.0 and optim["weight_decay_end"] is None:
        optim["decay_tokens"] = optim["decay_registers"] = None
    else:
        _default(optim, "decay_tokens", "none")


def _score(evaluation: Values, steps: int) -> None:
    """No rule where it names the last step, or where nothing is trained and there is no other."""
    score = evaluation["score"]
    if score is None or steps == 0 or (score["best"] is None and score["step"] in (None, steps)):
        evaluation["score"] = None
    elif score["best"] is None:
        score["mode"] = None
    elif score["mode"] in ("auto", None):
        score["mode"] = mode_of(score["best"])


def _tokens(tokens: Values) -> None:
    for name, entry in catalog.MEASUREMENTS.items():
        if entry.section is not None and name not in tokens["measurements"]:
            tokens[entry.section] = None
    if tokens["outlier_rule"] != "fixed":
        tokens["outlier_norm"] = None
    else:
        _default(tokens, "outlier_norm", 150.0)


def _methods(config: TrialConfig, values: Values) -> None:
    for name, entry in catalog.METHODS.items():
        if entry.section is not None and config.method != name:
            values[entry.section] = None
    if (deit3 := values["deit3"]) is not None:
        is_whole = deit3["mix_group_size"] == values["optim"]["micro_batch_size"]
        if is_whole or not (deit3["mixup"] or deit3["cutmix"]):
            deit3["mix_group_size"] = None
    for name in ("dino", "dinov2"):
        if values[name] is not None:
            if values[name].get("dino_weight") == 0.0:  # iBOT and KoLeo see the global crops alone
                values[name]["crops"]["num_local"] = 0
            _crops(values[name]["crops"], values["model"], getattr(config, name))
            _teacher_temperature(values[name])
    if values["dinov2"] is not None:
        _dinov2(values["dinov2"], values["optim"]["batch_size"])


def _crops(crops: Values, model: Values, settings: DinoConfig | DinoV2Config) -> None:
    if crops["num_local"] == 0:
        crops["local_size"], crops["local_scale"] = "auto", type(settings)().crops.local_scale
    if crops["local_size"] == "auto":
        crops["local_size"] = max(round(model["image_size"] * 3 / 7 / model["patch_size"]), 1) * model["patch_size"]


def _teacher_temperature(settings: Values) -> None:
    if settings["warmup_teacher_temp"] == settings["teacher_temp"]:
        settings["warmup_teacher_temp_steps"] = 0
    if settings["warmup_teacher_temp_steps"] == 0:
        settings["warmup_teacher_temp"] = settings["teacher_temp"]


def _dinov2(settings: Values, batch_size: int) -> None:
    if settings["mask_probability"] == 0.0:
        settings["mask_ratio"] = DinoV2Config().mask_ratio
    if settings["mask_probability"] == 0.0 or settings["mask_group_size"] == batch_size:
        settings["mask_group_size"] = None
    if settings["koleo"] is not None and settings["koleo"]["weight"] == 0.0:
        settings["koleo"] = None
    if settings["ibot_head"] is None or settings["ibot_weight"] == 0.0:
        settings["separate_heads"] = False
    if not settings["separate_heads"]:
        settings["ibot_head"] = None
    if settings["centering"] == "softmax":
        settings["sinkhorn_iterations"] = None
        _default(settings, "center_momentum", 0.9)
    else:
        settings["center_momentum"] = None
        _default(settings, "sinkhorn_iterations", 3)


def _default(section: Values, name: str, value: object) -> None:
    """Give a setting that has an effect a value where it was null."""
    if section[name] is None:
        section[name] = value
