"""What the clients raise."""

from __future__ import annotations

import grpc

from convoynet.errors import ConvoyError


class ClientError(ConvoyError):
    """A request that failed, in one line; `code` is the gRPC status, also where the client itself refuses."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


class Unreachable(ClientError):
    """No server answered at the url."""


def invalid(message: str) -> ClientError:
    """The error for what the client itself refuses."""
    return ClientError(message, grpc.StatusCode.INVALID_ARGUMENT)
