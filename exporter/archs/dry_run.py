"""Run a network for its shapes alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def dry_run(
    model: nn.Module,
    input_size: tuple[int, int, int],
    batch: int = 1,
    before: Callable[[], object] = lambda: None,
) -> object:
    """What the network returns for `batch` images, in evaluation mode and on the meta device where it can.

    On the meta device nothing is computed. A network that holds tensors outside its parameters and buffers, or makes
    some on a device of its own choice, cannot run there and runs on black images instead.

    Args:
        model: float32; stays as it is, also its training mode.
        input_size: (channels, height, width) of one image.
        batch: number of images.
        before: called before each attempt, for what the network's hooks record.

    Raises:
        Exception: whatever the network raises for such an image.
    """
    own = dict(_tensors(model))
    shapes = {id(tensor): tensor.detach().to("meta") for tensor in own.values()}
    own_shapes = {name: shapes[id(tensor)] for name, tensor in own.items()}
    with evaluating(model), torch.no_grad():
        try:
            before()
            with torch.device("meta"):
                return torch.func.functional_call(
                    model, own_shapes, (torch.empty(batch, *input_size),), tie_weights=False
                )
        except Exception:
            if any(tensor.is_meta for tensor in own.values()):
                raise
        before()
        device = next((tensor.device for tensor in own.values()), torch.device("cpu"))
        with torch.device(device):
            return model(torch.zeros(batch, *input_size))


def without_numbers(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes on the meta device, where that takes no memory and hardly any time.

    One whose constructor asks tensors for their values, as torchvision's RegNets do for their widths, is made whole.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return build()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by every name that a module has for it, and each module once.

    Of a layer that is there twice PyTorch puts the tensors away twice, and brings back those without numbers.
    """
    for path, module in model.named_modules():
        own = (
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, tensor in chain(*own):
            yield f"{path}.{name}".lstrip("."), tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a network in evaluation mode for a while, and give each of its modules its own mode back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
