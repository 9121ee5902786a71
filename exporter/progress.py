"""What an export shows while it works: on stderr, so that stdout stays the result."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

T = TypeVar("T")

# Where nobody watches a terminal (a CI log), a step earns a line only when it takes longer than this.
NOTABLE_SECONDS = 2.0
LONG_SECONDS = 20.0
"""What is left of a loop that is worth a word of how long it is going to take."""


class Progress(Protocol):
    """Where the steps of an export say what they are doing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield `items` and show how many of `total` are done."""
        ...

    def step(self, label: str) -> AbstractContextManager[None]:
        """Show that the work in the `with` block is under way."""
        ...


class Quiet:
    """Shows nothing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield `items`."""
        return items

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Do nothing around the block."""
        yield


class Terminal:
    """Bars and spinners with the time left on a terminal; elsewhere a line for each thing that took notably long.

    Things within others are named with them. What happens once more is numbered. Where nobody watches a terminal,
    what is going to take long says so as soon as that shows.

    Args:
        console: where to.
        clock: seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._under_way: list[str] = []
        self._told: Counter[str] = Counter()
        self._foretold: set[str] = set()
        self._bars: Bars | None = None

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield `items` with a bar; `total` is their number, where they do not know it themselves."""
        with self._shown(label, total if total is not None else _length(items)) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show a spinner around the block."""
        with self._shown(label, None):
            yield

    @contextmanager
    def _shown(self, label: str, total: int | None) -> Iterator["_Advance"]:
        self._under_way.append(label)
        name = ": ".join(self._under_way)
        self._told[name] += 1
        if (times := self._told[name]) > 1:
            name += f" (time {times})"
        began, done, told = self._clock(), 0, total is None or self._console.is_terminal

        def advance() -> None:
            nonlocal done, told
            moved()
            done += 1
            passed = self._clock() - began
            if not told and passed >= NOTABLE_SECONDS:
                told = True
                self._forecast(name, total or done, passed, done)

        try:
            with self._bar(label, total) as moved:
                yield advance
        finally:
            # Not the last: a loop that was left early is over when it is collected.
            self._under_way.remove(label)
        seconds = self._clock() - began
        if self._console.is_terminal or seconds > NOTABLE_SECONDS:
            self._console.print(f"{escape(name)}  [dim]{seconds:.1f} s[/dim]")

    def _forecast(self, name: str, total: int, passed: float, done: int) -> None:
        """Say how long a loop is going to take, if long; on a terminal its bar does, and within a loop that loop's."""
        whole = passed / done * total
        if whole - passed >= LONG_SECONDS and not self._foretold & {*self._under_way}:
            self._foretold.add(self._under_way[-1])
            self._console.print(f"{escape(name)}: {total} of them, about {duration(whole)}")

    @contextmanager
    def _bar(self, label: str, total: int | None) -> Iterator["_Advance"]:
        """A line of the one display, which is there while anything is under way, and gone when all is done."""
        if self._bars is not None:
            bars, task = self._bars, self._bars.add_task(escape(label), total=total)
            try:
                yield lambda: bars.advance(task)
            finally:
                bars.remove_task(task)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), _Bar(), _Left())
        with Bars(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bars:
            self._bars = bars
            task = bars.add_task(escape(label), total=total)
            try:
                yield lambda: bars.advance(task)
            finally:
                self._bars = None


class _Bar(ProgressColumn):
    """A bar where it is known how much there is."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(20)

    def render(self, task: Task) -> RenderableType:
        """One line's."""
        return "" if task.total is None else self._bar.render(task)


class _Left(ProgressColumn):
    """How much is done and the time left; where nobody knows how much there is, the time that has passed."""

    def render(self, task: Task) -> RenderableType:
        """One line's."""
        if task.total is None:
            return Text(duration(task.elapsed or 0))
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return Text(f"{task.completed:.0f}/{task.total:.0f}{left}")


def duration(seconds: float) -> str:
    """A time for people: 12 s, 3 min, 1 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Interruptible:
    """Shows what `shown` shows, and ends the work at its next step once it is interrupted.

    A signal handler's KeyboardInterrupt alone is not enough: where it strikes inside a library's callback or
    destructor, the library swallows it and the work would go on to the end.
    """

    def __init__(self, shown: Progress, interrupted: Callable[[], bool]) -> None:
        self._shown = shown
        self._interrupted = interrupted

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield `items`; raises KeyboardInterrupt before the next one once interrupted."""
        for item in self._shown.track(items, label, total):
            self._check()
            yield item

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show the block; raises KeyboardInterrupt instead of beginning it once interrupted."""
        self._check()
        with self._shown.step(label):
            yield

    def _check(self) -> None:
        if self._interrupted():
            raise KeyboardInterrupt


class _Advance(Protocol):
    def __call__(self) -> None: ...


def _length(items: Iterable[T]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
