"""Which gRPC status each error is, in one table, and where Triton's differs."""

from __future__ import annotations

import grpc

from convoynet.server.errors import (
    AnswerTooLarge,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineLost,
    InvalidModel,
    InvalidRegion,
    InvalidRequest,
    LoadFailed,
    LoadNotAllowed,
    MessageTooLarge,
    ModelNotReady,
    NoStatistics,
    NotPermitted,
    OverBudget,
    Oversize,
    QueueFull,
    RegionExists,
    RowsDiffer,
    ServerError,
    Unauthenticated,
    Unimplemented,
    UnknownModel,
    UnknownRegion,
)

CODES: dict[type[ServerError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Oversize: grpc.StatusCode.INVALID_ARGUMENT,
    MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    InvalidRegion: grpc.StatusCode.INVALID_ARGUMENT,
    AnswerTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    NoStatistics: grpc.StatusCode.NOT_FOUND,
    UnknownRegion: grpc.StatusCode.NOT_FOUND,
    RegionExists: grpc.StatusCode.ALREADY_EXISTS,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OverBudget: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotPermitted: grpc.StatusCode.PERMISSION_DENIED,
    EngineFailed: grpc.StatusCode.INTERNAL,
    EngineLost: grpc.StatusCode.UNAVAILABLE,
    RowsDiffer: grpc.StatusCode.INTERNAL,
    LoadFailed: grpc.StatusCode.INTERNAL,
    LoadNotAllowed: grpc.StatusCode.UNAVAILABLE,
    InvalidModel: grpc.StatusCode.INTERNAL,
}
"""A test holds this table to every subclass of ServerError."""

TRITON_CODES: dict[type[ServerError], grpc.StatusCode] = {
    QueueFull: grpc.StatusCode.UNAVAILABLE,
    OverBudget: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.UNAVAILABLE,
    NoStatistics: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidRegion: grpc.StatusCode.INTERNAL,
}
"""What `--triton-compat` puts in their place: Triton's codes, which its users' retry policies know."""


def code_of(error: Exception, *, triton: bool = False) -> grpc.StatusCode:
    """The status of an error, Triton's where that is asked for; one that is no ServerError is a bug: INTERNAL."""
    if not isinstance(error, ServerError):
        return grpc.StatusCode.INTERNAL
    return TRITON_CODES.get(type(error), CODES[type(error)]) if triton else CODES[type(error)]
