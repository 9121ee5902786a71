"""Runs of an ONNX Runtime session with its tensors in buffers that are bound once and used again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import onnxruntime as ort

from convoynet.server.engines.base import EngineSpec
from convoynet.server.spec import TensorSpec
from convoynet.server.types import Tensor

_MOST = 16
"""Shapes whose buffers are kept, with all that is bound to them; the one that was used least lately gives way."""


class _Bound(NamedTuple):
    """The buffers of one shape on the device."""

    binding: ort.IOBinding
    inputs: Mapping[str, ort.OrtValue]
    outputs: Mapping[str, ort.OrtValue]
    run: ort.RunOptions


def can_bind(spec: EngineSpec) -> bool:
    """Whether the shapes of all tensors follow from the rows of a batch, and each has a type of numpy's."""
    tensors = (*spec.inputs, *spec.optional, *spec.outputs)
    return bool(tensors) and all(t.datatype not in ("BYTES", "BF16") and min(t.dims, default=0) >= 0 for t in tensors)


class BoundSession:
    """A session of a model that can_bind(), on one device.

    A batch is copied once to the device and its outputs once back. What lies on the device is allocated once for each
    shape, and stays at its address, as CUDA graphs need it.
    """

    def __init__(self, session: ort.InferenceSession, spec: EngineSpec, device: str, number: int) -> None:
        """Binds nothing yet.

        Args:
            session: Of the model.
            spec: Its tensors.
            device: "cuda", or "cpu" where buffers are the host's.
            number: Of the device.
        """
        self._session = session
        self._spec = spec
        self._device, self._number = device, number
        self._bound: dict[tuple[int, tuple[str, ...], tuple[str, ...]], _Bound] = {}
        self._made = 0

    def run(self, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Runs one batch; the answers are valid until the next run.

        Args:
            inputs: One C-contiguous array an input.
            names: The outputs that are wanted.
        """
        rows = len(next(iter(inputs.values()))) if self._spec.max_rows else 0
        key = rows, tuple(inputs), tuple(names)
        # Taken out and put in again: the first one is then the one that was used least lately.
        bound = self._bound.pop(key, None) or self._bind(rows, inputs, names)
        self._bound[key] = bound
        for name, value in bound.inputs.items():
            value.update_inplace(inputs[name])
        self._session.run_with_iobinding(bound.binding, bound.run)
        return {name: value.numpy() for name, value in bound.outputs.items()}

    def _bind(self, rows: int, given: Collection[str], names: Sequence[str]) -> _Bound:
        while len(self._bound) >= _MOST:
            del self._bound[next(iter(self._bound))]
        fed = [t for t in (*self._spec.inputs, *self._spec.optional) if t.name in given]
        wanted = [t for t in self._spec.outputs if t.name in names]
        inputs, outputs = ({t.name: self._buffer(t, rows) for t in tensors} for tensors in (fed, wanted))
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._made += 1
        run = ort.RunOptions()
        # Where the provider records CUDA graphs: one for each of these buffers, which are part of it. They are kept
        # for as long as the session lives, so that there must not be ever more of them; -1 records none.
        run.add_run_config_entry("gpu_graph_id", str(self._made if self._made <= _MOST else -1))
        return _Bound(binding, inputs, outputs, run)

    def _buffer(self, tensor: TensorSpec, rows: int) -> ort.OrtValue:
        shape = self._shape(tensor, rows)
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, tensor.dtype.type, self._device, self._number)

    def _shape(self, tensor: TensorSpec, rows: int) -> list[int]:
        return [rows, *tensor.dims] if self._spec.max_rows else list(tensor.dims)
