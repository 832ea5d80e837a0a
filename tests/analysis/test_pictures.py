"""Pictures of planted numbers: what they say in words, and that they are drawn of whatever trials left."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from analysis.figures import maps, sheet, style
from analysis.figures.maps import AttentionMaps, NormMap
from analysis.pictures import Pictures
from analysis.schemas import TOKEN_NORMS
from tests.analysis.drawing import leave_out_rendering, named, pictures_of
from tests.analysis.fabricated import (
    GRID,
    OUTLIERS,
    REGISTERS,
    TOP1,
    Trial,
    norm_row,
    patch_norms,
    pixels,
    publish,
    registers_sweep,
)

BASELINE = {REGISTERS: 0}


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_rendering(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """0, 1 and 4 registers × 2 seeds with everything that measurements leave; outliers set in at step 10 without."""
    trials = registers_sweep(counts=(0, 1, 4), seeds=(0, 1), details=True)
    for trial in trials[:2]:
        trial.scores["tokens/onset_step"] = 10.0 + 10 * trial.seed
    return pictures_of(publish(tmp_path_factory.mktemp("whole") / "s", trials, baseline=BASELINE))


def test_all_pictures_are_drawn_and_say_what_they_show(whole: Pictures) -> None:
    assert whole.problems == ()
    groups: dict[str, list[str]] = {}
    for drawn in whole.drawn:
        groups.setdefault(drawn.group, []).append(drawn.name)
        assert len(drawn.alternative) > 30 and drawn.caption.endswith(".") and drawn.svg.startswith(b"<?xml")
        with Image.open(io.BytesIO(drawn.png)) as image:
            assert min(image.size) > 150
    assert groups == {
        "Scores and training": ["differences", "outlier_fraction", "top1", "learning_curves", "train_loss"],
        "Norms of tokens": [
            *("norm_histogram", "norms_by_layer", "norms_by_step", "norms_by_kind", "norms_by_cell"),
            "outliers_by_threshold",
        ],
        "Where outliers are": ["norm_map", "position_map", "neighbor_similarity"],
        "Attention": ["attention", "attention_registers", "attention_average"],
        "Cost": ["cost_test_linear_top1", "cost_tokens_last_outlier_fraction"],
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        # 20 of 400 patches at 200; the median, 200th of 380 between 18 and 22, is 20.105, and τ is 1.5 times that.
        (
            "norm_histogram",
            "0 registers: rule 3 30.16 (5.00 %), fixed 150 150 (5.00 %), frozen from the baseline 30.16",
        ),
        # 16 of 400 at 100: the median is 18 + 4 · 200 / 384 = 20.083.
        ("norm_histogram", "1 register: rule 3 30.12 (4.00 %), fixed 150 150 (0.00 %)"),
        ("norms_by_step", "0 registers: median 20.11, maximum 200"),
        ("norms_by_step", "0 registers: outliers set in at step 10, 20"),
        ("norms_by_kind", "1 register: medians class 20.03, 0 40.04, patch 20.08"),  # 20 and 40 within half a bin
        ("norms_by_cell", "4: median 20.04, highest 25"),
        ("outliers_by_threshold", "above 1.5, 2, 3 medians. 0 registers: 5 %, 5 %, 5 %; 1 register: 4 %, 4 %, 4 %;"),
        ("position_map", "0 registers: at most 80 %, 5 % on average"),  # 20 of 25 images at one of 16 places
        ("position_map", "4 registers: at most 32 %, 2 % on average"),
        # Outliers in bins 190 to 193 of 200 between -1 and 1: 0.905 to 0.935. Others k times at 0.005 + 0.01 k, k < 95:
        # on average 0.005 + 0.01 · (2 · 95 - 1) / 3.
        ("neighbor_similarity", "0 registers: 8930 normal patches, mean 0.635, 40 outliers, mean 0.920"),
        ("attention", "0 registers: largest value 0.4"),
        ("attention_registers", "Attention maps of 1 register, 4 registers over one image, 5 tokens"),
    ],
)
def test_numbers_in_words(whole: Pictures, name: str, words: str) -> None:
    assert words in named(whole)[name].alternative


def test_pictures_of_the_norms_name_the_paper_and_their_axes(whole: Pictures) -> None:
    words = {name: drawn.svg.decode() for name, drawn in named(whole).items()}
    for name, texts in {
        "norm_histogram": ("number of patches", "rule 3", "frozen from the baseline", "fixed 150"),
        "norms_by_step": (">step<", "onset of outliers", "L2 norm of a token"),
        "norms_by_kind": (">class<", ">patch<", ">0<"),
        "outliers_by_threshold": ("threshold τ / median norm", "0 registers", "frozen from the baseline"),
        "position_map": ("images with an outlier", "4 registers"),
        "neighbor_similarity": ("cosine similarity to the 4 neighbours", "density"),
        "attention_average": ("register 3", "attention / largest of the map"),
    }.items():
        for text in texts:
            assert text in words[name], (name, text)
    assert "Fig. 7" in named(whole)["norms_by_cell"].caption


@pytest.mark.usefixtures("unrendered")
def test_norms_along_layers_are_those_of_the_last_step(tmp_path: Path) -> None:
    trial = Trial({REGISTERS: 0}, 0, {}, peak=100.0, outliers=8)
    folder = publish(tmp_path / "s", [trial])
    early = [norm_row(9 * patch_norms(trial), trial_id="", step=10, layer=4, token="patch")]
    last = [norm_row(patch_norms(trial), trial_id="", step=20, layer=layer, token="patch") for layer in (3, 4)]
    path = folder / "trials" / "id-0-0" / "token_norms.parquet"
    pq.write_table(pa.Table.from_pylist(early + last, schema=TOKEN_NORMS), path)
    drawn = named(pictures_of(folder))
    assert "0 registers: median 20.04, maximum 100" in drawn["norms_by_layer"].alternative
    assert "0 registers: median 20.04, maximum 100" in drawn["norms_by_step"].alternative
    assert "frozen" not in drawn["norm_histogram"].alternative  # without a baseline


@pytest.mark.usefixtures("unrendered")
def test_pictures_along_training_need_two_evaluations(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0,), seeds=(0,)))
    path = folder / "trials" / "id-0-0" / "token_norms.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(np.asarray(table["step"]) == 20), path)
    assert {"norm_histogram", "norms_by_layer"} <= named(pictures_of(folder)).keys()
    assert "norms_by_step" not in named(pictures_of(folder))


def test_one_cell_one_seed_no_class_token(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", [Trial({}, 0, {TOP1: 0.5, OUTLIERS: 0.0}, details=True)], baseline=None)
    place = folder / "trials" / "id--0"
    table = pq.read_table(place / "token_norms.parquet")
    pq.write_table(
        table.filter([token != "cls" for token in table["token"].to_pylist()]), place / "token_norms.parquet"
    )
    rewrite(place / "attention.npz", tokens=np.array(["register_0"]))
    drawn = named(pictures_of(folder))
    assert {"norm_histogram", "norms_by_layer", "outliers_by_threshold", "norm_map"} <= drawn.keys()
    assert {"attention_registers", "attention_average"} <= drawn.keys()
    # One kind of token, one cell, no outliers, no class token: nothing to set side by side or to map.
    assert not {"norms_by_kind", "norms_by_cell", "position_map", "neighbor_similarity", "attention"} & drawn.keys()


@pytest.mark.usefixtures("unrendered")
def test_missing_files_and_other_statuses_are_no_problem(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1), details=True)
    trials[0].status = "diverged"
    folder = publish(tmp_path / "s", trials, baseline=BASELINE)
    for name in ("attention", "location", "neighbors"):
        (folder / "trials" / "id-0-1" / f"{name}.npz").unlink()
    pictures = pictures_of(folder)
    assert pictures.problems == ()
    assert "0 registers" not in named(pictures)["position_map"].alternative
    assert "4 registers: at most 32 %" in named(pictures)["position_map"].alternative


def rewrite(path: Path, **changed: Any) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{name: array for name, array in (arrays | changed).items() if array is not None})


@pytest.mark.usefixtures("unrendered")
def test_broken_arrays_are_said_and_others_drawn(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0, 1), seeds=(0, 1), details=True), baseline=BASELINE)
    trials = folder / "trials"
    (trials / "id-0-0" / "location.npz").write_bytes(b"no zip")
    rewrite(trials / "id-0-1" / "location.npz", counts=np.full(GRID, 26), images=np.full(GRID, 25))
    rewrite(trials / "id-1-1" / "location.npz", counts=np.ones((2, 2), int), images=np.ones((2, 2), int))
    rewrite(trials / "id-0-0" / "attention.npz", average=None)
    rewrite(trials / "id-1-0" / "attention.npz", images=255 - pixels())
    rewrite(trials / "id-0-0" / "neighbors.npz", mean_outlier=np.array(["many"]))
    rewrite(trials / "id-1-1" / "neighbors.npz", edges=np.linspace(0, 1, 201))
    rewrite(trials / "id-0-0" / "norm_map.npz", norms=np.zeros((3, 4, 4)))
    pictures = pictures_of(folder)
    starts = [
        "trial id-0-0: norm_map.npz is unreadable: images have shape (2, 16, 16, 3), norms (3, 4, 4)",
        "trial id-0-0: location.npz is unreadable:",
        "trial id-0-1: location.npz is unreadable: counts have shape (4, 4), images (4, 4), or there are more outliers",
        "trial id-1-1: its outliers are on another grid and are not in the map of its cell",
        "trial id-0-0: neighbors.npz is unreadable: counts have shape (1,)",
        "trial id-1-1: its similarities are in other bins and are not in those of its cell",
        "trial id-0-0: attention.npz is unreadable: 'average",
        "trial id-1-0: its attention maps are of other images and are not shown",
    ]
    assert len(pictures.problems) == len(starts)
    for problem, start in zip(pictures.problems, starts, strict=True):
        assert problem.startswith(start)
    drawn = named(pictures)
    assert {"position_map", "neighbor_similarity", "attention", "norm_map"} <= drawn.keys()
    assert drawn["position_map"].alternative.startswith("Positions of outliers. 1 register: at most 64 %")


def test_padding_is_drawn_as_missing(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0,), seeds=(0,), details=True))
    place = folder / "trials" / "id-0-0"
    norms = np.full((2, *GRID), 20.0)
    norms[0, :2] = np.nan
    rewrite(place / "norm_map.npz", norms=norms)
    with np.load(place / "attention.npz") as stored:
        attention = stored["maps"].copy()
    attention[:, :, 3] = np.nan
    rewrite(place / "attention.npz", maps=attention)
    images = np.full(GRID, 25)
    images[0] = 0
    rewrite(place / "location.npz", images=images)
    pictures = pictures_of(folder)
    assert pictures.problems == ()
    for name in ("norm_map", "position_map", "attention"):
        assert "Grey patches consist of padding." in named(pictures)[name].caption
    assert "highest norm 20." in named(pictures)["norm_map"].alternative
    painted = sheet.scale_of([norms], "norm").paint(np.array([[np.nan, 20.0]]))
    assert painted[0, 0].tolist() == [int(style.MISSING[i : i + 2], 16) for i in (1, 3, 5)] != painted[0, 1].tolist()


def test_nothing_but_padding_and_nothing_but_zeros_can_be_drawn() -> None:
    gone = NormMap("all", pixels(), np.full((2, *GRID), np.nan), 4)
    assert "highest norm 0" in maps.norm_map([gone]).alternative
    zeros = np.zeros((2, 1, *GRID))
    flat = AttentionMaps("all", pixels(), zeros, zeros[0], 2, ("cls",), "mean")
    assert "largest value 0" in maps.class_attention([flat]).alternative
    grey = replace(gone, images=pixels()[..., :1], norms=np.full((2, *GRID), 7.0))
    assert "highest norm 7" in maps.norm_map([grey]).alternative


def test_of_many_registers_the_first_and_some_later_ones_are_drawn() -> None:
    tokens = ("cls", *(f"register_{number}" for number in range(16)))
    each = np.full((1, 17, *GRID), 0.1)
    entry = AttentionMaps("16", pixels()[:1], each, each[0], 2, tokens, "mean")
    drawn = maps.register_attention([entry, replace(entry, label="none", tokens=("cls",), average=each[0, :1])])
    text = drawn.svg.decode()
    assert [number for number in range(16) if f">register {number}<" in text] == [0, 1, 2, 3, 6, 9, 12, 15]
    assert "At most 8 registers are drawn." in drawn.caption and ">none<" not in text


@pytest.mark.usefixtures("unrendered")
def test_many_cells_are_cut_and_said(tmp_path: Path) -> None:
    trials = [
        Trial({"optim.lr": 0.1 * n}, 0, {OUTLIERS: 0.01}, details=True, outliers=8, peak=99.0) for n in range(1, 11)
    ]
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline={"optim.lr": 0.1})))
    for name in ("norm_histogram", "norms_by_layer", "norms_by_kind", "norm_map", "position_map", "attention"):
        assert "The first 8 of 10 cells are drawn." in drawn[name].caption, name
    assert len(drawn["norms_by_cell"].alternative.split(";")) == 10


@pytest.mark.usefixtures("unrendered")
def test_sizes_stand_from_small_to_giant(tmp_path: Path) -> None:
    sizes = ("giant", "tiny", "large", "mine", "nano")
    trials = [Trial({"model.size": size, REGISTERS: r}, 0, {TOP1: 0.5}) for size in sizes for r in (0, 4)]
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)))["norms_by_size"]
    order = [
        part.split(":")[0].split()[-1] for part in drawn.alternative.split("num_registers = 0: ")[1].split(";")[:5]
    ]
    assert order == ["nano", "tiny", "large", "giant", "mine"]
    assert "Fig. 4c" in drawn.caption


def test_tiles_keep_their_cells_whole() -> None:
    tile = np.arange(3 * 3 * 3, dtype=np.uint8).reshape(3, 3, 3)
    large = sheet._resized(tile, sheet._pixels([tile, np.zeros((4, 4, 3), np.uint8)]))
    assert large.shape == (48, 48, 3)  # the least multiple of 12 that is at least 48
    assert (large[::16, ::16] == tile).all() and (large[15::16, 15::16] == tile).all()


def test_long_texts_are_cut_where_they_say_least() -> None:
    assert style.brief("short", 9) == "short"
    assert style.brief("/data/sets/number_1", 9) == "/da…ber_1"
    assert style.wrap("num_registers = 4, size = small", 1.5) == "num_registers = 4,\nsize = small"
    assert style.wrap("", 1.5) == ""


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (9.0, 230.0, ["10", "20", "50", "100", "200"]),
        (0.4, 800.0, ["1", "10", "100"]),
        (1e-6, 1.0, ["1e−6", "0.0001", "0.01", "1"]),
        (0.9, 2.2, ["1", "1.5", "2"]),
        (20.5, 21.0, ["20.5", "21"]),
        (7.0, 7.1, ["7", "7.1"]),
        (9.0, 1.2e6, ["100", "10000", "1e6"]),
    ],
)
def test_logarithmic_axes_have_readable_ticks(low: float, high: float, ticks: list[str]) -> None:
    with style.styled():
        _, (axes,) = style.panels([""], "x", "y")
        style.log_y(axes, low, high)
        assert [label.get_text() for label in axes.get_yticklabels()] == ticks


def test_the_order_of_trials_and_files_changes_no_byte(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1), details=True)
    for trial in trials:
        trial.scores["val/linear/top1"] = trial.scores[TOP1]
    one = named(pictures_of(publish(tmp_path / "a" / "s", trials, baseline=BASELINE)))
    other = named(pictures_of(publish(tmp_path / "b" / "s", trials[::-1], written=(2, 0, 3, 1), baseline=BASELINE)))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_panels_can_have_x_labels_of_their_own() -> None:
    with style.styled():
        figure, grid = style.panels(["a", "b"], ["x of a", "x of b"], "y", shared_x=False)
        texts = {text.get_text(): text.get_position() for text in figure.texts}
    assert texts["x of a"][0] == pytest.approx(sum(grid[0].get_position().intervalx) / 2)
    assert texts["x of b"][0] == pytest.approx(sum(grid[1].get_position().intervalx) / 2)
    assert texts["x of a"][1] == texts["x of b"][1] < grid[0].get_position().y0
