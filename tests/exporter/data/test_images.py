import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from convoynet.exporter import assets
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.data.images import (
    Preprocess,
    calibration_images,
    labelled_images,
    load_images,
    made_images,
)
from convoynet.exporter.errors import BadInput

RGB = Preprocess((24, 24), 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocess((32, 32), 32, (0.1,), (0.5,))


def save_image(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = made_images(1, (height, width), 3, seed)[0]
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (101, 57), (33, 200), (28, 28), (5, 7), (1, 1)])
def test_decode_equals_torchvision(tmp_path: Path, width: int, height: int, interpolation: str, mode: str) -> None:
    path = save_image(tmp_path / "image.png", width, height, mode)
    fits: list[tuple[tuple[int, int], int | tuple[int, int], str]] = [
        ((24, 24), 28, "RGB"), ((31, 24), 31, "L"), ((40, 37), 28, "RGB"), ((24, 20), (26, 20), "RGB"),
    ]  # fmt: skip
    for size, resize, color in fits:
        values = (0.5,) * len(color) if color == "RGB" else (0.5,)
        preprocess = Preprocess(size, resize, values, values, interpolation)
        reference = transforms.Compose(
            [
                transforms.Resize(resize, transforms.InterpolationMode(interpolation)),
                transforms.CenterCrop(size),
            ]
        )
        with Image.open(path) as image:
            expected = np.asarray(reference(image.convert(color))).reshape(*size, len(values))
        decoded = preprocess.decode(path)
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, expected)


def test_decode_reads_a_palette_with_transparency_without_warning(tmp_path: Path) -> None:
    image = Image.fromarray(made_images(1, (30, 30), 3, 0)[0]).quantize(8)
    image.save(tmp_path / "image.png", transparency=bytes(range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(tmp_path / "image.png") as opened:
            assert "transparency" in opened.info
            expected = opened.convert("RGB").resize((28, 28), Image.Resampling.BILINEAR).crop((2, 2, 26, 26))
    np.testing.assert_array_equal(RGB.decode(tmp_path / "image.png"), np.asarray(expected))


def test_normalize_equals_torchvision() -> None:
    images = made_images(2, (24, 24), 3, 1)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(RGB.mean, RGB.std)])
    inputs = RGB.normalize(images)
    assert inputs.dtype == np.float32
    assert inputs.flags.c_contiguous
    np.testing.assert_allclose(inputs, np.stack([reference(image) for image in images]), atol=1e-6)


def test_decode_names_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(BadInput, match=r"text\.jpg: cannot be read as an image .*replace or remove it"):
        RGB.decode(tmp_path / "text.jpg")
    whole = save_image(tmp_path / "whole.png", 64, 64).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"half\.png: cannot be read"):
        load_images([tmp_path / "whole.png", tmp_path / "half.png"], RGB)
    with pytest.raises(BadInput, match=r"gone\.png: no such image file"):
        RGB.decode(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"one value \(greyscale\) or three \(RGB\)"),
        ({"std": (1.0, 1.0, 0.0)}, "need to be positive"),
        ({"size": (0, 24)}, "need to be positive"),
        ({"interpolation": "cubic"}, "interpolation 'cubic': use one of nearest, box, bilinear, hamming, bicubic"),
        ({"resize": (0, 28)}, "need to be positive"),
        ({"order": "gbr"}, "channel order 'gbr': use rgb"),
        ({"order": "bgr", "mean": (0.5,), "std": (0.5,)}, "of a network for colour, bgr"),
    ],
)
def test_preprocess_refuses(arguments: dict[str, Any], message: str) -> None:
    valid = {"size": (24, 24), "resize": 28, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(BadInput, match=message):
        Preprocess(**{**valid, **arguments})


def test_to_json_has_what_a_server_needs() -> None:
    assert GREY.to_json() == {
        "color": "L",
        "resize": 32,
        "size": [32, 32],
        "interpolation": "bilinear",
        "mean": [0.1],
        "std": [0.5],
    }
    assert RGB.to_json()["color"] == "RGB"


def test_labelled_images_takes_labels_and_indices(tmp_path: Path) -> None:
    for name in ("cat/1.png", "2/1.png", "dog/deep/1.png"):
        save_image(tmp_path / name, 8, 8)
    pairs = labelled_images(tmp_path, ["cat", "dog", "frog"])
    assert [(path.relative_to(tmp_path).as_posix(), index) for path, index in pairs] == [
        ("2/1.png", 2),
        ("cat/1.png", 0),
        ("dog/deep/1.png", 1),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bird/1.png", r"'bird' is no class; .* 3 labels \('crane', \.\.\.\) or by an index from 0 to 2"),
        ("3/1.png", "'3' is no class"),
        ("crane/1.png", "'crane' names the classes 0, 1; name it by the index"),
        ("1.png", r"1\.png: lies in no class folder; put it into .*<label>/"),
    ],
)
def test_labelled_images_refuses(tmp_path: Path, name: str, message: str) -> None:
    save_image(tmp_path / name, 8, 8)
    with pytest.raises(BadInput, match=message):
        labelled_images(tmp_path, ["crane", "crane", "dog"])


def test_calibration_images_spread_over_a_sorted_folder(tmp_path: Path) -> None:
    for index in range(40):
        save_image(tmp_path / f"{index // 10}" / f"{index:02}.png", 28, 28, seed=index)
    images, line = calibration_images(RGB, tmp_path, 8, 0, "resnet18")
    assert images.shape == (8, 24, 24, 3)
    assert line == f"8 of the 40 images in {tmp_path}"
    every = load_images(list_images(tmp_path), RGB)
    chosen = [int(np.flatnonzero((every == image).all((1, 2, 3)))[0]) for image in images]
    assert {index // 10 for index in chosen} == {0, 1, 2, 3}
    assert np.diff(chosen).tolist() == [5] * 7
    again, _ = calibration_images(RGB, tmp_path, 8, 0, "resnet18")
    np.testing.assert_array_equal(images, again)
    everything, line = calibration_images(RGB, tmp_path, 99, 3, "resnet18")
    np.testing.assert_array_equal(everything, every)
    assert line.startswith("40 of the 40")


def test_calibration_images_are_packaged_digits_for_a_greyscale_net() -> None:
    images, line = calibration_images(GREY, None, 64, 0, "lenet5")
    assert images.shape == (64, 32, 32, 1)
    assert line == f"64 of the {len(assets.digits().calibration)} handwritten digits packaged for lenet5"


def test_calibration_images_are_made_otherwise_and_the_line_says_so() -> None:
    images, line = calibration_images(RGB, None, 3, 7, "resnet18")
    assert images.shape == (3, 24, 24, 3)
    assert "made for resnet18" in line
    assert "not photographs" in line
    again, _ = calibration_images(RGB, None, 3, 7, "resnet18")
    np.testing.assert_array_equal(images, again)
    other, _ = calibration_images(RGB, None, 3, 8, "resnet18")
    assert (images != other).mean() > 0.5


def test_calibration_images_refuses_no_samples() -> None:
    with pytest.raises(BadInput, match="0 calibration samples: at least 1"):
        calibration_images(RGB, None, 0, 0, "resnet18")


def test_made_images_have_the_statistics_of_photographs() -> None:
    images = made_images(16, (128, 96), 3, 0)
    assert images.dtype == np.uint8
    assert 80 < images.mean() < 150
    assert 25 < images.std() < 80
    assert np.ptp(images.mean((1, 2, 3))) > 20  # images differ in brightness
    channels = images.reshape(-1, 3).astype(float)
    assert np.corrcoef(channels.T)[0, 1] > 0.7  # mostly lightness
    assert np.abs(channels[:, 0] - channels[:, 2]).mean() > 5  # but not grey
    lightness = images.mean(3) - images.mean((1, 2, 3))[:, None, None]
    power = (np.abs(np.fft.fft2(lightness)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(96)[None])
    band = (frequency > 0.02) & (frequency < 0.3)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -2.6 < slope < -1.6  # power falls as about 1/f^2


def test_made_images_can_be_grey() -> None:
    assert made_images(2, (32, 33), 1, 0).shape == (2, 32, 33, 1)


SMALL = Preprocess((4, 4), 4, (0.5,), (0.5,))
STEPS = np.arange(16).reshape(4, 4)


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_sixteen_bits_are_scaled_by_their_full_range(tmp_path: Path) -> None:
    expected = (STEPS * 17).astype(np.uint8)
    values = STEPS * 17 * 257
    for name in ("a.png", "a.tif"):
        assert np.array_equal(SMALL.decode(save(tmp_path / name, values.astype(np.uint16)))[..., 0], expected)
    (tmp_path / "a.pgm").write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    assert np.array_equal(SMALL.decode(tmp_path / "a.pgm")[..., 0], expected)
    near = np.array([[0, 128, 129, 65535 - 128], [65535 - 129, 65535, 257, 385]], np.uint16)
    small = Preprocess((2, 4), 2, (0.5,), (0.5,))
    assert small.decode(save(tmp_path / "near.png", near))[..., 0].tolist() == [[0, 0, 1, 255], [254, 255, 1, 1]]
    color = Preprocess((4, 4), 4, (0.5,) * 3, (0.5,) * 3)
    assert np.array_equal(color.decode(tmp_path / "a.png"), np.repeat(expected[..., None], 3, 2))


def tiff(values: bytes, bits: int, photometric: int, size: int = 4) -> bytes:
    """A TIFF of one strip, tag by tag."""
    tags = [(256, size), (257, size), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, size)]
    tags.append((279, len(values)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(values))
    return head + values + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_tiffs_of_12_bits_and_with_a_white_of_zero(tmp_path: Path) -> None:
    expected = (STEPS * 17).astype(np.uint8)
    twelve = (STEPS * 273).ravel()  # 15 * 273 = 4095
    packed = b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in zip(twelve[::2], twelve[1::2], strict=True)
    )
    (tmp_path / "twelve.tif").write_bytes(tiff(packed, 12, 1))
    assert np.array_equal(SMALL.decode(tmp_path / "twelve.tif")[..., 0], expected)
    sixteen = (STEPS * 17 * 257).astype("<u2").tobytes()
    for photometric, shown in ((1, expected), (0, 255 - expected)):
        (tmp_path / "white.tif").write_bytes(tiff(sixteen, 16, photometric))
        assert np.array_equal(SMALL.decode(tmp_path / "white.tif")[..., 0], shown)
    eight = expected.tobytes()
    (tmp_path / "eight.tif").write_bytes(tiff(eight, 8, 0))
    assert np.array_equal(SMALL.decode(tmp_path / "eight.tif")[..., 0], 255 - expected)


def test_float_pixels_are_for_0_to_1(tmp_path: Path) -> None:
    values = (STEPS / 15).astype(np.float32)
    assert np.array_equal(SMALL.decode(save(tmp_path / "a.tif", values))[..., 0], STEPS * 17)
    for name, wrong in (("b.tif", values * 255), ("c.tif", values - 0.5), ("d.tif", np.full_like(values, np.nan))):
        with pytest.raises(BadInput, match=rf"{name[0]}\.tif: has float pixels from .*only those from 0 to 1"):
            SMALL.decode(save(tmp_path / name, wrong))


def test_wide_integers_have_no_known_range(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.tif: has pixels of signed or 32-bit integers.*8 or 16 bits"):
        SMALL.decode(save(tmp_path / "a.tif", STEPS.astype(np.int32)))


def test_other_kinds_of_pictures(tmp_path: Path) -> None:
    """What docs/exporting.md says of them."""
    color = Preprocess((4, 4), 4, (0.5,) * 3, (0.5,) * 3)
    red = np.zeros((4, 4, 3), np.uint8)
    red[:2, :, 0] = 255
    plain = Image.fromarray(red)
    plain.convert("CMYK").save(tmp_path / "cmyk.tif")
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.save(tmp_path / "exif.png", exif=turned)
    plain.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (4, 4))], lossless=True)
    transparent = plain.convert("RGBA")
    transparent.putalpha(0)
    transparent.save(tmp_path / "alpha.png")
    for path in tmp_path.iterdir():
        assert np.array_equal(color.decode(path), red), path.name
