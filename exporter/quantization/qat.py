"""Quantization-aware fine-tuning of a float ONNX graph: B. Jacob et al. 2018, section 3.

The graph is run with fake quantization exactly where `quantize` puts Q/DQ pairs: weights are rounded on the grid that
their largest value gives, activations on a grid whose scale is learned (S. Esser et al. 2020, Learned Step Size
Quantization, section 2.1); the gradient passes straight through the rounding. What comes out is again a float graph and
ranges, so that `quantize` stays the only place that writes integers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.compression.data import Pixels, TrainingImages
from convoynet.exporter.compression.losses import outputs_of, relative_error
from convoynet.exporter.compression.train import Settings, train
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Edge, Graph
from convoynet.exporter.graph.onnx_to_torch import TorchGraph
from convoynet.exporter.progress import Progress
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.qdq_placement import Placement, output_axis
from convoynet.exporter.quantization.quantize import activation_scale, place
from convoynet.exporter.recipe import Finetune, Int8

BATCH = 32
# Images that tell whether it helped.
_MEASURED = 256
# As in `quantize.weight_scales`, which the tests compare with.
_WEIGHT_LIMIT, _BIAS_LIMIT, _MIN_SCALE = 127, 2**30, 1e-15


@dataclass(frozen=True)
class Calibrated:
    """A float graph, the ranges of its activations from `calibrate`, and the target to quantize it for."""

    model: onnx.ModelProto
    ranges: Mapping[str, Range]
    target: str


@dataclass(frozen=True)
class _Weight:
    """The weights of a quantized layer: the axis of the output channels, the bias, and the activation they meet."""

    axis: int
    bias: str
    activation: str


@dataclass(frozen=True)
class _Grid:
    """The integers of one or more activations that share a scale: the parameter's name and what is fixed."""

    scale: str
    zero_point: int
    low: int
    high: int
    largest_scale: float


class _Rounded(torch.autograd.Function):
    """Rounds to a grid; the gradient of the scale is that of equation 3 of the paper, times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float) -> Tensor:
        """`low` and `high` count from the zero point."""
        ctx.save_for_backward(x, scale)
        ctx.bounds = low, high, factor
        return (x / scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        low, high, factor = ctx.bounds
        steps = x / scale
        rounded = steps.round()
        inside = (rounded >= low) & (rounded <= high)
        moved = rounded.clamp_(low, high).sub_(steps.mul_(inside))
        return gradients[0] * inside, (gradients[0] * moved).sum() * factor, None, None, None


class FakeQuantized(TorchGraph):
    """Computes in float what the quantized graph computes in integers, and can be trained.

    Args:
        calibrated: what `quantize` would be given.

    Raises:
        BadInput: an unknown target, a tensor without a range, or an operator that cannot be trained.
    """

    def __init__(self, calibrated: Calibrated) -> None:
        super().__init__(calibrated.model)
        self.reading = self._quantized
        graph = Graph(calibrated.model)
        placement = place(graph, calibrated.target)
        self._target = calibrated.target
        self._edges = frozenset(placement.edges)
        self._grids = self._make_grids(graph, placement, calibrated)
        self._weights: dict[Edge, _Weight] = {}
        for name in placement.weighted:
            node = graph.producers[name]
            bias = node.input[2] if len(node.input) > 2 else ""
            axis = output_axis(node, graph.initializers[node.input[1]].dims)
            self._weights[Edge(node.input[1], name, 1)] = _Weight(axis, bias, node.input[0])
        self._made: dict[str, Tensor] = {}

    def _make_grids(self, graph: Graph, placement: Placement, calibrated: Calibrated) -> dict[str, _Grid]:
        grids: dict[str, _Grid] = {}
        groups = {name: group for group in placement.groups for name in group}
        for tensor in placement.tensors:
            if tensor in grids:
                continue
            members = [name for name in placement.tensors if name in groups.get(tensor, {tensor})]
            missing = [name for name in members if name not in calibrated.ranges]
            if missing:
                raise BadInput(f"tensor {missing[0]!r} was not calibrated: give the ranges that calibrate() made")
            spans = [calibrated.ranges[name] for name in members]
            span = Range(min(item.low for item in spans), max(item.high for item in spans))
            first = activation_scale(span, calibrated.target)
            slot = f"scale_{len(grids)}"
            self.register_parameter(slot, nn.Parameter(torch.tensor(float(first.scale))))
            # A range beyond that of a Clip would only keep it from being absorbed by the QuantizeLinear.
            clipped = any(graph.producer_type(name) == "Clip" for name in members)
            limits = (0, 255) if calibrated.target == "cpu" else (-128, 127)
            grid = _Grid(slot, int(first.zero_point), *limits, float(first.scale) if clipped else math.inf)
            grids.update(dict.fromkeys(members, grid))
        return grids

    def run(self, x: Tensor) -> list[Tensor]:
        """The graph's input -> the wanted tensors."""
        self._made.clear()
        try:
            return super().run(x)
        finally:
            self._made.clear()

    def _quantized(self, edge: Edge, tensor: Tensor) -> Tensor:
        if edge in self._weights:
            return self._quantized_weight(tensor, self._weights[edge])
        if edge not in self._edges:
            return tensor
        if edge.tensor not in self._made:
            grid = self._grids[edge.tensor]
            low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
            # Section 2.2 of the paper: keeps the steps of scales and of weights in proportion.
            factor = 1 / math.sqrt(max(1, tensor[0].numel()) * high)
            self._made[edge.tensor] = _Rounded.apply(tensor, self._scale(grid), low, high, factor)
        return self._made[edge.tensor]

    def _scale(self, grid: _Grid) -> Tensor:
        parameter: Tensor = getattr(self, grid.scale)
        return parameter.clamp(_MIN_SCALE, grid.largest_scale)

    def _quantized_weight(self, weight: Tensor, layer: _Weight) -> Tensor:
        with torch.no_grad():
            bias = self.initializer(layer.bias) if layer.bias and self._target == "cpu" else None
            activation = self._scale(self._grids[layer.activation])
            scales = weight_scales(weight, layer.axis, bias, activation)
            rounded = (weight / scales).round_().clamp_(-_WEIGHT_LIMIT, _WEIGHT_LIMIT).mul_(scales)
            difference = rounded.sub_(weight)
        return weight + difference

    def ranges(self) -> dict[str, Range]:
        """The learned ranges: `quantize` makes of them the scales and zero points of this module."""
        found = {}
        for tensor, grid in self._grids.items():
            scale = float(self._scale(grid).detach())
            reach = 127 if self._target == "gpu" else grid.high - grid.zero_point
            low = -127 if self._target == "gpu" else grid.low - grid.zero_point
            found[tensor] = Range(low * scale, reach * scale)
        return found


def weight_scales(weight: Tensor, axis: int, bias: Tensor | None, activation: Tensor) -> Tensor:
    """What `quantize.weight_scales` computes, in PyTorch, in a shape that divides `weight`."""
    others = [other for other in range(weight.ndim) if other != axis]
    scales = weight.abs().amax(dim=others, keepdim=True) / _WEIGHT_LIMIT
    if bias is not None and bias.shape == (weight.shape[axis],):
        scales = torch.maximum(scales, bias.abs().reshape(scales.shape) / (activation * _BIAS_LIMIT))
    largest = scales.max()
    instead = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.where(scales > 0, scales, instead).clamp_min(_MIN_SCALE)


def fine_tune(
    calibrated: Calibrated,
    data: TrainingImages,
    step: Int8,
    teacher: nn.Module | None,
    settings: Settings,
    progress: Progress,
) -> tuple[onnx.ModelProto, dict[str, Range], dict[str, Any]]:
    """Train the weights and the scales of a graph for its quantization; nothing that is given is changed.

    Args:
        calibrated: what `quantize` would be given.
        data: images to train on; their labels, where there are any, count beside the teacher.
        step: says for how many epochs, and the largest learning rate.
        teacher: takes what the graph takes; None for the float graph itself.
        settings: seed, device, checkpoint, and held-out images to see whether it helped; without any some of
            `data` serve. `loss` and `inputs` are set here.
        progress: shows the training.

    Returns:
        The float graph with other weights, and all ranges, for `quantize`; and what was done, for the report. Where
        the outputs came no nearer to the teacher's, graph and ranges are those that were given.

    Raises:
        BadInput: as `train` and `FakeQuantized` do, or `step` has no epochs.
    """
    if not step.qat_epochs:
        raise BadInput("qat_epochs is 0: give the number of passes over the training images")
    student = FakeQuantized(calibrated)
    exact = teacher if teacher is not None else TorchGraph(calibrated.model)
    takes_pixels = calibrated.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    settings = replace(settings, loss=_loss, inputs=_pixels if takes_pixels else settings.inputs)
    measured = settings.held_out if settings.held_out is not None else data
    before = _sqnr_db(student, exact, measured, settings)
    recipe = Finetune(epochs=step.qat_epochs, batch=BATCH, lr=step.qat_lr)
    history = train(student, exact, data, recipe, settings, progress)
    after = _sqnr_db(student, exact, measured, settings)
    done: dict[str, Any] = {
        "images": len(data),
        "source": data.source,
        "batch": BATCH,
        "lr": step.qat_lr,
        "sqnr_db_before": before,
        "sqnr_db": after,
        "measured_on": measured.source,
        "accepted": after > before,
        "history": history.to_dict(),
    }
    if after <= before:
        return calibrated.model, dict(calibrated.ranges), done
    return student.write_into(calibrated.model), {**calibrated.ranges, **student.ranges()}, done


def _loss(student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
    """The noise-to-signal ratio of the outputs in dB, so that a step is as long when little noise is left; and labels.

    The gradient of a plain squared error would vanish with the error, and every network would need its own rate.
    """
    if teacher is None:
        raise BadInput("quantization-aware fine-tuning needs the float network as its teacher")
    noise = 10 * torch.log10(relative_error(student, teacher).clamp_min(torch.finfo(torch.float32).tiny))
    return noise if labels is None else noise + F.cross_entropy(student, labels)


def _sqnr_db(network: nn.Module, teacher: nn.Module, images: TrainingImages, settings: Settings) -> float:
    """Signal-to-noise ratio of a network's outputs against its teacher's, on up to `_MEASURED` images, in dB."""
    cpu = torch.device("cpu")
    chosen = images.evenly(_MEASURED)
    noise = signal = 0.0
    for start in range(0, len(chosen), BATCH):
        pixels = images.batch(chosen[start : start + BATCH], None)
        inputs = settings.inputs(pixels, images.preprocess, cpu)
        with torch.no_grad():
            wanted, found = (outputs_of(side(inputs))[0].double() for side in (teacher, network))
        noise += float((found - wanted).square().sum())
        signal += float(wanted.square().sum())
    return 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300))


def _pixels(pixels: Pixels, preprocess: Preprocess, device: torch.device) -> Tensor:
    return torch.from_numpy(pixels).to(device)
