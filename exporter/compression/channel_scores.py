"""How important each channel of a network is, by what its weights, its gradients or chance say."""

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.dry_run import evaluating
from convoynet.exporter.compression.ablation import ablation
from convoynet.exporter.compression.channels import Channels
from convoynet.exporter.compression.labels import appearances
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Progress

# Images, float32 NCHW, with or without their labels, int64 [n].
Batch = Tensor | tuple[Tensor, Tensor]


def channel_scores(
    module: nn.Module, channels: Channels, method: str, batches: Iterable[Batch] | None, seed: int, progress: Progress
) -> Tensor:
    """Score the labels of `channels`; the smallest scores go first.

    Args:
        module: the network; stays as it is.
        channels: of it.
        method: "magnitude", "bn", "taylor", "ablation" or "random"; see `convoynet.exporter.recipe.Prune`.
        batches: for "taylor" and "ablation".
        seed: of what is drawn.
        progress: shows the batches.

    Returns:
        float64 [channels.size], NaN for a channel that the method says nothing about.

    Raises:
        BadInput: the method needs images, or batch normalisation, that there is not.
    """
    if method == "magnitude":
        return _per_group_mean(channels, _magnitude(module, channels))
    if method == "bn":
        return _batch_norm_scale(module, channels)
    if method in ("taylor", "ablation"):
        if batches is None:
            raise BadInput(f'step prune: method "{method}" needs images: add --calibration DIR, or use "magnitude"')
        if method == "ablation":
            images = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
            return ablation(module, channels, images, progress)
        return _taylor(module, channels, batches, seed, progress)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels.size, generator=generator, dtype=torch.float64)


def _magnitude(module: nn.Module, channels: Channels) -> Tensor:
    """The squared L2 norm of everything that goes with the channel (G. Fang et al. 2023, DepGraph, equation 4)."""
    own = dict(module.named_parameters())
    dense = {layer.weight for layer in channels.layers} | set(channels.norms)
    scores = torch.zeros(channels.size, dtype=torch.float64)
    for (name, dim), labels in channels.slots.items():
        if name in dense:
            squares = own[name].detach().double().square()
            scores.index_add_(0, labels, squares.transpose(0, dim).reshape(len(labels), -1).sum(1))
    return scores


def _per_group_mean(channels: Channels, scores: Tensor) -> Tensor:
    """Scores as multiples of the mean over the layer that makes the channel: layers differ in their scale."""
    scaled = scores.clone()
    for layer in channels.layers:
        labels = torch.tensor(list(appearances(channels.slots[layer.weight, 0])))
        scaled[labels] = scores[labels] / scores[labels].mean().clamp(min=torch.finfo(torch.float64).tiny)
    return scaled


def _batch_norm_scale(module: nn.Module, channels: Channels) -> Tensor:
    """The mean |gamma| of the batch normalisations of a channel (Z. Liu et al. 2017, section 3)."""
    if not channels.norms:
        raise BadInput('step prune: method "bn" needs batch normalisation, and the network has none; use "magnitude"')
    own = dict(module.named_parameters())
    sums, counts = (torch.zeros(channels.size, dtype=torch.float64) for _ in range(2))
    for name in channels.norms:
        labels = channels.slots[name, 0]
        sums.index_add_(0, labels, own[name].detach().double().abs())
        counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
    return sums / counts


def _taylor(module: nn.Module, channels: Channels, batches: Iterable[Batch], seed: int, progress: Progress) -> Tensor:
    """The squared first-order change of the loss without the channel (P. Molchanov et al. 2019, equation 8).

    A channel is gone when every layer that reads it reads zeros: the change is the sum of gradient x weight over these
    weights. Without labels the loss against the network's own outputs has its minimum here, and no gradient; its
    second derivative is the Fisher information, which the squared gradients of the log likelihood of classes that are
    drawn from the network's own distribution estimate (L. Theis et al. 2018, "Faster gaze prediction with dense
    networks and Fisher pruning", section 2).
    """
    network = deepcopy(module).requires_grad_(True)
    own = dict(network.named_parameters())
    readers = list(channels.readers())
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(channels.size, dtype=torch.float64)
    seen = 0
    with evaluating(network), torch.enable_grad():
        for batch in progress.track(batches, "Taylor scores"):
            images, labels = batch if isinstance(batch, tuple) else (batch, None)
            logits = network(images)
            if labels is None:
                labels = _drawn(logits.detach(), generator)
            gradients = torch.autograd.grad(
                F.cross_entropy(logits, labels), [own[name] for name, _ in readers], allow_unused=True
            )
            change = torch.zeros(channels.size, dtype=torch.float64)
            for (name, read), gradient in zip(readers, gradients, strict=True):
                if gradient is not None:
                    product = (gradient * own[name].detach()).double().transpose(0, 1).reshape(len(read), -1).sum(1)
                    change.index_add_(0, read, product)
            scores += change.square()
            seen += 1
    if not seen:
        raise BadInput('step prune: method "taylor" needs images, and there are none; add some, or use "magnitude"')
    if not bool(scores.isfinite().all()):
        raise BadInput('step prune: method "taylor" found gradients that are not finite; use "magnitude"')
    return scores / seen


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class for each row (and pixel) of logits [n, classes, ...], drawn from their softmax: int64 [n, ...]."""
    probabilities = logits.softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.reshape(-1, logits.shape[1]), 1, generator=generator)
    return drawn.reshape(probabilities.shape[:-1])
