"""Images that a unit likes best: activation maximization.

D. Erhan and others 2009, "Visualizing Higher-Layer Features of a Deep Network". From seeded noise on, an image climbs
the gradient of the unit's mean for a fixed number of steps. The image is a spectrum in which high frequencies weigh
little, in colours that photographs vary along, and is moved by some pixels in each step, so that what a person can see
wins over what only the network does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.opened import Layer, Opened
from convoynet.exporter.looking.rectified import Rectified, Rectifying
from convoynet.exporter.progress import Progress

STEPS = 64
"""Steps of every image."""
_RATE = 0.05
_LEAST_SIDE = 48
_FIELDS = 1.5  # sides of the image in fields
# Lightness, blue-yellow, red-green, by how much photographs vary along them.
_COLOURS = ((0.58, 0.58, 0.58), (0.14, 0.14, -0.28), (0.07, -0.07, 0.0))
_CONTRAST = 2.0


def preferred(
    opened: Opened, layer: Layer, units: Sequence[int], progress: Progress, *, seed: int = 0
) -> list[NDArray[np.uint8]]:
    """An image [h, w, 3 or 1] in RGB for each of the units.

    Raises:
        BadInput: the network does not run on them.
    """
    size = _size(opened, layer)
    batches = [units[at : at + opened.batch] for at in range(0, len(units), opened.batch)]
    steps = ((batch, step) for batch in batches for step in range(STEPS))
    made: list[NDArray[np.uint8]] = []
    climb: _Climb | None = None
    for batch, step in progress.track(steps, f"images that {len(units)} units like best", STEPS * len(batches)):
        if step == 0:
            climb = _Climb(opened, layer, batch, size, seed)
        assert climb is not None
        climb.step()
        if step == STEPS - 1:
            made += list(climb.images())
    return made


def _size(opened: Opened, layer: Layer) -> tuple[int, int]:
    """Where the field is small, a smaller image shows it as well, and is found sooner."""
    box = opened.box(layer, layer.middle)
    if box is None:
        return opened.size
    sides = [min(side, max(_LEAST_SIDE, round(_FIELDS * own))) for side, own in zip(opened.size, box.size, strict=True)]
    height, width = sides
    blank = np.zeros((1, height, width, opened.preprocess.channels), np.uint8)
    try:
        with torch.no_grad():
            opened.maps(layer, opened.inputs(blank))
    except BadInput:  # it takes its own size alone
        return opened.size
    return height, width


class _Redirected(Rectified):
    """A ReLU that lets what is off everywhere be switched on: where nothing would come back, what raises it does."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """What comes back of a loss."""
        (values,) = ctx.saved_tensors
        usual = torch.where(values > 0, gradient, 0.0)
        nothing = ~usual.flatten(1).any(dim=1).view(-1, *[1] * (gradient.ndim - 1))
        return torch.where(nothing, gradient.clamp(max=0), usual), None


class _Climb:
    """Some images on their way up, one for each unit."""

    def __init__(self, opened: Opened, layer: Layer, units: Sequence[int], size: tuple[int, int], seed: int) -> None:
        self._opened, self._layer, self._units, self._size = opened, layer, torch.tensor(units), size
        self._random = torch.Generator().manual_seed(seed)
        height, width = size
        self._channels = opened.preprocess.channels
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
        weights = 1 / np.maximum(frequency, 1 / max(height, width))
        self._weights = torch.tensor(weights / np.sqrt((weights**2).mean()), dtype=torch.float32)
        shape = (len(units), self._channels, height, width // 2 + 1, 2)
        self._spectrum = (0.1 * torch.randn(shape, generator=self._random)).requires_grad_()
        self._optimizer = torch.optim.Adam([self._spectrum], lr=_RATE)
        self._rows = torch.arange(len(units))

    def step(self) -> None:
        """One step up."""
        across = max(1, min(self._size) // 16)
        down, right = torch.randint(-across, across + 1, (2,), generator=self._random).tolist()
        moved = torch.roll(self._pixels(), (down, right), dims=(2, 3))
        with Rectifying(_Redirected):
            maps = self._opened.maps(self._layer, self._input(moved))
        loss = -maps[self._rows, self._units].mean(dim=(1, 2)).sum()
        (self._spectrum.grad,) = torch.autograd.grad(loss, self._spectrum)
        self._optimizer.step()

    def images(self) -> NDArray[np.uint8]:
        """As they are now, [n, h, w, channels]."""
        with torch.no_grad():
            levels = (255 * self._pixels()).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).numpy()

    def _pixels(self) -> Tensor:
        """[n, channels, h, w] of 0..1, in RGB."""
        planes = torch.fft.irfft2(torch.view_as_complex(self._spectrum) * self._weights, s=self._size, norm="ortho")
        if self._channels == 3:
            planes = torch.einsum("nkhw,kc->nchw", planes, torch.tensor(_COLOURS))
        return torch.sigmoid(_CONTRAST * planes)

    def _input(self, pixels: Tensor) -> Tensor:
        """What the network takes of them."""
        preprocess = self._opened.preprocess
        if preprocess.order == "bgr":
            pixels = pixels.flip(1)
        if self._opened.takes_pixels:
            made = 255 * pixels
        else:
            mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
            made = (pixels - mean) / std
        return made.permute(0, 2, 3, 1) if self._opened.channels_last else made
