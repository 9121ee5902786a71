"""Which class or object is explained, and its score in each answer."""

from __future__ import annotations

import numpy as np
import pytest

from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client.errors import ClientError
from convoynet.server.explaining.subject import Classifier, Detector, Target, Wanted, check

LOGITS = {"logits": np.array([[1, 3, 2, 3]], np.float32)}


def classifier(activation: str = "", labels: tuple[str, ...] = ("cat", "crane", "dog", "crane")) -> Classifier:
    config = ModelConfig(name="net")
    config.output.add(name="logits")
    if activation:
        config.parameters["activation"].string_value = activation
    return Classifier(config, labels)


@pytest.mark.parametrize(
    ("activation", "score"),
    [("", 3), ("none", 3), ("softmax", np.exp(3) / (np.exp([1, 3, 2, 3]).sum())), ("sigmoid", 1 / (1 + np.exp(-3)))],
)
def test_the_winner_is_explained_by_its_probability_where_there_is_one(activation: str, score: float) -> None:
    subject = classifier(activation)
    target = subject.target(LOGITS, Wanted())
    assert target == Target("crane", 1, pytest.approx(score))
    assert subject.scores(LOGITS, target).tolist() == [target.score]


@pytest.mark.parametrize(("name", "index"), [("dog", 2), ("0", 0), ("3", 3)])
def test_a_class_is_named_by_its_label_or_number(name: str, index: int) -> None:
    assert classifier().target(LOGITS, Wanted(name)).class_index == index


def test_a_number_is_no_label() -> None:
    assert classifier(labels=("3", "2", "1", "0")).target(LOGITS, Wanted("0")).class_index == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(object=1), "--object 1 is for a detector; model 'net' has classes: say --class"),
        (Wanted("crane"), r"--class crane: classes 1, 3 of model 'net' have this label; give a number"),
        (Wanted("4"), r"--class 4: model 'net' has the classes 0 to 3, or a label such as 'cat'"),
        (Wanted("-1"), r"--class -1: model 'net' has the classes 0 to 3"),
        (Wanted("cow"), r"--class cow: model 'net' has the classes 0 to 3"),
        (Wanted(""), r"--class : model 'net' has the classes 0 to 3"),
        (Wanted(object=2), r"--object 2 is for a detector"),
    ],
)
def test_a_class_that_there_is_not_is_one_line(wanted: Wanted, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        classifier().target(LOGITS, wanted)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ClientError, match="'net' answers no finite numbers in 'logits'"):
        classifier().target({"logits": np.array([[1, np.nan]], np.float32)}, Wanted())


def detector() -> Detector:
    config = ModelConfig(name="net")
    config.parameters["labels"].string_value = '["nothing", "frog", "bird"]'
    for name in Detector.outputs:
        config.output.add(name=name)
    return Detector(config)


def found(*rows: list[tuple[float, int, tuple[float, float, float, float]]]) -> dict[str, np.ndarray]:
    """An answer with room for four objects in each row; what is behind those that count is of no meaning."""
    answer = {
        "boxes": np.full((len(rows), 4, 4), np.nan, np.float32),
        "scores": np.full((len(rows), 4), 9, np.float32),
        "labels": np.ones((len(rows), 4), np.int64),
        "count": np.array([[len(row)] for row in rows]),
    }
    for at, row in enumerate(rows):
        for place, (score, label, box) in enumerate(row):
            answer["scores"][at, place], answer["labels"][at, place] = score, label
            answer["boxes"][at, place] = box
    return answer


THERE = [(0.5, 2, (0, 0, 4, 4)), (0.75, 1, (10, 10, 20, 20)), (0.25, 1, (0, 0, 10, 10)), (0.9, 1, (5, 5, 5, 9))]


@pytest.mark.parametrize(
    ("wanted", "label", "score"),
    [
        (Wanted(), "frog", 0.75),
        (Wanted(object=2), "bird", 0.5),
        (Wanted("frog", 2), "frog", 0.25),
        (Wanted("2"), "bird", 0.5),
    ],
)
def test_an_object_is_named_by_its_rank_and_class(wanted: Wanted, label: str, score: float) -> None:
    target = detector().target(found(THERE), wanted)  # the box without an area is no object
    assert (target.label, target.score) == (label, score)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(object=4), "--object 4: model 'net' finds 3 objects in it"),
        (Wanted("bird", 2), "--object 2: model 'net' finds 1 object of class bird in it"),
        (Wanted("nothing"), "--object 1: model 'net' finds no objects of class nothing in it"),
        (Wanted("fish"), "--class fish: model 'net' has the classes 0 to 2"),
    ],
)
def test_an_object_that_there_is_not_is_one_line(wanted: Wanted, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        detector().target(found(THERE), wanted)


def test_of_a_detector_without_labels_any_number_may_be_a_class() -> None:
    config = ModelConfig(name="net")
    for name in Detector.outputs:
        config.output.add(name=name)
    assert Detector(config).target(found(THERE), Wanted("2")).label == "2"
    with pytest.raises(ClientError, match="finds no objects of class 7 in it"):
        Detector(config).target(found(THERE), Wanted("7"))
    with pytest.raises(ClientError, match="--class frog: model 'net' has no labels; give a number"):
        Detector(config).target(found(THERE), Wanted("frog"))


def test_an_objects_score_is_the_best_of_its_class_times_the_overlap() -> None:
    subject = detector()
    target = subject.target(found(THERE), Wanted())
    answer = found(
        THERE,
        [(0.9, 2, (10, 10, 20, 20))],  # of another class
        [(0.8, 1, (10, 10, 20, 15)), (0.9, 1, (15, 15, 25, 25)), (0.3, 1, (10, 10, 20, 20))],
        [],
    )
    # Half of the box; a quarter of it and as much outside (25 of 175); all of it.
    assert subject.scores(answer, target) == pytest.approx([0.75, 0, max(0.4, 0.9 * 25 / 175, 0.3), 0])


def test_a_task_without_one_score_is_one_line() -> None:
    config = ModelConfig(name="net")
    config.parameters["task"].string_value = "segmentation"
    with pytest.raises(ClientError, match="'net' is for segmentation: what is explained is one class or one object"):
        check(config)
    config.parameters["task"].string_value = "detection"
    config.output.add(name="boxes")
    with pytest.raises(ClientError, match="'net' is for detection and has no output 'count'"):
        Detector(config)
