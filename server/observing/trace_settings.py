"""Which requests are traced, as the TraceSetting RPC shows and changes it: for the server, and for single models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from convoynet.server.errors import InvalidRequest, Unimplemented

LEVELS = ("OFF", "TIMESTAMPS")
_LIMITS = {"trace_rate": (0, 2**32 - 1), "trace_count": (-1, 2**31 - 1), "log_frequency": (0, 2**32 - 1)}


@dataclass(frozen=True)
class TraceOptions:
    """Of one model.

    Attributes:
        trace_level: "OFF", or "TIMESTAMPS" for a span of every stage.
        trace_rate: One request in so many is traced; 0 is none.
        trace_count: So many more are traced, -1 for no limit.
        log_frequency: Kept for clients that set it; spans are sent as they end.
    """

    trace_level: str = "OFF"
    trace_rate: int = 1000
    trace_count: int = -1
    log_frequency: int = 0

    def as_text(self) -> dict[str, str]:
        """Every setting under the protocol's name; `trace_file` is always empty, for there is no such file."""
        return {
            "trace_level": self.trace_level,
            "trace_rate": str(self.trace_rate),
            "trace_count": str(self.trace_count),
            "log_frequency": str(self.log_frequency),
            "trace_mode": "opentelemetry",
            "trace_file": "",
        }


@dataclass
class TraceSettings:
    """The settings of one server; lives on its event loop.

    Attributes:
        initial: What the server was started with, and what cleared settings go back to.
    """

    initial: TraceOptions = field(default_factory=TraceOptions)
    _server: TraceOptions = field(init=False)
    _own: dict[str, dict[str, int | str]] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._server = self.initial

    def reset(self, initial: TraceOptions) -> None:
        """Starts over with other settings of the server's; models keep their own."""
        self.initial = self._server = initial

    def options(self, model: str = "") -> TraceOptions:
        """What counts for a model, "" for those without settings of their own."""
        return replace(self._server, **self._own.get(model, {}))  # type: ignore[arg-type]

    def update(self, values: Mapping[str, Sequence[str]], model: str = "") -> None:
        """Changes settings of the server or of one model; none of them where one is wrong.

        Args:
            values: Texts by the protocol's name; an empty list clears the setting.
            model: Whose, "" for the server's.

        Raises:
            InvalidRequest: There is no such setting, or it cannot have that value.
            Unimplemented: It cannot be changed from afar.
        """
        parsed = {name: _parsed(name, given) for name, given in values.items()}
        changed = {name: value for name, value in parsed.items() if value is not None}
        cleared = parsed.keys() - changed.keys()
        if model:
            own = {name: value for name, value in self._own.get(model, {}).items() if name not in cleared}
            self._own[model] = {**own, **changed}
        else:
            original = {name: getattr(self.initial, name) for name in cleared}
            self._server = replace(self._server, **original, **changed)  # type: ignore[arg-type]

    def wants(self, model: str, sampled: bool | None = None) -> bool:
        """Whether the request that is being begun is to be traced; counts it.

        Args:
            model: Whose request it is.
            sampled: What its client decided, None where that is left to the server.
        """
        options = self.options(model)
        if options.trace_level == "OFF" or not options.trace_count:
            return False
        if sampled is None:
            # Models without settings of their own are counted together: requests name models that there are not.
            key = model if model in self._own else ""
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            sampled = bool(options.trace_rate) and seen % options.trace_rate == 0
        if sampled and options.trace_count > 0:
            left = options.trace_count - 1
            if "trace_count" in self._own.get(model, {}):
                self._own[model]["trace_count"] = left
            else:
                self._server = replace(self._server, trace_count=left)
        return sampled


def _parsed(name: str, given: Sequence[str]) -> int | str | None:
    """A setting's value; None where it is cleared."""
    if name == "trace_file":
        raise Unimplemented("trace file location can not be updated through network protocol")
    if name == "trace_mode":
        raise Unimplemented("trace mode can not be updated through network protocol")
    if name == "trace_level":
        if len(given) > 1 and "OFF" in given:
            raise InvalidRequest("Expect only one trace level 'OFF' is specified")
        unknown = [level for level in given if level not in LEVELS]
        if unknown:
            raise InvalidRequest(f"trace_level '{unknown[0]}' is not one of {', '.join(LEVELS)}")
        return given[-1] if given else None
    if name not in _LIMITS:
        raise InvalidRequest(f"unknown trace setting '{name}'; there are trace_level, {', '.join(_LIMITS)}")
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(f"expect only 1 value for '{name}'")
    return _number(name, given[0])


def _number(name: str, text: str) -> int:
    low, high = _LIMITS[name]
    if not (text.isascii() and text.removeprefix("-").isdecimal()) or len(text) > 20:
        raise InvalidRequest(f"Unable to parse '{name}', got: {text[:64]}")
    value = int(text)
    if name == "trace_count" and value < low:
        raise InvalidRequest(f"Unable to parse 'trace_count'. Expecting value >= -1, got: {value}")
    if not low <= value <= high:
        raise InvalidRequest(f"Unable to parse '{name}', value is out of range [ {low}, {high} ], got: {value}")
    return value
