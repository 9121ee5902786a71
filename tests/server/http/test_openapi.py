"""/v2/openapi.json: it is valid, it is what the port answers, and the port answers as it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convoynet.server.http import api, openapi
from convoynet.server.http.api import Route, route
from convoynet.server.http.handlers import Endpoint, HttpReply, HttpRequest
from convoynet.server.http.openapi import document, offered
from convoynet.server.security.security import NEEDS, digest
from tests.server.conftest import Serving, fake_model
from tests.server.http_calls import call, sum_request

SCHEMA = (
    Path(__file__).parents[3] / "build/page-tools/openapi_spec_validator/resources/schemas/v3.1/schema.json"
)  # `make page-tools` puts it there


async def _never(*_: Any) -> HttpReply:
    raise AssertionError("is only looked at")


EXTRA = {
    "/": {"GET": Endpoint("Page", _never)},
    "/page/state": {"GET": Endpoint("Overview", _never)},
    "/v2/models/{model}[/versions/{version}]/report": {"GET": Endpoint("ModelReport", _never)},
}


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and operation of a document."""
    for path, shown in described["paths"].items():
        for method in shown.keys() - {"parameters"}:
            yield method.upper(), path, shown[method]


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(json.dumps(document(api.ROUTES, EXTRA)))
    return shown


@pytest.mark.skipif(not SCHEMA.is_file(), reason="there is no schema of OpenAPI: make page-tools")
def test_it_is_openapi(described: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    check = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in check.iter_errors(described)] == []
    described = json.loads(json.dumps(described))
    del described["paths"]["/v2"]["get"]["responses"]
    described["paths"]["/v2"]["get"]["requestBody"] = {}
    assert list(check.iter_errors(described))


def test_its_references_lead_somewhere_and_its_names_are_its_own(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(described)))
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= schemas.keys()
    identities = [shown["operationId"] for _, _, shown in operations(described)]
    assert len(set(identities)) == len(identities)
    for path, shown in described["paths"].items():
        assert [one["name"] for one in shown["parameters"]] == re.findall(r"\{(\w+)\}", path)


def test_every_operation_is_answered_and_every_route_is_in_it(described: dict[str, Any]) -> None:
    paths = offered(api.ROUTES, EXTRA)
    reached = set()
    for method, path, shown in operations(described):
        names = {"model": "m", "version": "3", "repository": "r", "region": "g"}
        to = route(method, path.format(**names), paths)
        assert isinstance(to, Route), path
        assert [to.endpoint.rpc] == shown["tags"], path
        assert {n: v for n, v in to.names.items() if v} == {n: names[n] for n in re.findall(r"\{(\w+)\}", path)}
        assert bool(shown["security"]) == bool(NEEDS[to.endpoint.rpc])
        reached.add((method, next(p.template for p in paths if p.pattern.fullmatch(path.format(**names)))))
    # The document itself is left out of the fixture's tables.
    assert reached == {(m, p.template) for p in paths for m in p.methods if p.template != openapi.PATH}


async def test_it_is_served_to_everybody_and_describes_what_is_there(serving: Serving, root: Path) -> None:
    tokens = root.parent / "tokens"
    tokens.write_text(f"me read {digest('secret')}\n")
    async with serving(root=root, auth_tokens=tokens, management="0,0") as running:
        answer = await call(running.app.http_port, "GET", "/v2/openapi.json")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert {"/", "/page/state", "/page/page.js", "/v2/openapi.json"} <= answer.json["paths"].keys()
        managed = (await call(running.app.management_ports[1], "GET", "/v2/openapi.json")).json
        assert "/v2/openapi.json" in managed["paths"]
        assert "/page/state" not in managed["paths"]
    async with serving(root=root, page=False) as running:
        shown = (await call(running.app.http_port, "GET", "/v2/openapi.json")).json
        assert not [path for path in shown["paths"] if not path.startswith("/v2") or path.endswith("report")]


async def test_answers_are_as_it_says(serving: Serving, root: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    fake_model(root, "other")
    (root / "broken").mkdir()
    (root / "broken" / "config.pbtxt").write_text("nonsense")
    bodies: dict[str, object] = {
        "ModelInfer": sum_request(1, 2) | {"id": "7", "parameters": {"priority": 1}, "outputs": [{"name": "y"}]},
        "RepositoryIndex": {"ready": None},
    }
    settings = {"model_control_mode": "explicit", "load_model": ("*",), "allow_client_shm": True}
    async with serving(root=root, **settings) as running:
        port = running.app.http_port
        stated = (await call(port, "GET", "/v2/openapi.json")).json
        seen = set()
        for method, path, shown in operations(stated):
            body = bodies.get(shown["tags"][0], {}) if method == "POST" else None
            for model in ("other", "nothing") if "{model}" in path else ("",):
                asked = path.format(
                    model="sum" if model == "other" and "infer" in path else model,
                    version="1",
                    region="g",
                    repository="r",
                )
                if shown["tags"] == ["RepositoryModelUnload"] and model == "other":
                    continue  # the others need it
                if body:
                    validate(jsonschema, stated, shown["requestBody"]["content"]["application/json"]["schema"], body)
                answer = await call(port, method, asked, body)
                said = shown["responses"].get(str(answer.status), shown["responses"]["default"])
                kind = answer.headers.get("content-type", "").partition(";")[0]
                if not answer.body:
                    assert "content" not in said, path
                    continue
                assert kind in said["content"], (path, answer.status)
                seen.add((shown["tags"][0], answer.status))
                if "schema" in said["content"][kind]:
                    validate(jsonschema, stated, said["content"][kind]["schema"], answer.json)
        for rpc in ("ModelInfer", "ModelConfig", "ModelStatistics", "ModelMetadata", "RepositoryIndex", "TraceSetting"):
            assert (rpc, 200) in seen, rpc
        assert ("ModelReady", 503) in seen


def validate(jsonschema: Any, stated: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    """Checks a value against a schema of the document; no member goes unsaid where the schema says its members."""
    closed = json.loads(json.dumps({**schema, "components": stated["components"]}), object_hook=_closed)
    jsonschema.Draft202012Validator(closed).validate(value)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "object" and "properties" in schema:
        return {**schema, "additionalProperties": False}
    return schema


async def test_it_is_made_once() -> None:
    (own,) = (path for path in offered(api.ROUTES) if path.template == openapi.PATH)
    request = HttpRequest("GET", openapi.PATH)
    first, second = [await own.methods["GET"].handle(request, {}, _never) for _ in range(2)]
    assert first is second
