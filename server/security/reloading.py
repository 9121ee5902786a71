"""Values made of files, made again when the files change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from convoynet.server.supervision.threads import SECONDS, Threads

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS = 5.0
"""Between two looks at the files."""


class InvalidFile(ValueError):
    """A file that was named on the command line cannot be used; the message is one line for the operator."""


class Reloaded(Generic[T]):
    """What `read` makes of `files`; a change that cannot be read keeps the old value and logs one line.

    Attributes:
        value: The newest that could be read.
        what: What it is, for people.

    Raises:
        InvalidFile: From the constructor, when the files cannot be used at all.
    """

    def __init__(self, what: str, files: Sequence[Path], read: Callable[[], T]) -> None:
        self.what, self._files, self._read = what, files, read
        self._seen = self._signature()
        self.value = read()

    def refresh(self) -> bool:
        """Reads the files where they differ from what was seen last.

        Returns:
            Whether there is a new value.
        """
        now = self._signature()
        if now == self._seen:
            return False
        try:
            value = self._read()
        except InvalidFile as error:
            self._seen = now
            log.error("%s: the new files cannot be used, the old ones stay in force: %s", self.what, error)
            return False
        # A file that changed while it was read is read again the next time.
        if self._signature() == now:
            self._seen = now
        self.value = value
        log.info("%s: read again", self.what)
        return True

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(file) for file in self._files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


async def keep_fresh(parts: Sequence[Reloaded[Any]], seconds: float) -> None:
    """Looks for changes every `seconds`, until it is cancelled; in a thread, since a file system may not answer."""
    threads = Threads(len(parts) or 1)
    while True:
        await asyncio.sleep(seconds)
        for part in parts:
            try:
                await threads.run(SECONDS, part.refresh)
            except Exception as error:
                log.error("%s cannot be looked at: %s: %s", part.what, type(error).__name__, error)
