"""What can go wrong while serving, without a word of transport; server/status.py maps each to a gRPC status.

ServerError
├── InvalidRequest       the request does not fit the model
│   ├── Oversize         ... since it is larger than the server takes
│   │   └── MessageTooLarge  ... as one message of gRPC
│   └── InvalidRegion    ... since a shared-memory region is not what it says
├── UnknownModel         no such model or version
├── NoStatistics         the same, where statistics were asked for
├── UnknownRegion        no such shared-memory region
├── RegionExists         a region of that name is registered already
├── ModelNotReady        it is loading, or it failed to load
├── QueueFull            refused at once: as many requests wait as may
├── OverBudget           refused at once: the server holds as many bytes as it may
├── DeadlineExceeded     the request's time ran out before its answer
├── Draining             the server is stopping
├── Unimplemented        there is no such RPC here
├── Unauthenticated      nobody knows who calls
├── NotPermitted         the caller, or the listener, may not do this
├── EngineFailed         the engine raised while it ran the batch
│   ├── EngineLost       ... or its process died
│   └── RowsDiffer       ... or its answer does not have the rows of the batch
├── LoadFailed           a model, or a version of it, could not be loaded; what was served before still is
├── LoadNotAllowed       clients do not load and unload this server's models
└── InvalidModel         a model folder that cannot be served; never the fault of a request

Messages carry no path of the server's, and those that Triton has too carry Triton's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convoynet.errors import ConvoyError

_SOON_S = 0.1
LOADING_S = 1.0
"""When to ask again for a model that is loading."""


def printable(text: str) -> str:
    """The text with everything escaped that is no character to be read: line ends, controls, bytes that are not UTF-8.

    Names of files may hold any of these, and neither protobuf nor a log takes them as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class ServerError(ConvoyError):
    """The root: the message is for the client."""

    rejected: str | None = None
    """The `reason` label of convoy_rejected_total where this error is a refusal, else None."""
    retry_s: float | None = None
    """After how many seconds the same call is worth another try, here; None where nobody knows that it ever is."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of: the message as it stands, which no constructor is to word once more."""
        return _blank, (type(self), self.args), vars(self)


def _blank(kind: type[ServerError], arguments: tuple[Any, ...]) -> ServerError:
    """An error that no constructor has seen."""
    made = kind.__new__(kind, *arguments)
    made.args = arguments
    return made


class InvalidRequest(ServerError):
    """The request does not fit the model."""


class Oversize(InvalidRequest):
    """The request is larger than the server takes."""

    rejected = "oversize"


class MessageTooLarge(Oversize):
    """The request is larger than a message of gRPC may be, which gRPC has a status of its own for."""


class AnswerTooLarge(ServerError):
    """The answer is larger than a message may be."""

    def __init__(self, size: int, most: int) -> None:
        super().__init__(
            f"the answer has {size} bytes, {most} are allowed (--max-message-bytes); ask for fewer rows or outputs"
        )


class UnknownModel(ServerError):
    """There is no such model or version."""

    def __init__(self, name: str, version: str = "") -> None:
        wanted = f"'{name}' version {version}" if version else f"'{name}'"
        super().__init__(f"Request for unknown model: {wanted} is not found")


class InvalidRegion(InvalidRequest):
    """A shared-memory region is not what it says, or too small for what is to be put in it."""


class NoStatistics(ServerError):
    """Statistics were asked of a model or version that there is not; Triton has a text and a code for this alone."""

    def __init__(self, name: str, version: str = "") -> None:
        what = f"version is not available for model '{name}'" if version else f"'{name}' is not available"
        super().__init__(f"requested model {what}")


class UnknownRegion(ServerError):
    """No shared-memory region is registered by that name."""


class RegionExists(ServerError):
    """A shared-memory region of that name is registered already."""

    def __init__(self, name: str) -> None:
        super().__init__(f"shared memory region '{name}' already in manager")


class ModelNotReady(ServerError):
    """The model is still loading, for which there is `retry_s`, or failed to load."""

    def __init__(self, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class QueueFull(ServerError):
    """As many requests wait for the model as may; `drain_s` is how many seconds they should take, 0 if unknown."""

    rejected = "queue_full"

    def __init__(self, drain_s: float = 0.0) -> None:
        super().__init__("Exceeds maximum queue size")
        self.drain_s = drain_s
        self.retry_s = drain_s or _SOON_S


class OverBudget(ServerError):
    """The server holds as many bytes for its callers as it may; later there is room again.

    Args:
        size: Bytes that were to be held; 0 where that is not known.
        held: Bytes that are held.
        limit: The most that may be.
    """

    rejected = "memory"

    def __init__(self, size: int, held: int, limit: int) -> None:
        what = f"{size} bytes more" if size else "another request"
        super().__init__(
            f"the server has no room for {what}: it holds {held} of the {limit} bytes that it may "
            "(--max-inflight-bytes); " + ("try again later" if size <= limit else "send less at once")
        )
        self.retry_s = _SOON_S if size <= limit else None


class DeadlineExceeded(ServerError):
    """The request's time ran out before its answer."""

    rejected = "deadline"

    def __init__(self, why: str = "Request timeout expired") -> None:
        super().__init__(why)


class Draining(ServerError):
    """The server is stopping."""

    rejected = "draining"

    def __init__(self) -> None:
        super().__init__("Server is stopping, scheduler for model has stopped accepting new inference requests")


class Unimplemented(ServerError):
    """The protocol has the RPC, this server does not."""


class Unauthenticated(ServerError):
    """The call carries no token or certificate that the server knows."""

    rejected = "auth"


class NotPermitted(ServerError):
    """The caller's roles do not allow the call, or the listener does not take it."""

    rejected = "auth"


class EngineFailed(ServerError):
    """The engine raised while it ran the batch; the log has the details."""


class EngineLost(EngineFailed):
    """The engine's process died while it ran the batch; a new one may answer."""

    retry_s = LOADING_S

    def __init__(self, model: str) -> None:
        super().__init__(f"engine of model '{model}' was lost while it ran the batch; try again")


class RowsDiffer(EngineFailed):
    """The answer has other rows than the batch, so that nobody knows whose they are."""


class LoadFailed(ServerError):
    """A model, or a version of it, could not be loaded; what was served before still is."""

    @classmethod
    def of(cls, name: str, reasons: Mapping[str, str]) -> LoadFailed:
        """The error for versions of a model, each with its reason."""
        versions = "".join(f"version {v} is at UNAVAILABLE state: {why};\n" for v, why in reasons.items())
        return cls(f"load failed for model '{name}': {versions}")


class LoadNotAllowed(ServerError):
    """Clients do not load and unload the models of this server (`--model-control-mode`)."""


class InvalidModel(ServerError):
    """A model folder that cannot be served: the message names the reason and the way out, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(line.strip() for line in message.splitlines())))
