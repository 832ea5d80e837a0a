"""Settings of what is measured of tokens: norms, outlier rule, and the measurements that trainers.catalog lists."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers import catalog
from trainers.section import LISTED, ONCE, Section, known


class RecurrenceConfig(Section):
    """Whether outliers follow the image's content or the place on the grid, when images are moved."""

    shift: int = Field(2, ge=1, le=64, description="patches by which images are shifted")
    scales: Annotated[tuple[Annotated[float, Field(gt=0.25, le=4)], ...], LISTED, ONCE] = Field(
        (0.5, 1.5), description="other resolutions, relative to model.image_size; rounded to whole patches"
    )


class LocalityConfig(Section):
    """Linear probes for a patch's position and pixels on all patch tokens (paper, Fig. 5b and Table 5)."""

    train_images: int = Field(1_000, ge=2, le=10_000_000, description="training images whose patch tokens are learned")
    test_images: int = Field(1_000, ge=1, le=10_000_000, description="most test images that are scored")
    train_tokens: int = Field(
        32_768, ge=256, le=1_000_000_000, description="of these, most that the position is learned from; pixels: all"
    )


class SingleTokenConfig(Section):
    """Logistic regression on one token per image: class, normal patch, outlier patch, register (paper, Table 1)."""

    draws: int = Field(3, ge=1, le=100, description="random choices of the token; mean and deviation are over these")
    train_images: int = Field(2_000, ge=16, le=100_000_000, description="most training images")
    test_images: int = Field(2_000, ge=16, le=100_000_000, description="most test images")
    num_c: int = Field(45, ge=1, le=100, description="values of C from 1e-6 to 1e5, evenly in log; 45 in DINOv2")


class InterventionsConfig(Section):
    """What is done to registers or outliers at evaluation, whose effect on every metric is measured."""

    on_registers: Annotated[tuple[Literal["zeroed", "mean", "shuffled"], ...], LISTED, ONCE] = (
        "zeroed",
        "mean",
        "shuffled",
    )
    on_outliers: Annotated[tuple[Literal["clamped", "neighbors", "deleted"], ...], LISTED, ONCE] = (
        "clamped",
        "neighbors",
        "deleted",
    )
    layer: Annotated[int, Field(ge=-65, le=64)] | Literal["onset"] = Field(
        "onset",
        description="whose outliers are treated, as tokens.outlier_layer counts; onset is where they set in, so that "
        "blocks follow, or tokens.outlier_layer where they do not set in",
    )


class TestTimeRegistersConfig(Section):
    """Test-time registers (Jiang et al. 2025): neurons that make outliers write to an added token instead."""

    __test__ = False  # to pytest

    neurons: int = Field(10, ge=1, le=10_000, description="50 for DINOv2-L, 10 for OpenCLIP-B at the source")
    deepest: float = Field(
        0.75,
        gt=0,
        le=1,
        description="fraction of the blocks, from the first, that are searched; 18 of 24 for DINOv2-L and 6 of 12 for "
        "OpenCLIP-B at the source",
    )
    sparse: bool = Field(
        False,
        description="leave out, image by image, neurons that reach 0.5 on more than half of the tokens; by default off "
        "in the source's code, on in its notebook",
    )
    controls: int = Field(1, ge=0, le=100, description="draws of as many random neurons, as a control")


class TokensConfig(Section):
    """Norms of class, register and patch tokens, which patches count as outliers, and what else is measured of them."""

    probe_images: int = Field(256, ge=1, le=65_536, description="images of the fixed probe batch")
    detail_images: int = Field(
        32, ge=1, le=65_536, description="of these, on which attention and channels are looked at; needs more memory"
    )
    training_stream: bool = Field(True, description="also accumulate histograms on the training batches")
    outlier_rule: Literal["mad", "fixed", "otsu"] = Field(
        "mad",
        description="which patches measurements call outliers: rule 3 of the bulk's spread, norms above "
        "outlier_norm (the paper), or Otsu's threshold where there are two clear modes",
    )
    outlier_norm: float | None = Field(150.0, gt=0, le=1e6, description="of rule fixed; 150 in the paper for DINOv2-g")
    outlier_layer: int = Field(
        -1, ge=-65, le=64, description="whose norms decide: 0 enters the first block, -1 is the last, as in the paper"
    )
    measurements: Annotated[
        tuple[Annotated[str, *known(catalog.MEASUREMENTS, own="package.module:measure")], ...], LISTED, ONCE
    ] = Field(
        ("location", "channels", "attention", "similarity", "neighbors"),
        description="what is measured besides norms; see trainers.catalog.MEASUREMENTS",
    )
    recurrence: RecurrenceConfig | None = Field(default_factory=RecurrenceConfig, description="null where it is off")
    locality: LocalityConfig | None = Field(default_factory=LocalityConfig, description="null where it is off")
    single_token: SingleTokenConfig | None = Field(
        default_factory=SingleTokenConfig, description="null where it is off"
    )
    interventions: InterventionsConfig | None = Field(
        default_factory=InterventionsConfig, description="null where they are off"
    )
    test_time_registers: TestTimeRegistersConfig | None = Field(
        default_factory=TestTimeRegistersConfig, description="null where they are off"
    )
