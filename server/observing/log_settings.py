"""What the server logs, as the LogSettings RPC shows and changes it: a filter on the handlers of Python's logging."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from convoynet.server.errors import InvalidRequest, Unimplemented
from convoynet.server.observing.logs import JsonFormatter, TextFormatter

Value = bool | int | str
_FORMATS = ("default", "ISO8601")
_TYPES: dict[str, tuple[type[Value], str]] = {
    "log_info": (bool, "boolean"),
    "log_warning": (bool, "boolean"),
    "log_error": (bool, "boolean"),
    "log_verbose_level": (int, "int32"),
    "log_format": (str, "string"),
}


class LogSettings(logging.Filter):
    """The settings of one server: a filter that sits on the logger's handlers from the first change to close()."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        super().__init__()
        self._logger = logger or logging.getLogger()
        self.reset()

    def reset(self) -> None:
        """Takes the log as it stands now: it was set up, or set up anew."""
        self._level = self._logger.level
        self._formatters: dict[logging.Handler, logging.Formatter | None] = {}
        level = self._logger.getEffectiveLevel()
        self._values: dict[str, Value] = {
            "log_file": "",
            "log_info": level <= logging.INFO,
            "log_warning": level <= logging.WARNING,
            "log_error": level <= logging.ERROR,
            "log_verbose_level": int(level <= logging.DEBUG),
            "log_format": "default",
        }

    def values(self) -> dict[str, Value]:
        """Every setting under the protocol's name; `log_file` is always empty: the log is the process's own."""
        return dict(self._values)

    def update(self, values: Mapping[str, Value]) -> None:
        """Changes settings, none of them where one is wrong.

        Raises:
            InvalidRequest: There is no such setting, or it cannot have that value.
            Unimplemented: It cannot be changed from afar.
        """
        for name, value in values.items():
            _check(name, value)
        self._values |= values
        self._apply()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written (the hook of logging.Filter)."""
        if record.levelno >= logging.ERROR:
            return bool(self._values["log_error"])
        if record.levelno >= logging.WARNING:
            return bool(self._values["log_warning"])
        if record.levelno >= logging.INFO:
            return bool(self._values["log_info"])
        return bool(self._values["log_verbose_level"])

    def close(self) -> None:
        """Leaves logging as it was."""
        for handler, formatter in self._formatters.items():
            handler.removeFilter(self)
            handler.setFormatter(formatter)
        self._formatters.clear()
        self._logger.setLevel(self._level)

    def _apply(self) -> None:
        """Puts the settings into effect. The first change is what installs the filter."""
        for handler in self._logger.handlers:
            if handler not in self._formatters:
                self._formatters[handler] = handler.formatter
                handler.addFilter(self)
            own = self._formatters[handler]
            # JSON lines have such times already.
            iso = self._values["log_format"] == "ISO8601" and not isinstance(own, JsonFormatter)
            handler.setFormatter(_Utc() if iso else own)
        self._logger.setLevel(logging.DEBUG if self._values["log_verbose_level"] else logging.INFO)


class _Utc(TextFormatter):
    """Times as ISO 8601 has them, in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


def _check(name: str, value: Any) -> None:
    if name == "log_file":
        raise Unimplemented("log file location can not be updated through network protocol")
    if name not in _TYPES:
        raise InvalidRequest(f"unknown log setting '{name}'; there are {', '.join(_TYPES)}")
    kind, words = _TYPES[name]
    if type(value) is not kind:
        raise InvalidRequest(f"expect {words} for '{name}'")
    if name == "log_format" and value not in _FORMATS:
        raise InvalidRequest(f"invalid argument for log_format, got: {value}")
