"""What a failed call says: the real cause, and the way out.

gRPC's own words tell most causes. Where it says no more than that the other side hung up, a second connection, of this
module's own, is opened to see what the server wants.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable

import grpc

from convoynet.server.client.access import Access, Tls
from convoynet.server.client.errors import ClientError, Unreachable

# How gRPC words that it got no connection; a server's own UNAVAILABLE (loading, draining) reads otherwise.
_NO_CONNECTION = re.compile("failed to connect|errors resolving|DNS resolution failed")
_BROKEN = re.compile(r"Socket closed|recvmsg|sendmsg|Connection reset|Broken pipe|GOAWAY|Stream removed|End of TCP")
_CAUSE = re.compile("connection refused|no route to host|network is unreachable|domain name not found", re.I)
_LOOK_SECONDS = 2.0
"""What a look at the server may take, for each step of it."""

_CA = "--ca FILE, CONVOY_CA, or ca=FILE in Python"
_CERT = "--cert FILE --key FILE, CONVOY_CERT and CONVOY_KEY, or cert=FILE, key=FILE in Python"
_TOKEN = "CONVOY_TOKEN, --token-file FILE, or token_file=FILE in Python"  # noqa: S105  where it comes from


def client_error(error: grpc.RpcError, url: str, access: Access) -> ClientError:
    """One line from a failed call; `Unreachable` where there is no server, or it went away."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.match(details):
        return _no_connection(details, url, access)
    if code is grpc.StatusCode.UNAVAILABLE and _BROKEN.match(details):
        return Unreachable(f"the connection to {url} broke ({details})", code)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details in ("", "Deadline Exceeded"):
        details = f"no answer from {url} within the timeout"
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        lacks = "another one" if access.token else "one"
        details = f"{details or 'the server knows no such caller'} (this client: give {lacks} in {_TOKEN})"
    elif code is grpc.StatusCode.PERMISSION_DENIED and "needs the role" in details:
        details += f"; give a token that has it in {_TOKEN}"
    return ClientError(details or f"{code.name} from {url}", code)


def _no_connection(details: str, url: str, access: Access) -> ClientError:
    if known := _CAUSE.search(details):
        return Unreachable(f"no server at {url} ({known[0].lower()})", grpc.StatusCode.UNAVAILABLE)
    for words, explain in _WORDS.items():
        if words in details:
            return ClientError(explain(url, access.tls, details), grpc.StatusCode.UNAVAILABLE)
    if wanted := _looked(url, access):
        return ClientError(wanted, grpc.StatusCode.UNAVAILABLE)
    last = details.rpartition("last error: ")[2]
    return Unreachable(f"no gRPC server at {url} ({last})", grpc.StatusCode.UNAVAILABLE)


def _not_trusted(url: str, tls: Tls | None, details: str) -> str:
    reason = details.rpartition("CERTIFICATE_VERIFY_FAILED: ")[2].removesuffix(": OK")
    if "expired" in reason or "not yet valid" in reason:
        return f"the certificate of {url} is not valid now ({reason}): renew it there, or set this machine's clock"
    if tls is not None and tls.ca_file:
        return f"the certificate of {url} is not signed by '{tls.ca_file}' ({reason}): give its authority in {_CA}"
    return f"the certificate of {url} is not trusted ({reason}): give the authority that signed it in {_CA}"


def _other_name(url: str, tls: Tls | None, details: str) -> str:
    name = tls.server_name if tls is not None and tls.server_name else url.rpartition(":")[0]
    return (
        f"the certificate of {url} is not for '{name}': use a name that stands in it, in the url or with "
        "--server-name NAME (server_name=NAME in Python)"
    )


def _plain(url: str, tls: Tls | None, details: str) -> str:
    return f"the server at {url} does not speak TLS: leave it out by --no-tls (tls=False in Python)"


def _http(url: str, tls: Tls | None, details: str) -> str:
    return f"{url} is a port for HTTP, not for gRPC: give the gRPC port, which is 8001 by default"


_WORDS: dict[str, Callable[[str, Tls | None, str], str]] = {
    "WRONG_VERSION_NUMBER": _plain,
    "CERTIFICATE_VERIFY_FAILED": _not_trusted,
    "Hostname Verification Check failed": _other_name,
    "http1.x server": _http,
    "missing selected ALPN": _http,
}
"""What gRPC says of a connection that did not come about -> what it means."""


def _looked(url: str, access: Access) -> str:
    """What the server wants that hung up; "" where that does not show."""
    place = re.fullmatch(r"\[?([^\[\]]+)\]?:(\d+)", url)
    if place is None or "/" in url:
        return ""
    try:
        with socket.create_connection((place[1], int(place[2])), _LOOK_SECONDS) as plain:
            return _spoken_to(plain, url, access.tls)
    except (OSError, ValueError):
        return ""


def _spoken_to(plain: socket.socket, url: str, tls: Tls | None) -> str:
    """What a server wants, by what it does when it is spoken to in TLS."""
    try:
        with (tls or Tls()).context().wrap_socket(plain, server_hostname=url.rpartition(":")[0].strip("[]")) as secure:
            if tls is None:
                return f"the server at {url} speaks TLS: say so by --tls, or give its authority in {_CA}"
            # In TLS 1.3 a server says after the handshake what it makes of the client's certificate; many just hang up.
            return "" if secure.recv(1) else _certificate(url, tls, "it hung up after the handshake")
    except TimeoutError:
        return ""
    except ssl.SSLEOFError:
        return "" if tls is None else _certificate(url, tls, "it hung up in the handshake")
    except ssl.SSLError as error:
        reason = (error.reason or "").replace("_", " ").lower()
        return _certificate(url, tls, reason) if "alert" in reason else ""


def _certificate(url: str, tls: Tls | None, reason: str) -> str:
    if tls is not None and tls.cert_file:
        return (
            f"the server at {url} does not take the client certificate '{tls.cert_file}' ({reason}): give one that an "
            f"authority of its --tls-client-ca signed in {_CERT}"
        )
    return f"the server at {url} seems to ask for a client certificate ({reason}): give one in {_CERT}"
