"""Images made from what a network remembers of those it was trained on: the statistics of its batch normalisations.

Noise is changed by gradient descent until each normalisation sees the mean and the variance that training left in it,
after Y. Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", section 3.1; for a classifier each image is
also to be of a class, drawn at random, and smooth, after H. Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge
Transfer via DeepInversion", section 3.2.
"""

import time
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convoynet.exporter import archs
from convoynet.exporter.archs.calls import read
from convoynet.exporter.archs.wrapped import copy_of
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.progress import Progress
from convoynet.exporter.running.runtime import Images

# No further step is taken after so many seconds.
SECONDS = 120.0
# Multiply-adds in all, which bound the time by the same images on every machine; one step takes three passes.
WORK = 2 * 10**12
_PASSES = 3
# No fewer and no more than so many images and steps, and in between this ratio of them.
_FEWEST, _MOST = 8, 96
_FEWEST_STEPS, _MOST_STEPS = 16, 160
_IMAGES_A_STEP = 0.6
# What the normalisations of one batch may take, several tensors of each size alive, and the most images of one.
_BATCH_BYTES, _MOST_IN_BATCH = 2**30, 32
_TENSORS_A_NORM = 4
_RATE = 0.1
_CLASS_WEIGHT, _SMOOTH_WEIGHT = 0.1, 0.05


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        count: images at most; fewer where WORK does not suffice for them.
        seed: of the noise and the classes. The same seed makes the same images, unless `seconds` are over first.
        seconds: the time after which no further step is taken.
    """

    count: int
    seed: int
    seconds: float = SECONDS


@dataclass(frozen=True)
class Matched:
    """Images that match.

    Attributes:
        images: uint8 NHWC.
        steps: of gradient descent that were taken.
        before: mean squared distance of the normalisations' statistics, in standard deviations, at first.
        after: the same in the end.
        finished: whether the time sufficed for all steps.
    """

    images: Images
    steps: int
    before: float
    after: float
    finished: bool


def has_statistics(model: nn.Module) -> bool:
    """Whether a network has batch normalisations that have seen images: a fresh one's are 0 and 1."""
    return any(bool(norm.running_mean.any()) for norm in _norms(model) if norm.running_mean is not None)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Those that remember."""
    return [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]


def match_statistics(
    model: nn.Module,
    preprocess: Preprocess,
    classes: int,
    wish: Wish,
    progress: Progress,
) -> Matched:
    """Make images that a network takes for those it knows.

    Args:
        model: has statistics; it stays as it is.
        preprocess: how pixels become inputs.
        classes: number of logits, of which each image gets one raised; 0 where the output is something else.
        wish: how many, and from what seed.
        progress: told of the steps.
    """
    network = copy_of(model).eval().requires_grad_(False)
    norms = _norms(network)
    count, steps = _plan(archs.count(model, (preprocess.channels, *preprocess.size)).macs, wish.count)
    random = torch.Generator().manual_seed(wish.seed)
    noise = preprocess.normalize(made_images(count, preprocess.size, preprocess.channels, wish.seed))
    inputs = torch.split(torch.from_numpy(noise), _rows(network, norms, torch.from_numpy(noise[:1])))
    ticks = iter(progress.track(range(len(inputs) * steps), "match statistics", len(inputs) * steps))
    ends = time.monotonic() + wish.seconds
    made, distances, done = [], [], 0
    for index, some in enumerate(inputs):
        # Each batch has its share of the time that is left.
        share = time.monotonic() + (ends - time.monotonic()) / (len(inputs) - index)
        batch = _Batch(network, norms, some, preprocess)
        wanted = torch.randint(classes, (len(some),), generator=random) if classes else None
        passed: list[float] = []
        for step in range(steps):
            next(ticks)
            if not passed or time.monotonic() < share:
                passed.append(batch.step(_RATE * _falling(step / steps), wanted))
        made.append(batch.pixels())
        distances.append((passed[0], passed[-1]))
        done += len(passed)
    next(ticks, None)  # the end of the progress
    before, after = np.mean(distances, axis=0)
    finished = done == len(inputs) * steps
    return Matched(np.concatenate(made), done // len(inputs), float(before), float(after), finished)


def _plan(macs: int, count: int) -> tuple[int, int]:
    """How many images, and steps for each, WORK is enough for."""
    affordable = WORK / (_PASSES * max(macs, 1))
    images = max(min(_FEWEST, count), min(_MOST, count, int(sqrt(_IMAGES_A_STEP * affordable))))
    return images, max(_FEWEST_STEPS, min(_MOST_STEPS, int(affordable / images)))


def _falling(done: float) -> float:
    return 0.5 * (1 + float(np.cos(np.pi * done)))


def _rows(network: nn.Module, norms: list[_BatchNorm], example: Tensor) -> int:
    """How many images make a batch that takes bounded memory."""
    sizes: list[int] = []
    hooks = [norm.register_forward_hook(lambda _, __, made: sizes.append(made.numel())) for norm in norms]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    return max(2, min(_MOST_IN_BATCH, _BATCH_BYTES // (4 * _TENSORS_A_NORM * max(sum(sizes), 1))))


class _Batch:
    """Images on their way, and Adam's state (D. Kingma and J. Ba 2015) for their pixels."""

    def __init__(self, network: nn.Module, norms: list[_BatchNorm], inputs: Tensor, preprocess: Preprocess) -> None:
        self.inputs = inputs.clone().requires_grad_(True)
        self._network, self._norms, self._preprocess = network, norms, preprocess
        self._optimizer = torch.optim.Adam([self.inputs], betas=(0.5, 0.9))
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
        self._black, self._white = -mean / std, (1 - mean) / std

    def step(self, rate: float, wanted: Tensor | None) -> float:
        """Move the pixels once; returns the distance of the statistics before."""
        distances: list[Tensor] = []

        def look(norm: _BatchNorm, given: tuple[Tensor, ...], named: dict[str, Tensor], _: object) -> None:
            distances.append(_distance(norm, read(given, named)))

        hooks = [norm.register_forward_hook(look, with_kwargs=True) for norm in self._norms]
        try:
            outputs = self._network(self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        distance = torch.stack(distances).mean()
        loss = distance + _SMOOTH_WEIGHT * _roughness(self.inputs)
        if wanted is not None:
            # Of several outputs the logits come first.
            logits = outputs if isinstance(outputs, Tensor) else outputs[0]
            loss = loss + _CLASS_WEIGHT * nn.functional.cross_entropy(logits, wanted)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        (self.inputs.grad,) = torch.autograd.grad(loss, [self.inputs])
        self._optimizer.step()
        with torch.no_grad():
            self.inputs.clamp_(self._black, self._white)
        return distance.item()

    def pixels(self) -> Images:
        """The images as files would hold them."""
        scaled = (self.inputs.detach() - self._black) / (self._white - self._black) * 255
        return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _distance(norm: _BatchNorm, values: Tensor) -> Tensor:
    """How far mean and standard deviation of a batch are from those remembered, squared, in the latter's units."""
    axes = [0, *range(2, values.dim())]
    variance, mean = torch.var_mean(values, axes, correction=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    remembered = norm.running_var + norm.eps
    spread = torch.sqrt((variance + norm.eps) / remembered)
    return torch.mean((mean - norm.running_mean) ** 2 / remembered) + torch.mean((spread - 1) ** 2)


def _roughness(images: Tensor) -> Tensor:
    across, down = images.diff(dim=-1), images.diff(dim=-2)
    return across.square().mean() + down.square().mean()
