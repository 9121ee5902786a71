"""An operator that shows a tensor to Python from within OpenVINO, and computes nothing.

What it reads has just been made and is still in the processor's caches. An output would be copied to memory of its own
first: for all tensors of a small network that takes longer than the network.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from openvino import Op, PartialShape, Type


class Viewer:
    """Passes on what the operators of one graph read, and keeps what is raised over it: OpenVINO would make text of it.

    Attributes:
        look: called with a tensor's name and its values; None while nobody looks, as when OpenVINO compiles.
    """

    def __init__(self) -> None:
        self.look: Callable[[str, np.ndarray], None] | None = None
        self._raised: dict[str, Exception] = {}

    def show(self, tensor: str, values: np.ndarray) -> None:
        """Let somebody look at values, which are good until this returns."""
        if self.look is not None and not self._raised:
            try:
                self.look(tensor, values)
            except Exception as error:
                self._raised[tensor] = error

    def check(self) -> None:
        """Raise what was raised, if anything was."""
        for error in self._raised.values():
            raise error


class Tap(Op):  # type: ignore[misc]  # OpenVINO has no types
    """Reads one tensor and makes a number that means nothing: what makes nothing would be left out."""

    def __init__(self, inputs: Sequence[Any], tensor: str, viewer: Viewer) -> None:
        super().__init__(self, inputs)
        self._tensor, self._viewer = tensor, viewer

    def validate_and_infer_types(self) -> None:
        """Say what it makes."""
        self.set_output_type(0, Type.f32, PartialShape([1]))

    def clone_with_new_inputs(self, inputs: Sequence[Any]) -> "Tap":
        """The same elsewhere: what OpenVINO compiles is a copy."""
        return Tap(inputs, self._tensor, self._viewer)

    def has_evaluate(self) -> bool:
        """Say that it runs as it is."""
        return True

    def evaluate(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> bool:
        """Show the values."""
        self._viewer.show(self._tensor, inputs[0].data)
        return True
