"""Memory for one batch in flight, as the server's process sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from convoynet.server.engines.buffers import SharedBuffer, Slot, Table
from convoynet.server.types import Tensor

_REMEMBERED = 64


class Answer(NamedTuple):
    """One output of a batch, in the shared buffer."""

    slot: Slot
    view: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the inputs of a batch go, and the message that says so."""

    message: bytes
    views: Mapping[str, Tensor]
    size: int


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch that ran.

    Attributes:
        answers: The outputs of each request, in order: arrays of its own rows, which it may keep.
        started, input_ready, infer_done: When its inputs began to be gathered, lay ready, and when the engine was
            done; nanoseconds of time.perf_counter_ns().
    """

    answers: list[dict[str, Tensor]]
    started: int
    input_ready: int
    infer_done: int


class Place:
    """A buffer for the inputs of a batch and one for its outputs, with where those of batches seen before lie in them.

    Attributes:
        index: Which place of its engine it is; the first byte of every message about its batch.
        answer: What waits for the engine's answer to its batch.
        waited, limit, size: For how many seconds it has, how long it may (0 for as long as such batches may), and the
            bytes of the batch's inputs.
    """

    def __init__(self, index: int, datatypes: Mapping[str, str]) -> None:
        """Args: which place it is, and the datatype of each input, by name."""
        self.index = index
        self._datatypes = datatypes
        self.answer: asyncio.Future[bytes] | None = None
        self.waited = self.limit = 0.0
        self.size = 0
        with ExitStack() as undo:
            self._inputs = SharedBuffer.create("convoy inputs")
            undo.callback(self._inputs.close)
            self._outputs = SharedBuffer.create("convoy outputs")
            undo.callback(self._outputs.close)
            # Now, and not in a batch, which would fail where the process has no descriptor left: a mapping takes one.
            self._inputs.reach(1)
            self._outputs.reach(1)
            undo.pop_all()
        self._plans: dict[object, Plan] = {}
        self._tables: dict[bytes, list[Answer]] = {}

    @property
    def descriptors(self) -> tuple[int, int]:
        """The files of inputs and outputs, for the engine process."""
        return self._inputs.descriptor, self._outputs.descriptor

    def plan(self, wanted: tuple[str, ...], tensors: Sequence[tuple[str, tuple[int, ...], int]]) -> Plan:
        """Where a batch goes.

        Args:
            wanted: The outputs to be answered; empty for all.
            tensors: Name, dims and number of bytes of each input.

        Raises:
            OSError: The system has no room for it.
        """
        key = (wanted, *tensors)
        found = self._plans.get(key)
        if found is None:
            table = Table.of((name, self._datatypes[name], dims, nbytes) for name, dims, nbytes in tensors)
            if self._inputs.reach(table.size) or len(self._plans) >= _REMEMBERED:
                self._plans.clear()
            message = bytes([self.index]) + json.dumps({"inputs": table.to_json(), "outputs": wanted}).encode()
            found = Plan(message, {slot.name: self._inputs.array(slot) for slot in table.slots}, table.size)
            self._plans[key] = found
        return found

    def read(self, text: bytes) -> list[Answer]:
        """The outputs that the engine's answer tells of."""
        found = self._tables.get(text)
        if found is None:
            table = Table.from_json(text)
            if self._outputs.reach(table.size) or len(self._tables) >= _REMEMBERED:
                self._tables.clear()
            found = self._tables[text] = [Answer(slot, self._outputs.array(slot)) for slot in table.slots]
        return found

    def settle(self, message: bytes) -> None:
        """Hands the answer to whoever waits for it; empty where the process died."""
        answer, self.answer = self.answer, None
        if answer is not None and not answer.done():  # a load that is given up is cancelled
            answer.set_result(message)

    def close(self) -> None:
        """Gives the memory back."""
        self._plans, self._tables = {}, {}
        self._inputs.close()
        self._outputs.close()
