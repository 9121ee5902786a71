"""What is installed: wheel and sdist, the one import package in them, and every line that says `pip install`."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
FOLDERS = ("exporter", "server", "protos")
STATED = ("src", *FOLDERS, "pyproject.toml", "README.md", "LICENSE")


def source(folder: Path) -> Path:
    """A copy of what a distribution is made of: building leaves files behind."""
    for name in STATED:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, folder: Path, output: Path) -> Path:
    """Builds a "wheel" or "sdist" as pip does, with the backend that is installed here."""
    output.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (made,) = output.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    folder.mkdir()
    return source(folder)


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    return build("sdist", checkout, checkout.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build("wheel", checkout, checkout.parent / "wheel")


@pytest.fixture(scope="module")
def fresh(wheel: Path) -> Path:
    """An environment's python, with the wheel and, from beside it, the packages that Convoy needs, but not ours."""
    folder = wheel.parents[1] / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A path in a .pth file is no site folder: the .pth files in it, one of them of the editable install, are not read.
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_one_package_and_all_of_it(wheel: Path) -> None:
    found = names(wheel)
    tops = {PurePosixPath(name).parts[0] for name in found}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"convoynet"}
    assert wheel.name.startswith("convoynet-")
    patterns = ("*.py", "*.pyi", "*.proto", "assets/*", "static/*")
    files = {f for folder in FOLDERS for pattern in patterns for f in (ROOT / folder).rglob(pattern) if f.is_file()}
    wanted = {f"convoynet/{file.relative_to(ROOT)}" for file in files if "__pycache__" not in file.parts}
    own = {f"convoynet/{file.name}" for file in (ROOT / "src" / "convoynet").glob("*.py")}
    assert wanted | own | {"convoynet/py.typed"} == {n for n in found if n.startswith("convoynet/")}


def test_the_sdist_makes_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert names(build("wheel", folder, tmp_path / "wheel")) == names(wheel)


WITH_FILES_OF_ONES_OWN = """
import sys
import convoynet
assert "site-packages" in convoynet.__file__, convoynet.__file__
assert convoynet.Client.__module__ == "convoynet.server.client.client"
import exporter, protos, server
assert (server.mine, exporter.mine, protos.mine) == (True,) * 3
sys.path = [entry for entry in sys.path if "site-packages" in entry]
for name in ("server", "exporter", "protos"):
    del sys.modules[name]
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
"""


def test_files_of_ones_own_with_our_folders_names_are_in_nobodys_way(fresh: Path, tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(fresh), "-c", WITH_FILES_OF_ONES_OWN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in (["convoy", "--version"], ["convoy", "serve", "--help"], ["export", "--help"]):
        script = [str(fresh.with_name(command[0])), *command[1:]]
        done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def pip_lines() -> Iterator[tuple[str, str]]:
    """Where a document, an image or a message says `pip install`, and what it says to install of ours."""
    documents = [*ROOT.glob("*.md"), *(f for f in (ROOT / "docs").rglob("*.md")), *(ROOT / "benchmarks").glob("*.md")]
    documents += [file for file in (ROOT / "deploy").rglob("*") if file.is_file()]
    documents += [file for folder in ("exporter", "server") for file in (ROOT / folder).rglob("*.py")]
    for file in documents:
        for line in re.findall(r"pip install[^\n]*", file.read_text(encoding="utf-8", errors="replace")):
            for quoted in re.findall(r"""(["'])(.*?)\1""", line):
                if "convoy" in quoted[1] or quoted[1].startswith("."):
                    yield str(file.relative_to(ROOT)), quoted[1]
            assert not re.search(r"\s\.(\s|$|\[)|\bconvoy\[", line), f"{file}: {line}"


def test_every_line_that_says_pip_install_means_our_distribution(fresh: Path, checkout: Path) -> None:
    told = list(pip_lines())
    assert {"README.md", "docs/gpu.md", "deploy/docker/server.Dockerfile"} <= {f for f, _ in told}
    wanted = set()
    for file, text in told:
        named = re.fullmatch(r"convoynet\[([\w,]+|\$\{EXTRAS\})\]( @ file://(\$PWD|/src))?", text)
        assert named, f"{file}: {text}"
        assert named[1] == "${EXTRAS}" or set(named[1].split(",")) <= EXTRAS, f"{file}: {text}"
        wanted.add(text.replace("${EXTRAS}", "cpu").replace("$PWD", str(checkout)).replace("/src", str(checkout)))
    # With ours installed, pip takes it for what is asked and looks for its extras' packages alone.
    installed = sorted(text for text in wanted if "@" not in text)
    pip = [sys.executable, "-m", "pip", "--python", str(fresh), "install", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, *installed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    assert "Collecting" not in done.stdout
    assert re.search(rf"already satisfied: convoynet\[\S+\] in {re.escape(str(fresh.parents[1]))}", done.stdout)
    # A checkout is named by its folder.
    local = sorted(text for text in wanted if "@" in text)
    done = subprocess.run(
        [*pip, "--dry-run", "--no-build-isolation", "--force-reinstall", local[0]],
        capture_output=True, text=True, check=False,
        cwd=checkout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Would install convoynet-" in done.stdout
