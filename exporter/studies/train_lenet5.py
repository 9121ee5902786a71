"""Train LeNet-5 on the digits that scikit-learn carries, and write the packaged files.

    python -m convoynet.exporter.studies.train_lenet5 [--epochs N] [--seed S] [--output FOLDER]

The data are 1,797 images of 8x8 pixels with values 0..16 (see `convoynet.exporter.assets`). Each is scaled to 0..255,
enlarged to 20x20 (bilinear) and centred in 32x32, which is how section II.B of the paper places a character in
the input. A quarter of every class is held out by seed and never trained on; the epochs are fixed, so nothing is
chosen by it either. scikit-learn's copy does not say who wrote which digit, so writers of the training part
also wrote held-out digits: the accuracy is that for known writers.

The criterion is the paper's (eq. 9). Instead of its stochastic Levenberg-Marquardt steps (appendix C) we use
AdamW with a one-cycle learning rate, and small random affine distortions as in section III.B.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from convoynet.exporter import archs, assets
from convoynet.exporter.errors import Missing

HELD_OUT = 0.25
CALIBRATION_IMAGES = 300
BATCH = 32
PEAK_LEARNING_RATE = 5e-3
RUBBISH = 1.0  # j of eq. 9: keeps the penalty of a wrong class from growing once it is large enough


@dataclass(frozen=True)
class Split:
    """The digits in two parts; images are uint8 [n, 32, 32, 1], labels int64 [n]."""

    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def split_digits(seed: int) -> Split:
    """Enlarge scikit-learn's digits and hold out a quarter of each class.

    Raises:
        Missing: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Missing("training LeNet-5 needs scikit-learn's digits: pip install scikit-learn") from error
    stored = load_digits()
    images = np.stack([enlarge(image) for image in stored.images])
    labels = stored.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        held_out[members[: math.ceil(len(members) * HELD_OUT)]] = True
    return Split(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """8x8 pixels of 0..16 -> uint8 [32, 32, 1], the character 20x20 in the centre."""
    grey = np.rint(image * (255 / 16)).astype(np.uint8)
    character = np.asarray(Image.fromarray(grey).resize((20, 20), Image.Resampling.BILINEAR))
    return np.pad(character, 6)[..., None]


def map_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The maximum a posteriori criterion of eq. 9, a mean over the batch.

    Args:
        scores: Negated penalties -y_i, [n, 10].
        labels: int64 [n].
    """
    rubbish = torch.full_like(scores[:, :1], -RUBBISH)
    right = scores.gather(1, labels[:, None]).squeeze(1)
    return (torch.logsumexp(torch.cat([scores, rubbish], 1), 1) - right).mean()


def distort(images: Tensor) -> Tensor:
    """Rotate, shear, scale and shift each image a little.

    Args:
        images: float32 [n, 1, 32, 32] with a background of 0.
    """
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle, shear = uniform(math.radians(10)), uniform(0.15)
    cos, sin = torch.cos(angle), torch.sin(angle)
    wide, high = 1 + uniform(0.12), 1 + uniform(0.12)
    shift = 2 / 16  # two pixels on affine_grid's scale of -1..1
    rows = [wide * cos, shear - sin, uniform(shift), sin, high * cos, uniform(shift)]
    grid = F.affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(split: Split, *, epochs: int, seed: int) -> nn.Module:
    """Train on the training part, deterministically on one kind of CPU; returns the network in eval mode."""
    torch.manual_seed(seed)
    arch = archs.get("lenet5")
    mean, std = arch.preprocess.mean[0], arch.preprocess.std[0]
    model = arch.build(10)
    images = torch.from_numpy(split.train).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(split.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * math.ceil(len(images) / BATCH)
    )
    model.train()
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            loss = map_loss(model((distort(images[chosen]) - mean) / std), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy in percent of a LeNet-5 on uint8 [n, 32, 32, 1] images."""
    inputs = archs.get("lenet5").preprocess.normalize(images)
    with torch.no_grad():
        answers = model(torch.from_numpy(inputs)).argmax(1).numpy()
    return float((answers == labels).mean() * 100)


def write(model: nn.Module, split: Split, folder: Path, metadata: dict[str, str]) -> None:
    """Write the weights and the digits, some training images and all held-out ones, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / assets.LENET5_WEIGHTS.name, metadata)
    (folder / assets.LENET5_WEIGHTS.name).chmod(0o644)  # save_file leaves it to its owner alone
    chosen = np.linspace(0, len(split.train) - 1, CALIBRATION_IMAGES).astype(int)
    np.savez_compressed(
        folder / assets.DIGITS.name,
        calibration=split.train[chosen],
        test=split.test,
        test_labels=split.test_labels,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convoynet.exporter.studies.train_lenet5", description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="passes over the training part (default 60)")
    parser.add_argument("--seed", type=int, default=1998, help="of the split and the training (default 1998)")
    parser.add_argument("--output", type=Path, default=assets.FOLDER, help="folder for the two files")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the number of threads changes the order of sums
    split = split_digits(arguments.seed)
    model = train(split, epochs=arguments.epochs, seed=arguments.seed)
    held_out = accuracy(model, split.test, split.test_labels)
    metadata = {
        "data": "UCI Optical Recognition of Handwritten Digits, as in scikit-learn; CC BY 4.0",
        "held_out_top1_percent": f"{held_out:.2f}",
        "held_out_images": str(len(split.test)),
        "train_images": str(len(split.train)),
        "seed": str(arguments.seed),
        "epochs": str(arguments.epochs),
    }
    write(model, split, arguments.output, metadata)
    sys.stdout.write(
        f"top-1 {accuracy(model, split.train, split.train_labels):.2f} % on {len(split.train)} training images,"
        f" {held_out:.2f} % on {len(split.test)} held-out images; written to {arguments.output}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
