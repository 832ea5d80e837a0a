"""`orchestrate evaluate`: weights of others and our own, a trial, a user's backbone; what cannot be measured."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator import cli
from tests.orchestrator.sweeps import Small, imported_by
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
    (run,) = pq.read_table(sweep / "tables" / "runs.parquet").to_pylist()
    assert (run["status"], run["steps"], run["model.num_registers"]) == ("finished", 0, 2)
    assert (run["model.weights"], run["model.image_size"]) == ("weights.safetensors", 16)
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


def test_a_backbone_of_ones_own_says_its_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = f"{__name__}:Own"
    assert evaluate(monkeypatch, own, tmp_path / "runs", model__patch_size=8) == 0
    (run,) = pq.read_table(only(tmp_path / "runs") / "tables" / "runs.parquet").to_pylist()
    assert (run["model.factory"], run["model.num_registers"]) == (own, 2)


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
    assert evaluate(monkeypatch, model, tmp_path / "runs", **changes) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1 and "evaluate.yaml" not in said
    assert not (tmp_path / "runs").exists()


def test_help_imports_no_torch() -> None:
    assert imported_by(["evaluate", "--help"], ["torch", "ray", "mlflow"]) == "[]"
