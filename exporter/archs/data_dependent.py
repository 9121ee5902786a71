"""Operators whose results have as many rows as the data says: what no graph of fixed shapes has."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Indexing depends on the data with a mask alone; torchvision's operators have no tags.
_INDEX, _MASKS, _SUPPRESSION = "aten::index", (torch.bool, torch.uint8), "torchvision::nms"


class DataDependent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers those that run within it.

    Attributes:
        found: their names, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        name = func._schema.name
        if name == _INDEX:
            depends = any(index is not None and index.dtype in _MASKS for index in args[1])
        else:
            depends = torch.Tag.dynamic_output_shape in func.tags or name == _SUPPRESSION
        if depends:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
