"""Depthwise-separable convolutions in place of standard ones (A. Howard et al. 2017, MobileNets, section 3.1)."""

from copy import deepcopy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.compression.layers import Ran, change, image_size, is_spatial, layers_of, require_runs
from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Separable

# The first layer reads 1 or 3 channels, for which one filter each is too few to see anything by.
_MOST_IMAGE_CHANNELS = 4


def separate(module: nn.Module, example: Tensor, step: Separable) -> tuple[nn.Module, dict[str, Any]]:
    """Replace k x k convolutions by a depthwise one and a 1x1 one, the costliest first.

    Each input channel keeps one spatial filter: the best rank-1 approximation of its filters for all outputs. What
    follows, batch normalisation as well, stays, and nothing comes between the two, so that the pair is as near to the
    convolution as it can be. It is not near: the network has to be trained afterwards.

    Args:
        module: float32; stays as it is.
        example: images [n, c, h, w]; their size counts alone.
        step: what to do; its ratio is of the multiply-adds of the convolutions that can be replaced.

    Returns:
        A copy, and what was done: for each replaced layer its shape, multiply-adds and the relative error of its
        weights, and those of the network.

    Raises:
        BadInput: there is no convolution to replace, or the network does not take such images.
    """
    network = deepcopy(module)
    found = [
        ran for ran in layers_of(network, example) if is_spatial(ran.layer) and _channels(ran) > _MOST_IMAGE_CHANNELS
    ]
    if not found:
        raise BadInput(
            f"step separable: the network has no convolution larger than 1x1 of one group and more than "
            f"{_MOST_IMAGE_CHANNELS} input channels; leave the step out"
        )
    size = image_size(example)
    before = archs.count(network, size)
    wanted = step.ratio * sum(ran.macs for ran in found)
    replaced = 0
    layers = []
    for ran in sorted(found, key=lambda ran: ran.macs, reverse=True):
        # The tolerance is of floating point: a ratio of 1 means all of them.
        if replaced >= wanted * (1 - 1e-9):
            break
        assert isinstance(ran.layer, nn.Conv2d)
        pair, error = _pair(ran.layer)
        network.set_submodule(ran.name, pair)
        replaced += ran.macs
        outputs = ran.layer.out_channels
        inside = ran.layer.in_channels * prod(ran.layer.kernel_size)
        macs = ran.macs // (outputs * inside) * (inside + outputs * ran.layer.in_channels)
        shape = list(ran.layer.weight.shape)
        layers.append(
            {
                "layer": ran.name,
                "shape": shape,
                "macs": {"before": ran.macs, "after": macs},
                "relative_error": error,
            }
        )
    require_runs(network, example, step.kind)
    after = archs.count(network, size)
    return network, step.to_dict() | {
        **change(before, after),
        "layers": layers,
    }


def _channels(ran: Ran) -> int:
    return int(ran.layer.weight.shape[1])


def _pair(layer: nn.Conv2d) -> tuple[nn.Sequential, float]:
    """A depthwise and a 1x1 convolution, and the error of their product as a share of the weight's norm.

    For each input channel, W[:, i] as a matrix [out, k*k] is about u v^T with the first pair of singular vectors: v is
    the depthwise filter, u the column of the 1x1 convolution.
    """
    weight = layer.weight.detach().double().flatten(2).transpose(0, 1)  # in x out x k*k
    # Of the small Gram matrices, k*k x k*k: a singular value decomposition of [out, k*k] would do far more.
    filters = torch.linalg.eigh(weight.transpose(1, 2) @ weight).eigenvectors[..., -1]  # in x k*k
    # An eigenvector has no sign of its own.
    filters = filters * torch.where(filters.sum(1, keepdim=True) < 0, -1.0, 1.0)
    columns = (weight @ filters[..., None])[..., 0]  # in x out
    error = float((weight - columns[..., None] * filters[:, None]).norm() / weight.norm().clamp(min=1e-30))
    # Both halves get the same norm, which training likes.
    scale = columns.norm(dim=1, keepdim=True).clamp(min=1e-30).sqrt()
    depthwise = nn.Conv2d(
        layer.in_channels,
        layer.in_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.in_channels,
        bias=False,
        padding_mode=layer.padding_mode,
    )
    pointwise = nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None)
    with torch.no_grad():
        depthwise.weight.copy_((filters * scale).view_as(depthwise.weight))
        pointwise.weight.copy_((columns / scale).T.reshape(pointwise.weight.shape))
        if layer.bias is not None and pointwise.bias is not None:
            pointwise.bias.copy_(layer.bias)
    return nn.Sequential(depthwise, pointwise).train(layer.training), error
