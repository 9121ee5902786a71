"""A segmentation and a detection network of one's own: handwritten digits on a sheet of paper.

    python docs/examples/sheets.py FOLDER    trains both for a few minutes, and writes what the commands below take
    cd FOLDER
    convoy export --arch sheets:pixels --task segmentation --weights pixels.pt --labels digits.txt \
        --input-size 192x256 --int8 --calibration calibration
    convoy export --arch sheets:boxes --task detection --weights boxes.pt --labels digits.txt \
        --input-size 192x256 --int8 --calibration calibration

`pixels` says of each pixel which digit it belongs to, and `boxes` where each digit is (a peak in a map of scores is its
middle: X. Zhou et al. 2019, Objects as Points). Nothing in them is Convoy's. The digits are scikit-learn's; those of
the sheets to look at, in FOLDER/sheets, are none that were trained on.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

HEIGHT, WIDTH, STRIDE = 192, 256, 4
LABELS = ("__background__", *(f"digit {number}" for number in range(10)))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what an export takes where nothing else is said
MOST = 20  # digits of a sheet
LEAST_SCORE = 0.1
STEPS, BATCH = 400, 4


class Trunk(nn.Sequential):
    """Maps at a quarter of the resolution, each place of which sees the whole digit that it lies in."""

    CHANNELS = 32

    def __init__(self) -> None:
        widths = (3, 16, self.CHANNELS, *[self.CHANNELS] * 5)
        strides, dilations = (2, 2, 1, 1, 1, 1, 1), (1, 1, 1, 2, 4, 2, 1)
        layers: list[nn.Module] = []
        for i, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride, dilation, dilation, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Pixels(nn.Module):
    """Logits [N, classes, H / 4, W / 4], which the server enlarges."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk, self.scores = Trunk(), nn.Conv2d(Trunk.CHANNELS, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Says of each place what is there."""
        logits: Tensor = self.scores(self.trunk(x))
        return logits


class Boxes(nn.Module):
    """Peaks of the scores, and at each the distances to the four sides."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.scores, self.sides = nn.Conv2d(Trunk.CHANNELS, num_classes - 1, 1), nn.Conv2d(Trunk.CHANNELS, 4, 1)
        nn.init.constant_(self.scores.bias, -4.0)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the digits' middles, and distances in pixels to left, top, right and bottom."""
        features = self.trunk(x)
        return self.scores(features), F.softplus(self.sides(features)) * STRIDE

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As many boxes for every image: those that are none have the score 0."""
        logits, sides = self.maps(x)
        best, labels = torch.sigmoid(logits).max(1, keepdim=True)
        peaks = (F.max_pool2d(best, 5, 1, 2) == best) & (best >= LEAST_SCORE)
        scores, places = torch.where(peaks, best, 0.0).flatten(1).topk(MOST)
        around = sides.flatten(2).gather(2, places[:, None].expand(-1, 4, -1)).transpose(1, 2)  # N x MOST x 4
        columns = logits.shape[-1]
        rows = torch.div(places, columns, rounding_mode="floor")
        middle = (torch.stack([places - rows * columns, rows], -1) + 0.5) * STRIDE
        corners = torch.cat([middle - around[..., :2], middle + around[..., 2:]], -1)
        return {"boxes": corners, "scores": scores, "labels": labels.flatten(1).gather(1, places) + 1}


def pixels(num_classes: int = len(LABELS)) -> nn.Module:
    """For `--arch sheets:pixels`."""
    return Pixels(num_classes)


def boxes(num_classes: int = len(LABELS)) -> nn.Module:
    """For `--arch sheets:boxes`."""
    return Boxes(num_classes)


class Writer:
    """Writes digits, from 28 to 64 pixels high, where there is room on a sheet."""

    def __init__(self, images: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> None:
        self.images, self.labels, self.rng = images, labels, np.random.default_rng(seed)

    def sheet(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[tuple[int, NDArray[np.float64]]]]:
        """The picture, the class of each pixel, and each digit with its box."""
        rng = self.rng
        light = np.linspace(rng.uniform(0.75, 1), rng.uniform(0.75, 1), WIDTH)[None, :, None]
        picture = light * rng.uniform(0.85, 1, 3) * np.ones((HEIGHT, WIDTH, 3))
        classes = np.zeros((HEIGHT, WIDTH), np.int64)
        taken = np.zeros((HEIGHT, WIDTH), bool)
        found = []
        for _ in range(int(rng.integers(4, 14))):
            index, side = int(rng.integers(len(self.images))), int(rng.integers(28, 65))
            top, left = int(rng.integers(0, HEIGHT - side)), int(rng.integers(0, WIDTH - side))
            if taken[top : top + side, left : left + side].any():
                continue
            taken[top : top + side, left : left + side] = True
            drawn = Image.fromarray((self.images[index] * (255 / 16)).astype(np.uint8))
            ink = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
            where = slice(top, top + side), slice(left, left + side)
            picture[where] += ink[..., None] * (rng.uniform(0, 0.35, 3) - picture[where])
            classes[where][ink > 0.4] = self.labels[index] + 1
            ys, xs = np.nonzero(ink > 0.4)
            corners = np.array([left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1], np.float64)
            found.append((int(self.labels[index]), corners))
        picture += rng.normal(0, 0.02, picture.shape)
        return (picture.clip(0, 1) * 255).astype(np.uint8), classes, found


def normalized(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """As an export makes a picture the network's input."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def box_targets(found: list[tuple[int, NDArray[np.float64]]]) -> tuple[Tensor, Tensor]:
    """A hill of scores around the middle of each digit, and the sides at its middle; elsewhere those are 0."""
    rows, columns = HEIGHT // STRIDE, WIDTH // STRIDE
    hills, sides = torch.zeros(10, rows, columns), torch.zeros(4, rows, columns)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    for digit, corners in found:
        x1, y1, x2, y2 = corners.tolist()
        column, row = int((x1 + x2) / 2 / STRIDE), int((y1 + y2) / 2 / STRIDE)
        hill = torch.exp(-((x - column) ** 2 + (y - row) ** 2) / 8.0)
        hills[digit] = torch.maximum(hills[digit], hill)
        near = (x - column).abs().le(1) & (y - row).abs().le(1)
        middle = torch.stack([x, y]) * STRIDE + STRIDE / 2
        wanted = torch.stack([middle[0] - x1, middle[1] - y1, x2 - middle[0], y2 - middle[1]])
        sides = torch.where(near, wanted.float().clamp(min=0.1), sides)
    return hills, sides


def box_loss(network: Boxes, x: Tensor, found: list[list[tuple[int, NDArray[np.float64]]]]) -> Tensor:
    """The focal loss of the paper's equation 1 for the scores, and the absolute error of the sides."""
    hills, sides = (torch.stack(each) for each in zip(*map(box_targets, found), strict=True))
    logits, guessed = network.maps(x)
    scores = torch.sigmoid(logits).clamp(1e-4, 1 - 1e-4)
    middle = hills == 1
    right = torch.log(scores) * (1 - scores) ** 2 * middle
    wrong = torch.log(1 - scores) * scores**2 * (1 - hills) ** 4 * ~middle
    known = sides.amax(1, keepdim=True) > 0
    distance = ((guessed - sides).abs() * known).sum() / known.sum() / STRIDE
    return -(right.sum() + wrong.sum()) / middle.sum() + 0.1 * distance


def train(network: nn.Module, writer: Writer) -> nn.Module:
    """Trains either of the two on sheets that are written anew for each step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    weight = torch.tensor([0.3] + [1.0] * 10)
    for _ in range(STEPS):
        pictures, classes, found = zip(*(writer.sheet() for _ in range(BATCH)), strict=True)
        x = normalized(list(pictures))
        if isinstance(network, Boxes):
            loss = box_loss(network, x, list(found))
        else:
            logits = F.interpolate(network(x), size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, torch.from_numpy(np.stack(classes)), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def main(folder: Path) -> None:
    """Writes this module, both networks' weights, the labels, sheets to calibrate on and sheets to look at."""
    from sklearn.datasets import load_digits  # here: an export of the networks needs none

    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "sheets.py")
    (folder / "digits.txt").write_text("".join(f"{label}\n" for label in LABELS))
    known, new = slice(0, 1400), slice(1400, None)
    for name, part, count in (("calibration", known, 32), ("sheets", new, 8)):
        (folder / name).mkdir(exist_ok=True)
        writer = Writer(digits.images[part], digits.target[part], seed=1)
        for number in range(count):
            sheet = Image.fromarray(writer.sheet()[0])
            if part is new:  # as a camera would take it: larger than what the networks see
                sheet = sheet.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.BICUBIC)
            sheet.save(folder / name / f"{number}.png")
    for build in (pixels, boxes):
        torch.manual_seed(0)
        network = train(build(), Writer(digits.images[known], digits.target[known], seed=0))
        torch.save(network.state_dict(), folder / f"{build.__name__}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
