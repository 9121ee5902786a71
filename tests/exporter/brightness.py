"""A model whose answers are known beforehand."""

import numpy as np
from numpy.typing import NDArray

from convoynet.exporter.data.images import Preprocess

GREY = Preprocess(size=(2, 2), resize=2, mean=(0.0,), std=(1.0,))


class Brightness:
    """Logits that follow the image's first pixel v: class v // 25 is first. `wrong` images are answered one higher."""

    name = "brightness"

    def __init__(self, wrong: tuple[int, ...] = (), only_batches: tuple[int, ...] = ()) -> None:
        self.wrong = wrong
        self.only_batches = only_batches
        self.batches: list[int] = []

    def prepare(self, images: NDArray[np.uint8]) -> NDArray[np.generic]:
        return images

    def __call__(self, inputs: NDArray[np.generic]) -> tuple[NDArray[np.float32]]:
        self.batches.append(len(inputs))
        values = inputs[:, 0, 0, 0].astype(int)
        answers = values // 25 + np.isin(values, self.wrong)
        return (-np.abs(np.arange(12)[None] - answers[:, None]).astype(np.float32),)


def images(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
