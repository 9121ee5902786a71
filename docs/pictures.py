"""`make pictures`: the page, a report and a sweep as docs/img/ has them, at the width of a phone, a tablet and a desk.

And what the units of a layer are for, at the width of a desk.

LeNet-5 is exported and swept over four recipes, then served under load while a real browser looks. With a folder as
argument what was exported there before is taken again.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from convoynet.exporter.assets import digits

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import browser as browsers

IMAGES = Path(__file__).with_name("img")
CONVOY = str(Path(sys.executable).with_name("convoy"))
SCHEMES = {390: "light", 800: "dark", 1280: "light"}
HEIGHTS = {390: 2600, 800: 1900, 1280: 1500}
"""Pictures of long pages end here."""
MOST_BYTES = 150_000
UNITS = "units.html"
_INT8, _PRUNE = '[[step]]\nstep = "int8"\n', '[[step]]\nstep = "prune"\nratio = {}\nround_to = 1\n'
RECIPES = {
    "int8": _INT8,
    "pruned-15": _PRUNE.format(0.15),
    "pruned-15-int8": _PRUNE.format(0.15) + _INT8,
    "pruned-50": _PRUNE.format(0.5),  # more than LeNet-5 can spare: refused
}
out = Console(highlight=False)


def main() -> int:
    """Makes all of them; whatever fails ends it."""
    if why := browsers.missing():
        raise SystemExit(why)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convoy-pictures-") as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        test = write_digits(folder / "digits")
        models = folder / "models"
        if not (folder / "sweep/front.html").is_file():
            run(
                "export",
                "--force",
                "--version",
                "1",
                "--arch",
                "lenet5",
                "--int8",
                "--eval",
                str(test),
                "--model-repository",
                str(models),
            )
            recipes = [write_recipe(folder, name, text) for name, text in RECIPES.items()]
            options = ("--eval", str(test), "--model-repository", str(models), "--output", str(folder / "sweep"))
            run("sweep", "--arch", "lenet5", *options, *map(str, recipes))
        look_inside(folder, test)
        asyncio.run(shoot(folder, test))
    return 0


def look_inside(folder: Path, test: Path) -> None:
    """The page of a layer's units."""
    if not (folder / UNITS).is_file():
        # From where the pictures are: the page says how they were called.
        digits = str(test.relative_to(folder))
        run("inspect", "lenet5", "--units", "s4", "--images", digits, "--most", "3", "--html", UNITS, cwd=folder)


def write_digits(folder: Path) -> Path:
    """The held-out digits as PNG files in class folders."""
    packaged = digits()
    for i, (image, label) in enumerate(zip(packaged.test, packaged.test_labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.squeeze(image)).save(folder / str(label) / f"{i:03}.png")
    return folder


def write_recipe(folder: Path, name: str, text: str) -> Path:
    """A recipe under its name."""
    file = folder / f"{name}.toml"
    file.write_text(text)
    return file


def run(*arguments: str, cwd: Path | None = None) -> None:
    """Runs a convoy command and shows it."""
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]")
    subprocess.run([CONVOY, *arguments], check=True, cwd=cwd)


@contextmanager
def served(models: Path) -> Iterator[tuple[str, str]]:
    """A server of two of the models: its gRPC address and the page's."""
    ports = [word for port in ("grpc", "http", "metrics") for word in (f"--{port}-port", "0")]
    wanted = ["--model-control-mode", "explicit", "--load-model", "lenet5", "lenet5-pruned-15-int8"]
    command = [CONVOY, "serve", "--model-repository", str(models), *ports, *wanted, "--log-level", "warning"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr or ():
                if found := re.search(r"^READY gRPC (\S+), HTTP (\S+),", line):
                    break
            else:
                raise SystemExit("the server did not start")
            yield found[1], f"{found[2]}/"
        finally:
            server.send_signal(signal.SIGTERM)


@contextmanager
def load(url: str, model: str, concurrency: int) -> Iterator[None]:
    """Requests for a model for as long as the block takes."""
    command = [CONVOY, "bench", "--model", model, "--url", url, "--concurrency", str(concurrency), "--duration", "600"]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        bench.kill()
        bench.wait()


async def shoot(folder: Path, test: Path) -> None:
    """Takes the pictures."""
    picture = sorted((test / "7").iterdir())[0]
    async with browsers.chromium() as browser:
        with served(folder / "models") as (url, page), load(url, "lenet5", 4), load(url, "lenet5-pruned-15-int8", 1):
            for width, scheme in SCHEMES.items():
                async with browsers.opened(browser, page, width, scheme) as opened:
                    await opened.locator("#picture:not([hidden])").wait_for()
                    await opened.set_input_files("#file", picture)
                    await opened.get_by_text("lenet5 answered in").wait_for()
                    await opened.wait_for_timeout(15_000)  # so that the lines have something to show
                    await opened.click("summary >> nth=0")
                    await save(opened, f"page-{width}.png", width)
        for name, file in (("report", folder / "models/lenet5/report.html"), ("sweep", folder / "sweep/front.html")):
            for width, scheme in SCHEMES.items():
                async with browsers.opened(browser, file.absolute().as_uri(), width, scheme) as opened:
                    await save(opened, f"{name}-{width}.png", width)
        await shoot_units(browser, folder)


async def shoot_units(browser: Any, folder: Path) -> None:
    """Takes the picture of the units."""
    async with browsers.opened(browser, (folder / UNITS).absolute().as_uri(), 1280, SCHEMES[1280]) as opened:
        await save(opened, "units-1280.png", 1280)


async def save(page: Any, name: str, width: int) -> None:
    """Writes what a page shows, in as many colours as fit into MOST_BYTES."""
    shot = Image.open(io.BytesIO(await page.screenshot(full_page=True))).convert("RGB")
    shot = shot.crop((0, 0, width, min(shot.height, HEIGHTS[width])))
    for colors in (256, 128, 64, 32):
        file = io.BytesIO()
        shot.quantize(colors, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() < MOST_BYTES:
            break
    (IMAGES / name).write_bytes(file.getvalue())
    out.print(f"docs/img/{name}: {file.tell() // 1000} kB, {colors} colours")


if __name__ == "__main__":
    os.environ.setdefault("CONVOY_TUNE", "false")
    sys.exit(main())
