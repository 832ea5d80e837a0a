"""DINO: self-distillation without labels between crops of an image (Caron et al. 2021), whole.

Source: facebookresearch/dino (main_dino.py, vision_transformer.py, utils.py).
    views     multi-crop (`trainers.multicrop`): two global crops and several local ones of every image
    student   all crops, in one pass
    teacher   the two global crops, by weights that follow the student's: t ← m · t + (1 - m) · s
    losses    cross-entropy from the teacher's distribution of a global crop, softmax((t - centre) / teacher_temp), to
              the student's of every other crop, softmax(s / student_temp), averaged over crop pairs and images
    centre    moving average of the teacher's logits over all images of all ranks, moved after it was used
Gradients are clipped parameter by parameter, and those of the prototypes dropped at first. The teacher is evaluated.
In the official code warm-up of the teacher's temperature and freezing of the prototypes count epochs, here steps, and
stochastic depth grows from block to block, where here it is the backbone's.
Shapes: B images, L local crops, V = 2 + L crops, D width, K prototypes; rows of several crops are crop-major.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import distributed, vit
from trainers.config import TrialConfig
from trainers.method_settings import DinoConfig
from trainers.methods import Batch, Method, Progress, Views
from trainers.methods.self_distillation import (
    PrototypeHead,
    cross_entropy,
    move_teacher_,
    teacher_copy,
    teacher_momentum,
    teacher_temp,
)
from trainers.multicrop import DINO_BLUR, NUM_GLOBAL, multicrop_views
from trainers.streams import Streams


class Dino(Method):
    """Student and teacher: each a backbone and a head on its final-normed class token.

    Raises:
        ValueError: the backbone has no class token (when a loss is asked for).
    """

    accumulation: Literal["mean", "cached", "none"] = "none"
    center_1K: Tensor

    def __init__(self, config: TrialConfig, backbone: nn.Module, num_classes: int, streams: Streams) -> None:
        super().__init__(config, backbone, num_classes, streams)
        assert config.dino is not None and isinstance(config.model.image_size, int), "configuration is not resolved"
        self.settings: DinoConfig = config.dino
        self.image_size: int = config.model.image_size
        self.head = PrototypeHead(backbone.embed_dim, self.settings.head, streams, "head")  # type: ignore[arg-type]
        self.teacher_backbone = teacher_copy(backbone)
        self.teacher_head = teacher_copy(self.head)
        self.register_buffer("center_1K", torch.zeros(1, self.settings.head.prototypes))
        self._batch_center_1K: Tensor | None = None  # of the step that is under way

    def views(self, batch: Batch, streams: Streams) -> Views:
        """`global` float32 [2 · B, 3, S, S] and, with local crops, `local` [L · B, 3, s, s]."""
        return multicrop_views(batch, self.image_size, self.settings.crops, streams, DINO_BLUR)

    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """`dino`: mean over pairs of crops and over images."""
        with torch.no_grad():
            teacher = self.teacher_head(self.class_tokens(self.teacher_backbone.tokens(views["global"]))).float()  # type: ignore[operator]
            self._batch_center_1K = teacher.mean(dim=0, keepdim=True)
            targets = sharpened(teacher, self.center_1K, teacher_temp(self.settings, progress.step))
        groups = [views[name] for name in ("global", "local") if name in views]
        crops = [NUM_GLOBAL, self.settings.crops.num_local][: len(groups)]
        tokens = vit.forward_groups(self.backbone, groups, crops=crops)  # type: ignore[arg-type]
        student = self.head(torch.cat([self.class_tokens(group) for group in tokens]))
        return {"dino": dino_loss(student, targets, self.settings.student_temp)}

    def before_update(self, progress: Progress) -> None:
        """Drop the gradients of the prototypes while they are frozen; no weight decay moves them then either."""
        if progress.step < self.settings.freeze_last_layer_steps:
            self.head.last_layer.zero_grad(set_to_none=True)

    def clip_gradients(self, max_norm: float) -> None:
        """Limit the norm of every parameter's gradient by itself."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (max_norm / (norms + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student, and the centre towards the teacher's logits of this step."""
        momentum = teacher_momentum(self.settings, progress)
        move_teacher_(self.teacher_backbone, self.backbone, momentum)
        move_teacher_(self.teacher_head, self.head, momentum)
        assert self._batch_center_1K is not None, "a step begins with its losses"
        batch_center_1K = distributed.mean_(self._batch_center_1K)
        self.center_1K.lerp_(batch_center_1K, 1.0 - self.settings.center_momentum)
        self._batch_center_1K = None

    def evaluated(self) -> nn.Module:
        """The teacher's backbone."""
        return self.teacher_backbone


def sharpened(teacher_logits: Tensor, center_1K: Tensor, temperature: float) -> Tensor:
    """The teacher's centred and sharpened probabilities, [n, K]."""
    return F.softmax((teacher_logits - center_1K) / temperature, dim=-1)


def dino_loss(student_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy: mean over the images and over the pairs of a teacher's crop and another of the student's.

    Args:
        student_logits: [V · B, K], global crops first.
        targets: the teacher's probabilities of the global crops, [2 · B, K].
        temperature: of the student.
    """
    rows, prototypes = targets.shape
    images = rows // NUM_GLOBAL
    crops = len(student_logits) // images
    of_global, of_local = torch.split(student_logits, [rows, len(student_logits) - rows])
    total = cross_entropy(of_global[None], targets.roll(images, dims=0), temperature).sum()
    if crops > NUM_GLOBAL:  # both of the teacher's crops are targets of the local ones, so their sum is
        both_BK = targets.view(NUM_GLOBAL, images, prototypes).sum(dim=0)
        total = total + cross_entropy(of_local.view(-1, images, prototypes), both_BK, temperature).sum()
    return total / (NUM_GLOBAL * (crops - 1) * images)
