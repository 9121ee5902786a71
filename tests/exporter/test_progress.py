"""What an export shows while it works."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from convoynet.exporter.progress import Interruptible, Terminal, duration


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(*, terminal: bool = False) -> tuple[Terminal, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None, highlight=False)
    return Terminal(console, clock), clock, out


def lines(out: io.StringIO) -> list[str]:
    return out.getvalue().splitlines()


def test_what_is_within_something_is_named_with_it_and_what_comes_again_is_numbered() -> None:
    progress, clock, out = shown()
    for _ in range(2):
        with progress.step("recipe a"):
            for _ in progress.track(range(2), "accuracy [x]"):
                clock.now += 2
            with progress.step("quick"):
                pass
        with progress.step("publish"):
            clock.now += 3
    assert lines(out) == [
        "recipe a: accuracy [x]  4.0 s",
        "recipe a  4.0 s",
        "publish  3.0 s",
        "recipe a: accuracy [x] (time 2)  4.0 s",
        "recipe a (time 2)  4.0 s",
        "publish (time 2)  3.0 s",
    ]


def test_a_long_loop_says_early_how_long_it_is_going_to_take_and_once() -> None:
    progress, clock, out = shown()
    for index in progress.track(range(120), "fine-tune"):
        clock.now += 1.0
        assert len(lines(out)) == (index >= 2)  # said when the second item is done, before the third begins
    assert lines(out) == ["fine-tune: 120 of them, about 2 min", "fine-tune  120.0 s"]


def test_loops_within_a_long_loop_leave_the_word_to_it_once_it_knows() -> None:
    progress, clock, out = shown()
    for epoch in progress.track(range(3), "fine-tune"):
        for _ in progress.track(range(60), f"epoch {epoch}"):
            clock.now += 1.0
    assert [line for line in lines(out) if "about" in line] == [
        "fine-tune: epoch 0: 60 of them, about 60 s",
        "fine-tune: 3 of them, about 3 min",
    ]


@pytest.mark.parametrize(("count", "seconds"), [(3, 1.0), (20, 1.0), (1, 60.0), (100, 0.01)])
def test_a_loop_that_is_not_long_says_nothing_before(count: int, seconds: float) -> None:
    progress, clock, out = shown()
    for _ in progress.track(iter(range(count)), "speed", count):
        clock.now += seconds
    assert not any("about" in line for line in lines(out))


def test_a_loop_that_was_left_early_is_over() -> None:
    progress, clock, out = shown()
    for _ in progress.track(range(5), "search"):
        clock.now += 3
        break
    with progress.step("publish"):
        clock.now += 3
    assert lines(out)[-1] == "publish  3.0 s"


def test_a_terminal_has_one_line_a_thing_with_what_is_done_and_the_time_left() -> None:
    progress, _, out = shown(terminal=True)
    with progress.step("recipe a"):
        for _ in progress.track(range(3), "calibrate"):
            progress._bars.refresh()  # type: ignore[union-attr]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "calibrate" in text
    assert re.search(r"[12]/3, \d+ s left", text)
    assert text.splitlines()[-1].split()[:2] == ["recipe", "a"]
    assert "recipe a: calibrate  0.0 s" in text


def test_an_interrupted_thing_is_not_told_of() -> None:
    progress, _, out = shown()
    with pytest.raises(KeyboardInterrupt), Interruptible(progress, lambda: True).step("publish"):
        raise AssertionError
    assert lines(out) == []


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.4, 12, 99, 180, 3540, 4800)] == [
        "0 s",
        "12 s",
        "99 s",
        "3 min",
        "59 min",
        "1 h 20 min",
    ]
