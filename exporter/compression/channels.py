"""The channels of a network: which of them can only be removed together, and which layers make and read them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

# A dimension of a parameter or buffer, by the tensor's name.
Slot = tuple[str, int]


@dataclass(frozen=True)
class Layer:
    """A convolution or fully connected layer.

    Attributes:
        name: of the module.
        weight: name of its weight, [out, in / groups, *kernel].
        cost: multiply-adds of one image for each pair of an output channel and an input channel of its group.
        inputs: its input channels, of one group.
    """

    name: str
    weight: str
    cost: int
    inputs: int


@dataclass(frozen=True)
class Padding:
    """Channels of zeros that a `PaddedShortcut` adds: their labels, int64 [before] and [after]."""

    name: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Channels:
    """The channels of a network.

    Attributes:
        slots: the label of each index along a dimension of a tensor, int64; equal labels are removed together, and
            FIXED stays. A slot (weight, 1) reads those channels, (tensor, 0) makes or scales them.
        layers: in the order in which they run.
        norms: names of the scales of batch normalisations.
        paddings: channels of zeros.
        mixes: whether some layer combines neighbouring channels, as local response normalisation does.
        size: number of labels.
    """

    slots: Mapping[Slot, Tensor]
    layers: Sequence[Layer]
    norms: Sequence[str]
    paddings: Sequence[Padding]
    mixes: bool
    size: int

    def readers(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that read channels, and the labels along their dimension 1."""
        for layer in self.layers:
            if (layer.weight, 1) in self.slots:
                yield layer.weight, self.slots[layer.weight, 1]
