"""What comes behind a layer, run again and again with other maps, without what comes before it.

The modules that returned before the layer did return the same again, and are not run; what a network computes between
its modules is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.opened import Layer, Opened, making

_ROW = 2
# Of a sum of probabilities.
_ROUNDING = 1e-3
# Of a probability, in another order of the images.
_SAME = 1e-5


class Tail:
    """The network behind a layer, for some images.

    Args:
        opened: the network.
        layer: of it.
        inputs: the images as the network takes them.

    Attributes:
        maps: [n, channels, height, width] that the layer makes of them.
        shares: [n, classes], the probability of each class.

    Raises:
        BadInput: the network is no classifier, or answers what is not finite, or otherwise in another order.
    """

    def __init__(self, opened: Opened, layer: Layer, inputs: Tensor) -> None:
        self._opened, self._layer, self._inputs = opened, layer, inputs
        self._kept: dict[nn.Module, Tensor] = {}
        made: list[Tensor] = []
        calls: dict[nn.Module, int] = {}
        rows = len(inputs)

        def keep(module: nn.Module, _: object, output: object) -> None:
            if made:
                return
            # A copy, for what comes behind may work in place.
            copied = output.detach().clone() if isinstance(output, Tensor) else None
            if module is layer.module:
                assert copied is not None
                made.append(copied)
                return
            calls[module] = calls.get(module, 0) + 1
            for inner in module.modules():  # what it holds is not asked any more
                self._kept.pop(inner, None)
            if copied is not None and copied.shape[:1] == (rows,):
                self._kept[module] = copied

        with torch.no_grad(), ExitStack() as hooks:
            for module in {*opened.modules.values()} - {opened.network}:
                hooks.callback(module.register_forward_hook(keep).remove)
            output = opened.run(inputs)
        # Of several calls it is not said which is which.
        self._kept = {module: kept for module, kept in self._kept.items() if calls[module] == 1}
        self.maps = made[0]
        self.shares = _shares(opened, output)
        if not bool(self.shares.isfinite().all()):
            raise BadInput(
                f"{opened.name} answers with numbers that are not finite: what a unit of {layer.name} decides cannot "
                "be told"
            )
        if not self._answers_the_same():
            # In another order the images show what was kept wrongly: what is changed in place by what comes behind, or
            # has no row for each image. Then all is run.
            self._kept = {}
            if not self._answers_the_same():
                raise BadInput(
                    f"{opened.name} does not answer the same of the same images in another order: what a unit of "
                    f"{layer.name} decides cannot be told"
                )

    def _answers_the_same(self) -> bool:
        order = torch.arange(len(self._inputs)).flip(0)
        return torch.allclose(self.shares_with(self.maps[order], order), self.shares[order], rtol=0, atol=_SAME)

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(kept.nbytes for kept in self._kept.values()) + self.maps.nbytes

    def shares_with(self, maps: Tensor, rows: Tensor) -> Tensor:
        """[rows, classes], where the layer makes other maps of some of the images.

        Args:
            maps: [rows, channels, height, width].
            rows: which images they are of.
        """
        with torch.no_grad(), ExitStack() as replaced:
            for module, kept in self._kept.items():
                replaced.enter_context(_returns(module, lambda *_, kept=kept, **__: kept[rows]))
            replaced.enter_context(making(self._layer.module, lambda _: maps))
            return _shares(self._opened, self._opened.run(self._inputs[rows]))


@contextmanager
def _returns(module: nn.Module, value: Callable[..., Tensor]) -> Iterator[None]:
    """Let the first call of a module return a value in the place of its own."""
    before: Callable[..., Any] = module.forward
    own = "forward" in vars(module)

    def forward(*args: object, **named: object) -> Tensor:
        restore()
        return value(*args, **named)

    def restore() -> None:
        if own:
            module.forward = before
        else:
            vars(module).pop("forward", None)

    module.forward = forward
    try:
        yield
    finally:
        restore()


def answers_of(opened: Opened, output: object) -> Tensor:
    """Of what a network returns, [n, classes].

    Raises:
        BadInput: the network is no classifier.
    """
    scores = output
    if isinstance(output, dict):
        scores = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        scores = output[0] if output else None
    if not isinstance(scores, Tensor) or scores.ndim != _ROW or scores.shape[1] < 2:
        raise BadInput(f"{opened.name} is no classifier: its answers are no row of classes for each image")
    return scores


def are_probabilities(scores: Tensor) -> bool:
    """Whether rows of classes are those, and no logits."""
    return bool((scores >= 0).all()) and bool(((scores.sum(dim=1) - 1).abs() < _ROUNDING).all())


def _shares(opened: Opened, output: object) -> Tensor:
    """What a network returns as probabilities, of which it may be the logits."""
    scores = answers_of(opened, output)
    return scores if are_probabilities(scores) else scores.softmax(dim=1)
