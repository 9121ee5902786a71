"""`convoy bench`: throughput and latency of a served model, measured by server/client/load.py."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from convoynet.server.client.arguments import add_model, positive, seconds, security
from convoynet.server.client.client import Client, ClientError, Unreachable
from convoynet.server.client.load import Load, LoadResult, make_load, run_load
from convoynet.tables import Column, show
from convoynet.usage import Parser

__all__ = ["Load", "LoadResult", "bench", "make_load", "run_load"]

# From this share of one core on, the generator (one thread of Python) is what limits the throughput.
_BUSY_CORES = 0.85


def bench(argv: Sequence[str] | None = None) -> int:
    """Measure a served model's throughput and latency."""
    arguments = _parser().parse_args(argv)
    errors = Console(stderr=True, soft_wrap=True)
    image = None if arguments.input == "auto" else Path(arguments.input)
    try:
        with Client(arguments.url, timeout=30, **security(arguments)) as client:
            load = make_load(client, arguments.model, batch=arguments.batch, image=image, version=arguments.version)
    except Unreachable as error:
        errors.print(f"convoy bench: {escape(str(error))}; start one with `convoy serve`", highlight=False)
        return 2
    except (ClientError, OSError) as error:
        said = (
            f"--input {error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        errors.print(f"convoy bench: {escape(said)}", highlight=False)
        return 2
    results = [
        run_load(load, level, duration_s=arguments.duration, warmup_s=arguments.warmup)
        for level in arguments.concurrency
    ]
    if arguments.json:
        json.dump([_as_json(result) for result in results], sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        _print_table(load, results)
    return 0 if all(result.requests for result in results) else 1


def _as_json(result: LoadResult) -> dict[str, object]:
    # JSON has no NaN: what could not be measured is null.
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(result).items()
    }


def _print_table(load: Load, results: Sequence[LoadResult]) -> None:
    size = f"{len(load.payload) / 1000:,.1f} kB"
    console = Console(highlight=False)
    console.print(f"{load.model} at {load.url}: {load.images} image(s), {size} a request", markup=False, soft_wrap=True)
    headings = ("in flight", "req/s", "images/s", "p50", "p95", "p99", "queue", "compute", "batch", "client")
    show(console, [*map(Column, headings), Column("errors", text=True)], [_cells(result) for result in results])
    console.print(
        "Times in ms: p50 to p99 as the client sees them; queue and compute of one request, and the mean images\n"
        "in one run of the engine (batch), as the server reports them. client: cores that this generator used.",
        highlight=False,
    )
    if why := next((result.no_server for result in results if result.no_server), ""):
        console.print(f"No queue, compute and batch: {escape(why)}", highlight=False)
    if any(result.client_cores >= _BUSY_CORES for result in results):
        console.print(
            f"The client used {_BUSY_CORES:.0%} of a core or more: the server may be faster than this says. "
            "Run several generators, or larger batches.",
            highlight=False,
        )


def _cells(result: LoadResult) -> list[str]:
    views = ["-", "-", "-"]
    if (server := result.server) is not None:
        compute = server.compute_input_ms + server.compute_infer_ms + server.compute_output_ms
        views = [_number(server.queue_ms), _number(compute), f"{server.mean_batch:.1f}"]
    latencies = [_number(value) for value in (result.p50_ms, result.p95_ms, result.p99_ms)]
    errors = ", ".join(f"{count:,} {code}" for code, count in sorted(result.errors.items())) or "0"
    rates = [_number(result.requests_per_s), _number(result.images_per_s)]
    return [str(result.concurrency), *rates, *latencies, *views, f"{result.client_cores:.2f}", errors]


def _number(value: float) -> str:
    """Three digits or more, none of them noise: 0.123, 1.23, 12.3, 1,234; "-" for NaN."""
    if math.isnan(value):
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def _levels(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


_EPILOG = """\
A closed loop: at concurrency N, N requests are in flight; each answer is followed by the next request. So
latency rises with N while throughput levels off, and the N where it does is what keeps the server busy.
"client cores" is the CPU that this generator uses. Near 1 it is the limit, not the server.

examples:
  convoy bench --model resnet50
  convoy bench --model resnet50 --input cat.jpg --concurrency 16 --duration 30
  convoy bench --model lenet5 --batch 8 --json > bench.json

exit codes: 0 measured; 1 at some concurrency every request failed; 2 no server, no such model, bad input
"""


def _parser() -> Parser:
    parser = Parser(
        prog="convoy bench",
        description="Measure the throughput and latency of a served model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model(parser)
    add(
        "--concurrency",
        type=_levels,
        default=[1, 8, 32],
        metavar="N[,N...]",
        help="requests in flight; one measurement for each number (default: 1,8,32)",
    )
    add(
        "--duration",
        type=seconds,
        default=5.0,
        metavar="S",
        help="seconds measured at each concurrency; longer is steadier (default: %(default)s)",
    )
    add(
        "--warmup",
        type=seconds,
        default=1.0,
        metavar="S",
        help="seconds of load before each measurement (default: %(default)s)",
    )
    add("--batch", type=positive, default=1, metavar="N", help="images in one request (default: %(default)s)")
    add(
        "--input",
        default="auto",
        metavar="auto|FILE",
        help="auto: random tensors of the model's input shape; an image file: sent encoded, so that the "
        "server's decoding is measured too (default: %(default)s)",
    )
    add("--json", action="store_true", help="print a JSON list with one object for each concurrency")
    return parser
