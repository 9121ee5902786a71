"""What is released: the version, the packages, the README's commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.server import onnx_models

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_newest_changelog_entry_is_the_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["project"]["version"]


def test_every_dependency_is_explained_and_pinned() -> None:
    project = PROJECT["project"]
    stated = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[<>=;\[]", d)[0].strip() for d in stated}
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert not {n for n in names if not re.search(rf"\b{re.escape(n)}\b", reasons)}
    # onnxruntime-gpu cannot be installed beside onnxruntime, which the tests run with; the clients of object stores
    # want an older python-dateutil than the rest.
    assert names - pinned == {"nvidia-nvimgcodec-cu13", "onnxruntime-gpu", "gcsfs", "s3fs"}


def test_make_help_tells_of_every_target() -> None:
    shown = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    told = set(re.findall(r"^  make ([\w-]+) +\S", shown, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[0].split()
    assert set(phony) == told


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^convoy (\w+)", text, re.MULTILINE))
    assert commands
    assert commands <= {*PROJECT["project"]["entry-points"]["convoy.commands"], "completion", "help"}
    targets = set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE))
    assert targets
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    titles = re.findall(r"^#+ +(.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_documents_leads_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md")]:
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
            target = document.parent / file if file else document
            assert target.exists(), f"{document.name}: {file}"
            assert not anchor or anchor in anchors(target), f"{document.name}: {file}#{anchor}"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]


def test_every_file_that_is_named_somewhere_is_there() -> None:
    """Paths in documents, docstrings and comments, and modules that a document names without their folder."""
    folders = ("exporter", "server", "tests", "benchmarks", "docs", "deploy")
    documents = [ROOT / "Makefile", *ROOT.glob("*.md"), *(f for d in folders for f in (ROOT / d).rglob("*.md"))]
    modules = {file.name for folder in folders for file in (ROOT / folder).rglob("*.py")}
    path = (
        rf"(?<![\w/.-])(?:{'|'.join(folders)}|protos|src)/(?!results/)[\w/.-]+\.(?:py|md|proto|toml|ya?ml|txt|sh|j2)\b"
    )
    for file in [*documents, *(f for d in folders for f in (ROOT / d).rglob("*.py"))]:
        text = file.read_text()
        for named in re.findall(path, text):
            assert (ROOT / named).exists(), f"{file}: {named}"
        for named in re.findall(r"`([a-z_0-9]+\.py)`", text) if file.suffix == ".md" else ():
            assert named in modules or named in ("nets.py", "server.py"), f"{file}: {named}"  # a reader's own


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["archs", "--help"]])
def test_help_works(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convoynet.server.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_unknown_command_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convoynet.server.cli", "exprot"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert re.fullmatch(r"convoy: unknown command 'exprot'; did you mean export\?.*\n", done.stderr)


def test_the_demo_runs() -> None:
    """`make demo` with the network that is always there: export, serve, call, load, metrics, stop."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "demo.py")], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^parity ", done.stdout + done.stderr, re.MULTILINE)
    answers = re.findall(r"^digits/(\d)/\d+\.png +(\d) ", done.stdout, re.MULTILINE)
    assert len(answers) == 10
    assert sum(true == label for true, label in answers) >= 9, answers
    assert re.search(r"throughput: \d+ images/s", done.stdout)
    assert re.search(r"the server's page: http://\S+/", done.stdout)
    assert "exited with 0" in done.stdout


def test_the_demo_reads_past_warnings_of_its_server(tmp_path: Path) -> None:
    onnx_models.write_linear(tmp_path / "models")
    (tmp_path / "models" / "notes").mkdir()
    program = "import demo; server, url, *_ = demo.serve(); print('found', url); server.terminate(); server.wait(60)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT / "docs")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"no models, since they hold no .*notes.*\n(.*\n)*found \S+:\d+\n", done.stdout), done.stdout
