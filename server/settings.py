"""Where settings come from: flags, environment, config file, defaults, in this order of precedence.

Everything here is derived from the fields of ServeConfig (server/config.py), so that a new setting is one line there.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from convoynet.server.config import ServeConfig

_HINTS: Mapping[str, Any] = get_type_hints(ServeConfig)
# Annotation -> metavar, name in messages.
_KINDS: Mapping[Any, tuple[str, str]] = {
    Path: ("PATH", "text"),
    str: ("TEXT", "text"),
    int: ("N", "an integer"),
    float: ("X", "a number"),
    bool: ("", "true or false"),
    tuple[str, ...]: ("TEXT", "a list of texts"),
}
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
ENVIRONMENT_PREFIX = "CONVOY_"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting. Those that are not given leave no trace in the parsed arguments."""
    for each in fields(ServeConfig):
        kind, choices = _kind(each), each.metadata["choices"] or None
        flag, text = f"--{each.name.replace('_', '-')}", f"{each.metadata['help']} (default: {_default_text(each)})"
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text.replace("%", "%%")
            )
            continue
        parser.add_argument(
            flag,
            type=str if kind == tuple[str, ...] else kind,
            action="extend" if kind == tuple[str, ...] else "store",
            nargs="+" if kind == tuple[str, ...] else None,
            choices=choices,
            metavar=None if choices else _KINDS[kind][0],
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )


def effective(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> ServeConfig:
    """What a server is told by all of them together.

    Args:
        flags: Parsed settings by field name, those alone that were given.
        environment: Variables; CONVOY_MAX_QUEUE is `max_queue`. Others are left alone.
        file: A TOML file, or None.

    Raises:
        ValueError: A value is unknown, of the wrong type or out of range, or the file cannot be read: one line.
    """
    values = _from_file(file) if file else {}
    values |= _from_environment(environment)
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    if values.get("onnx"):  # these need no repository beside them
        values.setdefault("model_repository", ())
    return ServeConfig(**values)


def _from_file(file: Path) -> dict[str, Any]:
    try:
        stated = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the config file '{file}' cannot be read: {reason}") from error
    return _named(stated, f"'{file}'")


def of_options(options: Mapping[str, Any]) -> ServeConfig:
    """The settings that a program gives by name, whatever the environment says.

    Raises:
        ValueError: A name or value is none, as for effective().
    """
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return effective(_named(plain, "the options"), {}, None)


def _named(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {each.name: each for each in fields(ServeConfig)}
    values: dict[str, Any] = {}
    for key, value in stated.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else "`convoy serve --print-config` shows those that there are"
            raise ValueError(f"'{key}' in {where} is not a setting; {hint}")
        if name in values:
            raise ValueError(f"{where} has '{name}' twice, with an underscore and with a dash")
        values[name] = _typed(known[name], value, f"'{key}' in {where}")
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for each in fields(ServeConfig):
        text = environment.get(_variable(each))
        if text is not None:
            values[each.name] = _typed(each, _parsed(_kind(each), text), f"the environment variable {_variable(each)}")
    return values


def _parsed(kind: Any, text: str) -> Any:
    """A variable's text as TOML would hold it; text that is no such value is left for the check of types."""
    if kind is bool:
        return _TRUTH.get(text.lower(), text)
    if kind == tuple[str, ...]:
        return text.split()
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _typed(each: Field[Any], value: Any, where: str) -> Any:
    """The value as the field's type, with `where` for the message.

    Raises:
        ValueError: It is of another type.
    """
    kind = _kind(each)
    if kind == tuple[str, ...] and isinstance(value, str):
        return (value,)
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    # Not isinstance: true is no 1 here.
    if type(value) is not kind:
        raise ValueError(f"{where} must be {_KINDS[kind][1]}, got {value!r}")
    return value


def as_toml(config: ServeConfig) -> str:
    """The settings as a file that --config takes."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in _stated(config))


def _stated(config: ServeConfig) -> Iterator[tuple[str, Any]]:
    """Every setting that is not None, which TOML cannot say."""
    return ((f.name, getattr(config, f.name)) for f in fields(config) if getattr(config, f.name) is not None)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON's texts, numbers and truth are TOML's, but for the control character that JSON need not escape.
    text = str(value) if isinstance(value, Path) else value
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def changes(old: ServeConfig, new: ServeConfig) -> tuple[dict[str, Any], list[str]]:
    """What a running server takes over of `new`, by name, and the names of what needs a restart."""
    changed = [each for each in fields(old) if getattr(old, each.name) != getattr(new, each.name)]
    live = {each.name: getattr(new, each.name) for each in changed if each.metadata["live"]}
    return live, [each.name for each in changed if not each.metadata["live"]]


def reference() -> str:
    """The table of docs/operations.md."""
    rows = ["| key | type | default | live | what |", "|---|---|---|---|---|"]
    for each in fields(ServeConfig):
        metadata, default = each.metadata, _default_text(each)
        kind = " or ".join(f"`{c}`" for c in metadata["choices"]) or _KINDS[_kind(each)][1]
        if metadata["bounds"]:
            kind += " in {} to {}".format(*metadata["bounds"])
        rows.append(
            f"| `{each.name}` | {kind} | {default} | {'yes' if metadata['live'] else ''} | {metadata['help']} |"
        )
    return "\n".join(rows) + "\n"


def _kind(each: Field[Any]) -> Any:
    """The annotation, without the None that an optional one has beside it."""
    hint = _HINTS[each.name]
    members = [m for m in getattr(hint, "__args__", ()) if m is not type(None)]
    return members[0] if type(None) in getattr(hint, "__args__", ()) else hint


def _default(each: Field[Any]) -> Any:
    return "of the machine" if each.default_factory is not MISSING else each.default


def _default_text(each: Field[Any]) -> str:
    default = _default(each)
    if default and isinstance(default, tuple):
        return " ".join(default)
    return "none" if default in (None, "", ()) else str(default).lower() if isinstance(default, bool) else str(default)


def _variable(each: Field[Any]) -> str:
    return f"{ENVIRONMENT_PREFIX}{each.name.upper()}"
