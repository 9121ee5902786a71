"""New weights for the layers of a pruned network, so that each makes of what comes what the whole network made there.

Y. He, X. Zhang, J. Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", sections 3.1 (ii) and 3.2,
and J.-H. Luo, J. Wu, W. Lin 2017, "ThiNet", section 3.2.3: least squares over sampled places, layer by layer from the
image on, each on what the layers before it make now and against the maps of the network that was not pruned.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.calls import read
from convoynet.exporter.archs.dry_run import evaluating
from convoynet.exporter.compression.channels import Channels
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Progress

# Places of maps that a layer is fitted to, and the bytes that those of all layers take at most.
_ROWS, _MOST_BYTES = 6144, 2**30
# Images run through the network at once: as many as take so many bytes.
_IMAGE_BYTES = 2**25
# What holds the weights to those that were there, as a share of the inputs' mean power.
_RIDGE = 0.1
# Each fourth image is not fitted to: a layer that makes nothing better of these keeps its weights.
_HELD_OUT = 4
_FEWEST = 2 * _HELD_OUT


def reconstruct(
    whole: nn.Module,
    pruned: nn.Module,
    channels: Channels,
    gone: Tensor,
    images: Iterable[Tensor],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Fit the layers that read what was pruned, and those behind them.

    Convolutions of one group that run once; others stay. Fully connected layers do as well: fitted to the logits they
    keep them by other channels, and the evidence moves. So does a layer that comes no nearer on images that it was not
    fitted to.

    Args:
        whole: the network before; stays as it is.
        pruned: changed in place; batch statistics are those of `whole` still.
        channels: of `whole`.
        gone: which labels are, bool [channels.size].
        images: batches, float32 [n, c, h, w].
        progress: shows it.

    Returns:
        A row for each layer: the squared error of its outputs as a share of their power, "before" and "after", on
        images that it was not fitted to.

    Raises:
        BadInput: there are too few images, no layer to fit, or the maps are not finite.
    """
    given = _some(images)
    kept = {name: ~gone[channels.slots[f"{name}.weight", 0]] for name in _layers(whole, channels, gone)}
    if not kept:
        raise BadInput(
            "step prune: reconstruct has nothing to fit: no convolution reads what was pruned that has one group and "
            "runs once; leave it out"
        )
    with progress.step(f"reconstruction of {len(kept)} layers"), torch.no_grad():
        fit = _Fit(given, kept)
        for network, hooks in ((whole, fit.see), (pruned, fit.solve)):
            handles = hooks(network)
            try:
                with evaluating(network):
                    network(given)
            finally:
                for handle in handles:
                    handle.remove()
    return fit.rows


def _some(images: Iterable[Tensor]) -> Tensor:
    """One batch of as many as can be run at once."""
    found: list[Tensor] = []
    count = 0
    for batch in images:
        found.append(batch)
        count += batch.nbytes
        if count >= _IMAGE_BYTES:
            break
    given = torch.cat(found)[: max(_FEWEST, _IMAGE_BYTES // found[0][0].nbytes)] if found else torch.empty(0)
    if len(given) < _FEWEST:
        raise BadInput(f"step prune: reconstruct needs {_FEWEST} images or more, and there are {len(given)}; add some")
    return given


def _layers(network: nn.Module, channels: Channels, gone: Tensor) -> list[str]:
    """Names of the layers that can be fitted, from the first on that reads what is gone."""
    used = Counter(layer.weight for layer in channels.layers)
    named = dict(network.named_modules())
    found: list[str] = []
    for layer in channels.layers:
        read = channels.slots.get((layer.weight, 1))
        if read is None or not (found or bool(gone[read].any())):
            continue
        if used[layer.weight] == 1 and layer.weight == f"{layer.name}.weight" and _is_plain(named[layer.name]):
            found.append(layer.name)
    return found


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.groups == 1


class _Fit:
    """What the layers of the whole network made at sampled places, and the weights that make it again.

    Args:
        images: what both networks run on.
        kept: layer -> which of its outputs stay.
    """

    def __init__(self, images: Tensor, kept: dict[str, Tensor]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._kept = kept
        self._images = len(images)
        self._held_out = torch.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
        most = _MOST_BYTES // (4 * max(1, sum(int(index.sum()) for index in kept.values())))
        self._count = -(-min(_ROWS, most) // len(images))
        self._places: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}

    def see(self, network: nn.Module) -> list[Any]:
        """Hooks that keep what each layer makes."""

        def hook(name: str) -> Callable[..., None]:
            def keep(layer: nn.Module, _: Any, made: Tensor) -> None:
                rows = made.flatten(2).transpose(1, 2)
                if len(rows) != self._images:
                    return  # images are no longer the first axis
                generator = torch.Generator().manual_seed(len(self._places))
                places = torch.randint(rows.shape[1], (len(rows), min(self._count, rows.shape[1])), generator=generator)
                self._places[name] = places
                self._wanted[name] = rows[torch.arange(len(rows))[:, None], places][..., self._kept[name]]

            return keep

        return [network.get_submodule(name).register_forward_hook(hook(name)) for name in self._kept]

    def solve(self, network: nn.Module) -> list[Any]:
        """Hooks that give each layer its weights just before it runs: those before it have theirs."""

        def hook(name: str) -> Callable[..., None]:
            def fit(layer: nn.Conv2d, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                if name in self._wanted:
                    wanted, places = self._wanted.pop(name), self._places.pop(name)
                    inputs = _inputs(layer, read(given, named), places)
                    self.rows.append({"layer": name, **self._solved(layer, inputs, wanted)})

            return fit

        return [
            network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in self._kept
        ]

    def _solved(self, layer: nn.Conv2d, inputs: Tensor, wanted: Tensor) -> dict[str, float]:
        """Fit one layer: ridge regression towards the weights that are there."""
        x, y = inputs.double(), wanted.double()
        here = layer.weight.flatten(1).double().T
        if layer.bias is not None:
            x = torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1)
            here = torch.cat((here, layer.bias.double()[None]))
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise BadInput("step prune: reconstruct met values that are not finite; leave it out")
        missing = y - x @ here
        held = self._held_out
        change = _ridge(x[~held].flatten(0, 1), missing[~held].flatten(0, 1))
        power = y[held].square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        before, after = (
            float(rest.square().sum() / power) for rest in (missing[held], missing[held] - x[held] @ change)
        )
        if not after < before:
            return {"before": before, "after": before}
        found = here + change
        if layer.bias is not None:
            layer.bias.copy_(found[-1])
            found = found[:-1]
        layer.weight.copy_(found.T.reshape(layer.weight.shape))
        return {"before": before, "after": after}


def _inputs(layer: nn.Conv2d, given: Tensor, places: Tensor) -> Tensor:
    """What a layer reads at some places of its outputs, [n, places, inputs]."""
    image = torch.arange(len(given))[:, None]
    (high, wide), (down, across), (far_down, far_across) = layer.kernel_size, layer.stride, layer.dilation
    padded = F.pad(given, _pads(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    columns = (padded.shape[3] - far_across * (wide - 1) - 1) // across + 1
    top, start = places // columns * down, places % columns * across
    parts = [
        padded[image, :, top + row * far_down, start + column * far_across]
        for row in range(high)
        for column in range(wide)
    ]
    return torch.stack(parts, -1).flatten(2)


def _pads(layer: nn.Conv2d) -> list[int]:
    """Cells on the left, on the right, above and below; what is odd of "same" is behind."""
    if layer.padding == "valid":
        return [0] * 4
    sides: list[tuple[int, int]] = []
    for axis in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides.append((total // 2, total - total // 2))
        else:
            sides.append((int(layer.padding[axis]),) * 2)
    return [*sides[0], *sides[1]]


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """The `w` that makes |y - x w|^2 + hold |w|^2 least, by the smaller of the two systems that say so."""
    rows, unknowns = x.shape
    hold = (_RIDGE * x.square().sum() / unknowns).clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(min(rows, unknowns), dtype=x.dtype)
    if rows < unknowns:
        found: Tensor = x.T @ torch.linalg.solve(x @ x.T + hold * eye, y)
    else:
        found = torch.linalg.solve(x.T @ x + hold * eye, x.T @ y)
    return found
