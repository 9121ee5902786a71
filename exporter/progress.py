"""What an export shows while it works: on stderr, so that stdout stays the result."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

T = TypeVar("T")

# Where nobody watches a terminal (a CI log), a step earns a line only when it takes longer than this.
NOTABLE_SECONDS = 2.0


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
    """Bars and spinners on a terminal; elsewhere one line for each thing that took notably long."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)

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
        began = time.perf_counter()
        columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
        if total is not None:
            columns[2:2] = [BarColumn(), MofNCompleteColumn()]
        # Transient: the bar goes away when the work is done, and the line below stays.
        with Bars(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bars:
            task = bars.add_task(label, total=total)
            yield lambda: bars.advance(task)
        seconds = time.perf_counter() - began
        if self._console.is_terminal or seconds > NOTABLE_SECONDS:
            self._console.print(f"{label}  [dim]{seconds:.1f} s[/dim]")


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
