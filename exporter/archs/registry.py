"""The registry of architectures: one table from a name to what the exporter must know about it.

Imports no PyTorch. A network's module registers it, and is imported when the network is asked for: what is recorded
(`facts`) says which module that is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from convoynet.exporter.archs import facts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convoynet.exporter.archs.auxiliary import Auxiliaries
    from convoynet.exporter.data.images import Preprocess

# What the outputs mean: logits [N, classes], logits [N, classes, H, W], or padded boxes.
Task = Literal["classification", "segmentation", "detection"]


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Arch:
    """One architecture of the zoo.

    Attributes:
        name: Lower case, as torchvision or timm name it.
        paper: Authors, year, title and where to find it.
        source: "own", "torchvision", "timm" or "user": who defines the layers.
        num_classes: Of the published weights.
        preprocess: Of the published weights.
        preprocess_source: Who says so.
        build: num_classes -> float32 module, randomly initialised under the current torch seed: the network
            as it is deployed, with one output and without heads that only training uses. Raises BadInput for
            a number of classes that the network cannot have.
        labels: Names of the default classes, in the order of the outputs.
        fixed_classes: Why `build` takes no other number of classes than this, and the way out; empty where it does.
        published: State dict of the library's or authors' weights, downloaded or packaged; None where there
            are none. Raises OSError offline.
        published_name: Says which weights those are; empty where there are none.
        training_only: Beginnings of the names of tensors that weights may hold for auxiliary heads, such as
            "aux1.". They are left out when weights are loaded; every other name must match.
        task: What the outputs mean.
        settle: Called with a randomly initialised network, whose batch statistics are set, and float32 NCHW
            inputs, where it takes more than statistics to give outputs that can be compared.
        deploy: From the network that `build` made, its weights in it, to the one that is exported; the tensors may
            be shared.
        outputs: Names of the outputs behind those of the task.
        auxiliaries: Heads that fine-tuning puts around what `build` made, and drops again; None where there are none.
    """

    name: str
    paper: str
    source: str
    num_classes: int
    preprocess: Preprocess
    build: Callable[[int], nn.Module]
    labels: Callable[[], list[str]]
    published: Callable[[], dict[str, Tensor]] | None = None
    published_name: str = ""
    fixed_classes: str = ""
    training_only: tuple[str, ...] = ()
    task: Task = "classification"
    preprocess_source: str = "the network's own"
    settle: Callable[[nn.Module, Tensor], None] | None = None
    deploy: Callable[[nn.Module], nn.Module] = _as_it_is
    outputs: tuple[str, ...] = ()
    auxiliaries: Auxiliaries | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input."""
        return (self.preprocess.channels, *self.preprocess.size)

    @property
    def preprocessing(self) -> str:
        """The whole preprocessing and who says so, in one line."""
        return f"{self.preprocess.line}; {self.preprocess_source}"

    @property
    def published_weights(self) -> bool:
        """Whether there are any."""
        return self.published is not None


_ARCHS: dict[str, Callable[[], Arch]] = {}
_MODULES: dict[str, str] = {}


def register(name: str) -> Callable[[Callable[[], Arch]], Callable[[], Arch]]:
    """Register a function that describes the architecture `name`; it is called on first use.

    Raises:
        ValueError: The name is taken.
    """
    # As NamedTuple and Enum find theirs: what is registered is often a function of another module.
    module = sys._getframe(1).f_globals["__name__"]

    def decorate(describe: Callable[[], Arch]) -> Callable[[], Arch]:
        if name in _ARCHS:
            raise ValueError(f"architecture {name!r} is registered twice")
        _ARCHS[name] = cache(describe)
        _MODULES[name] = module
        return describe

    return decorate


def get(name: str) -> Arch:
    """The architecture called `name`; its module is imported.

    Raises:
        BadInput: There is none; the message names the close matches.
    """
    if name not in _ARCHS:
        known = facts.recorded().get(name)
        if known is None:
            raise facts.unknown(name, names())
        importlib.import_module(f"{__package__}.{known.module}")
    return _ARCHS[name]()


def names() -> list[str]:
    """Every name that is recorded or registered, sorted."""
    return sorted({*facts.recorded(), *_ARCHS})


def registered() -> dict[str, str]:
    """The name of each network that is registered so far, and the module that did it."""
    return dict(_MODULES)
