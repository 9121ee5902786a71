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
    tensor: Tensor = given[0] if given else next(iter(named.values()))
    return tensor
