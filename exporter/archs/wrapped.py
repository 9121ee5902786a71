"""What training code has at hand, made the network that is meant: wrappers taken off, float32, lazy layers settled."""

import copy
from contextlib import suppress

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from convoynet.exporter.archs.dry_run import evaluating
from convoynet.exporter.errors import BadInput, reason

# Wrappers, by the attribute that holds what they wrap.
_WRAPPED = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "AveragedModel": "module",
}


def bare(spec: str, made: nn.Module) -> tuple[nn.Module, list[str]]:
    """The network itself in float32, and what was changed for that, each to be read on after "as ... builds it".

    Raises:
        BadInput: it is, or holds, a TorchScript module, which has no layers to export, or its tensors have no values.
    """
    changed = []
    while (inner := getattr(made, _WRAPPED.get(type(made).__name__, ""), None)) is not None:
        changed.append(f", without {type(made).__name__}")
        made = inner
    if isinstance(made, torch.jit.ScriptModule):
        raise BadInput(
            f"{spec} returns a TorchScript module, which cannot be exported: return the nn.Module that it was made of"
        )
    scripted = [name for name, module in made.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise BadInput(
            f"{spec}: its part {scripted[0]} is TorchScript, which cannot be exported: put in the nn.Module that it "
            "was made of, without torch.jit"
        )
    numbers = [*made.parameters(), *made.buffers()]
    if any(tensor.is_meta for tensor in numbers):
        raise BadInput(f"{spec} makes tensors on the meta device, which have no values; make them on the CPU")
    others = {tensor.dtype for tensor in numbers if tensor.is_floating_point()} - {torch.float32}
    if others:
        kinds = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in others))
        changed.append(f", its {kinds} numbers as float32")
        made = made.float()
    return made, changed


def settle_lazy(spec: str, network: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Let lazy layers take their sizes from a black image.

    Raises:
        BadInput: the network does not take such an image.
    """
    if not any(map(is_lazy, [*network.parameters(), *network.buffers()])):
        return
    shape = "x".join(map(str, input_size))
    try:
        with evaluating(network), torch.no_grad():
            network(torch.zeros(2, *input_size))
    except Exception as error:
        raise BadInput(
            f"{spec} has lazy layers, which take their sizes from the first image, and fails with one of {shape}: "
            f"{reason(error)}; give the size that it is for with --input-size, or run it once in the factory"
        ) from error


def state_weights(network: nn.Module) -> None:
    """Let weights that are computed from others (torch.nn.utils.parametrize) be the numbers that they are, in place."""
    with torch.no_grad():
        for module in network.modules():
            for name in list(getattr(module, "parametrizations", ())) if parametrize.is_parametrized(module) else ():
                with suppress(RuntimeError, ValueError):  # what has no such form is computed in the graph
                    parametrize.remove_parametrizations(module, name)


def copy_of(network: nn.Module) -> nn.Module:
    """A network of the same numbers, to be changed.

    Raises:
        BadInput: it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever the objects that it holds raise
        raise BadInput(
            f"the network cannot be copied to be changed ({reason(error)}): locks, generators and open files belong "
            "outside of it, and tensors that are computed from its weights into forward"
        ) from error
