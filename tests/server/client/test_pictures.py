"""What is drawn where, and which files a picture may take the place of."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoynet.server.client.pictures import (
    box_color,
    detection_picture,
    picture_paths,
    save_picture,
    segmentation_picture,
    voc_color,
)
from convoynet.server.client.results import Detection, segmentation


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_voc_colors_are_the_published_ones() -> None:
    published = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
        12: (64, 0, 128), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    assert {index: voc_color(index) for index in published} == published
    assert len({voc_color(index) for index in range(1000)}) == 1000


def test_neighbouring_classes_have_boxes_of_different_colors() -> None:
    colors = np.array([box_color(index) for index in range(91)], int)
    assert np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 150


def test_a_mask_is_half_the_color_and_the_background_and_the_unseen_stay() -> None:
    classes = np.array([[0, 1], [2, -1]], np.int32).repeat(100, 0).repeat(150, 1)
    found = segmentation(classes, ["__background__", "cat"])
    assert [(each.label, each.share) for each in found.shares] == [
        ("__background__", pytest.approx(1 / 3)),
        ("cat", pytest.approx(1 / 3)),
        ("2", pytest.approx(1 / 3)),
    ]
    picture = segmentation_picture(png(Image.new("RGB", (300, 200), (200, 100, 50))), found)
    assert picture.width == 300
    at = {point: picture.getpixel(point) for point in ((149, 99), (150, 99), (149, 100), (150, 100), (299, 199))}
    assert at == {
        (149, 99): (200, 100, 50),
        (150, 99): (164, 50, 25),
        (149, 100): (100, 114, 25),
        (150, 100): (200, 100, 50),
        (299, 199): (200, 100, 50),
    }
    legend = np.asarray(picture)[200:].reshape(-1, 3).tolist()
    assert [128, 0, 0] in legend
    assert [0, 128, 0] in legend
    assert [0, 0, 0] in legend  # the names


@pytest.mark.parametrize("size", [(8, 6), (30, 400), (700, 20)], ids=str)
def test_the_legend_is_beside_the_image_whatever_its_size(size: tuple[int, int]) -> None:
    labels = [f"class number {index}" for index in range(12)]
    classes = np.resize(np.arange(12, dtype=np.int32), size[::-1])
    image = Image.new("RGB", size)
    picture = segmentation_picture(png(image), segmentation(classes, labels))
    half = np.array([voc_color(index) for index in range(12)])[classes] // 2
    np.testing.assert_array_equal(np.asarray(picture)[: size[1], : size[0]], half)
    below = {tuple(pixel) for pixel in np.asarray(picture)[size[1] :].reshape(-1, 3).tolist()}
    assert {voc_color(index) for index in range(12)} <= below


def test_boxes_have_edges_in_their_colors_and_nothing_inside() -> None:
    found = [
        Detection("cat", 1, 0.9, (100.0, 50.0, 180.0, 190.0)),
        Detection("dog", 2, 0.6, (0.0, 0.0, 300.0, 200.0)),
    ]
    pixels = np.asarray(detection_picture(png(Image.new("RGB", (300, 200), "white")), found)).astype(int)
    is_cat, is_dog = (pixels == box_color(1)).all(axis=2), (pixels == box_color(2)).all(axis=2)
    rows, columns = np.nonzero(is_cat)
    assert (columns.min(), columns.max(), rows.max()) == (100, 179, 189)
    assert is_cat[50:190, 100:102].all()
    assert is_cat[50:190, 178:180].all()
    assert is_cat[188:190, 100:180].all()
    assert (pixels[60:180, 110:170] == 255).all()
    assert is_dog[198:200].all()
    assert is_dog[:, 298:300].all()
    # Captions: filled, the cat's above its box, the dog's within the picture.
    assert is_cat[32:50, 100:140].mean() > 0.4
    assert is_dog[:14, :40].mean() > 0.4
    assert (pixels[32:50, 100:140] == 0).all(axis=2).any() or (pixels[32:50, 100:140] == 255).all(axis=2).any()


def test_a_caption_at_the_edge_stays_in_the_picture() -> None:
    found = [Detection("dog", 2, 0.6, (280.0, 0.0, 300.0, 30.0))]
    pixels = np.asarray(detection_picture(png(Image.new("RGB", (300, 200))), found))
    columns = np.nonzero((pixels == box_color(2)).all(axis=2).any(axis=0))[0]
    assert columns.min() < 260


def test_no_file_of_somebody_else_is_replaced(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("cat.png", "a/cat.jpg", "b/Cat.webp", "dog.jpg")]
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    (tmp_path / "dog.png").write_text("not even a picture")
    # Names that differ in case alone are one file on some systems.
    assert [path.name for path in picture_paths(images, tmp_path / "new")] == [
        "cat.png",
        "cat-2.png",
        "Cat-3.png",
        "dog.png",
    ]
    del images[2]
    names = [path.name for path in picture_paths(images, tmp_path)]
    assert names == ["cat-2.png", "cat-3.png", "dog-2.png"]
    save_picture(Image.new("RGB", (4, 4)), tmp_path / "cat-2.png")
    assert [path.name for path in picture_paths(images, tmp_path)] == names  # its own it does replace
