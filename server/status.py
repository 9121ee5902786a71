"""Which gRPC status each error is, in one table."""

from __future__ import annotations

import grpc

from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineLost,
    InvalidModel,
    InvalidRequest,
    LoadFailed,
    LoadNotAllowed,
    ModelNotReady,
    NotPermitted,
    Oversize,
    QueueFull,
    ServerError,
    Unauthenticated,
    Unimplemented,
    UnknownModel,
)

CODES: dict[type[ServerError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Oversize: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotPermitted: grpc.StatusCode.PERMISSION_DENIED,
    EngineFailed: grpc.StatusCode.INTERNAL,
    EngineLost: grpc.StatusCode.UNAVAILABLE,
    LoadFailed: grpc.StatusCode.INTERNAL,
    LoadNotAllowed: grpc.StatusCode.UNAVAILABLE,
    InvalidModel: grpc.StatusCode.INTERNAL,
}
"""A test holds this table to every subclass of ServerError."""


def code_of(error: Exception) -> grpc.StatusCode:
    """The status of an error; one that is no ServerError is a bug: INTERNAL."""
    return CODES[type(error)] if isinstance(error, ServerError) else grpc.StatusCode.INTERNAL
