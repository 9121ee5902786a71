"""Image files to arrays: preprocessing, calibration images and labelled folders.

Arrays of images are uint8, NHWC, 0..255, until `Preprocess.normalize` makes them network inputs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoynet.exporter import assets
from convoynet.exporter.config import CHANNEL_ORDERS, INTERPOLATIONS
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.errors import BadInput

# Formats whose integers Pillow brings to 16 bits, whatever their own range.
_SIXTEEN_BITS = ("PNG", "PPM")
# Tags of TIFF.
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes a network input.

    Attributes:
        size: (height, width) in pixels of what is fed to the network.
        resize: With fit="crop" the shorter side is resized to this first, in pixels; or the image to this (height,
            width), whatever its proportions are.
        mean: Per channel in the network's order, on the 0..1 scale; three values for colour or one for greyscale.
        std: Per channel in the network's order, on the 0..1 scale.
        interpolation: Pillow's resampling, as timm and torchvision name it; all but "nearest" antialiased.
        fit: "crop" cuts the centre out of the resized image. "pad" loses nothing: the image is resized to the largest
            that fits into `size`, placed at the top left, and the rest is filled with the mean colour.
        order: Of the channels of colour, "rgb" or "bgr".
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    fit: str = "crop"
    order: str = "rgb"

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise BadInput(f"mean {self.mean} and std {self.std}: both need one value (greyscale) or three (RGB)")
        if min(self.std) <= 0 or min(*self.size, *self._resize_sides) <= 0:
            raise BadInput(f"std {self.std}, size {self.size} and resize {self.resize}: all need to be positive")
        if self.interpolation not in _RESAMPLING:
            raise BadInput(f"interpolation {self.interpolation!r}: use one of {', '.join(_RESAMPLING)}")
        if self.fit not in ("crop", "pad"):
            raise BadInput(f"fit {self.fit!r}: use crop or pad")
        if self.order not in CHANNEL_ORDERS or (self.order != "rgb" and self.channels == 1):
            raise BadInput(f"channel order {self.order!r}: use rgb or, of a network for colour, bgr")

    @property
    def _resize_sides(self) -> tuple[int, ...]:
        return self.resize if isinstance(self.resize, tuple) else (self.resize,)

    @property
    def channels(self) -> int:
        """Three for RGB, one for greyscale."""
        return len(self.mean)

    @property
    def color(self) -> str:
        """The channels by their letters: "RGB", "BGR", or "L" for greyscale."""
        return self.order.upper() if self.channels == 3 else "L"

    @property
    def line(self) -> str:
        """All of it in words, for a person to compare with what trained the network."""
        how = self.interpolation + ("" if self.interpolation == "nearest" else ", antialias")
        cut = f"centre crop {pixels_text(self.size)}"
        if self.fit == "pad":
            fitting = f"resize to the largest that fits into {pixels_text(self.size)} ({how}), pad with the mean colour"
        elif isinstance(self.resize, int):
            fitting = f"resize shorter side to {self.resize} ({how}), {cut}"
        else:
            cut = "no crop" if self.resize == self.size else cut
            fitting = f"resize to {self.resize[0]}x{self.resize[1]} ({how}), {cut}"
        color = "grey" if self.channels == 1 else self.color
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{fitting}, {color}, /255, mean ({mean}), std ({std})"

    @property
    def fill(self) -> tuple[int, ...]:
        """The mean colour, 0..255, one value for each channel: what fit="pad" fills with."""
        return tuple(round(255 * value) for value in self.mean)

    def normalize(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn uint8 NHWC images into float32 NCHW network inputs, (x/255 - mean) / std."""
        mean = np.asarray(self.mean, np.float32)
        std = np.asarray(self.std, np.float32)
        scaled = images.astype(np.float32) / np.float32(255)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2), np.float32)

    def decode(self, path: Path) -> NDArray[np.uint8]:
        """Read an image file and fit it to `size`.

        With fit="crop" the pixels equal torchvision's Resize(resize) and CenterCrop(size) on the PIL image, zero
        padding of images smaller than the crop included. As there, an EXIF orientation is not applied.

        Returns:
            uint8 HWC, C being `channels`.

        Raises:
            BadInput: The file cannot be read as an image.
        """
        with opened_image(path) as image:
            return self.pixels(image)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Convert a PIL image and fit it to `size`: uint8 HWC."""
        image = _eight_bits(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns about the direct way, and the colours are the same
        image = image.convert("L" if self.channels == 1 else "RGB")
        target = self.resized(*image.size)
        if target != image.size:
            image = image.resize(target, _RESAMPLING[self.interpolation])
        pixels = np.asarray(image, np.uint8)
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        if self.order == "bgr":
            pixels = pixels[..., ::-1]
        if self.fit == "crop":
            return _centre_crop(pixels, self.size)
        canvas = np.full((*self.size, self.channels), self.fill, np.uint8)
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        return canvas

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image is resized to before it is cropped or padded."""
        if self.fit == "pad":
            scale = min(self.size[0] / height, self.size[1] / width)
            return max(1, round(width * scale)), max(1, round(height * scale))
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short, long = min(width, height), max(width, height)
        # torchvision truncates the long side; a very thin image keeps at least one pixel.
        scaled = (self.resize, max(1, int(self.resize * long / short)))
        return scaled if width <= height else scaled[::-1]

    def to_json(self) -> dict[str, Any]:
        """The values that a server needs to decode an image the same way."""
        stated = {
            "color": self.color,
            "resize": self.resize if isinstance(self.resize, int) else list(self.resize),
            "size": list(self.size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        # Configs of cropped inputs stay what they were before there was a choice.
        return stated if self.fit == "crop" else stated | {"fit": self.fit, "fill": list(self.fill)}

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> Preprocess:
        """What `to_json` stated.

        Raises:
            BadInput, KeyError, TypeError, ValueError: it is not that.
        """
        height, width = stated["size"]
        resize, channels = stated["resize"], 1 if stated["color"] == "L" else 3
        return cls(
            size=(height, width),
            resize=resize if isinstance(resize, int) else (resize[0], resize[1]),
            # A graph that takes pixels normalises them itself.
            mean=tuple(stated.get("mean", (0.0,) * channels)),
            std=tuple(stated.get("std", (1.0,) * channels)),
            interpolation=stated["interpolation"],
            fit=stated.get("fit", "crop"),
            order="bgr" if stated["color"] == "BGR" else "rgb",
        )


def pixels_text(size: tuple[int, int]) -> str:
    """A size for a person: one number where both sides are equal, as torchvision and timm write it."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image file, to be read in the block.

    Raises:
        BadInput: there is none, or it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            yield image
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such image file") from error
    # Pillow's decoders also raise ValueError, SyntaxError and EOFError on damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale wider numbers to 8 bits by their full range, where Pillow would clip them to white.

    16 bits are divided by 257 and rounded, 12 bits of a TIFF by 16.06; floats are for 0..1.

    Raises:
        BadInput: the full range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        tags = getattr(image, "tag_v2", {})
        most = 2 ** min(16, tags.get(_BITS, (16,))[0]) - 1
        values = np.clip(np.asarray(image).astype(np.int64), 0, most)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow minds in 8 bits alone
            values = most - values
        return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise BadInput(
                f"has float pixels from {values.min():g} to {values.max():g}, and only those from 0 to 1 have a known "
                "range; scale it, or save it with 8 or 16 bits"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode.startswith("I"):
        raise BadInput("has pixels of signed or 32-bit integers, whose range is not known; save it with 8 or 16 bits")
    return image


def _centre_crop(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop HWC pixels to `size`; smaller images are zero-padded, the odd pixel right and below."""
    short = [max(0, want - have) for want, have in zip(size, pixels.shape, strict=False)]
    if any(short):
        pixels = np.pad(pixels, [*((gap // 2, (gap + 1) // 2) for gap in short), (0, 0)])
    # round() goes to the even neighbour at .5, and so does torchvision.
    top, left = (round((have - want) / 2) for want, have in zip(size, pixels.shape, strict=False))
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]])


def load_images(paths: Sequence[Path], preprocess: Preprocess) -> NDArray[np.uint8]:
    """Decode image files into one uint8 NHWC array.

    Raises:
        BadInput: A file cannot be read as an image; the message names it.
    """
    images = np.empty((len(paths), *preprocess.size, preprocess.channels), np.uint8)
    for row, path in zip(images, paths, strict=True):
        row[...] = preprocess.decode(path)
    return images


def labelled_images(folder: Path, labels: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of class folders, with the class of each.

    Args:
        folder: Has one sub-folder for each class, named by its label or by its index ("281").
        labels: The network's class names, in the order of its outputs.

    Returns:
        (file, class index) pairs, sorted by path.

    Raises:
        BadInput: No folder, no image, an image outside a class folder, or a folder name that is no label.
    """
    classes: dict[str, int] = {}
    pairs = []
    for path in list_images(folder):
        parts = path.relative_to(folder).parts
        if len(parts) < 2:
            above = f"; or give {folder.resolve().parent}" if folder.resolve().name in labels else ""
            raise BadInput(
                f"{path}: lies in no class folder; put it into {folder}/<label>/, for example {labels[0]!r}{above}"
            )
        name = parts[0]
        if name not in classes:
            try:
                classes[name] = class_named(name, labels, "a folder")
            except BadInput as error:
                raise BadInput(f"{folder}/{name}: {error}") from error
        pairs.append((path, classes[name]))
    return pairs


def class_named(name: str, labels: Sequence[str], what: str) -> int:
    """The index of a class, by its label or its index.

    Args:
        name: the label, or the index in digits.
        labels: the network's class names, in the order of its outputs.
        what: has the name, in words.

    Raises:
        BadInput: It is no class, or several have this label.
    """
    matches = [index for index, label in enumerate(labels) if label == name]
    if len(matches) == 1:
        return matches[0]
    if len(matches) > 1:  # ImageNet has two cranes, for example
        raise BadInput(f"{name!r} names the classes {', '.join(map(str, matches))}; name it by the index")
    if name.isascii() and name.isdigit() and int(name) < len(labels):
        return int(name)
    near = difflib.get_close_matches(name, labels, 1)
    raise BadInput(
        f"{name!r} is no class; {what} is named by one of the {len(labels)} labels"
        f" ({labels[0]!r}, ...) or by an index from 0 to {len(labels) - 1}"
        f"{f'; did you mean {near[0]!r}?' if near else ''}"
    )


def calibration_images(
    preprocess: Preprocess, folder: Path | None, samples: int, seed: int, arch: str
) -> tuple[NDArray[np.uint8], str]:
    """Images for calibration and for comparing the exported model with the original.

    Args:
        preprocess: The network's preprocessing.
        folder: Where to take images from; None for packaged digits (a greyscale 32x32 network) or made ones.
        samples: How many images; fewer come back where there are fewer.
        seed: Where the evenly spread sample starts, or what the made images look like.
        arch: The network's name, for the line.

    Returns:
        uint8 NHWC images, and one line that says where they came from.

    Raises:
        BadInput: `samples` is not positive, or the folder or one of its files is not usable.
    """
    if samples < 1:
        raise BadInput(f"{samples} calibration samples: at least 1 is needed")
    if folder is not None:
        found = list_images(folder)
        images = load_images([found[index] for index in _spread(len(found), samples, seed)], preprocess)
        what = "image" if len(found) == 1 else "images"
        return images, f"{len(images)} of the {len(found)} {what} in {folder}"
    if has_packaged_images(preprocess):
        digits = assets.digits().calibration
        images = digits[_spread(len(digits), samples, seed)]
        return images, f"{len(images)} of the {len(digits)} handwritten digits packaged for {arch}"
    images = made_images(samples, preprocess.size, preprocess.channels, seed)
    return images, (
        f"{samples} images made for {arch} (1/f noise, seed {seed}), not photographs:"
        " give real ones with --calibration DIR"
    )


def has_packaged_images(preprocess: Preprocess) -> bool:
    """Whether there are images of ours that suit the network: handwritten digits."""
    return preprocess.channels == 1 and preprocess.size == (32, 32)


def _spread(total: int, samples: int, seed: int) -> list[int]:
    """Indices of an evenly spread sample, so that a sorted folder gives of every class."""
    samples = min(samples, total)
    start = np.random.default_rng(seed).random()
    return [int((index + start) * total / samples) for index in range(samples)]


def made_images(samples: int, size: tuple[int, int], channels: int, seed: int) -> NDArray[np.uint8]:
    """Seeded coloured noise with the second-order statistics of photographs.

    Amplitudes fall as 1/f (Field 1987); colour varies mostly in lightness and little along the
    two opponent axes (Ruderman et al. 1998). Mean and contrast differ between images.

    Returns:
        uint8, [samples, *size, channels].
    """
    rng = np.random.default_rng(seed)
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # the mean is set below
    # Lightness, blue-yellow, red-green: orthonormal, and their relative standard deviations.
    axes = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
    spread = np.array([1.0, 0.25, 0.1])
    images = np.empty((samples, height, width, channels), np.uint8)
    for image in images:
        spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency ** rng.uniform(0.9, 1.2)
        planes = np.fft.irfft2(spectrum, s=size)
        planes /= planes.std(axis=(1, 2), keepdims=True) + 1e-12  # a 1x1 image has no spread
        if channels == 3:
            pixels = np.einsum("khw,kc->hwc", planes * spread[:, None, None], axes * np.sqrt(3))
        else:
            pixels = planes[0][..., None]
        mean, contrast = rng.normal(0.45, 0.1), rng.uniform(0.12, 0.28)
        image[...] = np.clip(np.rint(255 * (mean + contrast * pixels)), 0, 255)
    return images
