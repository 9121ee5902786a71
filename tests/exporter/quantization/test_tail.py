from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from convoynet.exporter.quantization import tail as tails
from convoynet.exporter.quantization.histogram import Extremes, Histogram, NotFinite
from convoynet.exporter.quantization.tail import Tail

Floats = NDArray[np.float32]
COUNT = 200_000
RANDOM = np.random.default_rng(0)
INPUTS = 4 * RANDOM.standard_normal(COUNT)
KINDS: dict[str, NDArray[np.float64]] = {
    "normal": RANDOM.standard_normal(COUNT),
    "behind a ReLU": np.maximum(RANDOM.standard_normal(COUNT), 0),
    "behind a ReLU6": np.clip(RANDOM.standard_normal(COUNT) * 4, 0, 6),
    "behind a SiLU": INPUTS / (1 + np.exp(-INPUTS)),
    "behind a negated SiLU": -INPUTS / (1 + np.exp(-INPUTS)),
    "behind a ReLU that keeps the sign of 0": np.where(INPUTS > 0, INPUTS, INPUTS * 0),
    "behind a sigmoid": 1 / (1 + np.exp(-5 * RANDOM.standard_normal(COUNT))),
    "evenly spread": RANDOM.random(COUNT),
    "heavy tails": RANDOM.standard_t(3, COUNT),
    "heavier tails": RANDOM.standard_cauchy(COUNT),
    "one far away": np.append(RANDOM.standard_normal(COUNT - 1), 1000),
    "below 0": -np.abs(RANDOM.standard_normal(COUNT)),
    "one value": np.full(COUNT, 2.5),
    "nothing but zeros": np.zeros(COUNT),
    "mostly zeros": np.where(RANDOM.random(COUNT) < 0.001, RANDOM.standard_normal(COUNT), 0),
    "few": RANDOM.standard_normal(37),
    "tiny": RANDOM.standard_normal(COUNT) * 1e-39,
    "huge": RANDOM.standard_normal(COUNT) * 1e30,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_of_a_tail_is_that_of_all_values(kind: str) -> None:
    values = KINDS[kind].astype(np.float32)
    everything, tail = Histogram(), Tail()
    everything.add(values)
    for part in np.array_split(values, 3):
        tail.add(part)
    assert tail.mse() == everything.mse()


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("then", ["normal", "behind a ReLU", "behind a negated SiLU", "behind a sigmoid", "below 0"])
def test_extremes_zeros_and_all_from_the_floor_up_are_counted(
    first: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "_PIECE", 30_000)
    everything, tail = Histogram(), Tail()
    for kind in (first, then, first):
        everything.add(KINDS[kind].astype(np.float32))
        tail.add(KINDS[kind].astype(np.float32))
    far = tail.far
    assert (far.low, far.high, far.zeros) == (everything.low, everything.high, everything.zeros)
    assert (far.exponent, far.first, far.total) == (everything.exponent, everything.first, everything.total)
    bins = far.first + np.arange(len(far.counts))
    beyond = np.minimum(np.abs(bins), np.abs(bins + 1)) * far.width >= far.floor
    np.testing.assert_array_equal(far.counts[beyond], everything.counts[beyond])


@pytest.mark.parametrize("kind", [Tail, Histogram, Extremes])
def test_threads_count_what_one_counts(kind: type[Tail] | type[Histogram] | type[Extremes]) -> None:
    values = np.concatenate([KINDS[name].astype(np.float32) for name in ("behind a SiLU", "behind a ReLU", "normal")])
    one, many = kind(), kind()
    parts = np.array_split(values * np.linspace(0.5, 2, len(values), dtype=np.float32), 64)
    many.add(parts[0])  # the first values decide the floor
    one.add(parts[0])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many.add, parts[1:]))
    for part in parts[1:]:
        one.add(part)
    for side in (one, many):
        if isinstance(side, Tail):
            side.some = []  # in the order of the threads, and counted in none
    assert_same(one, many)


def assert_same(one: object, other: object) -> None:
    for name, value in vars(one).items():
        if isinstance(value, Histogram):
            assert_same(value, getattr(other, name))
        elif name != "lock":
            np.testing.assert_array_equal(value, getattr(other, name))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "behind a ReLU"])
def test_few_values_are_counted(kind: str) -> None:
    tail = Tail()
    tail.add(KINDS[kind].astype(np.float32))
    assert tail.far.counts.sum() < 0.02 * COUNT
    assert tail.far.counts.sum() + tail.far.near == COUNT


def test_the_first_values_may_be_the_smallest_of_all() -> None:
    values = RANDOM.standard_normal((4, 50_000)).astype(np.float32) * np.float32([[0.01], [1], [1], [1]])
    everything, tail = Histogram(), Tail()
    for part in values:
        everything.add(part)
        tail.add(part)
    assert tail.mse() == everything.mse()


def test_where_the_best_range_lies_below_the_floor_it_is_found_all_the_same() -> None:
    first = RANDOM.standard_normal(20_000).astype(np.float32) * 100
    others = RANDOM.standard_normal((400, 20_000)).astype(np.float32)
    everything, tail = Histogram(), Tail()
    for part in (first, *others):
        everything.add(part)
        tail.add(part)
    wanted, found = everything.mse(), tail.mse()
    assert everything.squared_error(found) < 1.2 * everything.squared_error(wanted)


def silent(sizes: tuple[float, ...], channel: int, places: int | slice) -> list[Floats]:
    """Portions [images, channels, places] of those sizes, in which a channel, or a part of it, is always 0."""
    portions = []
    for size in sizes:
        values = np.maximum(RANDOM.standard_normal((128, 16, 16)), 0) * size
        values[:, channel, places] = 0
        portions.append(values.astype(np.float32))
    return portions


# Of as many images as there are, every n-th value is the same place in each.
@pytest.mark.parametrize("sizes", [(1.0, 1.0), *((first, *[1.0] * 7) for first in (1.2, 1.3, 1.4, 2.0))])
@pytest.mark.parametrize(("channel", "places"), [(0, 0), (0, slice(None)), (7, slice(None))])
def test_what_is_always_0_at_a_place_says_nothing_of_the_others(
    sizes: tuple[float, ...], channel: int, places: int | slice
) -> None:
    everything, tail = Histogram(), Tail()
    for part in silent(sizes, channel, places):
        everything.add(part)
        tail.add(part)
    assert everything.squared_error(tail.mse()) < 1.02 * everything.squared_error(everything.mse())


def test_values_of_which_none_that_was_kept_is_large_have_no_range_without_the_large_ones() -> None:
    large = np.maximum(RANDOM.standard_normal(200_000), 0).astype(np.float32)
    everything, tail = Histogram(), Tail()
    for part in (1.35 * large[:50_000], *[large] * 4):
        everything.add(part)
        tail.add(part)
    assert tail.far.squared_error(tail.far.mse()) > tail.far.clipped_error(tail.far.floor)
    tail.some = [np.zeros(64, np.float32)]
    assert everything.squared_error(tail.mse()) < 2 * everything.squared_error(everything.mse())


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [Tail, Histogram])
@pytest.mark.parametrize("others", ["normal", "behind a ReLU", "behind a SiLU", "behind a sigmoid", "below 0", "few"])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_not_finite_is_not_counted(
    value: float, kind: type[Tail] | type[Histogram], others: str, before: bool
) -> None:
    values = KINDS[others].astype(np.float32)
    tally = kind()
    if before:
        tally.add(values)
    values[len(values) // 2] = value
    with pytest.raises(NotFinite):
        tally.add(values)
