"""deploy/compose as a compose implementation reads it; its pictures of Prometheus and Grafana are not run here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import yaml

from tests.deploy.images import ROOT

FOLDER = ROOT / "deploy" / "compose"


@pytest.mark.deploy
def test_podman_compose_reads_it(tool: Callable[[str], str]) -> None:
    command = [tool("podman-compose"), "--file", str(FOLDER / "compose.yaml"), "config"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    services = yaml.safe_load(run.stdout)["services"]
    assert services.keys() == {"convoy", "load", "prometheus", "alertmanager", "grafana"}
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name


@pytest.mark.deploy
def test_what_it_mounts_is_there() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounted = [v.split(":")[0] for s in services.values() for v in s.get("volumes", []) if v.startswith("..")]
    assert len(mounted) == 4
    assert [path for path in mounted if not (FOLDER / path).exists()] == []
