"""The Vision Transformer: timm's, with register tokens, giving tokens, residual streams, q/k/v and attention.

Shapes: B images, N patches, R registers, T = 1 + R + N tokens, D width, L blocks, H heads.
Order of tokens: class, registers, patches. Layer 0 enters the first block, layer l is the output of block l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from trainers import catalog
from trainers.config import ModelConfig
from trainers.dotted import load
from trainers.streams import Streams

Tap = Callable[[int, Tensor], None]  # layer, residual stream x_BTD


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
        """Explicit softmax of block `layer` (1 … L) in float32, [B, H, T, T], rows are queries."""
        ...

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of block `layer` (1 … L), each [B, H, T, D / H]."""
        ...


class ViT(VisionTransformer):
    """timm's VisionTransformer with registers as in the paper: no position embedding, between class and patches.

    With 0 registers it is timm's plain ViT, parameter for parameter. Every parameter is initialised from a random
    stream of its own name, so that models of one seed that differ only in registers start with equal shared weights.
    The resolution may change: the position embedding is then resampled (bicubic, antialiased).
    """

    def __init__(self, model: ModelConfig, streams: Streams) -> None:
        shape = catalog.MODEL_SIZES[model.size]
        assert isinstance(model.image_size, int), "the configuration is not resolved"
        with torch.random.fork_rng(devices=[]):  # timm draws from the global generator; nothing of it is kept
            super().__init__(
                img_size=model.image_size,
                patch_size=model.patch_size,
                num_classes=0,
                embed_dim=shape.width,
                depth=shape.depth,
                num_heads=shape.heads,
                init_values=model.layer_scale,
                dynamic_img_size=True,
                weight_init="skip",
            )
        self.depth = shape.depth
        self.num_registers = model.num_registers
        self.drop_path = model.drop_path
        self.drop_path_generator = streams.torch("drop_path")
        self.tap: Tap | None = None  # sees the residual stream of every layer, in training too
        if model.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, model.num_registers, shape.width))
            self.num_prefix_tokens = 1 + model.num_registers
            self.num_reg_tokens = model.num_registers
        self._initialise(streams, model.reg_init_std)

    @property
    def _blocks(self) -> Sequence[Any]:  # timm's Block; torch types children as Tensor or Module
        return list(self.blocks)

    def _initialise(self, streams: Streams, reg_init_std: float | str | None) -> None:
        """timm's and DeiT-III's initialisation: N(0, 0.02²) cut at ±2 for weights, patch convolution as PyTorch's."""
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(streams.seed_for(f"init:{name}"))
            if name == "reg_token":
                nn.init.normal_(parameter, std=cast(float, reg_init_std), generator=generator)
            elif name.startswith("patch_embed."):
                bound = self.patch_embed.proj.weight[0].numel() ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            elif name in ("cls_token", "pos_embed") or (parameter.ndim == 2 and name.endswith(".weight")):
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            # Norm weights (1) and LayerScale (its initial value) already stand.

    def _pos_embed(self, patches_BhwD: Tensor) -> Tensor:
        """Class token and patches with position embedding, registers without, as x_BTD."""
        batch, height, width, dim = patches_BhwD.shape
        position = resample_abs_pos_embed(
            self.pos_embed, new_size=(height, width), old_size=self.patch_embed.grid_size, num_prefix_tokens=1
        )
        assert self.cls_token is not None  # this class always builds one
        tokens = [(self.cls_token + position[:, :1]).expand(batch, -1, -1)]
        if self.num_registers:
            tokens.append(cast(Tensor, self.reg_token).expand(batch, -1, -1))
        tokens.append(patches_BhwD.reshape(batch, height * width, dim) + position[:, 1:])
        return torch.cat(tokens, dim=1)

    def _layers(self, images: Tensor) -> Iterator[Tensor]:
        """The residual stream x_BTD at layer 0 … L."""
        x_BTD = self._pos_embed(self.patch_embed(images))
        yield x_BTD
        keep_L2B = self._draw_drop_path(images) if self.training and self.drop_path else None
        for index, block in enumerate(self._blocks):
            x_BTD = block(x_BTD) if keep_L2B is None else _dropped(block, x_BTD, keep_L2B[index])
            yield x_BTD

    def _draw_drop_path(self, images: Tensor) -> Tensor:
        """Factors of every residual branch, [L, 2, B]: 0 where it is dropped, else 1 / (1 - rate).

        The rate is the same in all blocks, as in the official DeiT-III (timm's would rise with depth).
        """
        shape = (self.depth, 2, images.shape[0])
        kept = torch.rand(shape, generator=self.drop_path_generator) >= self.drop_path
        return (kept / (1 - self.drop_path)).to(images.device, non_blocking=True)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normed tokens [B, T, D] of normalised images [B, 3, height, width]; masks are not supported."""
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported by this backbone")
        return cast(Tensor, self.norm(self._last(x)))

    def _last(self, images: Tensor) -> Tensor:
        for layer, x_BTD in enumerate(self._layers(images)):
            if self.tap is not None:
                self.tap(layer, x_BTD)
        return x_BTD

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        """Tokens of the last block, after the final norm if `normed`; images are [B, 3, height, width], normalised."""
        x_BTD = self._last(images)
        return self._split(self.norm(x_BTD) if normed else x_BTD)

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        """The residual stream at layer 0 … L, before the final norm."""
        return map(self._split, self._layers(images))

    def attention(self, images: Tensor, layer: int) -> Tensor:
        """Explicit softmax of block `layer` (1 … L) in float32, [B, H, T, T], rows are queries.

        Raises:
            ValueError: there is no such block.
        """
        query, key, _ = self.qkv(images, layer)
        logits = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
        return torch.softmax(logits, dim=-1)

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of block `layer` (1 … L), each [B, H, T, D / H].

        Raises:
            ValueError: there is no such block.
        """
        if not 1 <= layer <= self.depth:
            raise ValueError(f"layer is {layer}; allowed: 1 to {self.depth}")
        x_BTD = next(islice(self._layers(images), layer - 1, None))
        block = self._blocks[layer - 1]
        batch, length, _ = x_BTD.shape
        qkv = block.attn.qkv(block.norm1(x_BTD))
        query, key, value = qkv.reshape(batch, length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _split(self, x_BTD: Tensor) -> Tokens:
        first = 1 + self.num_registers
        return Tokens(x_BTD[:, 0], x_BTD[:, 1:first], x_BTD[:, first:])


def _dropped(block: Any, x_BTD: Tensor, keep_2B: Tensor) -> Tensor:
    """One pre-norm block whose two residual branches are scaled per image (stochastic depth)."""
    keep = keep_2B[:, :, None, None].to(x_BTD.dtype)
    x_BTD = x_BTD + keep[0] * block.ls1(block.attn(block.norm1(x_BTD)))
    dropped: Tensor = x_BTD + keep[1] * block.ls2(block.mlp(block.norm2(x_BTD)))
    return dropped


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
    groups = [tokens.registers_BRD, tokens.patches_BND]
    if tokens.cls_BD is not None:
        groups.insert(0, tokens.cls_BD[:, None])
    return torch.cat([torch.linalg.vector_norm(group.detach(), dim=-1, dtype=torch.float32) for group in groups], dim=1)


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
