"""A teacher gets images as it wants them."""

import torch
from torch import nn

from convoynet.exporter.compression.teacher import Renormalized
from convoynet.exporter.data.images import Preprocess, made_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RGB = Preprocess((8, 8), 8, MEAN, STD)
BGR = Preprocess((8, 8), 8, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7), order="bgr")


def test_in_the_other_order_of_the_channels_and_normalised_otherwise() -> None:
    pixels = made_images(2, (8, 8), 3, 0)
    turned = pixels[..., ::-1]
    for given, has, wanted, gets in (
        (BGR, turned, RGB, pixels),
        (RGB, pixels, BGR, turned),
        (RGB, pixels, RGB, pixels),
    ):
        network = Renormalized(nn.Identity(), given, wanted)
        found = network(torch.from_numpy(given.normalize(has)))
        torch.testing.assert_close(found, torch.from_numpy(wanted.normalize(gets)), rtol=0, atol=1e-5)
