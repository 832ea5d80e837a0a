"""Channel statistics by hand: planted massive activations, equal and single channels, padding, batches, precisions."""

import math

import numpy as np
import pytest
import torch

from tests.trainers.planted import Planted, metrics, subject
from trainers.config import resolve
from trainers.measurement import Finding, Statistic
from trainers.streams import Streams
from trainers.tokens import channels
from trainers.tokens.channels import Channels
from trainers.vit import ViT

KINDS = ("cls", "register_0", "patch")


def of(*batches: torch.Tensor, kinds: tuple[str, ...] = KINDS, padded: np.ndarray | None = None):
    """Statistics of some batches, by name and kind."""
    whole, seen = Channels(kinds), 0
    for x_BTD in batches:
        whole.update(x_BTD, None if padded is None else padded[seen : seen + len(x_BTD)])
        seen += len(x_BTD)
    return dict(zip(whole.names, whole.values().tolist(), strict=True))


def some(images: int = 6, tokens: int = 7, width: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_planted_massive_activations_are_counted_exactly() -> None:
    x = some().sign() * 0.1  # median 0.1 in image 0, 0.2 in image 1 …: 100 and 1,000 medians are 200 and more there
    x *= torch.arange(1, 7)[:, None, None]
    x[0, 0, 3] = -100.5  # class token of image 0; 1,000 medians are 100 there
    x[0, 5, 3], x[0, 6, 3], x[0, 2, 4] = 150, 99.9, -1e4  # patches, one of them not above 100
    x[1, 1, 3] = 201.0  # the register of image 1
    x[2, 1, 3] = 250.0  # above 100, below 1,000 medians of its own image
    found = of(x)
    assert found["massive", None] == 4 / 6
    assert [found["massive", kind] for kind in KINDS] == [1 / 6, 1 / 6, 2 / 6]
    # The largest |x| of an image, and of its kinds of token; 0.4, 0.5 and 0.6 where nothing is planted.
    assert found["top1", None] == pytest.approx((1e4 + 201 + 250 + 0.4 + 0.5 + 0.6) / 6)
    assert found["top2", None] == pytest.approx((150 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6) / 6)
    assert found["top3", None] == pytest.approx((100.5 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6) / 6)
    assert found["top1", "patch"] == pytest.approx((1e4 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6) / 6)
    assert found["top1", "register_0"] == pytest.approx((0.1 + 201 + 250 + 0.4 + 0.5 + 0.6) / 6)
    assert found["median", None] == pytest.approx(0.35)


def test_massive_is_at_least_1_000_medians() -> None:
    x = torch.full((1, 3, 8), 0.125)  # exact in binary: 1,000 medians are 125
    x[0, 2, :3] = torch.tensor([125.0, 124.9, -126.0])
    assert of(x)["massive", None] == 2
    x[0, 2, :4] = torch.tensor([100.0, 99.9, -100.1, 90.0])
    x[0, :2] = 0.0625
    assert of(x)["massive", None] == 1  # all of these are 1,000 medians, of 0.0625


def test_batches_do_not_matter() -> None:
    x = some(seed=3) * torch.logspace(-2, 3, 6)[:, None, None]  # images of different scale, some of them massive
    x[:, 2, 5] *= 3e3
    whole = of(x)
    assert 0 < whole["massive", None] < 7
    for parts in (x.split(1), x.split([2, 4]), x.flip(0).split(4)):
        other = of(*parts)
        assert other == pytest.approx(whole, rel=1e-12)
        exact = ("massive", "median", "top1")
        assert all(other[name, None] == pytest.approx(whole[name, None], rel=1e-15) for name in exact)


def test_agrees_with_numpy() -> None:
    x = some(seed=1)
    size = x.double().abs().numpy()
    found = of(x[:4], x[4:])
    top = np.sort(size.reshape(6, -1))[:, ::-1]
    assert [found[f"top{rank}", None] for rank in (1, 2, 3)] == pytest.approx(list(top[:, :3].mean(0)), rel=1e-12)
    assert found["median", None] == pytest.approx(np.median(size.reshape(6, -1), axis=1).mean(), rel=1e-12)
    assert found["max_over_median", None] == pytest.approx((size.max(2) / np.median(size, axis=2)).mean(), rel=1e-12)
    rms = np.sqrt((size**2).mean(axis=(0, 1)))
    assert found["kurtosis", None] == pytest.approx((rms**4).mean() / (rms**2).mean() ** 2, rel=1e-12)


def test_kurtosis_is_1_for_equal_channels_and_the_width_for_one() -> None:
    assert of(some().sign() * 3)["kurtosis", None] == pytest.approx(1.0, rel=1e-14)
    single = torch.zeros(6, 7, 9)
    single[..., 4] = some()[..., 4]
    assert of(single)["kurtosis", None] == pytest.approx(9.0, rel=1e-14)
    two = torch.zeros(6, 7, 8)
    two[..., :2] = 5
    assert of(two)["kurtosis", None] == pytest.approx(4.0, rel=1e-14)


def test_max_over_median_by_hand() -> None:
    tokens = torch.tensor([[[1.0, -2.0, 4.0], [1.0, 1.0, -10.0], [0.0, 0.0, 0.0]]])
    assert of(tokens)["max_over_median", None] == (2 + 10) / 2  # a token of zeros has none
    tokens[0, 2, 0] = 1.0
    assert of(tokens)["max_over_median", None] == math.inf
    even = torch.tensor([[[1.0, 2.0, 3.0, 8.0]] * 3])
    assert of(even)["max_over_median", None] == 4.0  # the lower of the two in the middle


def test_zeros_have_no_ratios() -> None:
    found = of(torch.zeros(2, 3, 4))
    assert math.isnan(found["kurtosis", None]) and math.isnan(found["max_over_median", None])
    assert (found["massive", None], found["top1", None], found["median", None]) == (0, 0, 0)


def test_padding_is_left_out() -> None:
    x = some(seed=2)
    padded = np.zeros((6, 5), bool)
    padded[1, 2:], padded[4, :3] = True, True
    spoilt = x.clone()
    spoilt[:, 2:][torch.from_numpy(padded)] = 1e6
    stays = torch.from_numpy(np.insert(~padded, [0, 0], True, axis=1))
    found = of(spoilt[:2], spoilt[2:], padded=padded)
    assert found == pytest.approx(of(*(x[i : i + 1, stays[i]] for i in range(6))), rel=1e-12)
    assert found != pytest.approx(of(x), rel=1e-3)
    assert of(x, padded=np.zeros((6, 5), bool)) == of(x)


def test_tokens_that_are_nan_are_left_out_as_padding_is() -> None:
    x = some(seed=2)
    gone = np.zeros((6, 5), bool)
    gone[1, 2:], gone[4, :3] = True, True
    deleted = x.clone()
    deleted[:, 2:][torch.from_numpy(gone)] = torch.nan
    found = of(deleted)
    assert all(math.isfinite(value) for value in found.values())
    assert found == of(x, padded=gone)
    both = np.zeros((6, 5), bool)
    both[0, 0] = True
    assert of(deleted, padded=both) == of(x, padded=gone | both)


def test_bf16_is_exact_and_near_float32() -> None:
    x = some(seed=4) * 40
    x[:, 1, 2] = 5e4
    half = of(x.bfloat16())
    assert half == of(x.bfloat16().float())
    exact = of(x)
    assert half == pytest.approx(exact, rel=2**-7)  # bf16 rounds by at most 2⁻⁹, squared twice for the kurtosis
    assert half["massive", None] == exact["massive", None] == 1.0


@pytest.fixture(scope="module")
def spiked() -> ViT:
    """A ViT of 16 patches and 2 registers, in which patch 3 carries one huge channel from the first layer on."""
    settings = {"model.size": "nano", "model.patch_size": 8, "model.image_size": 32, "model.num_registers": 2}
    backbone = ViT(resolve(settings).model, Streams(0)).eval()
    with torch.no_grad():
        backbone.pos_embed[0, 1 + 3, 7] = 1e5
    return backbone


def pixels(images: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)


def table(found: list[Finding]) -> dict[tuple[str, int | None, str | None], float]:
    return {(row.name, row.layer, row.token): row.value for row in found if isinstance(row, Statistic)}


def test_every_layer_of_a_backbone_and_metrics_of_the_last(spiked: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = subject(spiked, pixels(), tokens__detail_images=7)
    found = list(channels.measure(looked_at, None))
    rows = table(found)
    kinds = ("cls", "register_0", "register_1", "patch")
    names = [(name, None) for name in ("kurtosis", "max_over_median", "massive", "median", "top1", "top2", "top3")]
    names += [(name, kind) for name in ("massive", "top1") for kind in kinds]
    assert set(rows) == {(f"channels/{name}", layer, kind) for layer in range(5) for name, kind in names}
    for layer in range(5):
        assert [rows["channels/massive", layer, kind] for kind in (None, *kinds)] == [1, 0, 0, 0, 1]
        assert rows["channels/top1", layer, None] == pytest.approx(1e5, rel=1e-3)
        assert rows["channels/top2", layer, None] < 100
        assert rows["channels/kurtosis", layer, None] == pytest.approx(64, rel=1e-3)
    last = {name: rows[f"channels/{name}", 4, None] for name in ("kurtosis", "max_over_median", "massive")}
    assert metrics(found) == {f"channels/last/{name}": value for name, value in last.items()}
    assert table(list(channels.measure(subject(spiked, pixels()[:7]), None))) == rows
    monkeypatch.setattr(channels, "DETAIL_CHUNK", 2)
    again = table(list(channels.measure(looked_at, None)))
    assert again == pytest.approx(rows, rel=1e-5)  # but for the rounding of the forward pass


def test_padding_and_a_backbone_without_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches are 1 in channels 0 and 1; the lowest row is huge in channel 2 instead, and padding in images 1 and 2."""

    def plant(images: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(2, len(images), 4, 4, 8)
        x[..., :2] = 1
        x[:, :, 3] = torch.eye(8)[2] * 1e4
        return x.flatten(2, 3)

    monkeypatch.setattr(channels, "DETAIL_CHUNK", 2)
    content = np.array([[0, 0, 32, 32], [0, 0, 32, 24], [0, 0, 32, 24]], np.float32)  # px of 32 × 32
    rows = table(list(channels.measure(subject(Planted(plant), pixels(3), content=content), None)))
    for layer in (0, 1):
        assert rows["channels/massive", layer, None] == rows["channels/massive", layer, "patch"] == 4 / 3
        assert rows["channels/top1", layer, None] == (1e4 + 1 + 1) / 3
        assert rows["channels/kurtosis", layer, None] == pytest.approx(8, rel=1e-5)
        assert ("channels/max_over_median", layer, None) not in rows  # 6 of 8 channels are 0: it is infinite
    assert {kind for _, _, kind in rows} == {None, "patch"}
    found = list(channels.measure(subject(Planted(plant), pixels(3), content=content[[1, 1, 1]]), None))
    assert metrics(found)["channels/last/kurtosis"] == 4.0  # 2 of 8 channels
    assert metrics(found)["channels/last/massive"] == 0.0
    assert "channels/last/max_over_median" not in metrics(found)
