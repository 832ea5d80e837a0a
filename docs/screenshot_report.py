"""Makes docs/quickstart_report.png, the first screen of a report: python -m docs.screenshot_report REPORT PICTURE."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from tests.browser import LAPTOP, page

_COLOURS = 256  # a page has few, so that the picture stays small


def main(report: Path, picture: Path) -> None:
    """Writes what a laptop's window of 1280 x 800 px shows of `report` when it is opened, as PNG."""
    with page("light", LAPTOP) as opened:
        opened.page.goto(report.resolve().as_uri())
        shot = opened.page.screenshot()
    with Image.open(io.BytesIO(shot)) as image:
        image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
