"""The bundle for a GPU machine without internet: cut, sent in part, joined, checked, installed; with small wheels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_bundle", ROOT / "benchmarks" / "gpu_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bundle = _load()
SIZE = 500


def wheel(folder: Path, name: str, version: str = "1.0", needs: str = "") -> Path:
    """A package of one module, which knows its version."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    contents = {
        f"{module}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in contents) + f"{info}/RECORD,,\n"
    file = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in {**contents, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return file


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "wheels"
    folder.mkdir()
    # numpy is on this machine, but not in the version that the third package wants of it.
    old = wheel(folder, "numpy", "0.1"), wheel(folder, "packaging", "1.0")
    return [wheel(folder, "convoy-small"), wheel(folder, "convoy-large", needs="packaging>=20"), *old]


@pytest.fixture
def parts(wheels: list[Path], tmp_path: Path) -> Path:
    bundle.split(wheels, tmp_path / "parts", SIZE)
    return tmp_path / "parts"


def sent(parts: Path, folder: Path, chosen: list[str]) -> Path:
    """Some of the parts, as they arrive at the other end."""
    folder.mkdir()
    for name in ["manifest.json", *chosen]:
        (folder / name).write_bytes((parts / name).read_bytes())
    return folder


def names(parts: Path) -> list[str]:
    return sorted(file.name for file in parts.glob("bundle.*"))


def test_no_part_is_larger_than_asked_and_together_they_are_the_wheels(wheels: list[Path], parts: Path) -> None:
    files = [parts / name for name in names(parts)]
    assert {file.stat().st_size for file in files[:-1]} == {SIZE}
    assert 0 < files[-1].stat().st_size <= SIZE
    assert b"".join(f.read_bytes() for f in files) == b"".join(w.read_bytes() for w in wheels)
    with pytest.raises(ValueError, match="a part of 0 bytes"):
        bundle.split(wheels, parts, 0)


def test_parts_may_come_one_after_the_other(parts: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    first, *others = names(parts)
    assert bundle.unpack(sent(parts, tmp_path / "one", [first]), home) == others
    half = sent(parts, tmp_path / "two", others[:2])
    assert bundle.unpack(half, home) == others[2:]
    assert (home / "site" / "convoy_small.py").is_file()  # complete already
    assert not (home / "site" / "convoy_large.py").exists()
    assert bundle.unpack(sent(parts, tmp_path / "three", others[2:]), home) == []
    found = subprocess.run(
        [home / "python", "-c", "import convoy_large, convoy_small, convoynet; print(convoynet.__file__)"],
        check=True,
        text=True,
        capture_output=True,
    )
    assert Path(found.stdout.strip()) == ROOT / "src" / "convoynet" / "__init__.py"
    # The checkout's commands are there without an installation of it.
    version = subprocess.run(
        [home / "python", "-m", "convoynet.server.cli", "--version"], check=True, capture_output=True
    )
    assert version.stdout.startswith(b"convoy ")


def test_what_the_machine_has_in_an_accepted_version_is_left_alone(parts: Path, tmp_path: Path) -> None:
    manifest = bundle.Manifest.read(parts)
    accepts = {wheel.package: wheel.accepts for wheel in manifest.wheels}
    assert accepts["packaging"] == ">=20"  # of the wheel that needs it
    assert accepts["numpy"] == ">=2.0"  # of pyproject.toml
    assert accepts["convoy-small"] == ""
    assert bundle.unpack(parts, tmp_path / "home") == []
    there = {file.name for file in (tmp_path / "home" / "site").iterdir()}
    assert {"convoy_small.py", "convoy_large.py"} <= there
    assert not {"numpy.py", "packaging.py"} & there


def test_what_is_too_old_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    newer = [wheel(folder, "packaging", "9999.0"), wheel(folder, "convoy-large", needs="packaging>=9998")]
    bundle.split(newer, tmp_path / "parts", SIZE)
    bundle.unpack(tmp_path / "parts", tmp_path / "home")
    assert (tmp_path / "home" / "site" / "packaging.py").read_text() == "VERSION = '9999.0'\n"


def test_a_second_call_installs_nothing_again(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle.unpack(parts, tmp_path / "home")
    assert "installed convoy_small, convoy_large" in capsys.readouterr().out
    bundle.unpack(parts, tmp_path / "home")
    assert capsys.readouterr().out == ""


def test_a_part_that_was_damaged_on_the_way_is_refused(parts: Path, tmp_path: Path) -> None:
    damaged = parts / names(parts)[1]
    content = bytearray(damaged.read_bytes())
    content[7] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(SystemExit, match=r"bundle\.001: not what the manifest says"):
        bundle.unpack(parts, tmp_path / "home")


def test_a_wheel_that_is_not_the_one_that_was_packed_is_refused(parts: Path, tmp_path: Path) -> None:
    manifest = parts / "manifest.json"
    found = bundle.Manifest.read(parts)
    manifest.write_text(manifest.read_text().replace(found.wheels[0].sha256, "0" * 64))
    with pytest.raises(SystemExit, match=r"convoy_small.*joined, but not what the manifest says"):
        bundle.unpack(parts, tmp_path / "home")


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"manifest\.json: no manifest of a bundle"):
        bundle.unpack(tmp_path, tmp_path / "home")


def test_every_wheel_that_is_carried_is_pinned() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    # Those that a test environment on a CPU has no use for come in their newest version.
    assert set(bundle.packages()) - pinned <= {"onnxruntime-gpu", "nvidia-ml-py"}
