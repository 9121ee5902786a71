"""The masks of RISE, occlusion and Score-CAM, and what the scores under them become, beside direct computations."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convoynet.server.client.errors import ClientError
from convoynet.server.explaining.masks import Occlusion, Rise, ScoreCam, squares
from convoynet.server.explaining.picture import Picture, picture_of
from convoynet.server.images.images import image_input_from_json

SIZE = (20, 26)
Score = Callable[[NDArray[np.float32]], float]


def test_a_rise_mask_is_its_grid_enlarged_and_shifted() -> None:
    masks = Rise(SIZE, 30, 4, 0.5, 3)
    cell = (5, 7)
    for index in range(masks.count):
        cells, top, left = masks.drawn(index)
        assert set(np.unique(cells)) <= {0, 1}
        whole = np.asarray(Image.fromarray(cells).resize((5 * cell[1], 5 * cell[0]), Image.Resampling.BILINEAR))
        assert 0 <= top < cell[0]
        assert 0 <= left < cell[1]
        wanted = whole[top : top + SIZE[0], left : left + SIZE[1]]
        assert masks.mask(index) == pytest.approx(wanted, abs=1e-5)


def test_rise_masks_are_of_the_seed_and_a_shorter_run_has_the_first() -> None:
    some, more, others = (Rise(SIZE, count, 7, 0.3, seed) for count, seed in ((5, 1), (300, 1), (5, 2)))
    assert all(np.array_equal(some.mask(index), more.mask(index)) for index in range(5))
    assert not any(np.array_equal(some.mask(index), others.mask(index)) for index in range(5))
    mean = np.mean([more.mask(index) for index in range(300)], axis=0)
    assert mean == pytest.approx(np.full(SIZE, 0.3), abs=0.1)


def test_rise_is_the_weighed_mean_of_the_masks() -> None:
    masks = Rise(SIZE, 40, 5, 0.4, 0)
    scores = np.random.default_rng(0).random(25)  # a run that was cut short
    for index, score in enumerate(scores):
        masks.add(index, score)
    wanted = sum(score * masks.mask(index) for index, score in enumerate(scores)) / (0.4 * 25)
    assert masks.evidence() == pytest.approx(wanted, abs=1e-5)


def test_rise_finds_the_pixel_that_the_score_is() -> None:
    masks = Rise(SIZE, 1500, 5, 0.5, 0)
    for index in range(masks.count):
        masks.add(index, float(masks.mask(index)[15, 4]))
    top, left = np.unravel_index(masks.evidence().argmax(), SIZE)
    assert abs(top - 15) <= 2
    assert abs(left - 4) <= 2


def occluded_directly(score: Score, image: NDArray[np.float32], window: int, stride: int) -> NDArray[np.float64]:
    """Square after square, as the paper has it."""
    fall, covered = np.zeros(SIZE), np.zeros(SIZE)
    top = 0
    while top == 0 or top - stride + window < SIZE[0]:
        left = 0
        while left == 0 or left - stride + window < SIZE[1]:
            hidden = image.copy()
            hidden[:, top : top + window, left : left + window] = 0.25
            fall[top : top + window, left : left + window] += score(image) - score(hidden)
            covered[top : top + window, left : left + window] += 1
            left += stride
        top += stride
    return fall / covered


def nonlinear(image: NDArray[np.float32]) -> float:
    weights = np.random.default_rng(5).standard_normal((3, *SIZE)).astype(np.float32)
    return float(np.tanh((weights * image).sum() / 20) + image.max())


def occluded(score: Score, image: NDArray[np.float32], window: int, stride: int) -> Occlusion:
    masks = Occlusion(SIZE, window, stride, 0, score(image))
    picture = Picture(image, np.full((3, 1, 1), 0.25, np.float32), channels_last=False)
    assert masks.count == squares(SIZE, window, stride)
    for index in range(masks.count):
        masks.add(index, score(picture.under([masks.mask(index)])[0]))
    return masks


@pytest.mark.parametrize(("window", "stride"), [(5, 5), (4, 3), (7, 2), (1, 1), (20, 20), (22, 6)])
def test_occlusion_is_the_mean_fall_behind_the_squares(window: int, stride: int) -> None:
    image = np.random.default_rng(1).random((3, *SIZE), np.float32)
    found = occluded(nonlinear, image, window, stride).evidence()
    assert found == pytest.approx(occluded_directly(nonlinear, image, window, stride), abs=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(5, 5), (4, 3), (7, 2)])
def test_occlusion_is_captums(window: int, stride: int) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    torch = pytest.importorskip("torch")

    def forward(batch: torch.Tensor) -> torch.Tensor:
        return torch.tensor([nonlinear(image.numpy()) for image in batch])

    image = np.random.default_rng(1).random((3, *SIZE), np.float32)
    wanted = attr.Occlusion(forward).attribute(
        torch.from_numpy(image[None]), (3, window, window), (3, stride, stride), baselines=0.25
    )
    found = occluded(nonlinear, image, window, stride).evidence()
    assert np.broadcast_to(found, (3, *SIZE)) == pytest.approx(wanted[0].numpy(), abs=1e-5)


def test_what_no_square_has_covered_is_not_known() -> None:
    masks = Occlusion(SIZE, 5, 5, 0, 1.0)
    corners = [np.argwhere(masks.mask(index) == 0)[0].tolist() for index in range(masks.count)]
    assert corners != sorted(corners)  # a run that is cut short has looked everywhere
    assert sorted(corners) == [[top, left] for top in range(0, 20, 5) for left in range(0, 26, 5)]
    masks.add(0, 0.25)
    found = masks.evidence()
    assert np.nanmin(found) == np.nanmax(found) == 0.75
    assert np.isnan(found).sum() == found.size - (masks.mask(0) == 0).sum()


def score_cam(score: Score, image: NDArray[np.float32], maps: NDArray[np.float32]) -> NDArray[np.float32]:
    masks = ScoreCam(SIZE, maps)
    picture = Picture(image, np.zeros((3, 1, 1), np.float32), channels_last=False)
    for index in range(masks.count):
        masks.add(index, score(picture.under([masks.mask(index)])[0]))
    return masks.evidence()


def test_score_cam_is_the_papers() -> None:
    """Equations 5 to 8, with maps that are enlarged, and made smaller; a flat channel has no part in it."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(3)
    image = random.random((3, *SIZE), np.float32)
    for small in ((4, 5), (1, 3), (41, 33)):
        maps = random.standard_normal((6, *small)).astype(np.float32)
        maps[2] = 3.0
        kept = torch.from_numpy(np.delete(maps, 2, axis=0))
        large = torch.nn.functional.interpolate(kept[None], SIZE, mode="bilinear", align_corners=False)[0].numpy()
        low, high = (edge(large, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
        scores = np.array([nonlinear(image * mask) for mask in (large - low) / (high - low)])
        weights = np.exp(scores - nonlinear(np.zeros_like(image)))
        wanted = np.maximum((weights / weights.sum()) @ large.reshape(5, -1), 0).reshape(SIZE)
        assert score_cam(nonlinear, image, maps) == pytest.approx(wanted, abs=1e-5)


def test_score_cam_is_torchcams() -> None:
    """At the size of the picture, where it is no matter that torchcam stretches the maps before they are enlarged."""
    methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3, padding=1), torch.nn.Softplus())
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(9, 4))
    network = torch.nn.Sequential(features, pooled).eval()
    image = torch.rand(1, 3, *SIZE)
    with methods.ScoreCAM(network, "0", input_shape=(3, *SIZE)) as extractor:
        network(image)
        (wanted,) = extractor(class_idx=2, normalized=False)

    def score(batch: NDArray[np.float32]) -> float:
        return float(network(torch.from_numpy(batch[None]))[0, 2])

    with torch.no_grad():
        maps = features(image)[0].numpy()
        found = score_cam(score, image[0].numpy(), maps)
    assert found == pytest.approx(wanted[0].numpy(), abs=1e-5)


def test_score_cam_that_is_cut_short_weighs_what_was_answered() -> None:
    maps = np.random.default_rng(3).random((5, 4, 4), np.float32)
    masks = ScoreCam(SIZE, maps)
    assert np.isnan(masks.evidence()).all()
    assert masks.lowest() == 0
    for index, score in enumerate((3.0, 1000.0)):  # so much more that the first is nothing beside it
        masks.add(index, score)
    alone = ScoreCam(SIZE, maps[1:2])
    alone.add(0, 1.0)
    assert masks.evidence() == pytest.approx(alone.evidence(), abs=1e-6)
    assert ScoreCam(SIZE, np.full((4, 3, 3), 0.5, np.float32)).count == 0


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_parts_are_hidden_behind_a_colour_or_the_mean(channels_last: bool, normalised: bool) -> None:
    stated = '{"color": "BGR", "resize": 4, "size": [4, 4], "interpolation": "nearest"'
    stated += ', "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1]}' if normalised else "}"
    image = np.random.default_rng(2).integers(0, 256, (4, 4, 3), np.uint8)
    expected = image[..., ::-1].astype(np.float32)
    mask = np.ones((4, 4), np.float32)
    mask[0], mask[1] = 0, 0.5
    for color, behind in (((10, 20, 30), [30.0, 20.0, 10.0]), (None, expected.mean((0, 1)))):
        picture = picture_of(png(image), image_input_from_json(stated, channels_last), color)
        (row,) = picture.under([mask])
        row = row if channels_last else row.transpose(1, 2, 0)
        wanted = mask[..., None] * expected + (1 - mask[..., None]) * np.array(behind)
        if normalised:
            wanted = (wanted / 255 - 0.5) / np.array([0.25, 0.5, 1])
            assert row == pytest.approx(wanted, abs=1e-5)
        else:
            assert row.dtype == np.uint8
            assert np.abs(row - wanted).max() <= 0.5 + 1e-4
        kept = picture.row if channels_last else picture.row.transpose(1, 2, 0)
        assert np.array_equal(row[2:], kept[2:])


def test_a_picture_is_an_image_that_is_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    small = image_input_from_json('{"color": "RGB", "resize": 4, "size": [4, 4], "interpolation": "box"}', False)
    with pytest.raises(ClientError, match="5 bytes are not a readable image"):
        picture_of(b"words", small, None)
    large = image_input_from_json(
        '{"color": "RGB", "resize": [6000, 6000], "size": [6000, 6000], "interpolation": "box"}', False
    )
    with pytest.raises(ClientError, match="6000x6000 pixels has 108,000,000 bytes, 67,108,864 are allowed"):
        picture_of(png(np.zeros((4, 4, 3), np.uint8)), large, None)
