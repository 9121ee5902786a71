"""Which paths there are: templates, as the tables of routes state them, to patterns and to their plain forms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from convoynet.server.http.handlers import Endpoint

Methods = Mapping[str, Endpoint]
Routes = Mapping[str, Methods]
"""What answers each path, by method. `{name}` is one segment of it, and what stands in brackets may be missing."""

_NAMED = {"repository": r"(?!models/|index)[^/]+"}
"""Segments that are not just anything."""
_PART = re.compile(r"\{(\w+)\}|(\[)|(\])|([^][{}]+)")
_OPTIONAL = re.compile(r"\[([^]]*)\]")


@dataclass(frozen=True, slots=True)
class Path:
    """One template, ready to be compared with paths.

    Attributes:
        template: As its table states it.
        pattern: What all of a path has to be, still percent-encoded; its groups are the names.
        methods: What answers it.
    """

    template: str
    pattern: re.Pattern[str]
    methods: Methods


def table(*routes: Routes) -> Sequence[Path]:
    """The paths of some tables, in order: the first that fits a path answers it."""
    return tuple(Path(template, _pattern(template), methods) for each in routes for template, methods in each.items())


def plain(template: str) -> Iterator[str]:
    """The template without brackets: each form that it has, the shortest first; a bare slash at the end is none."""
    parts = _OPTIONAL.split(template)  # every second one may be missing
    for chosen in product(*(("", part) if place % 2 else (part,) for place, part in enumerate(parts))):
        path = "".join(chosen)
        if path == "/" or not path.endswith("/"):
            yield path


def names(template: str) -> list[str]:
    """The names in it, in order."""
    return re.findall(r"\{(\w+)\}", template)


def _pattern(template: str) -> re.Pattern[str]:
    def translated(part: re.Match[str]) -> str:
        name, begin, end, text = part.groups()
        if name:
            return f"(?P<{name}>{_NAMED.get(name, '[^/]+')})"
        return "(?:" if begin else ")?" if end else re.escape(text)

    return re.compile(_PART.sub(translated, template))
