import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from convoynet.exporter.commands.inspect_command import inspect
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.looking.concept_folders import MOST_CONCEPTS, concepts_in
from convoynet.exporter.looking.concepts import Concepts, Verdict, class_labels, concepts_of, images_of_classes
from convoynet.exporter.looking.found import Found
from convoynet.exporter.looking.opened import Opened, open_graph
from convoynet.exporter.looking.page import html, pictures_of
from convoynet.exporter.looking.vectors import probability, require_library, vectors
from convoynet.exporter.progress import Quiet
from tests.exporter.looking.conftest import PREPROCESS, SIZE, Net, opened

pytest.importorskip("sklearn", reason="needs convoynet[concepts]")
COUNT = 12


class Redness(nn.Module):
    """Channels that see red, edges and light; class 0 is red, class 1 is not, class 2 is light, class 3 is nothing."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3, padding=1)
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            conv.weight[0, :, 1, 1] = torch.tensor([1, -0.5, -0.5])
            conv.weight[1, :, 1, 0], conv.weight[1, :, 1, 2] = 1, -1
            conv.weight[2, :, 1, 0], conv.weight[2, :, 1, 2] = -1, 1
            conv.weight[3, :, 1, 1] = 1
        self.features = nn.Sequential(conv, nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 4)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.weight[0, 0], self.head.weight[1, 0], self.head.weight[2, 3] = 1, -1, 1

    def forward(self, x: Tensor) -> Tensor:
        # Not linear: where there is more red the score rises faster.
        scores: Tensor = self.head(self.features(x).square().mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def redness() -> Opened:
    return opened(Redness())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Random pictures; some of the same colours with stripes, which are not any redder; red ones; and a class's."""
    root, random = tmp_path_factory.mktemp("concepts"), np.random.default_rng(0)
    stripes = 60 * (np.arange(SIZE[1]) // 2 % 2)[None, :, None]
    for index in range(COUNT):
        colour = random.integers(60, 130, 3) + random.integers(-10, 11, (*SIZE, 3))
        for name, pixels in (
            ("random", colour),
            ("concepts/stripes", colour + stripes),
            ("concepts/red", colour + np.array([90, 0, 0])),
            ("images", colour + np.array([60, 0, 0])),
        ):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:02}.png")
    return {name: root / name for name in ("random", "concepts", "images")}


def looked(network: Opened, folders: Mapping[str, Path], named: str, runs: int = 20) -> Concepts:
    concepts = concepts_in(folders["concepts"], folders["random"], 300)
    images = images_of_classes(folders["images"], named, class_labels(network), 300)
    return concepts_of(network, network.layer("features"), concepts, images, runs, Quiet())


def by_concept(found: Concepts) -> dict[str, Verdict]:
    return {one.concept: one for one in found.tested}


@pytest.fixture(scope="module")
def found(redness: Opened, folders: Mapping[str, Path]) -> Concepts:
    return looked(redness, folders, "class 0")


def test_red_speaks_for_what_reads_redness_and_stripes_are_not_told_from_random(found: Concepts) -> None:
    tested = by_concept(found)
    red, stripes = tested["red"], tested["stripes"]
    assert (red.score, red.deviation, red.significant, red.said) == (1, 0, True, "for the class")
    assert red.p < 1e-3
    assert red.random == pytest.approx(0.5)
    assert (stripes.significant, stripes.said) == (False, "not told from random")
    assert stripes.p > 0.1
    # The layer does see the stripes: it is the class that does not.
    assert all(one.accuracy > 0.8 for one in found.told)
    assert (red.label, red.index, red.images, found.told[0].drawn) == ("class 0", 0, COUNT, COUNT // 2)


def test_a_concept_speaks_against_a_class(redness: Opened, folders: Mapping[str, Path]) -> None:
    red = by_concept(looked(redness, folders, "1", 12))["red"]
    assert (red.score, red.significant, red.said) == (0, True, "against the class")


def test_a_class_that_the_layer_has_no_part_in_is_refused(redness: Opened, folders: Mapping[str, Path]) -> None:
    with pytest.raises(BadInput, match="no gradient of class 3 arrives at features on its images"):
        looked(redness, folders, "class 3")

    class Deaf(Redness):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(BadInput, match="no gradient of class 0 arrives at features"):
        looked(opened(Deaf()), folders, "class 0")


def test_a_derivative_is_what_a_step_along_the_vector_makes_of_the_score(network: Opened, pixels: np.ndarray) -> None:
    layer, vector = network.layer("block"), torch.linspace(-1, 1, 6)
    inputs = network.inputs(pixels)
    maps, output = network.behind(layer, inputs)
    assert isinstance(output, Tensor)
    (gradient,) = torch.autograd.grad(output[:, 2].sum(), maps)
    expected = (gradient.sum((2, 3)) @ vector).numpy()
    made = []
    for step in (-1e-3, 1e-3):
        handle = layer.module.register_forward_hook(lambda *given, by=step: given[2] + by * vector[:, None, None])
        with torch.no_grad():
            made.append(network.run(inputs)[:, 2].numpy())  # type: ignore[index]
        handle.remove()
    np.testing.assert_allclose((made[1] - made[0]) / 2e-3, expected, rtol=0.05, atol=1e-3)


def test_a_graph_has_the_scores_of_the_network(redness: Opened, folders: Mapping[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(onnx_from_torch(redness.network, PREPROCESS, uint8_input=True).SerializeToString())
    graph = open_graph("graph", file, None, (PREPROCESS, []))
    assert class_labels(graph) == ["0", "1", "2", "3"]
    concepts = concepts_in(folders["concepts"], folders["random"], 300)
    images = images_of_classes(folders["images"], "0", class_labels(graph), 300)
    made = concepts_of(graph, graph.last_map(), concepts, images, 12, Quiet())
    # What follows in the graph is a map too, of squares.
    assert by_concept(made)["red"].score == 1
    assert by_concept(made)["red"].significant
    assert not by_concept(made)["stripes"].significant


def test_without_random_pictures_each_is_held_against_the_others(redness: Opened, folders: Mapping[str, Path]) -> None:
    concepts = concepts_in(folders["concepts"], None, 11)
    assert [(one.name, len(one.pictures), len(one.others), one.apart) for one in concepts] == [
        ("red", 11, 11, False),
        ("stripes", 11, 11, False),
    ]
    assert {file.parent.name for file in concepts[0].others} == {"stripes"}
    images = images_of_classes(folders["images"], "0", class_labels(redness), 4)
    assert (len(images[0]), images[1]) == (4, f"4 of the {COUNT} images in {folders['images']}, of class 0")
    made = concepts_of(redness, redness.layer("features"), concepts, images, 10, Quiet())
    assert by_concept(made)["red"].score == 1
    assert by_concept(made)["stripes"].score == 0
    assert any("each concept was held against the others" in note for note in made.notes)
    assert any("fewer than 10 images" in note for note in made.notes)


def test_a_probability_is_the_larger_the_more_the_runs_share() -> None:
    ones, halves = np.ones(20), np.tile((0.0, 1.0), 10)
    assert probability(halves, halves, 1) == 1
    assert probability(np.ones(4), np.zeros(4), 1) == 0
    # t = 0.5 / sqrt(0.2632 / 20) = 4.3589 with 19 degrees of freedom.
    assert probability(ones, halves, 1) == pytest.approx(3.37e-4, rel=0.01)
    scores = np.tile((0.7, 1.0), 10)
    assert probability(scores, halves, 0) < probability(scores, halves, 0.5) < probability(scores, halves, 1)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 1.5])
def test_of_concepts_that_make_no_difference_few_are_taken_for_one(shift: float) -> None:
    """And of those that make one most are found. The concept lies across the gradient, and is always told apart."""
    random, wrong, naive = np.random.default_rng(1), 0, 0
    for trial in range(60):
        gradient, concept, others = random.normal(size=8), random.normal(size=(30, 8)), random.normal(size=(60, 8))
        across = random.normal(size=8)
        across -= across @ gradient / (gradient @ gradient) * gradient
        concept += 3 * across / np.linalg.norm(across) + shift * gradient / np.linalg.norm(gradient)
        made = vectors(concept, others, 30, trial)
        both_ways = np.concatenate((made.random, -made.random))
        scores, by_chance = ((some @ gradient > 0).astype(float) for some in (made.concept, both_ways))
        wrong += probability(scores, by_chance, made.overlap) < 0.05
        naive += probability(scores, by_chance, 0) < 0.05
    if shift:
        assert wrong > 50
    else:
        assert wrong <= 8
        assert naive > 15  # as the paper tests


def test_the_page_carries_the_concepts_and_nothing_from_elsewhere(redness: Opened, found: Concepts) -> None:
    everything = Found(redness, concepts=found)
    page = html(everything, pictures_of(everything, 0, Quiet()))
    assert page.count("data:image/jpeg;base64,") == 2 * 3
    assert page.count('<rect class="told"') == 1
    assert page.count('<rect class="untold"') == 1
    assert "not told from random" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page


def write(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda root: write(root / "c/red", 3), "c/red: 3 pictures; a concept needs 10 or more"),
        (lambda root: write(root / "c/red", 10) and write(root / "c/none", 0), "c/none: 0 pictures"),
        (lambda root: write(root / "c/red", 10), "c holds one concept, red, and nothing to tell it from: add --random"),
        (lambda root: write(root / "c", 1), "c/0.png: lies in no folder that has a concept's name"),
        (lambda root: write(root / "c/red", 10) and write(root / "r", 9), "--random {root}/r: 9 pictures"),
        (lambda root: write(root / "c/red", 10) and (root / "r").symlink_to(root / "c"),
         "--random {root}/r: holds 10 of the pictures of red too"),
        (lambda root: [write(root / f"c/{index}", index == 0) for index in range(MOST_CONCEPTS + 1)],
         f"c: holds {MOST_CONCEPTS + 1} folders, and {MOST_CONCEPTS} concepts at a time are the most"),
        (lambda root: None, "c: no such folder of images"),
    ],
)  # fmt: skip
def test_folders_of_concepts_that_will_not_do_are_one_line(
    make: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    make(tmp_path)
    random = tmp_path / "r"
    with pytest.raises(BadInput, match=re.escape(told.format(root=tmp_path))) as caught:
        concepts_in(tmp_path / "c", random if random.exists() else None, 300)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("class 4", "--class 'class 4' is no class; a class is named by one of the 4 labels ('class 0', ...)"),
        ("4", "by an index from 0 to 3"),
        ("-1", "--class '-1' is no class"),
        (None, "lies in no class folder"),
    ],
)
def test_a_class_that_there_is_not_is_one_line(
    redness: Opened, folders: Mapping[str, Path], named: str | None, told: str
) -> None:
    with pytest.raises(BadInput, match=re.escape(told)):
        images_of_classes(folders["images"], named, class_labels(redness), 300)


def test_what_has_no_classes_or_says_the_same_of_all_is_one_line(folders: Mapping[str, Path]) -> None:
    with pytest.raises(BadInput, match="net is no classifier"):
        class_labels(opened(nn.Conv2d(3, 2, 3)))
    blind = Redness()
    nn.init.zeros_(blind.features[0].get_parameter("weight"))
    nn.init.ones_(blind.features[0].get_parameter("bias"))
    with pytest.raises(BadInput, match="features does not tell red from anything: its units have the same mean"):
        looked(opened(blind), folders, "0")


def test_where_scikit_learn_is_missing_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(Missing, match=r"pip install 'convoynet\[concepts\]' brings it"):
        require_library()


def test_the_command_tells_the_concepts_of_a_trained_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convoynet.exporter.assets import digits

    packaged = digits()
    for index, (image, label) in enumerate(zip(packaged.test[:150], packaged.test_labels[:150], strict=True)):
        concept = "concepts/round" if label in (0, 6, 9) else "concepts/straight" if label in (1, 7) else "random"
        for name in (concept, *([f"images/{label}"] if label in (0, 1) else [])):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.squeeze(image)).save(tmp_path / name / f"{index}.png")
    page = tmp_path / "concepts.html"
    line = ["lenet5", *(f"--{name}={tmp_path / name}" for name in ("concepts", "random", "images")), "--runs", "10"]
    assert inspect([*line, "--layer", "s4", "--json", "--html", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["units"] is None
    assert [one["concept"] for one in told["concepts"]["concepts"]] == ["round", "straight"]
    assert [(one["concept"], one["class"]) for one in told["concepts"]["scores"]] == [
        *(("round", "0"), ("round", "1"), ("straight", "0"), ("straight", "1"))
    ]
    assert "Which concepts count at s4" in page.read_text()
    assert len(list_images(tmp_path / "images")) == int(told["concepts"]["images"].split()[0])
    assert inspect([*line[:-1], "12", "--layer", "s44"]) == 2
    said = capsys.readouterr().err
    assert "did you mean s4" in said
    assert said.count("\n") == 1


def test_a_network_of_ours_is_left_as_it_was(network: Opened, pixels: np.ndarray) -> None:
    """The layer is called twice, and what comes behind works in place."""
    inputs = network.inputs(pixels)
    before = network.run(inputs)
    maps, output = network.behind(network.layer("relu"), inputs)
    torch.testing.assert_close(output, before)
    assert isinstance(output, Tensor)
    assert torch.autograd.grad(output.sum(), maps)[0].abs().max() > 0
    assert isinstance(network.network, Net)
    assert not network.network.relu._forward_hooks
