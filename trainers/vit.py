"""The Vision Transformer: timm's, with register tokens, giving tokens, residual streams, q/k/v and attention.

Shapes: B images, N patches, R registers, T = 1 + R + N tokens, D width, L blocks, H heads, C = D / H.
Order of tokens: class, registers, patches. Layer 0 enters the first block, layer l is the output of block l.
A group is a batch of images of one size, [B, 3, height, width], normalised; it may hold several crops of equal number,
one after another. Several groups pass through in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from timm.layers.mlp import GluMlp, Mlp, SwiGLUPacked
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers import catalog
from trainers.attention import SINKS, Attention, Layout, attention_mask, pack, unpack
from trainers.config import ModelConfig
from trainers.device import moved
from trainers.dotted import load
from trainers.drop_path import Drop, Subset, add_branch, draw_factors, draw_subsets, factors_of_tokens
from trainers.position import interpolate_position
from trainers.streams import Streams

Tap = Callable[[int, Tensor], None]  # layer, residual stream x_BTD

# Of one block, in one process: shapes × training, teacher and evaluation, of all its trials. Past that it would run
# uncompiled. PyTorch's own limit is 8.
_COMPILED_VARIANTS = 64


class Tokens(NamedTuple):
    """Tokens of one layer: class [B, D] or None, registers [B, R, D], patches [B, N, D]."""

    cls_BD: Tensor | None
    registers_BRD: Tensor
    patches_BND: Tensor


@runtime_checkable
class Backbone(Protocol):
    """What the rest asks of a backbone; a user's own is named by `model.factory`."""

    embed_dim: int
    num_registers: int

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        """Tokens of the last block, after the final norm if `normed`; images are [B, 3, height, width], normalised."""
        ...

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        """The residual stream at layer 0 … L, before the final norm."""
        ...

    def attention(self, images: Tensor, layer: int) -> Tensor:
        """Explicit softmax of block `layer` (1 … L) in float32, [B, H, T, T], rows are queries.

        Rows sum to 1, or where attention has a sink besides the tokens to 1 minus its share.
        """
        ...

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of block `layer` (1 … L), each [B, H, T, C]."""
        ...


class Block(TimmBlock):
    """timm's pre-norm block over several groups of images, with stochastic depth whose draws come from outside."""

    def forward(  # type: ignore[override]
        self, streams: list[Tensor], layout: Layout, drop: Drop
    ) -> list[Tensor]:
        """The residual streams after attention and MLP, in the form in which `add_branch` takes them."""
        streams = add_branch(streams, self._attend, layout, drop, 0)
        return add_branch(streams, self._transform, layout, drop, 1)

    def _attend(self, x: Tensor, layout: Layout) -> Tensor:
        return cast(Tensor, self.ls1(self.attn(self.norm1(x), layout)))

    def _transform(self, x: Tensor, _layout: Layout) -> Tensor:
        return cast(Tensor, self.ls2(self.mlp(self.norm2(x))))

    def with_neurons(self, x: Tensor, layout: Layout, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """What becomes of one group x_BTD in evaluation when `edit` changes the neurons of the MLP.

        Neurons are its hidden units after the activation, [B, T, hidden], which enter its second linear layer; of
        swiglu the product of gate and value.
        """
        x, mlp = x + self._attend(x, layout), cast(Any, self.mlp)
        hidden = mlp.fc1(self.norm2(x))
        if isinstance(mlp, GluMlp):
            gate, value = hidden.chunk(2, dim=-1)
            neurons = mlp.act(gate) * value
        else:
            neurons = mlp.act(hidden)
        return x + cast(Tensor, self.ls2(mlp.fc2(edit(neurons))))


class ViT(VisionTransformer):
    """timm's VisionTransformer with registers as in the paper: no position embedding, between class and patches.

    With 0 registers it is timm's plain ViT, parameter for parameter. Every parameter is initialised from a random
    stream of its own name, so that models of one seed that differ only in registers start with equal shared weights.
    The resolution may change: the position embedding is then resampled, as `model` says.

    Args:
        model: resolved.
        streams: of the parameters' initialisation and of drop path.
        shape: in place of that of `model.size`, for weights of another shape.
        mlp_ratio: width of the MLP over D; for swiglu before it is cut to two thirds.

    Attributes:
        tap: sees layer and residual stream of every layer, in training too; of several groups the first alone.
        activation_checkpointing: whether activations inside of blocks are computed again in the backward pass.
        mask_token: [1, D] once `add_mask_token` was called.
    """

    def __init__(
        self, model: ModelConfig, streams: Streams, shape: catalog.ModelSize | None = None, mlp_ratio: float = 4.0
    ) -> None:
        shape = shape or catalog.MODEL_SIZES[model.size]
        with torch.random.fork_rng(devices=[]):  # timm draws from the global generator; nothing of it is kept
            super().__init__(
                img_size=model.side,
                patch_size=model.patch_size,
                num_classes=0,
                embed_dim=shape.width,
                depth=shape.depth,
                num_heads=shape.heads,
                init_values=model.layer_scale,
                pre_norm=model.pre_norm,
                dynamic_img_size=True,
                weight_init="skip",
                norm_layer=partial(LayerNorm, eps=model.norm_eps),
                block_fn=Block,
                attn_layer=SINKS[model.sink],
                **_mlp(model.mlp, shape.width, mlp_ratio),
            )
        self.settings = model
        self.depth = shape.depth
        self.num_registers = model.num_registers
        self.drop_path = model.drop_path
        self.drop_path_generator = streams.torch("drop_path")
        self.tap: Tap | None = None
        self.activation_checkpointing = False
        self.register_parameter("mask_token", None)
        self.loaded_mask_token: Tensor | None = None  # of weights that were loaded before a method asked for one
        if model.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, model.num_registers, shape.width))
            self.num_prefix_tokens = 1 + model.num_registers
            self.num_reg_tokens = model.num_registers
        self._initialise(streams, model.reg_init_std)

    @property
    def _blocks(self) -> Sequence[Any]:  # timm's Block; torch types children as Tensor or Module
        return list(self.blocks)

    def _initialise(self, streams: Streams, reg_init_std: float | str | None) -> None:
        """DeiT-III's initialisation: N(0, 0.02²) cut at ±2 for weights, patch convolution as PyTorch's."""
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(streams.seed_for(f"init:{name}"))
            if name == "reg_token":
                nn.init.normal_(parameter, std=cast(float, reg_init_std), generator=generator)
            elif name.startswith("patch_embed."):
                bound = self.patch_embed.proj.weight[0].numel() ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            elif name == "cls_token":
                nn.init.trunc_normal_(parameter, std=self.settings.cls_init_std, generator=generator)
            elif name == "pos_embed" or (parameter.ndim == 2 and name.endswith(".weight")):
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith((".bias_k", ".bias_v")):  # of AttentionBias
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            # Norm weights (1), LayerScale (its initial value) and ValueGate's bias (0) already stand.

    def add_mask_token(self, _streams: Streams) -> None:
        """Give it the `mask_token` that stands for masked patches: that of loaded weights, else zeros, as in DINOv2."""
        assert self.cls_token is not None
        start = torch.zeros_like(self.cls_token[0]) if self.loaded_mask_token is None else self.loaded_mask_token
        self.mask_token = nn.Parameter(start.detach().clone())

    def compile_blocks(self) -> None:
        """Have torch.compile compile each block at its first call; a copy of the model has to be asked again.

        Blocks of equal shape share what is compiled. Shapes are static, so that what is computed does not depend on
        which shapes came before, and a resumed trial computes the same.
        """
        for block in self._blocks:
            block.compile(dynamic=False, recompile_limit=_COMPILED_VARIANTS)

    def _embed(self, images: Tensor, masks_BN: Tensor | None = None) -> Tensor:
        """Layer 0, x_BTD: class token and patches with position embedding, registers without; normed if pre-norm."""
        patches_BhwD = self.patch_embed(images)
        batch, height, width, dim = patches_BhwD.shape
        patches_BND = patches_BhwD.reshape(batch, height * width, dim)
        if masks_BN is not None:
            patches_BND = self._masked(patches_BND, masks_BN)
        antialias, offset = self.settings.pos_antialias, self.settings.pos_offset
        position = interpolate_position(cast(Tensor, self.pos_embed), height, width, antialias=antialias, offset=offset)
        assert self.cls_token is not None  # this class always builds one
        tokens = [(self.cls_token + position[:, :1]).expand(batch, -1, -1)]
        if self.num_registers:
            tokens.append(cast(Tensor, self.reg_token).expand(batch, -1, -1))
        tokens.append(patches_BND + position[:, 1:])
        return cast(Tensor, self.norm_pre(torch.cat(tokens, dim=1)))

    def _masked(self, patches_BND: Tensor, masks_BN: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("this backbone has no mask token: call add_mask_token before masks are given")
        if masks_BN.shape != patches_BND.shape[:2]:
            raise ValueError(f"masks are {list(masks_BN.shape)}, the patches {list(patches_BND.shape[:2])}")
        return torch.where(masks_BN[..., None], self.mask_token.to(patches_BND.dtype), patches_BND)

    def _layers(
        self, groups: Sequence[Tensor], masks: Tensor | None = None, crops: Sequence[int] = ()
    ) -> Iterator[tuple[list[Tensor], Layout]]:
        """The residual streams x_BTD of all groups at layer 0 … L, and the layout in which the next block has them."""
        embedded = [self._embed(images, masks if number == 0 else None) for number, images in enumerate(groups)]
        layout = self._layout(embedded)
        yield embedded, layout
        drops = self._draw_drop_path(layout, crops, embedded[0].device)
        in_groups = isinstance(drops[0], Subset)
        streams = embedded if in_groups else [pack(embedded)]
        for block, drop in zip(self._blocks, drops, strict=True):
            streams = self._run(block, streams, layout, drop)
            yield (streams if in_groups else unpack(streams[0], layout.shapes)), layout

    def _run(self, block: Any, streams: list[Tensor], layout: Layout, drop: Drop) -> list[Tensor]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Blocks draw nothing, so that no generator's state need be kept.
            run: Callable[..., list[Tensor]] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            return run(block, streams, layout, drop)
        return cast(list[Tensor], block(streams, layout, drop))

    def _layout(self, embedded: Sequence[Tensor]) -> Layout:
        shapes = tuple((x_BTD.shape[0], x_BTD.shape[1]) for x_BTD in embedded)
        return Layout(shapes, tuple(self._mask(length, embedded[0].device) for _, length in shapes))

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        sink = SINKS[self.settings.sink].has_sink
        return attention_mask(self.settings.register_mask, self.num_registers, length, sink, device)

    def _draw_drop_path(self, layout: Layout, crops: Sequence[int], device: torch.device) -> Sequence[Drop]:
        """What each block drops; nothing is drawn in evaluation."""
        images = [count for count, _ in layout.shapes]
        crops = crops or [1] * len(images)
        if len(crops) != len(images) or any(count % of for count, of in zip(images, crops, strict=False)):
            raise ValueError(f"groups of {images} images cannot hold {list(crops)} crops of equal number")
        if not (self.training and self.drop_path):
            return [None] * self.depth
        generator, group = self.drop_path_generator, self.settings.drop_path_group
        pairs = list(zip(images, crops, strict=True))
        if group is None:
            drawn = [draw_factors(self.drop_path, self.depth, *pair, generator) for pair in pairs]
            of_groups = [moved(factors, device) for factors in drawn]
            return list(factors_of_tokens(of_groups, layout.shapes))
        subsets = [draw_subsets(self.drop_path, group, self.depth, *pair, generator) for pair in pairs]
        scale = subsets[0][1]
        rows = [moved(rows_L2k, device) for rows_L2k, _ in subsets]
        return [Subset(rows_of_block, scale) for rows_of_block in zip(*rows, strict=True)]

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normed tokens [B, T, D] of normalised images [B, 3, height, width]; masks are not supported."""
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported by this backbone")
        return cast(Tensor, self.norm(self._last([x])[0][0]))

    def _last(
        self, groups: Sequence[Tensor], masks: Tensor | None = None, crops: Sequence[int] = ()
    ) -> tuple[list[Tensor], Layout]:
        for layer, reached in enumerate(self._layers(groups, masks, crops)):
            if self.tap is not None:
                self.tap(layer, reached[0][0])
        return reached

    def tokens(self, images: Tensor, *, normed: bool = True, crops: int = 1) -> Tokens:
        """Tokens of the last block, after the final norm if `normed`; images are one group of `crops` crops."""
        (x_BTD,), layout = self._last([images], crops=[crops])
        return self._tokens(x_BTD, layout, normed)

    def forward_groups(
        self, groups: Sequence[Tensor], masks: Tensor | None = None, crops: Sequence[int] = ()
    ) -> list[Tokens]:
        """Normed tokens of each group, in one pass: linear layers and norms on all tokens, attention per group.

        Args:
            groups: at least one.
            masks: bool [B, N] of the first group; where true, the mask token stands in place of the patch.
            crops: how many crops each group holds, 1 each if empty. What drop path draws for an image depends on it
                where there are several ranks, since each holds a share of every crop.

        Raises:
            ValueError: masks without a mask token or of another shape, or crops that do not fit the groups.
        """
        streams, layout = self._last(groups, masks, crops)
        return [self._tokens(x_BTD, layout, normed=True) for x_BTD in streams]

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        """The residual stream at layer 0 … L, before the final norm."""
        return (self._tokens(x_BTD, layout, normed=False) for (x_BTD,), layout in self._layers([images]))

    def intermediate(self, images: Tensor, layers: Sequence[int], *, normed: bool = True) -> list[Tokens]:
        """Tokens at `layers` (0 … L), all after the final norm if `normed`, as DINOv2's `get_intermediate_layers`."""
        wanted = {n: (x_BTD, layout) for n, ((x_BTD,), layout) in enumerate(self._layers([images])) if n in layers}
        return [self._tokens(*wanted[layer], normed) for layer in layers]

    def raw_and_normed(self, images: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tokens, Tokens]]:
        """Tokens at `layers` (0 … L), before and after the final norm, in one pass."""
        return {
            layer: (self._tokens(x_BTD, layout, normed=False), self._tokens(x_BTD, layout, normed=True))
            for layer, ((x_BTD,), layout) in enumerate(self._layers([images]))
            if layer in layers
        }

    def attention(self, images: Tensor, layer: int) -> Tensor:
        """Explicit softmax of block `layer` (1 … L) in float32, [B, H, T, T], rows are queries.

        Rows sum to 1, or where attention has a sink besides the tokens (`model.sink` attention_bias or softmax1) to 1
        minus the sink's share, which has no column here.

        Raises:
            ValueError: there is no such block.
        """
        block, x_BTD, layout = self._before(layer, images)
        return _attention(block, x_BTD, layout)

    def attentions(self, images: Tensor) -> Iterator[Tensor]:
        """`attention` of block 1 … L, one after another, in one pass."""
        for block, ((x_BTD,), layout) in zip(self._blocks, self._layers([images]), strict=False):
            yield _attention(block, x_BTD, layout)

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens in block `layer` (1 … L), each [B, H, T, C], without the sink's.

        Raises:
            ValueError: there is no such block.
        """
        block, x_BTD, _ = self._before(layer, images)
        return _qkv(block, x_BTD)

    def project(self, entering: Tokens, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """`qkv` of block `layer` (1 … L), given the tokens that enter it, before its norm."""
        return _qkv(self._blocks[layer - 1], together(entering))

    def _before(self, layer: int, images: Tensor) -> tuple[Any, Tensor, Layout]:
        """Block `layer`, and what enters it."""
        if not 1 <= layer <= self.depth:
            raise ValueError(f"layer is {layer}; allowed: 1 to {self.depth}")
        (x_BTD,), layout = next(islice(self._layers([images]), layer - 1, None))
        return self._blocks[layer - 1], x_BTD, layout

    def _tokens(self, x_BTD: Tensor, _layout: Layout, normed: bool) -> Tokens:
        x_BTD, first = self.norm(x_BTD) if normed else x_BTD, 1 + self.num_registers
        return Tokens(x_BTD[:, 0], x_BTD[:, 1:first], x_BTD[:, first:])


def _qkv(block: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = cast(Attention, block.attn)
    return attention.split_heads(attention.qkv(block.norm1(x_BTD)), *x_BTD.shape[:2])


def _attention(block: Any, x_BTD: Tensor, layout: Layout) -> Tensor:
    query, key, _ = _qkv(block, x_BTD)
    return cast(Attention, block.attn).probabilities(query, key, layout.masks[0])


def _mlp(kind: str, width: int, ratio: float) -> dict[str, Any]:
    """timm's arguments for the MLP of `model.mlp`; swiglu has the size of dinov2:dinov2/layers/swiglu_ffn.py."""
    if kind == "swiglu":
        hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
        # fc1 gives gate and value together; timm rounds width · ratio down, so it aims half a channel higher.
        return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": (2 * hidden + 0.5) / width}
    return {"mlp_layer": Mlp, "act_layer": kind, "mlp_ratio": ratio}


def forward_groups(
    backbone: Backbone, groups: Sequence[Tensor], masks: Tensor | None = None, crops: Sequence[int] = ()
) -> list[Tokens]:
    """Normed tokens of groups of images of different resolution; see `ViT.forward_groups`.

    A user's own backbone without that method is called once per group.

    Raises:
        ValueError: masks are given, and the backbone has no such method.
    """
    if hasattr(backbone, "forward_groups"):
        return cast(list[Tokens], backbone.forward_groups(groups, masks, crops))
    if masks is not None:
        raise ValueError("this method masks patches, which a backbone of your own can do by a method forward_groups")
    return [backbone.tokens(images) for images in groups]


def attentions(backbone: Backbone, images: Tensor) -> Iterator[Tensor]:
    """Explicit softmax of block 1 … L, float32 [B, H, T, T]; a user's own backbone is asked block by block."""
    if isinstance(backbone, ViT):
        yield from backbone.attentions(images)
        return
    blocks = sum(1 for _ in backbone.residuals(images[:1])) - 1
    for layer in range(1, blocks + 1):
        yield backbone.attention(images, layer)


def token_norms(backbone: Backbone, images: Tensor) -> tuple[Tensor, bool]:
    """L2 norms of all tokens of all layers before the final norm, and whether there is a class token.

    The norms are float32 [L + 1, B, T], order class, registers, patches; without a class token T is R + N.
    """
    norms, class_token = [], False
    for tokens in backbone.residuals(images):
        norms.append(norms_of(tokens))
        class_token = tokens.cls_BD is not None
    return torch.stack(norms), class_token


def norms_of(tokens: Tokens) -> Tensor:
    """L2 norms [B, T] in float32 of one layer's tokens, order class, registers, patches."""
    norms: Tensor = torch.linalg.vector_norm(together(tokens).detach(), dim=-1, dtype=torch.float32)
    return norms


def together(tokens: Tokens) -> Tensor:
    """All tokens as x_BTD, order class, registers, patches; without a class token T is R + N."""
    groups = [tokens.registers_BRD, tokens.patches_BND]
    if tokens.cls_BD is not None:
        groups.insert(0, tokens.cls_BD[:, None])
    return torch.cat(groups, dim=1)


def build(model: ModelConfig, streams: Streams) -> nn.Module:
    """The backbone that `model` describes: our ViT, or the user's own, called as `factory(model, streams)`.

    Raises:
        ValueError: the user's factory does not exist or does not give a Backbone.
    """
    if model.factory is None:
        return ViT(model, streams)
    backbone = load(model.factory)(model, streams)
    if not (isinstance(backbone, nn.Module) and isinstance(backbone, Backbone)):
        wanted = "embed_dim, num_registers, tokens, residuals, attention and qkv"
        raise ValueError(f"model.factory {model.factory!r} gave no torch module with {wanted}")
    if backbone.num_registers != model.num_registers:
        asked = f"model.num_registers is {model.num_registers}"
        raise ValueError(f"{asked}, but model.factory {model.factory!r} gave {backbone.num_registers} registers")
    return backbone
