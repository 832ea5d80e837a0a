"""`orchestrate evaluate`: weights of others and our own, a trial, a user's backbone; what cannot be measured."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator import cli
from tests.orchestrator.sweeps import ORCHESTRATE, Small, imported_by, run
from tests.trainers.layouts import open_clip_state
from trainers import vit
from trainers.config import ModelConfig, resolve
from trainers.streams import Streams

SMALL = {
    "data.decode_size": 16,
    "data.scenes.num_train": 128,
    "data.scenes.num_validation": 32,
    "data.scenes.num_test": 32,
    "evaluation.train_images": 64,
    "evaluation.linear.steps": 20,
    "evaluation.linear.batch_size": 16,
    "evaluation.knn.k": "[20]",
    "tokens.probe_images": 16,
    "tokens.measurements": "[channels]",
    "execution.threads": 1,
    "execution.device": "cpu",
}


class Own(nn.Module):
    """A user's own backbone, which has two registers whatever it is asked for."""

    embed_dim, num_registers = 8, 2

    def __init__(self, model: ModelConfig, _streams: Streams) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, model.patch_size, model.patch_size)

    def _tokens(self, images: Tensor) -> vit.Tokens:
        patches_BND = self.embed(images).flatten(2).mT
        return vit.Tokens(patches_BND.mean(dim=1), patches_BND[:, :2], patches_BND)

    def tokens(self, images: Tensor, *, normed: bool = True) -> vit.Tokens:
        return self._tokens(images)

    def residuals(self, images: Tensor) -> Any:
        yield self._tokens(images)
        yield self._tokens(images)

    def attention(self, images: Tensor, layer: int) -> Tensor:
        length = 3 + (images.shape[-1] // self.embed.kernel_size[0]) ** 2
        return torch.full((len(images), 1, length, length), 1 / length)

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        x = vit.together(self._tokens(images))[:, None]
        return x, x, x


def failing(model: ModelConfig, _streams: Streams) -> nn.Module:
    """A user's own that divides by zero, once it knows how large images are."""
    raise ZeroDivisionError(f"no images of {int(model.image_size)} px")


def evaluate(monkeypatch: pytest.MonkeyPatch, model: str, storage: Path, *arguments: str, **changes: object) -> int:
    settings = {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = ["orchestrate", "evaluate", model, "--in-process", "--storage", str(storage), *given, *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def weights(folder: Path, registers: int = 2) -> Path:
    model = resolve({"model": {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": registers}}).model
    save_file(dict(vit.ViT(model, Streams(0)).state_dict()), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def only(storage: Path, pattern: str = "evaluate_*") -> Path:
    (found,) = storage.glob(pattern)
    return found


def test_a_file_is_measured_once_through_the_ledger(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = weights(tmp_path)
    assert evaluate(monkeypatch, str(file), tmp_path / "runs") == 0
    assert "channels/last/kurtosis" in capsys.readouterr().out
    sweep = only(tmp_path / "runs")
    assert sweep.name.startswith("evaluate_weights@")
    (trial,) = pq.read_table(sweep / "tables" / "runs.parquet").to_pylist()
    assert (trial["status"], trial["steps"], trial["model.num_registers"]) == ("finished", 0, 2)
    assert (trial["model.weights"], trial["model.image_size"]) == ("weights.safetensors", 16)
    flags = pq.read_table(sweep / "tables" / "ablation.parquet")["flags"].to_pylist()
    assert all("observational" in row for row in flags)
    assert evaluate(monkeypatch, str(file), tmp_path / "runs") == 0
    assert [path.name for path in sweep.glob("trials/*/attempts/*")] == ["1"]


def test_other_content_under_the_same_name_is_another_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert evaluate(monkeypatch, str(weights(tmp_path)), tmp_path / "runs") == 0
    assert evaluate(monkeypatch, str(weights(tmp_path, registers=0)), tmp_path / "runs") == 0
    assert len(list(only(tmp_path / "runs").glob("trials/*/result.json"))) == 2


def test_a_trial_is_measured_on_its_data_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = Small(tmp_path, steps=4, registers=(2,))
    file = small.write(seeds=[0], baseline=None)
    file.write_text(file.read_text().replace("data:\n", "data:\n    validation_fraction: 0.3\n", 1))
    monkeypatch.setattr(
        "sys.argv",
        [*small.command("--in-process")[:1], "sweep", str(file), "--in-process", "--storage", str(small.storage)],
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    (trained,) = pq.read_table(
        small.root / "tables" / "metrics.parquet", filters=[("name", "=", "test/knn/top1")]
    ).to_pylist()
    assert evaluate(monkeypatch, trained["trial_id"][:8], small.storage) == 0
    sweep = only(small.storage)
    table = sweep / "tables" / "metrics.parquet"
    (measured,) = pq.read_table(table, filters=[("name", "=", "test/knn/top1")]).to_pylist()
    assert measured["value"] == trained["value"]
    (row,) = pq.read_table(sweep / "tables" / "runs.parquet").to_pylist()
    assert (row["data.validation_fraction"], row["model.weights"]) == (0.3, trained["trial_id"])
    flags = pq.read_table(sweep / "tables" / "ablation.parquet")["flags"].to_pylist()
    assert not any("observational" in found for found in flags)
    for step, code in ((4, 0), (3, 2)):  # the last step is kept, no other
        name = f"{trained['trial_id']}@{step}:raw"
        assert evaluate(monkeypatch, name, small.storage, "--name", f"step{step}") == code


def test_a_backbone_of_ones_own_says_its_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = f"{__name__}:Own"
    assert evaluate(monkeypatch, own, tmp_path / "runs", model__patch_size=8) == 0
    (trial,) = pq.read_table(only(tmp_path / "runs") / "tables" / "runs.parquet").to_pylist()
    assert (trial["model.factory"], trial["model.num_registers"]) == (own, 2)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("nothing.pth", {}, "nothing.pth: is not there; allowed: a .safetensors file"),
        (
            "vit_smal_patch14_dinov2",
            {},
            "timm has no model 'vit_smal_patch14_dinov2'; did you mean vit_small_patch14_d",
        ),
        ("weights.safetensors", {"model__image_size": 20}, "model.patch_size 8 does not divide model.image_size 20"),
        ("weights.safetensors", {"model__num_register": 1}, "did you mean model.num_registers?"),
        ("weights.safetensors", {"optim__steps": 3}, "method pretrained trains nothing"),
        ("no.such.module:build", {}, "'no.such.module:build' cannot be loaded"),
        (f"{__name__}:failing", {}, "fails to build a backbone: ZeroDivisionError: no images of 16 px"),
        ("clip.pth", {}, "clip.pth: tensors of CLIP do not show model.mlp; give --set model.mlp=gelu"),
        ("timm_clip.pth", {"model__mlp": "gelu"}, "do not show model.norm_eps; give --set model.norm_eps=1e-5"),
        ("weights.safetensors", {"model__num_registers": 6}, "the weights have model.num_registers 2, not 6"),
        (
            "weights.safetensors",
            {"model__weights_fingerprint": '"0000000000000000"'},
            "the weights have model.weights_fi",
        ),
        ("weights.safetensors", {"model__sink": "softmax1"}, "the weights have model.sink 'none', not 'softmax1'"),
        ("empty_folder", {}, "empty_folder: is a folder; allowed: a .safetensors file"),
        ("notes.txt", {}, "notes.txt: the type .txt is not known; allowed: .safetensors, .pt, .pth, .bin, or a folder"),
        ("weights.safetensors", {"tokens__outlier_layer": 5}, "layers 0 to 4, or -1 to -5 from the last"),
    ],
)
def test_what_cannot_be_measured_is_exit_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    weights(tmp_path)
    torch.save(open_clip_state(), tmp_path / "clip.pth")
    tower = resolve({"model": {"size": "nano", "patch_size": 8, "image_size": 32, "pre_norm": True}}).model
    torch.save(vit.ViT(tower, Streams(0)).state_dict(), tmp_path / "timm_clip.pth")
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "empty_folder").mkdir()
    assert evaluate(monkeypatch, model, tmp_path / "runs", **changes) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1 and "evaluate.yaml" not in said
    assert not (tmp_path / "runs").exists()


def test_help_imports_no_torch() -> None:
    assert imported_by(["evaluate", "--help"], ["torch", "ray", "mlflow"]) == "[]"


@pytest.mark.slow
def test_through_ray_all_measurements_of_a_file_and_a_comparison_of_two(tmp_path: Path) -> None:
    """As a user would, each command a process of its own: one file evaluated, then compared with another in a sweep."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for registers in (0, 2):
        weights(folder, registers).rename(folder / f"reg{registers}.safetensors")
    small = {**SMALL, "model.image_size": 32, "data.decode_size": 32, "tokens.single_token.num_c": 3}
    del small["tokens.measurements"]
    given = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    storage = ["--storage", str(tmp_path / "runs")]
    done = run([*ORCHESTRATE, "evaluate", str(folder / "reg2.safetensors"), *given, *storage])
    assert done.returncode == 0, done.stderr
    for name in ("single_token/register_1/top1", "interventions/registers_mean/change/test/linear/top1"):
        assert name in done.stdout
    (folder_of_trial,) = only(tmp_path / "runs").glob("trials/*")
    assert {"attention.npz", "location.npz"} <= {path.name for path in folder_of_trial.iterdir()}
    settings = {name: yaml.safe_load(str(value)) for name, value in small.items()}
    sweep = {
        "name": "compared",
        "trial": {"method": "pretrained", "model.size": "nano", "model.patch_size": 8, "model.layer_scale": None}
        | settings
        | {"execution.weights_root": str(folder), "tokens.measurements": ["location"]},
        "axes": {"model.weights": ["reg0.safetensors", "reg2.safetensors"]},
        "when": [{"if": {"model.weights": "reg2.safetensors"}, "set": {"model.num_registers": 2}}],
        "baseline": {"model.weights": "reg0.safetensors"},
    }
    del sweep["trial"]["tokens.single_token.num_c"]
    (tmp_path / "compared.yaml").write_text(yaml.safe_dump(sweep))
    done = run([*ORCHESTRATE, "sweep", str(tmp_path / "compared.yaml"), *storage])
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "runs" / "compared" / "tables" / "ablation.parquet").to_pylist()
    assert all("observational" in row["flags"] for row in rows) and {row["n"] for row in rows} >= {1}
