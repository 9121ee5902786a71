"""What the pages take for granted: pictures, checkpoints, models that lie in a repository.

Networks are small or have random weights, since it is the commands that are tried. What a network downloads lies where
the download would put it: random weights under the published ones' name (`published`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model_weights

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from tests.docs.documents import ROOT, blocks
from tests.exporter import given_files
from tests.server import onnx_models
from tests.server.certificates import Authority

Input = Callable[[Path], None]
CROPS = 24


def photographs() -> list[Image.Image]:
    """Pieces of scikit-learn's two photographs, of some sizes."""
    from sklearn.datasets import load_sample_images  # a second of each process that collects tests

    pieces = []
    rng = np.random.default_rng(0)
    for pixels in load_sample_images().images:
        whole = Image.fromarray(pixels)
        for _ in range(CROPS // 2):
            side = int(rng.integers(260, 400))
            left, top = (int(rng.integers(0, room - side)) for room in whole.size)
            pieces.append(whole.crop((left, top, left + side, top + side)))
    return pieces


def photos(folder: Path) -> None:
    """photos/, holiday/, and the single pictures."""
    for name in ("photos", "holiday"):
        (folder / name).mkdir()
    for number, piece in enumerate(photographs()):
        piece.save(folder / "photos" / f"{number}.jpg", quality=95)
    for name in ("cat.jpg", "photo.jpg", "pond.png", "photos/cat.jpg", "holiday/beach.jpg"):
        photographs()[0].save(folder / name)


def concepts(folder: Path) -> None:
    """concepts/ with two of them, cats/, and masks/ of one for some of photos/."""
    for step, name in ((8, "striped"), (3, "spotted")):
        (folder / "concepts" / name).mkdir(parents=True)
        for number, piece in enumerate(photographs()[:12]):
            pixels = np.asarray(piece) // 2
            pixels[:, ::step] = 255
            Image.fromarray(pixels).save(folder / "concepts" / name / f"{number}.jpg")
    (folder / "cats").mkdir()
    (folder / "masks" / "wheel").mkdir(parents=True)
    for number, piece in enumerate(photographs()[:4]):
        piece.save(folder / "cats" / f"{number}.jpg")
        Image.fromarray(np.asarray(piece.convert("L")) > 127).save(folder / "masks" / "wheel" / f"{number}.png")


def classes(folder: Path) -> None:
    """train/ and test/ of ten classes that their colours tell apart, 32 pixels a side."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 10)):
        for index in range(10):
            (folder / part / str(index)).mkdir(parents=True)
            colour = np.array([index % 3, index // 3 % 3, index // 9 * 2]) * 100.0 + 27
            for number in range(count):
                pixels = (colour + rng.normal(0, 25, (32, 32, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / str(index) / f"{number}.png")


def trained(name: str) -> Input:
    """trained.th: a network for CIFAR-10 that tells the classes of `classes` apart."""

    def make(folder: Path) -> None:
        torch.set_num_threads(1)  # several would wait for each other beside other work
        torch.manual_seed(0)
        arch = archs.get(name)
        network = arch.build(arch.num_classes).train()
        files = sorted(folder.glob("train/*/*.png"))
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        inputs = torch.from_numpy(arch.preprocess.normalize(pixels))
        truth = torch.tensor([int(file.parent.name) for file in files])
        descent = torch.optim.Adam(network.parameters(), lr=0.003)
        for _ in range(12):
            for batch in torch.randperm(len(files)).split(40):
                descent.zero_grad()
                torch.nn.functional.cross_entropy(network(inputs[batch]), truth[batch]).backward()
                descent.step()
        torch.save(network.state_dict(), folder / "trained.th")

    return make


def _random(name: str, num_classes: int | None = None) -> dict[str, torch.Tensor]:
    arch = archs.get(name)
    torch.manual_seed(0)
    network = arch.build(num_classes or arch.num_classes)
    # Little of the deep branches: what a hundred random layers answer hardly hangs on the picture.
    for key, tensor in network.state_dict().items():
        if key.endswith("bn3.weight"):
            tensor.mul_(0.1)
    size = arch.preprocess.size
    seen = np.stack([np.asarray(piece.resize((size[1], size[0]))) for piece in photographs()])
    weights.load(network, arch, "random", seed=0, images=seen)
    return network.state_dict()


def published(*names: str) -> Input:
    """What torchvision would download for these networks."""

    def make(folder: Path) -> None:
        cache = downloads(folder) / "hub" / "checkpoints"
        cache.mkdir(parents=True, exist_ok=True)
        for name in names:
            torch.save(_random(name), cache / Path(urlsplit(get_model_weights(name).DEFAULT.url).path).name)

    return make


def downloads(folder: Path) -> Path:
    """TORCH_HOME of the page's reader."""
    return folder / ".downloads"


def pets(folder: Path) -> None:
    """A checkpoint with classes of its own."""
    save_file(_random("resnet18", 37), folder / "pets.safetensors")
    (folder / "pets.txt").write_text("".join(f"breed {number}\n" for number in range(37)))


def nets(folder: Path) -> None:
    """nets.py of docs/adding-a-network.md, with weights for five classes, and a network of two outputs."""
    (own,) = [b for b in blocks(ROOT / "docs" / "adding-a-network.md") if (b.kind, b.note) == ("file", "nets.py")]
    (folder / "nets.py").write_text(own.text + TWO_HEADS)
    (folder / "shapes.txt").write_text("circle\nsquare\ntriangle\nstar\ncross\n")
    scope: dict[str, Callable[[int], torch.nn.Module]] = {}
    exec(own.text, scope)
    torch.manual_seed(0)
    network = scope["small"](5)
    seen = np.stack([np.asarray(piece.resize((64, 64)), np.float32) for piece in photographs()])
    weights.estimate_statistics(network, ((seen / 255 - 0.45) / 0.23).transpose(0, 3, 1, 2))
    torch.save(network.state_dict(), folder / "trained.pt")


TWO_HEADS = """

class two_heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = small()

    def forward(self, x):
        features = self.trunk[:-1](x)
        return self.trunk[-1](features), features
"""


def onnx_files(folder: Path) -> None:
    """Files of another exporter, and the names of their classes."""
    given_files.any_batch(folder / "theirs.onnx")
    for name in ("model.onnx", "nets/one.onnx", "nets/two.onnx", "some/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "theirs.onnx", folder / name)
    (folder / "names.txt").write_text("".join(f"name {number}\n" for number in range(given_files.CLASSES)))


def models(folder: Path) -> None:
    """models/ with what the pages about the server name."""
    onnx_models.write_photos(folder / "models", "resnet50")
    onnx_models.write_linear(folder / "models")
    onnx_models.write_segmenter(folder / "models", "deeplabv3_resnet101")
    onnx_models.write_detector(folder / "models", "fasterrcnn_resnet101_fpn")


def exported(name: str, *flags: str) -> Input:
    """models/NAME, as an export leaves it; LeNet-5 by that name."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "convoynet.server.cli", "export", "--arch", "lenet5", "--name", name, *flags]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    return make


def certificates(folder: Path) -> None:
    """server.crt and server.key."""
    pair = Authority(folder).sign("server")
    assert (pair.certificate.name, pair.key.name) == ("server.crt", "server.key")


def deploy(folder: Path) -> None:
    """deploy/ of the repository, to be changed."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")


def recipes(folder: Path) -> None:
    """recipes/: the page's own, without training, and the same with INT8."""
    (folder / "recipes").mkdir()
    half = '[[step]]\nstep = "prune"\nratio = 0.5\n\n[[step]]\nstep = "finetune"\nepochs = 2\n'
    (folder / "recipes" / "half.toml").write_text(half)
    (folder / "recipes" / "half-int8.toml").write_text(f'{half}\n[[step]]\nstep = "int8"\n')
