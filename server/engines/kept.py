"""What was found out once and is kept for the next start, in a file of JSON."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from pathlib import Path

log = logging.getLogger(__name__)

_writing = threading.Lock()
_MOST = 4096
_MOST_BYTES = 64 * 2**20


class Kept:
    """Texts by key. A file that cannot be read, or is of another make, holds nothing; the oldest of many keys go."""

    def __init__(self, file: Path) -> None:
        """Args: the file, which need not be there yet."""
        self._file = file

    def read(self) -> dict[str, str]:
        """All that is kept."""
        try:
            if self._file.stat().st_size > _MOST_BYTES:
                return {}
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {str(key): text for key, text in found.items() if isinstance(text, str)}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    def write(self, key: str, text: str) -> None:
        """Keeps a text. Where several servers do so at once the last one wins: the others find it out again."""
        with _writing:
            self._write(key, text)

    def _write(self, key: str, text: str) -> None:
        known = {**{k: t for k, t in self.read().items() if k != key}, key: text}
        temporary = self._file.with_name(f".{secrets.token_hex(8)}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dict(list(known.items())[-_MOST:]), indent=1), encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            log.warning("what was found out is not kept in %s: %s", self._file.name, error.strerror)
