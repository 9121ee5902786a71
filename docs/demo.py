"""`make demo`: the whole road in one command, with the network that the package carries.

LeNet-5, trained on handwritten digits -> INT8 ONNX, checked against PyTorch -> served -> called with digits that it has
never seen -> watched through its metrics -> stopped. Every step is the command that a user would type.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from convoynet import Client
from convoynet.exporter.assets import digits

CONVOY = str(Path(sys.executable).with_name("convoy"))
SHOWN = 20
out = Console(highlight=False)


def main() -> int:
    """Runs the demo; every failure of a step ends it."""
    with tempfile.TemporaryDirectory(prefix="convoy-demo-") as folder:
        test = write_digits(Path(folder) / "digits")
        repository = Path(folder) / "models"
        step("Export: PyTorch to INT8 ONNX, measured against PyTorch on digits held out from training")
        run("export", "--arch", "lenet5", "--int8", "--eval", str(test), "--model-repository", str(repository))
        step("Serve")
        server, url, metrics = serve(repository)
        try:
            step(f"Call: {SHOWN} digits as PNG files over gRPC, the server decodes them")
            classify(url, test)
            step("Load: 16 requests in flight, while Prometheus would scrape the metrics twice")
            before, after, seconds = under_load(url, metrics)
            step(f"Watch: {metrics}")
            show_metrics(before, after, seconds)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        step(f"Stop: the server drained and exited with {code}")
        return code


def step(text: str) -> None:
    """A heading."""
    out.print(f"\n[bold cyan]== {text}[/]")


def run(*arguments: str) -> None:
    """Runs a convoy command and shows it."""
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]")
    subprocess.run([CONVOY, *arguments], check=True)


def write_digits(folder: Path) -> Path:
    """The held-out digits as PNG files in class folders."""
    packaged = digits()
    for i, (image, label) in enumerate(zip(packaged.test, packaged.test_labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.squeeze(image)).save(folder / str(label) / f"{i:03}.png")
    return folder


def serve(repository: Path) -> tuple[subprocess.Popen[str], str, str]:
    """Starts the server on free ports: the process, its gRPC address and its metrics URL."""
    arguments = ["serve", "--model-repository", str(repository)]
    arguments += [word for port in ("grpc", "http", "metrics") for word in (f"--{port}-port", "0")]
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]")
    server = subprocess.Popen([CONVOY, *arguments, "--log-level", "warning"], stderr=subprocess.PIPE, text=True)
    line = server.stderr.readline() if server.stderr else ""
    out.print(line.strip())
    found = re.search(r"gRPC (\S+), .*metrics (\S+),", line)
    if found is None:
        server.kill()
        raise SystemExit(f"the server did not start: {line}{server.stderr.read() if server.stderr else ''}")
    return server, found[1], found[2]


def classify(url: str, folder: Path) -> None:
    """Sends digits and prints the answers beside the true labels."""
    files = sorted(folder.rglob("*.png"), key=lambda f: f.name)[:SHOWN]
    with Client(url) as client:
        answers = client.classify("lenet5", files, top=1)
    table = Table("true", "predicted", "probability", "", box=None)
    right = 0
    for file, (best, *_) in zip(files, answers, strict=True):
        same = file.parent.name == best.label
        right += same
        table.add_row(file.parent.name, best.label, f"{best.probability:.3f}", "[green]ok" if same else "[red]wrong")
    out.print(table)
    out.print(f"{right} of {len(files)} are right")


def under_load(url: str, metrics: str) -> tuple[Counter[str], Counter[str], float]:
    """The metrics at two moments while `convoy bench` runs, and the seconds between."""
    arguments = ["bench", "--model", "lenet5", "--url", url, "--concurrency", "16", "--duration", "4"]
    out.print(f"[dim]$ convoy {' '.join(arguments)}[/]")
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
