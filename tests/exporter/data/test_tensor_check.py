"""The user's own tensor against our input: the same, or the cause by its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.data.tensor_check import check_tensor
from convoynet.exporter.errors import BadInput, Refused

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = Preprocess((56, 56), 64, MEAN, STD)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(made_images(1, (90, 120), 3, 0)[0]).save(file, exif=exif)
    return file


def pixels(picture: Path, resize: int | list[int] = 64, interpolation: str = "bilinear") -> np.ndarray:
    """HWC of 0 to 255, as torchvision makes them."""
    with Image.open(picture) as image:
        whole = v2.Resize(resize, v2.InterpolationMode(interpolation))(image.convert("RGB"))
        return np.asarray(v2.CenterCrop(56)(whole)).astype(np.float64)


def normal(values: np.ndarray, mean: object = MEAN, std: object = STD) -> np.ndarray:
    return ((values / 255 - np.asarray(mean)) / np.asarray(std)).transpose(2, 0, 1).astype(np.float32)


def check(folder: Path, picture: Path, values: np.ndarray, ours: Preprocess = OURS, takes_pixels: bool = False) -> str:
    np.save(folder / "x.npy", values)
    return check_tensor(folder / "x.npy", picture, ours, takes_pixels=takes_pixels)


@pytest.mark.parametrize(
    ("layout", "shaped"),
    [
        ("CHW", lambda x: x),
        ("1CHW", lambda x: x[None]),
        ("HWC", lambda x: x.transpose(1, 2, 0)),
        ("1HWC", lambda x: x.transpose(1, 2, 0)[None]),
    ],
)
def test_the_same_in_any_layout(
    tmp_path: Path, picture: Path, layout: str, shaped: Callable[[np.ndarray], np.ndarray]
) -> None:
    line = check(tmp_path, picture, shaped(normal(pixels(picture))))
    assert f"read as {layout}, against our input" in line
    assert line.endswith("the same but for rounding")


def test_float_resizing_differs_by_rounding_alone(tmp_path: Path, picture: Path) -> None:
    with Image.open(picture) as image:
        tensor = v2.functional.to_dtype(v2.functional.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)
    resized = v2.CenterCrop(56)(v2.Resize(64, antialias=True)(tensor)).numpy().transpose(1, 2, 0)
    assert "rounding" in check(tmp_path, picture, normal(resized * 255))


CAUSES: dict[str, Callable[[Path], np.ndarray]] = {
    "the shorter side resized to 56 (--resize 56)": lambda p: normal(pixels(p, 56)),
    "no crop (--resize 56x56)": lambda p: normal(pixels(p, [56, 56])),
    "nearest interpolation (--interpolation nearest)": lambda p: normal(pixels(p, 64, "nearest")),
    "bicubic interpolation (--interpolation bicubic)": lambda p: normal(pixels(p, 64, "bicubic")),
    "the shorter side resized to 58 (--resize 58) and lanczos interpolation": lambda p: normal(
        pixels(p, 58, "lanczos")
    ),
    "channels in the order BGR (--channel-order bgr)": lambda p: normal(pixels(p)[..., ::-1]),
    "no crop (--resize 56x56) and channels in the order BGR (--channel-order bgr) and no division by 255": (
        lambda p: normal(255 * pixels(p, [56, 56])[..., ::-1])
    ),
    "no division by 255 before mean and std": lambda p: normal(255 * pixels(p)),
    "pixels from 0 to 255, not normalised": lambda p: pixels(p).astype(np.uint8),
    "pixels divided by 255, without mean and std": lambda p: pixels(p) / 255,
    "mean and std swapped": lambda p: normal(pixels(p), STD, MEAN),
    "mean and std in the other order of the channels": lambda p: normal(pixels(p), MEAN[::-1], STD[::-1]),
    "values from -1 to 1": lambda p: normal(pixels(p), 0.5, 0.5),
    "a division by std, and no mean subtracted": lambda p: normal(pixels(p), 0),
    "the values that --mean 0.491,0.482,0.446 --std 0.247,0.243,0.262 give": (
        lambda p: normal(pixels(p), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    ),
    "the image mirrored": lambda p: normal(pixels(p)[:, ::-1]),
    "height and width swapped": lambda p: normal(pixels(p).transpose(1, 0, 2)),
    "no other size, filter, order": lambda p: normal(np.random.default_rng(0).integers(0, 256, (56, 56, 3))),
    "no other size, filter, order of channels or": lambda p: normal(255 - pixels(p)),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_named(tmp_path: Path, picture: Path, cause: str) -> None:
    with pytest.raises(Refused, match=r"largest difference .* of 255 grey levels\), mean") as refused:
        check(tmp_path, picture, CAUSES[cause](picture))
    told = str(refused.value).split("levels); ")[1]
    assert told.startswith(cause if cause.startswith("no other") else f"the likely cause: it has {cause}")
    assert told.endswith(f"Ours: {OURS.line}")


def test_exif_orientation_and_missing_antialiasing_are_named(tmp_path: Path, picture: Path) -> None:
    with Image.open(picture) as image:
        turned = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        values = v2.functional.pil_to_tensor(image.convert("RGB")).to(torch.float32)
    turned.save(tmp_path / "turned.png")
    with pytest.raises(Refused, match=r"it has the image turned as its EXIF orientation says\. Ours"):
        check(tmp_path, picture, normal(pixels(tmp_path / "turned.png")))
    aliased = v2.CenterCrop(56)(v2.Resize(64, antialias=False)(values)).numpy().transpose(1, 2, 0)
    with pytest.raises(Refused, match=r"it has bilinear interpolation without antialiasing, as OpenCV's\. Ours"):
        check(tmp_path, picture, normal(aliased))


def test_other_networks(tmp_path: Path, picture: Path) -> None:
    turned = Preprocess((56, 56), 64, MEAN[::-1], STD[::-1], order="bgr")
    bgr = normal(pixels(picture)[..., ::-1], MEAN[::-1], STD[::-1])
    assert "rounding" in check(tmp_path, picture, bgr, turned)
    with pytest.raises(Refused, match=r"channels in the order RGB \(--channel-order rgb\)"):
        check(tmp_path, picture, bgr[::-1], turned)
    grey = Preprocess((56, 56), 64, (0.4,), (0.2,))
    with Image.open(picture) as image:
        values = grey.pixels(image)[..., 0]
    assert "read as HW," in check(tmp_path, picture, (values / 255 - 0.4) / 0.2, grey)
    with pytest.raises(Refused, match="it has pixels divided by 255, without mean and std"):
        check(tmp_path, picture, values / 255, grey)
    assert "rounding" in check(tmp_path, picture, pixels(picture).astype(np.uint8), takes_pixels=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 28, 28)), r"has the shape \[3, 28, 28\], and the network takes one image of \[3, 56, 56\] or"),
        (np.zeros((2, 3, 56, 56)), r"has the shape \[2, 3, 56, 56\]"),
        (np.full((3, 56, 56), np.nan), "holds NaN"),
        (np.zeros((3, 56, 56), complex), "must hold one array of numbers"),
        (np.array([None]), r"is no array that numpy\.save wrote"),
    ],
)
def test_what_is_no_input_is_refused(tmp_path: Path, picture: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check(tmp_path, picture, values)
    (tmp_path / "x.npy").write_text("no array")
    with pytest.raises(BadInput, match=r"is no array that numpy\.save wrote"):
        check_tensor(tmp_path / "x.npy", picture, OURS, takes_pixels=False)
    np.save(tmp_path / "x.npy", np.zeros(3))
    whole = (tmp_path / "x.npy").read_bytes()
    for broken in (whole.replace(b"}", b","), whole.replace(b"{", b"(")):  # NumPy reads the header as Python
        (tmp_path / "x.npy").write_bytes(broken)
        with pytest.raises(BadInput, match=r"is no array that numpy\.save wrote"):
            check_tensor(tmp_path / "x.npy", picture, OURS, takes_pixels=False)
