"""LeNet-5: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.

`lenet5` follows section II.B layer by layer, with its trainable sub-sampling, the connection table of C3, the
scaled tanh and the radial basis function outputs. `lenet5-softmax` has the same trunk and a linear classifier
for any number of classes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from convoynet.exporter import assets
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput

PAPER = "LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86(11)"
DIGIT_LABELS = tuple("0123456789")
DIGITS_ALONE = "its output codes are pictures of the ten digits, so use 10, or --arch lenet5-softmax for another number"
# Section II.B: the background (0) becomes -0.1 and the foreground (255) 1.175, so that the mean is about 0
# and the variance about 1.
PREPROCESS = Preprocess(size=(32, 32), resize=32, mean=(0.1 / 1.275,), std=(1 / 1.275,))

# Table I: the maps of S2 that each map of C3 sees.
C3_CONNECTIONS = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip

# The code of each class is a picture of it, 7 wide and 12 high (the idea of Fig. 3; the pictures are ours), so
# that similar characters have similar codes.
DIGIT_BITMAPS = """
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
..###.. ...##.. .#####. ####### ##..... ####### ...#### ####### .#####. .#####.
.##.##. .####.. ##...## .....## ##..##. ##..... ..##... #....## ##...## ##...##
##...## ...##.. .....## ....##. ##..##. ##..... .##.... .....## ##...## ##...##
##...## ...##.. .....## ...##.. ##..##. ##..... ##..... ....##. ##...## ##...##
##...## ...##.. ....##. ..####. ##..##. ######. ######. ....##. .#####. ##...##
##...## ...##.. ...##.. .....## ####### .....## ##...## ..##### ##...## .######
##...## ...##.. ..##... .....## ....##. .....## ##...## ...##.. ##...## .....##
##...## ...##.. .##.... .....## ....##. .....## ##...## ...##.. ##...## ....##.
.##.##. ...##.. ##..... ##...## ....##. .....## ##...## ..##... ##...## ...##..
..###.. .###### ####### .#####. ....##. ######. .#####. ..##... .#####. ####...
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""


def digit_codes() -> Tensor:
    """The +-1 codes of the ten digits, float32 [10, 84]."""
    rows = [line.split() for line in DIGIT_BITMAPS.split("\n") if line]
    pictures = ["".join(parts) for parts in zip(*rows, strict=True)]
    return torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in picture] for picture in pictures])


def squash(x: Tensor) -> Tensor:
    """The squashing function A tanh(S x) of section II.B and appendix A: f(1) = 1 and f(-1) = -1."""
    return 1.7159 * torch.tanh(x * (2.0 / 3.0))


class Subsampling(nn.Module):
    """S2 and S4: the sum of 2x2 inputs times a coefficient plus a bias, both trainable, one of each a map.

    Args:
        channels: Number of maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.empty(channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels, 1, 1))
        _init_uniform(self.coefficient, 4)
        _init_uniform(self.bias, 4)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x C x H/2 x W/2, before the squashing."""
        return F.avg_pool2d(x, 2) * (4 * self.coefficient) + self.bias

    def multiply_adds(self, output: Tensor) -> int:
        """One multiplication by the coefficient for each output."""
        return output.numel()

    def connections(self, output: Tensor) -> int:
        """Of each output four inputs and a bias: 5,880 of S2 and 2,000 of S4, as in section II.B."""
        return 5 * output.numel()


class SparseConv(nn.Module):
    """C3: a 5x5 convolution in which a map sees only some of the input maps (Table I).

    Only the 60 kernels that exist are parameters. A constant matrix places them among the 16 x 6 pairs of
    maps, which a constant folder resolves into one dense kernel.
    """

    placement: Tensor

    def __init__(self) -> None:
        super().__init__()
        pairs = [(out, source) for out, sources in enumerate(C3_CONNECTIONS) for source in sources]
        placement = torch.zeros(16 * 6, len(pairs))
        for column, (out, source) in enumerate(pairs):
            placement[out * 6 + source, column] = 1
        self.register_buffer("placement", placement, persistent=False)
        self.kernels = nn.Parameter(torch.empty(len(pairs), 25))
        self.bias = nn.Parameter(torch.empty(16))
        with torch.no_grad():
            for row, (out, _) in enumerate(pairs):
                _init_uniform(self.kernels[row], 25 * len(C3_CONNECTIONS[out]))
            for out, sources in enumerate(C3_CONNECTIONS):
                _init_uniform(self.bias[out], 25 * len(sources))

    def forward(self, x: Tensor) -> Tensor:
        """N x 6 x 14 x 14 -> N x 16 x 10 x 10, before the squashing."""
        kernel = (self.placement @ self.kernels).reshape(16, 6, 5, 5)
        return F.conv2d(x, kernel, self.bias)

    def multiply_adds(self, output: Tensor) -> int:
        """25 for each kernel that exists, at each position: the zeros of the dense kernel do not count."""
        batch, _, height, width = output.shape
        return batch * height * width * self.kernels.numel()


class RadialBasis(nn.Module):
    """The output units: squared distance to the fixed code of each class (eq. 7), negated.

    With the sign turned, the largest output is the answer, as for any classifier's logits, and their
    softmax is the posterior that the criterion of eq. 9 assumes (without its rubbish class).
    """

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", digit_codes())

    def forward(self, x: Tensor) -> Tensor:
        """N x 84 -> N x 10, all at most 0."""
        return -(x.unsqueeze(1) - self.codes).square().sum(2)

    def multiply_adds(self, output: Tensor) -> int:
        """One square with its addition for each code element."""
        return output.numel() * self.codes.shape[1]

    def connections(self, output: Tensor) -> int:
        """The same: each unit is connected to the 84 of F6, and has no bias."""
        return self.multiply_adds(output)


class LeNet5(nn.Module):
    """The network of Fig. 2, up to F6, with the given output layer.

    Args:
        output: 84 features -> class scores.
    """

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 5)
        self.s2 = Subsampling(6)
        self.c3 = SparseConv()
        self.s4 = Subsampling(16)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.f6 = nn.Linear(120, 84)
        self.output = output
        for layer, fan_in in ((self.c1, 25), (self.c5, 400), (self.f6, 120)):
            _init_uniform(layer.weight, fan_in)
            assert layer.bias is not None
            _init_uniform(layer.bias, fan_in)

    def forward(self, x: Tensor) -> Tensor:
        """N x 1 x 32 x 32 -> N x classes, the largest being the answer."""
        x = squash(self.c1(x))  # N x 6 x 28 x 28
        x = squash(self.s2(x))  # N x 6 x 14 x 14
        x = squash(self.c3(x))  # N x 16 x 10 x 10
        x = squash(self.s4(x))  # N x 16 x 5 x 5
        x = squash(self.c5(x))  # N x 120 x 1 x 1
        x = squash(self.f6(torch.flatten(x, 1)))  # N x 84
        scores: Tensor = self.output(x)
        return scores


def _init_uniform(tensor: Tensor, fan_in: int) -> None:
    """Uniform in +-2.4 / fan-in, so that units start in the linear part of the squashing (appendix A)."""
    with torch.no_grad():
        tensor.uniform_(-2.4 / fan_in, 2.4 / fan_in)


def _build_rbf(num_classes: int) -> nn.Module:
    if num_classes != len(DIGIT_LABELS):
        raise BadInput(f"lenet5 with {num_classes} classes: {DIGITS_ALONE}")
    return LeNet5(RadialBasis())


def _build_softmax(num_classes: int) -> nn.Module:
    return LeNet5(nn.Linear(84, num_classes))


@register("lenet5")
def lenet5() -> Arch:
    """The network of section II.B, trained on the packaged digits."""
    return Arch(
        name="lenet5",
        paper=PAPER,
        source="own",
        num_classes=10,
        preprocess=PREPROCESS,
        build=_build_rbf,
        labels=partial(list, DIGIT_LABELS),
        published=partial(load_file, assets.LENET5_WEIGHTS),
        published_name=f"packaged {assets.LENET5_WEIGHTS.name} (trained on the UCI handwritten digits)",
        fixed_classes=DIGITS_ALONE,
    )


@register("lenet5-softmax")
def lenet5_softmax() -> Arch:
    """The same trunk with a linear classifier instead of the radial basis functions."""
    return Arch(
        name="lenet5-softmax",
        paper=PAPER,
        source="own",
        num_classes=10,
        preprocess=PREPROCESS,
        build=_build_softmax,
        labels=partial(list, DIGIT_LABELS),
    )
