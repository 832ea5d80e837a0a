"""DINOv2: self-distillation of images (DINO) and of masked patches (iBOT), and KoLeo (Oquab et al. 2023), whole.

Source: facebookresearch/dinov2 (dinov2/train/ssl_meta_arch.py, dinov2/loss).
    views     two global crops, half of them with blocks of patches masked for the student, and local crops
    teacher   sees the global crops whole; Sinkhorn-Knopp or centring turns its logits into probabilities
    losses    DINO: class tokens of every crop predict the teacher's class token of each other global crop
              iBOT: masked patches predict what the teacher makes of the same patches
              KoLeo: class tokens of a crop keep away from their nearest neighbour among a group of images
After each step the teacher moves towards the student. The teacher is evaluated.
Different from there:
    masks     without `mask_group_size` they are spread over the crops of the whole batch, not of each device's
    centring  iBOT's centre takes the mean over the masked patches of all ranks, not the mean of the ranks' means
    KoLeo     stays on where the weight of DINO's loss, which it is tied to there, is 0
    settings  precision and how class tokens are initialised are the trial's, and the official ones in the presets alone
Shapes: B images of this rank, N patches of a global crop, V views, M rows (class tokens or masked patches), D width,
K prototypes. Crops come crop-major: all images' first crop, then their second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import distributed, vit
from trainers.config import TrialConfig
from trainers.device import moved
from trainers.masking import BlockMasks, requested_counts
from trainers.method_settings import DinoV2Config
from trainers.methods import Batch, Method, Progress, Upcoming, Views
from trainers.methods.self_distillation import (
    PrototypeHead,
    cross_entropy,
    divided,
    move_teacher_,
    teacher_copy,
    teacher_momentum,
    teacher_temp,
)
from trainers.multicrop import DINOV2_BLUR, NUM_GLOBAL, multicrop_views
from trainers.streams import Streams

_TOP_EXPONENT = 60.0  # e^60 · 10^12 entries is below float32's largest number, and entries e^-147 below still count


class Rows(NamedTuple):
    """What a network gives for each row, logits or probabilities: class tokens [M, K] of each group, patches [M, K]."""

    cls: Sequence[Tensor]  # global crops, then local ones where there are any; empty where DINO's loss is off
    patches: Tensor  # the masked ones; no row where iBOT's loss is off


class DinoV2(Method):
    """Student and teacher, each a backbone with a head for class tokens and one for patches, or one for both.

    Raises:
        ValueError: the backbone cannot mask or, when a loss is asked for, has no class token.
    """

    accumulation: Literal["mean", "cached", "none"] = "none"

    def __init__(self, config: TrialConfig, backbone: nn.Module, num_classes: int, streams: Streams) -> None:
        super().__init__(config, backbone, num_classes, streams)
        assert config.dinov2 is not None and isinstance(config.model.image_size, int), "configuration is not resolved"
        self.settings: DinoV2Config = config.dinov2
        self.image_size: int = config.model.image_size
        self.block_masks = BlockMasks(self.image_size // config.model.patch_size)
        self._check()
        if self.settings.mask_probability:
            cast(Any, backbone).add_mask_token(streams)
        self._build_heads(streams)
        self.teacher_backbone = teacher_copy(backbone)
        self.teacher_dino_head = None if self.dino_head is None else teacher_copy(self.dino_head)
        self.teacher_ibot_head = None if self.ibot_head is None else teacher_copy(self.ibot_head)
        self._build_centers()

    def _check(self) -> None:
        if self.settings.mask_probability and not hasattr(self.backbone, "add_mask_token"):
            raise ValueError(
                f"method dinov2 masks patches, which the backbone {type(self.backbone).__name__} cannot do: it has no "
                "add_mask_token; allowed: the built-in ViT, or dinov2.mask_probability and dinov2.ibot_weight 0"
            )

    def _build_heads(self, streams: Streams) -> None:
        """DINO's head and iBOT's, those that a loss needs; without a head of its own iBOT shares DINO's.

        As in the official DINOv2, and unlike DINO, the prototypes' lengths are learned.
        """
        settings, width = self.settings, cast(int, self.backbone.embed_dim)
        own = settings.ibot_head if settings.ibot_weight else None
        self.dino_head = self.ibot_head = None
        if settings.dino_weight or own is None:
            self.dino_head = PrototypeHead(width, settings.head, streams, "dino_head", learned_gain=True)
        if own is not None:
            self.ibot_head = PrototypeHead(width, own, streams, "ibot_head", learned_gain=True)

    def _build_centers(self) -> None:
        settings = self.settings
        self.dino_center = self.ibot_center = None
        if settings.centering == "softmax":
            assert settings.center_momentum is not None, "configuration is not resolved"
            self.dino_center = Center(settings.head.prototypes, settings.center_momentum)
            self.ibot_center = Center((settings.ibot_head or settings.head).prototypes, settings.center_momentum)

    def prepare(self, upcoming: Upcoming) -> dict[str, Tensor]:
        """Masks of the global crops of a batch: `masks` bool [B, 2, N]."""
        settings, images = self.settings, len(upcoming.positions)
        if not settings.mask_probability:
            return {}
        generator = np.random.default_rng(self.streams.seed_for(f"masks/{upcoming.step}"))
        patches = self.block_masks.side**2
        counts = self._masked_counts(upcoming.batch_size, patches, generator)
        seeds = generator.integers(2**63, size=len(counts))
        own = np.concatenate([crop * upcoming.batch_size + upcoming.positions for crop in range(NUM_GLOBAL)])
        masks = torch.from_numpy(self.block_masks(counts[own], seeds[own]))
        return {"masks": masks.view(NUM_GLOBAL, images, patches).transpose(0, 1).contiguous()}

    def _masked_counts(self, batch_size: int, patches: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """How many patches each global crop of the whole batch should lose, crop-major, each group balanced."""
        settings = self.settings
        size = settings.mask_group_size or batch_size
        groups = [
            requested_counts(NUM_GLOBAL * size, patches, settings.mask_probability, settings.mask_ratio, generator)
            for _ in range(batch_size // size)
        ]
        return np.concatenate([group.reshape(NUM_GLOBAL, size) for group in groups], axis=1).flatten()

    def views(self, batch: Batch, streams: Streams) -> Views:
        """`global` [2B, 3, S, S] and `local` crops, `masks` bool [2B, N] of the former, `masked` int64 [M].

        `masked` are the indices of the masked patches in the flattened masks. Only DINO's loss takes local crops.
        """
        crops = self.settings.crops
        if not self.settings.dino_weight:
            crops = crops.model_copy(update={"num_local": 0})
        views = multicrop_views(batch, self.image_size, crops, streams, DINOV2_BLUR)
        if self.settings.mask_probability:
            masks = batch.prepared["masks"].transpose(0, 1).flatten(0, 1)
            views["masks"] = moved(masks, batch.images.device)
            views["masked"] = moved(masks.flatten().nonzero()[:, 0], batch.images.device)  # counted on the CPU
        return views

    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """`dino_global`, `dino_local`, `ibot` and `koleo`, those that are on, weights included.

        Each is a mean over this rank's images, so that their mean over ranks is the loss of the whole batch.
        """
        settings = self.settings
        targets = self._targets(views, teacher_temp(settings, progress.step))
        tokens = self._student_tokens(views)
        student = self._logits(tokens, views, self.dino_head, self.ibot_head)
        losses: dict[str, Tensor] = {}
        if settings.dino_weight:
            losses |= self._dino_losses(student.cls, targets.cls[0])
        if settings.ibot_weight:
            weights = patch_weights(views["masks"], views["masked"])
            loss = ibot_loss(student.patches, targets.patches, weights, len(views["masks"]), settings.student_temp)
            losses["ibot"] = settings.ibot_weight * loss
        if settings.koleo is not None:
            crops = self.class_tokens(tokens[0]).chunk(NUM_GLOBAL)  # two crops of one image are never neighbours
            terms = [koleo_loss(crop, settings.koleo.group_size) for crop in crops]
            losses["koleo"] = settings.koleo.weight * torch.stack(terms).sum()
        return losses

    @torch.no_grad()
    def _targets(self, views: Views, temp: float) -> Rows:
        """The teacher's probabilities for the global crops, of class tokens in the rows of the student's other crop."""
        tokens = cast(vit.Backbone, self.teacher_backbone).tokens(views["global"])
        swapped = tokens._replace(cls_BD=self.class_tokens(tokens).roll(len(views["global"]) // NUM_GLOBAL, dims=0))
        logits = self._logits([swapped], views, self.teacher_dino_head, self.teacher_ibot_head)
        cls = [self._probabilities(rows, self.dino_center, temp) for rows in logits.cls]
        return Rows(cls, self._probabilities(logits.patches, self.ibot_center, temp))

    def _probabilities(self, logits: Tensor, center: Center | None, temp: float) -> Tensor:
        if center is None:
            assert self.settings.sinkhorn_iterations is not None, "configuration is not resolved"
            return sinkhorn_knopp(logits, temp, self.settings.sinkhorn_iterations)
        probabilities = center.probabilities(logits, temp)
        center.update(logits)
        return probabilities

    def _student_tokens(self, views: Views) -> list[vit.Tokens]:
        """Of the global crops, masked, and of the local ones, in one pass."""
        groups, crops = [views["global"]], [NUM_GLOBAL]
        if "local" in views:
            groups.append(views["local"])
            crops.append(self.settings.crops.num_local)
        return vit.forward_groups(cast(vit.Backbone, self.backbone), groups, views.get("masks"), crops)

    def _logits(
        self, tokens: Sequence[vit.Tokens], views: Views, head: PrototypeHead | None, own: PrototypeHead | None
    ) -> Rows:
        """By `head` of class tokens, by `own` of the masked patches of the first group; without `own` in one pass."""
        cls = [self.class_tokens(group) for group in tokens] if self.settings.dino_weight else []
        patches = tokens[0].patches_BND.flatten(0, 1)
        patches = patches.index_select(0, views["masked"]) if self.settings.ibot_weight else patches[:0]
        if own is None:
            assert head is not None, "one head is built at least"
            *logits, of_patches = head(torch.cat([*cls, patches])).split([len(rows) for rows in (*cls, patches)])
            return Rows(logits, of_patches)
        if not cls:
            return Rows([], own(patches))
        assert head is not None, "built where DINO's loss is on"
        return Rows(head(torch.cat(cls)).split([len(rows) for rows in cls]), own(patches))

    def _dino_losses(self, student: Sequence[Tensor], targets_2BK: Tensor) -> dict[str, Tensor]:
        """Sums over pairs of crops, divided by the number of pairs: 2 of global crops and 2 for every local one.

        Without local crops the divisor is 3 rather than 2, as in the official code.
        """
        settings = self.settings
        scale = settings.dino_weight / (NUM_GLOBAL + max(NUM_GLOBAL * settings.crops.num_local, 1))
        pairs = dino_global_loss(student[0], targets_2BK, settings.student_temp)
        losses = {"dino_global": NUM_GLOBAL * scale * pairs}
        for local in student[1:]:
            local_VBK = local.view(settings.crops.num_local, -1, local.shape[1])
            losses["dino_local"] = scale * dino_local_loss(local_VBK, targets_2BK, settings.student_temp)
        return losses

    def clip_gradients(self, max_norm: float) -> None:
        """Backbone, DINO's head and iBOT's head each by itself, as the official code does with `clip_grad_norm_`."""
        for part in (self.backbone, self.dino_head, self.ibot_head):
            if part is not None:
                nn.utils.clip_grad_norm_(part.parameters(), max_norm)

    def last_layer_lr_scale(self, progress: Progress) -> float:
        """0 while the prototypes are frozen."""
        return 0.0 if progress.step < self.settings.freeze_last_layer_steps else 1.0

    def after_step(self, progress: Progress) -> None:
        """Move the teacher, with a momentum that goes on a cosine from its start to its end."""
        momentum = teacher_momentum(self.settings, progress)
        move_teacher_(self.teacher_backbone, self.backbone, momentum)
        if self.dino_head is not None and self.teacher_dino_head is not None:
            move_teacher_(self.teacher_dino_head, self.dino_head, momentum)
        if self.ibot_head is not None and self.teacher_ibot_head is not None:
            move_teacher_(self.teacher_ibot_head, self.ibot_head, momentum)

    def evaluated(self) -> nn.Module:
        """The teacher's backbone."""
        return self.teacher_backbone


def dino_local_loss(student_VBK: Tensor, teacher_2BK: Tensor, temp: float) -> Tensor:
    """Cross-entropy of local crops with the teacher's two global ones: sum over 2 · V pairs, mean over images.

    Source: dinov2/loss/dino_clstoken_loss.py.
    """
    both_BK = teacher_2BK.view(NUM_GLOBAL, -1, teacher_2BK.shape[1]).sum(dim=0)
    return cross_entropy(student_VBK, both_BK, temp).sum(dim=0).mean()


def dino_global_loss(student_MK: Tensor, teacher_MK: Tensor, temp: float) -> Tensor:
    """Cross-entropy of each row with the teacher's probabilities in the same row: mean over rows."""
    return cross_entropy(student_MK[None], teacher_MK, temp).mean()


def patch_weights(masks_CN: Tensor, indices_M: Tensor) -> Tensor:
    """1 / (masked patches of its crop) for each of the masked patches `indices_M` of the flattened masks, [M]."""
    per_crop = masks_CN.sum(dim=1).clamp(min=1).float().reciprocal()
    return per_crop.index_select(0, indices_M.div(masks_CN.shape[1], rounding_mode="floor"))


def ibot_loss(student_MK: Tensor, teacher_MK: Tensor, weights_M: Tensor, crops: int, temp: float) -> Tensor:
    """Weighted sum of the cross-entropies of masked patches, divided by the number of all crops, unmasked ones too.

    Source: dinov2/loss/ibot_patch_loss.py, `forward_masked`.
    """
    return (cross_entropy(student_MK[None], teacher_MK, temp)[0] * weights_M).sum() / crops


def koleo_loss(x_BD: Tensor, group_size: int) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour, rows of length 1.

    Neighbours are looked for among every `group_size` consecutive rows: the official code looks in a device's batch.
    Their choice has no gradient. Source: dinov2/loss/koleo_loss.py.

    Raises:
        ValueError: the rows are not whole groups.
    """
    if len(x_BD) % group_size:
        raise ValueError(
            f"dinov2.koleo.group_size {group_size} does not divide the {len(x_BD)} images of a crop that one rank holds"
        )
    with torch.autocast(x_BD.device.type, enabled=False):
        rows = F.normalize(x_BD.float(), dim=-1, eps=1e-8).view(-1, group_size, x_BD.shape[1])
        with torch.no_grad():
            cosines = rows @ rows.transpose(1, 2)
            cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = cosines.argmax(dim=2, keepdim=True)
        distance = F.pairwise_distance(rows, rows.take_along_dim(nearest, dim=1), eps=1e-8)
        return -torch.log(distance + 1e-8).mean()


@torch.no_grad()
def sinkhorn_knopp(logits_MK: Tensor, temp: float, iterations: int) -> Tensor:
    """Probabilities [M, K] whose rows sum to 1 and that use all prototypes alike over the rows of all ranks.

    The rows and columns of exp(logits / temp) are scaled in turn so that the columns (over all ranks) have equal sums,
    then the rows; here the two scales alone are iterated, which reads the matrix without writing it. Constant factors
    cancel, and with them the number of rows; the columns' are kept at 1 or below.
    Source: dinov2/loss/dino_clstoken_loss.py, `sinkhorn_knopp_teacher`.
    """
    with torch.autocast(logits_MK.device.type, enabled=False):
        exponents = divided(logits_MK, temp)
        largest = exponents.max() if exponents.numel() else exponents.new_full((), -torch.inf)
        matrix = exponents.sub_(distributed.max_(largest) - _TOP_EXPONENT).exp_()
        of_rows = matrix.new_ones(len(matrix))
        for _ in range(iterations):
            sums = distributed.sum_(of_rows @ matrix)
            of_columns = sums.min() / sums
            of_rows = (matrix @ of_columns).reciprocal_()
        return matrix.mul_(of_columns).mul_(of_rows[:, None])


class Center(nn.Module):
    """Running mean of a teacher's logits over the rows of all ranks, subtracted before its softmax.

    A batch's mean waits until the next use, as in the official code, where it is summed over ranks in the meantime; all
    of it is in buffers and so in checkpoints.
    """

    center: Tensor
    batch_mean: Tensor
    waiting: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.register_buffer("batch_mean", torch.zeros(1, prototypes))
        self.register_buffer("waiting", torch.zeros(()))  # 1 while a batch's mean waits

    @torch.no_grad()
    def probabilities(self, logits_MK: Tensor, temp: float) -> Tensor:
        """Softmax of (logits - center) / temp, [M, K], after what waited was taken in."""
        self.center.lerp_(self.batch_mean, (1.0 - self.momentum) * self.waiting)
        self.waiting.zero_()
        return torch.softmax(logits_MK.float().sub(self.center).div_(temp), dim=-1)

    @torch.no_grad()
    def update(self, logits_MK: Tensor) -> None:
        """Let the mean of these rows of all ranks wait; with no row at all the center will stay as it is."""
        total = logits_MK.sum(dim=0, keepdim=True, dtype=torch.float32)
        packed = distributed.sum_(torch.cat([total, total.new_full((1, 1), len(logits_MK))], dim=1))
        self.batch_mean.copy_(packed[:, :-1] / packed[:, -1:].clamp(min=1.0))
        self.waiting.copy_(packed[0, -1].clamp(max=1.0))
