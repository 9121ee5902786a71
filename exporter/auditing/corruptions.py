"""Pictures as the world spoils them: kinds and constants of ImageNet-C and CIFAR-10-C.

D. Hendrycks and T. Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations",
ICLR. Theirs for 32 x 32 pixels are milder than those for 224 x 224; which of them are taken goes by the picture's size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SEVERITIES = (1, 2, 3, 4, 5)
# Sides up to this, in pixels, are CIFAR's case rather than ImageNet's.
_SMALL_SIDE = 64
# The disk of defocus lies on a grid of at least so many pixels to each side.
_DISK = 8
# Values that are spoilt at once, each of which takes 8 bytes a few times over.
_TOGETHER = 2**22

Pixels = NDArray[np.uint8]
Values = NDArray[np.float64]
Constant = float | tuple[float, float]
# It takes the constant of its own kind.
Corruption = Callable[[Pixels, Any, np.random.Generator], Pixels]

CIFAR: Mapping[str, tuple[Constant, ...]] = MappingProxyType(
    {
        "gaussian noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot noise": (500, 250, 100, 75, 50),
        "impulse noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "jpeg": (80, 65, 58, 50, 40),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    }
)
IMAGENET: Mapping[str, tuple[Constant, ...]] = MappingProxyType(
    {
        "gaussian noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot noise": (60, 25, 12, 5, 3),
        "impulse noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "defocus blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (25, 18, 15, 10, 7),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    }
)
KINDS = tuple(CIFAR)


def constants_for(size: tuple[int, int]) -> tuple[str, Mapping[str, tuple[Constant, ...]]]:
    """The constants that suit pictures of a size, and whose they are."""
    return ("CIFAR-10-C", CIFAR) if max(size) <= _SMALL_SIDE else ("ImageNet-C", IMAGENET)


def corrupted(images: Pixels, kind: str, severity: int, rng: np.random.Generator) -> Pixels:
    """Spoil images.

    Args:
        images: uint8 [n, h, w, channels]: RGB or grey.
        kind: one of KINDS.
        severity: 1 to 5.
        rng: makes the noise.
    """
    _, constants = constants_for((images.shape[1], images.shape[2]))
    done, constant = _DONE[kind], constants[kind][severity - 1]
    together = max(1, _TOGETHER // images[0].size) if len(images) else 1
    portions = [done(images[at : at + together], constant, rng) for at in range(0, len(images), together)]
    return np.concatenate(portions) if portions else images.copy()


def _pixels(values: Values) -> Pixels:
    """Values of 0..1 as pixels, cut off as the authors do."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def _gaussian_noise(images: Pixels, spread: float, rng: np.random.Generator) -> Pixels:
    return _pixels(images / 255 + rng.normal(0, spread, images.shape))


def _shot_noise(images: Pixels, photons: float, rng: np.random.Generator) -> Pixels:
    return _pixels(rng.poisson(images / 255 * photons) / photons)


def _impulse_noise(images: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """Salt in one half of the values that are struck, and pepper in the other."""
    struck, salt = rng.random(images.shape) < share, rng.random(images.shape) < 0.5
    return np.where(struck, np.where(salt, 255, 0), images).astype(np.uint8)


def _defocus_blur(images: Pixels, constant: tuple[float, float], rng: np.random.Generator) -> Pixels:
    kernel = disk(*constant)
    reach = len(kernel) // 2
    padded = np.pad(images / 255, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width = images.shape[1:3]
    made = np.zeros(images.shape)
    # Not PyTorch's convolution, which lays out every window of 64-bit numbers: 350 MB for one photograph.
    for (row, column), weight in np.ndenumerate(kernel):
        if weight:
            made += weight * padded[:, row : row + height, column : column + width]
    return _pixels(made)


def disk(radius: float, alias: float) -> Values:
    """A disk of ones that add up to 1, its edge smoothed by a Gaussian of 3 x 3, or 5 x 5, pixels."""
    reach, half = (_DISK, 1) if radius <= _DISK else (int(radius), 2)
    along = np.arange(-reach, reach + 1)
    made = (along[:, None] ** 2 + along[None, :] ** 2 <= radius**2).astype(np.float64)
    made /= made.sum()
    bell = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * alias**2))
    bell /= bell.sum()
    padded = np.pad(made, half, mode="reflect")
    size = len(made)
    rows = sum(weight * padded[at : at + size, :] for at, weight in enumerate(bell))
    smooth: Values = sum(weight * rows[:, at : at + size] for at, weight in enumerate(bell))
    return smooth


def _brightness(images: Pixels, more: float, rng: np.random.Generator) -> Pixels:
    """More of the value of hue, saturation and value: all channels grow by one factor, and black becomes grey."""
    values = images / 255
    most = values.max(axis=3, keepdims=True)
    lighter = np.minimum(most + more, 1)
    return _pixels(np.where(most > 0, values * lighter / np.where(most > 0, most, 1), lighter))


def _contrast(images: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    values = images / 255
    means = values.mean(axis=(1, 2), keepdims=True)
    return _pixels((values - means) * share + means)


def _jpeg(images: Pixels, quality: float, rng: np.random.Generator) -> Pixels:
    def again(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _each(images, again)


def _pixelate(images: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    def again(picture: Image.Image) -> Image.Image:
        small = tuple(max(1, int(side * share)) for side in picture.size)
        return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)

    return _each(images, again)


def _each(images: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    made = np.empty_like(images)
    for row, image in zip(made, images, strict=True):
        picture = Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image)
        row[...] = np.asarray(change(picture)).reshape(image.shape)
    return made


_DONE: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian noise": _gaussian_noise,
        "shot noise": _shot_noise,
        "impulse noise": _impulse_noise,
        "defocus blur": _defocus_blur,
        "brightness": _brightness,
        "contrast": _contrast,
        "jpeg": _jpeg,
        "pixelate": _pixelate,
    }
)
