"""One style for the flags of all commands: a usage error is one line, which names what was meant.

Here, since the exporter and the server share it and neither imports the other.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NoReturn

_FLAG = re.compile(r"--?[A-Za-z][^\s=]*")
_KINDS = {"int": "a whole number", "float": "a number"}
_TYPE = re.compile(rf"invalid ({'|'.join(_KINDS)}) value: (?P<given>.*)")
_CHOICE = re.compile(r"invalid choice: (?P<given>'[^']*') \(choose from (?P<known>.*)\)")
# What other tools call it -> what the commands here do; the first that a command has is the one that was meant.
_ELSEWHERE = {
    **dict.fromkeys(("--model", "--network", "--architecture"), ("--arch", "--model-repository")),
    **dict.fromkeys(("--quantize", "--quantization", "--quant", "--ptq"), ("--int8",)),
    **dict.fromkeys(("--checkpoint", "--ckpt", "--pretrained", "--state-dict"), ("--weights",)),
    **dict.fromkeys(("--data", "--dataset", "--calib", "--calibration-data"), ("--calibration", "--images", "--eval")),
    **dict.fromkeys(("--imgsz", "--image-size", "--img-size", "--resolution"), ("--input-size",)),
    **dict.fromkeys(("--opset-version", "--opset_version"), ("--opset",)),
    **dict.fromkeys(("--device", "--hardware"), ("--target",)),
    **dict.fromkeys(("--batch-size", "--max-batch"), ("--batch",)),
    **dict.fromkeys(("--output", "--output-dir", "--out", "-o"), ("--output", "--model-repository")),
    **dict.fromkeys(("--models", "--model-store", "--model-dir", "--repository"), ("--model-repository",)),
    **dict.fromkeys(("--port", "-p"), ("--grpc-port",)),
    **dict.fromkeys(("--server", "--endpoint", "--address", "--host"), ("--url",)),
}


def meant(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, where something that is known is like what was given; else nothing."""
    import difflib

    near = difflib.get_close_matches(given, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what --help is for."""

    looking: ClassVar[bool] = False
    """Whether commands are called for their parsers alone: `parser_of`."""
    _given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        if choice := _CHOICE.search(message):
            message += meant(choice["given"].strip("'"), re.findall(r"[^\s,']+", choice["known"]))
        elif "required" in message and (word := self._stray()):
            message += f"; {word!r} stands without a flag before it"
        message = _TYPE.sub(lambda found: f"{found['given']} is not {_KINDS[found[1]]}", message)
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse has it; a flag that there is not comes before what is missing, since it may be that in error."""
        if Parser.looking:
            raise _Found(self)
        given = self._given = list(sys.argv[1:] if args is None else args)
        for word in given[: given.index("--")] if "--" in given else given:
            if _FLAG.fullmatch(flag := word.partition("=")[0]) and not self._knows(flag):
                self.error(f"unknown flag {flag}{self._meant(flag)}")
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse has it."""
        found, more = self.parse_known_args(args, namespace)
        if more:
            self.error(f"unexpected {' '.join(map(repr, more))}")
        return found

    def _meant(self, flag: str) -> str:
        """What was probably meant by a flag that there is not: what is called so elsewhere, or is spelled nearly so."""
        known = self._option_string_actions
        for name in _ELSEWHERE.get(flag, ()):
            if name in known:
                return f"; did you mean {name}?"
        bare = flag.strip("-").rstrip("s")
        for action in self._get_positional_actions():
            if bare and bare in (action.dest.rstrip("s"), str(action.metavar).lower().rstrip("s")):
                return f"; {action.metavar or action.dest} stands without a flag"
        return meant(flag, [name for name in known if name.startswith("--")])

    def _stray(self) -> str:
        """The first word, where it is no flag and the command takes flags alone."""
        first = next(iter(self._given), "")
        return "" if first.startswith("-") or self._get_positional_actions() else first

    def _knows(self, flag: str) -> bool:
        """Whether it is a flag, or where these may be shortened the beginning of one."""
        names = self._option_string_actions
        short = not flag.startswith("--") and flag[:2] in names
        return flag in names or short or (self.allow_abbrev and any(name.startswith(flag) for name in names))


class _Found(BaseException):
    """What a command parses with: no command takes it for an error of its own."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(command: Callable[[Sequence[str]], int]) -> Parser:
    """What a command parses its arguments with, which it makes when it is called; it gets no further."""
    try:
        with _looking():
            command([])
    except _Found as found:
        return found.parser
    raise ValueError(f"{command} has no Parser")


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    Parser.looking = True
    try:
        yield
    finally:
        Parser.looking = False
