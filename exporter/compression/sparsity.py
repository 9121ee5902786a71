"""Zeros among the weights: two of every four for sparse tensor cores, or the smallest of each layer."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import SPARSE_PATTERN, Sparsify

# Of so many neighbours along the input channels half are zeros.
_BLOCK = 4


def sparsify(module: nn.Module, step: Sparsify) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """Set weights of convolutions and fully connected layers to zero, those of the smallest magnitude.

    "2:4" (A. Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3.1) keeps the two largest of
    every four neighbours along the input channels, which is what TensorRT's SPARSE_WEIGHTS looks for: of a convolution
    [K, C, R, S] along C, of a fully connected layer along its inputs. Layers whose input channels (of one group) are no
    multiple of four, or four at most, stay dense: depthwise convolutions and the first layer are among them.
    "unstructured" (S. Han et al. 2015, "Learning both Weights and Connections", section 3) sets the same share of each
    layer to zero, wherever they are; only the size of the compressed file gains.

    Args:
        module: float32; stays as it is.
        step: what to do.

    Returns:
        A copy with zeros; for each such weight, by its name in the state dict, a float32 mask of its shape, 1 where the
        weight stays, for training that keeps the zeros; and what was done.

    Raises:
        BadInput: no layer fits the pattern.
    """
    network = deepcopy(module)
    masks: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        weight = layer.weight.detach()
        if step.pattern == SPARSE_PATTERN:
            if reason := _misfit(weight):
                skipped.append({"layer": name, "reason": reason})
                continue
            mask = _two_of_four(weight)
        else:
            assert step.ratio is not None
            mask = _largest(weight, step.ratio)
        weight.mul_(mask)
        masks[f"{name}.weight" if name else "weight"] = mask
        layers.append({"layer": name, "weights": weight.numel(), "zeros": int((weight == 0).sum())})
    if not layers:
        raise BadInput(
            f'step sparsify: no layer fits pattern "{step.pattern}": it needs convolutions or fully connected layers'
            + (f" with a multiple of {_BLOCK} input channels, more than {_BLOCK}" * (step.pattern == SPARSE_PATTERN))
        )
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    zeros = sum(layer["zeros"] for layer in layers)
    done = step.to_dict() | {"weights": weights, "zeros": zeros, "layers": layers, "dense": skipped}
    return network, masks, done


def _misfit(weight: Tensor) -> str:
    """Why a weight [out, in, ...] cannot have the pattern; empty where it can."""
    inputs = weight.shape[1]
    if inputs == 1:
        return "depthwise, or one input channel"
    if inputs <= _BLOCK or inputs % _BLOCK:
        return f"{inputs} input channels"
    return ""


def _two_of_four(weight: Tensor) -> Tensor:
    """The mask of the two largest of every four along dimension 1; of equals the first ones stay."""
    last = weight.abs().movedim(1, -1)
    blocks = last.reshape(*last.shape[:-1], -1, _BLOCK)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(blocks).scatter_(-1, order[..., : _BLOCK // 2], 1.0)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def _largest(weight: Tensor, ratio: float) -> Tensor:
    """The mask without the share `ratio` of the smallest; of equals the first ones go."""
    order = weight.abs().flatten().argsort(stable=True)
    mask = torch.ones(weight.numel(), dtype=weight.dtype)
    mask[order[: round(ratio * weight.numel())]] = 0
    return mask.view_as(weight)
