"""The operators of a PyTorch network, recorded while it runs on the meta device: shapes and no numbers.

`torch.fx` stops at control flow that depends on a shape, and `torch.export` takes seconds for a deep network and drops
the modules' calls. A dispatch mode sees the operators that really run, whatever the Python around them does, and a
forward on the meta device takes a fraction of a second for any network and no memory for its weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convoynet.exporter.archs.counting import CountsConnections, CountsItself
from convoynet.exporter.errors import BadInput, reason
from convoynet.exporter.inspecting.inspection import Operation, Trace
from convoynet.exporter.inspecting.rule_from_aten import Arguments, rule_from_aten

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
# What people call the operators that the framework has other names for.
_SHOWN = {"view": "reshape", "_unsafe_view": "reshape", "constant_pad_nd": "pad", "cat": "concat"}


def trace_from_torch(name: str, model: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Record the operators of a network in evaluation mode.

    Args:
        name: for messages.
        model: stays as it is, also its training mode.
        input_size: (channels, height, width) of the image.

    Raises:
        BadInput: the network does not take an image of this size.
    """
    modes = {module: module.training for module in model.modules()}
    own = {key: tensor.detach().to("meta") for key, tensor in chain(model.named_parameters(), model.named_buffers())}
    parameters = {key: own[key] for key, _ in model.named_parameters()}
    recorder = _Recorder({id(tensor): frozenset({key}) for key, tensor in parameters.items()})
    try:
        with torch.no_grad(), torch.device("meta"), _module_calls(model.eval(), recorder):
            # The image has the precision of the weights.
            floats = [tensor.dtype for tensor in own.values() if tensor.is_floating_point()]
            image = torch.empty(1, *input_size, dtype=floats[0] if floats else torch.float32)
            recorder.tensors[id(image)] = "image"
            recorder.shapes["image"] = tuple(image.shape)
            recorder.alive.append(image)
            with recorder:
                torch.func.functional_call(model, own, (image,))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BadInput(f"{name} does not take an image of {input_size[1]}x{input_size[2]}: {reason(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    used = _assign_parameters(recorder, parameters)
    return Trace(
        name=name,
        operations=_with_own_counts(recorder),
        shapes=recorder.shapes,
        image="image",
        image_dims=(2, 3),
        unused_parameters=sum(tensor.numel() for key, tensor in parameters.items() if key not in used),
        modules=recorder.returned,
    )


@dataclass
class _Call:
    """One call of a module.

    Attributes:
        multiply_adds: as the module counts them itself; None where it does not.
        connections: likewise.
    """

    key: str
    name: str
    type: str
    whole: bool  # its operators are one row
    multiply_adds: int | None = None
    connections: int | None = None


@dataclass
class _Recorded:
    operation: Operation
    sources: frozenset[str]
    call: _Call | None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the base untyped
    """Notes each operator that reads something that depends on the image.

    Attributes:
        constants: id of a tensor that does not depend on the image -> the parameters that it is made of.
        tensors: id of a tensor that does -> its name. An operator in place gives the tensor a new name.
        shapes: name -> shape.
        recorded: the operators.
        calls: the calls of modules that are running, innermost last.
        returned: name of a module -> what its first call returned, where that is one tensor.
        alive: every tensor that was made: an id is unique among the living alone.
    """

    def __init__(self, constants: dict[int, frozenset[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants = constants
        self.tensors: dict[int, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.recorded: list[_Recorded] = []
        self.calls: list[_Call] = []
        self.returned: dict[str, str] = {}
        self.alive: list[Any] = []
        self._names: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [item for item in tree_leaves((args, kwargs or {})) if isinstance(item, Tensor)]
        reads = tuple(self.tensors[id(tensor)] for tensor in given if id(tensor) in self.tensors)
        sources = frozenset().union(*(self.constants.get(id(tensor), frozenset()) for tensor in given))
        result = func(*args, **(kwargs or {}))
        made = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        self.alive += made
        # Batch normalisation also returns its statistics, which have no positions.
        made = [tensor for tensor in made if tensor.ndim == made[0].ndim]
        if reads:
            self._record(func, _bound(func, args, kwargs or {}), reads, sources, made)
        else:
            self.constants.update({id(tensor): sources for tensor in made})
        return result

    def unique(self, name: str) -> str:
        """`name`, with the number of its use from the second on."""
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}:{self._names[name]}"

    def _record(
        self, func: Any, arguments: Arguments, reads: tuple[str, ...], sources: frozenset[str], made: list[Tensor]
    ) -> None:
        kind = func._schema.name.removeprefix("aten::").rstrip("_")
        shown = _SHOWN.get(kind, kind.lstrip("_"))
        call = next((call for call in self.calls if call.whole), None)
        key = call.key if call else f"operator {len(self.recorded)}"
        prefix = f"{self.calls[-1].name}." if self.calls and self.calls[-1].name else ""
        writes = tuple(f"{len(self.recorded)}.{index}" for index in range(len(made)))
        macs, biases = _costs(kind, arguments, made[0], self.tensors)
        operation = Operation(
            layer=key,
            name=call.name if call else self.unique(prefix + shown),
            type=call.type if call else shown,
            rule=rule_from_aten(func, kind, arguments, made[0]),
            reads=reads,
            writes=writes,
            macs=macs,
            biases=biases,
            precision=_PRECISIONS.get(made[0].dtype, str(made[0].dtype).removeprefix("torch.")),
        )
        self.tensors.update({id(tensor): name for tensor, name in zip(made, writes, strict=True)})
        self.shapes.update({name: tuple(tensor.shape) for tensor, name in zip(made, writes, strict=True)})
        self.recorded.append(_Recorded(operation, sources, call))


@contextmanager
def _module_calls(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let the recorder know which module is running."""
    number = 0

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object) -> None:
            nonlocal number
            number += 1
            # The network itself is not one row, even if all of it is written in one forward.
            whole = bool(name) and (isinstance(module, CountsItself) or next(module.children(), None) is None)
            shown = recorder.unique(name) if whole else name
            recorder.calls.append(_Call(f"call {number}", shown, type(module).__name__, whole))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object, output: object) -> None:
            call = recorder.calls.pop()
            if name and id(output) in recorder.tensors:
                recorder.returned.setdefault(name, recorder.tensors[id(output)])
            if isinstance(module, CountsItself) and isinstance(output, Tensor):
                call.multiply_adds = module.multiply_adds(output)
                if isinstance(module, CountsConnections):
                    call.connections = module.connections(output)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave(name)).remove)
        yield


def _bound(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of an operator by name, defaults included."""
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)


def _assign_parameters(recorder: _Recorder, parameters: Mapping[str, Tensor]) -> set[str]:
    """Give each operation the parameters that none before it uses; returns all that are used."""
    used: set[str] = set()
    for recorded in recorder.recorded:
        fresh = recorded.sources - used
        recorded.operation = replace(recorded.operation, parameters=sum(parameters[key].numel() for key in fresh))
        used |= fresh
    return used


def _with_own_counts(recorder: _Recorder) -> list[Operation]:
    """The operations; where a module counts itself, its numbers stand at its last one and nowhere else."""
    last = {recorded.call.key: index for index, recorded in enumerate(recorder.recorded) if recorded.call}
    operations = []
    for index, recorded in enumerate(recorder.recorded):
        operation, call = recorded.operation, recorded.call
        if call and call.multiply_adds is not None:
            is_last = index == last[call.key]
            operation = replace(operation, macs=call.multiply_adds if is_last else 0)
            if call.connections is not None:
                operation = replace(operation, biases=call.connections - call.multiply_adds if is_last else None)
        operations.append(operation)
    return operations


def _costs(kind: str, arguments: Arguments, made: Tensor, depends: Mapping[int, str]) -> tuple[int, int | None]:
    """Multiply-adds and additions of a bias of one operator, as `convoynet.exporter.archs.counting` counts them."""
    if kind == "convolution":
        weight = arguments["weight"]
        outputs = arguments["input"].numel() if arguments["transposed"] else made.numel()
        return outputs * prod(weight.shape[1:]), 0 if arguments["bias"] is None else made.numel()
    if kind in {"mm", "addmm"}:
        matrix = arguments["mat2"]
        if id(matrix) not in depends:
            return made.numel() * matrix.shape[0], made.numel() if kind == "addmm" else 0
    return 0, None
