"""Weights that are measured: described from their tensors, computed as their own model does, refused where unsure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import TINY
from tests.trainers.layouts import open_clip_state
from tests.trainers.runs import run
from trainers import catalog, checkpoint, export, pretrained, vit
from trainers.config import ExecutionConfig, ModelConfig, resolve
from trainers.streams import Streams
from trainers.tokens import table as token_table
from trainers.weights import fingerprint

TRIAL = "0123456789abcdef"
SIDES = (32, 48, 24)  # of images; the position embedding was learned at 32 px


def model(**settings: object) -> ModelConfig:
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": 2, **settings}
    return resolve({"model": given}).model


def trained(**settings: object) -> vit.ViT:
    """A ViT none of whose parameters are as they were initialised."""
    module = vit.ViT(model(**settings), Streams(0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def saved(module: nn.Module, folder: Path) -> str:
    """The file's name, with `folder` as `execution.weights_root`."""
    save_file(dict(module.state_dict()), folder / "own.safetensors")
    return "own.safetensors"


def images(side: int) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(side))


def opened(name: str, execution: ExecutionConfig, **changes: object) -> vit.ViT:
    settings = {"method": "pretrained", "model.weights": name, "model.image_size": 24}
    settings |= {**pretrained.describe(name, execution), **changes}
    return pretrained.open_backbone(resolve(settings).model, execution, Streams(1))[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_registers": 0, "layer_scale": None},
        {"num_registers": 16, "mlp": "swiglu"},
        {"pre_norm": True},
    ],
)
def test_a_file_is_described_and_computes_at_any_resolution_as_its_model(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    module = trained(**settings)
    execution = ExecutionConfig(weights_root=str(tmp_path))
    found = opened(saved(module, tmp_path), execution)
    assert not found.training
    for side in SIDES:
        ours, theirs = (list(one.residuals(images(side))) for one in (found, module))
        for layer, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(vit.together(left), vit.together(right)), (side, layer)


def test_a_folder_of_timms_says_what_tensors_do_not_show(tmp_path: Path) -> None:
    module = trained(norm_eps=1e-5, mlp="quick_gelu")
    export.write(tmp_path / "folder", *export.to_timm(module.state_dict(), module.settings))
    name = f"local-dir:{tmp_path / 'folder'}"
    described = pretrained.describe(name, ExecutionConfig())
    assert (described["model.norm_eps"], described["model.mlp"]) == (1e-5, "quick_gelu")
    found = opened(name, ExecutionConfig())
    for side in SIDES:
        ours, theirs = found.tokens(images(side)), module.tokens(images(side))
        assert torch.allclose(vit.together(ours), vit.together(theirs), atol=1e-5)


def test_dinov2_without_registers_resamples_positions_as_its_code_does(tmp_path: Path) -> None:
    state = dict(trained(num_registers=0, layer_scale=1e-5).state_dict())
    state["mask_token"] = torch.zeros(1, 64)  # by which the layout is known
    save_file(state, tmp_path / "own.safetensors")
    execution = ExecutionConfig(weights_root=str(tmp_path))
    described = pretrained.describe("own.safetensors", execution)
    assert (described["model.pos_antialias"], described["model.pos_offset"]) == (False, 0.1)
    with_registers = {**state, "register_tokens": torch.zeros(1, 2, 64)}
    save_file(with_registers, tmp_path / "own.safetensors")
    assert "model.pos_offset" not in pretrained.describe("own.safetensors", execution)


def of_trial(folder: Path, **kinds: vit.ViT) -> ExecutionConfig:
    """A trial's folder with two checkpoints of these backbones."""
    prefixes = {"raw": "backbone.", "teacher": "teacher.backbone."}
    method = {f"{prefixes[kind]}{n}": t for kind, one in kinds.items() for n, t in one.state_dict().items()}
    for step, scale in ((10, 1.0), (20, 2.0)):
        state = {"model": kinds["raw"].settings.model_dump(mode="json"), "ema": None}
        state["method"] = {name: tensor * scale for name, tensor in method.items()}
        checkpoint.save(folder / "sweep" / "trials" / TRIAL / "checkpoints", step, state, keep=2)
    return ExecutionConfig(trials_root=str(folder))


def test_of_a_trial_the_newest_teacher_is_measured_unless_others_are_named(tmp_path: Path) -> None:
    raw, teacher = trained(sink="softmax1", register_mask="detached"), trained(sink="softmax1")
    execution = of_trial(tmp_path, raw=raw, teacher=teacher)
    weight = "blocks.0.attn.qkv.weight"
    expected: dict[str, Callable[[], Tensor]] = {
        TRIAL: lambda: teacher.state_dict()[weight] * 2,
        f"{TRIAL}@10": lambda: teacher.state_dict()[weight],
        f"{TRIAL}@10:raw": lambda: raw.state_dict()[weight],
    }
    for name, value in expected.items():
        assert torch.equal(opened(name, execution).state_dict()[weight], value()), name
    described = pretrained.describe(TRIAL, execution)
    assert (described["model.sink"], described["model.register_mask"]) == ("softmax1", "detached")
    assert (described["model.image_size"], described["model.num_registers"]) == (32, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{TRIAL}@15", r"keeps no checkpoint of step 15 \(steps: 10, 20\)"),
        (f"{TRIAL}:ema", "has no ema weights; it has raw"),
        ("f" * 16, "there is no trial ffff"),
    ],
)
def test_weights_that_a_trial_lacks(name: str, message: str, tmp_path: Path) -> None:
    execution = of_trial(tmp_path, raw=trained())
    with pytest.raises(ValueError, match=message):
        pretrained.describe(name, execution)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_registers": 0}, "2 registers, model.num_registers is 0"),
        ({"model.patch_size": 4}, "patch size 8 do not fit the model's 4 blocks of width 64 and patch size 4"),
        ({"model.size": "tiny"}, "4 blocks of width 64 .* do not fit the model's 12 blocks of width 192"),
        ({"model.layer_scale": 1e-4}, "see model.layer_scale"),
        ({"model.sink": "attention_bias"}, "have no blocks.0.attn.bias_k, .* what was never trained is not measured"),
        ({"model.weights_fingerprint": "0" * 16}, "has the fingerprint [0-9a-f]{16}, model.weights_fingerprint 0000"),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    name = saved(trained(), tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(name, ExecutionConfig(weights_root=str(tmp_path)), **changes)


def test_registers_that_weights_never_had_are_not_measured(tmp_path: Path) -> None:
    name = saved(trained(num_registers=0), tmp_path)
    with pytest.raises(ValueError, match=r"have no registers, and model.num_registers is 4"):
        opened(name, ExecutionConfig(weights_root=str(tmp_path)), **{"model.num_registers": 4})


def test_another_epsilon_than_the_layouts_is_refused(tmp_path: Path) -> None:
    state = dict(trained().state_dict())
    state["register_tokens"] = state.pop("reg_token")
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"epsilon of LayerNorm is 1e-06 there, model.norm_eps is 1e-05"):
        opened("own.safetensors", ExecutionConfig(weights_root=str(tmp_path)), **{"model.norm_eps": 1e-5})


@pytest.mark.parametrize("lacking", ["cls_token", "pos_embed"])
def test_a_model_without_class_token_is_one_clear_line(lacking: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in trained().state_dict().items() if name != lacking}
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=f"own.safetensors: the weights have no {lacking}, which the ViT here"):
        pretrained.describe("own.safetensors", ExecutionConfig(weights_root=str(tmp_path)))


def test_a_width_that_no_size_has_names_those_that_are_known(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in trained().state_dict().items() if not name.startswith("blocks.3.")}
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"width 64 and 3 blocks; known \(width, blocks\): nano \(64, 4\)"):
        pretrained.describe("own.safetensors", ExecutionConfig(weights_root=str(tmp_path)))


def test_a_trial_measures_weights_at_another_resolution_and_trains_nothing(tmp_path: Path, data_cache: Path) -> None:
    module = trained()
    name = saved(module, tmp_path)
    described = pretrained.describe(name, ExecutionConfig(weights_root=str(tmp_path)))
    small = {key: value for key, value in TINY.items() if not key.startswith("optim") and key != "preset"}
    settings = {**small, **described, "method": "pretrained", "model.weights": name, "model.image_size": 48}
    settings["execution.weights_root"] = str(tmp_path)
    result, reports = run(settings, tmp_path / "trial", data_cache)
    assert (result.status, result.steps, set(reports)) == ("finished", 0, {0})
    assert {"test/linear/top1", "tokens/last/outlier_fraction"} <= reports[0].keys()
    assert not (tmp_path / "trial" / "checkpoints").exists()
    rows = {(r.layer, r.token): r for r in token_table.read(tmp_path / "trial" / "token_norms.parquet")}
    assert rows[4, "patch"].statistics.count == 16 * 36  # 48 px in patches of 8
    assert described["model.weights_fingerprint"] == fingerprint(module.state_dict())


def test_a_trial_whose_sink_and_mask_have_no_parameters_is_not_measured_as_a_plain_one(tmp_path: Path) -> None:
    execution = of_trial(tmp_path, raw=trained(sink="softmax1", register_mask="detached"))
    for changes, message in (
        ({"model.sink": "none"}, "model.sink 'softmax1', not 'none'"),
        ({"model.register_mask": "full"}, "model.register_mask 'detached', not 'full'"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(TRIAL, execution, **changes)


def test_images_are_normalised_as_the_weights_expect(tmp_path: Path, data_cache: Path) -> None:
    """timm says by which mean and deviation a model was trained; the trial sees its images so, or is refused."""
    module = trained()
    tensors, configuration = export.to_timm(module.state_dict(), module.settings)
    configuration["pretrained_cfg"] |= dict(zip(("mean", "std"), catalog.NORMALIZATIONS["inception"], strict=True))
    export.write(tmp_path / "folder", tensors, configuration)
    name = f"local-dir:{tmp_path / 'folder'}"
    described = pretrained.describe(name, ExecutionConfig())
    assert described["model.normalization"] == "inception"
    with pytest.raises(ValueError, match=r"normalised with inception there, model.normalization is imagenet"):
        opened(name, ExecutionConfig(), **{"model.normalization": "imagenet"})
    small = {key: value for key, value in TINY.items() if not key.startswith("optim") and key != "preset"}
    settings = {**small, **described, "method": "pretrained", "model.weights": name, "data.decode_size": 32}
    run(settings, tmp_path / "trial", data_cache)
    with np.load(tmp_path / "trial" / "norm_map.npz") as found:
        pixels = torch.from_numpy(found["images"]).permute(0, 3, 1, 2) / 255
        *_, last = module.residuals((pixels - 0.5) / 0.5)
        norms = torch.linalg.vector_norm(last.patches_BND, dim=-1)
        assert torch.allclose(torch.from_numpy(found["norms"]).flatten(1), norms, rtol=1e-4)


def test_another_normalization_than_those_known_is_refused(tmp_path: Path) -> None:
    module = trained()
    tensors, configuration = export.to_timm(module.state_dict(), module.settings)
    configuration["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3]}
    export.write(tmp_path / "folder", tensors, configuration)
    with pytest.raises(ValueError, match=r"normalised with mean \(0.1, 0.2, 0.3\).*; known: imagenet, clip, inception"):
        pretrained.describe(f"local-dir:{tmp_path / 'folder'}", ExecutionConfig())


def test_tensors_go_before_what_a_files_name_says(tmp_path: Path) -> None:
    name = saved(trained(num_registers=2), tmp_path)
    (tmp_path / name).rename(tmp_path / "vit_base_patch16_224_reg4_mine.safetensors")
    described = pretrained.describe(
        "vit_base_patch16_224_reg4_mine.safetensors", ExecutionConfig(weights_root=str(tmp_path))
    )
    assert (described["model.size"], described["model.patch_size"], described["model.num_registers"]) == ("nano", 8, 2)


def test_of_open_clips_layout_the_activation_is_not_guessed(tmp_path: Path) -> None:
    state = {f"visual.{name}": tensor for name, tensor in open_clip_state().items()}
    save_file(state, tmp_path / "clip.safetensors")
    described = pretrained.describe("clip.safetensors", ExecutionConfig(weights_root=str(tmp_path)))
    assert "model.mlp" not in described
    assert (described["model.pre_norm"], described["model.norm_eps"]) == (True, 1e-5)
    assert described["model.normalization"] == "clip"
