"""The figures on cases that can be worked out by hand, and the gates on both sides of their limits."""

import dataclasses

import numpy as np
import pytest

from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.limits import FP32_MAX_REL_ERROR, FP32_MIN_SHARES, INT8_MIN_MATCHED
from convoynet.exporter.evidence.parity import Parity
from convoynet.exporter.evidence.verify import (
    Reference,
    batch_plan,
    check_fp32,
    check_int8,
    measure_parity,
)
from tests.exporter.brightness import Brightness, images


@pytest.mark.parametrize(
    ("samples", "batch", "expected"),
    [
        (64, (1, 32), [1, 2, 5, 32, 32]),
        (1, (1, 1), [1]),
        (3, (1, 1), [1, 1, 1]),
        (10, (4, 4), [4, 4, 4]),
        (4, (3, 6), [3, 5, 6]),
        (100, (1, 64), [1, 2, 5, 64, 32]),
    ],
)
def test_batch_plan_stays_in_the_range_and_covers(samples: int, batch: tuple[int, int], expected: list[int]) -> None:
    plan = batch_plan(samples, batch)
    assert plan == expected
    assert sum(plan) >= samples
    assert all(batch[0] <= size <= batch[1] for size in plan)


def test_parity_runs_every_size_and_finds_the_one_image_that_differs() -> None:
    pixels = images(*range(0, 250, 10))
    reference = Reference("PyTorch", "classification", Brightness()(pixels))
    exported = Brightness(wrong=(120,))
    found = measure_parity(reference, exported, pixels, (1, 8)).parity
    assert exported.batches == [1, 2, 5, 8, 8, 8]
    assert found.batch_sizes == (1, 2, 5, 8)
    assert found.top1_agreement == pytest.approx(24 / 25)
    assert (found.reference, found.runtime) == ("PyTorch", "brightness")
    assert found.max_abs_error == 1


GOOD = Parity(
    "classification", 10, 0.0, 0.0, "reference", "runtime", (1,), min_cosine=1.0, top1_agreement=1.0, top5_agreement=1.0
)
MAPS = dataclasses.replace(GOOD, task="segmentation")
BOXES = Parity("detection", 10, 0.0, 0.0, "reference", "runtime", (1,), matched=1.0)


@pytest.mark.parametrize(
    "change", [{"max_rel_error": FP32_MAX_REL_ERROR * 1.01}, {"max_rel_error": np.nan}, {"top1_agreement": 0.99}]
)
def test_fp32_gate(change: dict[str, float]) -> None:
    check_fp32(dataclasses.replace(GOOD, max_rel_error=FP32_MAX_REL_ERROR))
    with pytest.raises(Refused, match=r"not the PyTorch model.*nothing was published"):
        check_fp32(dataclasses.replace(GOOD, **change))


def test_gates_of_maps_and_boxes() -> None:
    pixels, boxes = FP32_MIN_SHARES["segmentation"], FP32_MIN_SHARES["detection"]
    check_fp32(dataclasses.replace(MAPS, top1_agreement=pixels))
    check_fp32(dataclasses.replace(BOXES, matched=boxes))
    check_int8(dataclasses.replace(BOXES, matched=INT8_MIN_MATCHED))
    with pytest.raises(Refused, match="pixels of the same class 98"):
        check_fp32(dataclasses.replace(MAPS, top1_agreement=pixels - 0.01))
    with pytest.raises(Refused, match="matched detections 89"):
        check_fp32(dataclasses.replace(BOXES, matched=boxes - 0.01))
    with pytest.raises(Refused, match=r"INT8 moved the outputs too far: fewer than 50% .* matched detections 49"):
        check_int8(dataclasses.replace(BOXES, matched=INT8_MIN_MATCHED - 0.01))
