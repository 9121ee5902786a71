"""Outputs that few requests ask for: a graph without them, for the batches in which nobody does."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from convoynet.server.engines.base import Engine, EngineSpec
from convoynet.server.types import Tensor


class SeldomEngine:
    """Runs a batch in the graph without these outputs, and in the whole one where one of them is wanted.

    No runtime leaves out a part of the graph that it has loaded. Both graphs are loaded at once: a batch that waited
    for one to be compiled would hold up all behind it.
    """

    def __init__(self, usual: Engine, whole: Engine, spec: EngineSpec) -> None:
        """Args: the engines of both graphs, and the model."""
        self._usual, self._whole = usual, whole
        self._seldom = frozenset(spec.seldom)
        self._count = len(spec.inputs)
        self.device, self.buckets = usual.device, usual.buckets
        self.info: Mapping[str, str] = {**usual.info, "seldom_outputs": ", ".join(spec.seldom)}
        self.inputs, self.outputs = whole.inputs, whole.outputs

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        # Optional inputs may be those of what is left out.
        usual = outputs and len(inputs) == self._count and self._seldom.isdisjoint(outputs)
        return (self._usual if usual else self._whole).run(inputs, outputs)

    def close(self) -> None:
        """See Engine.close."""
        self._usual.close()
        self._whole.close()
