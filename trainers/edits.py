"""Edited forward passes: a ViT whose tokens or MLP neurons are changed at evaluation, on the weights of another.

Shapes: B images, N patches on a grid, R registers, T = 1 + R + N tokens, D width, L blocks (layers 0 … L).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers import vit
from trainers.attention import SINKS, Layout, deleting
from trainers.device import moved
from trainers.vit import Tokens, ViT


class State(NamedTuple):
    """One forward pass at one layer, before the next block.

    Attributes:
        layer: 0 … L.
        x_BTD: the residual stream: class, registers, patches.
        first: index of the first patch, 1 + R.
        grid: rows and columns of the patches.
        deleted_BN: patches that no later block reads and that features leave out, bool; None for none.
    """

    layer: int
    x_BTD: Tensor
    first: int
    grid: tuple[int, int]
    deleted_BN: Tensor | None = None

    @property
    def patches_BND(self) -> Tensor:
        """The patch tokens."""
        return self.x_BTD[:, self.first :]

    def with_patches(self, patches_BND: Tensor) -> State:
        """The same pass with other patch tokens."""
        return self._replace(x_BTD=torch.cat([self.x_BTD[:, : self.first], patches_BND], dim=1))


Step = Callable[[State], State]  # called at layer 0 … L in this order
Edit = Callable[[Tensor], Step]  # begins a pass over images [B, 3, height, width]; equal images give equal passes
NeuronEdit = Callable[[Tensor], Tensor]  # of one block's MLP neurons [B, T, hidden]; see vit.Block.with_neurons
Draw = Callable[[], torch.Generator]  # a fresh generator on the CPU, always in the same state
RegisterSource = Callable[[Tensor], Iterator[Tensor]]  # of images, registers of layer 0 … L that replace their own
Treatment = Callable[[State, Tensor, Tensor], State]  # which patches to treat and which are outliers, bool [B, N]


class EditedViT(ViT):
    """A built-in ViT with an edited forward pass, in evaluation; parameters are the original's, which stays as it is.

    It has everything that a ViT has, so that probes and measurements run on it unchanged. Of deleted patches
    `residuals` gives NaN, as norms of padding are, and normed tokens the mean of the patches left, so that the mean
    over all is the mean over these; their own queries, keys and values mean nothing.

    Args:
        original: a built-in ViT, itself edited or not; its edits come first.
        edits: what is done at each layer, one after another.
        neurons: what is done to MLP neurons, by block (1 … L); such blocks are not compiled.
        extra_registers: tokens of zeros after the registers; with `model.pre_norm` what its norm makes of zeros.

    Raises:
        ValueError: `original` is no built-in ViT, or its neurons are edited already.
    """

    def __init__(
        self,
        original: nn.Module,
        *edits: Edit,
        neurons: Mapping[int, NeuronEdit] | None = None,
        extra_registers: int = 0,
    ) -> None:
        shared = vars(editable(original))
        nn.Module.__init__(self)
        # Shallow copies: parts set on this object, such as reg_token, must not reach the original.
        own = {name: dict(shared[name]) for name in ("_parameters", "_buffers", "_modules")}
        vars(self).update({**shared, **own})
        self.tap = None
        edited = original if isinstance(original, EditedViT) else None
        self.edits: tuple[Edit, ...] = (*(edited.edits if edited else ()), *edits)
        self.neurons: Mapping[int, NeuronEdit] = edited.neurons if edited else {}
        if neurons is not None or extra_registers:
            if self.neurons:
                raise ValueError("the MLP neurons of this backbone are edited already; edit those of the original")
            self.neurons = dict(neurons or {})
        if extra_registers:
            self._add_registers(extra_registers)

    @torch.no_grad()
    def _add_registers(self, count: int) -> None:
        assert self.cls_token is not None
        own = [cast(Tensor, self.reg_token)] if self.num_registers else []
        zeros = self.cls_token.new_zeros(1, count, self.embed_dim)
        self.reg_token = nn.Parameter(torch.cat([*own, zeros], dim=1), requires_grad=False)
        self.num_registers += count
        self.num_prefix_tokens, self.num_reg_tokens = 1 + self.num_registers, self.num_registers

    def _layers(
        self, groups: Sequence[Tensor], masks: Tensor | None = None, crops: Sequence[int] = ()
    ) -> Iterator[tuple[list[Tensor], Layout]]:
        if len(groups) != 1 or masks is not None:
            raise ValueError("an edited backbone takes one group of images at a time, without masks")
        (images,) = groups
        steps = [begin(images) for begin in self.edits]
        rows, columns = (side // self.settings.patch_size for side in images.shape[-2:])
        state = State(0, self._embed(images), 1 + self.num_registers, (rows, columns))
        layout = plain = self._layout([state.x_BTD])
        for number, block in enumerate((None, *self._blocks)):
            if block is not None:
                state = state._replace(layer=number, x_BTD=self._through(block, state, layout))
            for step in steps:
                state = step(state)
            layout = self._deleting(plain, state)
            yield [state.x_BTD], layout

    def _through(self, block: vit.Block, state: State, layout: Layout) -> Tensor:
        edit = self.neurons.get(state.layer + 1)
        if edit is not None:
            return block.with_neurons(state.x_BTD, layout, edit)
        return cast(list[Tensor], block([state.x_BTD], layout, None))[0]

    def _deleting(self, layout: Layout, state: State) -> Layout:
        if state.deleted_BN is None:
            return layout
        deleted_BT = functional.pad(state.deleted_BN, (state.first, 0))
        return deleting(layout, deleted_BT, SINKS[self.settings.sink].has_sink)

    def _tokens(self, x_BTD: Tensor, layout: Layout, normed: bool) -> Tokens:
        tokens = super()._tokens(x_BTD, layout, normed)
        if layout.deleted is None:
            return tokens
        patches_BND = tokens.patches_BND
        gone_BN = layout.deleted[:, -patches_BND.shape[1] :]
        if not normed:
            return tokens._replace(patches_BND=patches_BND.masked_fill(gone_BN[..., None], torch.nan))
        mean_B1D = _mean(patches_BND, ~gone_BN)[:, None]
        return tokens._replace(patches_BND=torch.where(gone_BN[..., None], mean_B1D, patches_BND))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normed tokens [B, T, D] of normalised images [B, 3, height, width]; masks are not supported."""
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported by this backbone")
        return vit.together(self.tokens(x))


def editable(backbone: nn.Module) -> ViT:
    """`backbone`, if its forward pass can be edited.

    Raises:
        ValueError: it is a user's own.
    """
    if not isinstance(backbone, ViT):
        raise ValueError(
            f"only the built-in ViT can be edited, and this backbone is a {type(backbone).__name__}: leave "
            "interventions and test_time_registers out of tokens.measurements"
        )
    return backbone


def replace_registers(source: RegisterSource) -> Edit:
    """Registers replaced at every layer 0 … L, so that nothing of what blocks write into them is kept.

    Args:
        source: gives for each layer a tensor [B, R, D], or one that is expanded to it.
    """

    def begin(images: Tensor) -> Step:
        layers = source(images)

        def step(state: State) -> State:
            x_BTD = state.x_BTD
            registers = next(layers).to(x_BTD.dtype).expand(len(x_BTD), state.first - 1, -1)
            return state._replace(x_BTD=torch.cat([x_BTD[:, :1], registers, x_BTD[:, state.first :]], dim=1))

        return step

    return begin


def constant_registers(layers: Sequence[Tensor]) -> RegisterSource:
    """The same registers for all images: of each layer, [R, D] or what is expanded to it."""

    def source(_images: Tensor) -> Iterator[Tensor]:
        return iter(layers)

    return source


def registers_of_others(backbone: vit.Backbone, draw: Draw, spare: Tensor) -> RegisterSource:
    """The registers of another image of the batch in an undisturbed pass.

    A random cyclic permutation of the batch decides whose, so that no image keeps its own. All batches of one size get
    the same permutation, so that whose registers an image gets depends on the batch in which it is seen.

    Args:
        backbone: the untouched one, which is run besides.
        draw: of the permutation.
        spare: one image [1, 3, height, width], of any size, whose registers an image gets that is alone in its batch.
    """

    def source(images: Tensor) -> Iterator[Tensor]:
        if len(images) == 1:
            return (tokens.registers_BRD for tokens in backbone.residuals(spare))
        order = torch.randperm(len(images), generator=draw())
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        other = other.to(images.device)
        return (tokens.registers_BRD[other] for tokens in backbone.residuals(images))

    return source


def treat_patches(layer: int, threshold: float, treatment: Treatment, *, normal: Draw | None = None) -> Edit:
    """Patches whose norm at one layer exceeds a threshold are treated, or for a control as many normal ones.

    Args:
        layer: 0 … L.
        threshold: norms above it are outliers'; padding is judged by its norm, since a pass does not know of it.
        treatment: `clamped`, `averaged` or `deleted`.
        normal: if given, as many patches of each image that are no outliers are drawn and treated instead, or all of
            them where they are fewer. Which ones follows from this and the image's pixels: the same in every batch and
            split, and others in each image.
    """

    def begin(images: Tensor) -> Step:
        def step(state: State) -> State:
            if state.layer != layer:
                return state
            outliers_BN = _norms(state.patches_BND) > threshold
            chosen_BN = outliers_BN
            if normal is not None:
                chosen_BN = _as_many_normal(outliers_BN, _draws(images, outliers_BN.shape[1], normal()))
            return treatment(state, chosen_BN, outliers_BN)

        return step

    return begin


def clamped(norm: float) -> Treatment:
    """Patches scaled to an L2 norm; a token of zeros has no direction and stays."""

    def treat(state: State, chosen_BN: Tensor, _outliers_BN: Tensor) -> State:
        patches_BND = state.patches_BND
        scaled_BND = functional.normalize(patches_BND, dim=-1) * norm
        return state.with_patches(torch.where(chosen_BN[..., None], scaled_BND, patches_BND))

    return treat


def averaged(state: State, chosen_BN: Tensor, outliers_BN: Tensor) -> State:
    """Patches replaced by the mean of their up to 8 neighbours that are neither outliers nor treated themselves.

    Where there is no such neighbour, by the mean of all such patches of the image; where there are none, it stays.
    """
    patches_BND = state.patches_BND
    usable_BN = ~(chosen_BN | outliers_BN)
    weight_BN1 = usable_BN[..., None].to(patches_BND.dtype)
    # One channel more counts; a treated patch is not usable, so that the window's centre adds nothing.
    summed = torch.cat([patches_BND.where(usable_BN[..., None], 0.0), weight_BN1], dim=2)
    grid = summed.mT.reshape(len(summed), -1, *state.grid)
    window_BNE = functional.avg_pool2d(grid, 3, stride=1, padding=1, divisor_override=1).flatten(2).mT
    near_BND, count_BN1 = window_BNE[..., :-1], window_BNE[..., -1:]
    mean_BND = torch.where(count_BN1 > 0, near_BND / count_BN1.clamp_min(1), _mean(patches_BND, usable_BN)[:, None])
    replaced_BN = chosen_BN & usable_BN.any(dim=1, keepdim=True)
    return state.with_patches(torch.where(replaced_BN[..., None], mean_BND, patches_BND))


def deleted(state: State, chosen_BN: Tensor, _outliers_BN: Tensor) -> State:
    """Patches that no later block reads and that features leave out; an image that would lose all of them keeps all."""
    gone_BN = chosen_BN if state.deleted_BN is None else chosen_BN | state.deleted_BN
    return state._replace(deleted_BN=gone_BN & ~gone_BN.all(dim=1, keepdim=True))


def _norms(patches_BND: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(patches_BND, dim=-1, dtype=torch.float32)
    return norms


def _mean(patches_BND: Tensor, of_BN: Tensor) -> Tensor:
    """The mean [B, D] of some patches of each image; zeros where there are none."""
    weight_BN1 = of_BN[..., None].to(patches_BND.dtype)
    return (patches_BND * weight_BN1).sum(dim=1) / weight_BN1.sum(dim=1).clamp_min(1)


def _draws(images: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Random integers [B, N] of the patches of each image, which its pixels decide whatever batch it is in.

    Multiplicative hashing: an image's key is a sum of its pixels' bits times random numbers, each patch multiplies it
    by a random odd number. Integers wrap around, so that all devices and orders of summation give equal results.
    """
    pixels_BP = images.detach().float().contiguous().view(torch.int32).flatten(1)
    weights_P = torch.randint(-(2**31), 2**31, pixels_BP.shape[1:], generator=generator).int()
    factors_N = 2 * torch.randint(-(2**62), 2**62, (patches,), generator=generator) + 1
    keys_B1 = (pixels_BP * moved(weights_P, images.device)).sum(dim=1, keepdim=True, dtype=torch.int64)
    return keys_B1 * moved(factors_N, images.device)


def _as_many_normal(outliers_BN: Tensor, draws_BN: Tensor) -> Tensor:
    """Of each image as many patches with the lowest draws as it has outliers, none of them an outlier."""
    last = torch.iinfo(draws_BN.dtype).max
    rank_BN = draws_BN.masked_fill(outliers_BN, last).argsort(dim=1).argsort(dim=1)
    return (rank_BN < outliers_BN.sum(dim=1, keepdim=True)) & ~outliers_BN
