"""Flips, classes and calibration against values that are worked out by hand or by other libraries."""

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import binomtest

from convoynet.exporter.auditing.answers import (
    Said,
    answers_of,
    calibration_error,
    holm,
    mcnemar,
    probabilities,
    said,
)
from convoynet.exporter.auditing.temperature import best, fit
from convoynet.exporter.errors import BadInput

RNG = np.random.default_rng(3)


def answers(best: list[int], confidence: float = 0.5) -> Said:
    return Said(np.array(best), np.full(len(best), confidence))


def test_every_way_in_which_an_answer_becomes_another_is_told_apart() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    found = answers_of(answers([0, 0, 0, 0, 1, 1]), answers([0, 1, 1, 0, 0, 1]), labels)
    assert found.flips.lost.tolist() == [1]
    assert found.flips.gained.tolist() == [2]
    assert found.flips.other.tolist() == [4]
    assert found.flips.count == 3
    assert found.flipped == found.agreement == 0.5
    assert found.top1 == (2 / 6, 2 / 6)


def test_classes_add_up_to_the_whole_and_those_without_images_are_left_out() -> None:
    labels = RNG.integers(0, 5, 400)
    labels[labels == 3] = 6
    before, after = (answers(RNG.integers(0, 7, 400).tolist()) for _ in range(2))
    found = answers_of(before, after, labels)
    assert [one.index for one in found.classes] == [0, 1, 2, 4, 6]
    assert sum(one.images for one in found.classes) == 400
    assert sum(one.lost for one in found.classes) == len(found.flips.lost)
    assert sum(one.gained for one in found.classes) == len(found.flips.gained)
    assert sum(one.before * one.images for one in found.classes) / 400 == pytest.approx(found.top1[0])
    assert sum(one.after * one.images for one in found.classes) / 400 == pytest.approx(found.top1[1])
    for one in found.classes:
        assert one.before_interval[0] <= one.before <= one.before_interval[1]
        assert one.drop_interval[0] <= one.drop <= one.drop_interval[1]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 1), (1, 5), (12, 3), (40, 40), (300, 200)])
def test_mcnemars_exact_test_is_the_binomial_one(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_holm_corrects_for_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    # docs/auditing.md: among ten classes, nine lost and none gained are the fewest that count.
    assert holm([mcnemar(9, 0), *[1.0] * 9])[0] < 0.05 < holm([mcnemar(8, 0), *[1.0] * 9])[0]


def test_a_class_paid_where_chance_does_not_explain_it_and_not_for_what_it_gained() -> None:
    labels = np.repeat([0, 1, 2], 40)
    right, wrong = labels.copy(), (labels + 1) % 3
    before = np.where(np.arange(120) % 40 < 20, right, wrong)
    after = before.copy()
    after[:15] = wrong[:15]  # class 0 loses 15 of 20
    after[60:75] = right[60:75]  # class 1 gains 15
    after[80], after[119] = wrong[80], right[119]  # class 2 changes both ways
    found = {one.index: one for one in answers_of(answers(before.tolist()), answers(after.tolist()), labels).classes}
    assert [found[index].paid for index in range(3)] == [True, False, False]
    assert (found[0].lost, found[0].gained, found[0].drop) == (15, 0, 15 / 40)
    assert found[1].p < 0.05
    assert found[2].p == 1


def test_the_calibration_error_is_that_of_fifteen_bins() -> None:
    confidence, right = RNG.random(500), RNG.random(500) < 0.6
    confidence[:16] = np.linspace(0, 1, 16)  # the edges
    expected = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high) if low else confidence <= high
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-3)


def test_calibration_errors_whose_value_is_known() -> None:
    assert calibration_error(np.ones(10), np.ones(10, bool)) == 0
    assert calibration_error(np.ones(10), np.zeros(10, bool)) == 1
    assert calibration_error(np.full(10, 0.9), np.arange(10) < 6) == pytest.approx(0.3)
    # Errors of one bin make up for each other, those of two do not.
    assert calibration_error(np.array([0.9, 0.9, 0.5, 0.5]), np.array([1, 1, 0, 0], bool)) == pytest.approx(0.3)


def test_the_confidence_is_that_of_the_softmax() -> None:
    logits = RNG.normal(0, 8, (50, 10)).astype(np.float32)
    found, expected = said(logits), np.exp(log_softmax(logits.astype(np.float64), axis=1))
    np.testing.assert_allclose(found.confidence, expected.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found.best, expected.argmax(axis=1))
    np.testing.assert_allclose(probabilities(logits, 3), np.exp(log_softmax(logits / 3.0, axis=1)), rtol=1e-5)


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_that_made_the_labels_is_found_again(true: float) -> None:
    logits = RNG.normal(0, 3, (20000, 5)).astype(np.float32)
    shares = probabilities(logits, true)
    labels = (RNG.random(20000)[:, None] > shares.cumsum(axis=1)).sum(axis=1).clip(0, 4)
    assert best(logits, labels) == pytest.approx(true, rel=0.06)
    found = fit(logits, labels)
    assert found.fitted_on + found.judged_on == 20000
    assert found.after < 0.02
    assert not found.bounded
    if true != 1:
        assert found.before > 5 * found.after
        assert not found.notes


def test_a_temperature_that_helps_the_half_alone_that_it_was_fitted_on_is_noted() -> None:
    logits = np.array([[3.0, 1], [1, 3]] * 8, np.float32)
    found = fit(logits, np.zeros(16, np.int64))  # every second one is right: those that fit
    assert found.after > found.before
    assert "makes the confidence worse on the half that judges it (8 images)" in found.notes[-1]


def test_temperatures_at_the_ends_are_said_to_be_there() -> None:
    logits = np.array([[3.0, 1], [1, 3]] * 4, np.float32)
    right = np.array([0, 1] * 4)
    assert fit(logits, right).bounded
    assert [note.partition(":")[0] for note in fit(logits, right).notes] == [
        "the temperature 0.02 is at the end of what is looked at"
    ]
    assert best(logits, right) == 0.02
    assert best(logits, 1 - right) == 50
    with pytest.raises(BadInput, match="at least two images"):
        fit(logits[:1], right[:1])
