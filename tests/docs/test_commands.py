"""Every block of the documents is run, or says why not, and every command in them is one that there is.

Nothing is executed here: test_pages.py does (`make test-docs`).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format

import convoynet
from convoynet.completion import parser as completion_parser
from convoynet.exporter.recipe import from_dicts
from convoynet.protos.inference import model_config_pb2
from convoynet.usage import parser_of
from tests.docs.documents import DATA, PAGES, REASONS, ROOT, RUNS, Block, blocks, commands, spans

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
MAKEFILE = (ROOT / "Makefile").read_text()
FOLDERS = "deploy|docs|tests|benchmarks|src|exporter|server"


@cache
def parsers() -> dict[str, ArgumentParser]:
    """What each command of `convoy` parses with."""
    found: dict[str, ArgumentParser] = {e.name: parser_of(e.load()) for e in entry_points(group="convoy.commands")}
    return found | {"completion": completion_parser(), "help": ArgumentParser(add_help=False)}


def wrong_make(words: list[str]) -> Iterator[str]:
    """What is wrong with `make` and these words."""
    for word in words:
        name, given, _ = word.partition("=")
        known = rf"\b{name}\b" if given else rf"^{re.escape(name)}:|^CPUS := .*\b{name.removeprefix('test-cpu-')}\b"
        if not re.search(known, MAKEFILE, re.MULTILINE):
            yield f"make {word}: the Makefile has no such {'variable' if given else 'target'}"


def wrong_python(words: list[str]) -> Iterator[str]:
    """What is wrong with `python` and these words, or with a program of benchmarks/ and its flags."""
    if words[:1] == ["-m"]:
        if words[1:] and find_spec(words[1]) is None:
            yield f"python -m {words[1]}: there is no such module"
        return
    if not words or not words[0].endswith(".py"):
        return
    program = ROOT / words[0]
    if not program.is_file():
        yield f"{words[0]} is not there"
        return
    text = program.read_text()
    # Programs that take the same flags have them from a module beside them.
    beside = [f for f in program.parent.glob("*.py") if re.search(rf"^(import|from) {f.stem}\b", text, re.MULTILINE)]
    text += "".join(file.read_text() for file in beside)
    for flag in (word.partition("=")[0] for word in words[1:]):
        if flag.startswith("--") and f'"{flag}"' not in text:
            yield f"{words[0]} has no {flag}"


def wrong_flags(words: list[str]) -> Iterator[str]:
    """What is wrong with `convoy` and these words of a sentence, where names stand for what they mean."""
    if not words or words[0].isupper() or words[0] in ("…", "..."):
        return
    if words[0].startswith("--"):
        if words[0] not in ("--help", "--version"):
            yield f"convoy has no {words[0]}"
    elif words[0] not in parsers():
        yield f"convoy has no command {words[0]}"
    else:
        known = parsers()[words[0]]._option_string_actions
        for flag in (re.split(r"[=|\]]", word.lstrip("["))[0] for word in words[1:]):
            if flag.startswith("--") and flag not in known:
                yield f"convoy {words[0]} has no {flag}"


def wrong_usage(words: list[str]) -> Iterator[str]:
    """What `convoy` would say of these words before it does anything."""
    if words[:1] in (["--help"], ["--version"], ["help"]):
        return
    if not words or words[0] not in parsers():
        yield f"convoy has no command {' '.join(words[:1])}"
        return
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parsers()[words[0]].parse_args(words[1:])
        except SystemExit as end:
            if end.code:
                yield said.getvalue().strip()


def wrong(words: list[str], *, sentence: bool) -> list[str]:
    """What is wrong with a command; `sentence`: it stands in one, and need not be whole."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if words[0] == ".venv/bin/export" or (sentence and program == "export"):
        program, rest = "convoy", ["export", *rest]
    if program == "convoy":
        return list(wrong_flags(rest) if sentence else wrong_usage(rest))
    if program == "make":
        return list(wrong_make(rest))
    if program in ("python", "python3", "python3.11"):
        return list(wrong_python(rest))
    if program.startswith("benchmarks/"):
        return list(wrong_python(words))
    return []


def test_every_block_names_its_language() -> None:
    assert not [block.place for block in BLOCKS if block.language not in (*RUNS, *DATA, "text")]


def test_what_a_text_shows_is_no_command() -> None:
    command = re.compile(r"^\s*\$?\s*(convoy|export|make|curl|pip|python|docker|kubectl) \S", re.MULTILINE)
    assert not [block.place for block in BLOCKS if block.language == "text" and command.search(block.text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_comment_above_a_block_holds(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "not run":
            assert block.note.partition(",")[0] in REASONS, block.place
        elif block.kind == "run by":
            test = ROOT / block.note
            assert test.is_file(), f"{block.place}: {block.note} is not there"
            assert f'"{page.name}"' in test.read_text() or block.page in test.read_text(), (
                f"{block.place}: {block.note} does not read it"
            )
    placed = page.read_text().count("<!-- not run:") + page.read_text().count("<!-- run by:")
    assert placed == sum(block.kind in ("not run", "run by") for block in blocks(page)), "one is above no block"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_every_command_is_one_that_there_is(block: Block) -> None:
    parsed = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    found = commands(block.text)
    assert found
    assert not [fault for words in found for fault in wrong(words, sentence=False)]
    for path in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]+", block.text):
        # A program of another language is made below build/; a path to a pattern is one of its files.
        assert list(ROOT.glob(path)), f"{path} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_sentence_is_one_that_there_is(page: Path) -> None:
    faults = []
    for place, code in spans(page):
        if re.match(r"(\.venv/bin/)?(convoy|export|make|python3?)( |$)|benchmarks/\w+\.py", code):
            faults += [f"{place}: {fault}" for fault in wrong(words_of(code), sentence=True)]
    assert not faults


def words_of(code: str) -> list[str]:
    """As a shell takes them, or where a sentence leaves a quotation open, as they stand."""
    try:
        return shlex.split(code)
    except ValueError:
        return code.split()


OF_OTHERS = {"--no-healthcheck": "docker", "--set": "helm"}
"""Flags in sentences that are no program's of this repository."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_in_a_sentence_is_one_that_there_is(page: Path) -> None:
    ours = {"--help", "--version", *(flag for parser in parsers().values() for flag in parser._option_string_actions)}
    programs = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    faults = []
    for place, code in spans(page):
        for word in code.split() if code.startswith("--") else ():
            flag = re.split(r"[=|/\]…,]", word)[0]
            known = flag in ours or flag in OF_OTHERS or f'"{flag}"' in programs
            if flag.startswith("--") and flag != "--" and not known:
                faults.append(f"{place}: no program has {flag}")
    assert not faults


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: block.place
)
def test_every_program_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "convoynet":
            names = {alias.name for alias in node.names}
            if node.module == "convoynet":
                assert names <= set(convoynet.__all__)
            else:
                module = importlib.import_module(str(node.module))
                assert not [name for name in names if not hasattr(module, name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "convoynet":
            assert node.attr in convoynet.__all__


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in DATA], ids=lambda block: block.place)
def test_what_is_shown_as_data_can_be_read(block: Block) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        assert list(yaml.safe_load_all(block.text))
    elif block.language == "pbtxt":
        assert text_format.Parse(block.text, model_config_pb2.ModelConfig()).ListFields()
    elif block.language == "toml":
        read = tomllib.loads(block.text)
        assert from_dicts(read.get("step", []), block.place) or "step" not in read
    else:
        known = set(re.findall(r"convoy_\w+", (ROOT / "docs" / "metrics.md").read_text()))
        assert not set(re.findall(r"convoy_\w+", block.text)) - known


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("convoy export --arhc lenet5", "unknown flag --arhc"),
        ("convoy exprot", "no command exprot"),
        ("TOKEN=$(convoy token camera)", "ROLES"),
        ("convoy bench --model m \\\n  --concurrency x > out", "'x' is not"),
        ("make tset", "no such target"),
        ("make test NAEMS=x", "no such variable"),
        ("python benchmarks/serving.py --xyz", "has no --xyz"),
        ("python -m convoynet.nothing", "no such module"),
    ],
)
def test_a_command_that_there_is_not_is_found(line: str, words: str) -> None:
    (fault,) = [fault for command in commands(line) for fault in wrong(command, sentence=False)]
    assert words in fault


def test_scripts_are_taken_apart_as_a_shell_does() -> None:
    script = "a=1 b 'c d' | e > f && g # h\nfor x in y; do\n  k \\\n  l <<T\nm\nT\ndone\nn '1\n2'"
    assert [shlex.join(words) for words in commands(script)] == [
        *("b 'c d'", "e", "g", "for x in y", "k l", "done"),
        "n '1\n2'",
    ]
