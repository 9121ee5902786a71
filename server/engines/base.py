"""What the server asks of an engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from server.types import Tensor


class Engine(Protocol):
    """Runs batches of one model. One thread owns it: it is made, called and closed there.

    Its constructor takes the ModelSpec and raises InvalidModel where the file and the spec do not agree.
    """

    device: str
    """Where it runs, for people: "CPU, 2 threads", "CUDA 0"."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """Runs one batch.

        Args:
            inputs: One C-contiguous array an input, checked against the spec; the engine does not keep them.
            outputs: Names of the outputs that somebody wants; empty for all. The others are not copied out.

        Returns:
            One array for each of these outputs, in the spec's order, which the caller may keep.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...
