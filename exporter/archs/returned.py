"""What a network returns, made the outputs that are exported: named tensors, the images first, the logits before all.

Networks return a tensor, or tuples, dictionaries and data classes of several. `--outputs` names them, or picks what an
inner layer computes.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter.archs import own
from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.errors import BadInput
from convoynet.exporter.outputs_asked import LEFT_OUT, LOGITS

# Two is what torch.export traces, three tells a number that the code knows from one that it asks for.
_BATCH, _ANOTHER = 2, 3
# What a detector returns, where it has names.
DETECTED = ("boxes", "scores", "labels")
_SIZES = "--input-size and --mean with --std set size and channels"


@dataclass(frozen=True)
class Pick:
    """One output.

    Attributes:
        name: in the graph and for clients.
        key: which part of what the network returns; None for all of it.
        layer: the module whose output it is, in the place of a part.
    """

    name: str
    key: str | None = None
    layer: str | None = None


@dataclass(frozen=True)
class Outputs:
    """What is exported of a network.

    Attributes:
        picks: the outputs, the logits first.
        shape: of the logits of two images.
        changed: what is done to the logits, to be read on after "as ... builds it"; empty where they are exported as
            they are, alone.
        known: keys of all that the network returns in evaluation.
    """

    picks: tuple[Pick, ...]
    shape: tuple[int, ...]
    changed: str = ""
    known: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """How many logits an image has, or channels a map."""
        return self.shape[1]

    @property
    def others(self) -> tuple[str, ...]:
        """The names behind the logits."""
        return tuple(pick.name for pick in self.picks[1:])

    def of(self, network: nn.Module) -> nn.Module:
        """The network with these outputs: itself, where it has them already."""
        return Returning(network, self.picks, self.known) if self.others or self.changed else network


class Returning(nn.Module):
    """A network with other outputs: one tensor for each pick, [N, ...] and float32.

    Args:
        network: stays as it is.
        picks: one or more.
        known: keys of what the network returns in evaluation; what more it returns in training is behind the logits.
    """

    def __init__(self, network: nn.Module, picks: Sequence[Pick], known: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        self._picks = tuple(picks)
        self._known = frozenset(known)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """N x C x H x W -> the one output, or all of them."""
        seen: dict[str, Any] = {}
        layers = dict(self.network.named_modules())
        # Now and not before: a copy of this module has layers of its own.
        hooks = [
            layers[pick.layer].register_forward_hook(_keeping(seen, pick.layer))
            for pick in self._picks
            if pick.layer is not None
        ]
        try:
            result = self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        parts = parts_of(result)
        if self.training:
            return self._trained(parts, seen)
        found = tuple(
            row(seen[pick.layer] if pick.layer is not None else parts[pick.key or ""]) for pick in self._picks
        )
        return found if len(found) > 1 else found[0]

    def _trained(self, parts: Mapping[str, Any], seen: Mapping[str, Any]) -> Tensor | tuple[Tensor, ...]:
        """The logits, and what the network returns in training alone: its auxiliary classifiers'."""
        first = self._picks[0]
        key = first.key or ""
        if first.layer is None and key not in parts:  # one tensor, and several in training
            key = next(iter(parts), "")
        logits = seen[first.layer] if first.layer is not None else parts[key]
        more = [part for name, part in parts.items() if name != key and name not in self._known]
        return (row(logits), *more) if more else row(logits)


def _keeping(seen: dict[str, Any], layer: str) -> Any:
    def keep(module: nn.Module, inputs: object, output: object) -> None:
        seen[layer] = output.clone() if isinstance(output, Tensor) else output  # what comes behind may work in place

    return keep


def row(tensor: Tensor) -> Tensor:
    """One value for each image, and channels of one place, as rows; in float32."""
    if tensor.ndim == 1:
        tensor = tensor.reshape(-1, 1)
    elif tensor.ndim > 2 and prod(tensor.shape[2:]) == 1:
        tensor = tensor.flatten(1)
    return tensor.float()


def parts_of(result: object) -> dict[str, Any]:
    """The parts of what a network returned by key, name or place; a tensor alone has the key ""."""
    if isinstance(result, Tensor):
        return {"": result}
    if isinstance(result, Mapping):
        return {str(key): value for key, value in result.items() if value is not None}
    names = [field.name for field in dataclasses.fields(result)] if dataclasses.is_dataclass(result) else []
    names = names or list(getattr(result, "_fields", ()))
    if names:
        return {name: value for name in names if (value := getattr(result, name)) is not None}
    if isinstance(result, tuple | list):
        return {str(index): value for index, value in enumerate(result) if value is not None}
    return {}


def outputs_of(name: str, network: nn.Module, input_size: tuple[int, int, int], asked: Sequence[str] = ()) -> Outputs:
    """Choose the outputs of a network, by running it for their shapes.

    Args:
        name: of the network, for messages.
        network: in float32; stays as it is.
        input_size: (channels, height, width) of an image.
        asked: what `--outputs` says; empty where it is not given.

    Raises:
        BadInput: it does not take such images, or returns something else.
    """
    parts = parts_of(_run(name, network, input_size, _BATCH))
    picks = _asked(name, network, parts, asked) if asked else (_only(name, parts),)
    returning = Returning(network, picks)
    try:
        made = dry_run(returning, input_size, _BATCH)
    except KeyError as error:
        raise BadInput(f"--outputs: {name} does not run its layer {error} for an image; choose another") from error
    except (AttributeError, TypeError) as error:
        raise BadInput(f"--outputs: a part of what {name} returns is no tensor ({own.told(error)})") from error
    tensors = made if isinstance(made, tuple) else (made,)
    for pick, tensor in zip(picks, tensors, strict=True):
        _require_rows(name, pick, parts.get(pick.key or "", tensor), tensor)
    logits = tensors[0]
    assert isinstance(logits, Tensor)
    _require_any_batch(name, returning, input_size, [tensor.shape[1:] for tensor in tensors])
    return Outputs(picks, tuple(logits.shape), _changed(parts, picks, logits), tuple(parts))


def _changed(parts: Mapping[str, Any], picks: Sequence[Pick], logits: Tensor) -> str:
    """What is done to the logits, where it is more than taking what the network returns."""
    changed = []
    pick = picks[0]
    if pick.layer is None:
        returned = parts[pick.key or ""]
        if pick.key:
            what = pick.key if pick.key.isidentifier() else f"tensor {pick.key}"
            changed.append(f", {what} of what it returns")
        if returned.dtype != torch.float32:
            changed.append(f", its {str(returned.dtype).removeprefix('torch.')} outputs as float32")
        if returned.shape != logits.shape:
            changed.append(f", its outputs {list(returned.shape[1:])} of an image as {list(logits.shape[1:])}")
    return "".join(changed)


def _run(name: str, network: nn.Module, input_size: tuple[int, int, int], batch: int) -> object:
    try:
        return dry_run(network, input_size, batch)
    except Exception as error:
        shape = "x".join(map(str, input_size))
        raise own.failed(f"{name} does not take a float32 image of {shape}", error, _SIZES) from error


def _require_any_batch(
    name: str, network: nn.Module, input_size: tuple[int, int, int], shapes: Sequence[tuple[int, ...]]
) -> None:
    for batch in (_ANOTHER, 1):
        try:
            made = dry_run(network, input_size, batch)
        except Exception as error:
            alone = "one image alone" if batch == 1 else f"{batch} at a time"
            raise BadInput(
                f"{name} takes {_BATCH} images at a time and not {alone}: {own.told(error)}; x.squeeze() drops the "
                "axis of one image, x.view(8, -1) knows a number of them, batch statistics need several: use "
                f"x.flatten(1), and eval() where it trains ({own.DEBUG})"
            ) from error
        rows = made if isinstance(made, tuple) else (made,)
        if batch != 1 and any(row.shape[0] != batch for row in rows if isinstance(row, Tensor)):
            raise BadInput(
                f"{name} returns {[list(row.shape) for row in rows if isinstance(row, Tensor)]} for {batch} images: "
                "every output must have the images first, and as many as it was given; use x.flatten(1)"
            )
        if batch != 1 and [row.shape[1:] for row in rows] != list(shapes):
            raise BadInput(
                f"{name} returns {[list(row.shape) for row in rows]} for {batch} images, and other shapes of an image "
                f"for {_BATCH}: what an image gives must not hang on how many there are, as in y @ y.T over the batch"
            )


def _require_rows(name: str, pick: Pick, returned: object, tensor: object) -> None:
    """See that an output has the images first and is a kind of number that is served."""
    what = f"output {pick.name} of {name}"
    if not isinstance(returned, Tensor) or not isinstance(tensor, Tensor):
        raise BadInput(f"{what} is {own.article(returned)}, and must be a tensor; choose with --outputs")
    if not returned.is_floating_point():
        raise BadInput(
            f"{what} is {str(returned.dtype).removeprefix('torch.')}: return the logits, before the argmax or the "
            "comparison; clients rank them, and the gates need what varies"
        )
    ranks = (2, 4) if pick.name == LOGITS else range(1, 100)
    if tensor.ndim not in ranks or tensor.shape[0] != _BATCH or not tensor.numel():
        raise BadInput(
            f"{name} returns {list(returned.shape)} for two images; it must return logits [2, classes], float32 "
            "(boxes: add --task detection)"
        )


def _only(name: str, parts: Mapping[str, Any]) -> Pick:
    """The one tensor that a network returns."""
    tensors = {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    if len(tensors) == 1:
        return Pick(LOGITS, next(iter(tensors)) or None)
    if not tensors:
        raise BadInput(
            f"{name} returns no tensor for two images; it must return logits [2, classes], float32 (boxes: add "
            "--task detection)"
        )
    keys = list(tensors)
    named = all(key.isidentifier() for key in keys)
    shown = ", ".join(f"{f'{key} ' if named else ''}{list(part.shape)}" for key, part in tensors.items())
    if tensors.keys() >= set(DETECTED):
        raise BadInput(
            f"{name} returns {len(keys)} tensors for two images ({shown}), a detector's: add --task detection"
        )
    if named:
        first = LOGITS if LOGITS in keys else f"{LOGITS}={keys[0]}"
        others = [key for key in keys if key not in (LOGITS, keys[0])] or keys[1:]
        names, alone = ",".join([first, *others]), first
    else:
        names = ",".join([LOGITS, *(f"output{index}" for index in range(1, len(keys)))])
        alone = ",".join([LOGITS, *LEFT_OUT * (len(keys) - 1)])
    raise BadInput(
        f"{name} returns {len(keys)} tensors for two images ({shown}): name them in their order, as in --outputs "
        f"{names}, or take the logits alone with --outputs {alone}"
    )


def _asked(name: str, network: nn.Module, parts: Mapping[str, Any], asked: Sequence[str]) -> tuple[Pick, ...]:
    """The picks that `--outputs` asks for, the logits first."""
    tensors = [key for key, part in parts.items() if isinstance(part, Tensor)]
    plain = [each for each in asked if "=" not in each]
    by_place = bool(plain) and not all(each in tensors for each in plain)
    if by_place and len(plain) != len(tensors):
        shown = ", ".join(f"{f'{key} ' if key.isidentifier() else ''}{list(parts[key].shape)}" for key in tensors)
        raise BadInput(
            f"--outputs {','.join(asked)} names {len(plain)} of what {name} returns, and it returns {len(tensors)} "
            f"({shown}): name each in its place, {LEFT_OUT} for one to leave out, or NAME=LAYER for a layer inside"
        )
    picks = []
    for each in asked:
        pick, _, source = each.partition("=")
        if source:
            picks.append(_from(name, network, tensors, pick, source))
        elif pick != LEFT_OUT:
            picks.append(Pick(pick, (tensors[plain.index(each)] if by_place else pick) or None))
        elif by_place:
            plain[plain.index(each)] = ""
    return tuple(sorted(picks, key=lambda pick: pick.name != LOGITS))


def _from(name: str, network: nn.Module, tensors: Sequence[str], pick: str, source: str) -> Pick:
    if source in tensors:
        return Pick(pick, source)
    layers = [layer for layer, _ in network.named_modules() if layer]
    if source in layers:
        return Pick(pick, layer=source)
    close = difflib.get_close_matches(source, [*tensors, *layers], n=3) or layers[-3:]
    raise BadInput(
        f"--outputs {pick}={source}: {name} has no layer and returns no part {source}; it has {', '.join(close)}"
    )
