"""What the core and the front ends ask of one version of a model, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from convoynet.server.observing.statistics import Statistics
from convoynet.server.spec import ModelSpec
from convoynet.server.types import InferRequest, InferResult, Timings

State = Literal["loading", "ready", "failed", "draining"]


class Servable(Protocol):
    """One version of a model while it is served. Lives on the event loop."""

    @property
    def spec(self) -> ModelSpec:
        """What it is."""

    @property
    def state(self) -> State:
        """Where it stands."""

    @property
    def reason(self) -> str:
        """Why it is not ready, for people; "" otherwise."""

    @property
    def statistics(self) -> Statistics:
        """Its totals."""

    @property
    def labels(self) -> tuple[str, str]:
        """Name and version of its series; empty once they are gone."""

    def count(self, timings: Timings, rows: int, error: BaseException | None, *, late: bool) -> None:
        """Counts one request, once it is over (convoynet.server.types.Counting). infer() counts nothing."""

    @property
    def info(self) -> Mapping[str, str]:
        """What runs it and how that was chosen, by name, for people."""

    @property
    def runs(self) -> int:
        """Runs of models that one request comes to: 1, but for an ensemble."""

    @property
    def depth(self) -> int:
        """Ensembles within each other that it is: 0 for a model."""

    @property
    def queued(self) -> int:
        """Requests admitted and not yet running."""

    @property
    def inflight(self) -> int:
        """Requests being worked on, queued ones included."""

    async def load(self) -> None:
        """Loads and warms up; ends in state ready or failed."""

    def abandon(self) -> None:
        """Lets load() end soon, in state failed, where it may take long otherwise; does nothing at any other time."""

    async def drain(self) -> None:
        """Admits nothing more, answers everything that was admitted, then frees what it holds."""

    async def infer(self, request: InferRequest) -> InferResult:
        """Answers one request. It is admitted, or refused, before this waits for anything."""
