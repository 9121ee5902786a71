"""An engine for tests: takes a stated time, adds up each row, and can be told to fail."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping

import numpy as np

from convoynet.server.engines.base import EngineSpec
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import TensorSpec
from convoynet.server.types import Tensor


class FakeEngine:
    """Answers every output with the sum of each row of the first input (the sum of the lengths, for BYTES).

    The model file is JSON: {"seconds": time per batch, "fail_above": rows with a larger sum raise}. A free dimension of
    an output is that of the first input.
    """

    device = "fake"
    buckets = ()

    def __init__(self, spec: EngineSpec) -> None:
        try:
            stated = json.loads(spec.options.file.read_text())
        except ValueError as error:
            raise InvalidModel(f"{spec.options.file.name} is not JSON: {error}") from error
        self._seconds = float(stated.get("seconds", 0))
        self._fail_above = float(stated.get("fail_above", np.inf))
        self.info = {"runtime": "fake"}
        head = (-1,) if spec.max_rows else ()
        self.inputs = tuple(TensorSpec(t.name, t.datatype, t.dtype, head + t.dims) for t in spec.inputs)
        self.outputs = tuple(TensorSpec(t.name, t.datatype, t.dtype, head + t.dims) for t in spec.outputs)
        self._batched = bool(spec.max_rows)

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        time.sleep(self._seconds)
        first = next(iter(inputs.values()))
        numbers = np.vectorize(len, otypes=[np.float64])(first) if first.dtype == object else first
        sums = numbers.reshape(len(first) if self._batched else 1, -1).sum(axis=1, dtype=np.float64)
        if (sums > self._fail_above).any():
            raise RuntimeError(f"a row adds up to more than {self._fail_above}")
        head = first.shape[: 1 if self._batched else 0]
        answers = {}
        for tensor in self.outputs:
            if not outputs or tensor.name in outputs:
                dims = [d if d >= 0 else first.shape[i] for i, d in enumerate(tensor.dims)]
                values = np.broadcast_to(sums.reshape(*head, *[1] * (len(dims) - len(head))), dims)
                answers[tensor.name] = _texts(values) if tensor.datatype == "BYTES" else values.astype(tensor.dtype)
        return answers

    def close(self) -> None:
        """See Engine.close."""


def _texts(values: Tensor) -> Tensor:
    return np.array([b"%g" % v for v in values.ravel().tolist()], object).reshape(values.shape)
