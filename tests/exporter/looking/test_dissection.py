import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from convoynet.exporter.commands.inspect_command import inspect
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.data.images import Preprocess, load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.concept_folders import masks_in
from convoynet.exporter.looking.dissection import SHARE, Overlaps, mask_of, most_pictures, on_maps, overlaps_of
from convoynet.exporter.looking.found import Found
from convoynet.exporter.looking.opened import Box, Opened
from convoynet.exporter.looking.page import html, pictures_of
from convoynet.exporter.progress import Quiet
from tests.exporter.looking.conftest import PREPROCESS, SIZE, opened

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise without red, with a square of it; masks of the squares, of squares beside them by half, and of corners."""
    root, random = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for index in range(COUNT):
        name = f"deep/{index}"
        pixels = random.integers(0, 200, (*SIZE, 3))
        pixels[..., 0] = 0
        top, left = 2 + index, 1 + index
        pixels[top : top + 8, left : left + 6, 0] = 255
        masks = np.zeros((3, *SIZE), np.uint8)
        masks[0, top : top + 8, left : left + 6] = 255
        masks[1, top : top + 8, left + 3 : left + 9] = 1
        masks[2, -2:, -2:] = 255
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{name}.png")
        for concept, mask in zip(("square", "beside", "corner"), masks, strict=True):
            if concept == "corner" and index % 2:
                continue
            (root / "masks" / concept / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "masks" / concept / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def network() -> Opened:
    """Unit 0 is on where it is red, unit 1 reads green, unit 2 is dead."""
    layer = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()  # type: ignore[union-attr]
        layer.weight[0, 0], layer.weight[1, 1] = 1, 1
    return opened(nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def looked(network: Opened, folder: Path, layer: str = "1") -> Overlaps:
    images = folder / "images"
    files = list_images(images)
    masks = masks_in(folder / "masks", images, files)
    return overlaps_of(network, network.layer(layer), (images, files, "pictures"), masks, Quiet())


@pytest.fixture(scope="module")
def found(network: Opened, folder: Path) -> Overlaps:
    return looked(network, folder)


def test_a_unit_that_is_the_detector_overlaps_its_masks_wholly(found: Overlaps) -> None:
    names = [each.concept for each in found.masks]
    assert names == ["beside", "corner", "square"]
    assert found.iou[0].tolist() == [pytest.approx(1 / 3), 0, 1]
    assert found.iou[1].max() < 0.1  # green is noise
    assert found.iou[2].tolist() == [0, 0, 0]
    assert (found.detectors(2), found.detectors(0), found.best(2)[0]) == ([0], [], 0)
    assert found.shown == [pytest.approx(48 / 480), pytest.approx(4 / 480), pytest.approx(48 / 480)]
    assert [len(each.by_picture) for each in found.masks] == [COUNT, COUNT // 2, COUNT]
    told = json.loads(json.dumps(found.to_json()))
    assert told["units"][2] == {"unit": 2, "threshold": None, "iou": {"beside": 0, "corner": 0, "square": 0}}
    assert told["concepts"][2] == {"concept": "square", "masks": COUNT, "share": pytest.approx(0.1), "detectors": [0]}


def test_a_unit_is_on_in_its_highest_share(network: Opened, folder: Path, found: Overlaps) -> None:
    """Of numbers that hardly meet, as of the paper's; green has 200 of them, so some do."""
    files = list_images(folder / "images")
    with torch.no_grad():
        maps = network.maps(found.layer, network.inputs(load_images(files, PREPROCESS)))
    on = on_maps(network, found.layer, maps, found.thresholds)
    kept = int(SHARE * maps[:, 1].numel())
    expected = maps[:, 1].flatten().sort(descending=True).values[kept - 1]
    assert (on[:, 1] == (maps[:, 1] >= expected)).all()
    assert not on[:, 2].any()
    assert torch.equal(found.highest, maps.flatten(2).amax(2))


def test_a_map_is_as_large_as_the_image_with_the_middles_of_fields_where_they_are() -> None:
    """A stride of 4 with a window of 3 and no padding: the first field is about pixel 1."""
    network = opened(nn.Sequential(nn.Conv2d(3, 2, 3, stride=4), nn.ReLU()))
    layer = network.layer("1")
    maps = torch.rand((1, 2, *layer.size), generator=torch.Generator().manual_seed(0))
    for row, column in ((0, 0), (2, 3), (layer.size[0] - 1, layer.size[1] - 1)):
        value = maps[0, :, row, column]
        place = (0, slice(None), 1 + 4 * row, 1 + 4 * column)
        assert on_maps(network, layer, maps, value - 1e-5)[place].all()
        assert not on_maps(network, layer, maps, value + 1e-5)[place].any()


def test_behind_squeeze_and_excitation_a_unit_is_where_it_was(folder: Path) -> None:
    """Each place sees the whole image there; the gate is a half everywhere."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.gate, self.behind = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
            with torch.no_grad():
                self.before.weight.copy_(torch.eye(3)[:, :, None, None])
                self.gate.weight.zero_()
                self.behind.weight.copy_(self.before.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            x = self.behind(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())
            return x.mean((2, 3))

    network = opened(Gated())
    before, behind = (looked(network, folder, layer) for layer in ("before", "behind"))
    assert before.iou[0, 2] == 1
    assert behind.iou == pytest.approx(before.iou)
    height, width = SIZE
    box = network.box(network.layer("behind"), (0, 0))
    assert box is not None
    assert box.within(SIZE) == Box(0, 0, height, width)


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (np.uint8([[[1, 0, 0], [0, 0, 0]]]), "RGB"),  # which is black in grey
        (np.uint8([[[0, 0, 1, 255], [0, 0, 0, 255]]]), "RGBA"),
        (np.uint16([[2, 0]]), "I;16"),  # as a number of 8 bits it is none
        (np.uint8([[1, 0]]), "L"),
    ],
)
def test_every_colour_but_black_is_the_concept(network: Opened, tmp_path: Path, pixels: np.ndarray, mode: str) -> None:
    large = pixels.repeat(SIZE[0], axis=0).repeat(SIZE[1] // 2, axis=1)
    image = Image.fromarray(large)
    assert image.mode == mode
    image.save(tmp_path / "m.png")
    shown = mask_of(
        opened(network.network, preprocess=Preprocess(SIZE, SIZE, (0.5,) * 3, (0.25,) * 3)), tmp_path / "m.png"
    )
    assert shown[:, : SIZE[1] // 2].all()
    assert not shown[:, SIZE[1] // 2 :].any()


def test_the_colour_of_an_index_counts_and_not_the_index(network: Opened, tmp_path: Path) -> None:
    image = Image.new("P", SIZE[::-1], 3)
    image.putpalette([255, 255, 255] * 3 + [0, 0, 0] + [9, 9, 9])
    image.paste(4, (0, 0, 5, SIZE[0]))
    image.save(tmp_path / "m.png", transparency=0)
    shown = mask_of(
        opened(network.network, preprocess=Preprocess(SIZE, SIZE, (0.5,) * 3, (0.25,) * 3)), tmp_path / "m.png"
    )
    assert shown.any(dim=0).nonzero().flatten().tolist() == list(range(5))


def test_a_mask_is_cut_as_its_picture_is(network: Opened, tmp_path: Path) -> None:
    mask = np.zeros((60, 100), np.uint8)
    mask[:, 40:50] = 7
    Image.fromarray(mask).save(tmp_path / "m.png")
    for fit, expected in (("crop", range(5, 10)), ("pad", range(8, 10))):
        cut = opened(network.network, preprocess=Preprocess(SIZE, 30, (0.5,) * 3, (0.25,) * 3, fit=fit))
        shown = mask_of(cut, tmp_path / "m.png")
        assert shown.shape == SIZE
        columns = shown.any(dim=0).nonzero().flatten().tolist()
        assert columns == list(expected)


def test_the_page_carries_the_masks_and_nothing_from_elsewhere(network: Opened, found: Overlaps) -> None:
    everything = Found(network, overlaps=found)
    page = html(everything, pictures_of(everything, 0, Quiet()))
    assert "unit 0, overlap 1.000" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_as_many_pictures_are_looked_at_as_fit(network: Opened) -> None:
    layer = network.layer("1")
    assert most_pictures(layer) == 2**28 // (3 * (4 + 0.02 * SIZE[0] * SIZE[1]))


def save(file: Path, width: int = 8, height: int = 8) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height)).save(file)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda root: save(root / "masks/wheel/car.png", 8, 9),
         "masks/wheel/car.png: 8x9 pixels, and {root}/images/car.jpg has 8x8"),
        (lambda root: save(root / "masks/wheel/cart.png"),
         "there is no picture {root}/images/cart that it could be of; did you mean {root}/images/car.jpg?"),
        (lambda root: save(root / "masks/wheel/zzz.png"), "a mask has its picture's name and folder"),
        (lambda root: save(root / "masks/car.png"), "masks/car.png: lies in no folder that has a concept's name"),
        (lambda root: [save(root / f"masks/wheel/car.{kind}") for kind in ("png", "bmp")], "are both of"),
        (lambda root: [save(root / name) for name in ("images/car.png", "masks/wheel/car.png")],
         "2 pictures in {root}/images have its name, car.jpg and car.png"),
        (lambda root: save(root / "masks/wheel/bus.png"), "none of its 1 masks is of one of the 1 pictures"),
        (lambda root: save(root / "masks/wheel/car.png") or (root / "masks/door").mkdir(), "door: holds no mask"),
        (lambda root: save(root / "masks/wheel/car.png") or (root / "masks/wheel/car.png").write_text("no"),
         "car.png: cannot be read as an image"),
    ],
)  # fmt: skip
def test_masks_that_will_not_do_are_one_line(make: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    for name in ("car", "bus"):
        save(tmp_path / f"images/{name}.jpg")
    make(tmp_path)
    with pytest.raises(BadInput, match=re.escape(told.format(root=tmp_path))) as caught:
        masks_in(tmp_path / "masks", tmp_path / "images", [tmp_path / "images/car.jpg"])
    assert "\n" not in str(caught.value)


def test_masks_that_show_nothing_and_too_few_places_are_one_line(network: Opened, tmp_path: Path) -> None:
    save(tmp_path / "images/car.jpg", SIZE[1], SIZE[0])
    save(tmp_path / "masks/wheel/car.png", SIZE[1], SIZE[0])
    with pytest.raises(BadInput, match="the masks of wheel are all black where net looks"):
        looked(network, tmp_path)
    coarse = opened(nn.Sequential(nn.Conv2d(3, 2, 8, stride=8), nn.ReLU()))
    with pytest.raises(BadInput, match=r"1 pictures have 6 places in 1, and 0\.5% of them are none"):
        looked(coarse, tmp_path)


def test_the_command_tells_the_overlaps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "masks.html"
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/square").symlink_to(folder / "masks/square")
    line = ["lenet5", "--images", str(folder / "images"), "--masks", str(tmp_path / "masks"), "--layer", "c1"]
    assert inspect([*line, "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "6 units over 28x28 places; on 6 of the 6 images" in said
    assert "Which units of c1 detect what masks show" in page.read_text()
    assert inspect([*line[:-1], "s22"]) == 2
    assert "did you mean s2" in capsys.readouterr().err
