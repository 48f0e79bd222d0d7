"""The R-D curve of Pillow's JPEG or WebP over a set of images, as a CSV that `sgacodec eval --against` reads.

python benchmarks/jpeg_curve.py photos/ > jpeg.csv
python benchmarks/jpeg_curve.py photos/ --format webp > webp.csv
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from sgacodec.evaluate.sweep import find_images
from sgacodec.image import read_image
from sgacodec.metrics import psnr

OPTIONS = {"jpeg": {"optimize": True, "progressive": True}, "webp": {"method": 6}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--format", choices=sorted(OPTIONS), default="jpeg")
    parser.add_argument("--qualities", nargs="+", type=int, default=[5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95])
    arguments = parser.parse_args()
    images = [read_image(path).pixels for path in find_images(arguments.images).values()]
    for quality in arguments.qualities:
        rates, quality_of = [], []
        for pixels in images:
            stream = io.BytesIO()
            options = OPTIONS[arguments.format]
            Image.fromarray(pixels).save(stream, arguments.format, quality=quality, **options)
            shown = np.array(Image.open(stream).convert("RGB"))
            rates.append(8 * len(stream.getvalue()) / pixels[..., 0].size)
            quality_of.append(psnr(shown, pixels))
        print(f"{np.mean(rates):.6f}, {np.mean(quality_of):.6f}")


if __name__ == "__main__":
    main()
