"""Content or place: outliers planted on either are told apart under shift, flip and other resolutions."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tests.trainers.planted import BULK, HIGH, Planted, levels, metrics, numbered, statistics, subject, with_norms
from tests.trainers.runs import run
from trainers import catalog
from trainers.config import resolve
from trainers.streams import Streams
from trainers.token_settings import RecurrenceConfig
from trainers.tokens import recurrence
from trainers.tokens.recurrence import Marks, flipped, resized, shifted
from trainers.vit import ViT

PATCH = 8


def of_grid(norms: Callable[[Tensor], Tensor]) -> Planted:
    """Norms [B, h, w] from the grey levels of images; equal in two layers."""
    return Planted(lambda images: with_norms(norms(levels(images)).flatten(1).expand(2, -1, -1)))


def bright(grey: Tensor) -> Tensor:
    """Outliers where a patch is bright."""
    return torch.where(avg_pool2d(grey, PATCH) > 150, HIGH, BULK)


def placed(*cells: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Outliers at cells, whatever is in the image."""

    def norms(grey: Tensor) -> Tensor:
        found = torch.full((len(grey), grey.shape[1] // PATCH, grey.shape[2] // PATCH), BULK)
        for row, column in cells:
            found[:, row : row + 1, column : column + 1] = HIGH  # nothing where the grid has no such cell
        return found

    return norms


def measured(backbone: torch.nn.Module, pixels: np.ndarray, shift: int = 1, scales=(), **settings: Any):
    settings = {"tokens__outlier_rule": "fixed", "tokens__outlier_norm": 50.0, **settings}
    looked_at = subject(backbone, pixels, **settings)
    return list(recurrence.measure(looked_at, RecurrenceConfig(shift=shift, scales=scales)))


def spots(images: int, cells: int, each: int) -> np.ndarray:
    """Dark images of cells × cells patches, `each` of which, drawn at random, are bright."""
    rng = np.random.default_rng(0)
    grid = np.zeros((images, cells * cells), np.uint8)
    for row in grid:
        row[rng.choice(cells * cells, each, replace=False)] = 255
    pixels = np.kron(grid.reshape(images, cells, cells), np.ones((PATCH, PATCH), np.uint8))
    return np.repeat(pixels[..., None], 3, axis=3)


def test_maps_by_hand() -> None:
    assert shifted((3, 3), 1)[:, 2, 1].tolist() == [1, 0]
    assert flipped((2, 4))[:, 1].tolist() == [[1, 1, 1, 1], [3, 2, 1, 0]]
    # Centres 0.5, 1.5, 2.5, 3.5 of 4 are at 0.75, 2.25, 3.75, 5.25 of 6, and at 0.25, 0.75, 1.25, 1.75 of 2.
    assert resized((4, 4), (6, 6))[0, :, 0].tolist() == [0, 2, 3, 5]
    assert resized((4, 4), (2, 2))[1, 0].tolist() == [0, 0, 1, 1]
    assert resized((2, 4), (4, 4))[:, 1, 3].tolist() == [3, 3]


def marks(*rows: str) -> Marks:
    """One image: # is an outlier, . a normal patch, a blank is padding."""
    cells = np.array([list(row) for row in rows])[None]
    return Marks(cells == "#", cells != " ")


def test_recurrence_by_hand() -> None:
    before = marks("#..#", "##..")
    after = marks("...#", ".##.")
    # Flipped: (0, 0) recurs at its content (0, 3) alone, (0, 3) at its place alone, (1, 0) nowhere, (1, 1) at both.
    found = recurrence.recurrence(before, after, flipped((2, 4)))
    assert found == {"pairs": 4.0, "content": 2 / 4, "place": 2 / 4, "base_rate": 3 / 8}
    # Without (1, 2), which is where (1, 1) would be, that pair does not count; the base rate is of 7 patches.
    after = marks("...#", ".# .")
    found = recurrence.recurrence(before, after, flipped((2, 4)))
    assert found == {"pairs": 3.0, "content": 1 / 3, "place": 1 / 3, "base_rate": 2 / 7}


def test_a_column_that_a_flip_leaves_in_place_tells_nothing() -> None:
    found = recurrence.recurrence(marks(".#."), marks(".#."), flipped((1, 3)))
    assert found == {"pairs": 0.0}
    found = recurrence.recurrence(marks("##."), marks(".##"), flipped((1, 3)))
    assert found == {"pairs": 1.0, "content": 1.0, "place": 0.0, "base_rate": 2 / 3}


def test_recurrence_when_resized_by_hand() -> None:
    before = marks("#..#", "##..")
    # Of 4 columns the first two are in the first of 2 afterwards, and both rows in the only one.
    after = marks("#.")
    found = recurrence.recurrence_when_resized(before, after)
    assert found == {"pairs": 4.0, "recurs": 3 / 4, "base_rate": 1 / 2}
    found = recurrence.recurrence_when_resized(before, marks("# "))
    assert found == {"pairs": 3.0, "recurs": 1.0, "base_rate": 1.0}
    assert recurrence.recurrence_when_resized(marks("..", ".."), after) == {"pairs": 0.0}


def test_content_is_followed_under_a_shift() -> None:
    # The picture is a patch larger than what the model sees, so that windows show its patches as they are.
    pixels = spots(300, cells=5, each=5)
    found = metrics(measured(of_grid(bright), pixels))
    assert found["recurrence/shift/content"] == 1.0
    lit = pixels[:, ::PATCH, ::PATCH, 0] > 0
    assert found["recurrence/shift/base_rate"] == lit[:, 1:, 1:].mean()  # of the second window
    assert found["recurrence/shift/place"] == pytest.approx(0.2, abs=0.04)  # chance: 5 of 25 are bright
    both = (lit[:, 1:4, 1:4] & lit[:, 2:, 2:]).sum() / lit[:, 1:4, 1:4].sum()
    assert found["recurrence/shift/place"] == both


def test_content_is_followed_under_flips_and_at_other_resolutions() -> None:
    found = metrics(measured(of_grid(bright), spots(300, cells=4, each=3), scales=(1.5, 2.0)))
    for name, side in (("scale_1_5", 6), ("scale_2", 8)):
        assert found[f"recurrence/{name}/recurs"] == 1.0, side
        assert found[f"recurrence/{name}/base_rate"] <= 3 / 16  # of a larger grid not all cells are wholly bright
    assert found["recurrence/flip/content"] == 1.0
    assert found["recurrence/flip/base_rate"] == 3 / 16
    assert found["recurrence/flip/place"] == pytest.approx(2 / 15, abs=0.03)


def test_places_are_followed() -> None:
    found = measured(of_grid(placed((0, 1), (2, 3))), spots(20, cells=4, each=3), scales=(0.5, 1.5))
    numbers, by_name = metrics(found), statistics(found)
    # Shift: (0, 1) leaves the window; flip: both count.
    for name, pairs in (("shift", 20), ("flip", 40)):
        assert numbers[f"recurrence/{name}/place"] == 1.0
        assert numbers[f"recurrence/{name}/content"] == 0.0
        assert numbers[f"recurrence/{name}/base_rate"] == 2 / 16
        assert by_name[f"recurrence/{name}/pairs", None] == pairs
    # This backbone keeps the row and column, not the relative place, so that at 6 × 6 (0, 2) and (3, 5) are no
    # outliers, nor at 2 × 2 are (0, 0) and (1, 1).
    for name, base_rate in (("scale_1_5", 2 / 36), ("scale_0_5", 1 / 4)):
        assert numbers[f"recurrence/{name}/recurs"] == 0.0
        assert numbers[f"recurrence/{name}/base_rate"] == base_rate
        assert by_name[f"recurrence/{name}/pairs", None] == 40
    told = {name.rpartition("/")[2] for name in numbers if "scale" in name}
    assert told == {"recurs", "base_rate"}  # content and place cannot be told apart there


def test_without_outliers_there_is_no_metric() -> None:
    found = measured(of_grid(placed()), spots(5, cells=4, each=3), scales=(1.5,))
    assert metrics(found) == {}
    assert statistics(found) == {(f"recurrence/{name}/pairs", None): 0.0 for name in ("shift", "flip", "scale_1_5")}


def test_a_shift_larger_than_the_grid_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = measured(of_grid(placed((0, 1))), spots(5, cells=4, each=3), shift=4)
    assert not any("shift" in name for name in metrics(found))
    assert metrics(found)["recurrence/flip/place"] == 1.0
    assert "a shift by 4 patches leaves nothing of 4" in caplog.text


def test_a_scale_that_changes_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = measured(of_grid(placed((0, 1))), spots(5, cells=4, each=3), scales=(1.1,))
    assert not any("scale" in finding.name for finding in found)
    assert "a scale of 1.1 gives the same 4 patches" in caplog.text


def test_padding_is_no_counterpart() -> None:
    images = 6
    content = np.tile(np.array([8, 0, 32, 32], np.float32), (images, 1))  # the first column is padding
    looked_at = subject(
        of_grid(placed((0, 0), (0, 1), (1, 3))),
        numbered(images, 32),
        content=content,
        tokens__outlier_rule="fixed",
        tokens__outlier_norm=50.0,
    )
    found = list(recurrence.measure(looked_at, RecurrenceConfig(shift=1, scales=(1.5,))))
    numbers, by_name = metrics(found), statistics(found)
    # Flipped, the last column is padding: the place (1, 3) does not count, and (0, 0) is none before.
    assert by_name["recurrence/flip/pairs", None] == images
    assert (numbers["recurrence/flip/place"], numbers["recurrence/flip/content"]) == (1.0, 0.0)
    assert numbers["recurrence/flip/base_rate"] == 2 / 12  # (0, 0) is content now
    # At 40 px content begins at 10 px, so the first of 5 columns is padding. In the first window (0, 1) and (1, 3)
    # are outliers, in the second all three; (0, 1) leaves it, and (1, 3) goes to (0, 2).
    assert by_name["recurrence/shift/pairs", None] == images
    assert (numbers["recurrence/shift/place"], numbers["recurrence/shift/base_rate"]) == (1.0, 3 / 16)
    # At 48 px content begins at 12 px: the first of 6 columns is padding. (0, 1) goes to (0, 2), (1, 3) to (2, 5).
    assert by_name["recurrence/scale_1_5/pairs", None] == 2 * images
    assert numbers["recurrence/scale_1_5/base_rate"] == 2 / 30


def test_a_backbone_of_one_resolution_is_told_what_to_do() -> None:
    def norms(grey: Tensor) -> Tensor:
        if grey.shape[1] != 32:
            raise RuntimeError("images must\nbe 32 px")
        return placed((0, 1))(grey)

    pixels = spots(5, cells=4, each=3)
    assert metrics(measured(of_grid(norms), pixels))["recurrence/flip/place"] == 1.0
    with pytest.raises(ValueError, match=r"of 48 px \(images must be 32 px\).* set tokens.recurrence.scales to \[\]"):
        measured(of_grid(norms), pixels, scales=(1.5,))


@pytest.fixture(scope="module")
def spiked() -> ViT:
    """A ViT without content whose position embedding is 200 in cell (2, 2) of 8 × 8, and 0 elsewhere."""
    model = resolve({"model.size": "nano", "model.patch_size": 8, "model.image_size": 64}).model
    vit = ViT(model, Streams(0), catalog.ModelSize(8, 1, 1))
    with torch.no_grad():
        for parameter in (vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, vit.pos_embed):
            assert isinstance(parameter, Tensor)
            parameter.zero_()
        assert vit.pos_embed is not None
        vit.pos_embed[0, 1 + 2 * 8 + 2, 0] = 200.0
    return vit.train()


def test_both_ways_of_resampling_the_position_embedding_are_looked_at(spiked: ViT) -> None:
    before = {name: (value.data_ptr(), value.clone()) for name, value in spiked.state_dict().items()}
    settings = spiked.settings
    pixels = spots(4, cells=8, each=3)
    found = metrics(measured(spiked, pixels, 2, (0.5,), model__image_size=64, tokens__outlier_layer=0))
    # Halved at the middle between two cells, the cubic (a = -0.75) gives 0.59375 to each: 200 · 0.59375² = 70.5, above
    # 50. Antialiased (a = -0.5, twice as wide) it is 0.4336: 37.6, below. Of 8 × 8, (2, 2) is at (1, 1) of 4 × 4.
    assert found["recurrence/scale_0_5/plain/recurs"] == 1.0
    assert found["recurrence/scale_0_5/plain/base_rate"] == 1 / 16
    assert found["recurrence/scale_0_5/antialias/recurs"] == 0.0
    assert found["recurrence/scale_0_5/antialias/base_rate"] == 0.0
    assert (found["recurrence/flip/place"], found["recurrence/flip/content"]) == (1.0, 0.0)
    assert spiked.settings is settings and settings.pos_antialias
    assert all(part.training for part in spiked.modules())
    for name, value in spiked.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.parametrize("cell", [(2, 2), (5, 3), (3, 6)])
@pytest.mark.parametrize("with_content", [False, True])
def test_what_is_tied_to_the_position_embedding_is_at_its_place_and_moves_with_the_grid(
    spiked: ViT, cell: tuple[int, int], with_content: bool
) -> None:
    vit, at = copy.deepcopy(spiked), 1 + cell[0] * 8 + cell[1]
    with torch.no_grad():
        assert vit.pos_embed is not None
        vit.pos_embed.zero_()[0, at, 0] = 200.0
        if with_content:
            vit.patch_embed.proj.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    found = metrics(measured(vit, spots(20, 8, 9), 2, (1.5, 2.0), model__image_size=64, tokens__outlier_layer=0))
    for view in ("shift", "flip"):
        assert (found[f"recurrence/{view}/place"], found[f"recurrence/{view}/content"]) == (1.0, 0.0)
    for scale in ("1_5", "2"):
        for way in ("antialias", "plain"):
            assert found[f"recurrence/scale_{scale}/{way}/recurs"] == 1.0
            assert found[f"recurrence/scale_{scale}/{way}/base_rate"] < 6 / 144


def test_what_a_vit_reads_from_content_is_followed(spiked: ViT) -> None:
    vit = copy.deepcopy(spiked)
    with torch.no_grad():
        assert vit.pos_embed is not None
        vit.pos_embed.zero_()
        vit.patch_embed.proj.weight[0] = 50 / PATCH**2  # bright patches have about 660, dark ones about 0
        vit.patch_embed.proj.bias[0] = 300.0
    settings = {"model__image_size": 64, "tokens__outlier_layer": 0, "tokens__outlier_norm": 330.0}
    found = metrics(measured(vit, spots(50, 9, 12), 1, **settings))
    for view in ("shift", "flip"):
        assert found[f"recurrence/{view}/content"] == 1.0
        assert found[f"recurrence/{view}/place"] < 0.3


def test_variants_share_what_is_learned(spiked: ViT) -> None:
    variants = dict(recurrence._variants(spiked))
    assert {name: vit.settings.pos_antialias for name, vit in variants.items() if isinstance(vit, ViT)} == {
        "/antialias": True,
        "/plain": False,
    }
    for variant in variants.values():
        assert [id(p) for p in variant.parameters()] == [id(p) for p in spiked.parameters()]


def test_a_trial_leaves_them_all(tmp_path: Path, data_cache: Path, tiny: dict[str, Any]) -> None:
    names = ["location", "neighbors", "recurrence"]
    settings = {
        **tiny,
        "data.decode_size": 32,
        "model.num_registers": 1,
        "tokens.measurements": names,
        "tokens.outlier_rule": "fixed",
        "tokens.outlier_norm": 2.0,
        "tokens.recurrence.scales": [0.75, 1.5],
    }
    result, reports = run(settings, tmp_path, data_cache)
    assert result.status == "finished"
    middle, last = (reports[step] for step in (4, 12))
    every = {"tokens/location/outliers_per_image", "tokens/location/row_cv", "neighbors/gap", "neighbors/auroc"}
    ways = ["shift", "flip", *(f"scale_{scale}/{way}" for scale in ("0_75", "1_5") for way in ("antialias", "plain"))]
    at_end = {f"recurrence/{way}/{name}" for way in ways[:2] for name in ("content", "place", "base_rate")}
    at_end |= {f"recurrence/{way}/{name}" for way in ways[2:] for name in ("recurs", "base_rate")}
    assert every <= set(middle) and not any(name.startswith("recurrence") for name in middle)
    assert every <= set(last) and {name for name in last if name.startswith("recurrence")} == at_end
    assert "tokens/padding_fraction" not in last
    with np.load(tmp_path / "location.npz") as arrays:
        assert arrays["counts"].shape == (4, 4)
        assert arrays["counts"].sum() / 16 == last["tokens/location/outliers_per_image"]
    with np.load(tmp_path / "neighbors.npz") as arrays:
        assert arrays["mean_outlier"].sum() + arrays["mean_normal"].sum() == 16 * 16
    statistics = pq.read_table(tmp_path / "token_statistics.parquet").to_pylist()
    assert {row["step"] for row in statistics if row["name"] == "location/threshold"} == {4, 8, 12}
    assert {row["layer"] for row in statistics if row["name"] == "location/row_cv"} <= set(range(5))
    found = {row["name"] for row in statistics}
    assert {"neighbors/patch_embedding/mean/gap", "neighbors/patch_embedding/pairs/auroc"} <= found
    assert {f"recurrence/{way}/pairs" for way in ways} <= found
    per_image = pq.read_table(tmp_path / "per_image.parquet").to_pylist()
    counted = [row["value"] for row in per_image if row["metric"] == "tokens/location/outliers"]
    assert np.mean(counted) == last["tokens/location/outliers_per_image"]
