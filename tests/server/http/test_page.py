"""The page about a server, as a client without a browser sees it."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from convoynet.server.http import page
from convoynet.server.http.routes import plain, table
from convoynet.server.observing.metrics import ROWS, SECONDS
from convoynet.server.security.security import digest
from tests.server.conftest import Serving, fake_model, infer_request
from tests.server.http_calls import Answer, call, sum_request

STATIC = Path(page.__file__).with_name("static")
BEARER = {"Authorization": "Bearer secret"}


def policy(answer: Answer) -> dict[str, str]:
    """The directives of an answer's policy."""
    directives = answer.headers["content-security-policy"].split("; ")
    return {name: rest for name, _, rest in (one.partition(" ") for one in directives)}


def report(folder: Path, text: str = "<h1>Evidence</h1><script>alert(1)</script>") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(text)
    return folder


async def test_the_files_need_nothing_from_elsewhere_and_allow_nothing(serving: Serving, root: Path) -> None:
    async with serving(root=root) as running:
        for path, kind in (("/", "text/html"), *((f"/page/{n}", k) for n, k in page.FILES.items() if n != "page.html")):
            answer = await call(running.app.http_port, "GET", path)
            assert (answer.status, answer.headers["content-type"].startswith(kind)) == (200, True)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            stated = policy(answer)
            assert stated["default-src"] == "'none'"
            assert stated["frame-ancestors"] == stated["base-uri"] == stated["form-action"] == "'none'"
            assert stated["script-src"] == stated["style-src"] == stated["connect-src"] == "'self'"
            assert "unsafe" not in answer.headers["content-security-policy"]
            head = await call(running.app.http_port, "HEAD", path)
            assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(answer.body)))
        for path in ("/page", "/page/", "/page/page.html", "/page/../server.key", "/page/%2e%2e%2fpage.py", "/x"):
            assert (await call(running.app.http_port, "GET", path)).status == 404, path
        for path in ("/", "/page/state", "/v2/models/sum/report"):
            assert (await call(running.app.http_port, "POST", path, b"{}")).status == 405, path


def test_the_files_name_no_other_host_and_insert_text_alone() -> None:
    assert {file.name for file in STATIC.iterdir()} == set(page.FILES)
    for name in page.FILES:
        text = (STATIC / name).read_text()
        assert not re.search(r"(?<!xmlns=\")(https?:)?//[a-z0-9]", text.replace("http://www.w3.org/2000/svg", "")), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            name
        )
    found: list[str] = []

    class Inline(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            found.extend(name for name in given if name == "style" or name.startswith("on"))
            if tag == "style" or (tag == "script" and "src" not in given):
                found.append(tag)

    Inline().feed((STATIC / "page.html").read_text())
    assert not found


async def test_the_state_is_what_prometheus_reads(serving: Serving, root: Path) -> None:
    fake_model(root, "other", fail_above=5)
    (root / "broken").mkdir()
    (root / "broken" / "config.pbtxt").write_text("nonsense")
    async with serving(root=root) as running:
        port = running.app.http_port
        for value in (1, 2, 3):
            await running.stub.ModelInfer(infer_request(value))
        assert (await call(port, "POST", "/v2/models/other/infer", sum_request(9))).status == 500
        assert (await call(port, "GET", "/v2/nothing")).status == 404
        state = (await call(port, "GET", "/page/state")).json
        assert state["server"]["ready"] is True
        assert (state["latency_bounds"], state["batch_bounds"]) == (list(SECONDS), list(ROWS))
        broken, other, sums = state["models"]
        assert (broken["name"], broken["state"]) == ("broken", "UNAVAILABLE")
        assert "config.pbtxt" in broken["reason"]
        assert "latency" not in broken
        assert (sums["name"], sums["version"], sums["state"]) == ("sum", "1", "READY")
        assert (sums["requests"], sums["rejected"], sums["rows"], sum(sums["latency"])) == ({"OK": 3}, {}, 3, 3)
        assert (
            sum(sums["batch_rows"])
            == sums["batches"]
            == running.metric("convoy_executions_total", model="sum", version="1")
        )
        assert (sums["queued"], sums["inflight"], sums["takes_images"], sums["report"]) == (0, 0, False, False)
        assert sums["engine"]["runtime"] == "fake"
        assert other["requests"] == {"INTERNAL": 1}
        assert state["others"]["requests"] == {"NOT_FOUND": 1}
        later = (await call(port, "GET", "/page/state")).json
        assert later["milliseconds"] >= state["milliseconds"]
        # Who looks is not counted.
        assert later["others"] == state["others"]


async def test_many_who_look_cost_no_more_than_one(
    serving: Serving, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    show = page.overview
    monkeypatch.setattr(page, "overview", lambda *what: made.append(what) or show(*what))
    monkeypatch.setattr(page, "_FRESH_SECONDS", 3600.0)
    async with serving(root=root) as running:
        answers = await asyncio.gather(*(call(running.app.http_port, "GET", "/page/state") for _ in range(10)))
        assert len({answer.body for answer in answers}) == len(made) == 1
        monkeypatch.setattr(page, "_FRESH_SECONDS", 0.0)
        assert (await call(running.app.http_port, "GET", "/page/state")).body != answers[0].body
        assert len(made) == 2


async def test_a_report_is_shown_and_can_do_nothing(serving: Serving, root: Path) -> None:
    report(root / "sum" / "1")
    async with serving(root=root) as running:
        port = running.app.http_port
        assert (await call(port, "GET", "/page/state")).json["models"][0]["report"] is True
        for path in ("/v2/models/sum/report", "/v2/models/sum/versions/1/report"):
            answer = await call(port, "GET", path)
            assert (answer.status, answer.body[:17]) == (200, b"<h1>Evidence</h1>")
            stated = policy(answer)
            assert (stated["sandbox"], stated["default-src"], stated["img-src"]) == ("", "'none'", "data:")
            assert "script-src" not in stated
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert (await call(port, "GET", "/v2/models/none/report")).status == 404
        assert (await call(port, "GET", "/v2/models/sum/versions/2/report")).status == 404
        (root / "sum" / "1" / "report.html").unlink()
        answer = await call(port, "GET", "/v2/models/sum/report")
        assert (answer.status, "has no report: `convoy export` writes one" in answer.json["error"]) == (404, True)
        outside = report(root.parent / "elsewhere") / "report.html"
        (root / "sum" / "1" / "report.html").symlink_to(outside)
        answer = await call(port, "GET", "/v2/models/sum/report")
        assert (answer.status, "leads out of the model's folder" in answer.json["error"]) == (404, True)


@pytest.mark.parametrize(("stated", "shown"), [('{"version": 1}', True), ('{"version": 2}', False), ("no JSON", False)])
async def test_a_report_beside_the_versions_is_of_the_one_it_names(
    serving: Serving, root: Path, stated: str, shown: bool
) -> None:
    report(root / "sum")
    async with serving(root=root) as running:
        (root / "sum" / "report.json").write_text(stated)
        assert (await call(running.app.http_port, "GET", "/page/state")).json["models"][0]["report"] is shown


async def test_what_tells_of_the_models_needs_a_token(serving: Serving, root: Path) -> None:
    report(root / "sum" / "1")
    tokens = root.parent / "tokens"
    tokens.write_text(f"me read {digest('secret')}\ncamera infer {digest('other')}\n")
    async with serving(root=root, auth_tokens=tokens) as running:
        port = running.app.http_port
        for path in ("/page/state", "/v2/models/sum/report"):
            answer = await call(port, "GET", path)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert (await call(port, "GET", path, headers={"Authorization": "Bearer other"})).status == 403
            assert (await call(port, "GET", path, headers=BEARER)).status == 200
        # The files are the same on every server.
        own = await call(port, "GET", "/")
        assert (own.status, b"sum" in own.body) == (200, False)


async def test_without_the_page(serving: Serving, root: Path) -> None:
    report(root / "sum" / "1")
    async with serving(root=root, page=False, management="0,0") as running:
        for port in (running.app.http_port, running.app.management_ports[1]):
            for path in ("/", "/page/page.js", "/page/state", "/v2/models/sum/report"):
                assert (await call(port, "GET", path)).status == 404, path
            assert (await call(port, "GET", "/v2/models/sum/ready")).status == 200
    async with serving(root=root, management="0,0") as running:
        assert (await call(running.app.http_port, "GET", "/")).status == 200
        assert (await call(running.app.management_ports[1], "GET", "/")).status == 404


def test_templates() -> None:
    assert list(plain("/a[/b/{c}]/d")) == ["/a/d", "/a/b/{c}/d"]
    assert list(plain("/v2[/]")) == ["/v2"]
    assert list(plain("/")) == ["/"]
    (one,) = table({"/a.b[/{c}]": {}})
    assert [bool(one.pattern.fullmatch(path)) for path in ("/a.b", "/a.b/x", "/axb", "/a.b/", "/a.b/x/y")] == [
        True, True, False, False, False,
    ]  # fmt: skip
