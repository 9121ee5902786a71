"""How fast models are, and whether the figures can be believed.

Rounds of all sides in turn, so that other work on the machine slows all alike; the median of the rounds counts. Beside
it stand its quartiles and what other processes took of the machine. A figure whose rounds are too far apart, or that
was taken on a machine that others used, is withheld.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convoynet.exporter.evidence.load import Load, Meter
from convoynet.exporter.progress import Progress

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Array, Images, Predictor

MIN_ROUNDS, MAX_ROUNDS = 5, 15
# Of fewer rounds the quartiles say nothing.
_FEWEST_ROUNDS = 3
ROUND_SECONDS = 0.005
SIDE_SECONDS = 1.0
# On a machine too slow or too busy for that many rounds, the fewest have to do; and on one slower still, one.
PATIENCE_SECONDS, LONG_PATIENCE_SECONDS = 10.0, 60.0
# Beyond these a figure is withheld. On an idle machine quartiles are some hundredths apart, and a machine that does one
# thing more on two cores takes a third of them.
MAX_SPREAD = 0.25
MAX_CONTESTED = 0.2

REFERENCE, FP32 = "PyTorch eager", "fp32"
# In its place, where a file was given: with all optimizations of the runtime, as it would run without an export.
GIVEN_FILE = "the given file in ONNX Runtime"


@dataclass(frozen=True)
class Side:
    """One of those that are timed: the engine's name, the precision of what it runs, and what runs it."""

    engine: str
    precision: str
    predictor: Predictor


@dataclass(frozen=True)
class Rate:
    """Images per second of one side: the median of its rounds, and the quartiles."""

    engine: str
    precision: str
    images_per_second: float
    quartiles: tuple[float, float]
    rounds: int

    @property
    def spread(self) -> float:
        """How far the quartiles are apart, as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.images_per_second


@dataclass(frozen=True)
class Timing:
    """What all sides did at one batch size, the reference first, on `threads` threads, beside what load."""

    batch: int
    threads: int
    load: Load
    rates: tuple[Rate, ...]

    def rate(self, engine: str, precision: str) -> Rate:
        """That of one side."""
        return next(rate for rate in self.rates if (rate.engine, rate.precision) == (engine, precision))

    def doubt(self, *rates: Rate) -> str:
        """Why figures of this timing are not to be believed; "" where they are."""
        if self.load.contested(self.threads) > MAX_CONTESTED:
            return (
                f"other processes took {self.load.others:.1f} of {self.load.cores} cores while it was measured "
                f"on {self.threads} thread{'s' * (self.threads > 1)}"
            )
        for rate in rates:
            if rate.rounds < _FEWEST_ROUNDS:
                return f"a round takes so long that there was time for {rate.rounds} of {_FEWEST_ROUNDS}"
            if rate.spread > MAX_SPREAD:
                low, high = rate.quartiles
                return f"the rounds are too far apart: half of them from {shown(low)} to {shown(high)} images/s"
        return ""


def shown(images_per_second: float) -> str:
    """Images per second for a person: a detector may need seconds for one."""
    return f"{images_per_second:.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"


def measure_speed(
    sides: Sequence[Side], images: Images, batches: Iterable[int], threads: int, progress: Progress
) -> list[Timing]:
    """Time all sides at each batch size, on inputs that are prepared already."""
    timings = []
    for batch in progress.track(list(dict.fromkeys(batches)), "speed"):
        chosen = images[np.arange(batch) % len(images)]
        taken, load = time_in_turn([(side.predictor, side.predictor.prepare(chosen)) for side in sides], threads)
        rates = [
            rate_of(side.engine, side.precision, seconds, batch) for side, seconds in zip(sides, taken, strict=True)
        ]
        timings.append(Timing(batch, threads, load, tuple(rates)))
    return timings


def rate_of(engine: str, precision: str, seconds: Sequence[float], batch: int) -> Rate:
    """The rate of one side whose calls took so long, round by round."""
    low, median, high = (float(batch / value) for value in np.quantile(seconds, (0.75, 0.5, 0.25)))
    return Rate(engine, precision, median, (low, high), len(seconds))


def time_in_turn(sides: Sequence[tuple[Predictor, Array]], threads: int = 1) -> tuple[list[list[float]], Load]:
    """Seconds of a call, round by round of one side after the other, and the load meanwhile.

    Args:
        sides: models, each with its inputs.
        threads: of a call; says whether others are in the way.
    """
    for side in sides:  # the first call allocates and plans
        _seconds(*side, 1)
    began, meter = time.perf_counter(), Meter()
    taken = [[_seconds(*side, 1)] for side in sides]
    calls = [max(1, round(ROUND_SECONDS / once)) for (once,) in taken]
    round_seconds = max(once * count for (once,), count in zip(taken, calls, strict=True))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(SIDE_SECONDS / round_seconds)))
    if max(calls) > 1:  # single calls of what is that fast are no rounds
        taken = [[] for _ in sides]
    while (done := len(taken[0])) < rounds:
        if done and _is_enough(done, time.perf_counter() - began, meter, threads):
            break
        for side, count, seconds in zip(sides, calls, taken, strict=True):
            seconds.append(_seconds(*side, count))
    return taken, meter.load()


def _is_enough(done: int, passed: float, meter: Meter, threads: int) -> bool:
    """Whether so many rounds, in so many seconds, have to do: also where the load speaks against them anyway."""
    if passed <= PATIENCE_SECONDS:
        return False
    contested = meter.load().contested(threads) > MAX_CONTESTED
    return done >= _FEWEST_ROUNDS or contested or passed > LONG_PATIENCE_SECONDS


def seconds_of_call(sides: Sequence[tuple[Predictor, Array]]) -> list[float]:
    """The median seconds that each model takes for its inputs, in rounds of one after the other."""
    return [float(np.median(seconds)) for seconds in time_in_turn(sides)[0]]


def _seconds(predictor: Predictor, inputs: Array, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        predictor(inputs)
    return (time.perf_counter() - began) / calls


def summary(timings: Sequence[Timing], engine: str, precision: str) -> dict[str, Any]:
    """What one engine did, at the batch at which it does most, and in `batches` at every one that was timed.

    A figure is None where it is withheld, and `withheld` says why; "fp32_graph_images_per_second" also where the
    published graph is the float32 one, or that was not timed.
    """
    best = max(timings, key=lambda timing: timing.rate(engine, precision).images_per_second)
    return {**_row(best, engine, precision), "batches": [_row(one, engine, precision) for one in timings]}


def _row(timing: Timing, engine: str, precision: str) -> dict[str, Any]:
    reference, rate = timing.rates[0], timing.rate(engine, precision)
    doubt = timing.doubt(reference, rate)
    exact = [one for one in timing.rates if (one.engine, one.precision) == (engine, FP32) and one is not rate]
    return {
        "batch": timing.batch,
        "reference_images_per_second": None if doubt else reference.images_per_second,
        "images_per_second": None if doubt else rate.images_per_second,
        "quartiles": None if doubt else rate.quartiles,
        "fp32_graph_images_per_second": next(
            (one.images_per_second for one in exact if not timing.doubt(rate, one)), None
        ),
        "withheld": doubt,
    }


def line(speed: Mapping[str, Any]) -> str:
    """The report's `speed` in words."""
    if speed["withheld"]:
        return f"withheld: {speed['withheld']}; `convoy compare` measures again"
    before, after = speed["reference_images_per_second"], speed["images_per_second"]
    low, high = map(shown, speed["quartiles"])
    load = next(timing["load"] for timing in speed["measured"] if timing["batch"] == speed["batch"])
    named = speed.get("reference", REFERENCE)
    others = "" if load["others"] is None else f", other processes took {load['others']:.1f} of {load['cores']} cores"
    return (
        f"{shown(before)} -> {shown(after)} images/s at batch {speed['batch']} ({after / before:.1f}x {named}; "
        f"half of the rounds from {low} to {high}{others})"
    )


def measured(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Every figure as it was measured, with its quartiles, the rounds, and what other processes took."""
    return [asdict(timing) for timing in timings]


def raw(speed: Mapping[str, Any], batch: int) -> float:
    """The median of the report's `speed` at a batch size, whether it is withheld or not."""
    rates = next(timing["rates"] for timing in speed["measured"] if timing["batch"] == batch)
    side = speed["engine"], speed["precision"]
    found = next(rate for rate in rates if (rate["engine"], rate["precision"]) == side)
    return float(found["images_per_second"])
