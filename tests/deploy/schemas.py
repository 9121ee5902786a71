"""Strict validation: Kubernetes' own objects by the schemas of three minors, custom ones by their published CRDs."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.deploy.manifests import ROOT, Object

_SCHEMAS = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"


def minors(count: int = 3) -> list[str]:
    """The newest minor versions of Kubernetes whose schemas are there, such as 1.37."""
    found = {(int(m[1]), int(m[2])) for f in _SCHEMAS.iterdir() if (m := re.match(r"v(\d+)\.(\d+)\.", f.name))}
    return [f"{major}.{minor}" for major, minor in sorted(found)[-count:]]


def errors(thing: Object, minor: str) -> list[str]:
    """What is wrong with an object of Kubernetes' own, unknown fields among it."""
    group, _, version = thing["apiVersion"].rpartition("/")
    group = f"{group.partition('.')[0]}-" if group else ""
    return _said(_validator(minor, f"{thing['kind'].lower()}-{group}{version}"), thing)


@functools.cache
def _registry(minor: str) -> Registry[Any]:
    definitions = Resource.from_contents(_read(minor, "_definitions"))
    return Registry().with_resource("_definitions.json", definitions)


@functools.cache
def _validator(minor: str, name: str) -> Draft202012Validator:
    return Draft202012Validator(_read(minor, name), registry=_registry(minor))


def _read(minor: str, name: str) -> Any:
    return json.loads((_SCHEMAS / f"v{minor}.0-local-strict" / f"{name}.json").read_text(encoding="utf-8"))


def is_custom(thing: Object) -> bool:
    """Whether an object is defined by a CRD: the groups of Kubernetes' own have no dot, or end in k8s.io."""
    group = thing["apiVersion"].rpartition("/")[0]
    return "." in group and (not group.endswith(".k8s.io") or group == "gateway.networking.k8s.io")


def custom_errors(thing: Object) -> list[str]:
    """What is wrong with an object of a CRD, unknown fields among it.

    Skips where the CRDs are missing: they are large, and the project holds no copies.
    """
    return _said(_custom_validator(thing["apiVersion"], thing["kind"]), thing)


@functools.cache
def _custom_validator(api_version: str, kind: str) -> Draft202012Validator:
    group, _, version = api_version.rpartition("/")
    for file in _folder().glob(f"{group}_*.yaml"):
        definition = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        if definition["names"]["kind"] == kind:
            schemas = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["versions"]}
            return Draft202012Validator(_strict(schemas[version], top=True))
    pytest.skip(f"no CRD of {kind} in the folder of CONVOY_CRDS")


def _folder() -> Path:
    folder = Path(os.environ.get("CONVOY_CRDS", ROOT.parent / "shared" / "crds"))
    if not folder.is_dir():
        pytest.skip("set CONVOY_CRDS to a folder of CRDs, named GROUP_PLURAL.yaml")
    return folder


def _strict(schema: Any, *, top: bool = False) -> Any:
    """A structural schema of OpenAPI as JSON Schema that refuses what an API server would prune."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: value for key, value in schema.items() if key not in ("description", "format", "default")}
    for key in ("items", "not", "additionalProperties", "allOf", "anyOf", "oneOf"):
        if key in out:
            out[key] = _strict(out[key])
    if "properties" in out:
        out["properties"] = {name: _strict(each) for name, each in out["properties"].items()}
        open_ended = out.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in out
        if out.get("type") == "object" and not open_ended:
            out["additionalProperties"] = False
    if top:
        out["properties"]["metadata"] = {"type": "object"}
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    if out.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def _said(validator: Draft202012Validator, thing: Object) -> list[str]:
    name = f"{thing['kind']} {thing['metadata']['name']}"
    return [f"{name}, {error.json_path}: {error.message[:300]}" for error in validator.iter_errors(thing)]
