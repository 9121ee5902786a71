"""The server decodes an image to exactly the input that the exporter measured the network with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoynet.exporter.data.images import Preprocess
from convoynet.server.errors import InvalidModel, InvalidRequest, Oversize
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


SIZES = [(32, 32), (500, 333), (333, 500), (31, 64), (257, 256), (7, 3), (1, 1), (400, 2), (2, 400)]
MODES = ["RGB", "L", "RGBA", "P", "CMYK"]
# The mode is changed before the size: every size in one mode, every mode in a small size and an odd one.
EVERY = [
    pytest.param(mode, size, marks=() if mode == "RGB" or size in ((32, 32), (31, 64)) else pytest.mark.slow)
    for mode in MODES
    for size in SIZES
]


@pytest.mark.parametrize(("mode", "size"), EVERY, ids=str)
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


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
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


def kinds() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Files of every kind that the server takes, and their colour as RGB: docs/exporting.md has the table."""
    red, size = Image.new("RGB", (12, 9), (200, 40, 80)), (12, 9)
    clear = red.convert("RGBA")
    clear.putalpha(0)
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("RGB", size)]}
    return {
        "1": (encoded(Image.new("1", size, 1), "PNG"), (255, 255, 255)),
        "L": (encoded(Image.new("L", size, 77), "PNG"), (77, 77, 77)),
        "LA": (encoded(Image.new("LA", size, (77, 0)), "PNG"), (77, 77, 77)),
        "I;16": (encoded(Image.fromarray(np.full((9, 12), 0x4D4D, np.uint16)), "PNG"), (77, 77, 77)),
        "P": (encoded(palette, "PNG"), (200, 40, 80)),
        "P with a transparent colour": (encoded(palette, "PNG", transparency=0), (200, 40, 80)),
        "P with alpha": (encoded(palette, "PNG", transparency=bytes(4)), (200, 40, 80)),
        "L with a transparent grey": (encoded(Image.new("L", size, 77), "PNG", transparency=77), (77, 77, 77)),
        "RGB with a transparent colour": (encoded(red, "PNG", transparency=(200, 40, 80)), (200, 40, 80)),
        "RGBA": (encoded(clear, "PNG"), (200, 40, 80)),
        "RGBA as WEBP": (encoded(clear, "WEBP", lossless=True, exact=True), (200, 40, 80)),
        "EXIF": (encoded(red, "PNG", exif=turned), (200, 40, 80)),
        "animated PNG": (encoded(red, "PNG", **frames), (200, 40, 80)),
        "animated WEBP": (encoded(red, "WEBP", lossless=True, **frames), (200, 40, 80)),
        "L as JPEG": (encoded(Image.new("L", size, 77), "JPEG"), (77, 77, 77)),
        "YCbCr as JPEG": (encoded(red.convert("YCbCr"), "JPEG", quality=100), (200, 40, 80)),
        "CMYK as JPEG": (encoded(Image.new("CMYK", size, (255, 0, 0, 0)), "JPEG", quality=100), (0, 255, 255)),
        "EXIF as JPEG": (encoded(red, "JPEG", quality=100, exif=turned), (200, 40, 80)),
    }


@pytest.mark.parametrize("plan", [Preprocess((6, 6), 6, (0.0,) * 3, (1.0,) * 3), Preprocess((6, 6), 6, (0.0,), (1.0,))])
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_picture_has_the_same_pixels_on_both_sides(tmp_path: Path, kind: str, plan: Preprocess) -> None:
    data, color = kinds()[kind]
    (tmp_path / "image").write_bytes(data)
    pixels = plan.decode(tmp_path / "image")
    stated = {key: value for key, value in plan.to_json().items() if key not in ("mean", "std")}
    served = image_input_from_json(json.dumps(stated), channels_last=True).decode(data, 10**6)
    np.testing.assert_array_equal(served, pixels)
    shown = Image.new("RGB", (1, 1), color).convert("RGB" if plan.channels == 3 else "L").getpixel((0, 0))
    # JPEG rounds.
    assert np.abs(pixels.astype(int) - np.array(shown)).max() <= (3 if "JPEG" in kind else 0)


def test_what_an_older_server_does_not_know_it_refuses() -> None:
    """New values lie in old keys: nothing of them is passed over."""
    plain = PLANS["imagenet"].to_json()
    assert set(PLANS["whole"].to_json()) == set(PLANS["lanczos, bgr"].to_json()) == set(plain)
    assert PLANS["whole"].to_json()["resize"] == [32, 32]
    assert PLANS["lanczos, bgr"].to_json()["color"] == "BGR"


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_stated_is_read_back(plan: str) -> None:
    stated = json.loads(json.dumps(PLANS[plan].to_json()))
    assert Preprocess.from_json(stated) == PLANS[plan]
    # A graph that takes pixels.
    raw = Preprocess.from_json({key: value for key, value in stated.items() if key not in ("mean", "std")})
    assert (raw.channels, raw.size, raw.resize) == (PLANS[plan].channels, PLANS[plan].size, PLANS[plan].resize)


@pytest.mark.parametrize(
    "changed",
    [{"resize": 0}, {"resize": [32]}, {"resize": [32, 0]}, {"resize": [32, 70000]}, {"color": "GBR"},
     {"interpolation": "cubic"}, {"resize": None}],
)  # fmt: skip
def test_a_config_with_other_values_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidModel, match="parameter 'preprocess'"):
        image_input_from_json(json.dumps(PLANS["whole"].to_json() | changed), channels_last=True)
