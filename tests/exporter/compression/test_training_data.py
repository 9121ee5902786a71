from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convoynet.exporter.compression import data
from convoynet.exporter.compression.data import Order, batches, images_from_array, images_from_folder, network_inputs
from convoynet.exporter.data.images import Preprocess, load_images, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet

SMALL = Preprocess(size=(8, 8), resize=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
# Takes the central 20 x 20 of 31 pixels: there is a margin of 8 to crop from.
CENTRAL = Preprocess(size=(20, 20), resize=31, mean=(0.5,) * 3, std=(0.25,) * 3)
LABELS = ("cat", "dog")


def folder_of(path: Path, names: tuple[str, ...] = LABELS, count: int = 3, size: tuple[int, int] = (12, 9)) -> Path:
    for index, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for number, pixels in enumerate(made_images(count, size, 3, index)):
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def test_class_folders_are_labelled(tmp_path: Path) -> None:
    images = images_from_folder(folder_of(tmp_path), SMALL, LABELS, Quiet())
    assert len(images) == 6
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "2 classes" in images.source


def test_other_folders_are_not_and_the_source_says_why(tmp_path: Path) -> None:
    images = images_from_folder(folder_of(tmp_path, ("cat", "horse")), SMALL, LABELS, Quiet())
    assert images.labels is None
    assert "without labels" in images.source
    assert "'horse' is no class" in images.source


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    images = images_from_folder(folder_of(tmp_path), SMALL, None, Quiet())
    assert images.labels is None
    assert len(images) == 6


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"1\.png: cannot be read as an image"):
        images_from_folder(tmp_path, SMALL, LABELS, Quiet())


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="1 image is too few"):
        images_from_folder(folder_of(tmp_path, ("cat",), count=1), SMALL, None, Quiet())
    with pytest.raises(BadInput, match="1 image is too few"):
        images_from_array(made_images(1, (8, 8), 3, 0), SMALL, "one image")
    with pytest.raises(BadInput, match=r"\[9, 8, 3\]: the network takes \[8, 8, 3\]"):
        images_from_array(made_images(4, (9, 8), 3, 0), SMALL, "images")


@pytest.mark.parametrize("preprocess", [SMALL, CENTRAL], ids=["whole", "central"])
def test_without_augmentation_images_are_those_of_the_export(tmp_path: Path, preprocess: Preprocess) -> None:
    folder = folder_of(tmp_path, size=(45, 38))
    images = images_from_folder(folder, preprocess, None, Quiet())
    chosen = np.array([4, 0, 5])
    expected = load_images([sorted(folder.rglob("*.png"))[index] for index in chosen], preprocess)
    pixels = images.batch(chosen, None)
    assert np.array_equal(pixels, expected)
    inputs = network_inputs(pixels, preprocess, torch.device("cpu"))
    assert np.array_equal(inputs.numpy(), preprocess.normalize(expected))
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_decoding_late_gives_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, count=5, size=(45, 38))
    order = Order(seed=3, batch=4, augment=True)
    early = images_from_folder(folder, CENTRAL, LABELS, Quiet())
    monkeypatch.setattr(data, "MOST_BYTES_IN_MEMORY", 1000)
    late = images_from_folder(folder, CENTRAL, LABELS, Quiet())
    assert early.pixels is not None
    assert late.pixels is None
    for one, other in zip(batches(early, order, 1), batches(late, order, 1), strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.labels, other.labels)
    assert early.sha256() != late.sha256()


def test_an_unreadable_file_that_is_decoded_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    (folder / "dog" / "2.png").write_bytes(b"no image")
    monkeypatch.setattr(data, "MOST_BYTES_IN_MEMORY", 1000)
    images = images_from_folder(folder, SMALL, LABELS, Quiet())
    with pytest.raises(BadInput, match=r"2\.png: cannot be read as an image"):
        list(batches(images, Order(0, 3, augment=False), 0))


def test_augmentation_shifts_with_mirrored_edges_and_flips() -> None:
    """Every augmented image is a window of the image mirrored at its edges, seen from the front or from behind."""
    images = images_from_array(made_images(40, (8, 8), 3, 0), SMALL, "made")
    chosen = np.arange(40)
    found = images.batch(chosen, np.random.default_rng(0))
    windows_seen = set()
    for image, augmented in zip(images.batch(chosen, None), found, strict=True):
        wide = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
        windows = {
            (top, left, flip): wide[top : top + 8, left : left + 8][:, :: -1 if flip else 1]
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
        }
        matching = [place for place, window in windows.items() if np.array_equal(window, augmented)]
        assert matching
        windows_seen.update(matching)
    assert len(windows_seen) > 12


def test_a_margin_is_cropped_from_at_random(tmp_path: Path) -> None:
    images = images_from_folder(folder_of(tmp_path, size=(31, 31)), CENTRAL, None, Quiet())
    assert images.pixels is not None
    assert images.pixels.shape[1:3] == (28, 28)
    rng = np.random.default_rng(0)
    for _ in range(20):
        (found,) = images.batch(np.array([0]), rng)
        flips = (found, found[:, ::-1])
        windows = np.lib.stride_tricks.sliding_window_view(images.pixels[0], (20, 20, 3))[:, :, 0]
        assert any((windows == flip).all(axis=(2, 3, 4)).any() for flip in flips)


def test_greyscale_images_are_left_as_they_are() -> None:
    grey = Preprocess(size=(8, 8), resize=8, mean=(0.1,), std=(0.3,))
    images = images_from_array(made_images(4, (8, 8), 1, 0), grey, "made")
    (batch,) = batches(images, Order(seed=0, batch=4, augment=True), 0)
    assert np.array_equal(batch.pixels, images.batch(batch.indices, None))


def test_an_epoch_can_begin_in_its_middle() -> None:
    images = images_from_array(made_images(22, (8, 8), 3, 0), SMALL, "made")
    order = Order(seed=1, batch=4, augment=True)
    whole = list(batches(images, order, 2))
    rest = list(batches(images, order, 2, first=3))
    assert [len(whole), len(rest)] == [5, 2]
    for one, other in zip(whole[3:], rest, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
    seen = np.concatenate([batch.indices for batch in whole])
    assert len(set(seen.tolist())) == 20
    assert not np.array_equal(seen, np.concatenate([batch.indices for batch in batches(images, order, 3)]))


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    images = images_from_array(made_images(3, (8, 8), 3, 0), SMALL, "made")
    (batch,) = batches(images, Order(seed=1, batch=64, augment=False), 0)
    assert sorted(batch.indices.tolist()) == [0, 1, 2]
