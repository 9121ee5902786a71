"""Put weights into a network: published ones, random ones, or a file's, and say which they were."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convoynet.exporter.archs import Arch
from convoynet.exporter.errors import BadInput

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # nn.DataParallel's and torch.compile's
_NAMED = 3  # tensors that a message names
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
    """

    source: str
    sha256: str


def load(model: nn.Module, arch: Arch, spec: str, *, seed: int, images: NDArray[np.uint8]) -> Weights:
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

    Raises:
        BadInput: The weights cannot be had, read, or put into this network; the message says why.
    """
    if spec == "random":
        # As deployed: the network before may not take images of this size. The layers are the same objects.
        _settle(arch.deploy(model), arch, images)
        made = f"{arch.published_name}, batch statistics estimated" if arch.source == "user" else ""
        source = made or f"random, seed {seed}"
    elif spec == "default":
        _fill(model, _deployed(_published(arch), arch), arch.published_name)
        source = arch.published_name
    else:
        _fill(model, _deployed(state_dict_from_file(Path(spec)), arch), spec)
        source = f"file {spec}"
    model.eval()
    return Weights(source, state_dict_sha256(model.state_dict()))


def _published(arch: Arch) -> dict[str, Tensor]:
    way_out = "give your own with --weights FILE, or --weights random for a test"
    if arch.published is None:
        raise BadInput(f"{arch.name} has no published weights: {way_out}")
    try:
        return arch.published()
    # A wrong hash is a RuntimeError; a damaged file in the download cache can be any of the others.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = _one_line(error)
        raise BadInput(f"cannot get {arch.published_name} ({reason}): {way_out}") from error


def _deployed(tensors: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Leave out what belongs to heads that only training uses."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(arch.training_only)}


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
    """Read a state dict, without wrappers and prefixes, and never run code from the file.

    Raises:
        BadInput: The file is missing, damaged, holds pickled code, or holds no state dict.
    """
    if not path.is_file():
        raise BadInput(f"weights {path}: no such file; give a file, or `default` or `random`")
    content: object = _read(path)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise BadInput(f"{path}: holds no state dict; save one with torch.save(model.state_dict(), FILE)")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BadInput(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor, so this is no state dict;"
                " save one with torch.save(model.state_dict(), FILE)"
            )
        tensors[_plain_name(name)] = tensor
    return tensors


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise BadInput(f"{path}: is no safetensors file or is damaged ({_one_line(error)})") from error
    except pickle.UnpicklingError as error:
        blocked = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) (\S+)", str(error))
        if blocked is None:
            raise BadInput(f"{path}: is no PyTorch checkpoint or is damaged; save it again") from error
        raise BadInput(
            f"{path}: holds pickled code ({blocked[1]}), which is never run;"
            " save the tensors alone with torch.save(model.state_dict(), FILE)"
        ) from error
    # A damaged archive or pickle stream can fail in almost any way inside torch.load.
    except Exception as error:
        reason = _one_line(error)
        raise BadInput(f"{path}: is no PyTorch checkpoint or is damaged ({reason}); save it again") from error


def _plain_name(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the model after checking every name, shape and value."""
    own = model.state_dict()
    # Checkpoints older than PyTorch 0.4.1 have no such counters, and inference needs none.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has the unknown {_some(unexpected)}"] if unexpected else []
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
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadInput(f"{source}: {name} holds NaN or infinite values; train or save it again")
    # Not load_state_dict: MNASNet's refuses tensors without the format's version, which only torch.save keeps.
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _shape_way_out(wrong: list[tuple[list[int], list[int]]]) -> str:
    """What to change: a classifier's tensors differ only in their first dimension, the number of classes."""
    classes = {have[0] for have, want in wrong if have and have[1:] == want[1:]}
    only_first = all(have[1:] == want[1:] and have for have, want in wrong)
    if only_first and len(classes) == 1:
        return f"these weights need --num-classes {classes.pop()}"
    return "these are weights of another --arch or --num-classes"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def state_dict_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and values, independent of the file format and the order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
