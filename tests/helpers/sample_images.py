"""Generate images of many sizes and kinds, some of them broken.

    uv run tests/helpers/sample_images.py FOLDER [--count 10000] [--broken 0.01] [--seed 0]

The same arguments give the same images. FOLDER/broken.json maps broken files to the damage.
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
    "rotated.jpg",
)
"""Mode and suffix; `rotated` has an EXIF orientation."""

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
EXIF_ORIENTATION = 0x0112

DAMAGES = ("empty", "cut", "text", "header")


def random_image(random: Generator) -> Image.Image:
    """Generate a distinct, compressible image of waves, blocks and noise."""
    width, height = (int(side) for side in random.integers(40, 480, 2))
    y, x = np.mgrid[0:height, 0:width] / 60
    a, b, c = random.normal(0, 1, (3, 3, 1, 1))
    waves = 127 + 90 * np.sin(a * x + b * y + 3 * c)
    coarse = random.normal(0, 30, (3, height // 40 + 1, width // 40 + 1))
    blocks = np.kron(coarse, np.ones((1, 40, 40)))[:, :height, :width]
    pixels = waves + blocks + random.normal(0, 6, (3, height, width))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def encode(random: Generator, kind: str) -> bytes:
    """Generate an image file of one of `KINDS`."""
    image = random_image(random)
    mode, _, suffix = kind.partition(".")
    options: dict[str, object] = {}
    if mode == "rotated":
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = int(random.integers(2, 9))
        options["exif"] = exif
    elif mode == "RGBA":
        alpha = random.integers(0, 256, image.size[::-1]).astype(np.uint8)
        image.putalpha(Image.fromarray(alpha))
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[suffix], **options)
    return buffer.getvalue()


def damage(random: Generator, content: bytes) -> tuple[bytes, str]:
    """Damage a file beyond reading; return it with the kind of damage."""
    kind = DAMAGES[int(random.integers(len(DAMAGES)))]
    broken = {
        "empty": b"",
        "cut": content[: len(content) // 3],
        "text": b"<html>404</html>",
        "header": bytes(200) + content[200:],
    }
    return broken[kind], kind


def write_images(folder: Path, count: int, broken_share: float, seed: int) -> dict[str, str]:
    """Write the images; return a map of broken files to the damage."""
    broken: dict[str, str] = {}
    for number in range(count):
        random = np.random.default_rng([seed, number])
        kind = KINDS[int(random.integers(len(KINDS)))]
        name = f"{number // 1000:03}/{number:07}.{kind.partition('.')[2]}"
        content = encode(random, kind)
        if random.random() < broken_share:
            content, broken[name] = damage(random, content)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "broken.json").write_text(json.dumps(broken, indent=1) + "\n", encoding="utf-8")
    return broken


def main() -> int:
    """Write the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Output folder, missing or empty.")
    parser.add_argument("--count", type=int, default=10_000, help="Images. [default: 10000]")
    parser.add_argument(
        "--broken", type=float, default=0.01, help="Share of broken images. [default: 0.01]"
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed. [default: 0]")
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        print(f"{args.folder}: folder is not empty; choose another one", file=sys.stderr)
        return 2
    broken = write_images(args.folder, args.count, args.broken, args.seed)
    print(
        f"{args.folder}: {args.count} images, {len(broken)} broken (listed in "
        f"{args.folder / 'broken.json'})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
