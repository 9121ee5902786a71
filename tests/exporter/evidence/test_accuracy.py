"""Accuracy with its intervals on cases worked out by hand, and what --max-drop makes of them."""

import dataclasses
from math import comb
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.accuracy import (
    Accuracy,
    accuracy_of,
    check_drop,
    decide,
    hit_rates,
    images_needed,
    measure_accuracy,
    paired_interval,
    verdict,
    wilson,
)
from convoynet.exporter.progress import Quiet
from tests.exporter.brightness import GREY, Brightness


def answers(both: int, lost: int, gained: int, neither: int = 0) -> Accuracy:
    """So many images that both models, the first alone, the second alone, and neither of them get right."""
    before = np.repeat([True, True, False, False], [both, lost, gained, neither])
    after = np.repeat([True, False, True, False], [both, lost, gained, neither])
    return accuracy_of(np.stack([before, before], 1), np.stack([after, after], 1))


def test_accuracy_on_files(tmp_path: Path) -> None:
    labelled = []
    for value in range(0, 250, 5):  # 50 images: more than one batch
        path = tmp_path / f"{value}.png"
        Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
        labelled.append((path, value // 25))
    models = (Brightness(), Brightness(wrong=(0, 5)))
    exact, found = measure_accuracy(models[0], models, labelled, GREY, Quiet())
    assert (found.samples, found.reference_top1, found.top1) == (50, 1.0, 0.96)
    assert (found.reference_top5, found.top5, found.lost, found.gained) == (1.0, 1.0, 2, 0)
    assert (exact.top1, exact.lost, exact.drop) == (1.0, 0, 0)
    assert hit_rates(models, labelled, GREY, Quiet()) == [(1.0, 1.0), (0.96, 1.0)]


def test_of_several_outputs_the_logits_count(tmp_path: Path) -> None:
    class WithFeatures(Brightness):
        def __call__(self, inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.float32], ...]:  # type: ignore[override]
            return *super().__call__(inputs), np.zeros((len(inputs), 3), np.float32)

    Image.fromarray(np.full((2, 2), 60, np.uint8)).save(tmp_path / "0.png")
    assert hit_rates([WithFeatures()], [(tmp_path / "0.png", 2)], GREY, Quiet()) == [(1.0, 1.0)]


def test_the_intervals_of_the_literature() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1
    # By hand: d = 6 / 102, variance 16 / 102 - d^2.
    assert paired_interval(10, 4, 100) == pytest.approx((-0.0172, 0.1348), abs=1e-4)
    low, high = paired_interval(0, 0, 200)
    assert low == -high
    assert 0.005 < high < 0.015  # no change among 200 images does not mean that none of 1,000 changes


@pytest.mark.parametrize(("down", "up"), [(0.1, 0.05), (0.02, 0.02), (0.3, 0.1), (0.05, 0.0)])
def test_the_interval_holds_its_level(down: float, up: float) -> None:
    """Over all outcomes of 40 images: the true difference lies in it nearly as often as promised, or more often."""
    count, held = 40, 0.0
    for lost in range(count + 1):
        for gained in range(count + 1 - lost):
            low, high = paired_interval(lost, gained, count)
            if low <= down - up <= high:
                same = count - lost - gained
                ways = comb(count, lost) * comb(count - lost, gained)
                held += ways * down**lost * up**gained * (1 - down - up) ** same
    assert held > 0.93


def test_how_many_changed_each_way() -> None:
    found = answers(both=80, lost=7, gained=3, neither=10)
    assert (found.reference_top1, found.top1) == (0.87, 0.83)
    assert (found.lost, found.gained) == (7, 3)
    assert found.drop == pytest.approx(0.04)
    assert found.interval[0] < 0.83 < found.interval[1]
    assert found.drop_interval[0] < 0.04 < found.drop_interval[1]


@pytest.mark.parametrize(
    ("found", "decision"),
    [
        (answers(both=4900, lost=10, gained=12, neither=78), "kept"),
        (answers(both=50, lost=0, gained=0), "undecided"),
        (answers(both=700, lost=150, gained=20, neither=130), "lost"),
        (answers(both=48, lost=2, gained=0), "undecided"),
    ],
    ids=["many images", "no change in few", "a clear loss", "two of fifty"],
)
def test_whether_the_images_suffice(found: Accuracy, decision: str) -> None:
    assert decide(found, 0.5) == decision
    said = verdict(found, 0.5)
    assert ("undecided" in said) == (decision == "undecided")
    if decision == "undecided":
        assert "it would take about" in said


def test_with_as_many_images_as_it_says_it_is_decided() -> None:
    found = answers(both=95, lost=1, gained=1, neither=3)
    needed = images_needed(found, 0.5)
    assert needed is not None
    factor = -(-needed // found.samples)
    more = answers(both=95 * factor, lost=factor, gained=factor, neither=3 * factor)
    assert decide(more, 0.5) == "kept"
    fewer = answers(both=95 * factor // 8, lost=factor // 8, gained=factor // 8, neither=3 * factor // 8)
    assert decide(fewer, 0.5) == "undecided"
    near = dataclasses.replace(found, samples=998, lost=5, gained=0)  # on the limit, as far as anybody can see
    assert images_needed(near, 0.5) is None
    assert "more images than anybody has" in verdict(near, 0.5)


def test_drop_gate_is_in_points_and_exact_at_the_limit() -> None:
    found = answers(both=800, lost=12, gained=7, neither=181)
    check_drop(found, 0.5)
    check_drop(answers(both=800, lost=0, gained=12, neither=188), 0)
    with pytest.raises(Refused, match=r"fell by 0\.50 points.*12 right answers lost, 7 gained.*nothing was published"):
        check_drop(found, 0.49)
