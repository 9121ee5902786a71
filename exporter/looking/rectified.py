"""ReLUs with another way back: whatever a network calls them by, while a block runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_INFINITE = float("inf")
_RELU = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
_CLAMP = frozenset({torch.clamp, torch.clip, torch.clamp_, Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_})


class Rectified(torch.autograd.Function):
    """A ReLU, or with an end above (ReLU6); subclasses say what its way back is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, most: float) -> Tensor:
        """The values between 0 and `most`."""
        ctx.save_for_backward(values.clone())  # what comes behind may write into them
        return values.clamp(0, most)


class Rectifying(TorchFunctionMode):
    """While it is on, every ReLU of a network is one of this kind."""

    def __init__(self, kind: type[Rectified]) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, or the ReLU in its place."""
        kwargs = kwargs or {}
        limits = _limits(func, args, kwargs)
        if limits is None or limits[0] != 0 or not args[0].is_floating_point():
            return func(*args, **kwargs)
        made = self._kind.apply(args[0], limits[1])
        in_place = func.__name__.endswith("_") or bool(kwargs.get("inplace"))
        return args[0].copy_(made) if in_place else made


def _limits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """Between what a function cuts its input; None where it is another function, or the ends are tensors."""
    if not args or not isinstance(args[0], Tensor):
        return None
    if func in _RELU:
        return 0.0, _INFINITE
    if func is F.relu6:
        return 0.0, 6.0
    if func in (F.hardtanh, F.hardtanh_):
        given = {"min_val": -1, "max_val": 1} | dict(zip(("min_val", "max_val"), args[1:], strict=False)) | kwargs
        return float(given["min_val"]), float(given["max_val"])
    if func in _CLAMP:
        ends = {"min": None, "max": None} | dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        low, high = ends["min"], ends["max"]
        return -_INFINITE if low is None else float(low), _INFINITE if high is None else float(high)
    return None
