"""More requests with deadlines than engines can answer, simulated: what part of their work is answers in time."""

from __future__ import annotations

import itertools
from math import ceil, exp
from statistics import mean

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.server.scheduling.simulation import Mix, peak, simulate

KEPT = 0.9
"""The part of the peak that is left for every deadline of two batches, however slow, and more."""
SHARE = 0.35
"""The part of an equal share that requests of any size have at least."""

ENGINES = {
    "max_rows": st.sampled_from([4, 8, 16]),
    "engines": st.integers(1, 2),
    "batch_s": st.sampled_from([0.005, 0.1, 0.5]),
    "fixed": st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0),
    "jitter": st.floats(0.0, 0.2),
    "seed": st.integers(0, 99),
}
LEVELS = ((1.0,), (0.5, 0.5), (0.2, 0.8), (0.9, 0.1), (0.04, 0.96), (0.05, 0.15, 0.8))


def kept(mix: Mix) -> float:
    """Goodput over the peak, of the time in which anything is asked."""
    return simulate(mix).goodput / peak(mix) / (1 - mix.quiet / 50)


def possible(mix: Mix) -> float:
    """The part of the peak that nobody can exceed with a deadline of two batches.

    What runs then came during the batch before. Of n requests in a batch's time, on average, none comes in one of
    exp(n) such times, and the next one a batch / n later: so long an engine has nothing that it could run in time.
    """
    asked = mix.load * mix.max_rows / mean(mix.sizes)
    return 1 / (1 + exp(-asked) / asked)


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Twice to ten times what the engines can answer, of all sizes, often of such that are hard to fit into a batch."""
    of_engines = draw(st.fixed_dictionaries(ENGINES))
    most = of_engines["max_rows"]
    hard = [(1,), (1, 2, most // 4), (1, most // 2), (1, most), (most,), (most // 2, most), tuple(range(1, most + 1))]
    many_small = [(1,) * most + (most,), (1,) * 3 + (most // 2 + 1,)]
    some = st.lists(st.integers(1, most), min_size=1, max_size=4).map(tuple)
    sizes = draw(st.sampled_from(hard + many_small) | some)
    return Mix(
        deadline=draw(st.floats(2.0, 4.0) | st.floats(4.0, 30.0)),
        load=draw(st.floats(2.0, 6.0) | st.just(10.0)),
        levels=draw(st.sampled_from(LEVELS)),
        sizes=sizes,
        quiet=draw(st.sampled_from([0, 0, 25])),
        batches=100 * min(ceil(mean(sizes)), 4),  # where requests are few they vary more
        **of_engines,
    )


@settings(max_examples=30)
@given(mixes())
@example(Mix(16, 1, 0.1, 0.8, 0.05, 5.0, 10.0, (0.05, 0.15, 0.8)))
@example(Mix(16, 1, 0.4, 0.5, 0.0, 2.0, 2.0, (0.2, 0.8)))
@example(Mix(16, 2, 0.4, 1.0, 0.1, 15.0, 10.0, (0.05, 0.15, 0.8), (1, 2, 4)))
@example(Mix(4, 1, 0.1, 1.0, 0.0, 3.0, 5.0, batches=30))
@example(Mix(16, 1, 0.5, 1.0, 0.0, 3.0, 3.0, (1.0,), (1, 16), batches=300))
@example(Mix(16, 1, 0.1, 0.5, 0.0, 2.0, 5.0, (1.0,), (1, 16), batches=300))
@example(Mix(16, 1, 0.5, 0.8, 0.05, 2.0, 2.0, (0.05, 0.15, 0.8), (1, 16), batches=300))
@example(Mix(8, 1, 0.5, 0.8, 0.0, 2.0, 2.0, (0.2, 0.8), (1, 4), batches=300))
def test_what_is_answered_in_time_is_nearly_all_that_the_engines_can_do(mix: Mix) -> None:
    """Whatever the deadline, the load, the priorities and the sizes; from the start, when nothing was measured."""
    assert kept(mix) >= KEPT * possible(mix)


@settings(max_examples=20)
@given(mixes())
@example(Mix(16, 1, 0.1, 1.0, 0.05, 2.2, 10.0, sizes=(1, 16), batches=300))
@example(Mix(16, 1, 0.1, 1.0, 0.05, 2.0, 10.0, sizes=(10, 12, 15, 16), batches=300))
@example(Mix(16, 1, 0.1, 1.0, 0.05, 3.0, 2.0, (0.05, 0.15, 0.8), (1, 16), batches=300))
def test_no_size_is_starved_and_no_lower_level_goes_first(mix: Mix) -> None:
    """The largest and the smallest have a good part of what all would have if they had the same."""
    outcome = simulate(mix)
    equal = possible(mix) * peak(mix) * mix.batch_s / (mix.load * mix.engines * mix.max_rows)
    assert all(outcome.part(size=size) >= SHARE * equal for size in (min(mix.sizes), max(mix.sizes)))
    parts = [outcome.part(level=level) for level in range(1, len(mix.levels) + 1)]
    assert all(higher >= lower - 0.05 for higher, lower in itertools.pairwise(parts))


@settings(max_examples=15)
@given(
    st.builds(
        Mix,
        deadline=st.floats(2.2, 10.0),
        load=st.floats(3.0, 6.0),
        levels=st.sampled_from([(0.1, 0.9), (0.04, 0.16, 0.8)]),
        sizes=st.sampled_from([(1,), (1, 2)]),
        **ENGINES,
    )
)
def test_who_comes_first_by_priority_is_in_time_while_the_others_are_many(mix: Mix) -> None:
    assert simulate(mix).part(level=1) >= 0.85


@settings(max_examples=15)
@given(
    st.builds(Mix, deadline=st.floats(4.0, 30.0), load=st.floats(0.1, 0.6), levels=st.sampled_from(LEVELS), **ENGINES)
)
def test_where_there_is_time_for_everybody_everybody_is_in_time(mix: Mix) -> None:
    assert simulate(mix).part() >= 0.97


def test_without_deadlines_overload_is_answered_as_fast_as_the_engines_can() -> None:
    """The peak is what the engines do: the simulation shows what it is measured by."""
    for mix in (Mix(), Mix(8, 2, fixed=0.5), Mix(16, fixed=0.0)):
        assert peak(mix) == pytest.approx(mix.engines * mix.max_rows / mix.batch_s, rel=0.05)
