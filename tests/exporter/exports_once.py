"""What PyTorch makes of a network is the same each time: the tests of a process trace a network once.

Two thirds of a small export's time are PyTorch's, and half of those that tests make are of a network that was traced
before. Everything else of an export is done each time. Networks are the same where the classes, the code of their
`forward`, all attributes, all weights and the options are; what cannot be pickled, and what is large, is exported each
time. A test that changes what a `forward` reads of its module or of PyTorch takes `exported_anew` (conftest.py), as do
those that are about PyTorch's part.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import torch

_MOST_BYTES = 4 * 2**20
_MOST_KEPT = 64 * 2**20

Key = tuple[Any, ...]


class Once:
    """Stands for `torch.onnx.export`, which it has as `export`."""

    def __init__(self, export: Callable[..., torch.onnx.ONNXProgram | None]) -> None:
        self.export = export
        self._made: dict[Key, bytes] = {}
        self._classes: list[Any] = []
        self._left = _MOST_KEPT
        self.taken = 0

    def __call__(self, model: Any, *args: Any, **options: Any) -> torch.onnx.ONNXProgram | None:
        """The program of a network."""
        key = self._key(model, args, options)
        if key is not None and key in self._made:
            self.taken += 1
            made = onnx_ir.from_proto(onnx.ModelProto.FromString(self._made[key]))
            return torch.onnx.ONNXProgram(made, None)  # type: ignore[arg-type]
        program = self.export(model, *args, **options)
        if key is not None and program is not None:
            self._keep(key, model, program)
        return program

    def _key(self, model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Key | None:
        if not isinstance(model, torch.nn.Module):
            return None
        if sum(tensor.nbytes for tensor in model.state_dict().values()) > _MOST_BYTES:
            return None
        try:
            state = _state((model, args))
        except Exception:  # whatever a class says to being pickled
            return None
        classes = tuple((id(type(module)), id(type(module).forward)) for module in model.modules())
        return state, classes, repr(sorted(options.items())), torch.is_grad_enabled(), torch.get_default_dtype()

    def _keep(self, key: Key, model: torch.nn.Module, program: torch.onnx.ONNXProgram) -> None:
        made = onnx_ir.to_proto(program.model).SerializeToString()
        if len(made) <= self._left:
            self._left -= len(made)
            self._made[key] = made
            # A class that is gone would lend its number to another.
            self._classes.extend((type(module), type(module).forward) for module in model.modules())


class _Pickler(pickle.Pickler):
    """Writes equal tensors as equal bytes; PyTorch's own way names the places where they lie."""

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, torch.Tensor):
            return NotImplemented
        values = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return bytes, (values,), (type(thing), str(thing.dtype), thing.shape, thing.stride(), thing.requires_grad)


def _state(things: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(things)
    return hashlib.sha256(written.getbuffer()).digest()
