"""What PyTorch's operators (ATen, as a dispatch mode sees them) do to the axes of an image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convoynet.exporter.inspecting.receptive_field import (
    Adaptive,
    Aligned,
    Moved,
    Multiplied,
    Reduced,
    Reshaped,
    Rule,
    Unknown,
    Window,
    Windowed,
    padded,
    resampled,
    sliced,
    sliding,
    transposed,
)

Arguments = Mapping[str, Any]
# Interpolations of up to so many cells copy along an axis that keeps its size.
_COPIED = 2
# Position by position, without the tag that says so.
_LOCAL = {"hardswish", "hardtanh", "prelu", "expand", "_to_copy", "detach", "alias", "lift_fresh"}


def rule_from_aten(func: Any, kind: str, arguments: Arguments, made: Tensor) -> Rule:
    """Say what an operator does.

    Args:
        func: the operator's overload.
        kind: its name without namespace and the underscore of the variants in place.
        arguments: by the names of its schema.
        made: its first output.
    """
    if kind in _RULES:
        return _RULES[kind](arguments, made)
    if torch.Tag.pointwise in func.tags or kind in _LOCAL:
        return Aligned()
    return Unknown()


def _source(arguments: Arguments) -> Tensor:
    tensor = arguments.get("self", arguments.get("input"))
    assert isinstance(tensor, Tensor)
    return tensor


def _convolution(arguments: Arguments, made: Tensor) -> Rule:
    kernel = arguments["weight"].shape[2:]
    windows = {}
    for index, size in enumerate(kernel):
        stride, padding, dilation = (arguments[name][index] for name in ("stride", "padding", "dilation"))
        if arguments["transposed"]:
            extra = arguments["output_padding"][index]
            windows[2 + index] = transposed(size, stride, (padding, padding), dilation, extra)
        else:
            windows[2 + index] = sliding(size, stride, (padding, padding), dilation)
    return Windowed(windows)


def _pooling(arguments: Arguments, made: Tensor) -> Rule:
    rank = made.ndim
    kernel = _each(arguments["kernel_size"], rank)
    strides = _each(arguments["stride"] or kernel, rank)
    paddings, dilations = _each(arguments["padding"], rank), _each(arguments.get("dilation", 1), rank)
    return Windowed(
        {
            dim: sliding(size, stride, (padding, padding), dilation, ceil_mode=arguments["ceil_mode"])
            for dim, size, stride, padding, dilation in zip(
                range(2, rank), kernel, strides, paddings, dilations, strict=True
            )
        }
    )


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    """A setting for each spatial dimension of a tensor of `rank`."""
    values = [value] if isinstance(value, int) else list(value)
    return values * (rank - 2) if len(values) == 1 else values


def _padding(border: str) -> Callable[[Arguments, Tensor], Rule]:
    def rule(arguments: Arguments, made: Tensor) -> Rule:
        pads = list(arguments.get("pad", arguments.get("padding")))
        pairs = zip(pads[::2], pads[1::2], strict=True)
        return Windowed({made.ndim - 1 - index: padded(pair, border) for index, pair in enumerate(pairs)})

    return rule


def _batch_norm(arguments: Arguments, made: Tensor) -> Rule:
    """With stored statistics; those of the image itself, as instance normalization has them, are of all places."""
    return Unknown() if arguments["training"] else Aligned()


def _reduction(arguments: Arguments, made: Tensor) -> Rule:
    rank = _source(arguments).ndim
    dims = arguments.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return Reduced(frozenset(dim % rank for dim in dims), keep=arguments.get("keepdim", False))


def _slice(arguments: Arguments, made: Tensor) -> Rule:
    dim, size = arguments["dim"], _source(arguments).shape[arguments["dim"]]
    start, stop, step = slice(arguments["start"], arguments["end"], arguments["step"]).indices(size)
    return Windowed({dim % made.ndim: sliced(start, stop, step, size)})


def _permutation(arguments: Arguments, made: Tensor) -> Rule:
    order = [dim % made.ndim for dim in arguments["dims"]]
    return Moved(tuple(order.index(dim) for dim in range(made.ndim)))


def _transposition(arguments: Arguments, made: Tensor) -> Rule:
    first, second = (arguments[name] % made.ndim for name in ("dim0", "dim1"))
    swap = {first: second, second: first}
    return Moved(tuple(swap.get(dim, dim) for dim in range(made.ndim)))


def _insertion(arguments: Arguments, made: Tensor) -> Rule:
    dim = arguments["dim"] % made.ndim
    return Moved(tuple(old + (old >= dim) for old in range(made.ndim - 1)))


def _removal(arguments: Arguments, made: Tensor) -> Rule:
    """Of the given dimensions: `select` takes one index of it, `squeeze` takes those that have one."""
    shape = _source(arguments).shape
    given: int | Iterable[int] = arguments.get("dim", range(len(shape)))
    dims = {dim % len(shape) for dim in ([given] if isinstance(given, int) else given)}
    removed = dims if "index" in arguments else {dim for dim in dims if shape[dim] == 1}
    return Moved(
        tuple(None if dim in removed else dim - sum(gone < dim for gone in removed) for dim in range(len(shape)))
    )


def _resampling(taps: int) -> Callable[[Arguments, Tensor], Rule]:
    def rule(arguments: Arguments, made: Tensor) -> Rule:
        place = "asymmetric" if taps == 1 else "align_corners" if arguments["align_corners"] else "half_pixel"
        before, after = _source(arguments).shape, made.shape
        scales = arguments.get("scale_factors") or [arguments.get(name) for name in ("scales_h", "scales_w")]
        windows: dict[int, Window] = {
            dim: resampled(before[dim], after[dim], taps, place, scale=scale)
            for dim, scale in enumerate(scales, 2)
            if before[dim] != after[dim] or taps > _COPIED  # whatever the scale
        }
        return Windowed(windows)

    return rule


def _along(arguments: Arguments, made: Tensor) -> Rule:
    return Aligned(mixed=arguments["dim"])


def _always(rule: Rule) -> Callable[[Arguments, Tensor], Rule]:
    return lambda arguments, made: rule


_RULES: dict[str, Callable[[Arguments, Tensor], Rule]] = {
    "convolution": _convolution,
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d", "avg_pool3d", "max_pool3d_with_indices"), _pooling),
    **dict.fromkeys(("_adaptive_avg_pool2d", "adaptive_max_pool2d"), _always(Adaptive())),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduction),
    **dict.fromkeys(("mm", "addmm"), _always(Multiplied())),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _always(Reshaped())),
    "constant_pad_nd": _padding("zeros"),
    "reflection_pad2d": _padding("reflect"),
    "replication_pad2d": _padding("edge"),
    "native_batch_norm": _batch_norm,
    **dict.fromkeys(("cat", "split", "split_with_sizes", "_softmax", "_log_softmax"), _along),
    **dict.fromkeys(("squeeze", "select"), _removal),
    "unsqueeze": _insertion,
    "slice": _slice,
    "permute": _permutation,
    "transpose": _transposition,
    "upsample_nearest2d": _resampling(1),
    "upsample_bilinear2d": _resampling(2),
    "upsample_bicubic2d": _resampling(4),
}
