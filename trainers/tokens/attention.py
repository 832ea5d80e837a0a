"""What attention goes to in every block and head, how spread it is, and maps of the last block (paper.md §5, 8 and 11).

All of it is read from explicit attention in float32, since the fused kernels give no weights.
Shapes: B images, H heads, T tokens, P tokens before the patches (class and registers), R registers, N patches on a grid
of h × w cells, G groups of keys, S statistics. In a map of attention rows are queries and columns are keys.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from trainers import vit
from trainers.attention import SINKS
from trainers.device import moved
from trainers.measurement import CHUNK, Arrays, Finding, Metric, Picture, Statistic, Subject
from trainers.tokens.norms import token_kinds

HEAD_REDUCTION = "mean"  # the paper does not say how its maps are reduced over heads
MAP_IMAGES = 8  # of the detail images, those whose maps are kept
METRICS = (
    *("cls/outliers", "cls/registers", "cls/self", "cls/sink", "cls/entropy"),
    *("patch/outliers", "patch/registers", "sink_score"),
)

_CHUNK_VALUES = 2**25  # of one block's attention at a time, 128 MiB; computing it holds about four times as much
_SINK_SHARE = 1e-3  # what a row must lack of 1 for a backbone of the user's own to have a sink

# Of pictures; all but the first and the last in px.
_ROWS = 4  # images in one
_CELL = 96  # longer side of a map, rounded so that patches are whole
_GAP = 6  # between maps
_LINE = 14  # height of a line of text
_BAR = 128  # length of the bar of colours
_WIDTH = 480  # at least, so that title and bar fit
_NO_PATCH = 128  # grey level

# Every 16th colour of viridis (van der Walt and Smith, CC0): perceptually uniform, and safe for the colour-blind.
_VIRIDIS = (
    *("440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c"),
    *("1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"),
)

Name = tuple[str, str | None]  # of a statistic, and the kind of token that it is narrowed to


class Keys(NamedTuple):
    """The tokens of some images, sorted into groups.

    Attributes:
        groups_BTG: 1 where a token belongs to a group: outliers, normal patches, padding, then each kind of `prefix`.
        queries_BN: weights of the patches as queries: equal, 0 for padding and deleted patches, and 1 in sum.
        read_B1: how many of the tokens there are for queries to read: all but deleted patches.
        prefix: kinds of the tokens before the patches, in their order.
    """

    groups_BTG: Tensor
    queries_BN: Tensor
    read_B1: Tensor
    prefix: tuple[str, ...]


def group_keys(
    outliers_BN: NDArray[np.bool_],
    padded_BN: NDArray[np.bool_] | None,
    prefix: Sequence[str],
    deleted_BN: NDArray[np.bool_] | None = None,
) -> Keys:
    """Keys on the CPU, given which patches are outliers, and which are padding or deleted (none is where it is None).

    Queries still read padding. Deleted patches (see `trainers.edits`) are in no group, as if they were not there.
    """
    padded, deleted = (np.zeros_like(outliers_BN) if gone is None else gone for gone in (padded_BN, deleted_BN))
    stays = ~(padded | deleted)
    groups = torch.zeros(len(padded), len(prefix) + padded.shape[1], 3 + len(prefix))
    for group, patches_BN in enumerate((outliers_BN & stays, ~outliers_BN & stays, padded & ~deleted)):
        groups[:, len(prefix) :, group] = torch.from_numpy(patches_BN)
    groups[:, : len(prefix), 3:] = torch.eye(len(prefix))
    queries = torch.from_numpy(stays).float()
    read_B1 = len(prefix) + torch.from_numpy(~deleted).float().sum(dim=1, keepdim=True)
    return Keys(groups, queries / queries.sum(dim=1, keepdim=True).clamp(min=1), read_B1, tuple(prefix))


def statistics(attention_BHTT: Tensor, keys: Keys, *, has_sink: bool) -> dict[Name, Tensor]:
    """Statistics of one block, each [B, H], by name and the kind of token that it is narrowed to.

    Of the queries `cls` (absent without a class token) and `patch` (mean over patches but padding and deleted):
        …/outliers, …/normal, …/padding  mass on such patches
        …/registers                      mass on all registers, or on the one that it is narrowed to; absent without
        cls/self, patch/cls              mass on the class token
        …/sink                           mass on the sink beside the tokens, 1 minus the row's sum; absent without
        cls/entropy                      −Σ a ln a / ln(number of keys); the sink is one of the keys
    Of all queries but padding and deleted patches:
        sink_score                       max over tokens j of mean_i a_ij (Gu et al. 2025, arXiv 2410.10781)
        sink_slot                        mean_i of the mass on the sink beside the tokens; absent without

    Args:
        attention_BHTT: explicit softmax; rows sum to 1, or to 1 minus the share of a sink that has no column.
        keys: on the same device.
        has_sink: whether there is such a sink.
    """
    prefix = len(keys.prefix)
    patch_BHT = (keys.queries_BN[:, None, None] @ attention_BHTT[:, :, prefix:]).squeeze(2)
    found = _masses("patch", patch_BHT, keys, has_sink)
    if "cls" in keys.prefix:
        cls_BHT = attention_BHTT[:, :, 0]
        found |= _masses("cls", cls_BHT, keys, has_sink)
        nats_BH = torch.special.entr(cls_BHT).sum(dim=-1)
        if has_sink:
            nats_BH = nats_BH + torch.special.entr(found["cls/sink", None])
        found["cls/entropy", None] = nats_BH / (keys.read_B1 + has_sink).log()
    patches_B11 = (keys.queries_BN > 0).sum(dim=1)[:, None, None]
    received_BHT = (attention_BHTT[:, :, :prefix].sum(dim=2) + patches_B11 * patch_BHT) / (prefix + patches_B11)
    found["sink_score", None] = received_BHT.amax(dim=-1)
    if has_sink:
        found["sink_slot", None] = _lacking(received_BHT)
    return found


def _masses(query: str, rows_BHT: Tensor, keys: Keys, has_sink: bool) -> dict[Name, Tensor]:
    outliers, normal, padding, *single = (rows_BHT @ keys.groups_BTG).unbind(dim=-1)
    found: dict[Name, Tensor] = {
        (f"{query}/outliers", None): outliers,
        (f"{query}/normal", None): normal,
        (f"{query}/padding", None): padding,
    }
    if "cls" in keys.prefix:
        found["cls/self" if query == "cls" else f"{query}/cls", None] = single.pop(0)
    if single:
        registers = keys.prefix[len(keys.prefix) - len(single) :]
        found[f"{query}/registers", None] = torch.stack(single).sum(dim=0)
        found |= {(f"{query}/registers", kind): mass for kind, mass in zip(registers, single, strict=True)}
    if has_sink:
        found[f"{query}/sink", None] = _lacking(rows_BHT)
    return found


def _lacking(rows: Tensor) -> Tensor:
    """What rows of attention lack of 1."""
    return (1 - rows.sum(dim=-1)).clamp(min=0)


def divergence(maps_BRN: Tensor) -> Tensor:
    """Jensen–Shannon divergence between maps of attention, mean over pairs, float64 [B]; 0 if equal, 1 if disjoint.

    In base 2, each map divided by its sum first. NaN where there is no pair, or where a map is all zeros.
    """
    share_BRN = maps_BRN.double() / maps_BRN.double().sum(dim=-1, keepdim=True)
    entropy_BR = torch.special.entr(share_BRN).sum(dim=-1)
    first, second = torch.triu_indices(maps_BRN.shape[1], maps_BRN.shape[1], offset=1, device=maps_BRN.device)
    of_middle = torch.special.entr((share_BRN[:, first] + share_BRN[:, second]) / 2).sum(dim=-1)
    of_pairs = of_middle - (entropy_BR[:, first] + entropy_BR[:, second]) / 2
    return cast(Tensor, of_pairs.clamp(min=0).mean(dim=1) / math.log(2))


class _Survey:
    """Attention of all blocks on the detail images: sums over images, and maps of the few that are drawn.

    Sums stay on the device until all images are seen. Patches whose norm is NaN in what enters a block, though they are
    no padding, are deleted ones (see `trainers.edits`).
    """

    def __init__(self, subject: Subject) -> None:
        self.pixels = subject.probe_images(subject.tokens.detail_images)
        count, (norms_LBT, class_token) = len(self.pixels), subject.norms
        self.prefix = token_kinds(subject.num_registers, class_token)[:-1]
        self.keeps_maps = subject.at_end and bool(self.prefix)
        self._outliers_BN = subject.outliers[:count]
        self._gone_LBN = np.isnan(norms_LBT[:-1, :count, len(self.prefix) :])  # of block 1 … L
        self._padded_BN = subject.padding(subject.data.validation, np.arange(count))
        self._names: list[Name] = []
        self._statistics: list[Tensor] = []  # of each block, sums [S, H]
        self._divergences: list[Tensor] = []  # of each block
        self._average: tuple[Tensor, Tensor] | None = None  # of the last block [P, N], and of how many images [N]
        self._drawn: list[tuple[Tensor, Tensor]] = []  # of the last block [B, P, N], and of its first token [B, H, N]
        self._look(subject)

    def _look(self, subject: Subject) -> None:
        backbone, seen = cast(vit.Backbone, subject.backbone), 0
        for image in subject.batches(self.pixels[:1]):
            chunk, has_sink = _first_look(backbone, image)
        for images in subject.batches(self.pixels, chunk):
            part, seen = slice(seen, seen + len(images)), seen + len(images)
            keys = self._keys(part, subject.device)
            for block, attention_BHTT in enumerate(vit.attentions(backbone, images)):
                self._see(block, attention_BHTT, keys[block], has_sink)
            if self.keeps_maps:
                self._keep(attention_BHTT[:, :, :, len(self.prefix) :], keys[block], MAP_IMAGES - part.start)

    def _keys(self, part: slice, device: torch.device) -> list[Keys]:
        """The tokens of some images as each block has them."""
        padded_BN = None if self._padded_BN is None else self._padded_BN[part]
        keys: list[Keys] = []
        for block, gone_BN in enumerate(self._gone_LBN[:, part]):
            if block and np.array_equal(gone_BN, self._gone_LBN[block - 1, part]):
                keys.append(keys[-1])
                continue
            deleted_BN = gone_BN if padded_BN is None else gone_BN & ~padded_BN
            groups, queries, read, prefix = group_keys(self._outliers_BN[part], padded_BN, self.prefix, deleted_BN)
            keys.append(Keys(moved(groups, device), moved(queries, device), moved(read, device), prefix))
        return keys

    def _see(self, block: int, attention_BHTT: Tensor, keys: Keys, has_sink: bool) -> None:
        length = keys.groups_BTG.shape[1]
        if attention_BHTT.shape[2:] != (length, length):
            raise ValueError(
                f"attention of block {block + 1} is {list(attention_BHTT.shape)}, not over the {length} tokens of the "
                "residual stream: have the backbone's `attention` give class token, registers and patches, or leave "
                "attention out of tokens.measurements"
            )
        found = statistics(attention_BHTT, keys, has_sink=has_sink)
        self._names = list(found)
        summed = torch.stack([values_BH.sum(dim=0, dtype=torch.float64) for values_BH in found.values()])
        first = int("cls" in keys.prefix)
        registers_BRN = attention_BHTT[:, :, first : len(keys.prefix), len(keys.prefix) :].mean(dim=1)
        diverging = divergence(registers_BRN * (keys.queries_BN > 0)[:, None]).sum()
        if block == len(self._statistics):
            self._statistics.append(summed)
            self._divergences.append(diverging)
        else:
            self._statistics[block] += summed
            self._divergences[block] += diverging

    def _keep(self, to_patches_BHTN: Tensor, keys: Keys, left: int) -> None:
        """Adds to the average of the maps, and keeps those of the first `left` images."""
        is_patch_B1N = (keys.queries_BN > 0)[:, None]
        maps_BPN = to_patches_BHTN[:, :, : len(keys.prefix)].mean(dim=1)
        summed = (maps_BPN * is_patch_B1N).sum(dim=0, dtype=torch.float64), is_patch_B1N[:, 0].sum(dim=0)
        sums = self._average
        self._average = summed if sums is None else (sums[0] + summed[0], sums[1] + summed[1])
        if left > 0:
            drawn = (maps_BPN[:left], to_patches_BHTN[:left, :, 0])
            self._drawn.append(tuple(x.where(is_patch_B1N[:left], torch.nan) for x in drawn))  # type: ignore[arg-type]

    def blocks(self) -> list[dict[Name, NDArray[np.float64]]]:
        """Statistics of each block by head, [H], mean over images; `padding` only where some image has any."""
        means_LSH = (torch.stack(self._statistics) / len(self.pixels)).cpu().numpy()
        found = [dict(zip(self._names, of_block, strict=True)) for of_block in means_LSH]
        if self._padded_BN is None:
            found = [{name: of for name, of in block.items() if not name[0].endswith("/padding")} for block in found]
        return [block | self._ratios(block, ~gone_BN) for block, gone_BN in zip(found, self._gone_LBN, strict=True)]

    def _ratios(
        self, found: Mapping[Name, NDArray[np.float64]], stays_BN: NDArray[np.bool_]
    ) -> dict[Name, NDArray[np.float64]]:
        outliers, normal = int((self._outliers_BN & stays_BN).sum()), int((~self._outliers_BN & stays_BN).sum())
        if not outliers or not normal:
            return {}
        ratios: dict[Name, NDArray[np.float64]] = {}
        for query in ("cls", "patch"):
            mass_H = found.get((f"{query}/normal", None))
            if mass_H is not None and mass_H.all():
                ratio_H = found[f"{query}/outliers", None] / outliers / (mass_H / normal)
                ratios[f"{query}/outlier_over_normal", None] = ratio_H
        return ratios

    def divergences(self) -> dict[int, float]:
        """By block 1 … L, mean over images; absent where there is none."""
        means = (torch.stack(self._divergences) / len(self.pixels)).tolist()
        return {block: value for block, value in enumerate(means, start=1) if not math.isnan(value)}

    def maps(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Of the last block, NaN where a patch is padding: maps [B, P, N] of the first images, mean over heads;
        these averaged over all images [P, N]; and the maps of the first token head by head, [B, H, N]."""
        assert self._average is not None
        average_PN = (self._average[0] / self._average[1]).float()
        maps_BPN, by_head_BHN = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
        return tuple(kept.cpu().numpy() for kept in (maps_BPN, average_PN, by_head_BHN))  # type: ignore[return-value]


def _first_look(backbone: vit.Backbone, image: Tensor) -> tuple[int, bool]:
    """How many images fit at a time, and whether there is a sink beside the tokens, from one image."""
    attentions = vit.attentions(backbone, image)
    first = next(attentions)
    chunk = max(1, min(CHUNK, _CHUNK_VALUES // first[0].numel()))
    if isinstance(backbone, vit.ViT):
        return chunk, SINKS[backbone.settings.sink].has_sink
    lacking = [_lacking(attention).max() for attention in (first, *attentions)]
    return chunk, bool(torch.stack(lacking).max() > _SINK_SHARE)


def measure(subject: Subject, settings: None) -> Iterator[Finding]:
    """`attention/…` of every block and head over the detail images; of the last block, mean over heads, as metrics.

    Names are those of `statistics`, and besides:
        attention/QUERY/outlier_over_normal  what an outlier gets over what a normal patch gets; absent without outliers
        attention/register_divergence        `divergence` of the registers' maps, which are means over heads
    Masses are means over all images, with those that have no outlier, whose mass on outliers is 0. At the end there
    are maps of the last block besides: the arrays `attention`, and pictures.

    Raises:
        ValueError: the backbone's attention is not over the tokens of its residual stream, or maps are to be drawn and
            the patches do not fill the grid.
    """
    survey = _Survey(subject)
    blocks, divergences = survey.blocks(), survey.divergences()
    for block, found in enumerate(blocks, start=1):
        for (name, kind), values_H in found.items():
            for head, value in enumerate(values_H.tolist()):
                yield Statistic(f"attention/{name}", value, block, head, kind)
    yield from (Statistic("attention/register_divergence", value, block) for block, value in divergences.items())
    for name in METRICS:
        if (name, None) in blocks[-1]:
            yield Metric(f"attention/last/{name}", float(blocks[-1][name, None].mean()))
    if len(blocks) in divergences:
        yield Metric("attention/last/register_divergence", divergences[len(blocks)])
    if survey.keeps_maps:
        yield from _maps(survey, subject.grid, len(blocks))


def _maps(survey: _Survey, grid: tuple[int, int], block: int) -> Iterator[Finding]:
    """Arrays and pictures of the maps: of class token and registers the mean over heads, of the class token each head.

    Arrays: `images` uint8 [B, S, S, 3] and their `maps` [B, tokens, h, w]; `average` [tokens, h, w] over
    `averaged_images` images (paper, Fig. 9 and 16); names of `tokens`; `layer`; `head_reduction`; `cls_heads`
    [B, heads, h, w] where there is a class token. Values are attention as it is, NaN where a patch is padding.
    """
    maps, average, by_head = survey.maps()
    if average.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"the backbone gives {average.shape[1]} patches an image, not the {grid[0]} × {grid[1]} of its patch and "
            "image size: maps of attention cannot be drawn; set model.patch_size and model.image_size as the backbone "
            "has them, or leave attention out of tokens.measurements"
        )
    maps, average, by_head = (values.reshape(*values.shape[:-1], *grid) for values in (maps, average, by_head))
    images, count = np.array(survey.pixels[:MAP_IMAGES]), len(survey.pixels)
    arrays: dict[str, Any] = {
        "images": images,
        "maps": maps,
        "average": average,
        "averaged_images": np.int64(count),
        "tokens": np.array(survey.prefix),
        "layer": np.int64(block),
        "head_reduction": np.array(HEAD_REDUCTION),
    }
    name, title = f"last_block_{HEAD_REDUCTION}_of_heads", f"Attention of block {block}, {HEAD_REDUCTION} of heads"
    yield from _pictures(name, title, survey.prefix, images, maps)
    yield Picture(f"{name}_average", draw(f"{title}, average of {count} images", survey.prefix, average[None]))
    if "cls" in survey.prefix:
        arrays["cls_heads"] = by_head
        heads = [f"head {head}" for head in range(by_head.shape[1])]
        yield from _pictures("last_block_cls", f"Attention of block {block}, class token", heads, images, by_head)
    yield Arrays("attention", arrays)


def _pictures(
    name: str, title: str, labels: Sequence[str], images: NDArray[np.uint8], maps: NDArray[np.float32]
) -> Iterator[Picture]:
    """A few images a picture, each beside its maps [B, columns, h, w]."""
    for number, start in enumerate(range(0, len(images), _ROWS)):
        rows = slice(start, start + _ROWS)
        yield Picture(f"{name}_{number}", draw(title, labels, maps[rows], images[rows]))


def picture_size(columns: int, rows: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Width and height in px of what `draw` draws; `columns` counts that of the images."""
    height, width = _cell(grid)
    return max(_WIDTH, _GAP + columns * (width + _GAP)), _GAP + 3 * _LINE + rows * (height + _LINE + _GAP)


def _cell(grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width in px at which a map is drawn, so that all patches are equal squares."""
    scale = max(1, round(_CELL / max(grid)))
    return grid[0] * scale, grid[1] * scale


def draw(
    title: str,
    labels: Sequence[str],
    maps: NDArray[np.float32],
    images: NDArray[np.uint8] | None = None,
) -> bytes:
    """PNG of maps [rows, columns, h, w] under their labels, with images [rows, S, S, 3] as a first column if given.

    Colours go from 0 to the largest value of each map, which is written below it; patches that are NaN are grey.
    """
    rows, grid = len(maps), (maps.shape[2], maps.shape[3])
    height, width = _cell(grid)
    first = 0 if images is None else 1
    sheet = Image.new("RGB", picture_size(len(labels) + first, rows, grid), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill="black")
    _draw_bar(sheet, pen, _GAP + _LINE)
    for column, label in enumerate(["image", *labels] if first else labels):
        left = _GAP + column * (width + _GAP)
        pen.text((left, _GAP + 2 * _LINE), label, fill="black")
        for row in range(rows):
            top = _GAP + 3 * _LINE + row * (height + _LINE + _GAP)
            if images is not None and column == 0:
                cell = Image.fromarray(images[row]).resize((width, height), Image.Resampling.BICUBIC)
            else:
                values = maps[row, column - first]
                cell = Image.fromarray(colors(values)).resize((width, height), Image.Resampling.NEAREST)
                pen.text((left, top + height), f"max {np.nan_to_num(values).max():.3g}", fill="black")
            sheet.paste(cell, (left, top))
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()


def _draw_bar(sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
    """The scale of colours, with what its ends mean."""
    ramp = np.tile(np.linspace(0, 1, _BAR, dtype=np.float32), (_LINE - 4, 1))
    pen.text((_GAP, top), "0", fill="black")
    sheet.paste(Image.fromarray(colors(ramp)), (_GAP + 10, top + 1))
    pen.text((_GAP + 16 + _BAR, top), "largest value of each map, written below it", fill="black")


def colors(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values ≥ 0 of any shape in viridis from 0 to the largest of them, uint8 with a last axis of 3; NaN is grey."""
    known = np.nan_to_num(values)
    share = known / (float(known.max()) or 1.0)
    anchors = np.array([list(bytes.fromhex(color)) for color in _VIRIDIS])
    places = np.linspace(0, 1, len(anchors))
    painted = np.stack([np.interp(share, places, channel) for channel in anchors.T], axis=-1).round()
    painted[np.isnan(values)] = _NO_PATCH
    return painted.astype(np.uint8)
