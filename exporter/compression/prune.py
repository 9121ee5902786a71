"""Structured pruning: whole channels are removed, with everything that depends on them, to a budget.

The method is DepGraph's (G. Fang, X. Ma, M. Song, M. Bi Mi, X. Wang 2023, "DepGraph: Towards Any Structural Pruning");
`convoynet.exporter.compression.trace_channels` finds what depends on what.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs.dry_run import dry_run, evaluating
from convoynet.exporter.archs.resnet import PaddedShortcut
from convoynet.exporter.compression.channel_plan import Kept, Planner, Rules
from convoynet.exporter.compression.channel_scores import Batch, channel_scores
from convoynet.exporter.compression.channels import Channels
from convoynet.exporter.compression.layers import change, image_size
from convoynet.exporter.compression.reconstruct import reconstruct
from convoynet.exporter.compression.trace_channels import trace_channels
from convoynet.exporter.errors import BadInput
from convoynet.exporter.errors import reason as reason_of
from convoynet.exporter.progress import Progress
from convoynet.exporter.recipe import Prune

# Measurements of the search for a latency: each halves the range of the multiply-adds.
_LATENCY_HALVINGS = 6
# Sums in another order; a channel that was misread is wrong by about the logits' own size.
_MAX_REL_ERROR = 1e-3


def prune(  # noqa: PLR0913  the parameters that every step of the module shares, and what a budget needs
    module: nn.Module,
    example: Tensor,
    step: Prune,
    *,
    target: str,
    batches: Iterable[Batch] | None,
    seed: int,
    latency: Callable[[nn.Module], float] | None,
    progress: Progress,
) -> tuple[nn.Module, dict[str, Any]]:
    """Remove channels until `step.ratio` of the multiply-adds, or of the latency, is gone.

    The classes and the channels of the image stay. Nothing is trained: raw pruned accuracy is of little use before
    batch statistics are estimated again and the network is fine-tuned. With `step.reconstruct` the weights that are
    left are fitted to what the network made before.

    Args:
        module: float32 on the CPU, from images [n, c, h, w] to logits; stays as it is.
        example: float32 images [n, c, h, w]; its size counts alone.
        step: what to do.
        target: "cpu" or "gpu": what numbers of channels are good ones, where `step.round_to` says nothing.
        batches: images, or pairs of images and labels, for the method "taylor" and for `step.reconstruct`.
        seed: of what the methods draw.
        latency: seconds of one image through a module, where `step.of` is "latency".
        progress: shows the work.

    Returns:
        A smaller copy in evaluation mode, and what was done: multiply-adds and parameters before and after, the
        channels of each layer before and after, and its error where it was reconstructed.

    Raises:
        BadInput: the network cannot be pruned, or not so far.
    """
    size = image_size(example)
    looks = None if batches is None else list(batches)
    if step.reconstruct and not looks:
        raise BadInput("step prune: reconstruct needs images: add --calibration DIR, or leave it out")
    with progress.step("channels"):
        channels = trace_channels(module, size)
        before = archs.count(module, size)
        planner = _planner(module, channels, step, (target, looks, seed, before.macs), progress)
    pruner = Pruner(module, channels, planner, size)
    kept, reached, measured = _chosen(pruner, step, latency, progress)
    with progress.step("pruning"):
        pruned = pruner.pruned(kept)
        pruner.require_equal(pruned, kept)
    after = archs.count(pruned, size)
    done = step.to_dict() | {
        "round_to": step.round_to or f"what a {target} likes",
        "reached": reached,
        **change(before, after),
        "channels": pruner.table(kept),
    }
    if step.reconstruct:
        gone = planner.removed(kept, channels.size)
        images = [look[0] if isinstance(look, tuple) else look for look in looks or []]
        done["reconstructed"] = reconstruct(module, pruned, channels, gone, images, progress)
    return pruned, done | ({"measured": measured} if measured else {})


def _chosen(
    pruner: "Pruner", step: Prune, latency: Callable[[nn.Module], float] | None, progress: Progress
) -> tuple[Kept, float, list[dict[str, float]]]:
    """What stays, the share that is gone by it, and what was measured on the way."""
    planner = pruner.planner
    if step.of == "latency":
        if latency is None:
            raise BadInput('step prune: of "latency" needs a clock, and there is none here; use of = "macs"')
        measured: list[dict[str, float]] = []
        kept = _to_latency(pruner, step.ratio, latency, measured, progress)
        return kept, 1 - measured[-1]["seconds"] / measured[0]["seconds"], measured
    most = planner.macs(planner.all)
    kept = planner.within((1 - step.ratio) * most)
    return kept, 1 - planner.macs(kept) / most, []


def _planner(
    module: nn.Module,
    channels: Channels,
    step: Prune,
    given: tuple[str, Iterable[Batch] | None, int, int],
    progress: Progress,
) -> Planner:
    target, batches, seed, macs = given
    scores = channel_scores(module, channels, step.method, batches, seed, progress)
    planner = Planner(channels, scores, Rules(step.scope, step.round_to, target), macs)
    if bool((planner.all == planner.least).all()):
        reason = "none of its channels can be removed alone"
        if len(planner.groups) and step.round_to is not None:
            reason = f"none of its layers has more than round_to = {step.round_to} channels"
        raise BadInput(f"step prune: this network cannot be pruned: {reason}")
    return planner


def _to_latency(
    pruner: "Pruner",
    ratio: float,
    latency: Callable[[nn.Module], float],
    measured: list[dict[str, float]],
    progress: Progress,
) -> Kept:
    """The plan with the most multiply-adds that is measured to be fast enough; it is the last of `measured`."""
    planner = pruner.planner

    def seconds(kept: Kept) -> float:
        found = {"macs": planner.macs(kept), "seconds": latency(pruner.pruned(kept))}
        measured.append(found)
        return found["seconds"]

    best = planner.least
    with progress.step("latency of the network, and pruned as far as it goes"):
        whole = seconds(planner.all)
        fastest = seconds(best)
    if fastest > (1 - ratio) * whole:
        raise BadInput(
            f"step prune: ratio {ratio:g} of the latency cannot be reached: without all channels that can go it is "
            f"{max(0.0, 1 - fastest / whole):.3f} less ({1e3 * fastest:.3g} ms of {1e3 * whole:.3g} ms)"
        )
    chosen = measured[-1]
    low, high = planner.macs(best), planner.macs(planner.all)
    for _ in progress.track(range(_LATENCY_HALVINGS), "pruning to a latency"):
        middle = (low + high) // 2
        kept = planner.within(middle)
        if seconds(kept) <= (1 - ratio) * whole:
            best, low, chosen = kept, middle, measured[-1]
        else:
            high = middle
    measured.append(chosen)
    return best


class Pruner:
    """Makes the pruned network of a plan.

    Args:
        module: the network; stays as it is.
        channels: of it.
        planner: knows the plans.
        input_size: (channels, height, width) of the image.
    """

    def __init__(
        self, module: nn.Module, channels: Channels, planner: Planner, input_size: tuple[int, int, int]
    ) -> None:
        self.planner = planner
        self._module = module
        self._channels = channels
        self._input_size = input_size

    def pruned(self, kept: Kept) -> nn.Module:
        """A copy with the channels that `kept` says, in evaluation mode."""
        network = deepcopy(self._module).eval()
        gone = self.planner.removed(kept, self._channels.size)
        slots: dict[str, dict[int, Tensor]] = {}
        for (name, dim), labels in self._channels.slots.items():
            slots.setdefault(name, {})[dim] = (~gone[labels]).nonzero().flatten()
        for name, dims in slots.items():
            _shrink(network, name, dims)
        for padding in self._channels.paddings:
            shortcut = network.get_submodule(padding.name)
            assert isinstance(shortcut, PaddedShortcut)
            shortcut.before, shortcut.after = (int((~gone[side]).sum()) for side in (padding.before, padding.after))
        return network

    def require_equal(self, pruned: nn.Module, kept: Kept) -> None:
        """See that the pruned network computes what the network does where nothing reads the channels that went.

        Raises:
            BadInput: it does not, or does not run: its code counts on numbers or places of channels.
        """
        way_out = "its code counts on the number or the order of some channels"
        try:
            dry_run(pruned, self._input_size, 2)
        except Exception as error:
            raise BadInput(f"step prune: this network cannot be pruned, {way_out}: {reason_of(error)}") from error
        if self._channels.mixes or any(tensor.is_meta for tensor in pruned.state_dict().values()):
            return  # the neighbours of a channel notice that it is gone, or there are no numbers
        masked = deepcopy(self._module)
        gone = self.planner.removed(kept, self._channels.size)
        own = dict(masked.named_parameters())
        noise = torch.randn(2, *self._input_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), evaluating(masked):
            for name, labels in self._channels.readers():
                own[name][:, gone[labels]] = 0
            wanted, got = masked(noise), pruned(noise)
        if not wanted.isfinite().all():
            raise BadInput("step prune: the weights give outputs that are not finite on noise; choose others")
        limit = _MAX_REL_ERROR * float(wanted.abs().max())
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=0, atol=limit):
            raise BadInput(f"step prune: this network cannot be pruned, {way_out}")

    def table(self, kept: Kept) -> list[dict[str, Any]]:
        """Output channels of each layer before and after."""
        gone = self.planner.removed(kept, self._channels.size)
        rows: dict[str, dict[str, Any]] = {}
        for layer in self._channels.layers:
            labels = self._channels.slots[layer.weight, 0]
            rows[layer.weight] = {
                "layer": layer.name,
                "before": len(labels),
                "after": int((~gone[labels]).sum()),
            }
        return list(rows.values())


def _shrink(network: nn.Module, name: str, dims: dict[int, Tensor]) -> None:
    """Keep some indices of one parameter or buffer, and let its module say so."""
    path, _, attribute = name.rpartition(".")
    owner = network.get_submodule(path)
    tensor: Tensor = getattr(owner, attribute)
    before = tensor.shape
    smaller = tensor.detach()
    for dim, index in dims.items():
        smaller = smaller.index_select(dim, index.to(tensor.device))
    if smaller.shape == before:
        return
    if isinstance(tensor, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
    else:
        owner.register_buffer(attribute, smaller, persistent=attribute not in owner._non_persistent_buffers_set)
    outputs = smaller.shape[0]
    if isinstance(owner, nn.modules.batchnorm._BatchNorm):
        owner.num_features = outputs
    elif attribute == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = outputs, smaller.shape[1]
    elif attribute == "weight" and isinstance(owner, nn.modules.conv._ConvNd):
        if owner.groups > 1 and 1 not in dims:  # whole groups went
            owner.groups = owner.groups * outputs // before[0]
        owner.out_channels, owner.in_channels = outputs, smaller.shape[1] * owner.groups
