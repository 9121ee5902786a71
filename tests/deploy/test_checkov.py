"""The rendered manifests pass checkov, but for the exceptions of checkov-kubernetes.yaml."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy import manifests
from tests.deploy.manifests import DEPLOY, VALUES

pytestmark = pytest.mark.deploy

CONFIG = Path(__file__).with_name("checkov-kubernetes.yaml")


def test_manifests_pass_checkov(tool: Callable[[str], str], tmp_path: Path) -> None:
    checkov = tool("checkov")
    rendered = manifests.render({name: ("convoy", manifests.values(name)) for name in VALUES})
    objects = {f"chart-{name}": found for name, found in rendered.items() if isinstance(found, list)}
    objects |= {f"kserve-{name}": manifests.kustomize(DEPLOY / "kserve" / name) for name in ("runtimes", "gpu")}
    for name, found in objects.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(found))
    done = subprocess.run(
        [checkov, "--config-file", str(CONFIG), "--directory", str(tmp_path), "--output", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    failed = [(each["check_id"], each["check_name"], each["resource"]) for each in report["results"]["failed_checks"]]
    assert not failed
    assert report["summary"]["passed"] > 500
    assert report["summary"]["parsing_errors"] == 0
