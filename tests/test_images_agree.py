"""The server decodes an image to exactly the input that the exporter measured the network with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.images import Preprocess
from server.errors import InvalidRequest, Oversize
from server.images import image_input_from_json

PLANS = {
    "imagenet": Preprocess((224, 224), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "bicubic": Preprocess((48, 40), 52, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"),
    "grey": Preprocess((32, 32), 32, (0.1,), (0.8,)),
    "crop larger than resize": Preprocess((40, 40), 32, (0.1,), (0.8,)),
}


@pytest.mark.parametrize("size", [(32, 32), (500, 333), (333, 500), (31, 64), (257, 256), (7, 3)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("plan", PLANS)
def test_server_and_exporter_see_the_same_pixels(tmp_path: Path, plan: str, mode: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(noise).convert(mode).save(file)
    preprocess = PLANS[plan]
    pixels = preprocess.decode(file)
    stated = preprocess.to_json()
    floats = image_input_from_json(json.dumps(stated), channels_last=False).decode(file.read_bytes(), 10**6)
    np.testing.assert_allclose(floats, preprocess.normalize(pixels[None])[0], rtol=0, atol=2e-6)
    raw = {k: v for k, v in stated.items() if k not in ("mean", "std")}
    as_is = image_input_from_json(json.dumps(raw), channels_last=True).decode(file.read_bytes(), 10**6)
    np.testing.assert_array_equal(as_is, pixels)
    assert as_is.dtype == np.uint8


def encoded(image: Image.Image, kind: str) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_what_is_no_image_or_too_large_is_refused() -> None:
    image = image_input_from_json(json.dumps(PLANS["grey"].to_json()), channels_last=False)
    good = encoded(Image.new("L", (100, 100)), "PNG")
    assert image.decode(good, 10_000).shape == (1, 32, 32)
    with pytest.raises(Oversize, match="100x100 pixels is over the limit of 9999"):
        image.decode(good, 9_999)
    for bad in (b"", b"GIF89a", good[:60], encoded(Image.new("L", (9, 9)), "TIFF")):
        with pytest.raises(InvalidRequest, match="not a readable image of a format in JPEG, PNG, WEBP"):
            image.decode(bad, 10_000)
