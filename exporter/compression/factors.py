"""The factors of one layer, by a singular value decomposition or a truncated higher-order one."""

from collections.abc import Callable
from math import ceil, floor, prod, sqrt

import torch
from torch import Tensor, nn

from convoynet.exporter.recipe import LowRank

# Share of the covariance that comes from the weight alone, as of inputs that are white: few images span few
# directions, and the others are not worthless.
_WHITE = 0.01
_TINY = 1e-30
_ALIGNMENT = 8
# Of a smaller one a step of the alignment would be too large a share.
_LARGE_RANK = 64
# A first layer's colours are too few to leave some out (Y. Kim et al. 2016, section 3.1).
_FEW_INPUTS = 4


class Moments:
    """Sums over the outputs of a layer.

    Args:
        size: output channels.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in outputs, float32 [n, size]."""
        self.count += len(rows)
        self._sum += rows.double().sum(0)
        self._products += (rows.T @ rows).double()

    @property
    def mean(self) -> Tensor:
        """float64 [size]."""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 [size, size]."""
        return self._products / self.count - torch.outer(self.mean, self.mean)


def factors(
    layer: nn.Conv2d | nn.Linear, step: LowRank, moments: Moments | None
) -> tuple[nn.Sequential, tuple[int, ...], float]:
    """Factorize a layer.

    Args:
        layer: fully connected, or a convolution of one group.
        step: by what ratio of parameters or share of energy to choose the rank.
        moments: of its outputs, where the directions in which these vary count and not those of the weight.

    Returns:
        The layers that replace it; the rank, or for a k x k convolution those of inputs and outputs; the error of the
        product of the factors as a share of the weight's norm.
    """
    if isinstance(layer, nn.Conv2d) and prod(layer.kernel_size) > 1 and layer.in_channels > _FEW_INPUTS:
        return _tucker(layer, step, moments)
    return _two(layer, step, moments)


def _two(
    layer: nn.Conv2d | nn.Linear, step: LowRank, moments: Moments | None
) -> tuple[nn.Sequential, tuple[int, ...], float]:
    """W [out, in * k * k] is about Q (Q^T W), for the leading directions Q [out, r] of the outputs."""
    weight = layer.weight.detach().double().flatten(1)
    outputs, inputs = weight.shape
    directions, energies = _directions(_gram(weight, moments))
    if step.ratio is not None:
        rank = _aligned((1 - step.ratio) * outputs * inputs / (outputs + inputs), floor)
    else:
        rank = _aligned(_rank(energies, step), ceil)
    rank = min(rank, outputs, inputs)
    basis = directions[:, :rank]
    inner = basis.T @ weight
    error = float((weight - basis @ inner).norm() / weight.norm().clamp(min=_TINY))
    # Columns of equal norm on both sides: quantization and training like neither huge nor tiny weights.
    scale = inner.norm(dim=1).clamp(min=_TINY).sqrt()
    bias = _bias(layer, basis, moments)
    if isinstance(layer, nn.Linear):
        thin: nn.Module = nn.Linear(inputs, rank, bias=False)
        back: nn.Module = nn.Linear(rank, outputs, bias=bias is not None)
    else:
        thin = _convolution_like(layer, layer.in_channels, rank)
        back = nn.Conv2d(rank, outputs, 1, bias=bias is not None)
    _fill(thin, inner / scale[:, None], None)
    _fill(back, basis * scale, bias)
    return nn.Sequential(thin, back).train(layer.training), (rank,), error


def _tucker(layer: nn.Conv2d, step: LowRank, moments: Moments | None) -> tuple[nn.Sequential, tuple[int, ...], float]:
    """W [out, in, k, k] is about C x_1 Q x_2 P for the leading directions Q [out, r], P [in, s] and the core C."""
    weight = layer.weight.detach().double()
    outputs, inputs = weight.shape[:2]
    left, left_energies = _directions(_gram(weight.flatten(1), moments))
    right, right_energies = _directions(_gram(weight.transpose(0, 1).flatten(1), None))
    if step.ratio is not None:
        share = _equal_share(outputs, inputs, prod(layer.kernel_size), step.ratio)
        rank_out, rank_in = _aligned(share * outputs, floor), _aligned(share * inputs, floor)
    else:
        rank_out, rank_in = (_aligned(_rank(energies, step), ceil) for energies in (left_energies, right_energies))
    rank_out, rank_in = min(rank_out, outputs), min(rank_in, inputs)
    basis, reader = left[:, :rank_out], right[:, :rank_in]
    core = torch.einsum("oikl,or,is->rskl", weight, basis, reader)
    again = torch.einsum("rskl,or,is->oikl", core, basis, reader)
    error = float((weight - again).norm() / weight.norm().clamp(min=_TINY))
    bias = _bias(layer, basis, moments)
    first = nn.Conv2d(inputs, rank_in, 1, bias=False)
    middle = _convolution_like(layer, rank_in, rank_out)
    last = nn.Conv2d(rank_out, outputs, 1, bias=bias is not None)
    _fill(first, reader.T, None)
    _fill(middle, core, None)
    _fill(last, basis, bias)
    return nn.Sequential(first, middle, last).train(layer.training), (rank_in, rank_out), error


def _convolution_like(layer: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution over the same pixels as `layer`, without a bias."""
    return nn.Conv2d(
        inputs,
        outputs,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=layer.padding_mode,
    )


def _gram(matrix: Tensor, moments: Moments | None) -> Tensor:
    """What the directions are taken of: the outputs' covariance, of white inputs where there are no others."""
    white = matrix @ matrix.T
    if moments is None:
        return white
    seen = moments.covariance
    return (1 - _WHITE) * seen / seen.trace().clamp(min=_TINY) + _WHITE * white / white.trace().clamp(min=_TINY)


def _directions(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors as columns, the leading one first, and their energies, the squared singular values."""
    energies, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), energies.flip(0).clamp(min=0)


def _rank(energies: Tensor, step: LowRank) -> int:
    """The smallest rank that keeps the share of energy."""
    assert step.energy is not None
    kept = energies.cumsum(0) / energies.sum().clamp(min=_TINY)
    return int((kept < step.energy).sum()) + 1


def _aligned(rank: float, rounded: Callable[[float], int]) -> int:
    """A whole rank; large ones are multiples of what a register holds, as channels are."""
    if rank < _LARGE_RANK:
        return max(1, rounded(rank))
    return rounded(rank / _ALIGNMENT) * _ALIGNMENT


def _equal_share(outputs: int, inputs: int, kernel: int, ratio: float) -> float:
    """The share of channels that both ranks keep, so that (1 - ratio) of the parameters is left: a quadratic's root."""
    square, linear = outputs * inputs * kernel, outputs**2 + inputs**2
    return (-linear + sqrt(linear**2 + 4 * square * (1 - ratio) * square)) / (2 * square)


def _bias(layer: nn.Conv2d | nn.Linear, basis: Tensor, moments: Moments | None) -> Tensor | None:
    """The bias: what the outputs' mean has outside of the directions that are kept is added to it."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    if moments is None:
        return bias
    own = torch.zeros(len(basis), dtype=torch.float64) if bias is None else bias
    driven = moments.mean - own
    return own + driven - basis @ (basis.T @ driven)


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
