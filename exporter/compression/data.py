"""Images to train on: decoded once, augmented by index arithmetic, and the same batches whenever they are asked for.

Arrays of images are uint8 NHWC until `network_inputs` makes them the network's inputs.
"""

import hashlib
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convoynet.exporter.data.folder import list_images
from convoynet.exporter.data.images import Preprocess, labelled_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Progress

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]

# More than this is decoded for every batch anew. CIFAR-10's 50,000 images take 0.15 GB.
MOST_BYTES_IN_MEMORY = 2**30
# 4 pixels of 32, as K. He et al. 2015 shift the images of CIFAR-10 (section 4.2).
_SHIFT = 1 / 8
_DECODERS = min(8, os.cpu_count() or 1)
_DECODED_AT_ONCE = 256
# Batches that are made while the network computes.
_AHEAD = 2


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """Images, and their classes where they are known.

    Attributes:
        preprocess: how a file becomes an input of the network.
        source: one line that says where the images are from.
        pixels: uint8 [n, H, W, C], where they are kept in memory; H and W may be larger than the network's input, so
            that there is room to crop.
        paths: the files, where the pixels are decoded for each batch.
        labels: int64 [n], the index of each image's class, or None.
    """

    preprocess: Preprocess
    source: str
    pixels: Pixels | None = None
    paths: tuple[Path, ...] = ()
    labels: Indices | None = None

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.paths) if self.pixels is None else len(self.pixels)

    def batch(self, indices: Indices, rng: np.random.Generator | None, decoders: Executor | None = None) -> Pixels:
        """Some of the images, as large as the network takes them.

        Args:
            indices: int64 [n].
            rng: what the augmentation draws from; None for the centre of each image, as it is exported to be fed.
            decoders: reads several files at a time.

        Returns:
            uint8 [n, H, W, C].

        Raises:
            BadInput: a file cannot be read as an image; the message names it.
        """
        if self.pixels is not None:
            return _cut(self.pixels, indices, self.preprocess, rng)
        canvas = _canvas(self.preprocess)
        files = [self.paths[index] for index in indices]
        decoded = map(canvas.decode, files) if decoders is None else decoders.map(canvas.decode, files)
        pixels = np.empty((len(files), *canvas.size, canvas.channels), np.uint8)
        for row, image in zip(pixels, decoded, strict=True):
            row[...] = image
        return _cut(pixels, np.arange(len(files)), self.preprocess, rng)

    def evenly(self, count: int) -> Indices:
        """Indices of up to `count` images, evenly spread: a sorted folder gives of every class."""
        return np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)

    def sha256(self) -> str:
        """Tells sets of images apart: by the pixels, or by the names and sizes of files that are read late."""
        digest = hashlib.sha256(repr((self.preprocess.to_json(), len(self), self.labels is not None)).encode())
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels).data)
        for path in self.paths if self.pixels is None else ():
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def images_from_folder(
    folder: Path, preprocess: Preprocess, labels: Sequence[str] | None, progress: Progress
) -> TrainingImages:
    """The images below a folder, labelled where every folder is named by a class.

    Args:
        folder: class folders, or images at any depth.
        preprocess: how a file becomes an input of the network.
        labels: the network's class names, in the order of its outputs; None to train without labels.
        progress: shows the decoding.

    Raises:
        BadInput: no such folder, fewer than two images, or a file that cannot be read as an image.
    """
    paths = list_images(folder)
    source, classes = f"{len(paths)} images in {folder}", None
    if labels is None:
        source += ", without labels"
    else:
        try:
            pairs = labelled_images(folder, labels)
        except BadInput as reason:
            source += f", without labels ({reason})"
        else:
            paths, classes = [path for path, _ in pairs], np.array([label for _, label in pairs], np.int64)
            source += f" of {len(set(classes.tolist()))} classes"
    _require_some(len(paths), str(folder))
    canvas = _canvas(preprocess)
    if len(paths) * canvas.size[0] * canvas.size[1] * canvas.channels > MOST_BYTES_IN_MEMORY:
        return TrainingImages(preprocess, source, paths=tuple(paths), labels=classes)
    pixels = np.empty((len(paths), *canvas.size, canvas.channels), np.uint8)
    starts = range(0, len(paths), _DECODED_AT_ONCE)
    with ThreadPoolExecutor(_DECODERS) as decoders:
        for start in progress.track(starts, f"decode {len(paths)} training images", len(starts)):
            part = paths[start : start + _DECODED_AT_ONCE]
            for row, image in zip(pixels[start : start + len(part)], decoders.map(canvas.decode, part), strict=True):
                row[...] = image
    return TrainingImages(preprocess, source, pixels, labels=classes)


def images_from_array(images: Pixels, preprocess: Preprocess, source: str) -> TrainingImages:
    """Images that are decoded already, those of the calibration for example; without labels.

    Args:
        images: uint8 [n, H, W, C] of the network's input size.
        preprocess: how they become inputs of the network.
        source: one line that says where they are from.

    Raises:
        BadInput: fewer than two images, or another shape than the network's input.
    """
    if images.shape[1:] != (*preprocess.size, preprocess.channels):
        wanted = [*preprocess.size, preprocess.channels]
        raise BadInput(f"training images of {list(images.shape[1:])}: the network takes {wanted} (height, width, ...)")
    _require_some(len(images), source)
    return TrainingImages(preprocess, source, images)


def _require_some(count: int, source: str) -> None:
    if count < 2:
        raise BadInput(f"{source}: {count} image is too few to train on; give 2 or more, better some hundreds")


def network_inputs(pixels: Pixels, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Normalise as `Preprocess.normalize` does: uint8 NHWC -> float32 NCHW, channels last in memory, on `device`."""
    images = torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(values, device=device).view(shape) for values in (preprocess.mean, preprocess.std))
    return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class Order:
    """Which images come when: a function of these three values, the epoch and the step alone.

    Attributes:
        seed: of the shuffling and the augmentation.
        batch: images of one step.
        augment: shift and flip at random; greyscale images, which are digits and characters, are left as they are.
    """

    seed: int
    batch: int
    augment: bool

    def steps(self, images: int) -> int:
        """Steps of one epoch. The images that fill no whole batch are left for another epoch, shuffled otherwise."""
        return max(1, images // self.batch)

    def epoch(self, images: int, epoch: int) -> list[Indices]:
        """The indices of each batch of one epoch, counted from 0."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(images)
        size = min(self.batch, images)
        return [shuffled[step * size : (step + 1) * size] for step in range(self.steps(images))]

    def randomness(self, epoch: int, step: int, preprocess: Preprocess) -> np.random.Generator | None:
        """What the augmentation of one batch draws from; None where there is none."""
        if not self.augment or preprocess.channels == 1:
            return None
        return np.random.default_rng([self.seed, epoch, step])


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step: their indices [n], uint8 [n, H, W, C], and labels [n] where there are any."""

    indices: Indices
    pixels: Pixels
    labels: Indices | None


def batches(data: TrainingImages, order: Order, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
    """The batches of one epoch from step `first` on, made by other threads a little ahead of their use."""
    plan = order.epoch(len(data), epoch)
    maker, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(_DECODERS)

    def make(step: int) -> Batch:
        indices = plan[step]
        pixels = data.batch(indices, order.randomness(epoch, step, data.preprocess), decoders)
        return Batch(indices, pixels, None if data.labels is None else data.labels[indices])

    waiting: deque[Future[Batch]] = deque()
    try:
        for step in range(first, len(plan)):
            waiting.append(maker.submit(make, step))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        maker.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


def _canvas(preprocess: Preprocess) -> Preprocess:
    """The preprocessing that leaves room for random crops, where the image has it.

    Networks that take the central 224 x 224 of 256 x 256 pixels have a margin; those that take the whole image do not.
    """
    height, width = preprocess.size
    if preprocess.fit != "crop" or height != width:
        return preprocess
    # A multiple of 4, so that the centre of the centre is the same pixels as the centre: halves are rounded to even.
    resize = preprocess.resize if isinstance(preprocess.resize, int) else min(preprocess.resize)
    margin = max(0, resize - height) // 4 * 4
    return replace(preprocess, size=(height + margin, width + margin))


def _cut(pixels: Pixels, chosen: Indices, preprocess: Preprocess, rng: np.random.Generator | None) -> Pixels:
    """Crop each image to the network's size: in the centre, or shifted and flipped at random.

    One gathering read does it all: rows and columns that lie outside are mirrored at the edge (not repeating it), and
    flipped columns are read backwards.
    """
    height, width = preprocess.size
    spare = [have - want for have, want in zip(pixels.shape[1:3], preprocess.size, strict=True)]
    if rng is None:
        top, left = (gap // 2 for gap in spare)
        return np.ascontiguousarray(pixels[chosen, top : top + height, left : left + width])
    starts = []
    for gap, size in zip(spare, (height, width), strict=True):
        reach = 0 if gap else min(max(1, round(_SHIFT * size)), size - 1)
        starts.append(rng.integers(-reach, gap + reach + 1, len(chosen)))
    rows = _mirrored(starts[0][:, None] + np.arange(height), pixels.shape[1])
    columns = _mirrored(starts[1][:, None] + np.arange(width), pixels.shape[2])
    flipped = rng.random(len(chosen)) < 0.5
    columns[flipped] = columns[flipped, ::-1]
    result: Pixels = pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return result


def _mirrored(positions: Indices, size: int) -> Indices:
    """Bring positions from -size+1 to 2*size-2 into 0..size-1."""
    inside: Indices = np.abs(positions)
    return np.where(inside >= size, 2 * (size - 1) - inside, inside)
