"""How many cores a process counts in a container with a CPU limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convoynet.server import host


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of all cgroups, without a limit, on a machine of 8 cores."""
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_the_limit_of_the_container_counts(groups: Path, limit: str, cores: int) -> None:
    (groups / "cpu.max").write_text(f"{limit}\n")
    assert host.available_cpus() == cores


def test_without_cgroups_the_affinity_counts(groups: Path) -> None:
    assert host.available_cpus() == 8


def test_the_least_limit_on_the_way_up_counts(groups: Path, tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("4:memory:/elsewhere\n0::/pod/container\n")
    folder = groups / "pod" / "container"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    (groups / "pod" / "cpu.max").write_text("300000 100000\n")
    assert host._cpu_limit(groups, own) == 3


def test_a_group_that_lies_outside_is_not_searched(tmp_path: Path) -> None:
    """A process that joined from outside sees its group as /../.. of its own root."""
    (tmp_path / "groups").mkdir()
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "self").write_text("0::/../..\n")
    assert host._cpu_limit(tmp_path / "groups", tmp_path / "self") == 1e6
