"""The page in a real browser: what it shows, asks and sends, at each width and in both schemes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image, ImageDraw

from convoynet.server.client.pictures import box_color, voc_color
from convoynet.server.client.views import _smooth
from convoynet.server.images.images import image_input_from_json
from convoynet.server.security.security import digest
from tests import browser as browsers
from tests.server import onnx_models
from tests.server.conftest import Serving, fake_model, infer_request

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing() or "there is one"),
]
PATIENCE_MS = 60_000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    async with browsers.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a server whose models take pictures, one for each task."""
    root = tmp_path_factory.mktemp("pictures") / "models"
    root.mkdir()
    onnx_models.write_colors(root)
    onnx_models.write_colors(root, "explaining", explains=True)
    onnx_models.write_segmenter(root)
    onnx_models.write_detector(root)
    with onnx_models.serve(root) as live:
        yield f"http://{live.http_url}/"


def scene(file: Path, *, turned: bool = False) -> Path:
    """Red, with a green and a blue patch. `turned` says in EXIF that it is to be shown on its side."""
    image = Image.new("RGB", (120, 80), "red")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 10, 59, 49), fill=(0, 255, 0))
    draw.rectangle((70, 30, 109, 69), fill=(0, 0, 255))
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    image.save(file, quality=95, **({"exif": exif} if turned else {}))
    return file


async def ask(page: Any, model: str, file: Path) -> None:
    """Has a model look at a file, and waits for its answer."""
    await page.wait_for_selector("#picture:not([hidden])", timeout=PATIENCE_MS)
    await page.select_option("#asked", label=f"{model}, version 1")
    await page.set_input_files("#file", file)
    await page.wait_for_function(
        "model => document.getElementById('outcome').textContent.startsWith(`${model} answered`) "
        "|| document.getElementById('failure').textContent",
        arg=model,
        timeout=PATIENCE_MS,
    )


async def found(page: Any) -> list[tuple[str, str]]:
    """Labels and values of an answer."""
    shown = await page.evaluate(
        "[...document.querySelectorAll('#found li')].map(line => "
        "[line.querySelector('.label').textContent, line.querySelector('.value').textContent])"
    )
    return [(label, value) for label, value in shown]


@pytest.mark.parametrize("scheme", browsers.SCHEMES)
@pytest.mark.parametrize("width", browsers.WIDTHS)
async def test_nothing_shuts_people_out(browser: Any, pictured: str, tmp_path: Path, width: int, scheme: str) -> None:
    async with browsers.opened(browser, pictured, width, scheme) as page:
        await ask(page, "detector", scene(tmp_path / "scene.png"))
        await page.click("summary >> nth=0")
        assert await browsers.violations(page) == []
        assert await browsers.overflow(page) == 0
        assert page.troubles == []


async def test_axe_finds_what_is_wrong(browser: Any, pictured: str) -> None:
    async with browsers.opened(browser, pictured) as page:
        await page.evaluate("document.querySelector('label[for=asked]').remove()")
        await page.wait_for_selector("#picture:not([hidden])", timeout=PATIENCE_MS)
        assert [line.split(":")[0] for line in await browsers.violations(page)] == ["select-name"]


async def test_the_numbers_of_a_server_at_work(browser: Any, serving: Serving, root: Path) -> None:
    name = "x-y.z_1"
    fake_model(root, name)
    (root / "broken").mkdir()
    (root / "broken" / "config.pbtxt").write_text("nonsense")
    async with (
        serving(root=root) as running,
        browsers.opened(browser, f"http://127.0.0.1:{running.app.http_port}/") as page,
    ):
        await page.wait_for_selector(".card >> nth=2", timeout=PATIENCE_MS)
        for value in range(20):
            await running.stub.ModelInfer(infer_request(value, value, model=name))
        card = page.locator(".card", has_text=name)
        await card.locator("[data-name='rows/batch'] dd", has_text="2").wait_for(timeout=PATIENCE_MS)
        for figure in ("p50", "p99", "requests/s"):
            shown = await card.locator(f"[data-name='{figure}'] dd").inner_text()
            assert shown[0].isdigit(), figure
        await card.locator("summary").click()
        await card.locator("dt", has_text="2 rows").wait_for()
        assert "20 OK" in await card.locator("details p").inner_text()
        broken = page.locator(".card", has_text="broken")
        assert "unavailable" in await broken.inner_text()
        assert "config.pbtxt" in await broken.inner_text()
        assert await page.locator("#server").inner_text() == "ready: 2 of 3 models"
        assert page.troubles == []


async def test_what_is_not_loaded_is_named(browser: Any, serving: Serving, root: Path) -> None:
    fake_model(root, "other")
    fake_model(root, "third")
    explicit = {"model_control_mode": "explicit", "load_model": ("sum",)}
    async with (
        serving(root=root, **explicit) as running,
        browsers.opened(browser, f"http://127.0.0.1:{running.app.http_port}/") as page,
    ):
        await page.get_by_text("Not loaded: other, third.").wait_for(timeout=PATIENCE_MS)
        assert await page.locator(".card").count() == 1
        assert page.troubles == []


async def test_labels_and_reasons_are_text(browser: Any, tmp_path: Path) -> None:
    """What somebody wrote into a model's files is shown as it is, and runs nowhere."""
    evil = "<img src=x onerror=document.title='ran'>"
    root = tmp_path / "models"
    root.mkdir()
    (onnx_models.write_colors(root) / "labels.txt").write_text(f"{evil}\n{evil}\nblue\n")
    (root / "broken").mkdir()
    (root / "broken" / "config.pbtxt").write_text(f'platform: "{evil}"')
    with onnx_models.serve(root) as live:
        async with browsers.opened(browser, f"http://{live.http_url}/") as page:
            await ask(page, "colors", scene(tmp_path / "<b>scene.png"))
            assert (await found(page))[0][0] == evil
            assert evil[:20] in await page.locator(".card", has_text="broken").inner_text()
            assert "<b>scene.png" in await page.inner_text("#caption")
            assert await page.title() == "Convoy"
            assert page.troubles == []


async def test_quantiles_are_those_of_prometheus(browser: Any, pictured: str) -> None:
    cases = [
        (0.5, [0, 0, 0], None),
        (0.5, [2, 0, 0], 0.5),
        (0.99, [0, 4, 0], 1.99),
        (0.5, [1, 1, 2], 2.0),
        (0.99, [0, 0, 9], 2.0),
    ]
    async with browsers.opened(browser, pictured) as page:
        for share, counts, wanted in cases:
            script = "async ([s, c]) => (await import('/page/page.js')).quantile(s, c, [1, 2])"
            value = await page.evaluate(script, [share, counts])
            assert value == pytest.approx(wanted) if wanted is not None else value is None


async def test_classes_of_a_picture(browser: Any, pictured: str, tmp_path: Path) -> None:
    async with browsers.opened(browser, pictured) as page:
        await ask(page, "colors", scene(tmp_path / "scene.png"))
        entries = await found(page)
        assert [label for label, _ in entries] == ["red", "blue", "green"] or entries[0][0] == "red"
        assert sum(float(value.removesuffix(" %")) for _, value in entries) == pytest.approx(100, abs=0.2)
        assert page.troubles == []
        (tmp_path / "text.png").write_text("no picture")
        await ask(page, "colors", tmp_path / "text.png")
        assert await page.inner_text("#failure") == "'text.png' is no picture that this browser can show"


async def test_the_evidence_lies_over_the_picture(browser: Any, pictured: str, tmp_path: Path) -> None:
    """Of the first class, and then of the one whose name is chosen; the network sees the middle of the picture."""
    pixels = """() => {
        const canvas = document.getElementById("overlay");
        const at = (x, y) => [...canvas.getContext("2d").getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
        return [at(0.05, 0.5), at(40 / 120, 30 / 80), at(85 / 120, 50 / 80)];
    }"""
    async with browsers.opened(browser, pictured, 390) as page:
        await ask(page, "explaining", scene(tmp_path / "scene.png"))
        assert (await page.inner_text("#evidence")).startswith("The colours say where the evidence for red lies")
        assert await page.locator("#found button[aria-pressed=true]").all_inner_texts() == ["red"]
        assert (await page.evaluate(pixels))[0] == [0, 0, 0, 0]
        await page.locator("#found button", has_text="blue").click()
        await page.get_by_text("where the evidence for blue lies").wait_for(timeout=PATIENCE_MS)
        assert await page.locator("#found button[aria-pressed=true]").all_inner_texts() == ["blue"]
        unseen, green, blue = await page.evaluate(pixels)
        assert unseen[3] == 0
        assert green[2] > green[0] == 0  # little is blue, and
        assert blue[0] > blue[2] == 0  # much is red
        assert blue[3] > green[3] > 0
        assert await browsers.violations(page) == []
        assert await browsers.overflow(page) == 0
        await ask(page, "colors", tmp_path / "scene.png")
        assert await page.inner_text("#evidence") == ""
        assert await page.locator("#found button").count() == 0
        assert page.troubles == []


async def test_objects_and_masks_lie_where_they_are(browser: Any, pictured: str, tmp_path: Path) -> None:
    async with browsers.opened(browser, pictured) as page:
        for turned in (False, True):  # the server looks at the pixels as they are stored
            file = scene(tmp_path / f"scene-{turned}.jpg", turned=turned)
            await ask(page, "detector", file)
            assert await found(page) == [("frog", "0.90"), ("bird", "0.60")]
            assert await page.inner_text("#caption") == f"{file.name}, 120 by 80 pixels"
            places = await page.locator("#found .place").all_inner_texts()
            edges = [[int(word) for word in text.replace(",", "").split()[1::2]] for text in places]
            assert np.abs(np.array(edges) - [[20, 10, 60, 50], [70, 30, 110, 70]]).max() <= 3
        await ask(page, "segmenter", file)
        entries = await found(page)
        assert entries[0][0] == "__background__"
        colors = await page.evaluate(
            """() => {
                const canvas = document.getElementById("overlay");
                const pixels = canvas.getContext("2d");
                const at = (x, y) => [...pixels.getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
                return [at(0.05, 0.05), at(40 / 120, 30 / 80), at(90 / 120, 50 / 80)];
            }"""
        )
        assert colors[0] == [0, 0, 0, 0]
        assert np.abs(np.array(colors[1][:3]) - voc_color(1)).max() <= 2
        assert np.abs(np.array(colors[2][:3]) - voc_color(2)).max() <= 2
        assert page.troubles == []


PREPROCESS = [
    {"resize": 256, "size": [224, 224]},
    {"resize": 40, "size": [40, 60]},
    {"resize": [100, 33], "size": [50, 50]},
    {"resize": [30, 200], "size": [64, 64]},
    {"resize": 1, "size": [71, 33], "fit": "pad", "fill": [1, 2, 3]},
]


@pytest.mark.parametrize("stated", PREPROCESS)
async def test_the_way_back_to_the_picture_is_the_clients(browser: Any, pictured: str, stated: dict[str, Any]) -> None:
    text = json.dumps({"color": "RGB", "interpolation": "bilinear", **stated})
    image_input = image_input_from_json(text, channels_last=False)
    rng = np.random.default_rng(0)
    async with browsers.opened(browser, pictured) as page:
        for width, height in ((120, 80), (33, 301), (640, 427), (5, 4)):
            region = image_input.region(width, height)
            classes = rng.integers(0, 9, (7, 11))
            boxes = rng.uniform(-5, max(stated["size"]), (4, 4))
            script = """async ([stated, width, height, map, boxes]) => {
                const p = await import('/page/picture.js');
                const where = p.region(stated, width, height);
                const mapped = [...p.mapInImage(where, map, [7, 11], width, height)];
                const shown = [...p.evidenceInImage(where, map, [7, 11], width, height)];
                return [mapped, boxes.map(box => p.boxInImage(where, box)), shown];
            }"""
            given = [stated, width, height, classes.ravel().tolist(), boxes.tolist()]
            mapped, placed, shown = await page.evaluate(script, given)
            # Where a place lies just between two cells, the last digit of a float decides.
            same = np.array(mapped).reshape(height, width) == region.map_in_image(classes)
            assert same.mean() > 0.98
            # The client draws it at the size of the input first, in whole steps.
            shares = np.array(shown).reshape(height, width)
            wanted = region.map_in_image(_smooth(classes.astype(np.float32), region.input))
            assert ((shares < 0) == (wanted < 0)).mean() > 0.98
            assert np.abs(shares - wanted / 255)[(shares >= 0) & (wanted >= 0)].mean() < 0.06
            assert np.array(placed) == pytest.approx(region.boxes_in_image(boxes))


async def test_the_colours_are_the_clients(browser: Any, pictured: str) -> None:
    async with browsers.opened(browser, pictured) as page:
        script = """async () => {
            const p = await import('/page/picture.js');
            return [...Array(300).keys()].map(index => [p.vocColor(index), p.boxColor(index)]);
        }"""
        for index, (mask, box) in enumerate(await page.evaluate(script)):
            assert tuple(mask) == voc_color(index)
            assert np.abs(np.subtract(box, box_color(index))).max() <= 1


async def test_a_token_is_asked_for_and_sent(browser: Any, serving: Serving, root: Path) -> None:
    (root / "sum" / "1" / "report.html").write_text("<h1>Evidence</h1>")
    tokens = root.parent / "tokens"
    tokens.write_text(f"me read {digest('secret')}\n")
    async with serving(root=root, auth_tokens=tokens) as running:
        url = f"http://127.0.0.1:{running.app.http_port}/"
        async with browsers.opened(browser, url, 390) as page:
            await page.wait_for_selector("#access:not([hidden])", timeout=PATIENCE_MS)
            assert await page.evaluate("document.activeElement.id") == "token"
            assert "needs a token" in await page.inner_text("#access-why")
            assert await browsers.violations(page) == []
            await page.fill("#token", "wrong")
            await page.keyboard.press("Enter")
            await page.get_by_text("the token is not known to this server").wait_for(timeout=PATIENCE_MS)
            await page.fill("#token", "secret")
            await page.keyboard.press("Enter")
            await page.wait_for_selector(".card", timeout=PATIENCE_MS)
            assert await page.is_hidden("#access")
            # A link cannot carry it, so the report comes as a file.
            async with page.expect_download() as download:
                await page.click("text=The report of its export")
            file = await (await download.value).path()
            assert Path(file).read_text() == "<h1>Evidence</h1>"
            assert (await download.value).suggested_filename == "sum-1-report.html"
            assert await page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
            await page.click("#forget")
            await page.wait_for_selector("#access:not([hidden])", timeout=PATIENCE_MS)


async def test_a_report_opens_and_runs_nothing(browser: Any, serving: Serving, root: Path) -> None:
    evil = "<style>h1 { color: rgb(1, 2, 3) }</style><h1>Evidence</h1><script>document.title = 'ran'</script>"
    (root / "sum" / "1" / "report.html").write_text(evil)
    async with serving(root=root) as running:
        url = f"http://127.0.0.1:{running.app.http_port}/"
        async with browsers.opened(browser, url) as page:
            await page.wait_for_selector(".card", timeout=PATIENCE_MS)
            async with page.expect_popup() as popup:
                await page.click("text=The report of its export")
            report = await popup.value
            await report.wait_for_load_state()
            assert await report.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(1, 2, 3)"
            assert await report.title() == ""
            assert await report.evaluate("origin") == "null"


async def test_whoever_looks_away_asks_nothing(browser: Any, serving: Serving, root: Path) -> None:
    async with (
        serving(root=root) as running,
        browsers.opened(browser, f"http://127.0.0.1:{running.app.http_port}/") as page,
    ):
        await page.wait_for_selector(".card", timeout=PATIENCE_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        hide = (
            "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')); }"
        )
        await page.evaluate(hide, True)
        asked.clear()
        await page.wait_for_timeout(2500)
        assert len(asked) <= 1  # one may have been on its way
        async with page.expect_response("**/page/state", timeout=PATIENCE_MS):
            await page.evaluate(hide, False)


async def test_a_server_that_goes_away_and_comes_back(browser: Any, serving: Serving, root: Path) -> None:
    async with serving(root=root) as running:
        port = running.app.http_port
        async with browsers.opened(browser, f"http://127.0.0.1:{port}/") as page:
            await page.wait_for_selector(".card", timeout=PATIENCE_MS)
            await page.route("**/page/state", lambda route: route.abort())
            await page.get_by_text("the server does not answer").wait_for(timeout=PATIENCE_MS)
            await page.unroute("**/page/state")
            await page.get_by_text("ready: 1 of 1 models").wait_for(timeout=PATIENCE_MS)
