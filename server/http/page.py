"""The page about a server: its files, what it shows, and the reports of exports. It changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from math import inf
from pathlib import Path

from convoynet.server.errors import InvalidModel
from convoynet.server.http.handlers import Ask, Endpoint, HttpReply, HttpRequest, Names, json_reply, problem
from convoynet.server.http.overview import overview
from convoynet.server.http.routes import Routes
from convoynet.server.models.core import Core
from convoynet.server.observing.metrics import Metrics
from convoynet.server.repository.evidence import read_report_page, report_page
from convoynet.server.repository.specs import Found
from convoynet.server.supervision.threads import SECONDS, Threads

FILES: Mapping[str, str] = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "picture.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""What the page consists of, in the folder static/ beside this module."""
_OWN = (
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cache-control", "no-cache"),
)
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A report comes with its model, from whoever made that: it may look as it likes, and do nothing."""
_FRESH_SECONDS = 0.5
"""How old a state may be that is shown: many who look at many models cost no more than two looks a second."""


class Page:
    """What the HTTP port has beside the protocol."""

    def __init__(self, core: Core, metrics: Metrics, version: str, threads: Threads) -> None:
        """Args: the models, what they count, the server's version, and the threads in which files are read."""
        self._core, self._metrics, self._version, self._threads = core, metrics, version, threads
        self._reports: dict[tuple[str, str, str], Path | None] = {}
        self._shown = HttpReply(200, (), ())
        self._shown_at = -inf

    @property
    def routes(self) -> Routes:
        """What answers its paths."""
        folder = Path(__file__).with_name("static")
        own = {f"/page/{name}": _static((folder / name).read_bytes(), kind) for name, kind in FILES.items()}
        return {
            "/": own.pop("/page/page.html"),
            **own,
            "/page/state": {"GET": Endpoint("Overview", self._state)},
            "/v2/models/{model}[/versions/{version}]/report": {"GET": Endpoint("ModelReport", self._report)},
        }

    async def _state(self, request: HttpRequest, names: Names, ask: Ask) -> HttpReply:
        if not self._is_fresh():
            await self._look_for_reports()
        if not self._is_fresh():  # or somebody else has made it meanwhile
            reply = json_reply(overview(self._core, self._metrics, self._version, self._has_report))
            self._shown, self._shown_at = HttpReply(200, (*reply.headers, *_OWN), reply.body), time.monotonic()
        return self._shown

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._shown_at < _FRESH_SECONDS

    def _has_report(self, found: Found) -> bool:
        return self._reports.get(_key(found)) is not None

    async def _look_for_reports(self) -> None:
        """Looks once for the report of each version that is served."""
        now = [self._core.found(model.spec.name, model.spec.version) for model in self._core]
        keys = {_key(found) for found in now}
        for key in self._reports.keys() - keys:
            del self._reports[key]
        new = [(_key(found), found.spec) for found in now if found.spec and _key(found) not in self._reports]
        if new:
            # A file system that does not answer takes the links away, not the page.
            self._reports |= {key: None for key, _ in new}
            with suppress(OSError):
                pages = await self._threads.run(SECONDS, lambda: [report_page(spec) for _, spec in new])
                self._reports |= {key: page for (key, _), page in zip(new, pages, strict=True)}

    async def _report(self, request: HttpRequest, names: Names, ask: Ask) -> HttpReply:
        model = self._core.model(names["model"], names["version"])
        found = self._core.found(model.spec.name, model.spec.version)
        which = f"model '{model.spec.name}' version {model.spec.version}"
        try:
            page = None if found.spec is None else await self._threads.run(SECONDS, report_page, found.spec)
            if page is None:
                return problem(404, f"{which} has no report: `convoy export` writes one beside the model")
            content = await self._threads.run(SECONDS, read_report_page, page)
        except (InvalidModel, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            return problem(404, f"the report of {which} cannot be read: {why}")
        kind = ("content-type", "text/html; charset=utf-8")
        return HttpReply(200, (kind, ("content-security-policy", _REPORT_POLICY), *_OWN), (content,))


def _key(found: Found) -> tuple[str, str, str]:
    return found.name, found.version, found.fingerprint


def _static(content: bytes, kind: str) -> dict[str, Endpoint]:
    reply = HttpReply(200, (("content-type", kind), ("content-security-policy", _PAGE_POLICY), *_OWN), (content,))

    async def handle(request: HttpRequest, names: Names, ask: Ask) -> HttpReply:
        return reply

    return {"GET": Endpoint("Page", handle)}
