"""Maps and pictures of attention at the end of a trial: what they show, and that they take bounded memory."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tests.trainers.attended import PREFIX, backbone, ended, given, pixels, rows
from tests.trainers.planted import metrics, numbered, subject
from tests.trainers.runs import run
from trainers.measurement import Arrays, Finding, Picture
from trainers.tokens import attention
from trainers.tokens.attention import divergence

MEAN_MAPS = ("mean_of_heads_0", "mean_of_heads_1", "mean_of_heads_average")


def decoded(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def kept(found: list[Finding]) -> tuple[dict[str, NDArray[Any]], dict[str, Image.Image]]:
    """The arrays, and the pictures decoded by name."""
    (arrays,) = (dict(finding.arrays) for finding in found if isinstance(finding, Arrays))
    return arrays, {finding.name: decoded(finding.png) for finding in found if isinstance(finding, Picture)}


def test_maps_are_the_last_blocks_attention_to_patches() -> None:
    ours, looked_at = backbone(), ended(subject(backbone(), pixels(10), tokens__detail_images=9))
    arrays, pictures = kept(list(attention.measure(looked_at, None)))
    (views,) = looked_at.batches(pixels(10)[:9])
    with torch.no_grad():
        weights = ours.attention(views, 4)[..., 3:]
    expected = weights[:, :, :3].mean(1).unflatten(-1, (4, 4)).numpy()
    np.testing.assert_allclose(arrays["maps"], expected[:8], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(arrays["average"], expected.mean(0), rtol=1e-5)
    np.testing.assert_allclose(arrays["cls_heads"], weights[:8, :, 0].unflatten(-1, (4, 4)), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(arrays["images"], pixels(10)[:8])
    assert (arrays["maps"].dtype, arrays["average"].dtype, arrays["images"].dtype) == ("float32", "float32", "uint8")
    assert arrays["tokens"].tolist() == list(PREFIX)
    assert (int(arrays["layer"]), int(arrays["averaged_images"]), str(arrays["head_reduction"])) == (4, 9, "mean")
    assert not any(values.dtype == object for values in arrays.values())
    assert {name: picture.size for name, picture in pictures.items()} == {
        f"last_block_{name}": (480, 6 + 3 * 14 + (1 if "average" in name else 4) * (96 + 14 + 6))
        for name in (*MEAN_MAPS, "cls_0", "cls_1")
    }


def held(thing: Any) -> int:
    """How many numbers the tensors hold that an object keeps, storage and all."""
    if isinstance(thing, Tensor):
        return thing.untyped_storage().nbytes() // thing.element_size()
    return sum(map(held, thing)) if isinstance(thing, list | tuple) else 0


def test_what_is_kept_on_the_device_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CHUNK_VALUES", 3 * 19 * 19 * 5)
    kept = [
        sum(map(held, vars(attention._Survey(ended(subject(backbone(), pixels(count))))).values()))
        for count in (10, 40)
    ]
    assert kept[0] == kept[1] > 8 * (3 + 2) * 16  # maps of 8 images: 3 tokens and 2 heads


def test_fewer_images_than_are_drawn_are_all_drawn() -> None:
    arrays, _ = kept(list(attention.measure(ended(subject(backbone(), pixels(3))), None)))
    assert arrays["maps"].shape == (3, 3, 4, 4) and arrays["cls_heads"].shape == (3, 2, 4, 4)
    np.testing.assert_allclose(arrays["average"], arrays["maps"].mean(0), rtol=1e-6)


def test_padding_has_no_map_and_counts_in_no_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CHUNK_VALUES", 3 * 19 * 19 * 2)  # two images at a time
    content = np.array([[0, 0, 32, 32], [0, 0, 32, 24], [0, 0, 32, 24], [0, 0, 32, 32], [0, 0, 32, 24]], np.float32)
    model = given()
    looked_at = ended(subject(model, numbered(5, 32), content=content))
    found = list(attention.measure(looked_at, None))
    arrays, pictures = kept(found)
    assert pictures["last_block_mean_of_heads_1"].getpixel((20, 60)) == (4, 4, 4)  # the fifth image alone
    expected = model.table[-1].mean(1)[:, :3, 3:].unflatten(-1, (4, 4)).double().numpy()
    np.testing.assert_array_equal(
        np.isnan(arrays["maps"]).all(axis=(1, 3)), np.array([[0, 0, 0, n] for n in (0, 1, 1, 0, 1)])
    )
    np.testing.assert_allclose(arrays["average"][:, :3], expected[:, :, :3].mean(0), rtol=1e-5)
    np.testing.assert_allclose(arrays["average"][:, 3], expected[[0, 3], :, 3].mean(0), rtol=1e-5)
    cut = expected[:, 1:].copy()
    cut[[1, 2, 4], :, 3] = 0
    value = divergence(torch.from_numpy(cut).flatten(2)).mean().item()
    assert metrics(found)["attention/last/register_divergence"] == pytest.approx(value, rel=1e-5)
    last = model.table[-1, :, 0, 0].double().numpy()
    on_padding = rows(found)["attention/cls/padding", 2, 0, None]
    assert on_padding == pytest.approx(last[[1, 2, 4], 15:].sum() / 5, rel=1e-5)


def test_a_picture_shows_each_map_in_its_place() -> None:
    maps = np.zeros((2, 2, 2, 4), np.float32)
    maps[0, 0, 0, 1], maps[0, 0, 1, 3] = 0.25, 0.125
    maps[1, 1] = np.nan
    photographs = np.stack([np.full((5, 5, 3), 200, np.uint8), np.full((5, 5, 3), 90, np.uint8)])
    picture = decoded(attention.draw("A title", ["cls", "register_0"], maps, photographs))
    assert picture.size == attention.picture_size(3, 2, (2, 4)) == (480, 6 + 3 * 14 + 2 * (48 + 14 + 6))

    def pixel(row: int, column: int, cell: tuple[float, float]) -> tuple[int, ...]:
        """At a patch's middle; cells are 96 × 48 px, patches 24 px."""
        left, top = 6 + column * (96 + 6), 6 + 3 * 14 + row * (48 + 14 + 6)
        return picture.getpixel((left + int(24 * (cell[1] + 0.5)), top + int(24 * (cell[0] + 0.5))))

    assert (pixel(0, 0, (0, 0)), pixel(1, 0, (1, 3))) == ((200,) * 3, (90,) * 3)
    viridis = matplotlib.colormaps["viridis"]
    for cell, value in {(0, 1): 1.0, (1, 3): 0.5, (0, 0): 0.0, (1, 1): 0.0}.items():
        np.testing.assert_allclose(pixel(0, 1, cell), 255 * np.array(viridis(value)[:3]), atol=6)
    np.testing.assert_allclose(pixel(0, 2, (0, 0)), 255 * np.array(viridis(0.0)[:3]), atol=6)  # all zeros
    assert pixel(1, 2, (0, 2)) == (128,) * 3
    many = np.ones((1, 24, 37, 37), np.float32)
    many[0, 0] = 0
    wide = decoded(attention.draw("Many", [f"head {i}" for i in range(24)], many))
    assert wide.size == (6 + 24 * (111 + 6), 6 + 3 * 14 + 111 + 14 + 6)
    ends = wide.getpixel((60, 100)), wide.getpixel((60 + 23 * 117, 100))
    np.testing.assert_allclose(ends, 255 * np.array([viridis(0.0)[:3], viridis(1.0)[:3]]), atol=1)
    ramp = np.linspace(0, 3, 256, dtype=np.float32)
    expected = matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255
    assert np.abs(attention.colors(ramp) - expected).max() < 6
    np.testing.assert_array_equal(attention.colors(np.float32([1.5, 3])), attention.colors(ramp)[[127, 255]])


def test_a_trial_leaves_maps_pictures_and_rows(tmp_path: Path, data_cache: Path, tiny: dict[str, Any]) -> None:
    names = ["channels", "attention", "similarity"]
    settings = {**tiny, "model.num_registers": 2, "tokens.measurements": names, "tokens.detail_images": 5}
    result, reports = run(settings, tmp_path, data_cache)
    assert result.status == "finished"
    own = {
        *(f"channels/last/{name}" for name in ("kurtosis", "max_over_median", "massive")),
        *(f"attention/last/{name}" for name in attention.METRICS if name != "cls/sink"),
        "attention/last/register_divergence",
        *(f"similarity/last/{name}" for name in ("cls_patch", "neighbors", "registers", "registers_max")),
    }
    found = {"channels", "attention", "similarity"}
    for step in (4, 8, 12):
        assert {name for name in reports[step] if name.split("/")[0] in found} == own
    with np.load(tmp_path / "attention.npz") as arrays:
        assert arrays["maps"].shape == (5, 3, 2, 2)
        assert arrays["images"].shape == (5, 16, 16, 3)
        assert arrays["tokens"].tolist() == list(PREFIX)
        assert 0 < arrays["maps"].sum() < 5 * 3
    sizes = {path.stem: decoded(path.read_bytes()).size for path in (tmp_path / "attention").glob("*.png")}
    assert set(sizes) == {f"last_block_{name}" for name in (*MEAN_MAPS, "cls_0", "cls_1")}
    assert sizes["last_block_mean_of_heads_1"] == attention.picture_size(4, 1, (2, 2))
    table = pq.read_table(tmp_path / "token_statistics.parquet").to_pylist()
    kept = [row for row in table if row["name"] == "attention/cls/registers" and row["token"] == "register_1"]
    assert {(row["step"], row["layer"], row["head"]) for row in kept} == {
        (step, layer, head) for step in (4, 8, 12) for layer in (1, 2, 3, 4) for head in (0, 1)
    }
    assert {row["layer"] for row in table if row["name"] == "similarity/cls_patch"} == {0, 1, 2, 3, 4}
    assert {row["token"] for row in table if row["name"] == "channels/massive"} == {None, *PREFIX, "patch"}
