"""What sees every call once it is over: the access log and traces. Knows neither of them."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from convoynet.server.status import code_of
from convoynet.server.types import Call

_ID_LENGTH = 128
# W3C Trace Context: version, trace id, span id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


@dataclass
class Finished:
    """One call that is over. What costs something is worked out when an observer asks for it.

    Attributes:
        rpc: Name of the RPC, such as "ModelInfer".
        call: How it came; `call.result` has an answered inference's times and rows.
        message: The request's protobuf message.
        error: Why it failed; None for one that was answered.
        triton: Whether the client was told Triton's status where that differs.
    """

    rpc: str
    call: Call
    message: Any
    error: BaseException | None = None
    triton: bool = False

    @property
    def code(self) -> str:
        """Name of the gRPC status that it ended with."""
        if self.error is None:
            return "OK"
        if isinstance(self.error, asyncio.CancelledError):
            return "DEADLINE_EXCEEDED" if self.call.is_at_its_deadline else "CANCELLED"
        return code_of(self.error, triton=self.triton).name if isinstance(self.error, Exception) else "INTERNAL"

    @cached_property
    def id(self) -> str:
        """The client's id of the request, else its `x-request-id`, else a random one."""
        given = getattr(self.message, "id", "") or self.call.header("x-request-id")
        return str(given)[:_ID_LENGTH] or uuid.uuid4().hex

    @cached_property
    def trace_id(self) -> str:
        """The trace that it belongs to, as 32 hex digits, by its client or by the tracer; "" for none."""
        found = _TRACEPARENT.fullmatch(self.call.header("traceparent"))
        return found[1] if found else ""

    @property
    def model(self) -> str:
        """The model that it names; "" for calls that name none."""
        return self._named("model_name", "name")

    @property
    def version(self) -> str:
        """The model's version that it names; "" for none."""
        return self._named("model_version", "version")

    def _named(self, *names: str) -> str:
        return next((str(getattr(self.message, n))[:_ID_LENGTH] for n in names if hasattr(self.message, n)), "")


class Observer(Protocol):
    """Is told of every call when it is over, on the event loop."""

    def finished(self, request: Finished) -> None:
        """The call is over; must not raise, and not wait."""
