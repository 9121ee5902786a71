"""Which gRPC status each error is, in one table."""

from __future__ import annotations

import grpc

from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidModel,
    InvalidRequest,
    LoadFailed,
    LoadNotAllowed,
    ModelNotReady,
    Oversize,
    QueueFull,
    ServerError,
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
    EngineFailed: grpc.StatusCode.INTERNAL,
    LoadFailed: grpc.StatusCode.INTERNAL,
    LoadNotAllowed: grpc.StatusCode.UNAVAILABLE,
    InvalidModel: grpc.StatusCode.INTERNAL,
}
"""A test holds this table to every subclass of ServerError."""
