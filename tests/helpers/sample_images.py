"""Writes a folder of generated pictures of many sizes and kinds, one in a hundred of them broken.

    uv run tests/helpers/sample_images.py FOLDER [--count 10000] [--broken 0.01] [--seed 0]

The same arguments give the same pictures. What is broken is listed in FOLDER/broken.json, with how.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

KINDS = (
    "RGB.jpg",
    "RGB.jpg",
    "RGB.jpg",
    "RGB.png",
    "L.jpg",
    "RGBA.png",
    "P.png",
    "RGB.webp",
    "CMYK.jpg",
    "turned.jpg",
)


def picture(random: Generator) -> Image.Image:
    """Waves, blocks and noise: something to compress, and no two alike."""
    width, height = (int(side) for side in random.integers(40, 480, 2))
    y, x = np.mgrid[0:height, 0:width] / 60
    a, b, c = random.normal(0, 1, (3, 3, 1, 1))
    waves = 127 + 90 * np.sin(a * x + b * y + 3 * c)
    blocks = np.kron(
        random.normal(0, 30, (3, height // 40 + 1, width // 40 + 1)), np.ones((1, 40, 40))
    )
    pixels = waves + blocks[:, :height, :width] + random.normal(0, 6, (3, height, width))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(random: Generator, kind: str) -> bytes:
    """A picture of one of `KINDS` as the contents of a file."""
    image, buffer = picture(random), io.BytesIO()
    mode, _, suffix = kind.partition(".")
    how: dict[str, object] = {}
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(2, 9))
        how["exif"] = exif
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(random.integers(0, 256, image.size[::-1]).astype(np.uint8)))
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], **how)
    return buffer.getvalue()


def damaged(random: Generator, content: bytes) -> tuple[bytes, str]:
    """The contents of a file that nobody can read, and what is wrong with it."""
    how = ("empty", "cut", "text", "header")[int(random.integers(4))]
    if how == "cut":
        return content[: len(content) // 3], how
    return {"empty": b"", "text": b"<html>404</html>", "header": bytes(200) + content[200:]}[
        how
    ], how


def make(folder: Path, count: int, broken: float, seed: int) -> dict[str, str]:
    """Writes the pictures; returns those that are broken, by name."""
    found: dict[str, str] = {}
    for number in range(count):
        random = np.random.default_rng([seed, number])
        kind = KINDS[int(random.integers(len(KINDS)))]
        name = f"{number // 1000:03}/{number:07}.{kind.partition('.')[2]}"
        content = encoded(random, kind)
        if random.random() < broken:
            content, found[name] = damaged(random, content)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "broken.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> int:
    """Reads the arguments and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--broken", type=float, default=0.01, help="share of them (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        print(f"{args.folder} exists and is not empty; name another", file=sys.stderr)
        return 2
    found = make(args.folder, args.count, args.broken, args.seed)
    print(
        f"{args.count} pictures in {args.folder}, {len(found)} of them broken: "
        f"{args.folder / 'broken.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
