"""`make pictures`: what `convoy predict` draws for a classifier, a segmentation network and a detector, in docs/img/.

The classifier is EfficientNet-Lite0 with ImageNet weights, which `make demo` fetches, and sees a photograph that
scikit-learn carries. The other two are those of examples/sheets.py, which trains them and writes what they have not
seen. All three are exported in INT8 and served. With a folder as argument what was trained and exported there before is
taken again.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import demo
from PIL import Image

from convoynet import Client

DOCS = Path(__file__).parent
IMAGES, EXAMPLES, PACKAGES = DOCS / "img", DOCS / "examples", DOCS.parent / "build" / "demo"
WIDTH = 512
SHEET = "sheets/4.png"
SECONDS_TO_LOAD = 300


def main() -> int:
    """Makes all three; whatever fails ends it."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (PACKAGES, EXAMPLES, os.environ.get("PYTHONPATH", ""))))
    with tempfile.TemporaryDirectory(prefix="convoy-predictions-") as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # paths stay short in what is shown
        if not Path("models").is_dir():
            export()
        server, url, *_ = demo.serve()
        try:
            for model, picture, flags in (
                ("efficientnet_lite0", "flower.jpg", ["--top", "3"]),
                ("pixels", SHEET, []),
                ("boxes", SHEET, []),
            ):
                wait_for(url, model)
                demo.run("predict", "--url", url, "--model", model, *flags, "--output", model, picture)
                save(Path(model) / f"{Path(picture).stem}.png", f"predict-{model.partition('_')[0]}.jpg")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return 0


def export() -> None:
    """Trains the two networks of the sheets where that was not done, and exports all three."""
    sys.path.insert(0, str(EXAMPLES))
    import sheets

    if not Path("boxes.pt").is_file():
        sheets.main(Path())
    for name, task in (("pixels", "segmentation"), ("boxes", "detection")):
        flags = ["--weights", f"{name}.pt", "--labels", "digits.txt", "--input-size", "192x256"]
        flags += ["--int8", "--calibration", "calibration"]
        demo.run("export", "--arch", f"sheets:{name}", "--task", task, *flags)
    demo.run("export", *demo.photographs().export)


def wait_for(url: str, model: str) -> None:
    """A server that has to load large models begins to serve before it has all of them."""
    end = time.monotonic() + SECONDS_TO_LOAD
    with Client(url) as client:
        while not client.model_ready(model):
            if time.monotonic() > end:
                raise SystemExit(f"{model} was not loaded in {SECONDS_TO_LOAD} s")
            time.sleep(0.2)


def save(drawn: Path, name: str) -> None:
    """Writes a picture for the documents: not wider than WIDTH."""
    picture = Image.open(drawn).convert("RGB")
    picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS)
    file = IMAGES / name
    picture.save(file, quality=90)
    demo.out.print(f"docs/img/{name}: {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    os.environ.setdefault("CONVOY_TUNE", "false")
    sys.exit(main())
