"""Where a server is, and what a failed call says."""

from __future__ import annotations

import re

import grpc

DEFAULT_URL = "127.0.0.1:8001"
# A server that keeps gRPC's defaults calls more than one ping in five minutes abuse and hangs up.
_KEEPALIVE_MS = 300_000
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
)

# How gRPC words that it got no connection; a server's own UNAVAILABLE (loading, draining) reads otherwise.
_NO_CONNECTION = re.compile("failed to connect|errors resolving|DNS resolution failed")
_CAUSE = re.compile("connection refused|no route to host|network is unreachable|domain name not found", re.I)


class ClientError(Exception):
    """A request that failed, in one line; `code` is the gRPC status, also where the client itself refuses."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


class Unreachable(ClientError):
    """No server answered at the url."""


def target(url: str) -> str:
    """`url` as gRPC takes it: a bare host gets the port 8001.

    Raises:
        ClientError: it is a web address or has no host.
    """
    if not isinstance(url, str):
        raise ClientError(f"url is {url!r}, give HOST:PORT, e.g. {DEFAULT_URL}", grpc.StatusCode.INVALID_ARGUMENT)
    if re.match(r"https?://", url):
        raise ClientError(
            f"url '{url}' is a web address, give the gRPC address as HOST:PORT, e.g. {DEFAULT_URL}",
            grpc.StatusCode.INVALID_ARGUMENT,
        )
    bare = url.removeprefix("grpc://").rstrip("/")
    if not bare or bare.startswith(":"):
        raise ClientError(
            f"url '{url}' names no host, give HOST:PORT, e.g. {DEFAULT_URL}", grpc.StatusCode.INVALID_ARGUMENT
        )
    return f"{bare}:8001" if re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", bare) else bare


def client_error(error: grpc.RpcError, url: str) -> ClientError:
    """One line from a failed call; `Unreachable` where it is the connection that failed, not the server."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.match(details):
        known = _CAUSE.search(details)
        return Unreachable(f"no server at {url} ({known[0].lower() if known else details})", code)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details in ("", "Deadline Exceeded"):
        details = f"no answer from {url} within the timeout"
    return ClientError(details or f"{code.name} from {url}", code)
