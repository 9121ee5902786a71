"""Where a server is and how it is reached: one way for both clients and for the load of `convoy bench`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from convoynet.server.client.access import Access, access, is_local
from convoynet.server.client.diagnosis import client_error
from convoynet.server.client.errors import ClientError, Unreachable, invalid

__all__ = ["CHANNEL_OPTIONS", "DEFAULT_URL", "ClientError", "Connection", "Unreachable", "connect", "target"]

DEFAULT_URL = "127.0.0.1:8001"
# A server that keeps gRPC's defaults calls more than one ping in five minutes abuse and hangs up.
_KEEPALIVE_MS = 300_000
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
)
_TLS_SCHEME = "grpcs://"


@dataclass(frozen=True)
class Connection:
    """A server, and how to reach it; no connection is open yet.

    Attributes:
        url: where it is, as gRPC takes it.
        access: what is spoken, and who calls.
    """

    url: str
    access: Access = field(default_factory=Access, repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What goes with every call."""
        return self.access.metadata

    def channel(self, *options: tuple[str, Any]) -> grpc.Channel:
        """A channel for calls that block."""
        if self.access.tls is None:
            return grpc.insecure_channel(self.url, options=self._options(options))
        return grpc.secure_channel(self.url, self.access.tls.credentials, options=self._options(options))

    def aio_channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """A channel of the running loop's."""
        if self.access.tls is None:
            return grpc.aio.insecure_channel(self.url, options=self._options(options))
        return grpc.aio.secure_channel(self.url, self.access.tls.credentials, options=self._options(options))

    def _options(self, more: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
        name = self.access.tls.server_name if self.access.tls is not None else ""
        named = [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)] if name else []
        # What is for this machine goes to no proxy, which would read the token.
        direct = [("grpc.enable_http_proxy", 0)] if is_local(self.url) else []
        return [*CHANNEL_OPTIONS, *named, *direct, *more]

    def error(self, error: grpc.RpcError) -> ClientError:
        """One line from a failed call. It may take a look at the server, for seconds."""
        return client_error(error, self.url, self.access)


def connect(url: str, security: Mapping[str, Any] | None = None) -> Connection:
    """How to reach the server at `url`; `security` as in `access.Security`, and the environment.

    Raises:
        ClientError: the url is no address, or an argument cannot be used.
    """
    address, arguments = target(url), dict(security or {})
    if url.startswith(_TLS_SCHEME):
        if arguments.get("tls") is False:
            raise invalid(f"url '{url}' asks for TLS, which is turned off; drop one of the two")
        arguments["tls"] = True
    return Connection(address, access(address, arguments))


def target(url: str) -> str:
    """`url` as gRPC takes it: a bare host gets the port 8001.

    Raises:
        ClientError: it is a web address or has no host.
    """
    if not isinstance(url, str):
        raise invalid(f"url is {url!r}, give HOST:PORT, e.g. {DEFAULT_URL}")
    if re.match(r"https?://", url):
        raise invalid(f"url '{url}' is a web address, give the gRPC address as HOST:PORT, e.g. {DEFAULT_URL}")
    bare = re.sub("^grpcs?://", "", url).rstrip("/")
    if not bare or bare.startswith(":"):
        raise invalid(f"url '{url}' names no host, give HOST:PORT, e.g. {DEFAULT_URL}")
    return f"{bare}:8001" if re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", bare) else bare
