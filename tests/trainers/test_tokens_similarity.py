"""Cosines between tokens by hand: class and patches, neighbours, registers; padding, what is undefined, precisions."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainers.planted import WIDTH, Planted, metrics, numbered, statistics, subject
from trainers import vit
from trainers.config import resolve
from trainers.streams import Streams
from trainers.tokens import similarity
from trainers.vit import Tokens

AXES = torch.eye(WIDTH)


class Whole(Planted):
    """Patches from `plant`; class token and registers of every layer and image are given."""

    def __init__(self, plant, cls: Tensor | None, registers: Tensor) -> None:
        super().__init__(plant)
        self.cls, self.registers, self.num_registers = cls, registers, len(registers)

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        for tokens in super().residuals(images):
            cls_BD = None if self.cls is None else self.cls.expand(len(images), -1)
            yield Tokens(cls_BD, self.registers.expand(len(images), -1, -1), tokens.patches_BND)


def on_grid(kinds: np.ndarray, layers: int = 2):
    """Patches [4, 4] along the axes that `kinds` names, zeros where it is -1; the first layer is all of axis 0."""
    last = torch.cat([AXES, torch.zeros(1, WIDTH)])[torch.from_numpy(kinds.reshape(-1))] * 7.0
    first = AXES[0].expand(16, WIDTH)
    return lambda images: torch.stack([first, *[last] * (layers - 1)])[:, None].expand(-1, len(images), -1, -1)


# The left half along axis 0, the right half along axis 1.
HALVES = np.array([[0, 0, 1, 1]] * 4)
NO_REGISTERS = torch.zeros(0, WIDTH)


def measured(backbone: torch.nn.Module, images: int = 3, **settings):
    return list(similarity.measure(subject(backbone, numbered(images, 32), **settings), None))


def test_by_hand() -> None:
    # At 60° from axis 0 and at 30° from axis 1.
    cls = 5 * (0.5 * AXES[0] + math.sqrt(0.75) * AXES[1])
    # Cosines 0.6, 0 and 0.8.
    registers = torch.stack([AXES[2], 0.6 * AXES[2] + 0.8 * AXES[3], 9 * AXES[3]])
    found = measured(Whole(on_grid(HALVES), cls, registers))
    # Of 4 columns the outer ones are like all their neighbours. The inner ones differ from one: of 3 at the upper and
    # the lower border, of 4 inside.
    expected = {
        "cls_patch": (0.5 + math.sqrt(0.75)) / 2,
        "neighbors": (8 * 1 + 4 * (2 / 3) + 4 * (3 / 4)) / 16,
        "registers": (0.6 + 0 + 0.8) / 3,
        "registers_max": 0.8,
    }
    assert metrics(found) == pytest.approx({f"similarity/last/{name}": v for name, v in expected.items()}, rel=1e-6)
    first = {"cls_patch": 0.5, "neighbors": 1.0} | {name: expected[name] for name in ("registers", "registers_max")}
    by_layer = {(f"similarity/{name}", 0): value for name, value in first.items()}
    by_layer |= {(f"similarity/{name}", 1): value for name, value in expected.items()}
    assert statistics(found) == pytest.approx(by_layer, rel=1e-6)


def test_what_is_undefined_is_absent() -> None:
    found = measured(Whole(on_grid(HALVES), None, AXES[:1]))
    assert metrics(found) == pytest.approx({"similarity/last/neighbors": (8 + 8 / 3 + 3) / 16})
    assert set(metrics(measured(Whole(on_grid(HALVES), AXES[0], NO_REGISTERS)))) == {
        "similarity/last/cls_patch",
        "similarity/last/neighbors",
    }
    zeros = measured(Whole(on_grid(np.full((4, 4), -1)), AXES[0], torch.zeros(2, WIDTH)))
    assert metrics(zeros) == {}
    assert set(statistics(zeros)) == {("similarity/cls_patch", 0), ("similarity/neighbors", 0)}


def test_zeros_and_padding_are_left_out() -> None:
    kinds = HALVES.copy()
    kinds[3] = [2, 3, 2, 3]  # the lowest row, which is padding in two of three images
    kinds[0, 0] = -1
    boxes = np.array([[0, 0, 32, 32], [0, 0, 32, 24], [0, 0, 32, 24]], np.float32)  # px of 32 × 32
    backbone = Whole(on_grid(kinds), AXES[0], NO_REGISTERS)
    looked_at = subject(backbone, numbered(3, 32), content=boxes)
    found = metrics(list(similarity.measure(looked_at, None)))
    # Along the class token: 2 + 2 + 1 patches of 16 - 1 or, without the lowest row, of 12 - 1.
    assert found["similarity/last/cls_patch"] == pytest.approx((5 + 5 + 5) / (15 + 11 + 11))
    # Sums over rows of each patch's mean over its neighbours; the zeros at (0, 0) have none, and are none to others.
    first, second = (1 / 2 + 2 / 3 + 1), (1 + 3 / 4 + 3 / 4 + 1)
    whole = first + second + (2 / 3 + 2 / 4 + 2 / 4 + 2 / 3) + 0
    cut = first + second + (1 + 2 / 3 + 2 / 3 + 1)
    assert found["similarity/last/neighbors"] == pytest.approx((whole + 2 * cut) / (15 + 11 + 11))


def backbone(registers: int) -> vit.ViT:
    settings = {"model.size": "nano", "model.patch_size": 8, "model.image_size": 32, "model.num_registers": registers}
    return vit.ViT(resolve({**settings, "model.layer_scale": 0.5}).model, Streams(0)).eval()


def pixels(images: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)


def test_agrees_with_torch_and_reads_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = backbone(3)
    looked_at = subject(ours, pixels(), tokens__detail_images=5)
    found = list(similarity.measure(looked_at, None))
    (views,) = looked_at.batches(pixels()[:5])
    with torch.no_grad():
        layers = list(ours.residuals(views))
    cos = torch.nn.functional.cosine_similarity
    for layer, (cls_BD, registers_BRD, patches_BND) in enumerate(layers):
        to_class = cos(patches_BND, cls_BD[:, None], dim=-1).mean().item()
        assert statistics(found)["similarity/cls_patch", layer] == pytest.approx(to_class, rel=1e-4, abs=1e-6)
        pairs = [cos(registers_BRD[:, i], registers_BRD[:, j]).mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
        assert statistics(found)["similarity/registers", layer] == pytest.approx(sum(pairs) / 3, rel=1e-4, abs=1e-6)
        assert statistics(found)["similarity/registers_max", layer] == pytest.approx(max(pairs), rel=1e-4, abs=1e-6)
    for name in ("", "_max"):  # registers enter the first block as they are
        parameters = statistics(found)[f"similarity/register_parameters{name}", None]
        assert parameters == pytest.approx(statistics(found)[f"similarity/registers{name}", 0], abs=1e-6)
    monkeypatch.setattr(similarity, "DETAIL_CHUNK", 2)
    again = statistics(list(similarity.measure(looked_at, None)))
    assert again == pytest.approx(statistics(found), rel=1e-4, abs=1e-6)
    assert not any("parameters" in name for name, _ in statistics(list(measured(backbone(1)))))


def test_registers_that_start_alike_stay_alike() -> None:
    ours = backbone(4)
    with torch.no_grad():
        ours.reg_token.copy_(ours.reg_token[:, :1].expand(-1, 4, -1))
    found = metrics(list(similarity.measure(subject(ours, pixels(3)), None)))
    assert found["similarity/last/registers"] == pytest.approx(1, abs=1e-6)
    assert found["similarity/last/registers_max"] == pytest.approx(1, abs=1e-6)


def test_bf16_is_near_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    cls, registers, patches = (torch.randn(4, n, 64, generator=generator) + 0.5 for n in (1, 3, 16))
    tokens = Tokens(cls[:, 0], registers, patches)
    halves = Tokens(*(part.bfloat16() for part in tokens))
    for exact, half in zip(
        (similarity.to_class(tokens), similarity.among(registers)),
        (similarity.to_class(halves), similarity.among(halves.registers_BRD)),
        strict=True,
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=0, atol=2**-8)
    rounded = Tokens(*(part.float() for part in halves))
    torch.testing.assert_close(similarity.to_class(halves), similarity.to_class(rounded), rtol=0, atol=0)


def test_another_number_of_patches_is_said() -> None:
    looked_at = subject(Whole(on_grid(HALVES), AXES[0], NO_REGISTERS), numbered(2, 32), model__patch_size=4)
    with pytest.raises(ValueError, match="16 patches an image, not the 8 × 8"):
        list(similarity.measure(looked_at, None))
