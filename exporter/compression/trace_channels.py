"""Which channels of a network can only be removed together (G. Fang et al. 2023, DepGraph, section 3).

The network runs on the meta device, and every element of every tensor carries a label: the channel that it belongs to.
A convolution gives its outputs new labels; what only moves elements moves their labels; what combines two elements (the
sum of a residual block, the product of an attention) makes their labels one. What is left are classes of labels: to
remove a class is to remove every element that carries it, and every row and column of a weight that makes or reads
those. So concatenation, flattening, channel shuffles and padded shortcuts need no rules of their own. An operator that
is not known here fixes the labels that it reads: what it reads is never removed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convoynet.exporter.archs.dry_run import evaluating
from convoynet.exporter.archs.resnet import PaddedShortcut
from convoynet.exporter.compression.channels import Channels, Layer, Padding, Slot
from convoynet.exporter.compression.labels import FIXED, NEUTRAL, Labels, broadcast, compact, spread
from convoynet.exporter.errors import BadInput, reason

# Of a convolution with at least so many groups whole groups are removed; of one with fewer, channels of every group.
_WHOLE_GROUPS = 8


def trace_channels(model: nn.Module, input_size: tuple[int, int, int]) -> Channels:
    """Find the channels of a network.

    Args:
        model: from float32 NCHW to one tensor; stays as it is.
        input_size: (channels, height, width) of the image.

    Raises:
        BadInput: the network does not take such an image, or returns something else than one tensor.
    """
    own = dict(chain(model.named_parameters(), model.named_buffers()))
    try:
        return _trace(model, {name: tensor.detach().to("meta") for name, tensor in own.items()}, input_size, "meta")
    except BadInput:
        raise
    except Exception as error:
        # It holds tensors that are neither parameters nor buffers, and these have their own device.
        if any(tensor.is_meta for tensor in own.values()):
            raise _untraceable(error) from error
    try:
        return _trace(model, {name: tensor.detach() for name, tensor in own.items()}, input_size, "cpu")
    except RuntimeError as error:
        raise _untraceable(error) from error


def _untraceable(error: BaseException) -> BadInput:
    return BadInput(f"step prune: the network cannot be run to find its channels: {reason(error)}")


def _trace(model: nn.Module, own: dict[str, Tensor], input_size: tuple[int, int, int], device: str) -> Channels:
    recorder = _Recorder(model, own)
    with evaluating(model), torch.no_grad(), torch.device(device), _padding_calls(model, recorder):
        image = torch.zeros(1, *input_size)
        recorder.give(image, torch.full((1,), FIXED, device="cpu").expand(image.shape))
        with recorder:
            output = torch.func.functional_call(model, own, (image,))
    if not isinstance(output, Tensor):
        raise BadInput(
            f"step prune: the network returns {type(output).__name__}, not one tensor of logits; detection networks "
            "are not pruned"
        )
    recorder.fix(output)  # the classes
    return recorder.result()


@contextmanager
def _padding_calls(model: nn.Module, recorder: "_Recorder") -> Iterator[None]:
    """Tell the recorder which padded shortcut is running."""

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: setattr(recorder, "padding", name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        recorder.padding = None

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, PaddedShortcut):
            hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the base untyped
    """Carries labels through the operators that run.

    Attributes:
        padding: name of the padded shortcut that is running.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = Labels()
        self.padding: str | None = None
        self._model = model
        self._names = {id(tensor): name for name, tensor in own.items()}
        # id of a tensor that is a parameter's transpose -> the parameter's name.
        self._transposed: dict[int, str] = {}
        self._known: dict[int, Tensor] = {}
        self._slots: dict[Slot, Tensor] = {}
        self._layers: list[Layer] = []
        self._norms: list[str] = []
        self._paddings: list[Padding] = []
        self._mixes = False
        # An id is unique among the living alone.
        self._alive: list[Any] = list(own.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._alive.append(made)
        kind = func._schema.name.removeprefix("aten::").removesuffix("_")
        given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        if kind == "t" and id(given[0]) in self._names:
            self._transposed[id(made)] = self._names[id(given[0])]
        pointwise = torch.Tag.pointwise in func.tags or kind in _POINTWISE
        carries = any(id(item) in self._known for item in given)
        if not carries and not (pointwise and any(id(item) in self._names for item in given)):
            return made
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        rule = _Recorder._elementwise if pointwise else _RULES.get(kind)
        with torch.device("cpu"):  # labels are numbers, whatever device the network runs on
            if rule is None or not rule(self, func, arguments, made):
                for item in given:
                    self.fix(item)
                for item in tree_leaves(made):
                    self._give_fixed(item)
        return made

    def result(self) -> Channels:
        """What was found, with one label for each class."""
        roots = self.labels.roots()
        return Channels(
            slots={slot: roots[labels] for slot, labels in self._slots.items()},
            layers=self._layers,
            norms=self._norms,
            paddings=[Padding(pad.name, roots[pad.before], roots[pad.after]) for pad in self._paddings],
            mixes=self._mixes,
            size=len(roots),
        )

    def give(self, tensor: Tensor, labels: Tensor) -> None:
        """Label `tensor`; `labels` has its shape."""
        self._known[id(tensor)] = labels
        self._alive.append(tensor)

    def fix(self, tensor: Tensor) -> None:
        """Let everything in `tensor` stay."""
        if id(tensor) in self._known:
            self.labels.fix(compact(self._known[id(tensor)]))

    def _give_fixed(self, item: object) -> None:
        if isinstance(item, Tensor):
            self.give(item, torch.full((1,) * item.ndim, FIXED).expand(item.shape))

    def _of(self, tensor: Tensor) -> Tensor:
        """The labels of an operand: what is no activation and no vector of a channel's parameters is fixed."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        name = self._names.get(id(tensor))
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if name is not None and len(long) == 1:
            shape = [size if dim == long[0] else 1 for dim, size in enumerate(tensor.shape)]
            return self._slot((name, long[0]), tensor.shape[long[0]]).reshape(shape)
        kind = NEUTRAL if not long else FIXED
        return torch.full((1,) * tensor.ndim, kind).expand(tensor.shape)

    def _slot(self, slot: Slot, size: int) -> Tensor:
        """The labels along a dimension of a tensor of the network's own, new ones where it was not used before."""
        if slot not in self._slots:
            self._slots[slot] = self.labels.new(size)
        return self._slots[slot]

    def _tie(self, name: str | None, dim: int, labels: Tensor) -> None:
        """Let the indices along a dimension carry `labels`."""
        if name is None:
            return
        labels = labels.clamp(min=FIXED)
        if (name, dim) in self._slots:
            self.labels.unite(self._slots[name, dim], labels)
        self._slots.setdefault((name, dim), labels)

    def _along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The labels of `tensor` along one dimension, int64 [size], or None where they vary along others too."""
        labels = compact(self._known[id(tensor)]) if id(tensor) in self._known else None
        if labels is None or labels.numel() != labels.shape[dim]:
            return None
        return labels.reshape(-1).expand(tensor.shape[dim])

    def _elementwise(self, func: Any, arguments: dict[str, Any], made: Any) -> bool:
        operands = [item for item in tree_leaves(arguments) if isinstance(item, Tensor)]
        if not isinstance(made, Tensor):
            return False
        merged, *others = broadcast([compact(self._of(item)) for item in operands])
        for other in others:
            self.labels.unite(merged, other)
            merged = torch.where(merged == NEUTRAL, other, merged)
        self.give(made, merged.expand(made.shape))
        return True

    def _convolution(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        image, weight, groups = arguments["input"], arguments["weight"], arguments["groups"]
        name, read = self._names.get(id(weight)), self._along(image, 1)
        if name is None or read is None or arguments["transposed"]:
            return False
        outputs = weight.shape[0]
        module = name.rpartition(".")[0]
        if groups == 1:
            self._tie(name, 1, read)
            written = self._slot((name, 0), outputs)
        elif not isinstance(self._model.get_submodule(module), nn.Conv2d):
            return False  # the number of groups is written where it cannot be changed
        elif groups >= _WHOLE_GROUPS:
            written = self._slot((name, 0), groups) if (name, 0) not in self._slots else self._slots[name, 0]
            one = written[:: len(written) // groups]
            self.labels.unite(read.reshape(groups, -1), one[:, None].expand(groups, len(read) // groups))
            written = self._slots[name, 0] = one.repeat_interleave(outputs // groups)
        else:
            first = self._fold(read, groups)
            self._tie(name, 1, first)
            written = self._slot((name, 0), outputs)
            self._fold(written, groups)
        bias = arguments["bias"]
        self._tie(self._names.get(id(bias)), 0, written)
        kernel = prod(weight.shape[2:])
        self._layers.append(Layer(module, name, prod(made.shape[2:]) * kernel, weight.shape[1]))
        self.give(made, written.reshape(1, -1, *(1 for _ in made.shape[2:])).expand(made.shape))
        return True

    def _fold(self, labels: Tensor, parts: int) -> Tensor:
        """Unite the labels at the same place of equal parts, and return the first part's."""
        rows = labels.reshape(parts, -1)
        self.labels.unite(rows, rows[:1].expand_as(rows))
        return rows[0]

    def _matmul(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        rows = arguments.get("input", arguments.get("mat1", arguments.get("self")))
        weight = arguments.get("weight", arguments.get("mat2"))
        bias = arguments.get("bias", arguments["self"] if "mat1" in arguments else None)
        assert isinstance(rows, Tensor)
        held = self._names if "weight" in arguments else self._transposed
        name, read = held.get(id(weight)), self._along(rows, rows.ndim - 1)
        if name is None or read is None:
            return False
        self._tie(name, 1, read)
        written = self._slot((name, 0), made.shape[-1])
        self._tie(self._names.get(id(bias)), 0, written)
        self._layers.append(Layer(name.rpartition(".")[0], name, prod(made.shape[1:-1]), len(read)))
        self.give(made, written.expand(made.shape))
        return True

    def _batch_norm(self, func: Any, arguments: dict[str, Any], made: tuple[Tensor, ...]) -> bool:
        labels = self._along(arguments["input"], 1)
        if labels is None:
            return False
        for part in ("weight", "bias", "running_mean", "running_var"):
            self._tie(self._names.get(id(arguments[part])), 0, labels)
        scale = self._names.get(id(arguments["weight"]))
        self._norms += [scale] if scale is not None else []
        self.give(made[0], self._known[id(arguments["input"])])
        return True

    def _spatial(self, func: Any, arguments: dict[str, Any], made: Any) -> bool:
        """What computes each channel of an image by itself."""
        image = arguments.get("self", arguments.get("input"))
        out = made[0] if isinstance(made, tuple) else made
        assert isinstance(image, Tensor)
        labels = compact(self._known[id(image)])
        if image.ndim != 4 or out.ndim != 4 or image.shape[1] != out.shape[1] or prod(labels.shape[2:]) != 1:
            return False
        self.give(out, labels.expand(out.shape))
        return True

    def _over_channels(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        """The sliding average of local response normalisation: channels around each one, as the third of five axes."""
        labels, size = self._known[id(arguments["self"])], arguments["kernel_size"][0]
        alone = arguments["kernel_size"][1:] == [1, 1] and made.shape[3:] == labels.shape[3:]
        if not alone or made.shape[2] != labels.shape[2] - size + 1:
            return False
        self._mixes = True
        self.give(made, labels.narrow(2, size // 2, made.shape[2]))
        return True

    def _reduce(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        image = arguments["self"]
        labels, dims = compact(self._known[id(image)]), arguments.get("dim")
        if not dims or any(labels.shape[dim] != 1 for dim in dims):
            return False
        kept = [size for dim, size in enumerate(labels.shape) if dim not in {d % image.ndim for d in dims}]
        self.give(made, (labels if made.ndim == image.ndim else labels.reshape(kept)).expand(made.shape))
        return True

    def _reshape(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        image = arguments["self"]
        labels = spread(self._known[id(image)].reshape(made.shape))
        small = compact(labels)
        varying = [dim for dim, size in enumerate(small.shape) if size > 1]
        if len(varying) > 1:
            # Channels as groups of channels: each group keeps the same of them, so that the groups stay equal.
            first = small.narrow(varying[0], 0, 1).expand_as(small)
            self.labels.unite(small, first)
        self.give(made, labels)
        return True

    def _move(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        rest = {name: value for name, value in arguments.items() if name != "self"}
        labels = self._known[id(arguments["self"])]
        if func._schema.name in ("aten::slice", "aten::select"):
            # What takes a part by its place takes another one once there are fewer.
            dim = rest.get("dim", 0)
            if compact(labels).shape[dim] > 1:
                return False
        self.give(made, func(labels, **rest))
        return True

    def _split(self, func: Any, arguments: dict[str, Any], made: Sequence[Tensor]) -> bool:
        labels, dim = self._known[id(arguments["self"])], arguments.get("dim", 0)
        if len({part.shape[dim] for part in made}) > 1:
            return False
        parts = labels.chunk(len(made), dim)
        for part, made_part in zip(parts, made, strict=True):
            self.labels.unite(compact(parts[0]), compact(part))
            self.give(made_part, part)
        return True

    def _concatenate(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        dim = arguments.get("dim", 0) % made.ndim
        parts = []
        for item in arguments["tensors"]:
            labels = compact(self._of(item))
            shape = [item.shape[dim] if axis == dim else size for axis, size in enumerate(labels.shape)]
            parts.append(labels.expand(shape).movedim(dim, 0))
        one_each = broadcast([part[:1] for part in parts])[0].shape[1:]
        joined = torch.cat([part.expand(part.shape[0], *one_each) for part in parts]).movedim(0, dim)
        self.give(made, joined.expand(made.shape))
        return True

    def _pad(self, func: Any, arguments: dict[str, Any], made: Tensor) -> bool:
        image, pads = arguments["self"], arguments["pad"]
        labels = compact(self._known[id(image)])
        for index in range(len(pads) // 2):
            dim, (before, after) = image.ndim - 1 - index, pads[2 * index : 2 * index + 2]
            if labels.shape[dim] == 1 or not (before or after):
                continue
            shape = [-1 if axis == dim else 1 for axis in range(image.ndim)]
            if self.padding is not None and dim == 1:
                first, last = self.labels.new(before), self.labels.new(after)
                self._paddings.append(Padding(self.padding, first, last))
            elif image.ndim == 5 and image.shape[1] == 1:  # of local response normalisation
                first, last = torch.full((before,), NEUTRAL), torch.full((after,), NEUTRAL)
            else:
                return False
            labels = torch.cat((first.reshape(shape), labels, last.reshape(shape)), dim)
        self.give(made, labels.expand(made.shape))
        return True


# Operators of one element each that are not marked as such.
_POINTWISE = frozenset({"hardswish", "dropout", "leaky_relu", "prelu"})
_RULES: dict[str, Callable[[_Recorder, Any, dict[str, Any], Any], bool]] = {
    "convolution": _Recorder._convolution,
    **dict.fromkeys(("addmm", "mm", "linear"), _Recorder._matmul),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training"), _Recorder._batch_norm),
    **dict.fromkeys(
        ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
         "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d", "reflection_pad2d", "replication_pad2d"),
        _Recorder._spatial,
    ),
    "avg_pool3d": _Recorder._over_channels,
    **dict.fromkeys(("mean", "sum", "amax"), _Recorder._reduce),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _Recorder._reshape),
    **dict.fromkeys(
        ("permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "expand", "detach", "alias"),
        _Recorder._move,
    ),
    "split": _Recorder._split,
    "cat": _Recorder._concatenate,
    "constant_pad_nd": _Recorder._pad,
}  # fmt: skip
