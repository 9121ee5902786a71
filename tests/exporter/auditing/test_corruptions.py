"""Spoilt pictures against the reference's own code where it is installed, and against what is known of each kind."""

import importlib
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from convoynet.exporter.auditing import corruptions
from convoynet.exporter.auditing.corruptions import CIFAR, IMAGENET, KINDS, constants_for, corrupted, disk
from convoynet.exporter.data.images import made_images

REFERENCE = Path(__file__).parents[3] / "build" / "corruptions"
_THEIRS = {"jpeg": "jpeg_compression"}
SEEDED = ("gaussian noise", "shot noise", "impulse noise")


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """The authors' code, as a package; what it needs beside stands behind what is installed."""
    if not (REFERENCE / ".installed").is_file():
        pytest.skip("needs the reference: make corruptions")
    sys.path.append(str(REFERENCE))
    return importlib.import_module("imagecorruptions")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_imagenets_are_those_of_the_reference(theirs: ModuleType, kind: str, severity: int) -> None:
    images = made_images(2, (224, 224), 3, 1)
    name = _THEIRS.get(kind, kind.replace(" ", "_"))
    np.random.seed(0)  # where they take their noise from
    expected = np.stack([theirs.corrupt(image, severity, name) for image in images]).astype(np.float64)
    found = corrupted(images, kind, severity, rng()).astype(np.float64)
    if kind in SEEDED:  # other random numbers of the same distribution
        for one in (np.mean, np.std):
            assert one(found) == pytest.approx(one(expected), rel=0.01)
        np.testing.assert_allclose((found - images).std(), (expected - images).std(), rtol=0.02)
    elif kind == "pixelate":  # the authors' second resize is BOX, the package's NEAREST: alike where pixels divide
        assert np.abs(found - expected).mean() < (1e-9 if severity in (2, 5) else 4)
    else:  # a value on the edge of two levels may be cut off either way, and sums of a few levels often are there
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (9, 12), (96, 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_pictures_of_any_size_and_leaves_them_as_they_are(
    kind: str, size: tuple[int, int], channels: int
) -> None:
    images = made_images(3, size, 3, 0)[..., :channels]
    before = images.copy()
    changes = []
    for severity in (1, 5):
        found = corrupted(images, kind, severity, rng())
        assert found.shape == images.shape
        assert found.dtype == np.uint8
        changes.append(np.abs(found.astype(int) - images).mean())
    assert changes[0] < changes[1]
    assert (images == before).all()
    assert (corrupted(images, kind, 5, rng()) == corrupted(images, kind, 5, rng())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_many_pictures_take_no_more_memory_than_few(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "_TOGETHER", 2**16)
    images = np.random.default_rng(0).integers(0, 256, (48, 80, 72, 3), np.uint8)
    tracemalloc.start()
    found = corrupted(images, kind, 3, np.random.default_rng(0))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * images.nbytes + 16 * 8 * 2**16
    alone = [corrupted(image[None], kind, 3, np.random.default_rng(0)) for image in images]
    if kind not in SEEDED:
        assert (found == np.concatenate(alone)).all()


def test_the_constants_go_by_the_size() -> None:
    assert constants_for((32, 32)) == ("CIFAR-10-C", CIFAR)
    assert constants_for((64, 64))[0] == "CIFAR-10-C"
    assert constants_for((64, 96)) == ("ImageNet-C", IMAGENET)
    assert set(CIFAR) == set(IMAGENET) == set(KINDS)
    assert all(len(values) == 5 for table in (CIFAR, IMAGENET) for values in table.values())


def test_what_is_known_of_each_kind() -> None:
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    noise = corrupted(grey, "gaussian noise", 5, rng()) / 255
    assert noise.std() == pytest.approx(0.10, rel=0.05)
    shot = corrupted(grey, "shot noise", 5, rng()) / 255
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 / 50), rel=0.05)
    struck = corrupted(grey, "impulse noise", 5, rng())
    assert (struck != 128).mean() == pytest.approx(0.07, rel=0.1)
    assert set(np.unique(struck)) == {0, 128, 255}
    assert (struck == 255).sum() == pytest.approx((struck == 0).sum(), rel=0.2)
    for kind in ("defocus blur", "contrast", "pixelate"):  # what is flat stays so
        assert np.abs(corrupted(grey, kind, 3, rng()).astype(int) - 128).max() <= 1
    assert np.unique(corrupted(grey, "brightness", 5, rng())).tolist() == [int(128 + 0.3 * 255)]
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert np.unique(corrupted(black, "brightness", 5, rng())).tolist() == [int(0.3 * 255)]
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = 100
    assert corrupted(red, "brightness", 5, rng())[0, 0, 0].tolist() == [176, 0, 0]


def test_a_disk_has_its_radius_and_adds_up_to_one() -> None:
    for radius, size in ((1, 17), (8, 17), (10, 21)):
        made = disk(radius, 0.1)
        assert made.shape == (size, size)
        assert made.sum() == pytest.approx(1)
        assert made[size // 2, size // 2 + radius] > 0
    np.testing.assert_allclose(disk(3, 0.5), disk(3, 0.5).T, atol=1e-12)
