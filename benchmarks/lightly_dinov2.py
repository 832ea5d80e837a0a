"""DINOv2 as users of the package lightly write it: its modules, losses, masks and transforms in a hand-written loop.

Source: lightly-ai/lightly:examples/pytorch/dinov2.py (1.6.0), with gradient clipping as in their
benchmarks/imagenet/vitb16/dinov2.py. Settings are read from a trial's configuration; nothing else is shared with
`trainers`.

What is equal to ours: backbone, registers, heads, prototypes, crops and their colours, shares of masked patches, drop
path, clipping, a fused AdamW (the example's own is not fused), teacher. What is lightly's own: global and local crops
go through the student one after the other, drop path computes all images and discards some, the losses keep all logits
in float32 tensors of their own, blocks are drawn patch by patch in the training process, and images are augmented one
by one.

Attention: lightly takes timm's, which calls `F.scaled_dot_product_attention` where PyTorch has it, with PyTorch's flash
kernel on a CPU; there is no naive form on this path (`attention_form` tells). The DINOv2 models of lightly-train, which
is another package, compute an explicit softmax wherever xFormers is missing, as on every CPU
(lightly-ai/lightly-train:src/lightly_train/_models/dinov2_vit/dinov2_vit_src/layers/attention.py).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule, linear_warmup_schedule
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks import plain
from trainers import catalog
from trainers.config import TrialConfig
from trainers.method_settings import DinoV2Config, HeadConfig
from trainers.multicrop import DINOV2_BLUR

JITTER_PER_STRENGTH = 0.8  # brightness and contrast of DINOTransform at strength 1

# Crops of a batch, each [B, 3, side, side], the two global ones first, and their masks [2B, N] where these are given.
Batches = Iterator[tuple[list[Tensor], Tensor | None]]


class Network(nn.Module):
    """Backbone and the heads of class tokens and of masked patches: the student, and a copy of it the teacher."""

    def __init__(self, config: TrialConfig) -> None:
        super().__init__()
        settings, width = _settings(config), catalog.MODEL_SIZES[config.model.size].width
        registers = config.model.num_registers
        vit = plain.timm_vit(config, num_classes=0, reg_tokens=registers, pos_embed="learn", dynamic_img_size=True)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")
        self.dino_head = _head(width, settings.head)
        self.ibot_head = self.dino_head
        if settings.ibot_head is not None:
            self.ibot_head = _head(width, settings.ibot_head)

    def forward(self, images: Tensor, mask: Tensor | None, head_mask: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """Class tokens, their logits, and logits of the tokens in `head_mask`; those in `mask` are hidden."""
        features = self.backbone.encode(images, mask=mask)
        patches = None if head_mask is None else self.ibot_head(features[head_mask])
        return features[:, 0], self.dino_head(features[:, 0]), patches


def _head(width: int, settings: HeadConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # lightly uses the former weight_norm
        head: nn.Module = DINOv2ProjectionHead(width, settings.hidden, settings.bottleneck, settings.prototypes)
    return head


def _settings(config: TrialConfig) -> DinoV2Config:
    assert config.dinov2 is not None, "the trial trains another method"
    return config.dinov2


class Loop:
    """Student, teacher, losses and optimiser of a trial's configuration, stepped by hand."""

    def __init__(self, config: TrialConfig, batches: Batches) -> None:
        self.config, self.settings, self.batches = config, _settings(config), batches
        self.student, self.teacher = Network(config).train(), Network(config).eval().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        if config.model.drop_path:
            update_drop_path_rate(self.student.backbone.vit, config.model.drop_path, mode="uniform")
        temperature = {"student_temp": self.settings.student_temp, "teacher_temp": self.settings.teacher_temp}
        self.dino_loss = DINOLoss(self.settings.head.prototypes, **temperature)
        self.ibot_loss = IBOTPatchLoss((self.settings.ibot_head or self.settings.head).prototypes, **temperature)
        self.koleo_loss = KoLeoLoss()
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True
        )
        self.step = 0

    def steps(self, count: int) -> float:
        """Train on so many batches; seconds."""
        started = time.perf_counter()
        for _ in range(count):
            crops, masks_2BN = next(self.batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self._loss(crops, masks_2BN)
            loss.backward()  # type: ignore[no-untyped-call]
            self._update()
        return time.perf_counter() - started

    def _loss(self, crops: list[Tensor], masks_2BN: Tensor | None) -> Tensor:
        settings, images = self.settings, torch.cat(crops[:2])
        blocks = self._blocks(len(images)) if masks_2BN is None else masks_2BN.view(-1, *self._grid)
        hidden = torch.zeros(len(images), self.student.backbone.sequence_length, dtype=torch.bool)
        hidden[:, -blocks[0].numel() :] = blocks.flatten(1)
        with torch.no_grad():
            _, teacher_cls, teacher_patches = self.teacher(images, None, hidden)
        tokens, global_cls, patches = self.student(images, hidden, hidden)
        _, local_cls, _ = self.student(torch.cat(crops[2:]), None, None)
        temp = linear_warmup_schedule(
            self.step, settings.warmup_teacher_temp_steps, settings.warmup_teacher_temp, settings.teacher_temp
        )
        dino: Tensor = self.dino_loss(
            teacher_cls.chunk(2), torch.cat([global_cls, local_cls]).chunk(len(crops)), teacher_temp=temp
        )
        ibot: Tensor = self.ibot_loss(teacher_patches, patches, mask=blocks, teacher_temp=temp)
        loss = settings.dino_weight * dino + settings.ibot_weight * ibot
        if settings.koleo is not None:
            loss = loss + settings.koleo.weight * sum(self.koleo_loss(crop) for crop in tokens.chunk(2))
        return loss

    @property
    def _grid(self) -> tuple[int, int]:
        grid: tuple[int, int] = self.student.backbone.vit.patch_embed.grid_size
        return grid

    def _blocks(self, images: int) -> Tensor:
        low, high = self.settings.mask_ratio
        blocks: Tensor = random_block_mask(
            (images, *self._grid), self.settings.mask_probability, min_image_mask_ratio=low, max_image_mask_ratio=high
        )
        return blocks

    def _update(self) -> None:
        optim, settings = self.config.optim, self.settings
        if optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), optim.clip_grad)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = cosine_schedule(
                self.step, optim.steps, optim.weight_decay, optim.weight_decay_end or optim.weight_decay
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = cosine_schedule(self.step, optim.steps, settings.teacher_momentum, settings.teacher_momentum_end)
        update_momentum(self.student, self.teacher, m=momentum)
        self.step += 1


def attention_form(loop: Loop) -> str:
    """How the student's blocks compute attention: by PyTorch's fused operation, or by an explicit softmax."""
    fused = {block.attn.fused_attn for block in loop.student.backbone.vit.blocks}
    return "F.scaled_dot_product_attention" if fused == {True} else "explicit softmax"


class _PerImage(Dataset[list[Tensor]]):
    """Single images through lightly's DINOTransform, with a trial's crops and colours."""

    def __init__(self, config: TrialConfig, images: NDArray[np.uint8]) -> None:
        crops, image_size = _settings(config).crops, config.model.image_size
        assert isinstance(image_size, int) and isinstance(crops.local_size, int), "the configuration is not resolved"
        self._images = images
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ToTensor.*")
            self._transform = DINOTransform(
                global_crop_size=image_size,
                global_crop_scale=crops.global_scale,
                local_crop_size=crops.local_size,
                local_crop_scale=crops.local_scale,
                n_local_views=crops.num_local,
                hf_prob=0.5 if crops.flip else 0.0,
                cj_strength=crops.color_jitter / JITTER_PER_STRENGTH,
                random_gray_scale=crops.grayscale,
                gaussian_blur=DINOV2_BLUR[:3] if crops.blur else (0.0, 0.0, 0.0),
                solarization_prob=crops.solarize,
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return cast(list[Tensor], self._transform(Image.fromarray(self._images[index])))


def from_workers(config: TrialConfig, images: NDArray[np.uint8], num_workers: int) -> Batches:
    """Batches of a DataLoader whose workers augment image by image; masks are the loop's business.

    A batch is begun by the workers whenever one is taken, so that from a full queue every step has its share of them.
    """
    data = _PerImage(config, images)
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: meant
        loader: DataLoader[list[Tensor]] = DataLoader(
            data, config.optim.batch_size, sampler=sampler, num_workers=num_workers, prefetch_factor=2
        )
        batches = iter(loader)
    return ((crops, None) for crops in batches)
