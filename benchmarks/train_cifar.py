"""Trains one of the zoo's CIFAR networks from nothing, for few epochs: a network that is less sure of itself.

    python benchmarks/train_cifar.py --arch resnet20 --train train/ --epochs 3 --out resnet20-3-epochs.th

How much noise INT8 adds depends on how far a network was trained: the logits of one that has seen its images hundreds
of times lie far apart and come from long tails. This makes the other kind, to be measured by benchmarks/quantizers.py.
SGD with Nesterov's momentum, one cycle of the learning rate, flips and shifts of a batch; two minutes an epoch on 2
cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.data.images import labelled_images, load_images
from convoynet.exporter.progress import Terminal

BATCH, SHIFT = 128, 4


def train(arch: archs.Arch, folder: Path, epochs: int, seed: int) -> nn.Module:
    """Returns the trained network."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    labelled = labelled_images(folder, sorted(path.name for path in folder.iterdir() if path.is_dir()))
    pictures = load_images([path for path, _ in labelled], arch.preprocess)
    images = torch.from_numpy(arch.preprocess.normalize(pictures))
    labels = torch.tensor([label for _, label in labelled])
    network = arch.build(arch.num_classes).train()
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(images)))
        for step in Terminal().track(range(steps), f"epoch {epoch + 1} of {epochs}"):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = images[chosen].flip(3) if rng.integers(2) else images[chosen]
            top, left = rng.integers(0, 2 * SHIFT + 1, 2).tolist()
            height, width = batch.shape[2:]
            batch = nn.functional.pad(batch, (SHIFT,) * 4)[:, :, top : top + height, left : left + width]
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return network


def main() -> None:
    """Trains and writes a state dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="one folder for each class")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = train(archs.get(options.arch), options.train, options.epochs, options.seed)
    torch.save(network.state_dict(), options.out)


if __name__ == "__main__":
    main()
