"""Writes a file so that a reader sees the old one or the new one."""

import contextlib
import os
import secrets
from pathlib import Path

from convoynet.exporter.errors import BadInput


def write(path: Path, content: bytes) -> None:
    """Write `content` to a hidden file beside `path`, force it to the disk, and rename it.

    Raises:
        BadInput: the disk refuses; `path` is as it was.
    """
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with hidden.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()
