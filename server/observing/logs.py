"""How the server logs: lines for people or JSON objects, a bounded number of repeated warnings, a line a request."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from convoynet.server.errors import printable
from convoynet.server.observing.observer import Finished
from convoynet.server.observing.stage_times import stages

access = logging.getLogger("server.requests")

# What every record has; the rest is what `extra` brought.
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Sends every log of the process to one stream; may be called again, to change level and form.

    Args:
        level: debug, info, warning or error.
        form: text or json.
        stream: Where to; None for stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What `extra` brought, in its order, without what is empty."""
    return {k: v for k, v in record.__dict__.items() if k not in _OWN and v not in ("", None)}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, milliseconds, UTC), level, logger, message, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # What is not ASCII is escaped: names may hold line ends that not everybody knows, and what no stream takes.
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message and name=value of the fields, in one line whatever others put into it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The first line; a traceback may follow."""
        told = (f" {name}={json.dumps(value, default=str)}" for name, value in _fields(record).items())
        return printable(super().formatMessage(record)) + "".join(told)


class RepeatFilter(logging.Filter):
    """Lets a warning or an error through `burst` times in each period, and then says how many it left out.

    Records are the same when level and message are, before their arguments are put in.
    """

    def __init__(self, burst: int = 10, period_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst, self._period_s, self._clock = burst, period_s, clock
        self._seen: dict[tuple[int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        if record.levelno < logging.WARNING:
            return True
        key, now = (record.levelno, str(record.msg)), self._clock()
        begun, count = self._seen.get(key, (now, 0))
        if now - begun >= self._period_s:
            if count > self._burst:
                record.left_out = count - self._burst
            begun, count = now, 0
        if key not in self._seen and len(self._seen) >= 1000:
            self._seen.clear()
        self._seen[key] = (begun, count + 1)
        return count < self._burst


class AccessLog:
    """An observer that logs a line for every call."""

    def finished(self, request: Finished) -> None:
        """Logs it (convoynet.server.observing.observer.Observer)."""
        now = time.perf_counter_ns()
        result = request.call.result
        fields: dict[str, Any] = {
            "rpc": request.rpc,
            "code": request.code,
            "request_id": request.id,
            "model": request.model,
            "version": result.version if result else request.version,
            "trace_id": request.trace_id,
            "duration_ms": round((now - request.call.arrived) / 1e6, 3),
        }
        if result:
            fields["rows"] = result.rows
            fields |= {f"{name}_ms": round(ns / 1e6, 3) for name, ns in stages(result.timings, now).items()}
        access.info("%s %s", request.rpc, request.code, extra=fields)
