"""Small networks with the shapes that quantization has to get right, and the pixels to run them on."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from convoynet.exporter.data.images import Preprocess, made_images

PREPROCESS = Preprocess(size=(32, 32), resize=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class SmallNet(nn.Module):
    """First layer, max pool, residual with a projection, residual without, depthwise with ReLU6, Concat, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16, 3)
        self.wide = _conv(16, 32, 3)
        self.project = _conv(16, 32, 1)
        self.again = _conv(32, 32, 3)
        self.depthwise = _conv(32, 32, 3, groups=32)
        self.left = _conv(32, 16, 1)
        self.right = _conv(32, 32, 3)
        self.mix = _conv(48, 32, 1)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        x = torch.relu(self.wide(x) + self.project(x))
        x = torch.relu(self.again(x) + x)
        x = nn.functional.relu6(self.depthwise(x))
        x = torch.cat((torch.relu(self.left(x)), torch.relu(self.right(x))), 1)
        x = torch.relu(self.mix(x))
        logits: Tensor = self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


class DilatedTrunk(nn.Module):
    """torchvision's dilated ResNet with two blocks a stage, an eighth as wide: a map of an eighth of the sides."""

    CHANNELS = 256

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 8, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.Sequential(
            _stage(8, 8, 1, (1, 1)), _stage(32, 16, 2, (1, 1)), _stage(64, 32, 1, (1, 2)), _stage(128, 64, 1, (2, 4))
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.stages(self.stem(x))}


def _stage(inputs: int, width: int, stride: int, dilations: tuple[int, int]) -> nn.Sequential:
    outputs = Bottleneck.expansion * width
    first, second = dilations
    return nn.Sequential(
        Bottleneck(inputs, width, stride, _conv(inputs, outputs, 1, stride=stride), dilation=first),
        Bottleneck(outputs, width, dilation=second),
    )


def _conv(inputs: int, outputs: int, kernel: int, groups: int = 1, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def settled(model: nn.Module, inputs: NDArray[np.float32]) -> nn.Module:
    """Estimate BatchNorm's statistics, and give it factors: a fresh (0, 1) hides errors in folding."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        model.train()(torch.from_numpy(inputs))
    return model.eval()


def pixels(count: int) -> NDArray[np.uint8]:
    return made_images(count, PREPROCESS.size, 3, 0)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return settled(SmallNet(), PREPROCESS.normalize(pixels(16)))


def logits_of(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.from_numpy(PREPROCESS.normalize(images))).numpy()
    return result
