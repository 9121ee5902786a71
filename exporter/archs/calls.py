"""What a module was called with, as forward hooks see it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def read(given: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """What a layer of one input reads, which a forward may name: `self.conv(input=x)`.

    Args:
        given: by place.
        named: by name.
    """
    tensor: Tensor = given[0] if given else named[name_of(named)]
    return tensor


def name_of(named: Mapping[str, Any]) -> str:
    """The name of what a layer reads, where none is given by place: PyTorch's own layers call it `input`."""
    return "input" if "input" in named else next(iter(named))
