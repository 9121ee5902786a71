"""Which requests of a browser may change something."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoynet.server.security.browsers import foreign_page
from convoynet.server.security.security import NEEDS, changes
from tests.server.conftest import Serving, fake_model
from tests.server.http_calls import call, sum_request

OWN = {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "convoy.default.svc:8000"},
        {"host": "127.0.0.1:8000", "user-agent": "curl/8"},
        OWN,
        {**OWN, "sec-fetch-site": "same-origin"},
        {"host": "localhost:8000", "sec-fetch-site": "none"},
        {"host": "localhost:8000", "origin": "http://localhost:8000"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "10.1.2.3", "origin": "https://10.1.2.3"},
        # A development server passes on what its own page asked for.
        {"host": "localhost:8000", "origin": "http://localhost:5173", "sec-fetch-site": "same-origin"},
    ],
)
def test_programs_and_own_pages_may(headers: dict[str, str]) -> None:
    assert foreign_page(headers) == ""


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({**OWN, "origin": "http://evil.example"}, "a page of 'http://evil.example' may change nothing"),
        ({**OWN, "origin": "null"}, "a page of 'null'"),
        ({**OWN, "origin": ""}, "a page of ''"),
        ({**OWN, "origin": "http://127.0.0.1:9000"}, "a page of 'http://127.0.0.1:9000'"),
        ({**OWN, "sec-fetch-site": "cross-site"}, "a page of another site"),
        ({**OWN, "sec-fetch-site": "same-site"}, "a page of another site"),
        ({"host": "127.0.0.1:8000", "sec-fetch-site": "cross-site"}, "a page of another site"),
        # DNS rebinding: the page's own name points here now.
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, "by an address or localhost alone"),
        (
            {"host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "same-origin"},
            "by an address or localhost alone",
        ),
        ({"host": "127.0.0.1.evil.example", "sec-fetch-site": "none"}, "by an address or localhost alone"),
        ({"host": "localhost.evil.example", "sec-fetch-site": "none"}, "by an address or localhost alone"),
        ({"sec-fetch-site": "same-origin"}, "by an address or localhost alone"),
        ({"host": "[::1", "sec-fetch-site": "same-origin"}, "by an address or localhost alone"),
    ],
)
def test_other_pages_may_not(headers: dict[str, str], text: str) -> None:
    assert text in foreign_page(headers)


def test_what_changes_something() -> None:
    assert {rpc for rpc in NEEDS if changes(rpc)} == {
        "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings",
        "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
        "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
    }  # fmt: skip


CHANGES = [
    "/v2/repository/models/sum/load",
    "/v2/repository/models/sum/unload",
    "/v2/repository/models/evil/load",
    "/v2/trace/setting",
    "/v2/models/sum/trace/setting",
    "/v2/logging",
    *(f"/v2/{kind}sharedmemory/region/r/{what}" for kind in ("system", "cuda") for what in ("register", "unregister")),
    "/v2/systemsharedmemory/unregister",
    "/v2/cudasharedmemory/unregister",
]
PAGE = {"Origin": "http://evil.example", "Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}


async def test_a_page_of_another_site_changes_nothing(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    explicit = {"model_control_mode": "explicit", "load_model": ("sum",), "allow_client_shm": True}
    async with serving(**explicit) as running:
        port = running.app.http_port
        before = [(await call(port, "GET", path)).json for path in ("/v2/logging", "/v2/trace/setting")]
        for path in CHANGES:
            for page in (PAGE, {"Origin": "null"}, {**PAGE, "Host": "evil.example:8000"}):
                answer = await call(port, "POST", path, b'{"log_info": false, "trace_rate": "1"}', page)
                assert answer.status == 403, path
                assert "may change" in answer.json["error"]
                assert not [name for name in answer.headers if name.startswith("access-control")]
        assert [(await call(port, "GET", path)).json for path in ("/v2/logging", "/v2/trace/setting")] == before
        assert (await call(port, "GET", "/v2/models/sum/ready")).status == 200
        # A preflight is not granted, and what changes nothing goes on: browsers do not show the page the answer.
        asks = {**PAGE, "Access-Control-Request-Method": "POST"}
        assert (await call(port, "OPTIONS", "/v2/logging", headers=asks)).status == 405
        answer = await call(port, "POST", "/v2/models/sum/infer", sum_request(1), PAGE)
        assert (answer.status, [n for n in answer.headers if n.startswith("access-control")]) == (200, [])
        # A program, and a page of the server's own.
        own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
        for page in ({}, own):
            assert (await call(port, "POST", "/v2/logging", {"log_info": True}, page)).status == 200
