"""Comparisons that can be worked out by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.parity import TIE, Comparison, Detections, Parity, Sides, compare, detections, match
from convoynet.exporter.evidence.verify import check_fp32, check_int8

SIDES = Sides("reference", "runtime", (1,))


def parity(reference: list[list[float]], exported: list[list[float]], order: list[int] | None = None) -> Parity:
    rows = np.array(order if order is not None else range(len(reference)))
    sides = (np.array(side, np.float32) for side in (reference, exported))
    left, right = sides
    return compare("classification", (left,), (right,), rows, SIDES).parity


def test_errors_and_cosine_by_hand() -> None:
    found = parity([[4, 0, 0], [0, 2, 0]], [[4, 0, 0], [0, 2, 2]])
    assert found.samples == 2
    assert found.max_abs_error == 2
    assert found.max_rel_error == 0.5  # of 4, the largest logit
    assert found.min_cosine == pytest.approx(1 / np.sqrt(2))
    assert found.sqnr_db == pytest.approx(10 * np.log10(20 / 4))
    assert (found.reference, found.runtime, found.batch_sizes) == ("reference", "runtime", (1,))


def test_equal_outputs_have_no_noise() -> None:
    found = parity([[4, 0, 0]], [[4, 0, 0]])
    assert (found.max_abs_error, found.sqnr_db, found.min_cosine, found.agreement) == (0, None, 1, 1)


def test_agreement_counts_first_and_five_best() -> None:
    reference = [[6.0, 5, 4, 3, 2, 1, 0]] * 2
    found = parity(reference, [[6, 5, 4, 3, 2, 1, 0], [5, 6, 4, 3, 1, 2, 0]])
    assert found.top1_agreement == found.agreement == 0.5
    assert found.top5_agreement == pytest.approx((1 + 0.8) / 2)


def test_a_tie_is_no_disagreement_and_a_small_difference_is() -> None:
    scale = 100.0
    within, beyond = TIE * scale * 0.5, TIE * scale * 2
    assert parity([[scale, scale - within]], [[0, 1]]).top1_agreement == 1
    assert parity([[scale, scale - beyond]], [[0, 1]]).top1_agreement == 0


def test_images_that_come_twice_count_once_in_shares_and_every_time_in_errors() -> None:
    found = parity([[2, 0], [0, 2]], [[2, 0], [0, 2], [0, 9]], [0, 1, 0])
    assert (found.samples, found.top1_agreement, found.max_abs_error) == (2, 1.0, 9.0)


def test_not_a_number_never_passes() -> None:
    found = parity([[1, 0], [0, 1]], [[1, 0], [np.nan, 1]])
    for gate in (check_fp32, check_int8):
        with pytest.raises(Refused):
            gate(found)


def test_every_pixel_of_a_map_votes() -> None:
    reference = np.zeros((2, 3, 4, 5), np.float32)  # two images, three classes
    reference[:, 1] = 1
    exported = reference.copy()
    exported[0, 2, 1, 2] = 7  # one pixel of the first image
    found = compare("segmentation", (reference,), (exported,), np.arange(2), SIDES).parity
    assert found.agreement == pytest.approx(39 / 40)
    assert found.max_abs_error == 7
    assert found.min_cosine == pytest.approx(20 / np.sqrt(20 * (20 + 49)))


def detected(*rows: tuple[float, float, int]) -> Detections:
    """Squares of side 10 from their left edge, score and label."""
    boxes = np.array([[left, 0, left + 10, 10] for left, _, _ in rows], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array([row[1] for row in rows], np.float32), np.array([row[2] for row in rows]))


def test_matching_wants_the_label_and_half_the_area_and_gives_each_once() -> None:
    wanted = detected((0, 0.9, 1), (100, 0.8, 1), (200, 0.7, 2), (300, 0.6, 1))
    # The same box, one shifted by 3 (IoU 7/13), another label, one shifted by 5 (IoU 1/3).
    offered = detected((100, 0.5, 1), (3, 0.4, 1), (200, 0.7, 1), (305, 0.6, 1))
    assert sorted(match(wanted, offered)) == [(0, 1), (1, 0)]
    twice = detected((0, 0.9, 1), (1, 0.8, 1))
    assert match(twice, detected((0, 0.9, 1))) == [(0, 0)]
    assert match(twice, detected()) == match(detected(), twice) == []


def test_boxes_that_a_border_cuts_to_nothing_are_matched_by_their_corners() -> None:
    lines = np.array([[90, 10, 90, 40], [90, 60, 90, 80]], np.float32)
    wanted = Detections(lines, np.array([0.9, 0.8], np.float32), np.array([1, 1]))
    moved = wanted._replace(boxes=lines[::-1] + np.array([[0, 0.05, 0, 0]], np.float32))
    assert sorted(match(wanted, moved)) == [(0, 1), (1, 0)]
    assert match(wanted, wanted._replace(boxes=lines + 5)) == []


def padded(images: list[Detections], room: int) -> tuple[NDArray[np.generic], ...]:
    """A detector's four outputs."""
    boxes, scores = np.zeros((len(images), room, 4), np.float32), np.zeros((len(images), room), np.float32)
    labels, counts = np.zeros((len(images), room), np.int64), np.zeros((len(images), 1), np.int64)
    for row, image in enumerate(images):
        count = len(image.scores)
        boxes[row, :count], scores[row, :count], labels[row, :count] = image
        counts[row] = count
    return boxes, scores, labels, counts


def compared(wanted: list[Detections], offered: list[Detections]) -> Comparison:
    return compare("detection", padded(wanted, 5), padded(offered, 5), np.arange(len(wanted)), SIDES)


def test_detections_are_compared_whatever_their_order() -> None:
    wanted = [detected((0, 0.9, 1), (50, 0.8, 2)), detected((90, 0.7, 1))]
    found = compared(wanted, [detected((50, 0.8, 2), (0, 0.9, 1)), detected((90, 0.7, 1))])
    assert found.parity.matched == found.parity.agreement == 1
    assert (found.parity.max_abs_error, found.parity.max_rel_error) == (0, 0)
    np.testing.assert_array_equal(found.reference, np.array([0.7, 0.8, 0.9], np.float32))
    off = compared(wanted, [detected((1, 0.4, 1)), detected((90, 0.7, 2))]).parity
    assert off.matched == pytest.approx(2 / 5)
    assert off.max_abs_error == 1  # pixel
    assert off.max_rel_error == pytest.approx(1 / 100)  # of the largest coordinate
    assert off.min_cosine is off.sqnr_db is off.top1_agreement is None


def test_padding_is_no_detection() -> None:
    outputs = padded([detected((0, 0.9, 1))], 5)
    assert [len(part) for part in detections(outputs, 0)] == [1, 1, 1]
    assert compared([detected()], [detected()]).parity.matched == 0  # nothing was shown
