"""`convoy serve`: flags to a ServeConfig, signals, exit codes.

The server itself is imported when its settings are known to be right.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.server import settings
from convoynet.server.config import ServeConfig
from convoynet.server.errors import InvalidModel
from convoynet.server.observing import logs

if TYPE_CHECKING:
    from convoynet.server.app import App

log = logging.getLogger(__name__)

_COLLECTOR = (10_000, 20, 20)
"""Thresholds of the garbage collector's generations."""
_EXAMPLES = """\
examples:
  convoy serve --model-repository models
  convoy serve --model-repository models --host 0.0.0.0 --metrics-aliases triton
  convoy serve --model-repository models --print-config > server.toml
  convoy serve --config server.toml --log-format json

Readiness is grpc.health.v1 on the gRPC port ("" for the server, a model's name for the model); metrics are at
http://HOST:METRICS_PORT/metrics. SIGTERM drains: health says NOT_SERVING, everything that was admitted is answered,
then the server exits with 0. SIGHUP reads the configuration again (docs/operations.md).
"""


def serve(argv: Sequence[str]) -> int:
    """Serve a model repository over gRPC and HTTP, with batching and Prometheus metrics."""
    flags = vars(_parser().parse_args(argv))
    file, print_config = flags.pop("config"), flags.pop("print_config")

    def read() -> ServeConfig:
        return settings.effective(flags, os.environ, file)

    try:
        config = read()
        if print_config:
            sys.stdout.write(settings.as_toml(config))
            return 0
        logs.configure(config.log_level, config.log_format)

        import uvloop

        return uvloop.run(_serve(config, read))
    except ValueError as error:
        sys.stderr.write(f"convoy serve: {error}\n")
        return 2
    except (InvalidModel, OSError) as error:
        sys.stderr.write(f"convoy serve: {error}\n")
        return 1


async def _serve(config: ServeConfig, read: Callable[[], ServeConfig]) -> int:
    """Serves until SIGTERM or SIGINT; `read` gives the settings of now, for SIGHUP."""
    from convoynet.server.app import App

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    app = App(config)
    # Modules stay, and requests leave few cycles behind: by default the collector takes 4 % of a busy core.
    gc.freeze()
    gc.set_threshold(*_COLLECTOR)

    def end() -> None:
        stop.set()
        app.core.abandon()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(_reload(app, read))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        await app.start()
    except BaseException as error:
        await app.stop()
        if stop.is_set() and isinstance(error, InvalidModel):
            return 0  # what was still loading was abandoned
        raise
    ready = sorted({m.spec.name for m in app.core if m.state == "ready"})
    scheme = "http" if config.tls_cert is None else "https"
    http = f"HTTP {scheme}://{config.host}:{app.http_port}, " if app.http_port >= 0 else ""
    if app.management_ports:
        http += f"management 127.0.0.1:{','.join(map(str, app.management_ports))}, "
    sys.stderr.write(
        f"READY gRPC {config.host}:{app.grpc_port}, {http}metrics {scheme}://{config.host}:{app.metrics_port}/metrics, "
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


async def _reload(app: App, read: Callable[[], ServeConfig]) -> None:
    """SIGHUP: a faulty file changes nothing."""
    try:
        config = read()
    except ValueError as error:
        log.error("nothing was reloaded: %s", error)
        return
    await app.reload(config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convoy serve",
        description=f"{(serve.__doc__ or '').strip()} The repository has Triton's layout; `convoy export` writes it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    file = os.environ.get(f"{settings.ENVIRONMENT_PREFIX}CONFIG")
    text = "TOML file of settings: the flags' names; flags and CONVOY_* variables override it"
    parser.add_argument("--config", type=Path, metavar="FILE", default=Path(file) if file else None, help=text)
    parser.add_argument("--print-config", action="store_true", help="print the effective settings as TOML and end")
    settings.add_flags(parser)
    return parser
