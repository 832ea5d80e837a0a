"""Plain PyTorch: a hand-written training loop with timm's model, and torchvision's augmentation, batched or per image.

Nothing here is shared with `trainers`, except that settings are read from the same configuration.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from trainers import catalog
from trainers.config import TrialConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR_KERNEL = 13  # px, three standard deviations of the widest blur on either side

Batches = Iterator[tuple[Tensor, Tensor]]


class Loop:
    """Model and optimiser of a trial's configuration, stepped by hand on batches (images float32, targets)."""

    def __init__(self, config: TrialConfig, num_classes: int, batches: Batches) -> None:
        optim = config.optim
        self.model = timm_vit(config, num_classes=num_classes).train()
        groups = param_groups_weight_decay(self.model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)
        self.batches = batches
        assert config.deit3 is not None
        self.smoothing = config.deit3.smoothing
        self.is_bf16 = config.precision == "bf16"

    def steps(self, count: int) -> float:
        """Train on so many batches; seconds."""
        started = time.perf_counter()
        for _ in range(count):
            images, targets = next(self.batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
                loss = F.cross_entropy(self.model(images), targets, label_smoothing=self.smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - started


def timm_vit(config: TrialConfig, **changes: Any) -> Any:
    """timm's Vision Transformer of a trial's shape, and with what `changes` says besides."""
    shape, model = catalog.MODEL_SIZES[config.model.size], config.model
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        init_values=model.layer_scale,
        **changes,
    )


def synthetic(config: TrialConfig, num_classes: int) -> Batches:
    """One batch of noise again and again: no data, no augmentation."""
    size = config.model.image_size
    assert isinstance(size, int)
    images = torch.randn(config.optim.batch_size, 3, size, size)
    classes = torch.randint(num_classes, (len(images),))
    while True:
        yield images, classes


def batched(config: TrialConfig, images: NDArray[np.uint8], classes: NDArray[np.int64], num_classes: int) -> Batches:
    """Random batches augmented by torchvision's transforms on the whole batch: one draw per batch, not per image."""
    assert config.deit3 is not None
    size = config.model.image_size
    jitter = config.deit3.color_jitter
    augment = v2.Compose(
        [
            v2.RandomCrop(size, padding=4, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(BLUR_KERNEL, (0.1, 2.0))]),
            v2.ColorJitter(jitter, jitter, jitter),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    mix = v2.CutMix(alpha=config.deit3.cutmix, num_classes=num_classes)
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order) - config.optim.batch_size + 1, config.optim.batch_size):
            chosen = order[start : start + config.optim.batch_size]
            pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2)
            yield mix(augment(pixels), torch.from_numpy(classes[chosen]))


class _PerImage(Dataset[tuple[Tensor, int]]):
    """Single images through torchvision's transforms on PIL images, as DeiT-III's and timm's scripts do it."""

    def __init__(self, config: TrialConfig, images: NDArray[np.uint8], classes: NDArray[np.int64]) -> None:
        assert config.deit3 is not None
        self._images, self._classes = images, classes
        jitter = config.deit3.color_jitter
        self._augment = v2.Compose(
            [
                v2.RandomCrop(config.model.image_size, padding=4, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), v2.Lambda(_blur)]),
                v2.ColorJitter(jitter, jitter, jitter),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._augment(Image.fromarray(self._images[index])), int(self._classes[index])


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


class WorkerBatches:
    """Batches of a DataLoader whose workers augment image by image; CutMix is done here, as in timm's script."""

    def __init__(
        self,
        config: TrialConfig,
        images: NDArray[np.uint8],
        classes: NDArray[np.int64],
        num_classes: int,
        num_workers: int,
    ) -> None:
        assert config.deit3 is not None
        data = _PerImage(config, images, classes)
        sampler = RandomSampler(data, replacement=True, num_samples=10**9)
        self.prefetched = 2 * num_workers  # batches that wait when nobody took one for a while
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: meant
            loader: DataLoader[Any] = DataLoader(
                data, config.optim.batch_size, sampler=sampler, num_workers=num_workers, prefetch_factor=2
            )
            self._batches = iter(loader)
        self._mix = v2.CutMix(alpha=config.deit3.cutmix, num_classes=num_classes)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = self._mix(*next(self._batches))
        return mixed
