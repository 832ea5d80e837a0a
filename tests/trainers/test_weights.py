"""Starting points: what is read, what is refused, what of a model is left as it was, and what is said about it."""

import argparse
import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional

from trainers import checkpoint, train, vit
from trainers.config import ExecutionConfig, InitFrom, resolve, trial_id
from trainers.streams import Streams
from trainers.weight_files import read_weights
from trainers.weight_layouts import Converted
from trainers.weights import fingerprint, load_into, load_weights, start_from

TRIAL = "0123456789abcdef"


def backbone(registers: int = 0, seed: int = 0, **settings: object) -> vit.ViT:
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "layer_scale": None, "num_registers": registers}
    return vit.ViT(resolve({"model": {**given, **settings}}).model, Streams(seed)).eval()


def state(registers: int = 0, **settings: object) -> dict[str, Tensor]:
    return dict(backbone(registers, seed=1, **settings).state_dict())


def converted(tensors: Mapping[str, Tensor]) -> Converted:
    return Converted("timm", dict(tensors))


def assert_holds(module: vit.ViT, tensors: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor), name


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"model": tensors, "epoch": 3},
        lambda tensors: {"state_dict": tensors, "optimizer": {"state": {}}},
        lambda tensors: {"student": {"x": torch.zeros(1)}, "teacher": tensors},
        lambda tensors: {"model": {"teacher": tensors}, "args": argparse.Namespace(lr=1e-3)},
        lambda tensors: {"method": {**{f"backbone.{n}": t for n, t in tensors.items()}, "head.x": torch.zeros(1)}},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dicts_are_found_in_official_containers(wrap: Any, suffix: str, tmp_path: Path) -> None:
    torch.save(wrap(state()), tmp_path / f"weights{suffix}")
    found = {name.removeprefix("backbone."): t for name, t in read_weights(tmp_path / f"weights{suffix}").items()}
    assert same(found, state())


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.safetensors")
    assert same(read_weights(tmp_path / "weights.safetensors"), state())


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "was_here"
    torch.save({"model": {"a": torch.zeros(1), "b": Evil(trace)}}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"evil.pth: holds code or objects \(posix.mkdir\), which is not loaded"
    ) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "absent.pth: is not there; allowed: a .safetensors file, or a .pt, .pth or .bin file"),
        ("weights.npz", b"x", "the type .npz is not known"),
        ("weights", b"x", "the type without a suffix is not known"),
        ("weights.safetensors", b"x" * 100, "is no whole safetensors file"),
        ("weights.safetensors", b"", "is no whole safetensors file"),
        ("weights.pth", b"", "weights.pth: "),
        ("weights.pth", b"<html>not found</html>", "weights.pth: "),
    ],
)
def test_files_that_hold_no_weights_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "; allowed: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds list, no state dict"),
        ({}, "holds nothing, no state dict"),
        ({"model": {"a": torch.zeros(1), "epoch": 3}}, "holds int under 'epoch', no state dict"),
        ({"a": {"b": torch.zeros(1)}}, "holds dict under 'a'"),
        ({3: torch.zeros(1)}, "holds Tensor under 3"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "weights.pth")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; allowed: "):
        read_weights(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_give_weights_or_one_clear_line(suffix: str, tmp_path: Path) -> None:
    whole = {"cls_token": torch.ones(1, 1, 4), "norm.weight": torch.ones(4)}
    path = tmp_path / f"weights{suffix}"
    save_file(whole, path) if suffix == ".safetensors" else torch.save({"model": whole}, path)
    payload, draw = path.read_bytes(), random.Random(0)
    refused = flipped = 0
    for case in range(120):
        damaged = bytearray(payload)
        if case % 2:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except ValueError as error:
            refused += 1
            flipped += case % 2
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    # A zip file has checksums; what follows its parts has none, nor has a safetensors file.
    assert flipped >= (30 if suffix == ".pth" else 5)
    assert refused >= 60, "no truncated file is taken for whole"


def test_equal_models_take_all_weights() -> None:
    ours = backbone(4)
    report = load_into(ours, converted(state(4)))
    assert report.notes == ()
    assert report.loaded == len(list(ours.parameters()))
    assert_holds(ours, state(4))


def test_registers_that_the_weights_lack_stay_as_initialised() -> None:
    ours, before = backbone(4), backbone(4).state_dict()["reg_token"]
    report = load_into(ours, converted(state()))
    assert report.notes == ("left as initialised, the weights have none: registers (reg_token)",)
    assert_holds(ours, {**state(), "reg_token": before})
    assert before.abs().min() > 0


@pytest.mark.parametrize("own", [0, 2, 8])
def test_another_number_of_registers_is_refused(own: int) -> None:
    ours, before = backbone(own), backbone(own).state_dict()
    with pytest.raises(
        ValueError, match=f"4 registers, model.num_registers is {own} .allowed: as many, or weights of 0"
    ):
        load_into(ours, converted(state(4)))
    assert_holds(ours, before)


@pytest.mark.parametrize(("sink", "names"), [("attention_bias", 8), ("value_gate", 4)])
def test_sinks_stay_as_initialised(sink: str, names: int) -> None:
    ours = backbone(sink=sink)
    report = load_into(ours, converted(state()))
    assert len(report.notes) == 1 and "weights have none: attention sinks (blocks" in report.notes[0]
    assert report.loaded == len(list(ours.parameters())) - names
    with pytest.raises(ValueError, match=r"unexpected: blocks\.\*\.attn\.\w+ \(4\).*; see model.sink"):
        load_into(backbone(), converted(state(sink=sink)))


def test_a_mask_token_goes_only_where_there_is_one() -> None:
    weights = {**state(), "mask_token": torch.full((1, 64), 0.5)}
    later = backbone()
    assert load_into(later, converted(weights)).notes == ("set aside until a method asks for it: mask token",)
    later.add_mask_token(Streams(0))
    assert_holds(later, weights)
    ours = backbone()
    ours.add_mask_token(Streams(0))
    assert load_into(ours, converted(weights)).notes == ()
    assert_holds(ours, weights)
    report = load_into(ours, converted(state()))
    assert report.notes == ("left as initialised, the weights have none: mask token (mask_token)",)


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1)])
def test_a_position_embedding_of_another_grid_is_resampled_as_the_model_resamples(
    antialias: bool, offset: float
) -> None:
    weights = state(image_size=64)
    ours = backbone(pos_antialias=antialias, pos_offset=offset)
    report = load_into(ours, converted(weights))
    assert report.notes == ("the position embedding is resampled from 8 × 8 to 4 × 4 patches",)
    grid = weights["pos_embed"][:, 1:].reshape(1, 8, 8, 64).permute(0, 3, 1, 2)
    size: dict[str, Any] = {"scale_factor": (4.1 / 8, 4.1 / 8)} if offset else {"size": (4, 4)}
    expected = functional.interpolate(grid, mode="bicubic", antialias=antialias, **size)
    loaded = ours.state_dict()["pos_embed"]
    assert torch.equal(loaded[:, :1], weights["pos_embed"][:, :1])
    assert torch.allclose(loaded[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 16, 64), atol=1e-7)
    same_size = backbone(image_size=64, pos_antialias=antialias, pos_offset=offset)
    load_into(same_size, converted(weights))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours.forward_features(x), same_size.forward_features(x), atol=1e-6)


def test_half_precision_is_widened() -> None:
    ours = backbone()
    load_into(ours, converted({name: tensor.half() for name, tensor in state().items()}))
    assert_holds(ours, {name: tensor.half().float() for name, tensor in state().items()})


def test_a_checkpoint_of_another_architecture_is_one_clear_message() -> None:
    other = vit.ViT(resolve({"model": {"size": "tiny", "image_size": 32}}).model, Streams(0))
    ours, before = backbone(), backbone().state_dict()
    with pytest.raises(ValueError) as caught:
        load_into(ours, converted(other.state_dict()), "w.pth")
    assert str(caught.value) == (
        "w.pth (layout timm): 12 blocks of width 192 and patch size 16 do not fit the model's 4 blocks of width 64 and "
        "patch size 8; see model.size and model.patch_size"
    )
    assert_holds(ours, before)


def test_of_the_same_shape_everything_that_does_not_fit_is_said_at_once() -> None:
    weights = state(layer_scale=0.1)
    weights["norm.weight"] = torch.ones(32)
    ours, before = backbone(pre_norm=True), backbone(pre_norm=True).state_dict()
    with pytest.raises(ValueError) as caught:
        load_into(ours, converted(weights), "w.pth")
    message = str(caught.value)
    assert message.startswith(
        "w.pth (layout timm): do not fit the model: missing: norm_pre.bias, norm_pre.weight; unexp"
    )
    assert "blocks.*.ls1.gamma (4)" in message and "norm.weight is (32,) where the model has (64,)" in message
    assert message.endswith("see model.layer_scale, model.pre_norm") and "\n" not in message
    assert_holds(ours, before)


def test_an_epsilon_that_the_layout_has_otherwise_is_said() -> None:
    ours = backbone(norm_eps=1e-6)
    report = load_into(ours, Converted("open_clip", state(), norm_eps=1e-5))
    assert report.notes == ("LayerNorm's epsilon is 1e-05 in open_clip, model.norm_eps is 1e-06",)


def test_the_fingerprint_is_that_of_names_types_shapes_and_bytes() -> None:
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[1]], dtype=torch.bfloat16)}
    content = b"a torch.bfloat16 (1, 1)\n" + bytes([0x80, 0x3F]) + b"b torch.float32 (2,)\n"
    content += bytes([0, 0, 0x80, 0x3F, 0, 0, 0, 0x40])
    assert fingerprint(tensors) == hashlib.sha256(content).hexdigest()[:16]


def test_a_file_is_loaded_and_what_did_not_fit_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": {**state(), "head.weight": torch.zeros(2, 64)}}, path)
    ours = backbone(2)
    with caplog.at_level("INFO", logger="trainers.weights"):
        found = start_from(ours, InitFrom(file=str(path)), ExecutionConfig())
    assert_holds(ours, state())
    assert found == fingerprint(state())
    assert f"{len(state())} tensors of {path} (layout timm, {found})" in caplog.text
    assert "left out, a head: head.weight" in caplog.text
    assert "left as initialised, the weights have none: registers" in caplog.text
    again = backbone()
    load_weights(path, again)
    assert_holds(again, state())


def test_weights_that_changed_under_their_name_are_refused_where_their_fingerprint_is_given(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(state(), path)
    found = start_from(backbone(), InitFrom(file=str(path)), ExecutionConfig())
    assert start_from(backbone(), InitFrom(file=str(path), fingerprint=found), ExecutionConfig()) == found
    torch.save({**state(), "cls_token": torch.ones(1, 1, 64)}, path)
    with pytest.raises(ValueError, match=rf"has the fingerprint [0-9a-f]{{16}}, .*fingerprint is {found}"):
        start_from(backbone(), InitFrom(file=str(path), fingerprint=found), ExecutionConfig())


def test_a_trial_whose_model_computes_otherwise_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "trials" / TRIAL / "checkpoints", (10,), mlp="quick_gelu", norm_eps=1e-5)
    execution, init = ExecutionConfig(trials_root=str(tmp_path)), InitFrom(trial=TRIAL, step=10)
    with pytest.raises(ValueError, match=r"model.mlp 'quick_gelu', not 'gelu'; model.norm_eps 1e-05, not 1e-06"):
        start_from(backbone(), init, execution)


def test_a_file_of_an_unknown_layout_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"layers.0.weight": torch.zeros(2)}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: the layout of the weights is not known"):
        start_from(backbone(), InitFrom(file=str(tmp_path / "w.pth")), ExecutionConfig())


def timm_folder(folder: Path, name: str, **arguments: Any) -> dict[str, Tensor]:
    """A random model saved as timm saves models; its weights."""
    model = timm.create_model(name, **arguments)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return dict(model.state_dict())


SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}


def test_a_timm_model_is_loaded_without_a_draw_from_the_global_generator(tmp_path: Path) -> None:
    weights = timm_folder(tmp_path, "vit_small_patch14_reg4_dinov2", **SMALL, num_classes=3)
    ours = backbone(4, layer_scale=0.1)
    before = torch.random.get_rng_state()
    start_from(ours, InitFrom(timm=f"local-dir:{tmp_path}"), ExecutionConfig())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(ours.state_dict()["pos_embed"][:, 1:], weights["pos_embed"])
    assert_holds(ours, {name: t for name, t in weights.items() if name != "pos_embed" and not name.startswith("head.")})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_base_patch16_clip_224", {}, "epsilon of LayerNorm is 1e-05 there, model.norm_eps is 1e-06"),
        ("vit_base_patch16_224", {"num_heads": 4}, "4 heads there, 2 here"),
        ("vit_base_patch16_224", {"act_layer": "quick_gelu"}, "activation is quick_gelu there, model.mlp is gelu"),
        ("vit_base_patch16_224", {"qk_norm": True}, "normalised queries and keys"),
    ],
)
def test_a_timm_model_that_computes_otherwise_is_refused(
    name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    timm_folder(tmp_path, name, **{**SMALL, **arguments})
    with pytest.raises(ValueError, match=message):
        start_from(backbone(), InitFrom(timm=f"local-dir:{tmp_path}"), ExecutionConfig())


def test_a_timm_model_that_is_no_vit_is_refused(tmp_path: Path) -> None:
    timm_folder(tmp_path, "test_resnet", num_classes=2)
    with pytest.raises(ValueError, match="is a ResNet; allowed: models that are timm VisionTransformers"):
        start_from(backbone(), InitFrom(timm=f"local-dir:{tmp_path}"), ExecutionConfig())


def test_an_unknown_timm_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'vit_smal_patch16_224'.*vit_small_patch16_224"):
        start_from(backbone(), InitFrom(timm="vit_smal_patch16_224.augreg_in1k"), ExecutionConfig())


def test_without_a_network_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"timm's test_vit\.r160_in1k cannot be had: ") as caught:
        start_from(backbone(), InitFrom(timm="test_vit.r160_in1k"), ExecutionConfig())
    assert "\n" not in str(caught.value)


def test_pretrained_weights_of_a_registered_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = timm_folder(tmp_path, "vit_tiny_patch16_224")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model.safetensors"))
    ours = vit.ViT(resolve({"model": {"size": "tiny", "image_size": 32, "layer_scale": None}}).model, Streams(0))
    found = start_from(ours, InitFrom(timm="vit_tiny_patch16_224.augreg_in21k_ft_in1k"), ExecutionConfig())
    backbone_only = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    assert found == fingerprint(backbone_only)
    assert torch.equal(ours.state_dict()["blocks.11.mlp.fc2.weight"], weights["blocks.11.mlp.fc2.weight"])


def saved(folder: Path, steps: tuple[int, ...], offset: float = 0.0, **model_settings: object) -> None:
    for step in steps:
        tensors = {f"backbone.{name}": tensor + offset + step for name, tensor in state().items()}
        teacher = {f"teacher_backbone.{name}": tensor for name, tensor in state().items()}
        method = {**tensors, **teacher, "head.weight": torch.zeros(2)}
        model = backbone(**model_settings).settings.model_dump(mode="json")
        checkpoint.save(folder, step, {"method": method, "model": model}, keep=100)


@pytest.mark.parametrize("place", ["checkpoints", "attempts/3/checkpoints"])
@pytest.mark.parametrize("above", [".", "sweep", "a/deep/er"])
def test_a_step_of_another_trial_is_found_and_its_raw_backbone_loaded(place: str, above: str, tmp_path: Path) -> None:
    saved(tmp_path / above / "trials" / TRIAL / place, (10, 20))
    ours = backbone(3)
    execution = ExecutionConfig(trials_root=str(tmp_path))
    found = start_from(ours, InitFrom(trial=TRIAL, step=10), execution)
    expected = {name: tensor + 10 for name, tensor in state().items()}
    assert_holds(ours, expected)
    assert found == fingerprint(expected)


def test_a_step_that_was_not_kept_names_those_that_were_and_the_setting(tmp_path: Path) -> None:
    saved(tmp_path / "sweep" / "trials" / TRIAL / "checkpoints", (10, 20))
    message = rf"trial {TRIAL} keeps no checkpoint of step 15 \(steps: 10, 20\); .*execution.keep_steps"
    with pytest.raises(ValueError, match=message):
        start_from(backbone(), InitFrom(trial=TRIAL, step=15), ExecutionConfig(trials_root=str(tmp_path)))


def test_a_trial_that_is_not_there_or_nowhere_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no trial {TRIAL} with checkpoints under {tmp_path}"):
        start_from(backbone(), InitFrom(trial=TRIAL, step=15), ExecutionConfig(trials_root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"execution\.trials_root is null"):
        start_from(backbone(), InitFrom(trial=TRIAL, step=15), ExecutionConfig())


def test_a_damaged_step_is_refused_unless_another_copy_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tmp_path / "one" / "trials" / TRIAL / "checkpoints"
    saved(first, (10,))
    damaged = first / "step_000000010.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    init, execution = InitFrom(trial=TRIAL, step=10), ExecutionConfig(trials_root=str(tmp_path))
    with pytest.raises(ValueError, match=r"step_000000010\.pt is damaged"):
        start_from(backbone(), init, execution)
    assert damaged.is_file(), "another trial's files stay as they are"
    saved(tmp_path / "two" / "trials" / TRIAL / "checkpoints", (10,))
    ours = backbone()
    start_from(ours, init, execution)
    assert_holds(ours, {name: tensor + 10 for name, tensor in state().items()})
    assert "is damaged" in caplog.text


def test_registers_are_inserted_at_half_of_a_run(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    torch.set_num_threads(1)
    settings = {**tiny, "optim.steps": 4, "evaluation.points": 1, "execution.keep_steps": [2]}
    first = resolve(settings)
    identity = trial_id(first)
    train.train(first, lambda *_: None, tmp_path / "sweep" / "trials" / identity, cache=data_cache)
    names = {path.name for path in (tmp_path / "sweep" / "trials" / identity / "checkpoints").glob("*.pt")}
    assert names == {"step_000000002.pt", "step_000000004.pt"}
    started = {"model.num_registers": 4, "model.init_from.trial": identity, "model.init_from.step": 2}
    second = resolve({**settings, **started, "execution.trials_root": str(tmp_path)})
    train.train(second, lambda *_: None, tmp_path / "second", cache=data_cache, should_stop=lambda: "interrupted")
    at_start = checkpoint.load_newest([tmp_path / "second" / "checkpoints"])
    half = checkpoint.read(tmp_path / "sweep" / "trials" / identity / "checkpoints" / "step_000000002.pt")
    assert at_start is not None and at_start["step"] == 0
    expected = {name: tensor for name, tensor in half["method"].items() if name.startswith("backbone.")}
    for name, tensor in expected.items():
        assert torch.equal(at_start["method"][name], tensor), name
    assert at_start["method"]["backbone.reg_token"].shape == (1, 4, 64)
    assert at_start["started_from"] == fingerprint({n.removeprefix("backbone."): t for n, t in expected.items()})
