"""The gates, output by output: what varies has to stay, and what does not must not start to."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from convoynet.exporter.archs import get, weights
from convoynet.exporter.assets import digits
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.limits import Kind
from convoynet.exporter.evidence.parity import Parity, Sides, compare
from convoynet.exporter.evidence.spread import kind_of
from convoynet.exporter.evidence.verify import check_engine, check_fp32, check_int8, int8_caveats, int8_reason

Rows = NDArray[Any]
IMAGES = 40


def outputs(count: int, offset: float = 0.0, spread: float = 1.0, images: int = IMAGES) -> Rows:
    return (offset + spread * np.random.default_rng(count).standard_normal((images, count))).astype(np.float32)


def noisy(rows: Rows, share: float = 0.1) -> Rows:
    """What a sound INT8 graph gives: a tenth of each output's spread as noise."""
    noise = np.random.default_rng(1).standard_normal(rows.shape) * rows.std(axis=0)
    return (rows + share * noise).astype(np.float32)


def parity(reference: Rows, found: Rows, kind: Kind | None = None, *, untrained: bool = False) -> Parity:
    sides = Sides("PyTorch", "runtime", (1,), kind, untrained=untrained)
    return compare("classification", (reference,), (found,), np.arange(len(reference)), sides).parity


def changed(rows: Rows, change: Callable[[Rows], None]) -> Rows:
    found = noisy(rows)
    change(found)
    return found


def constant(column: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[:, column] = rows[:, column].mean()

    return change


def shifted(column: int, by: float) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[:, column] += by

    return change


def scaled(by: float) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows *= by

    return change


def same_for_all(rows: Rows) -> None:
    rows[:] = rows.mean(axis=0)


def not_a_number(rows: Rows) -> None:
    rows[3, 0] = np.nan


SOFTMAX = np.exp(outputs(2)) / np.exp(outputs(2)).sum(axis=1, keepdims=True)
SCORES = (1 / (1 + np.exp(-outputs(6, -3.0, 2.0)))).astype(np.float32)
RARE = np.concatenate([SCORES, np.where(np.arange(IMAGES) == 7, 0.9, 1e-4)[:, None].astype(np.float32)], axis=1)
EMBEDDINGS = outputs(64) / np.linalg.norm(outputs(64), axis=1, keepdims=True)
# An age and a probability: each at a scale of its own.
MIXED = np.concatenate([outputs(1, 40.0, 15.0), outputs(2, 0.5, 0.1)], axis=1)


@pytest.mark.parametrize(
    "rows",
    [
        outputs(1),
        outputs(1, 40.0, 12.0),
        outputs(10, 100.0, 8.0),
        outputs(10, 1000.0, 0.5),
        outputs(1000),
        SOFTMAX,
        SCORES,
        RARE,
        EMBEDDINGS,
        MIXED,
    ],
)
def test_sound_outputs_pass_without_a_caveat(rows: Rows) -> None:
    found = parity(rows, noisy(rows))
    check_int8(found)
    assert int8_caveats(found, "INT8") == []


@pytest.mark.parametrize(
    ("rows", "change", "words"),
    [
        (outputs(1, 40.0, 12.0), same_for_all, r"1\.0\d of what PyTorch's vary by.*at most 0\.5 for one value"),
        (outputs(10, 100.0, 8.0), same_for_all, "one answer for all images has 1"),
        (outputs(10, 100.0, 8.0), scaled(2), "vary by from image to image"),
        (outputs(10), scaled(2), "vary by from image to image"),
        (outputs(10), scaled(-1), "vary by from image to image"),
        (outputs(10, 100.0, 8.0), constant(3), "^output 3 says nearly the same for every image"),
        (outputs(10, 100.0, 8.0), shifted(3, 9.0), r"^output 3 is shifted by \+1\.\d\d of its spread"),
        (MIXED, constant(2), "^output 2 says nearly the same"),
        (outputs(10, 100.0, 8.0), not_a_number, "not a number"),
        (SOFTMAX, same_for_all, "one answer"),
        (SCORES, same_for_all, "for several labels"),
        (RARE, constant(6), "^output 6 says nearly the same"),
        (EMBEDDINGS, same_for_all, "for embeddings"),
    ],
)
def test_what_no_longer_follows_the_images_is_refused(rows: Rows, change: Callable[[Rows], None], words: str) -> None:
    found = parity(rows, changed(rows, change))
    with pytest.raises(Refused, match=r"INT8 moved the outputs too far.*nothing was published"):
        check_int8(found)
    with pytest.raises(Refused, match="not the PyTorch model"):
        check_fp32(found)
    assert re.search(words, int8_reason(found))


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("untrained", [False, True])
def test_classes_must_be_alive(classes: int, untrained: bool) -> None:
    rows = outputs(classes)
    for change in (constant(7), shifted(7, 1.5)):
        with pytest.raises(Refused, match="output 7 "):
            check_int8(parity(rows, changed(rows, change), "classification", untrained=untrained))
    with pytest.raises(Refused, match="for classes"):
        check_int8(parity(rows, changed(rows, same_for_all), "classification", untrained=untrained))


@pytest.mark.parametrize("classes", [10, 1000])
def test_classes_of_a_trained_network_keep_three_quarters_of_what_they_vary_by(classes: int) -> None:
    rows = outputs(classes)
    check_int8(parity(rows, noisy(rows, 0.45), "classification"))
    with pytest.raises(Refused, match=r"at most 0\.5 for classes.*or let --eval and --max-drop decide"):
        check_int8(parity(rows, noisy(rows, 0.6), "classification"))
    # Random weights put all classes close together.
    check_int8(parity(rows, noisy(rows, 0.7), "classification", untrained=True))
    with pytest.raises(Refused, match=r"at most 0\.9 for classes"):
        check_int8(parity(rows, noisy(rows, 1.0), "classification", untrained=True))


def test_a_wrong_normalisation_is_seen() -> None:
    arch = get("lenet5")
    module = arch.build(arch.num_classes)
    weights.load(module, arch, "default", seed=0, images=digits().test[:1])
    module = arch.deploy(module).eval()
    images = digits().test[:75]

    def outputs_with(preprocess: Preprocess) -> Rows:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(preprocess.normalize(images))))

    (mean,), (std,) = arch.preprocess.mean, arch.preprocess.std
    rows = outputs_with(arch.preprocess)
    swapped = parity(rows, outputs_with(replace(arch.preprocess, mean=(std,), std=(mean,))), "classification")
    for check in (check_fp32, check_int8):
        with pytest.raises(Refused):
            check(swapped)
    # What this network hardly minds is no other for INT8; a float32 graph has to be the network.
    for wrong in ({"mean": (0.0,), "std": (1.0,)}, {"std": (1.0,)}, {"std": (1 / 255,)}):
        with pytest.raises(Refused, match="not the PyTorch model"):
            check_fp32(parity(rows, outputs_with(replace(arch.preprocess, **wrong)), "classification"))


def test_a_class_that_hardly_moves_is_named_and_no_reason_to_refuse() -> None:
    rows = outputs(200)
    rows[:, 7] *= 0.01
    found = parity(rows, changed(rows, constant(7)), "classification")
    check_int8(found)
    assert any("output 7 is nearly constant" in caveat for caveat in int8_caveats(found, "INT8"))


def test_a_class_that_is_constant_in_pytorch_may_be_constant() -> None:
    rows = outputs(10, 5.0)
    rows[:, 4] = 2.5
    check_int8(parity(rows, noisy(rows)))
    moved = noisy(rows)
    moved[:, 4] = 3.5
    assert int8_reason(parity(rows, moved)) == "output 4 is a constant in the original and off by 1"


def test_where_nothing_varies_a_constant_is_right_and_said() -> None:
    rows = np.tile(np.float32([3, 5, 7]), (IMAGES, 1))
    found = parity(rows, rows * np.float32(1.001))
    check_int8(found)
    check_fp32(parity(rows, rows))
    assert "PyTorch answers the same for all 40 images" in int8_caveats(found, "INT8")[0]
    with pytest.raises(Refused, match="is a constant in the original"):
        check_int8(parity(rows, rows + 1))


def test_one_image_shows_no_spread_and_that_is_said() -> None:
    rows = outputs(10, images=1)
    found = parity(rows, noisy(rows + 0.01))
    check_int8(found)
    check_fp32(parity(rows, rows))
    assert found.spread is not None
    assert found.spread.error is None
    assert "1 image cannot show" in int8_caveats(found, "INT8")[0]
    with pytest.raises(Refused, match="of their size"):
        check_int8(parity(rows, -rows))


def test_few_images_tell_one_answer_for_all_and_no_more() -> None:
    rows = outputs(10, 100.0, 8.0, images=4)
    check_int8(parity(rows, noisy(rows, 0.6)))
    assert "4 images cannot show" in int8_caveats(parity(rows, noisy(rows)), "INT8")[0]
    with pytest.raises(Refused, match=r"at most 0\.9"):
        check_int8(parity(rows, changed(rows, same_for_all)))


def test_told_regression_is_held_to_every_number() -> None:
    rows = outputs(4)
    found = noisy(rows)
    found[:, 1] = noisy(rows, 0.7)[:, 1]
    check_int8(parity(rows, found))
    with pytest.raises(Refused, match="output 1 has an error"):
        check_int8(parity(rows, found, "regression"))


def test_a_small_spread_beside_a_large_offset_counts_in_float32_too() -> None:
    rows = outputs(4, 1000.0, 0.5)
    same = rows + np.float32(1e-4)
    check_fp32(parity(rows, same))
    with pytest.raises(Refused, match=r"max relative error .*e-0[45] .*of the spread \(allowed 0\.01\)"):
        check_fp32(parity(rows, noisy(rows)))


@pytest.mark.parametrize(
    ("rows", "told", "kind"),
    [
        (outputs(1), None, "one value"),
        (outputs(1), "labels", "labels"),
        (outputs(1), "classification", "one value"),
        (outputs(3), None, "values"),
        (outputs(3), "classification", "classification"),
        (SOFTMAX, None, "values"),
        (SCORES, None, "labels"),
        (EMBEDDINGS, None, "embedding"),
        (EMBEDDINGS, "regression", "regression"),
    ],
)
def test_what_outputs_mean_is_told_or_seen(rows: Rows, told: Kind | None, kind: Kind) -> None:
    assert kind_of("classification", told, rows) == kind


def test_agreement_is_named_for_what_is_decided() -> None:
    one = parity(np.float32([[-1], [2], [3]]), np.float32([[-2], [-1], [3]]))
    assert (one.agreement, one.agreement_name) == (pytest.approx(2 / 3), "same side of the threshold")
    assert one.top1_agreement is one.min_cosine is None
    scores = parity(np.float32([[0.1, 0.9], [0.4, 0.2]]), np.float32([[0.6, 0.9], [0.4, 0.2]]))
    assert (scores.agreement, scores.agreement_name) == (0.75, "same side of the threshold")
    kept = parity(outputs(8), noisy(outputs(8), 0.1), "regression")
    assert (kept.agreement, kept.agreement_name) == (pytest.approx(0.99, abs=5e-3), "variance kept")


def test_every_output_goes_through_the_gate() -> None:
    logits, features = outputs(10), outputs(64)
    sides = Sides("PyTorch", "runtime", (1,), "classification", ("features",))
    pair = compare("classification", (logits, features), (noisy(logits), noisy(features)), np.arange(IMAGES), sides)
    check_int8(pair.parity)
    assert pair.parity.others["features"].spread is not None
    dead = np.tile(features.mean(axis=0), (IMAGES, 1))
    pair = compare("classification", (logits, features), (noisy(logits), dead), np.arange(IMAGES), sides)
    with pytest.raises(Refused, match="output features: their error is 1"):
        check_int8(pair.parity)


def test_maps_vary_over_places_too() -> None:
    maps = np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)
    sides = Sides("PyTorch", "runtime")
    order = np.arange(8)
    check_int8(compare("segmentation", (maps,), (maps * np.float32(1.05),), order, sides).parity)
    dead = maps.copy()
    dead[:, 2] = 0
    with pytest.raises(Refused, match="output 2 says nearly the same"):
        check_int8(compare("segmentation", (maps,), (dead,), order, sides).parity)


def test_an_engine_is_no_worse_than_its_graph() -> None:
    rows = outputs(10)
    good, bad = parity(rows, noisy(rows)), parity(rows, changed(rows, constant(2)))
    check_engine(good, good)
    check_engine(bad, bad)
    with pytest.raises(Refused, match=r"TensorRT engine is not the graph.*output 2"):
        check_engine(good, bad)


def test_what_asdict_made_is_read_back() -> None:
    found = parity(outputs(10), changed(outputs(10), constant(2)))
    again = Parity.from_json(dataclasses.asdict(found))
    assert (again.agreement, again.agreement_name) == (found.agreement, found.agreement_name)
    assert again.spread is not None
    assert found.spread is not None
    assert again.spread.line == found.spread.line
