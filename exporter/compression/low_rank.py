"""Low-rank factorization: one layer becomes two or three thinner ones, and stays where that is not faster."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.compression.factors import Moments, factors
from convoynet.exporter.compression.latency import seconds_of
from convoynet.exporter.compression.layer_graph import layer_graph
from convoynet.exporter.compression.layers import Ran, change, image_size, is_spatial, layers_of, require_runs
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Progress
from convoynet.exporter.recipe import LowRank

# Seconds of one call of each graph, measured in turns.
Clock = Callable[[Sequence[onnx.ModelProto]], Sequence[float]]
# A factorization must be faster by this share: medians of the same graph differ by a few per cent.
_MARGIN = 0.05
# Logits of ten classes, the squeeze of an attention: nearly every direction counts, and a ratio would cut most of them.
_FEW_OUTPUTS = 16


@dataclass
class _Row:
    """One layer of the table."""

    ran: Ran
    kind: str
    rank: tuple[int, ...]
    replacement: nn.Sequential | None
    relative_error: float | None
    reason: str
    seconds: tuple[float, float] | None = None

    @property
    def parameters_after(self) -> int:
        assert self.replacement is not None
        return sum(tensor.numel() for tensor in self.replacement.parameters())

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "layer": self.ran.name,
            "kind": self.kind,
            "shape": list(self.ran.layer.weight.shape),
            "rank": list(self.rank),
            "kept": self.replacement is not None and not self.reason,
            "reason": self.reason,
            "relative_error": self.relative_error,
            "parameters": {"before": self.ran.parameters},
        }
        if self.replacement is not None:
            row["parameters"]["after"] = self.parameters_after
        if self.seconds is not None:
            row["seconds"] = {"before": self.seconds[0], "after": self.seconds[1]}
        return row


def factorize(
    module: nn.Module,
    example: Tensor,
    step: LowRank,
    *,
    seconds: Clock | None = None,
    images: Iterable[Tensor] | None = None,
    progress: Progress,
) -> tuple[nn.Module, dict[str, Any]]:
    """Factorize layers by their singular values.

    A fully connected layer or 1x1 convolution of rank r becomes two (E. Denton et al. 2014, "Exploiting Linear
    Structure Within Convolutional Networks"), a k x k convolution three, 1x1, k x k and 1x1 (Y. Kim et al. 2016,
    "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", section 3.1, by a
    truncated higher-order SVD); a first one, of up to four input channels, becomes k x k and 1x1. With images, a layer
    keeps the directions in which its outputs on them vary most and not those of its weight (X. Zhang et al. 2015,
    "Accelerating Very Deep Convolutional Networks", section 3.1).

    Args:
        module: float32 on the CPU; stays as it is.
        example: images [n, c, h, w]; their size counts alone.
        step: what to do. A ratio leaves layers of fewer than 16 outputs as they are. Where it has a gate, a
            factorization stays only where it is measured to be faster by 5 %, on one image.
        seconds: the clock of the gate; None measures in ONNX Runtime on this machine's CPU.
        images: float32 batches [n, c, h, w] to look at outputs on, or None.
        progress: shows the layers.

    Returns:
        A copy, and what was done: a table of all layers of the kinds that were asked for, those too that stay, and
        why.

    Raises:
        BadInput: the network has no such layer, or does not take such images.
    """
    network = deepcopy(module).eval()
    found = [(ran, kind) for ran in layers_of(network, example) if (kind := _kind(ran)) in step.layers]
    if not found:
        raise BadInput(f"step low-rank: the network has no layers of the kinds {', '.join(step.layers)}")
    size = image_size(example)
    before = archs.count(network, size)
    moments: dict[str, Moments] = {}
    if images is not None:
        layers = {ran.name: ran.layer for ran, _ in found}
        moments = output_moments(network, layers, progress.track(images, "outputs of the layers"))
    clock = seconds or seconds_of
    rows: list[_Row] = []
    timed: dict[tuple[object, ...], tuple[float, float]] = {}
    for ran, kind in progress.track(found, "low rank"):
        row = _factorized(ran, kind, step, moments.get(ran.name))
        if row.replacement is not None and step.gate:
            _gate(row, clock, timed)
        rows.append(row)
    for row in rows:
        if row.replacement is not None and not row.reason:
            network.set_submodule(row.ran.name, row.replacement)
    require_runs(network, example, step.kind)
    after = archs.count(network, size)
    return network, step.to_dict() | {"layers": [row.to_dict() for row in rows]} | change(before, after)


def _kind(ran: Ran) -> str:
    if isinstance(ran.layer, nn.Linear):
        return "linear"
    if is_spatial(ran.layer):
        return "spatial"
    return "pointwise" if ran.layer.groups == 1 else "grouped"


def _factorized(ran: Ran, kind: str, step: LowRank, moments: Moments | None) -> _Row:
    outputs = ran.layer.weight.shape[0]
    if step.ratio is not None and outputs < _FEW_OUTPUTS:
        return _Row(ran, kind, (), None, None, f"{outputs} outputs are too few to leave directions out")
    replacement, rank, error = factors(ran.layer, step, moments)
    row = _Row(ran, kind, rank, replacement, error, "")
    if row.parameters_after >= ran.parameters:
        row.replacement, row.relative_error = None, None
        row.reason = f"at rank {' and '.join(map(str, rank))} it has no fewer parameters"
    return row


def _gate(row: _Row, clock: Clock, timed: dict[tuple[object, ...], tuple[float, float]]) -> None:
    """Measure a layer and its replacement, and say in the row where the replacement does not pay."""
    assert row.replacement is not None
    layer = row.ran.layer
    sizes = (*layer.weight.shape, *row.ran.input_shape, *row.rank)
    key = (row.kind, sizes, str(layer))
    if key not in timed:
        shape = row.ran.input_shape
        first, second = clock([layer_graph([layer], shape), layer_graph(list(row.replacement), shape)])
        timed[key] = (first, second)
    row.seconds = timed[key]
    if row.seconds[1] > (1 - _MARGIN) * row.seconds[0]:
        row.reason = f"not faster: {1e6 * row.seconds[1]:.1f} us, and {1e6 * row.seconds[0]:.1f} us as it is"


def output_moments(
    network: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear], images: Iterable[Tensor]
) -> dict[str, Moments]:
    """The mean and covariance of the outputs of layers over images and positions.

    Raises:
        BadInput: there are no images.
    """
    moments = {name: Moments(layer.weight.shape[0]) for name, layer in layers.items()}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            rows = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
            moments[name].add(rows.reshape(-1, rows.shape[-1]))

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in images:
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if any(not moment.count for moment in moments.values()):
        raise BadInput("step low-rank: there are no images to look at outputs on; leave them out")
    return moments
