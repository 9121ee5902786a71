"""Carry what the GPU tests and benchmarks need to a machine without internet, in parts that are small enough to send.

    python benchmarks/gpu_bundle.py pack DIR           here: download wheels, cut them into DIR/parts with a manifest
    python3 benchmarks/gpu_bundle.py unpack DIR/parts  there, in a checkout: verify, join, install into build/gpu
    make test-gpu BUNDLE=DIR/parts                     there: unpack, then run

Parts may arrive a few at a time: `unpack` keeps what it has been given, installs every wheel that is complete, and says
what is missing; the order is that of need, so that the first parts are enough to begin. A wheel whose package the other
machine has in an accepted version is not installed, and torch is expected there. Nothing is built or fetched there: it
needs Python 3.12 with pip and packaging. build/gpu/python is then that Python with everything at hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "gpu"
MANIFEST = "manifest.json"
PART_MIB = 56
PYTHON = "3.12"
# pip takes a platform's name literally; these are the ones that the wheels below are known to have.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
PACKAGES = Path(__file__).with_name("gpu_packages.txt")


@dataclass(frozen=True)
class Wheel:
    """A wheel in the stream that the parts are cut from.

    Attributes:
        file: its name.
        package: the package's name, as PyPI compares names.
        accepts: versions of the package that do as well, as a specifier; "" for any.
        start: where in the stream it begins, in bytes.
        bytes: how long it is.
        sha256: of its content.
    """

    file: str
    package: str
    accepts: str
    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """A piece of the stream: the file's name, its length in bytes and its SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds; the parts are of one length but for the last."""

    wheels: tuple[Wheel, ...]
    parts: tuple[Part, ...]

    def write(self, folder: Path) -> None:
        """Write it beside the parts."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            SystemExit: there is none, or it is none.
        """
        try:
            stated = json.loads((folder / MANIFEST).read_text())
            return cls(tuple(Wheel(**row) for row in stated["wheels"]), tuple(Part(**row) for row in stated["parts"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{folder / MANIFEST}: no manifest of a bundle ({error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack_ = commands.add_parser("pack", help="download and cut into parts")
    pack_.add_argument("folder", type=Path)
    pack_.add_argument("--part-mib", type=float, default=PART_MIB, help=f"of a part at most (default: {PART_MIB})")
    pack_.add_argument("--packages", nargs="+", default=packages(), help="instead of all")
    unpack_ = commands.add_parser("unpack", help="verify, join and install, with the Python that has torch")
    unpack_.add_argument("folder", type=Path, help="with the manifest and some or all of the parts")
    arguments = parser.parse_args(argv)
    if arguments.command == "pack":
        wheels = download(arguments.packages, arguments.folder / "wheels")
        made = split(wheels, arguments.folder / "parts", int(arguments.part_mib * 2**20))
        total = sum(wheel.bytes for wheel in made.wheels)
        print(f"{len(made.wheels)} wheels, {total / 2**20:.0f} MiB, in {len(made.parts)} parts")
        return 0
    missing = unpack(arguments.folder, HOME)
    if missing:
        print(f"still missing: {', '.join(missing)}; what is complete is installed")
    return 3 if missing else 0


def packages() -> list[str]:
    """What is carried, in the order of need."""
    lines = (line.strip() for line in PACKAGES.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def download(names: Iterable[str], folder: Path) -> list[Path]:
    """Fetch a wheel for each package with pip, in the versions of constraints.txt, where they are not there yet.

    Raises:
        SystemExit: pip gets none for one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    versions = {canonicalize_name(name): version for name, equal, version in lines if equal}
    return [_wheel(package, versions.get(canonicalize_name(package)), folder) for package in names]


def _wheel(package: str, version: str | None, folder: Path) -> Path:
    def find() -> Path | None:
        fits = [file for file in folder.glob("*.whl") if _named(file)[0] == canonicalize_name(package)]
        return next((file for file in fits if version in (None, _named(file)[1])), None)

    wanted = f"{package}=={version}" if version else package
    flags = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    flags += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--quiet"]
    fetch = [*pip, "download", "--no-deps", *flags, "--dest", str(folder), wanted]
    # Some come as sources alone, of a few lines of Python: a wheel is made of them here.
    make = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), wanted]
    for command in (fetch, make):
        found = find() or (subprocess.run(command, check=False).returncode == 0 and find()) or None
        if found and (command is fetch or found.stem.endswith("none-any")):
            return found
    raise SystemExit(f"pip has no wheel of {wanted} for Python {PYTHON} on Linux; see above")


def split(wheels: Sequence[Path], folder: Path, part_bytes: int) -> Manifest:
    """Cut wheels, one after the other, into parts, and write the manifest beside them.

    Raises:
        ValueError: `part_bytes` is not positive.
    """
    if part_bytes < 1:
        raise ValueError(f"a part of {part_bytes} bytes; give one at least")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    accepts = accepted(wheels)
    rows, at = [], 0
    for file in wheels:
        package, _ = _named(file)
        size = file.stat().st_size
        rows.append(Wheel(file.name, package, str(accepts.get(package, "")), at, size, _sha256([file])))
        at += size
    parts = []
    pieces = _pieces(wheels, part_bytes)
    for index, content in enumerate(pieces):
        name = f"bundle.{index:03d}"
        (folder / name).write_bytes(content)
        parts.append(Part(name, len(content), hashlib.sha256(content).hexdigest()))
    made = Manifest(tuple(rows), tuple(parts))
    made.write(folder)
    return made


def accepted(wheels: Sequence[Path]) -> dict[str, SpecifierSet]:
    """The versions of each package that the project and the other wheels take, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for file in wheels:
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            texts += Parser().parsestr(archive.read(name).decode(), headersonly=True).get_all("Requires-Dist") or []
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": "", "python_version": PYTHON}):
            name = canonicalize_name(requirement.name)
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def unpack(given: Path, home: Path) -> list[str]:
    """Take parts, install what they complete, and write `home`/python.

    Args:
        given: a folder with the manifest and any of the parts.
        home: keeps the parts, the packages (`site`) and the wrapper.

    Returns:
        The names of the parts that are still missing.

    Raises:
        SystemExit: a part or a wheel is not what the manifest says, or pip fails.
    """
    manifest = Manifest.read(given)
    store, site = home / "parts", home / "site"
    for folder in (store, site):
        folder.mkdir(parents=True, exist_ok=True)
    for part in manifest.parts:
        source = given / part.file
        if source.is_file() and not _is(store / part.file, part):
            if not _is(source, part):
                raise SystemExit(f"{source}: not what the manifest says; send it again")
            shutil.copyfile(source, store / part.file)
    there = {part.file: store / part.file for part in manifest.parts if _is(store / part.file, part)}
    install(manifest, there, home)
    return [part.file for part in manifest.parts if part.file not in there]


def install(manifest: Manifest, parts: Mapping[str, Path], home: Path) -> None:
    """Install the wheels that are whole and that this machine lacks, and write the wrapper `home`/python."""
    site, wheels = home / "site", home / "wheels"
    wheels.mkdir(exist_ok=True)
    files = []
    for wheel in manifest.wheels:
        if _is_here(wheel, site):
            continue
        content = join(manifest, parts, wheel)
        if content is not None:
            (wheels / wheel.file).write_bytes(content)
            files.append(str(wheels / wheel.file))
    if files:
        flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(site), *files]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("pip could not install the wheels; see above")
        print(f"installed {', '.join(Path(file).name.split('-')[0] for file in files)}")
    shutil.rmtree(wheels)
    register(site)
    wrapper = home / "python"
    wrapper.write_text(f'#!/bin/sh\nexport PYTHONPATH="{ROOT}/src:{site}"\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def join(manifest: Manifest, parts: Mapping[str, Path], wheel: Wheel) -> bytes | None:
    """A wheel's content out of the parts that hold it; None where one of them is missing.

    Raises:
        SystemExit: it is not what the manifest says.
    """
    content, at = bytearray(), 0
    for part in manifest.parts:
        low, high = max(wheel.start, at), min(wheel.start + wheel.bytes, at + part.bytes)
        if low < high:
            if part.file not in parts:
                return None
            with parts[part.file].open("rb") as stream:
                stream.seek(low - at)
                content += stream.read(high - low)
        at += part.bytes
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise SystemExit(f"{wheel.file}: joined, but not what the manifest says; pack it again")
    return bytes(content)


def register(site: Path) -> None:
    """State the project's version and commands beside the packages, as an installation of the checkout would."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(text)
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = []
    for group, commands in groups.items():
        lines += [f"[{group}]", *(f"{name} = {at}" for name, at in commands.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _is_here(wheel: Wheel, site: Path) -> bool:
    """Whether the machine, or an earlier call, has the package in a version that does."""
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions(path=[str(site)])}
    if wheel.package in installed:
        return _named(Path(wheel.file)) == (wheel.package, installed[wheel.package])
    try:
        version = metadata.version(wheel.package)
    except metadata.PackageNotFoundError:
        return False
    return SpecifierSet(wheel.accepts).contains(version, prereleases=True)


def _is(file: Path, part: Part) -> bool:
    return file.is_file() and file.stat().st_size == part.bytes and _sha256([file]) == part.sha256


def _named(file: Path) -> tuple[str, str]:
    """Package and version out of a wheel's name."""
    name, version, *_ = file.name.split("-")
    return canonicalize_name(name), version


def _pieces(files: Iterable[Path], size: int) -> Iterator[bytes]:
    """The files' bytes, one after the other, in pieces of `size`."""
    left = b""
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(size - len(left)):
                left += block
                if len(left) == size:
                    yield left
                    left = b""
    if left:
        yield left


def _sha256(files: Iterable[Path]) -> str:
    made = hashlib.sha256()
    for content in _pieces(files, 2**20):
        made.update(content)
    return made.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
