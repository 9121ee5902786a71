"""`convoy serve`: flags to a ServeConfig, signals, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from server.app import App
from server.config import ServeConfig, frontends_for
from server.errors import InvalidModel
from server.repository import available_cpus

_EXAMPLES = """\
examples:
  convoy serve --model-repository models
  convoy serve --model-repository models --host 0.0.0.0 --metrics-aliases triton

Readiness is grpc.health.v1 on the gRPC port ("" for the server, a model's name for the model); metrics are at
http://HOST:METRICS_PORT/metrics. SIGTERM drains: health says NOT_SERVING, everything that was admitted is answered,
then the server exits with 0.
"""


def serve(argv: Sequence[str]) -> int:
    """Serve a model repository over gRPC, with batching and Prometheus metrics."""
    arguments = vars(_parser().parse_args(argv))
    logging.basicConfig(
        level=arguments.pop("log_level").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        config = ServeConfig(**arguments)
    except ValueError as error:
        sys.stderr.write(f"convoy serve: {error}\n")
        return 2
    try:
        return uvloop.run(_serve(config))
    except (InvalidModel, OSError) as error:
        sys.stderr.write(f"convoy serve: {error}\n")
        return 1


async def _serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = App(config)
    try:
        await app.start()
    except BaseException:
        await app.stop()
        raise
    ready = sorted({m.spec.name for m in app.core if m.state == "ready"})
    sys.stderr.write(
        f"READY gRPC {config.host}:{app.grpc_port}, metrics http://{config.host}:{app.metrics_port}/metrics, "
        f"models: {', '.join(ready)}\n"
    )
    for (name, version), reason in app.core.failed.items():
        sys.stderr.write(f"NOT SERVED {' '.join(filter(None, (name, version)))}: {reason}\n")
    await stop.wait()
    if await app.stop():
        return 0
    sys.stderr.write(
        f"convoy serve: some answers were not ready within {config.drain_timeout_seconds:g} s "
        "(--drain-timeout-seconds) and were cut off\n"
    )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convoy serve",
        description=f"{(serve.__doc__ or '').strip()} The repository has Triton's layout; `convoy export` writes it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, kind: type, default: object, text: str) -> None:
        metavar = {Path: "DIR", int: "N", float: "S", str: "TEXT"}[kind]
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})")

    parser.add_argument("--model-repository", type=Path, required=True, metavar="DIR", help="folder of models")
    add("--host", str, ServeConfig.host, "address to listen on; 0.0.0.0 for every one")
    add("--grpc-port", int, ServeConfig.grpc_port, "0 for a free one")
    add("--metrics-port", int, ServeConfig.metrics_port, "0 for a free one")
    add("--threads", int, available_cpus(), "CPU threads of each engine: the cores that this process may use")
    parser.add_argument(
        "--frontends",
        type=lambda text: frontends_for(available_cpus()) if text == "auto" else int(text),
        default=ServeConfig.frontends,
        metavar="N|auto",
        help="processes that end gRPC; auto: 1 up to 4 cores, then a quarter of them (default: 1)",
    )
    add("--max-queue", int, ServeConfig.max_queue, "requests that may wait for a model; one more is refused")
    add("--max-message-bytes", int, ServeConfig.max_message_bytes, "largest gRPC message")
    add("--max-image-pixels", int, ServeConfig.max_image_pixels, "largest encoded image")
    add(
        "--drain-seconds",
        float,
        ServeConfig.drain_seconds,
        "go on serving so long after SIGTERM, as NOT_SERVING",
    )
    add(
        "--drain-timeout-seconds",
        float,
        ServeConfig.drain_timeout_seconds,
        "then wait so long for due answers",
    )
    parser.add_argument(
        "--metrics-aliases",
        choices=["triton"],
        default="",
        help="expose Triton's nv_inference_* names as well",
    )
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info", help="(default: info)"
    )
    return parser
