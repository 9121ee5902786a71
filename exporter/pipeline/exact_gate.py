"""The gate of the float32 graph, which looks at PyTorch itself before it blames the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.evidence import limits, verify
from convoynet.exporter.evidence.engines import Engine
from convoynet.exporter.evidence.unsteady import Earlier, Rounding, measure_rounding, why_unsteady
from convoynet.exporter.pipeline.workbench import Workbench


@contextmanager
def steady(bench: Workbench) -> Iterator[None]:
    """Name the network as the cause of what goes wrong where its own answers differ.

    Raises:
        Refused: they do.
    """
    try:
        yield
    except (Refused, BadInput) as error:
        if reason := _unsteady(bench):
            raise Refused(f"{reason}; nothing was published") from error
        raise


def _unsteady(bench: Workbench) -> str:
    batch = bench.task.config.batch_range(bench.task.arch.task)[1]
    return why_unsteady(bench.eager, bench.pictures.check, Earlier(bench.reference.outputs, batch))


@dataclass
class ExactGate:
    """The gate of the float32 graph, which does not hold against it what PyTorch's own rounding does.

    Attributes:
        module: what was exported.
        reference: its outputs.
        caveats: what to keep in mind of a graph that passed.
        reason: why no graph could pass; empty where that is not so.
    """

    bench: Workbench
    module: torch.nn.Module
    reference: verify.Reference
    caveats: set[str] = field(default_factory=set)
    reason: str = ""

    @cached_property
    def _rounding(self) -> Rounding | None:
        if _unsteady(self.bench):
            return None  # what differs is not the rounding
        return measure_rounding(self.module, self.reference, self.bench.pictures.check, self.bench.task.arch.preprocess)

    def __call__(self, engine: Engine) -> None:
        """Look at what an engine makes of the graph.

        Raises:
            Refused: it is too far from PyTorch, whatever the cause.
        """
        try:
            verify.check_fp32(engine.gated)
        except Refused:
            rounding = self._rounding
            if rounding is None or not rounding.explains(engine.gated):
                raise
            line = rounding.line(engine.gated)
            if rounding.share(engine.gated) > limits.ROUNDING_SPREAD_ERROR:
                self.reason = line
                raise
            self.caveats = {line}
