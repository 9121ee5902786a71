"""A real browser for the tests of pages: Debian's chromium, driven by Playwright; axe-core finds what shuts people out.

`make page-tools` puts Playwright and axe-core into build/page-tools; chromium is the machine's.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parents[1] / "build" / "page-tools"
AXE = TOOLS / "axe_playwright_python" / "axe.min.js"
WIDTHS = (390, 800, 1280)
SCHEMES = ("light", "dark")
_CHROMIUM = shutil.which("chromium")
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}

if TOOLS.is_dir() and str(TOOLS) not in sys.path:
    sys.path.append(str(TOOLS))


def missing() -> str:
    """What there is no browser for, in a word for pytest's skip; "" where there is one."""
    if _CHROMIUM is None:
        return "there is no chromium: apt-get install chromium"
    if not AXE.is_file() or find_spec("playwright") is None:
        return "there is no Playwright or axe-core: make page-tools"
    return ""


@asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    """A browser that has just started (playwright.async_api.Browser)."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=_CHROMIUM, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(browser: Any, url: str, width: int = 1280, scheme: str = "light") -> AsyncIterator[Any]:
    """A page in a window of its own; errors of its scripts, and what a policy blocked, are in `page.troubles`."""
    context = await browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page = await context.new_page()
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("console", lambda said: said.type == "error" and page.troubles.append(said.text))
        await page.goto(url)
        yield page
    finally:
        await context.close()


async def violations(page: Any) -> list[str]:
    """What axe-core finds wrong with a page, a line each, with the element."""
    # By the debugger, which no policy of the page's stops.
    await page.evaluate(AXE.read_text(encoding="utf-8") + "; undefined")
    found = await page.evaluate("rules => axe.run(document, rules)", _RULES)
    return [
        f"{one['id']}: {one['help']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ]


async def overflow(page: Any) -> int:
    """Pixels that the page is wider than its window."""
    return int(await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
