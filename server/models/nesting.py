"""Ensembles of ensembles: which models one needs, and how far that may go, since each level may double it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

from convoynet.server.errors import InvalidModel

MOST_DEPTH = 8
"""Ensembles within each other."""
MOST_RUNS = 1024
"""Runs of models that one request may come to."""

StepsOf = Callable[[str], Awaitable[Collection[str]]]


async def needed(top: str, steps: Collection[str], steps_of: StepsOf) -> list[list[str]]:
    """The models that an ensemble needs, each once, in an order in which each comes after those that it needs itself.

    Args:
        top: The ensemble.
        steps: The models of its steps.
        steps_of: The models of the steps of any other.

    Returns:
        Models that do not need each other, list by list.

    Raises:
        InvalidModel: A step leads back to an ensemble that it is a step of, or they are nested too deep.
    """
    heights: dict[str, int] = {}

    async def visit(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            whose = "its steps lead back to it" if name == top else "a step leads back to itself"
            raise InvalidModel(f"{whose}: {' -> '.join((*path[path.index(name) :], name))}")
        if name not in heights and len(path) <= MOST_DEPTH:
            further = steps if name == top else await steps_of(name)
            heights[name] = max([1 + await visit(step, (*path, name)) for step in sorted(further)], default=0)
        height = heights.get(name, 1)
        if len(path) + height > MOST_DEPTH:
            raise too_deep()
        return height

    await visit(top, ())
    del heights[top]
    return [[n for n, h in heights.items() if h == height] for height in sorted(set(heights.values()))]


def too_deep() -> InvalidModel:
    """Ensembles within ensembles within ensembles."""
    return InvalidModel(f"ensembles are nested more than {MOST_DEPTH} deep: state its steps directly")


def too_many(runs: int) -> InvalidModel:
    """One request would be worth many."""
    return InvalidModel(f"one request would come to {runs} runs of models, {MOST_RUNS} are allowed: nest less")
