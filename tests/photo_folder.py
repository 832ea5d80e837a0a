"""An image folder of real photographs: crops of scikit-image's, one class a photograph; train and test do not overlap.

python -m tests.photo_folder DIR [CROPS]
"""

import importlib.util
import random
import sys
from pathlib import Path

from PIL import Image

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
TEXTURES = ("camera.png", "moon.png", "coins.png", "brick.png", "grass.png", "gravel.png")
SIDE = 96  # px of a crop


def write(root: Path, crops: int) -> int:
    """`crops` training and `crops` // 5 test crops of each photograph, from its left two thirds and right third."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None
    written = 0
    for name in (*PHOTOGRAPHS, *TEXTURES):
        draw = random.Random(name)
        with Image.open(Path(spec.origin).parent / "data" / name) as opened:
            photograph = opened.convert("RGB")
        border = photograph.width * 2 // 3
        for split, count, first, last in (
            ("train", crops, 0, border),
            ("test", crops // 5, border, photograph.width),
        ):
            folder = root / split / Path(name).stem
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                left = draw.randint(first, last - SIDE)
                top = draw.randint(0, photograph.height - SIDE)
                photograph.crop((left, top, left + SIDE, top + SIDE)).save(folder / f"{index:04}.jpg", quality=90)
                written += 1
    return written


if __name__ == "__main__":
    crops = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    print(f"{write(Path(sys.argv[1]), crops)} images under {sys.argv[1]}")
