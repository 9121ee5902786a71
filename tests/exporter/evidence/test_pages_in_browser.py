"""Reports and sweeps in a real browser: nothing shuts people out, at each width, in both schemes and on paper."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from convoynet.exporter.config import ExportConfig
from convoynet.exporter.evidence import divergence, writing
from convoynet.exporter.evidence.divergence import TensorError
from convoynet.exporter.evidence.parity import Comparison
from convoynet.exporter.studies import sweep
from convoynet.exporter.studies.sweep import Result
from convoynet.exporter.studies.variants import Variant
from tests import browser as browsers
from tests.exporter.evidence.test_report import COMPRESSED, JUDGED, PARITY

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing() or "there is one"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    async with browsers.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of a report and of a sweep."""
    folder = tmp_path_factory.mktemp("pages")
    report = folder / "models" / "net-int8"
    report.mkdir(parents=True)
    values = np.linspace(-1, 1, 50, dtype=np.float32)
    errors = [TensorError("conv1", "Conv", 30.0, "conv1"), TensorError("relu_7", "Relu", 12.5, "conv1")]
    told = replace(COMPRESSED, parity=JUDGED, divergence=divergence.to_json(errors, 4))
    plots = {"divergence.png": partial(divergence.plot, errors)}
    writing.write(told, report, Comparison(PARITY, values, values), plots)
    results = [
        Result("int8", '[[step]]\nstep = "int8"\n', "a", variant("int8", 0.5), baseline=variant("PyTorch eager", 2.0)),
        Result("half", "", "b", replace(variant("half", 1.0), doubt="other processes took 1.5 of 2 cores")),
        Result("none", "", "c", refused="INT8 moved the outputs too far"),
    ]
    (folder / "sweep").mkdir()
    config = ExportConfig("lenet5", repository=folder / "models", name="net-int8")
    sweep._write(folder / "sweep", results, {"int8": config, "half": replace(config, name="net-half")})
    files = {"report": report / "report.html", "sweep": folder / "sweep" / sweep.PAGE_FILE}
    return {name: file.as_uri() for name, file in files.items()}


def variant(name: str, milliseconds: float) -> Variant:
    interval = (0.78, 0.82)
    return Variant(name, "int8", 10**7, 10**9, 10**7, milliseconds, 1e3 / milliseconds, 8, 0.8, 0.9, interval=interval)


async def opened_up(page: Any) -> None:
    await page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")


@pytest.mark.parametrize("scheme", browsers.SCHEMES)
@pytest.mark.parametrize("width", browsers.WIDTHS)
@pytest.mark.parametrize("name", ["report", "sweep"])
async def test_nothing_shuts_people_out(
    browser: Any, pages: dict[str, str], name: str, width: int, scheme: str
) -> None:
    async with browsers.opened(browser, pages[name], width, scheme) as page:
        await opened_up(page)
        assert await browsers.violations(page) == []
        assert await browsers.overflow(page) == 0
        assert page.troubles == []
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("name", ["report", "sweep"])
async def test_paper_is_white_and_nothing_is_folded_or_cut_off(browser: Any, pages: dict[str, str], name: str) -> None:
    async with browsers.opened(browser, pages[name], 760, "dark") as page:
        await page.emulate_media(media="print", color_scheme="dark")
        colors: Sequence[str] = await page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert colors == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        cut = "[...document.querySelectorAll('.scroll, pre')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert await page.evaluate(cut) == 0
        folded = "[...document.querySelectorAll('details > :not(summary)')].filter(e => !e.checkVisibility()).length"
        assert await page.evaluate(folded) == 0


async def test_the_sweep_leads_to_the_report(browser: Any, pages: dict[str, str]) -> None:
    async with browsers.opened(browser, pages["sweep"]) as page:
        await page.click("a >> text=int8")
        assert await page.inner_text("h1") == "net, version 3"
        assert Path(page.url).parent.name == "net-int8"
