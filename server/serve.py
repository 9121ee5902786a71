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
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convoynet.server import settings
from convoynet.server.config import ServeConfig
from convoynet.server.errors import InvalidModel
from convoynet.server.memory.allocator import keep_large_pieces_apart
from convoynet.server.observing import logs
from convoynet.server.repository.lone_files import split
from convoynet.server.repository.overlay import remove_overlays
from convoynet.server.supervision import tasks
from convoynet.server.supervision.threads import SECONDS, Threads
from convoynet.usage import Parser

if TYPE_CHECKING:
    from convoynet.server.app import App

log = logging.getLogger(__name__)

_COLLECTOR = (10_000, 20, 20)
"""Thresholds of the garbage collector's generations."""
_ABANDON_SECONDS = 5.0
"""What a start that is given up may take to notice."""
_END_SECONDS = 30.0
"""What the end of the process may take beyond the limits of the drain."""
_SAME_SIGNAL_SECONDS = 0.2
"""Signals that come so close together are one: a terminal sends it to the whole group, and a parent passes it on."""
_SLOW_START_SECONDS = 2.0
_EXAMPLES = """\
examples:
  convoy serve
      what `convoy export` wrote into models
  convoy serve theirs.onnx --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --labels names.txt
      a file of any exporter, at once; clients send tensors, or JPEGs where the preprocessing is said
  convoy serve --host 0.0.0.0 --metrics-aliases triton
  convoy serve --print-config > server.toml
  convoy serve --config server.toml --log-format json

Readiness is grpc.health.v1 on the gRPC port ("" for the server, a model's name for the model); metrics are at
http://HOST:METRICS_PORT/metrics. SIGTERM drains: health says NOT_SERVING, everything that was admitted is answered,
then the server exits with 0; a second SIGTERM ends it at once. SIGHUP reads the configuration again
(docs/operations.md).
"""


def serve(argv: Sequence[str]) -> int:
    """Serve a model repository over gRPC and HTTP, with batching and Prometheus metrics."""
    flags = vars(_parser().parse_args(argv))
    file, print_config = flags.pop("config"), flags.pop("print_config")

    def read() -> ServeConfig:
        return settings.effective(flags, os.environ, file)

    try:
        _take_paths(flags)
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


def _take_paths(flags: dict[str, Any]) -> None:
    """Puts what was named without a flag where it belongs: repositories, and ONNX files or folders of such."""
    paths = flags.pop("paths")
    if not paths:
        return
    repositories, files = split(paths)
    flags["model_repository"] = [*flags.get("model_repository", ()), *repositories]
    flags["onnx"] = [*flags.get("onnx", ()), *files]


async def _serve(config: ServeConfig, read: Callable[[], ServeConfig]) -> int:
    """Serves until SIGTERM or SIGINT; `read` gives the settings of now, for SIGHUP."""
    from convoynet.server.app import App

    loop = asyncio.get_running_loop()
    app = App(config)
    # Modules stay, and requests leave few cycles behind: by default the collector takes 4 % of a busy core.
    keep_large_pieces_apart(config.max_inflight_bytes)
    gc.freeze()
    gc.set_threshold(*_COLLECTOR)
    stop = Stop(lambda: app.drain_limit_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    reloads = _Reloads(app, read)
    loop.add_signal_handler(signal.SIGHUP, reloads.ask)
    starting = asyncio.ensure_future(app.start())
    telling = tasks.start(_tell_slow_start(config, app, starting), "the word of a slow start")
    try:
        await _first(starting, stop.asked)
        if not starting.done():
            app.core.begin_drain()  # what is still loading fails soon
            await asyncio.wait([starting], timeout=_ABANDON_SECONDS)
            starting.cancel()
        await starting
    except (Exception, asyncio.CancelledError) as error:
        telling.cancel()
        await app.stop()
        if stop.asked.is_set() and isinstance(error, InvalidModel | asyncio.CancelledError):
            return 0
        raise
    finally:
        reloads.ready()
    _tell("READY", config, app)
    for (name, version), reason in app.core.failed.items():
        sys.stderr.write(f"NOT SERVED {' '.join(filter(None, (name, version)))}: {reason}\n")
    await stop.asked.wait()
    if await app.stop():
        return 0
    sys.stderr.write(
        f"convoy serve: some answers were not ready within {config.drain_timeout_seconds:g} s "
        "(--drain-timeout-seconds) and were cut off\n"
    )
    return 1


class Stop:
    """What SIGTERM and SIGINT do. The first asks for the drain, the second ends the process; so does the time.

    Attributes:
        asked: Set by the first signal.
    """

    def __init__(self, limit: Callable[[], float]) -> None:
        """Args: how many seconds the drain may take."""
        self.asked = asyncio.Event()
        self._limit = limit
        self._first = 0.0

    def __call__(self) -> None:
        """One more signal."""
        now = time.monotonic()
        if not self.asked.is_set():
            self._first = now
            self.asked.set()
            # Not on the loop, which may be what hangs.
            last = threading.Timer(self._limit() + _END_SECONDS, cut_off, ["the drain took too long"])
            last.daemon = True
            last.start()
        elif now - self._first > _SAME_SIGNAL_SECONDS:
            cut_off("a second signal came")


def cut_off(why: str) -> None:
    """Ends the process now; the system kills those below it."""
    remove_overlays()
    sys.stderr.write(f"convoy serve: {why}: ended at once, answers that were due were cut off\n")
    sys.stderr.flush()
    os._exit(1)


async def _first(task: asyncio.Future[None], event: asyncio.Event) -> None:
    """Waits for whichever comes first."""
    waiting = asyncio.ensure_future(event.wait())
    either: list[asyncio.Future[Any]] = [task, waiting]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _tell_slow_start(config: ServeConfig, app: App, starting: asyncio.Future[None]) -> None:
    """Says what is served already where the start takes longer than a moment."""
    await asyncio.wait([starting], timeout=_SLOW_START_SECONDS)
    while not starting.done():
        if any(m.state == "ready" for m in app.core):
            _tell("PARTLY READY", config, app)
            return
        await asyncio.wait([starting], timeout=_SLOW_START_SECONDS)


def _tell(what: str, config: ServeConfig, app: App) -> None:
    ready = sorted({m.spec.name for m in app.core if m.state == "ready"})
    scheme = "http" if config.tls_cert is None else "https"
    http = f"HTTP {scheme}://{config.host}:{app.http_port}, " if app.http_port >= 0 else ""
    if app.management_ports:
        http += f"management 127.0.0.1:{','.join(map(str, app.management_ports))}, "
    loading = f"; still loading: {', '.join(app.core.loading)}" if app.core.loading else ""
    metrics = f"{scheme}://{config.host}:{app.metrics_port}/metrics"
    sys.stderr.write(
        f"{what} gRPC {config.host}:{app.grpc_port}, {http}metrics {metrics}, models: {', '.join(ready)}{loading}\n"
    )


class _Reloads:
    """SIGHUP: one reload at a time; signals that come meanwhile make one more. A faulty file changes nothing."""

    def __init__(self, app: App, read: Callable[[], ServeConfig]) -> None:
        self._app, self._read = app, read
        self._again = self._busy = False
        self._ready = asyncio.Event()
        self._threads = Threads(4)

    def ready(self) -> None:
        """The start is over: what was asked for meanwhile is done now."""
        self._ready.set()

    def ask(self) -> None:
        """One more signal."""
        self._again = True
        if not self._busy:
            self._busy = True
            tasks.start(self._reload(), "a reload")

    async def _reload(self) -> None:
        try:
            await self._ready.wait()
            while self._again:
                self._again = False
                try:
                    config = await self._threads.run(SECONDS, self._read)
                except (ValueError, OSError) as error:
                    log.error("nothing was reloaded: %s", error)
                    continue
                try:
                    await self._app.reload(config)
                except OSError as error:
                    log.error("settings were reloaded, models were not: %s", error)
        finally:
            self._busy = False


def _parser() -> Parser:
    parser = Parser(
        prog="convoy serve",
        description=f"{(serve.__doc__ or '').strip()} The repository has Triton's layout; `convoy export` writes it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    file = os.environ.get(f"{settings.ENVIRONMENT_PREFIX}CONFIG")
    text = "TOML file of settings: the flags' names; flags and CONVOY_* variables override it"
    parser.add_argument("--config", type=Path, metavar="FILE", default=Path(file) if file else None, help=text)
    parser.add_argument("--print-config", action="store_true", help="print the effective settings as TOML and end")
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="what to serve: an ONNX file, a folder of such files, or a model repository",
    )
    name = "of a single ONNX file's model (default: after the file); the same as --model-name"
    parser.add_argument("--name", dest="model_name", metavar="TEXT", default=argparse.SUPPRESS, help=name)
    settings.add_flags(parser)
    return parser
