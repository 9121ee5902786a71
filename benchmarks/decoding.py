"""What decoding JPEGs to network inputs costs on one core: Pillow alone, and as the server does it.

    python benchmarks/decoding.py PHOTOS/

Milliseconds of CPU an image, best of five rounds that take turns, at the photographs' own size and enlarged to a
shorter side of 1024; the figures go into benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.evidence import report
from convoynet.server.images.images import ImageInput, converted, image_input_from_json

RESULTS = Path(__file__).parent / "results" / "decoding.json"
ROUNDS = 5
IMAGENET = Preprocess((224, 224), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pillow(data: bytes) -> object:
    """The pixels."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(converted(image, "RGB"))


def row_by_pillow(plan: ImageInput) -> Callable[[bytes], object]:
    """The whole way to a row of the input, with Pillow's decoder."""

    def run(data: bytes) -> object:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(plan.fit(converted(image, "RGB")))

    return run


def enlarged(data: bytes, side: int) -> bytes:
    """The same photograph with a shorter side of so many pixels."""
    with Image.open(io.BytesIO(data)) as image:
        factor = side / min(image.size)
        large = converted(image, "RGB").resize((round(image.width * factor), round(image.height * factor)))
    out = io.BytesIO()
    large.save(out, "JPEG", quality=90)
    return out.getvalue()


def measure(ways: dict[str, Callable[[bytes], object]], images: Sequence[bytes]) -> dict[str, float]:
    """Milliseconds of CPU an image for each way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            for data in images:
                way(data)
            best[name] = min(best[name], 1e3 * (time.process_time() - began) / len(images))
    return {name: round(value, 3) for name, value in best.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--images", type=int, default=100, help="at most so many (default 100)")
    options = parser.parse_args(argv)
    files = sorted(options.photos.glob("*.jp*g"))[: options.images]
    if not files:
        parser.error(f"{options.photos} holds no .jpg file")
    images = [file.read_bytes() for file in files]
    raw = {key: value for key, value in IMAGENET.to_json().items() if key not in ("mean", "std")}
    plan = image_input_from_json(json.dumps(raw), channels_last=True)
    ways: dict[str, Callable[[bytes], object]] = {
        "decode, Pillow": pillow,
        "decode, simplejpeg": simplejpeg.decode_jpeg,
        "row, Pillow": row_by_pillow(plan),
        "row, server": lambda data: plan.decode(data, 10**8),
    }
    found = {
        "environment": report.environment(1),
        "images": len(images),
        "own size": measure(ways, images),
        "1024": measure(ways, [enlarged(data, 1024) for data in images[:20]]),
    }
    for size in ("own size", "1024"):
        for name, value in found[size].items():
            print(f"{size:10} {name:20} {value:8.3f} ms")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
