"""Self-attention over groups of images, with a sink beside the tokens, and masks between registers and other tokens.

A sink is what a query can attend to besides tokens, so that it need not attend to any of them. In an attention map rows
are queries and columns are keys.
Shapes: B images, T tokens, R registers, D width, H heads, C = D / H channels of a head, n tokens of all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn
from torch.nn import functional

RegisterMask = Literal["full", "patches_cannot_read", "registers_cannot_write", "detached"]


class Layout(NamedTuple):
    """How tokens belong together: (images, tokens of each) per group, and the additive mask of each group.

    A mask is what `attention_mask` gives. With one group tokens are kept as x_BTD, with several as x_nD, one group
    after another and image by image.

    Attributes:
        deleted: of one group in evaluation, tokens that its mask lets no query read, bool [B, T]; see `deleting`.
    """

    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    deleted: Tensor | None = None


def pack(groups: Sequence[Tensor]) -> Tensor:
    """Tokens x_BTD of several groups as x_nD; one group alone stays as it is."""
    return groups[0] if len(groups) == 1 else torch.cat([x_BTD.flatten(0, 1) for x_BTD in groups])


def unpack(packed: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The groups x_BTD that `pack` was given."""
    if len(shapes) == 1:
        return [packed]
    parts = torch.split(packed, [images * length for images, length in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def attention_mask(
    kind: RegisterMask | None, num_registers: int, length: int, sink: bool, device: torch.device
) -> Tensor | None:
    """Additive mask [T, T] of class, registers and patches: -inf where a query may not read a key; None where all may.

    patches_cannot_read     patches do not read registers, the class token does: storage for it, but no sink for patches
    registers_cannot_write  registers read registers only, so nothing of the image gets into them: a sink, no storage
    detached                registers and all other tokens do not read one another: mere extra compute

    Args:
        kind: one of these; "full" or None lets every token read every other.
        num_registers: R; with 0 there is nothing to mask.
        length: T.
        sink: whether keys end with one that is no token; every query may read it, and the mask is [T, T + 1].
        device: of the mask.
    """
    if kind in (None, "full") or num_registers == 0:
        return None
    position = torch.arange(length, device=device)
    is_register = (position > 0) & (position <= num_registers)
    if kind == "patches_cannot_read":
        forbidden = (position > num_registers)[:, None] & is_register
    elif kind == "registers_cannot_write":
        forbidden = is_register[:, None] & ~is_register
    else:
        forbidden = is_register[:, None] ^ is_register
    mask = torch.zeros(forbidden.shape, device=device).masked_fill(forbidden, -torch.inf)
    return functional.pad(mask, (0, 1)) if sink else mask


def deleting(layout: Layout, deleted_BT: Tensor, sink: bool) -> Layout:
    """`layout` of one group, in which no query reads the tokens `deleted_BT`: as if they were not there.

    Args:
        layout: without deleted tokens.
        deleted_BT: bool [B, T], so that the mask becomes one of each image: [B, 1, 1, T] where there was none, else
            [B, 1, T, T].
        sink: whether keys end with one that is no token, which stays readable; the mask is then one column wider.
    """
    (mask,) = layout.masks
    unread = torch.zeros(deleted_BT.shape, device=deleted_BT.device).masked_fill(deleted_BT, -torch.inf)[:, None, None]
    unread = functional.pad(unread, (0, 1)) if sink else unread
    return layout._replace(masks=(unread if mask is None else mask + unread,), deleted=deleted_BT)


class Attention(TimmAttention):
    """timm's attention, over several groups of images in one pass: linear layers on all tokens, attention per group."""

    has_sink = False  # whether keys end with one that is no token

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """What x_BTD (one group) or x_nD (several) becomes, of the same shape."""
        parts = unpack(self.qkv(x), layout.shapes)
        heads = [self.split_heads(part, *shape) for part, shape in zip(parts, layout.shapes, strict=True)]
        mixed = pack([self._mix(*qkv, mask) for qkv, mask in zip(heads, layout.masks, strict=True)])
        return cast(Tensor, self.proj(self.gated(mixed)))

    def split_heads(self, qkv: Tensor, images: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, T, C], of what the layer `qkv` gave."""
        query, key, value = qkv.reshape(images, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        key, value = self.with_sink(key, value)
        mask = mask if mask is None else mask.to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)

    def with_sink(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, C], or [B, H, T + 1, C] with the sink as the last."""
        return key, value

    def gated(self, mixed: Tensor) -> Tensor:
        """The heads' outputs [..., D] before the projection."""
        return mixed

    def probabilities(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Explicit softmax over tokens and sink in float32, without the sink's column, as [B, H, T, T].

        Rows sum to 1, or with a sink to 1 minus its share.
        """
        keys, _ = self.with_sink(key, key)
        logits = query.float() @ keys.float().transpose(-2, -1) * query.shape[-1] ** -0.5
        if mask is not None:
            logits = logits + mask
        return torch.softmax(logits, dim=-1)[..., : key.shape[-2]]


class AttentionBias(Attention):
    """Attention with a learned key and value per head beside the tokens, softmax(q · [K; k']ᵀ / √C) · [V; v'].

    Starts at N(0, 0.02²), as at the source; there is no start at which this sink takes no attention.
    Source: Sun et al. 2024, "Massive Activations in Large Language Models", section on explicit attention biases;
    locuslab/massive-activations:gpt-2/model_attn_bias.py. In `torch.nn.MultiheadAttention` this is `add_bias_kv`.
    """

    has_sink = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias_k = nn.Parameter(torch.zeros(self.num_heads, 1, self.head_dim))
        self.bias_v = nn.Parameter(torch.zeros(self.num_heads, 1, self.head_dim))

    def with_sink(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T + 1, C], the learned ones last."""
        images = (len(key), -1, -1, -1)
        bias_k, bias_v = self.bias_k.to(key.dtype).expand(images), self.bias_v.to(value.dtype).expand(images)
        return torch.cat([key, bias_k], dim=2), torch.cat([value, bias_v], dim=2)


class Softmax1(Attention):
    """Attention by e^x / (1 + Σ e^x): a key and a value of zeros beside the tokens, without parameters.

    Source: Miller 2023, "Attention is off by one"; `add_zero_attn` of `torch.nn.MultiheadAttention`. It changes the
    output from the start: of n equal logits 0 the sink takes 1 / (n + 1).
    """

    has_sink = True

    def with_sink(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T + 1, C], zeros last."""
        return functional.pad(key, (0, 0, 0, 1)), functional.pad(value, (0, 0, 0, 1))


class ValueGate(Attention):
    """Attention whose output gets a learned vector per head added: softmax(q · Kᵀ / √C) · V + v', v' zeros at first.

    DINOv3 (arXiv 2508.10104, appendix A.1) calls "value gating" what An et al. 2025 ("Systematic Outliers in Large
    Language Models", arXiv 2502.06415, table 2, variant b) call explicit fixed bias, whose code is followed here:
    an-yongqi/systematic-outliers:gpt-2/model_vbias.py, before the projection, zeros at first. Nothing is multiplied,
    despite the name. No code of DINOv3's own variant is public, and its wording was at hand in quotations only.
    Where the projection has a bias, as here, v' could be absorbed by it: what can be expressed is the same as without,
    and only training differs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.value_bias = nn.Parameter(torch.zeros(self.attn_dim))

    def gated(self, mixed: Tensor) -> Tensor:
        """The heads' outputs [..., D] before the projection, with v' added."""
        return mixed + self.value_bias.to(mixed.dtype)


SINKS: Mapping[str, type[Attention]] = {
    "none": Attention,
    "attention_bias": AttentionBias,
    "softmax1": Softmax1,
    "value_gate": ValueGate,
}
