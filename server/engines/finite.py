"""An engine that computes finite numbers alone rightly, and another one for the batches that hold others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from convoynet.server.engines.base import Engine, EngineSpec
from convoynet.server.types import Tensor


class FiniteEngine:
    """Runs a batch in the one engine, and where NaN or an infinity is among its inputs in the other.

    OpenVINO's ReLU makes 0 of NaN: a faulty input would have an answer that looks like any other. Few batches hold
    such a number, so that the other engine is loaded when the first one comes.
    """

    def __init__(self, engine: Engine, other: Callable[[], Engine], spec: EngineSpec) -> None:
        """Args: the one, what makes the other, and the model."""
        self._engine, self._make = engine, other
        self._other: Engine | None = None
        self._floats = [t.name for t in spec.inputs if t.dtype.kind == "f"]
        self.device, self.buckets = engine.device, engine.buckets
        self.info: Mapping[str, str] = {
            **engine.info,
            "not_finite": "a batch with NaN or an infinity in it runs in ONNX Runtime",
        }
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        for name in self._floats:
            if not np.isfinite(inputs[name]).all():
                if self._other is None:
                    self._other = self._make()
                return self._other.run(inputs, outputs)
        return self._engine.run(inputs, outputs)

    def close(self) -> None:
        """See Engine.close."""
        self._engine.close()
        if self._other is not None:
            self._other.close()
