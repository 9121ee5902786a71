import numpy as np
import pytest
import torch
from torch import nn

from convoynet.exporter.progress import Quiet
from convoynet.exporter.running import matched_images
from convoynet.exporter.running.matched_images import Wish, has_statistics, match_statistics
from tests.exporter.small_nets import PREPROCESS, small_net

WISH = Wish(count=12, seed=3)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matched_images, "_MOST_STEPS", 16)


def test_the_statistics_come_nearer_and_the_network_stays_as_it_is() -> None:
    network = small_net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = match_statistics(network, PREPROCESS, 20, WISH, Quiet())
    assert made.images.shape == (12, 32, 32, 3)
    assert made.images.dtype == np.uint8
    assert made.after < made.before
    assert (made.steps, made.finished) == (16, True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_same_seed_makes_the_same_images() -> None:
    first, again = (match_statistics(small_net(), PREPROCESS, 20, WISH, Quiet()).images for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = match_statistics(small_net(), PREPROCESS, 20, Wish(12, 4), Quiet()).images
    assert (other != first).any()


def test_a_network_that_is_no_classifier_has_statistics_too() -> None:
    made = match_statistics(small_net(), PREPROCESS, 0, Wish(2, 0), Quiet())
    assert made.after < made.before


def test_the_time_is_bounded_and_every_image_gets_a_step() -> None:
    made = match_statistics(small_net(), PREPROCESS, 20, Wish(12, 3, seconds=0.0), Quiet())
    assert made.images.shape == (12, 32, 32, 3)
    assert (made.steps, made.finished) == (1, False)


@pytest.mark.parametrize(
    ("macs", "images", "steps"),
    [(41_000_000, 96, 160), (390_000_000, 32, 53), (4_100_000_000, 9, 18), (10**12, 8, 16)],
)
def test_large_networks_get_fewer_images_and_steps(macs: int, images: int, steps: int) -> None:
    planned = matched_images._plan(macs, 512)
    assert planned[0] == pytest.approx(images, abs=3)
    assert planned[1] <= 160


def test_a_fresh_batch_norm_remembers_nothing() -> None:
    assert not has_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert not has_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    assert not has_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    assert has_statistics(small_net())
