"""Compare our input of the network with the one that the user's own pipeline made of the same image.

Where they differ, what the user's pipeline may have done is tried: other sizes, filters and orders of the channels, and
then which line leads from our pixels to its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from convoynet.exporter.config import INTERPOLATIONS
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, Refused

Array = NDArray[np.float64]
# In grey levels of 255: what other decoders and filters round, not more.
_LARGEST, _MEAN = 2.0, 0.5
# The values of a normalisation whose name is told.
_NAMED = 1.0
# Above it nothing that was tried is the cause.
_LIKE = 6.0
_SHARES = (0.875, 0.9, 0.95, 0.96)
_SIDES = (224, 232, 236, 248, 256, 288)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _Way:
    """A way from an image to pixels, what it is called, and in how much it is not ours."""

    name: str
    changes: int
    pixels: Callable[[Image.Image], NDArray[np.uint8]]


@dataclass(frozen=True)
class _Fit:
    """A way with its channels in some order, and the lines that lead from its pixels to the user's values."""

    way: _Way
    turned: bool
    pixels: Array
    slopes: Array
    offsets: Array
    levels: float

    @property
    def changes(self) -> int:
        """In how much it is not ours."""
        return self.way.changes + self.turned


def check_tensor(file: Path, picture: Path, preprocess: Preprocess, *, takes_pixels: bool) -> str:
    """Compare the input in `file` with the one that we make of `picture`.

    Args:
        file: .npy, as CHW or HWC, or a batch of one such.
        picture: the image that it was made of.
        preprocess: ours.
        takes_pixels: whether the exported graph takes pixels, as a file of uint8 has them.

    Returns:
        What was compared and how near they are, in one line.

    Raises:
        BadInput: a file cannot be read, or has another shape.
        Refused: they differ by more than rounding; the message says by how much and what the likely cause is.
    """
    raw, layout = _read(file, preprocess)
    ours = preprocess.decode(picture).astype(np.float64)
    mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    slopes, offsets = 1 / (255 * std), -mean / std
    if takes_pixels and raw.dtype == np.uint8:
        slopes, offsets = np.ones_like(std), np.zeros_like(std)
    theirs = raw.astype(np.float64)
    apart = np.abs(theirs - (ours * slopes + offsets)) / slopes
    largest, mean_apart = float(apart.max()), float(apart.mean())
    told = (
        f"{file}, read as {layout}, against our input from {picture}: largest difference {largest * slopes.max():.3g} "
        f"({largest:.3g} of 255 grey levels), mean {mean_apart * slopes.mean():.3g} ({mean_apart:.3g} levels)"
    )
    if largest <= _LARGEST and mean_apart <= _MEAN:
        return f"{told}; the same but for rounding"
    with Image.open(picture) as image:
        image.load()
        cause = _cause(image, theirs, preprocess)
    raise Refused(f"--check-preprocessing {told}; {cause}. Ours: {preprocess.line}")


def _read(file: Path, preprocess: Preprocess) -> tuple[NDArray[np.generic], str]:
    """The values as HWC, and how they lie in the file."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:  # the latter two of a damaged header
        raise BadInput(f"--check-preprocessing {file}: is no array that numpy.save wrote ({error})") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise BadInput(f"--check-preprocessing {file}: must hold one array of numbers, as numpy.save writes it")
    high, wide, channels = (*preprocess.size, preprocess.channels)
    shape, layout = found.shape, ""
    if len(shape) == 4 and shape[0] == 1:
        shape, layout = shape[1:], "1"
    if shape == (channels, high, wide):
        values, layout = found.reshape(shape).transpose(1, 2, 0), f"{layout}CHW"
    elif shape == (high, wide, channels):
        values, layout = found.reshape(shape), f"{layout}HWC"
    elif channels == 1 and shape == (high, wide):
        values, layout = found.reshape(high, wide, 1), "HW"
    else:
        raise BadInput(
            f"--check-preprocessing {file}: has the shape {list(found.shape)}, and the network takes one image of "
            f"{[channels, high, wide]} or {[high, wide, channels]}: --input-size and --mean with --std set size and "
            "channels"
        )
    if not np.isfinite(values).all():
        raise BadInput(f"--check-preprocessing {file}: holds NaN or infinite values")
    return np.array(values), layout


def _cause(image: Image.Image, theirs: Array, preprocess: Preprocess) -> str:
    """What the user's pipeline did otherwise, as far as it can be told from one image."""
    fits = [fit for way in _ways(preprocess) for fit in _fits(way, image, theirs, preprocess)]
    best = min(fits, key=lambda fit: fit.levels, default=None)
    if best is None or best.levels > _LIKE:
        return "no other size, filter, order of channels or normalisation that was tried explains it; another image may"
    # Of what fits as well the one that is nearest to ours.
    near = min(fits, key=lambda fit: (fit.levels > max(1.0, 1.5 * best.levels), fit.changes, fit.levels))
    causes = [near.way.name] if near.way.changes else []
    if near.turned:
        wanted = "rgb" if preprocess.order == "bgr" else "bgr"
        causes.append(f"channels in the order {wanted.upper()} (--channel-order {wanted})")
    causes += [name for name in [_normalisation(near, preprocess)] if name]
    rest = f" ({near.levels:.2g} grey levels remain)" if near.levels > 1 else ""
    return f"the likely cause: it has {' and '.join(causes)}{rest}" if causes else "no single cause was found"


def _ways(preprocess: Preprocess) -> Iterator[_Way]:
    """Ours first, then others."""
    plain = replace(preprocess, order="rgb")
    side = max(preprocess.size)
    resizes: dict[int | tuple[int, int], str] = {preprocess.resize: ""}
    resizes.setdefault(preprocess.size, "no crop (--resize {}x{})".format(*preprocess.size))
    sides = {side, round(side * 256 / 224), *(int(side / share) for share in _SHARES)}
    for shorter in sorted(sides | {fixed for fixed in _SIDES if fixed >= side}):
        resizes.setdefault(shorter, f"the shorter side resized to {shorter} (--resize {shorter})")
    for fit in dict.fromkeys((preprocess.fit, "crop", "pad")):
        for resize, sized in resizes.items() if fit == "crop" else [(preprocess.resize, "")]:
            framed = "" if fit == preprocess.fit else "padding in the place of a crop" if fit == "pad" else "a crop"
            for filtering in INTERPOLATIONS:
                other = replace(plain, fit=fit, resize=resize, interpolation=filtering)
                same = filtering == preprocess.interpolation
                filtered = "" if same else f"{filtering} interpolation (--interpolation {filtering})"
                names = [name for name in (framed, sized, filtered) if name]
                yield _Way(" and ".join(names), len(names), other.pixels)
                if filtering in ("bilinear", "bicubic") and fit == "crop":
                    names = [*names, f"{filtering} interpolation without antialiasing, as OpenCV's"]
                    names = [name for name in names if name != filtered]
                    yield _Way(" and ".join(names), len(names), _Aliased(other))
    turned = "the image turned as its EXIF orientation says"
    yield _Way(turned, 1, lambda image: plain.pixels(ImageOps.exif_transpose(image)))
    yield _Way("the image mirrored", 1, lambda image: plain.pixels(image)[:, ::-1])
    if preprocess.size[0] == preprocess.size[1]:
        yield _Way("height and width swapped", 1, lambda image: plain.pixels(image).transpose(1, 0, 2))


@dataclass(frozen=True)
class _Aliased:
    """Resizes by looking at the nearest pixels alone, however much smaller the image becomes."""

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        resampling = Image.Resampling[self.preprocess.interpolation.upper()]
        to = self.preprocess.resized(*image.size)
        whole = (0, 0, *image.size)
        # What is of the right size already is only cut.
        flat = image.convert("L" if self.preprocess.channels == 1 else "RGB")
        return self.preprocess.pixels(flat.transform(to, Image.Transform.EXTENT, whole, resampling))


def _fits(way: _Way, image: Image.Image, theirs: Array, preprocess: Preprocess) -> Iterator[_Fit]:
    """The user's values by straight lines from the pixels of a way, in either order of the channels."""
    try:
        pixels = way.pixels(image).astype(np.float64)
    except (BadInput, ValueError, OSError):
        return
    if pixels.shape != theirs.shape:
        return
    ours = preprocess.order == "bgr"
    for turned in (False, True) if preprocess.channels == 3 else (False,):
        some = pixels[..., ::-1] if turned != ours else pixels
        centred, middle = some - some.mean((0, 1)), theirs.mean((0, 1))
        spread = (centred**2).sum((0, 1))
        slopes = (centred * (theirs - middle)).sum((0, 1)) / np.where(spread, spread, 1)
        if not (slopes > 0).all():
            continue
        offsets = middle - slopes * some.mean((0, 1))
        apart = (theirs - (some * slopes + offsets)) / slopes
        yield _Fit(way, turned, some, slopes, offsets, float(np.sqrt((apart**2).mean())))


def _normalisation(fit: _Fit, preprocess: Preprocess) -> str:
    """How the user's values are normalised, where that is not ours."""
    mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    ones = np.ones_like(mean)
    named: dict[str, tuple[Array, Array]] = {
        "": (1 / (255 * std), -mean / std),
        "no division by 255 before mean and std": (1 / std, -mean / std),
        "pixels from 0 to 255, not normalised": (ones, 0 * ones),
        "pixels divided by 255, without mean and std": (ones / 255, 0 * ones),
        "values from -1 to 1 (--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5)": (ones / 127.5, -ones),
        "mean and std swapped": (1 / np.maximum(255 * mean, 1e-9), -std / np.maximum(mean, 1e-9)),
        "the mean subtracted, and no division by std": (ones / 255, -mean),
        "a division by std, and no mean subtracted": (1 / (255 * std), 0 * ones),
        "255 times the mean subtracted from pixels, and no division": (ones, -255 * mean),
    }
    if preprocess.channels == 3:
        named["mean and std in the other order of the channels"] = (1 / (255 * std[::-1]), (-mean / std)[::-1])
        usual, spread = (np.asarray(values) for values in _IMAGENET)
        named["ImageNet's mean and std"] = (1 / (255 * spread), -usual / spread)
    values = fit.pixels * fit.slopes + fit.offsets
    for name, (slopes, offsets) in named.items():
        apart = np.abs(values - (fit.pixels * slopes + offsets)) / slopes
        if apart.mean() <= _NAMED:
            return name
    found = 1 / (255 * fit.slopes)
    numbers = [",".join(f"{value:.3f}" for value in row) for row in (-fit.offsets * found, found)]
    return f"the values that --mean {numbers[0]} --std {numbers[1]} give"
