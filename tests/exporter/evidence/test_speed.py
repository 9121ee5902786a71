"""Speed: every side in turn, and a figure that cannot be believed is withheld with the reason."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from convoynet.exporter.evidence import speed
from convoynet.exporter.evidence.load import Load, Meter, busy_seconds
from convoynet.exporter.evidence.speed import FP32, REFERENCE, Rate, Side, Timing, measure_speed
from convoynet.exporter.progress import Quiet
from tests.exporter.brightness import Brightness, images

IDLE, BUSY, UNKNOWN = Load(0.05, 2), Load(0.7, 2), Load(None, 2)


def timing(load: Load = IDLE, **changed: object) -> Timing:
    rates = (
        Rate(REFERENCE, FP32, 20.0, (19.5, 20.5), 9),
        Rate("openvino", FP32, 40.0, (39.0, 41.0), 9),
        Rate("openvino", "int8", 100.0, (98.0, 103.0), 9),
    )
    return Timing(8, 2, load, tuple(dataclasses.replace(rate, **changed) for rate in rates))


def test_all_sides_are_timed_at_each_batch() -> None:
    models = [Brightness() for _ in range(3)]
    names = ((REFERENCE, FP32), ("openvino", FP32), ("openvino", "int8"))
    sides = [Side(*name, model) for name, model in zip(names, models, strict=True)]
    timings = measure_speed(sides, images(1, 2, 3), (1, 4, 1), 1, Quiet())
    assert [one.batch for one in timings] == [1, 4]
    assert all(set(model.batches) == {1, 4} for model in models)
    for one in timings:
        assert [(rate.engine, rate.precision) for rate in one.rates] == list(names)
        assert all(rate.quartiles[0] <= rate.images_per_second <= rate.quartiles[1] for rate in one.rates)
        assert all(rate.rounds >= 1 for rate in one.rates)
    told = speed.summary(timings, "openvino", "int8")
    assert [row["batch"] for row in told["batches"]] == [1, 4]
    json.dumps([told, speed.measured(timings)], allow_nan=False)


def test_rounds_are_in_turn() -> None:
    order: list[str] = []

    class Noted(Brightness):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __call__(self, inputs: NDArray[np.generic]) -> tuple[NDArray[np.float32]]:
            if order[-1:] != [self.name]:
                order.append(self.name)
            return super().__call__(inputs)

    taken, _ = speed.time_in_turn([(Noted("a"), images(1)), (Noted("b"), images(1))])
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(taken[0]) == len(taken[1]) >= speed.MIN_ROUNDS


class Knows(Meter):
    """A meter that says what it is told."""

    def __init__(self, load: Load) -> None:
        self._known = load

    def load(self) -> Load:
        return self._known


@pytest.mark.parametrize(
    ("done", "passed", "load", "enough"),
    [
        (2, 5.0, BUSY, False),
        (2, 15.0, BUSY, True),
        (2, 15.0, IDLE, False),
        (3, 15.0, IDLE, True),
        (1, 65.0, IDLE, True),
    ],
)
def test_patience(done: int, passed: float, load: Load, enough: bool) -> None:
    """What will be withheld for the load is not waited for."""
    assert speed._is_enough(done, passed, Knows(load), 2) == enough


def test_a_figure_that_is_believed() -> None:
    told = speed.summary([timing()], "openvino", "int8")
    assert (told["reference_images_per_second"], told["images_per_second"]) == (20.0, 100.0)
    assert (told["fp32_graph_images_per_second"], told["quartiles"], told["withheld"]) == (40.0, (98.0, 103.0), "")
    report = {**told, "engine": "openvino", "precision": "int8", "measured": speed.measured([timing()])}
    assert speed.line(report) == (
        "20 -> 100 images/s at batch 8 (5.0x PyTorch eager; half of the rounds from 98 to 103, "
        "other processes took 0.1 of 2 cores)"
    )
    assert speed.raw(report, 8) == 100
    assert not speed.summary([timing(UNKNOWN)], "openvino", "int8")["withheld"]


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (timing(BUSY), "other processes took 0.7 of 2 cores"),
        (timing(quartiles=(10.0, 30.0)), "too far apart: half of them from 10 to 30"),
        (timing(rounds=2), "time for 2 of 3"),
    ],
    ids=["busy", "spread", "slow"],
)
def test_a_figure_that_is_withheld(measured: Timing, reason: str) -> None:
    told = speed.summary([measured], "openvino", "int8")
    assert reason in told["withheld"]
    assert told["images_per_second"] is told["reference_images_per_second"] is told["quartiles"] is None
    assert told["fp32_graph_images_per_second"] is None
    report = {**told, "engine": "openvino", "precision": "int8", "measured": speed.measured([measured])}
    assert speed.line(report).startswith("withheld: ")
    assert "x PyTorch" not in speed.line(report)
    assert speed.raw(report, 8) == 100


@pytest.mark.parametrize(
    ("others", "cores", "threads", "contested"),
    [(0.0, 2, 2, 0.0), (0.6, 2, 2, 0.3), (0.9, 2, 1, 0.0), (1.5, 2, 1, 0.5), (9.0, 16, 4, 0.0), (2.5, 2, 2, 1.0)],
)
def test_what_others_take_counts_where_there_are_no_cores_left(
    others: float, cores: int, threads: int, contested: float
) -> None:
    assert Load(others, cores).contested(threads) == pytest.approx(contested)
    assert Load(None, cores).contested(threads) == 0


STAT = """cpu  100 0 0 900 0 0 0 0 0 0
cpu0 {user} 5 10 900 50 2 3 30 7 0
cpu1 10 0 0 900 0 0 0 0 0 0
intr 1 2 3
"""


def test_the_clocks_of_the_processors_that_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT.format(user=100))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    # Idle and waiting for the disk are no work, guests are users already; what the host takes away is.
    assert busy_seconds(stat) == pytest.approx(1.5)
    meter = Meter(stat)
    stat.write_text(STAT.format(user=100 + 10**9))
    load = meter.load()
    assert load.cores == 1
    assert load.others is not None
    assert load.others > 1
    assert busy_seconds(tmp_path / "none") is None
    assert Meter(tmp_path / "none").load() == Load(None, 1)


@pytest.mark.parametrize(("rate", "text"), [(3202.4, "3202"), (10.4, "10"), (9.87, "9.9"), (0.123, "0.12")])
def test_shown(rate: float, text: str) -> None:
    assert speed.shown(rate) == text
