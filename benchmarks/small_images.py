"""Networks of the zoo for small images of ten classes, trained here: nobody publishes such weights of them.

Class folders of CIFAR-10, a few epochs on a CPU. What is trained is kept (`--work`) and goes on where it was
interrupted; the same options give the same weights on one machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.archs.datasets import CIFAR10_PREPROCESS, cifar10_labels
from convoynet.exporter.compression.data import images_from_folder
from convoynet.exporter.compression.train import Settings, train
from convoynet.exporter.progress import Terminal
from convoynet.exporter.recipe import Finetune

CLASSES = 10


def efficientnet_b0() -> Arch:
    """EfficientNet-B0 for 48x48 pixels: it divides each side by 32, and of 32x32 a single place would be left.

    No dropout and no stochastic depth, which are for trainings of hundreds of epochs; and a classifier that begins with
    small weights, not with torchvision's of up to 1 / sqrt(classes).
    """

    def build(num_classes: int) -> nn.Module:
        network: Any = archs.get("efficientnet_b0").build(num_classes)
        nn.init.normal_(network.classifier[1].weight, 0, 0.01)
        for module in network.modules():
            if type(module).__name__ in {"StochasticDepth", "Dropout"}:
                module.p = 0.0
        made: nn.Module = network
        return made

    preprocess = replace(CIFAR10_PREPROCESS, size=(48, 48), resize=48, interpolation="bicubic")
    return _of_ten("efficientnet_b0", build, preprocess=preprocess)


def vgg16() -> Arch:
    """VGG-16 with batch normalisation for 32x32 pixels: its convolutions leave 512 x 1 x 1.

    Both fully connected layers of 4,096 outputs stay; only the first one's inputs are 512 in the place of 512 x 7 x 7,
    which here would be 49 copies of the same.
    """

    def build(num_classes: int) -> nn.Module:
        network: Any = archs.get("vgg16_bn").build(num_classes)
        network.avgpool = nn.Identity()
        network.classifier[0] = nn.Linear(512, 4096)
        nn.init.normal_(network.classifier[0].weight, 0, 0.01)  # as the other two
        nn.init.zeros_(network.classifier[0].bias)
        module: nn.Module = network
        return module

    return _of_ten("vgg16_bn", build, preprocess=CIFAR10_PREPROCESS)


def _of_ten(name: str, build: Callable[[int], nn.Module], **changes: Any) -> Arch:
    return replace(
        archs.get(name),
        num_classes=CLASSES,
        labels=cifar10_labels,
        build=build,
        published=None,
        published_name="",
        **changes,
    )


def add_training(parser: argparse.ArgumentParser, *, epochs: int, lr: float, required: bool = True) -> None:
    """The options that `trained` reads."""
    parser.add_argument("--train", type=Path, metavar="DIR", required=required, help="class folders to train on")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"of training (default {epochs})")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=lr, help=f"the largest learning rate (default {lr:g})")
    parser.add_argument("--work", type=Path, default=Path("build") / "trained", help="for checkpoints and weights")


def trained(arch: Arch, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Train a network from random weights, and write them to --work; returns it, and what a report says of it."""
    torch.manual_seed(0)
    module = arch.build(CLASSES)
    images = images_from_folder(options.train, arch.preprocess, arch.labels(), Terminal())
    step = Finetune(epochs=options.epochs, batch=options.batch, lr=options.lr, distill=False)
    options.work.mkdir(parents=True, exist_ok=True)
    name = f"{arch.name}-{options.epochs}"
    happened = train(module, None, images, step, Settings(checkpoint=options.work / f"{name}.checkpoint"), Terminal())
    torch.save(module.state_dict(), options.work / f"{name}.pt")
    return module.eval(), {
        "input_size": list(arch.preprocess.size),
        "finetune": step.to_dict() | {"images": len(images)},
        "training_minutes": round(sum(epoch.seconds for epoch in happened.epochs) / 60, 2),
        "training_losses": [round(epoch.loss, 4) for epoch in happened.epochs],
        "weights_sha256": weights.state_dict_sha256(module.state_dict()),
    }
