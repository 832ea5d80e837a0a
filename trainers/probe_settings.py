"""Settings of the downstream probes: what each learns, on which data set, and how often it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainers import catalog
from trainers.explain import did_you_mean, shown
from trainers.section import LISTED, ONCE, Section


def _data_set(name: str) -> str:
    if catalog.is_evaluation_set(name):
        return name
    if name in catalog.DATASETS:
        raise ValueError(f"is {shown(name)}, whose content is your own; allowed: {name}/NAME, which names it")
    raise ValueError(
        f"is {shown(name)}, which is no data set{did_you_mean(name, catalog.DATASETS)}; allowed: "
        f"{', '.join(catalog.DATASETS)}, image_folder/NAME, or package.module:build of your own"
    )


def _template(text: str) -> str:
    if "{}" in text:
        return text
    raise ValueError(
        f"is {shown(text)}, which has no place for a class; allowed: texts with {{}}, as in a photo of a {{}}"
    )


DataSets = Annotated[tuple[Annotated[str, AfterValidator(_data_set)], ...], LISTED, ONCE]


class ProbeConfig(Section):
    """What every probe has."""

    data: DataSets = Field(
        (),
        description="data sets that it runs on, each under execution.data_root; none stands for data.train. The first "
        "has the short names of metrics, such as test/knn/top1, the others test/knn/NAME/top1",
    )
    at: Literal["every", "end"] = Field(
        "every", description="every: at each evaluation; end: only at the end of a trial"
    )


class LinearConfig(ProbeConfig):
    """Linear classification on frozen features, the official DINOv2 grid of learning rates, all heads at once."""

    preset: Literal["fast", "grid", "paper"] = Field(
        "fast", description="grid: DINOv2's 52 heads on features extracted once; paper: its protocol; not identity"
    )
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=100)], ...], LISTED, ONCE] = Field(
        (1e-3, 3e-3, 1e-2, 3e-2, 0.1), min_length=1, description="per 256 images; 13 from 1e-5 to 0.1 in DINOv2"
    )
    blocks: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], LISTED, ONCE] = Field(
        (1,), min_length=1, description="class tokens of the last so many blocks, side by side; 1 and 4 in DINOv2"
    )
    steps: int = Field(500, ge=1, le=1_000_000, description="12,500 in DINOv2")
    batch_size: int = Field(256, ge=1, le=65_536)
    crops: bool = Field(False, description="features anew at every step, of random crops and flips, as in DINOv2")
    select_on: Literal["train", "val"] = Field(
        "train", description="where the best head of a family is chosen: a tenth of training, or validation"
    )


class KnnConfig(ProbeConfig):
    """Weighted k-nearest-neighbour classification (official DINOv2 protocol)."""

    preset: Literal["fast", "paper"] = Field("fast", description="paper: at the end alone; else equal; not identity")
    k: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], LISTED, ONCE] = Field(
        (10, 20, 100, 200), min_length=1
    )
    temperature: float = Field(0.07, gt=0, le=10)


class ZeroShotConfig(ProbeConfig):
    """Classification by the similarity of an image to texts that name the classes; of openclip alone."""

    preset: Literal["fast", "paper"] = Field("fast", description="paper: at the end alone; else equal; not identity")
    templates: Annotated[
        tuple[Annotated[str, Field(max_length=1_000), AfterValidator(_template)], ...], LISTED, ONCE
    ] = Field((), description="texts with {} for the class; none stands for those of the data set")


class SegmentationConfig(ProbeConfig):
    """Linear segmentation of the last layer's patches after the final norm: batch norm and one linear layer."""

    preset: Literal["fast", "paper"] = Field("fast", description="paper: DINOv2's protocol for ADE20k; not identity")
    steps: int = Field(1_000, ge=1, le=10_000_000, description="40,000 in DINOv2")
    batch_size: int = Field(16, ge=1, le=65_536, description="images of a step, 16 in DINOv2")
    learning_rate: float = Field(1e-2, gt=0, le=10, description="of AdamW, falling linearly to 0; 1e-3 in DINOv2")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="1e-4 in DINOv2")
    warmup_steps: int = Field(20, ge=0, description="1,500 in DINOv2")
    whole: bool = Field(
        False, description="images at their own size, randomly scaled and cropped in training, by windows in testing"
    )
    side: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="shorter side of whole images, and side of crops and windows in px; null is that of the model; "
        "512 in DINOv2",
    )
    stride: int | None = Field(
        None, ge=1, le=4096, description="of windows over whole images in px; null is two thirds of side; 341 in DINOv2"
    )


class DepthConfig(ProbeConfig):
    """Linear depth: classification into uniform bins, on tokens of the last layers before the final norm."""

    preset: Literal["fast", "paper"] = Field("fast", description="paper: DINOv2's protocol for NYU depth; not identity")
    steps: int = Field(500, ge=1, le=10_000_000, description="38,400 in DINOv2")
    batch_size: int = Field(16, ge=1, le=65_536, description="images of a step, 16 in DINOv2")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="of AdamW; 1e-4 in DINOv2")
    weight_decay: float = Field(0.01, ge=0, le=1, description="0.01 in DINOv2")
    warmup_steps: int = Field(20, ge=0, description="12,800 in DINOv2")
    blocks: Literal[1, 4] = Field(1, description="tokens of the last block, or of four that divide the depth evenly")
    bins: int = Field(256, ge=2, le=4096, description="256 in DINOv2")
    min_depth: float = Field(1e-3, gt=0, description="of the bins, in metres; 0.001 in DINOv2")
    max_depth: Annotated[float, Field(gt=0, le=10_000)] | Literal["auto"] = Field(
        "auto", description="of the bins, in metres; auto is what the data set says: 10 for NYU depth"
    )
    upsample: int = Field(4, ge=1, le=64, description="how much finer than the patches depth is predicted; 4 in DINOv2")
    gradient_weight: float = Field(0.5, ge=0, le=100, description="of the gradient loss beside SigLoss; 0.5 in DINOv2")
    gradient_axes: Literal["image", "batch"] = Field(
        "image", description="image: rows and columns; batch: images and channels, which DINOv2's code does by mistake"
    )
    group_size: int | None = Field(
        None, ge=1, le=65_536, description="images that share a loss, null for all of a step; 2 in DINOv2, one GPU's"
    )
    whole: bool = Field(False, description="images at their own size, cropped at random in training")
    crop: Literal["none", "nyu"] = Field(
        "none", description="of whole images; nyu: without NYU's margin in training, and the Eigen crop in testing"
    )
    height: int | None = Field(
        None, ge=1, le=4096, description="of crops of whole images in px; null is that of the model; 416 in DINOv2"
    )
    width: int | None = Field(None, ge=1, le=4096, description="as height; 544 in DINOv2")
    flip: bool = Field(False, description="whole images are tested together with their mirror images, as in DINOv2")


class ObjectDiscoveryConfig(ProbeConfig):
    """LOST: the main object from similarities of patches in the last block, without any training."""

    preset: Literal["fast", "paper"] = Field("fast", description="paper: whole images, LOST's splits; not identity")
    features: Literal["auto", "keys", "queries", "values"] = Field(
        "auto", description="of the last block; auto is the paper's: values for deit3 and openclip, else keys"
    )
    normalize: bool = Field(True, description="features to length 1 before their products; LOST does not")
    biases: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], LISTED, ONCE] = Field(
        (-0.9, -0.8, -0.6, -0.4, -0.2, 0.0, 0.1),
        min_length=1,
        description="added to the products; the best on the first data set serves all, and the whole curve is kept. "
        "The paper does not publish its own",
    )
    patches: int = Field(100, ge=1, le=100_000, description="of lowest degree, that may extend the seed; 100 in LOST")
    images: int = Field(2_000, ge=1, le=100_000_000, description="most images of a split")
    whole: bool = Field(False, description="images at their own size, padded to whole patches, as in LOST")
    protocol_splits: bool = Field(False, description="on the splits that LOST is reported on, such as trainval")
    pictures: int = Field(4, ge=0, le=32, description="test images whose stages are drawn at the end")
