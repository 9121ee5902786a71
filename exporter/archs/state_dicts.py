"""Checkpoints as they come: the tensors of one network, found in what people save, and what was done to find them."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from convoynet.exporter.archs.checkpoint_files import Unread, read_file
from convoynet.exporter.errors import BadInput

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
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
        prefix, more = self._places(tensors, own)
        if prefix or more:
            inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            outside = [name for name in tensors if not name.startswith(prefix)]
            left = f"; {_count(outside)} outside of it left out ({some(outside)})" if outside else ""
            taken = [f"{prefix!r} was taken off"] * bool(prefix)
            put = [f"{more!r}, as the network has it, was put before"] * bool(more)
            self.notes.append(f"{' and '.join(taken + put)} the names of the weights{left}")
            tensors = {more + name: tensor for name, tensor in inside.items()}
            tied = {more + name.removeprefix(prefix): more + kept.removeprefix(prefix) for name, kept in tied.items()}
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
        plain = {_plain(f"{key}.", own).lstrip("."): version for key, version in self.versions.items()}
        cut = {(more + key.removeprefix(f"{bare}.")).rstrip("."): version for key, version in plain.items()}
        result._metadata = cut  # type: ignore[attr-defined]  # where PyTorch keeps it
        return result

    def _places(self, tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str]:
        """What stands before the names of the file's weights and not of the network's, and the other way round.

        Averaged weights beside those of the network's own names are taken, or taken out of `tensors`.
        """
        wanted = [name for name in own if not name.endswith((*_COUNTERS, _EXTRA))]
        if not wanted:
            return "", ""
        if any(name in tensors for name in wanted):
            return self._beside(tensors, wanted), ""
        if prefix := self._prefix(tensors, wanted):
            return prefix, ""
        parts = wanted[0].split(".")
        for more in (".".join(parts[:at]) + "." for at in range(1, len(parts))):
            if not all(name.startswith(more) for name in wanted):
                break
            inner = [name.removeprefix(more) for name in wanted]
            prefix = "" if inner[0] in tensors else self._prefix(tensors, inner)
            if all(prefix + name in tensors for name in inner):
                return prefix, more
        return "", ""

    def _beside(self, tensors: dict[str, Tensor], wanted: list[str]) -> str:
        """The prefix of averaged weights that are wanted, where the others have none; the unwanted are taken out."""
        for name in [name for name in tensors if name.endswith(f".{wanted[0]}") and is_averaged(name)]:
            prefix = name.removesuffix(wanted[0])
            if is_averaged(prefix) and all(prefix + each in tensors for each in wanted):
                if not self.ema:
                    for each in [each for each in tensors if each.startswith(prefix)]:
                        del tensors[each]
                self.notes.append(_aside(*((prefix, "the rest") if self.ema else ("the rest", prefix)), ema=self.ema))
                return prefix if self.ema else ""
        return ""

    def _prefix(self, tensors: Mapping[str, object], wanted: list[str]) -> str:
        """What stands before these names among those of the file; empty where nothing does."""
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
    file = read_file(path)
    content, notes = file.content, list(file.notes)
    averaged = False
    while isinstance(content, Mapping):
        key = _wrapper(content, ema, notes)
        if key is None:
            break
        content, averaged = content[key], averaged or is_averaged(key)
    if isinstance(content, Unread):
        raise content.refusal(path)
    if not isinstance(content, Mapping) or not content:
        raise BadInput(f"{path}: holds no state dict; {_SAVE}")
    tensors = {}
    for name, tensor in content.items():
        if isinstance(tensor, Unread):
            raise tensor.refusal(path)
        if len(several := [key for key, value in content.items() if _holds_tensors(value)]) > 1:
            raise BadInput(f"{path}: holds several networks ({some([str(key) for key in several])}); {_SAVE} of one")
        if not isinstance(name, str) or not (isinstance(tensor, Tensor) or name.endswith(_EXTRA)):
            raise BadInput(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor, so this is no state dict; {_SAVE}"
            )
        tensors[name] = tensor
        if isinstance(tensor, Tensor):
            _require_numbers(path, name, tensor)
    if ema and not averaged and not any(is_averaged(name) for name in tensors):
        raise BadInput(f"{path}: --ema is given, and the file holds no averaged weights; leave the option out")
    versions = getattr(content, "_metadata", None)
    return StateDict(str(path), tensors, dict(versions) if isinstance(versions, Mapping) else {}, file.tied, ema, notes)


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
    averaged = next((key for key in inner if is_averaged(key) and not key.endswith(_EXTRA)), None)
    plain = next((key for key in _WRAPPERS if key in inner), None)
    if any(isinstance(value, Tensor) for value in content.values()):
        return plain
    if plain is None:
        holding = [key for key in inner if not is_averaged(key) and _holds_tensors(content[key])]
        plain = holding[0] if len(holding) == 1 else None
        if plain is not None and averaged is None:
            notes.append(f"the weights are those of {plain}")
    if averaged is None:
        return plain
    if plain is None or ema:
        notes.append(_aside(averaged, plain, ema=True))
        return averaged
    notes.append(_aside(plain, averaged, ema=False))
    return plain


def _holds_tensors(content: object) -> bool:
    """Whether it is tensors by name, or wraps some."""
    if not isinstance(content, Mapping):
        return False
    wrapped = [content[key] for key in _WRAPPERS if key in content]
    return any(isinstance(value, Tensor) for value in content.values()) or any(map(_holds_tensors, wrapped))


def _aside(taken: str, aside: str | None, *, ema: bool) -> str:
    if aside is None:
        return f"the weights are the averaged ones ({taken}), beside which there are no others"
    if ema:
        return f"the weights are the averaged ones ({taken}), by --ema; {aside} was left aside"
    return f"the weights are those of {taken}; the averaged ones (EMA) of {aside} were left aside, --ema takes them"


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
