"""Calls that may hang (of files, of the network) in threads of their own, with a limit on their time and number.

The pool that asyncio shares is not for them: what closes engines and copies tensors needs it, and a file system that
does not answer would take all of its threads, and hold up the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

MOST = 64
"""Calls that may be under way at a time, those that nobody waits for any more included."""
SECONDS = 60.0
"""What a call may take that reads little: names, sizes, a config."""


class Overdue(OSError):
    """A call has not come back in time, or none can be begun since too many have not."""


class Threads:
    """Runs calls, each in a daemon thread: one that hangs holds up neither the others nor the end of the process."""

    def __init__(self, most: int = MOST) -> None:
        """Args: how many calls may be under way at a time; further ones wait."""
        self._places = asyncio.Semaphore(most)
        self._most = most

    async def run(self, limit: float, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `function` returns or raises.

        A call that is given up goes on in its thread and keeps its place until it comes back.

        Args:
            limit: Seconds that the call may take, its wait for a place included.
            function: What is called.
            *args: Its arguments.
            **kwargs: The same.

        Raises:
            Overdue: It did not come back in time.
        """
        try:
            async with asyncio.timeout(limit) as clock:
                await self._places.acquire()
                try:
                    result = self._begin(lambda: function(*args, **kwargs))
                except BaseException:
                    self._places.release()
                    raise
                return await asyncio.shield(result)
        except TimeoutError:
            if not clock.expired():
                raise
            raise Overdue(errno.ETIMEDOUT, f"no answer within {limit:g} s") from None

    def _begin(self, call: Callable[[], _T]) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[_T] = loop.create_future()
        # Whoever waited may be gone, and nobody else wants the error.
        result.add_done_callback(lambda done: done.cancelled() or done.exception())

        def settle(value: Any, error: BaseException | None) -> None:
            self._places.release()
            if result.done():
                return
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        def run() -> None:
            value, error = None, None
            try:
                value = call()
            except BaseException as raised:
                # A future takes no StopIteration.
                error = RuntimeError(repr(raised)) if isinstance(raised, StopIteration) else raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, value, error)

        threading.Thread(target=run, name="files", daemon=True).start()
        return result
