"""Every manifest of deploy/ as objects: the chart rendered by Helm, kustomize by kubectl."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "convoy"
Object = dict[str, Any]

VALUES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))}
OVERLAYS = sorted(path.name for path in (DEPLOY / "kustomize" / "overlays").iterdir())


def documents(text: str) -> list[Object]:
    """The objects of a YAML file."""
    return [document for document in yaml.safe_load_all(text) if document]


def values(name: str) -> Object:
    """The values of one file of the chart's ci folder."""
    return dict(yaml.safe_load(VALUES[name].read_text(encoding="utf-8")))


def render(sets: Mapping[str, tuple[str, Object]], chart: Path = CHART) -> dict[str, list[Object] | str]:
    """The chart's objects for each release and its values, or the text of Helm's refusal. Skips without Helm."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed: make setup, on Linux")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("helm_render.py"))],
        input=json.dumps({"chart": str(chart), "sets": sets}),
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["lint"] == []
    return {name: found if isinstance(found, str) else _objects(found) for name, found in answer["sets"].items()}


def _objects(rendered: Mapping[str, str]) -> list[Object]:
    """Templates to objects; the notes are text."""
    return [each for path, text in rendered.items() if path.endswith(".yaml") for each in documents(text)]


def kustomize(folder: Path) -> list[Object]:
    """What kubectl makes of a folder. Skips without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def composed(folder: Path, *components: str) -> list[Object]:
    """The base with components, which kustomize takes from a folder of their own."""
    home = os.path.relpath(DEPLOY / "kustomize", folder)
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"{home}/base"],
                "components": [f"{home}/components/{name}" for name in components],
            }
        )
    )
    return kustomize(folder)


def comparable(objects: list[Object]) -> dict[tuple[str, str], Object]:
    """Objects by kind and name, without what Helm and kustomize each do in their own way.

    That is: who manages an object, how a change of the configuration rolls the pods, the order of named lists, and
    the namespace, which Helm does not make.
    """
    found = {}
    for each in copy.deepcopy(objects):
        metadata = each["metadata"]
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            metadata.get("labels", {}).pop(label, None)
        if each["kind"] == "ConfigMap":
            metadata["name"] = _without_hash(metadata["name"])
            each["data"] = {name: tomllib.loads(text) for name, text in each["data"].items()}
        if each["kind"] == "Deployment":
            _normalize(each["spec"]["template"])
        if each["kind"] != "Namespace":
            found[each["kind"], metadata["name"]] = each
    return found


def _normalize(template: Object) -> None:
    annotations = template["metadata"].get("annotations", {})
    annotations.pop("checksum/config", None)
    if not annotations:
        template["metadata"].pop("annotations", None)
    pod = template["spec"]
    pod["volumes"].sort(key=lambda volume: volume["name"])
    for volume in pod["volumes"]:
        if "configMap" in volume:
            volume["configMap"]["name"] = _without_hash(volume["configMap"]["name"])


def _without_hash(name: str) -> str:
    return re.sub(r"-[a-z0-9]{10}$", "", name)


def of_kind(objects: list[Object], kind: str) -> Object:
    """The one object of a kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def pods(objects: list[Object]) -> Iterator[Object]:
    """The pod specs in them."""
    for each in objects:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
        if each["kind"] == "ClusterServingRuntime":
            yield each["spec"]
