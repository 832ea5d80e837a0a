"""Backbones whose attention is known or far from uniform, and what measuring them is like."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.trainers.planted import levels
from trainers import vit
from trainers.config import resolve
from trainers.measurement import Finding, Statistic, Subject
from trainers.streams import Streams
from trainers.vit import Tokens

PREFIX = ("cls", "register_0", "register_1")


def backbone(registers: int = 2, **settings: object) -> vit.ViT:
    """A small model whose attention is far from uniform, with large registers and sinks."""
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": registers, "layer_scale": None}
    own = {"reg_init_std": 0.5} if registers else {}
    ours = vit.ViT(resolve({"preset": "short", "model": {**given, **own, **settings}}).model, Streams(0)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for block in ours.blocks:
            block.attn.qkv.weight.mul_(4)
            for name, bias in block.attn.named_parameters():
                if name in ("bias_k", "bias_v", "value_bias"):
                    bias.copy_(torch.randn(bias.shape, generator=generator))
    return ours


def pixels(images: int = 10) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


class Given(torch.nn.Module):
    """A backbone whose attention of block l on image i is `table[l - 1, i]`; patches `high` [B, N] are outliers."""

    embed_dim = 2

    def __init__(self, table: Tensor, high: NDArray[np.bool_], prefix: tuple[str, ...] = PREFIX) -> None:
        super().__init__()
        self.table, self.prefix = table, prefix
        self.norms = torch.from_numpy(np.where(high, 50.0, 1.0).astype(np.float32))
        self.num_registers = len([kind for kind in prefix if kind != "cls"])

    def _numbers(self, images: Tensor) -> Tensor:
        return levels(images)[:, 0, 0].round().long()

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        patches = self.norms[self._numbers(images)][..., None] * torch.tensor([0.6, 0.8])
        cls = patches.new_ones(len(images), 2) if "cls" in self.prefix else None
        for _ in range(len(self.table) + 1):
            yield Tokens(cls, patches.new_ones(len(images), self.num_registers, 2), patches)

    def attention(self, images: Tensor, layer: int) -> Tensor:
        return self.table[layer - 1, self._numbers(images)]


def given(images: int = 5, prefix: tuple[str, ...] = PREFIX, blocks: int = 2, sink: bool = False) -> Given:
    """Random attention of 3 heads over 16 patches; images 0 and 3 have outliers."""
    length, generator = len(prefix) + 16, torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(blocks, images, 3, length, length + sink, generator=generator)
    high = np.zeros((images, 16), bool)
    high[0, [2, 9]] = high[3, 4] = True
    return Given(torch.softmax(logits, -1)[..., :length], high, prefix)


def ended(looked_at: Subject) -> Subject:
    """The same subject at the end of a trial, when maps are kept."""
    return dataclasses.replace(looked_at, at_end=True)


def rows(found: list[Finding]) -> dict[tuple[str, int | None, int | None, str | None], float]:
    return {(s.name, s.layer, s.head, s.token): s.value for s in found if isinstance(s, Statistic)}
