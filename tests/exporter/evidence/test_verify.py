"""The figures on cases that can be worked out by hand, and the gates on both sides of their limits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.parity import Parity
from convoynet.exporter.evidence.verify import (
    FP32_MAX_REL_ERROR,
    FP32_MIN_SHARES,
    INT8_MIN_COSINE,
    INT8_MIN_MATCHED,
    Accuracy,
    Reference,
    batch_plan,
    check_drop,
    check_fp32,
    check_int8,
    measure_accuracy,
    measure_parity,
    measure_speed,
    speed_summary,
)
from convoynet.exporter.progress import Quiet

GREY = Preprocess(size=(2, 2), resize=2, mean=(0.0,), std=(1.0,))


class Brightness:
    """Logits that follow the image's first pixel v: class v // 25 is first. `wrong` images are answered one higher."""

    name = "brightness"

    def __init__(self, wrong: tuple[int, ...] = (), only_batches: tuple[int, ...] = ()) -> None:
        self.wrong = wrong
        self.only_batches = only_batches
        self.batches: list[int] = []

    def prepare(self, images: NDArray[np.uint8]) -> NDArray[np.generic]:
        return images

    def __call__(self, inputs: NDArray[np.generic]) -> tuple[NDArray[np.float32]]:
        self.batches.append(len(inputs))
        values = inputs[:, 0, 0, 0].astype(int)
        answers = values // 25 + np.isin(values, self.wrong)
        return (-np.abs(np.arange(12)[None] - answers[:, None]).astype(np.float32),)


def images(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)


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


@pytest.mark.parametrize("cosine", [INT8_MIN_COSINE - 1e-6, np.nan])
def test_int8_gate(cosine: float) -> None:
    check_int8(dataclasses.replace(GOOD, min_cosine=INT8_MIN_COSINE))
    with pytest.raises(Refused, match="smallest cosine"):
        check_int8(dataclasses.replace(GOOD, min_cosine=cosine))


def test_gates_of_maps_and_boxes() -> None:
    pixels, boxes = FP32_MIN_SHARES["segmentation"], FP32_MIN_SHARES["detection"]
    check_fp32(dataclasses.replace(MAPS, top1_agreement=pixels))
    check_fp32(dataclasses.replace(BOXES, matched=boxes))
    check_int8(dataclasses.replace(BOXES, matched=INT8_MIN_MATCHED))
    with pytest.raises(Refused, match="pixels of the same class 98"):
        check_fp32(dataclasses.replace(MAPS, top1_agreement=pixels - 0.01))
    with pytest.raises(Refused, match="matched detections 89"):
        check_fp32(dataclasses.replace(BOXES, matched=boxes - 0.01))
    with pytest.raises(Refused, match="INT8 moved the outputs too far: matched detections 49"):
        check_int8(dataclasses.replace(BOXES, matched=INT8_MIN_MATCHED - 0.01))


def test_drop_gate_is_in_points_and_exact_at_the_limit() -> None:
    accuracy = Accuracy(samples=1000, reference_top1=0.812, top1=0.807, reference_top5=1, top5=1)
    check_drop(accuracy, 0.5)
    check_drop(dataclasses.replace(accuracy, top1=0.9), 0)
    with pytest.raises(Refused, match=r"fell by 0\.50 points"):
        check_drop(accuracy, 0.49)


def test_accuracy_on_files(tmp_path: Path) -> None:
    labelled = []
    for value in range(0, 250, 5):  # 50 images: more than one batch
        path = tmp_path / f"{value}.png"
        Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
        labelled.append((path, value // 25))
    found = measure_accuracy(Brightness(), Brightness(wrong=(0, 5)), labelled, GREY, Quiet())
    assert found == Accuracy(50, reference_top1=1.0, top1=0.96, reference_top5=1.0, top5=1.0)


def test_speed_times_both_sides_at_each_batch_and_reports_the_better() -> None:
    slow, fast = Brightness(), Brightness()
    speeds = measure_speed(slow, fast, images(1, 2, 3), (1, 4, 1), Quiet())
    assert [speed.batch for speed in speeds] == [1, 4]
    assert set(slow.batches) == set(fast.batches) == {1, 4}
    summary = speed_summary(speeds)
    assert summary["images_per_second"] == max(speed.images_per_second for speed in speeds)
    assert len(summary["batches"]) == 2  # type: ignore[arg-type]
