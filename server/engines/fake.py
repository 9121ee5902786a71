"""An engine for tests: takes a stated time, adds up each row, and can be told to fail."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping

import numpy as np

from server.errors import InvalidModel
from server.spec import ModelSpec
from server.types import Tensor


class FakeEngine:
    """Answers every output with the sum of each row of the first input.

    The model file is JSON: {"seconds": time per batch, "fail_above": rows with a larger sum raise}.
    """

    device = "fake"

    def __init__(self, spec: ModelSpec) -> None:
        try:
            stated = json.loads(spec.engine.file.read_text())
        except ValueError as error:
            raise InvalidModel(f"{spec.engine.file.name} is not JSON: {error}") from error
        self._seconds = float(stated.get("seconds", 0))
        self._fail_above = float(stated.get("fail_above", np.inf))
        self._outputs = spec.outputs

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        time.sleep(self._seconds)
        first = next(iter(inputs.values()))
        sums = first.reshape(len(first), -1).sum(axis=1, dtype=np.float64)
        if (sums > self._fail_above).any():
            raise RuntimeError(f"a row adds up to more than {self._fail_above}")
        return {
            t.name: np.broadcast_to(sums.reshape(-1, *[1] * len(t.dims)), (len(sums), *t.dims)).astype(t.dtype)
            for t in self._outputs
            if not outputs or t.name in outputs
        }

    def close(self) -> None:
        """See Engine.close."""
