"""More requests with deadlines than engines can answer, simulated: what part of their work is answers in time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.server.scheduling.simulation import Mix, peak, simulate

KEPT = 0.9
"""The part of the peak that is left for every deadline of two batches, however slow, and more."""

engines = {
    "max_rows": st.sampled_from([4, 8, 16]),
    "engines": st.integers(1, 2),
    "batch_s": st.sampled_from([0.005, 0.1, 0.5]),
    "fixed": st.floats(0.0, 1.0),
    "jitter": st.floats(0.0, 0.2),
    "seed": st.integers(0, 99),
}
levels = st.sampled_from([(1.0,), (0.5, 0.5), (0.2, 0.8), (0.9, 0.1), (0.04, 0.96), (0.05, 0.15, 0.8)])


def kept(mix: Mix) -> float:
    """Goodput over the peak, of the time in which anything is asked."""
    return simulate(mix).goodput / peak(mix) / (1 - mix.quiet / 50)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Mix,
        deadline=st.floats(2.0, 4.0) | st.floats(4.0, 30.0),
        load=st.floats(2.0, 6.0),
        levels=levels,
        sizes=st.sampled_from([(1,), (1,), (1, 2), (1, 2, 4)]),
        quiet=st.sampled_from([0, 0, 25]),
        **engines,
    )
)
@example(Mix(16, 1, 0.1, 0.8, 0.05, 5.0, 10.0, (0.05, 0.15, 0.8)))
@example(Mix(16, 1, 0.4, 0.5, 0.0, 2.0, 2.0, (0.2, 0.8)))
@example(Mix(16, 2, 0.4, 1.0, 0.1, 15.0, 10.0, (0.05, 0.15, 0.8), (1, 2, 4)))
@example(Mix(4, 1, 0.1, 1.0, 0.0, 3.0, 5.0, batches=30))
def test_what_is_answered_in_time_is_nearly_all_that_the_engines_can_do(mix: Mix) -> None:
    """Whatever the deadline, the load, the priorities and the sizes; from the start, when nothing was measured."""
    assume(4 * max(mix.sizes) <= mix.max_rows)
    assert kept(mix) >= KEPT


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        Mix,
        deadline=st.floats(2.2, 10.0),
        load=st.floats(3.0, 6.0),
        levels=st.sampled_from([(0.1, 0.9), (0.04, 0.16, 0.8)]),
        sizes=st.sampled_from([(1,), (1, 2)]),
        **engines,
    )
)
def test_who_comes_first_by_priority_is_in_time_while_the_others_are_many(mix: Mix) -> None:
    outcome = simulate(mix)
    assert outcome.part(level=1) >= 0.85
    parts = [outcome.part(level=level) for level in range(1, len(mix.levels) + 1)]
    assert all(higher >= lower - 0.05 for higher, lower in itertools.pairwise(parts))


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        Mix,
        deadline=st.floats(2.2, 10.0),
        load=st.floats(2.0, 6.0),
        sizes=st.sampled_from([(1, 2), (1, 2, 4), (1, 4)]),
        **engines,
    )
)
def test_large_requests_are_not_starved_by_small_ones(mix: Mix) -> None:
    outcome = simulate(mix)
    assert outcome.part(size=max(mix.sizes)) > 0.05 * outcome.part(size=1)


@settings(max_examples=15, deadline=None)
@given(st.builds(Mix, deadline=st.floats(4.0, 30.0), load=st.floats(0.1, 0.6), levels=levels, **engines))
def test_where_there_is_time_for_everybody_everybody_is_in_time(mix: Mix) -> None:
    assert simulate(mix).part() >= 0.97


def test_without_deadlines_overload_is_answered_as_fast_as_the_engines_can() -> None:
    """The peak is what the engines do: the simulation shows what it is measured by."""
    for mix in (Mix(), Mix(8, 2, fixed=0.5), Mix(16, fixed=0.0)):
        assert peak(mix) == pytest.approx(mix.engines * mix.max_rows / mix.batch_s, rel=0.05)


@pytest.mark.parametrize(("part", "least"), [(1, 0.6), (2, 0.8)])
@pytest.mark.parametrize("max_rows", [4, 8, 16])
def test_large_requests_cost_goodput_where_time_is_short_and_are_not_starved(
    max_rows: int, part: int, least: float
) -> None:
    for seed, load in itertools.product(range(2), (2.0, 5.0)):
        mix = Mix(max_rows, deadline=2.2, load=load, sizes=(1, max_rows // part), seed=seed)
        assert kept(mix) > least
        assert simulate(mix).part(size=max_rows // part) > 0.05 * simulate(mix).part(size=1)


@pytest.mark.slow
@pytest.mark.parametrize("deadline", [2.0, 2.3, 3.0, 5.0, 10.0, 30.0])
def test_the_whole_grid(deadline: float) -> None:
    grid = itertools.product(
        (2.0, 5.0),
        ((1.0,), (0.2, 0.8), (0.05, 0.15, 0.8)),
        ((1,), (1, 2, 4)),
        (0.05, 0.5, 1.0),
        (1, 2),
        (0.0, 0.2),
    )
    for load, shares, sizes, fixed, count, jitter in grid:
        mix = Mix(16, count, 0.1, fixed, jitter, deadline, load, shares, sizes, batches=150)
        assert kept(mix) >= KEPT, mix
