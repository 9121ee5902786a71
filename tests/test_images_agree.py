"""The server decodes an image to exactly the input that the exporter measured the network with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoynet.exporter.data.images import Preprocess
from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.images.images import image_input_from_json

PLANS = {
    "imagenet": Preprocess((224, 224), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "bicubic": Preprocess((48, 40), 52, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"),
    "grey": Preprocess((32, 32), 32, (0.1,), (0.8,)),
    "pad": Preprocess((64, 64), 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), fit="pad"),
    "pad, landscape": Preprocess((40, 90), 40, (0.5, 0.4, 0.1), (0.1, 0.5, 2.0), "bicubic", fit="pad"),
    "pad, grey": Preprocess((50, 30), 30, (0.1,), (0.8,), fit="pad"),
    "crop larger than resize": Preprocess((40, 40), 32, (0.1,), (0.8,)),
    "nearest": Preprocess((40, 32), 44, (0.5, 0.4, 0.1), (0.1, 0.5, 0.9), "nearest"),
    "lanczos, bgr": Preprocess((40, 40), 44, (0.5, 0.4, 0.1), (0.1, 0.5, 0.9), "lanczos", order="bgr"),
    "box": Preprocess((24, 24), 26, (0.1,), (0.8,), "box"),
    "whole": Preprocess((32, 32), (32, 32), (0.5, 0.4, 0.1), (0.1, 0.5, 0.9)),
    "whole, then cropped": Preprocess((32, 40), (36, 44), (0.5, 0.4, 0.1), (0.1, 0.5, 0.9), "hamming"),
    "pad, bgr": Preprocess((40, 90), 40, (0.5, 0.4, 0.1), (0.1, 0.5, 2.0), fit="pad", order="bgr"),
}


@pytest.mark.parametrize(
    "size", [(32, 32), (500, 333), (333, 500), (31, 64), (257, 256), (7, 3), (1, 1), (400, 2), (2, 400)], ids=str
)
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


@pytest.mark.parametrize("plan", ["imagenet", "grey"])
def test_sixteen_bits_of_grey_are_the_same_eight(tmp_path: Path, plan: str) -> None:
    values = np.random.default_rng(3).integers(0, 2**16, (64, 64)).astype(np.uint16)
    values[0, :3] = 0, 128, 65535
    Image.fromarray(values).save(tmp_path / "image.png")
    preprocess = PLANS[plan]
    stated = {k: v for k, v in preprocess.to_json().items() if k not in ("mean", "std")}
    served = image_input_from_json(json.dumps(stated), channels_last=True)
    pixels = served.decode((tmp_path / "image.png").read_bytes(), 10**6)
    np.testing.assert_array_equal(pixels, preprocess.decode(tmp_path / "image.png"))


@pytest.mark.parametrize(
    ("plan", "size", "inside"),
    [
        ("pad", (500, 333), (64, 43)),
        ("pad", (333, 500), (43, 64)),
        ("pad", (300, 300), (64, 64)),
        ("pad", (1, 1), (64, 64)),
        ("pad", (2000, 3), (64, 1)),
        ("pad, landscape", (500, 333), (60, 40)),
        ("pad, landscape", (500, 100), (90, 18)),
        ("pad, grey", (100, 200), (25, 50)),
    ],
)
def test_padding_loses_nothing_and_fills_with_the_mean(
    plan: str, size: tuple[int, int], inside: tuple[int, int]
) -> None:
    preprocess = PLANS[plan]
    pixels = preprocess.pixels(Image.new("RGB", size, "white"))
    assert pixels.shape == (*preprocess.size, preprocess.channels)
    image = (pixels == 255).all(axis=2)
    assert image[: inside[1], : inside[0]].all()
    assert image.sum() == inside[0] * inside[1]
    fill = [round(255 * mean) for mean in preprocess.mean]
    assert (pixels[~image] == fill).all()
    assert preprocess.to_json()["fill"] == fill
    # Half a grey level of the mean: what the network sees there is next to nothing.
    assert (
        np.abs(preprocess.normalize(pixels[None])[0].transpose(1, 2, 0)[~image] * preprocess.std).max(initial=0)
        <= 0.5 / 255 + 1e-6
    )


def test_configs_of_cropped_inputs_stay_as_they_were() -> None:
    assert set(PLANS["imagenet"].to_json()) == {"color", "resize", "size", "interpolation", "mean", "std"}
    assert PLANS["pad"].to_json()["fit"] == "pad"
    assert "resize" in PLANS["pad"].to_json()


@pytest.mark.parametrize("size", [(100, 100), (640, 200), (90, 333), (20, 11), (64, 3)], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_a_map_of_the_input_finds_its_way_back(plan: str, size: tuple[int, int]) -> None:
    """Each pixel of an image states its own place; what the network saw of it leads back to that place."""
    preprocess = PLANS[plan]
    image_input = image_input_from_json(json.dumps(preprocess.to_json()), channels_last=True)
    region = image_input.region(*size)
    for axis, pixels in enumerate(size):
        along = np.linspace(0, 255, pixels)
        ramp = np.broadcast_to(along if axis == 0 else along[:, None], size[::-1])
        found = region.map_in_image(preprocess.pixels(Image.fromarray(np.rint(ramp).astype(np.uint8)))[..., 0])
        assert found.shape == size[::-1]
        seen = found >= 0
        # A crop keeps the part of each axis that fits into the input.
        for line, have, at, want in zip((seen.any(0), seen.any(1)), size, region.resized, region.input, strict=True):
            assert line.sum() == pytest.approx(have * min(1, want / at), abs=0 if preprocess.fit == "pad" else 1)
        # A pixel of the input is as many grey levels wide as it covers of the ramp, and edges are smoothed.
        width = 255 / min(region.resized[axis], pixels)
        assert np.abs(found - ramp)[seen].max() <= 1.5 * width + 1
    corners = np.array([[*region.corner, *np.add(region.corner, region.resized)]], float)
    np.testing.assert_allclose(region.boxes_in_image(corners), [[0, 0, *size]])
    assert region.boxes_in_image(corners + np.array([-5, -5, 5, 5])).tolist() == [[0, 0, *size]]


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


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_have_the_pixels_that_pillow_gives(mode: str, progressive: bool, subsampling: int) -> None:
    smooth = np.add.outer(np.arange(97), np.arange(131))[..., None] * (1, 2, 3)
    noise = np.random.default_rng(5).integers(0, 60, smooth.shape)
    image = Image.fromarray(((smooth + noise) % 256).astype(np.uint8)).convert(mode)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85, progressive=progressive, subsampling=subsampling)
    with Image.open(data) as opened:
        by_pillow = np.asarray(opened.convert("RGB"))
    stated = {"color": "RGB", "resize": 97, "size": [97, 131], "interpolation": "bilinear"}
    row = image_input_from_json(json.dumps(stated), channels_last=True).decode(data.getvalue(), 10**6)
    np.testing.assert_array_equal(row, by_pillow)
