"""The files of a repository are read here: regular files alone, and no more of them than they may have."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from convoynet.server.errors import InvalidModel

BOM = "\ufeff"
"""What some editors put in front of a text."""
MAX_TEXT_BYTES = 64 * 2**20
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def kind_of(mode: int) -> str:
    """What a file is by its mode, where it is not a regular one; "" where it is."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def open_regular(file: Path) -> BufferedReader:
    """Opens a file to be read. What is no regular file is not waited for: a FIFO has nobody who writes it.

    Raises:
        InvalidModel: It is a FIFO, a socket, a device or a folder.
        OSError: It is not there, or cannot be read.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if what := kind_of(os.fstat(descriptor).st_mode):
            raise InvalidModel(f"{file.name} is {what}: put a regular file there")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(file: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """All of a file.

    Raises:
        InvalidModel: It is no regular file, or larger than `most` bytes.
        OSError: It is not there, or cannot be read.
    """
    with open_regular(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise InvalidModel(f"{file.name} is larger than {most} bytes")
    return content


def read_text(file: Path, most: int = MAX_TEXT_BYTES) -> str:
    """A text that somebody wrote on some system: UTF-8, whose lines end with a line feed, a carriage return or both.

    Returns:
        It without a byte order mark, with a line feed at the end of each line.

    Raises:
        InvalidModel: It is no regular file, larger than `most` bytes, or not UTF-8.
        OSError: It is not there, or cannot be read.
    """
    try:
        text = read_regular(file, most).decode()
    except UnicodeDecodeError as error:
        raise InvalidModel(f"{file.name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    return text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(file: Path) -> list[str]:
    """The lines of a text. Only line ends end a line: the names in it may hold any other character.

    Raises:
        InvalidModel, OSError: As read_text() does.
    """
    text = read_text(file)
    return text.removesuffix("\n").split("\n") if text else []
