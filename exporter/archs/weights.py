"""Put weights into a network: published ones, random ones, or a file's, and say which they were."""

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convoynet.exporter.archs import Arch
from convoynet.exporter.archs.state_dicts import StateDict, read, some
from convoynet.exporter.errors import BadInput, reason

_STATISTICS_IMAGES = 32  # enough for statistics that differ from (0, 1); a deep network takes seconds
_STATISTICS_BATCH = 16
# Dense outputs take memory, and give every layer many positions of each image.
_STATISTICS_IMAGES_DENSE, _STATISTICS_BATCH_DENSE = 8, 4


@dataclass(frozen=True)
class Weights:
    """Which weights a network holds.

    Attributes:
        source: One line for a person.
        sha256: Of the network's state dict: for each name in sorted order, the line "name dtype shape" and
            the little-endian bytes.
        notes: What was done to a file's tensors to make them the network's, each in one line.
        trained: Whether they are published ones or a file's.
        heads: What came with them for heads that only training uses.
    """

    source: str
    sha256: str
    notes: tuple[str, ...] = ()
    trained: bool = True
    heads: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


def load(
    model: nn.Module, arch: Arch, spec: str, *, seed: int, images: NDArray[np.uint8], ema: bool = False
) -> Weights:
    """Put weights into `model`, in place, and leave it in eval mode.

    Args:
        model: What `arch.build` made. For "random" the caller sets torch.manual_seed(seed) before that: the
            weights are left as built.
        arch: The architecture of `model`.
        spec: "default" for the published weights, "random", or a file: .safetensors, or what torch.save
            wrote (.pt, .pth, .th), read without running pickled code.
        seed: What the caller seeded with, for the line.
        images: uint8 NHWC. Batch normalisation's statistics are estimated on them when the weights are
            random, since the (0, 1) of a fresh network would hide errors in folding them away.
        ema: Take the averaged weights of a file that has such beside the others.

    Raises:
        BadInput: The weights cannot be had, read, or put into this network; the message says why.
    """
    notes: tuple[str, ...] = ()
    heads: Mapping[str, Tensor] = {}
    if spec == "random":
        # As deployed: the network before may not take images of this size. The layers are the same objects.
        try:
            _settle(arch.deploy(model), arch, images)
        except BadInput:
            raise
        except Exception as error:  # whatever the network raises
            raise BadInput(f"{arch.name} fails on images that set its batch statistics: {reason(error)}") from error
        made = f"{arch.published_name}, batch statistics estimated" if arch.source == "user" else ""
        source = made or f"random, seed {seed}"
    elif spec == "default":
        heads = _fill(model, StateDict(arch.published_name, _published(arch)), arch)
        source = arch.published_name
    else:
        state = read(Path(spec), ema=ema)
        heads = _fill(model, state, arch)
        source, notes = f"file {spec}", tuple(state.notes)
    model.eval()
    return Weights(source, state_dict_sha256(model.state_dict()), notes, trained=spec != "random", heads=heads)


def _published(arch: Arch) -> dict[str, Tensor]:
    way_out = "give your own with --weights FILE, or --weights random for a test"
    if arch.published is None:
        raise BadInput(f"{arch.name} has no published weights: {way_out}")
    try:
        return arch.published()
    # A wrong hash is a RuntimeError; a damaged file in the download cache can be any of the others.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise BadInput(f"cannot get {arch.published_name} ({reason(error)}): {way_out}") from error


def _settle(model: nn.Module, arch: Arch, images: NDArray[np.uint8]) -> None:
    dense = arch.task != "classification"
    inputs = arch.preprocess.normalize(images[: _STATISTICS_IMAGES_DENSE if dense else _STATISTICS_IMAGES])
    batch = _STATISTICS_BATCH_DENSE if dense else _STATISTICS_BATCH
    estimate_statistics(model, inputs, batch)
    if arch.settle is not None:
        with torch.no_grad():
            arch.settle(model, torch.from_numpy(inputs[:batch]))


def estimate_statistics(model: nn.Module, inputs: NDArray[np.float32], batch_size: int = _STATISTICS_BATCH) -> None:
    """Set batch normalisation's running statistics to those of `inputs`; dropout stays off.

    Args:
        model: Left in eval mode.
        inputs: float32 NCHW, at least two images where there is batch normalisation.
        batch_size: Images that are computed at a time, at most.
    """
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    if len(inputs) < 2:
        raise BadInput(f"{len(inputs)} image: random weights need 2 or more to estimate batch statistics on")
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over the batches
        layer.train()
    # Equal parts, so that no batch is left with a single image, which has no variance at 1x1.
    batches = np.array_split(inputs, -(-len(inputs) // batch_size))
    with torch.no_grad():
        for batch in batches:
            model(torch.from_numpy(np.ascontiguousarray(batch)))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()


def state_dict_from_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without wrappers and what they put before the names: for scripts of your own.

    Raises:
        BadInput: The file is missing, damaged, holds pickled code, or holds no state dict.
    """
    return dict(read(path).for_network({}))


def _fill(model: nn.Module, state: StateDict, arch: Arch) -> dict[str, Tensor]:
    """Copy tensors into the model after checking every name, shape and value; returns those of heads for training."""
    own: dict[str, Tensor] = model.state_dict()
    tensors = state.for_network(own)
    left_out = [name for name in tensors if name.startswith(arch.training_only)] if arch.training_only else []
    heads = {name: tensors.pop(name) for name in left_out}
    _note_types(state, tensors, own)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_state_dict(tensors, strict=True)
    except Exception:  # hooks of the network's own may raise anything
        _copy(model, tensors, state.source)
    _require_finite(model, state.source)
    return heads


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors that load_state_dict did not take, by their names alone.

    MNASNet's refuses tensors without the format's version, which only torch.save keeps.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    # Checkpoints older than PyTorch 0.4.1 have no such counters, and inference needs none.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected:
        parts = [f"lacks {some(missing)}"] if missing else []
        parts += [f"has the unknown {some(unexpected)}"] if unexpected else []
        raise BadInput(f"{source}: {' and '.join(parts)}; are these weights of another --arch?")
    wrong = {
        name: (list(tensor.shape), list(own[name].shape))
        for name, tensor in tensors.items()
        if tensor.shape != own[name].shape
    }
    if wrong:
        name, (have, want) = next(iter(wrong.items()))
        way_out = _shape_way_out(list(wrong.values()))
        raise BadInput(f"{source}: {name} has the shape {have}, the network {want}; {way_out}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _note_types(state: StateDict, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Say which numbers become float32, integers in the place of floats among them.

    Raises:
        BadInput: complex ones, which would lose a half.
    """
    kinds = {tensor.dtype: name for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    odd = next((name for kind, name in kinds.items() if kind.is_complex), None)
    if odd is not None:
        raise BadInput(f"{state.source}: {odd} is {tensors[odd].dtype}; networks here compute in float32")
    others = {kind for kind in kinds if kind.is_floating_point} - {torch.float32}
    for name, tensor in tensors.items():
        wanted = own.get(name)
        if isinstance(tensor, Tensor) and isinstance(wanted, Tensor) and wanted.is_floating_point():
            others |= {tensor.dtype} - {torch.float32}
    if others:
        told = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in others))
        state.notes.append(f"the weights' {told} numbers became float32")


def _require_finite(model: nn.Module, source: str) -> None:
    """Let constants be infinite, such as the -inf of a mask, and nothing that is learned or measured."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        constant = name not in dict(model.named_parameters()) and not name.endswith(("running_mean", "running_var"))
        broken = tensor.isnan().any() if constant else not torch.isfinite(tensor).all()
        if broken:
            raise BadInput(f"{source}: {name} holds NaN or infinite values; train or save it again")


def _shape_way_out(wrong: list[tuple[list[int], list[int]]]) -> str:
    """What to change: a classifier's tensors differ only in their first dimension, the number of classes."""
    classes = {have[0] for have, want in wrong if have and have[1:] == want[1:]}
    only_first = all(have[1:] == want[1:] and have for have, want in wrong)
    if only_first and len(classes) == 1:
        return f"these weights need --num-classes {classes.pop()}"
    return "these are weights of another --arch or --num-classes"


def state_dict_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and values, independent of the file format and the order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
