"""The settings of each training method; defaults are the official values, except for lengths counted in steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers.section import LISTED, Section, rising

Scale = Annotated[tuple[float, float], LISTED, rising(0.0001, 1)]


class DeiT3Config(Section):
    """DeiT-III: supervised training (Touvron et al. 2022)."""

    loss: Literal["bce", "soft_ce"] = Field("soft_ce", description="soft_ce on ImageNet-21k, bce on ImageNet-1k")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    mixup: float = Field(0.0, ge=0, le=10, description="Beta parameter, 0 for none; 0.8 on ImageNet-1k")
    cutmix: float = Field(1.0, ge=0, le=10, description="Beta parameter, 0 for none")
    mix_group_size: int | None = Field(
        None,
        ge=2,
        description="images that are mixed with one draw, each with its mirror in the group; null for the whole "
        "micro-batch; a device's batch in the official code (64), where it must divide each rank's share",
    )
    three_augment: bool = Field(True, description="one of grayscale, solarize, Gaussian blur per image")
    color_jitter: float = Field(0.3, ge=0, le=1, description="brightness, contrast and saturation")
    crop: Literal["simple", "resized", "none"] = Field("simple", description="simple random crop or resized crop")
    flip: bool = Field(True, description="horizontal flips; off where left and right carry meaning, as in digits")
    repeats: int = Field(1, ge=1, le=16, description="repeated augmentation: views of an image; 3 on ImageNet-1k")


class OpenCLIPConfig(Section):
    """OpenCLIP: contrastive training on image–text pairs (Radford et al. 2021; mlfoundations/open_clip)."""

    loss: Literal["clip", "siglip"] = Field("clip", description="symmetric InfoNCE, or SigLIP's pairwise sigmoid")
    embed_dim: int = Field(512, ge=8, le=4096, description="width of the joint space")
    text_width: int = Field(512, ge=8, le=4096)
    text_layers: int = Field(12, ge=1, le=64)
    text_heads: int = Field(8, ge=1, le=64)
    context_length: int = Field(77, ge=8, le=512, description="tokens of a caption, longer ones are cut")
    crop_scale: Scale = Field((0.9, 1.0), description="area of the random resized crop; open_clip's default")
    max_logit_scale: float = Field(100.0, gt=1, le=1_000, description="the logit scale is clamped at its logarithm")


class CropsConfig(Section):
    """Multi-crop augmentation of DINO and DINOv2: two global crops and several local ones, colours changed apart."""

    global_scale: Scale = Field((0.32, 1.0), description="area of a global crop; (0.4, 1) in DINO")
    local_scale: Scale = Field((0.05, 0.32), description="area of a local crop; (0.05, 0.4) in DINO")
    num_local: int = Field(8, ge=0, le=32)
    local_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto", description="side of a local crop in px; auto is 3/7 of the image in whole patches (96, 98 of 224)"
    )
    flip: bool = Field(True, description="horizontal flips; off where left and right carry meaning, as in digits")
    color_jitter: float = Field(
        0.4, ge=0, le=1, description="brightness and contrast, half of it saturation, a quarter hue; on 80 % of crops"
    )
    grayscale: float = Field(0.2, ge=0, le=1, description="probability")
    solarize: float = Field(0.2, ge=0, le=1, description="probability, of the second global crop alone")
    blur: bool = Field(
        True,
        description="Gaussian blur of the first, second and local crops: at 1.0, 0.1 and 0.5 in DINO; at 0.0, 0.9, 0.5 "
        "in DINOv2, whose code swaps p and 1 - p",
    )


class HeadConfig(Section):
    """Projection head of DINO and iBOT: an MLP, L2-normalised bottleneck, weight-normalised prototypes."""

    prototypes: int = Field(
        65_536, ge=2, le=1_000_000, description="65,536 in DINO and vitl16_short, 131,072 in vitl14"
    )
    hidden: int = Field(2048, ge=8, le=65_536)
    bottleneck: int = Field(256, ge=2, le=8_192, description="384 in vitl14's DINO head")
    layers: int = Field(3, ge=1, le=8)


class DinoConfig(Section):
    """DINO (v1): self-distillation without labels (Caron et al. 2021; facebookresearch/dino:main_dino.py)."""

    head: HeadConfig = Field(default_factory=HeadConfig)
    crops: CropsConfig = Field(default_factory=lambda: CropsConfig(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)))
    student_temp: float = Field(0.1, gt=0, le=10)
    teacher_temp: float = Field(0.04, gt=0, le=10, description="after its warm-up")
    warmup_teacher_temp: float = Field(0.04, gt=0, le=10, description="at step 0; no matter without warm-up")
    warmup_teacher_temp_steps: int = Field(0, ge=0)
    teacher_momentum: float = Field(0.996, ge=0, le=1, description="at step 0, then on a cosine to its end")
    teacher_momentum_end: float = Field(1.0, ge=0, le=1)
    center_momentum: float = Field(0.9, ge=0, lt=1)
    freeze_last_layer_steps: int = Field(0, ge=0, description="the prototypes stay as they are; 1 epoch in DINO")


class KoleoConfig(Section):
    """KoLeo: spreads the class tokens of the images of a group (Sablayrolles et al. 2019)."""

    weight: float = Field(0.1, ge=0, le=100, description="0 for no KoLeo, which makes the section null")
    group_size: int = Field(
        32,
        ge=2,
        le=65_536,
        description="neighbours are looked for among so many images of one crop; a device's batch in the official code",
    )


class DinoV2Config(Section):
    """DINOv2: DINO, iBOT on masked patches and KoLeo (Oquab et al. 2023; facebookresearch/dinov2)."""

    head: HeadConfig = Field(default_factory=HeadConfig)
    separate_heads: bool = Field(True, description="iBOT has a head of its own; false in vitl16_short, true in vitl14")
    ibot_head: HeadConfig | None = Field(default_factory=HeadConfig, description="null where DINO's head is shared")
    crops: CropsConfig = Field(default_factory=CropsConfig)
    dino_weight: float = Field(1.0, ge=0, le=100)
    ibot_weight: float = Field(1.0, ge=0, le=100)
    koleo: KoleoConfig | None = Field(default_factory=KoleoConfig, description="null for no KoLeo")
    centering: Literal["softmax", "sinkhorn"] = Field("sinkhorn", description="softmax in vitl16_short")
    sinkhorn_iterations: int | None = Field(3, ge=1, le=100, description="null with softmax centring")
    center_momentum: float | None = Field(0.9, ge=0, lt=1, description="null with sinkhorn")
    student_temp: float = Field(0.1, gt=0, le=10)
    teacher_temp: float = Field(0.07, gt=0, le=10, description="after its warm-up")
    warmup_teacher_temp: float = Field(0.04, gt=0, le=10, description="at step 0; no matter without warm-up")
    warmup_teacher_temp_steps: int = Field(0, ge=0, description="30 epochs in DINOv2")
    teacher_momentum: float = Field(0.994, ge=0, le=1, description="at step 0, then on a cosine to its end")
    teacher_momentum_end: float = Field(1.0, ge=0, le=1)
    mask_probability: float = Field(0.5, ge=0, le=1, description="share of the global crops that are masked")
    mask_ratio: Scale = Field((0.1, 0.5), description="masked share of their patches, spread evenly over the crops")
    mask_group_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="masks are spread evenly over the crops of so many images; a device's batch in the official code; "
        "null for the whole batch",
    )
    freeze_last_layer_steps: int = Field(0, ge=0, description="the prototypes stay as they are; 1 epoch in DINOv2")
