"""What the documents have a reader type: blocks of code, with what stands above them, and the code in sentences.

A comment directly above a block, which the page does not show, says what is done with it here:

    <!-- not run: needs a GPU -->            it is not run; the reason is one of REASONS, and may go on behind a comma
    <!-- run by: tests/clients/test_docs.py -->   that test runs it
    <!-- file: nets.py -->                   the reader saves it under that name, before the page begins

Shell and Python without one are run by `make test-docs` (test_pages.py).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)
REASONS = (
    "needs a GPU",
    "needs a cluster",
    "needs the internet",
    "needs your own files",
    "needs your own server",
    "changes the system",
    "takes long",
    "is a part of a program",
)
RUNS = ("sh", "python")
DATA = ("json", "pbtxt", "promql", "toml", "yaml")
"""Checked by what reads it; `text` is what a command printed, or a drawing."""

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"<!-- (not run|run by|file): (.+) -->\s*\Z")
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?([^\n]*)\n.*?^\1$", re.MULTILINE | re.DOTALL)
_SUBSTITUTION = re.compile(r"\$\(([^()]+)\)")
_LEADS = {"do", "then", "while", "if", "else", "!", "sudo", "{"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: its document, from the root.
        line: where it begins.
        language: as the fence names it.
        text: what it holds.
        kind: "not run", "run by", "file", or "" without a comment.
        note: what the comment says of that kind.
    """

    page: str
    line: int
    language: str
    text: str
    kind: str
    note: str

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether `make test-docs` runs it."""
        return self.language in RUNS and not self.kind


def blocks(page: Path) -> list[Block]:
    """Those of a document, in its order."""
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        note = _NOTE.search(text[: fence.start()])
        body = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        line = text.count("\n", 0, fence.start()) + 1
        kind, said = (note[1], note[2]) if note else ("", "")
        found.append(Block(str(page.relative_to(ROOT)), line, fence[2], body, kind, said))
    return found


def spans(page: Path) -> Iterator[tuple[str, str]]:
    """(place, code) of the code within sentences and tables."""
    text = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text())
    for paragraph in re.finditer(r"(?:.+\n)+", text):
        for span in re.finditer(r"(?<!`)`([^`]+)`(?!`)", paragraph[0]):
            line = text.count("\n", 0, paragraph.start() + span.start()) + 1
            yield f"{page.relative_to(ROOT)}:{line}", " ".join(span[1].replace("\\|", "|").split())


def commands(script: str) -> list[list[str]]:
    """The words of each command of a script, without redirections; those within $(...) are commands of their own."""
    script = _HEREDOC.sub(r"\2", script.replace("\\\n", " "))
    found: list[list[str]] = []
    line = ""
    for part in script.splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            words = _words(line)
        except ValueError:  # a quotation that goes on in the next line
            continue
        while inner := _SUBSTITUTION.search(line):
            found += commands(inner[1])
            line = line.replace(inner[0], "")
            words = _words(line)
        found += _split(words)
        line = ""
    return found


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _split(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    target = False  # of a redirection
    for word in [*words, ";"]:
        if target:
            target = False
        elif set(word) <= set("<>"):
            target = True
        elif set(word) <= set(";&|()"):
            if command:
                yield command
            command = []
        elif command or not (word in _LEADS or re.match(r"\w+=", word)):
            command.append(word)
