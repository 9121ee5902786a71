"""Checkpoints as they come: the tensors of one network, found in what people save, and what was done to find them."""

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from convoynet.exporter.errors import BadInput, short_reason

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
_AVERAGED = frozenset({"ema", "swa", "averaged", "teacher"})
# What nn.DataParallel, torch.compile, FSDP and activation checkpointing put into names.
_INSERTED = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_EXTRA = "_extra_state"
_COUNTERS = ("num_batches_tracked",)
_NAMED = 3  # tensors that a message names
_SAVE = "save one with torch.save(model.state_dict(), FILE)"


@dataclass
class StateDict:
    """The tensors of a file.

    Attributes:
        source: the file, for messages.
        tensors: by their names in the file; extra state, which may be no tensor, among them.
        versions: of the modules' formats, as torch.save keeps them: module -> {"version": number}.
        tied: names that are left out -> the names of the tensors that they share.
        ema: whether averaged weights are wanted.
        notes: what was done, each in one line.
    """

    source: str
    tensors: dict[str, Tensor]
    versions: dict[str, dict[str, object]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    ema: bool = False
    notes: list[str] = field(default_factory=list)

    def for_network(self, own: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
        """The tensors by the names of a network, as far as that is told by what wrappers put before and into names.

        Raises:
            BadInput: several parts of the file could be meant.
        """
        tensors = {_plain(name, own): tensor for name, tensor in self.tensors.items()}
        tied = {_plain(name, own): _plain(kept, own) for name, kept in self.tied.items()}
        prefix = self._prefix(tensors, own)
        if prefix:
            inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            outside = [name for name in tensors if not name.startswith(prefix)]
            left = f"; {_count(outside)} outside of it left out ({some(outside)})" if outside else ""
            self.notes.append(f"{prefix!r} was taken off the names of the weights{left}")
            tensors = inside
            tied = {name.removeprefix(prefix): kept.removeprefix(prefix) for name, kept in tied.items()}
        if not any(name.endswith("_orig") for name in own):
            tensors = self._masked(tensors)
        for name, kept in tied.items():
            if name in own and name not in tensors and kept in tensors:
                tensors[name] = tensors[kept]
                self.notes.append(f"{name} is {kept}, to which it is tied in the file")
        for name in own:
            if name not in tensors and (twin := _same(name, own, tensors)) is not None:
                tensors[name] = tensors[twin]
                self.notes.append(f"{name} is {twin}, to which it is tied in the network")
        for name in [name for name in tensors if name not in own and _is_bookkeeping(name)]:
            del tensors[name]
            self.notes.append(f"{name} of the weights was left out: the network has no such state")
        result = OrderedDict(tensors)
        bare = prefix.rstrip(".")
        cut = {_plain(f"{key}.", own).removeprefix(f"{bare}.").rstrip("."): v for key, v in self.versions.items()}
        result._metadata = cut  # type: ignore[attr-defined]  # where PyTorch keeps it
        return result

    def _prefix(self, tensors: Mapping[str, object], own: Mapping[str, Tensor]) -> str:
        """What stands before the names of the network's tensors; empty where nothing does."""
        wanted = [name for name in own if not name.endswith((*_COUNTERS, _EXTRA))]
        if not wanted or any(name in tensors for name in wanted):
            return ""
        found: dict[str, int] = {}
        endings = set(wanted)
        for name in tensors:
            parts = name.split(".")
            for at in range(1, len(parts)):
                if ".".join(parts[at:]) in endings:
                    prefix = ".".join(parts[:at]) + "."
                    found[prefix] = found.get(prefix, 0) + 1
        averaged = {prefix: count for prefix, count in found.items() if is_averaged(prefix)}
        plain = {prefix: count for prefix, count in found.items() if prefix not in averaged}
        chosen = averaged if self.ema and averaged else plain or averaged
        if not chosen:
            return ""
        most = max(chosen.values())
        best = [prefix for prefix, count in chosen.items() if count == most]
        if len(best) > 1:
            raise BadInput(
                f"{self.source}: {' and '.join(map(repr, sorted(best)))} both hold weights that fit; {_SAVE}, of the "
                "one that is meant"
            )
        if averaged and plain:
            aside = next(iter(plain if self.ema else averaged))
            self.notes.append(_aside(best[0], aside, ema=self.ema))
        return best[0]

    def _masked(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What torch.nn.utils.prune keeps in two tensors, as one."""
        pruned = [name.removesuffix("_orig") for name in tensors if name.endswith("_orig")]
        pruned = [name for name in pruned if f"{name}_mask" in tensors and name not in tensors]
        if not pruned:
            return tensors
        result = dict(tensors)
        for name in pruned:
            result[name] = result.pop(f"{name}_orig") * result.pop(f"{name}_mask")
        self.notes.append(f"the masks of torch.nn.utils.prune were applied to {_count(pruned)} ({some(pruned)})")
        return result


def read(path: Path, *, ema: bool = False) -> StateDict:
    """Read a state dict, out of whatever it is wrapped in, and never run code from the file.

    Args:
        path: .safetensors, or what torch.save wrote.
        ema: take averaged weights, where there are some beside the others.

    Raises:
        BadInput: The file is missing, damaged, holds pickled code, or holds no state dict, or no averaged one.
    """
    if not path.is_file():
        raise BadInput(f"weights {path}: no such file; give a file, or `default` or `random`")
    notes: list[str] = []
    content, tied = _read(path)
    while isinstance(content, Mapping):
        key = _wrapper(content, ema, notes)
        if key is None:
            break
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise BadInput(f"{path}: holds no state dict; {_SAVE}")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not (isinstance(tensor, Tensor) or name.endswith(_EXTRA)):
            raise BadInput(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor, so this is no state dict; {_SAVE}"
            )
        tensors[name] = tensor
        if isinstance(tensor, Tensor):
            _require_numbers(path, name, tensor)
    if ema and not notes and not any(is_averaged(name) for name in tensors):
        raise BadInput(f"{path}: --ema is given, and the file holds no averaged weights; leave the option out")
    versions = getattr(content, "_metadata", None)
    return StateDict(str(path), tensors, dict(versions) if isinstance(versions, Mapping) else {}, tied, ema, notes)


def is_averaged(name: str) -> bool:
    """Whether a key, or the beginning of a tensor's name, says that it is of averaged weights."""
    return bool(_AVERAGED & set(re.split(r"[._]", name.lower())))


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _wrapper(content: Mapping[object, object], ema: bool, notes: list[str]) -> str | None:
    """The key of what is wrapped; None where `content` is the state dict itself."""
    inner = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping) and value]
    plain = next((key for key in _WRAPPERS if key in inner), None)
    averaged = next((key for key in inner if is_averaged(key) and not key.endswith(_EXTRA)), None)
    if averaged is None or (plain is None and any(isinstance(value, Tensor) for value in content.values())):
        return plain
    if plain is None or ema:
        notes.append(_aside(averaged, plain, ema=True))
        return averaged
    notes.append(_aside(plain, averaged, ema=False))
    return plain


def _aside(taken: str, aside: str | None, *, ema: bool) -> str:
    if aside is None:
        return f"the weights are the averaged ones ({taken}), beside which there are no others"
    if ema:
        return f"the weights are the averaged ones ({taken}), by --ema; {aside} was left aside"
    return f"the weights are those of {taken}; the averaged ones (EMA) of {aside} were left aside, --ema takes them"


def _read(path: Path) -> tuple[object, dict[str, str]]:
    """What the file holds, and the names that safetensors left out for tensors that they share."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                stated = file.metadata() or {}
            return load_file(path), stated
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch no longer likes; old files have it
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except SafetensorError as error:
        raise BadInput(f"{path}: is no safetensors file or is damaged ({short_reason(error)})") from error
    except pickle.UnpicklingError as error:
        blocked = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) (\S+)", str(error))
        if blocked is None:
            raise BadInput(f"{path}: is no PyTorch checkpoint or is damaged; save it again") from error
        if "qtensor" in blocked[1]:
            raise BadInput(f"{path}: holds quantized tensors; give the weights in float: convoy quantizes") from error
        raise BadInput(
            f"{path}: holds pickled code ({blocked[1]}), which is never run;"
            " save the tensors alone with torch.save(model.state_dict(), FILE)"
        ) from error
    # A damaged archive or pickle stream can fail in almost any way inside torch.load.
    except Exception as error:
        raise BadInput(
            f"{path}: is no PyTorch checkpoint or is damaged ({short_reason(error)}); save it again"
        ) from error


def _require_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse tensors that have no numbers of their own to copy."""
    if tensor.is_meta:
        raise BadInput(f"{path}: {name} is on the meta device and has no values; save the network after they are there")
    if tensor.is_quantized:
        raise BadInput(f"{path}: {name} is quantized; give the weights in float: convoy quantizes")
    if tensor.layout != torch.strided:
        raise BadInput(f"{path}: {name} is sparse ({tensor.layout}); save it as tensor.to_dense()")


def _plain(name: str, own: Mapping[str, object]) -> str:
    """A name without what wrappers put into it, unless the network's own has that."""
    while name not in own and (inserted := next((part for part in _INSERTED if name.startswith(part)), None)):
        name = name.removeprefix(inserted)
    if name in own:
        return name
    for part in _INSERTED[1:]:
        name = name.replace(f".{part}", ".")
    without = name.replace(".module.", ".")
    return without if without in own else name


def _same(name: str, own: Mapping[str, Tensor], tensors: Mapping[str, object]) -> str | None:
    """Another name of the network's for the same tensor, which the file has."""
    tensor = own[name]
    if not isinstance(tensor, Tensor) or not tensor.numel():
        return None
    for other, held in _tensors(own):
        same = held.data_ptr() == tensor.data_ptr() and held.shape == tensor.shape
        if other != name and other in tensors and same:
            return other
    return None


def _tensors(own: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in own.items() if isinstance(tensor, Tensor))


def _is_bookkeeping(name: str) -> bool:
    return name == "n_averaged" or name.endswith(_EXTRA)
