"""How a client makes itself known to a server, and how it knows the server: TLS, certificates, a token.

One place for `convoy predict`, `convoy bench` and the Python clients: flags or arguments, then the environment. No
message here quotes a token.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import grpc

from convoynet.server.client import given
from convoynet.server.client.errors import invalid

_MOST_TOKEN = 4096
"""Characters: a longer one is some other file, and metadata have a limit."""
_TLS_ALONE = ("ca", "cert", "key", "server_name")
ENVIRONMENT: Mapping[str, str] = {
    "ca": "CONVOY_CA",
    "cert": "CONVOY_CERT",
    "key": "CONVOY_KEY",
    "token": "CONVOY_TOKEN",
}
"""Where an argument comes from that was not given."""


class Security(TypedDict, total=False):
    """Arguments of a client for a server that has TLS or asks for tokens (docs/security.md).

    Attributes:
        tls: whether to speak TLS; without it, where `ca`, `cert`, `key` or `server_name` is given.
        ca: a PEM file of the authorities that may have signed the server's certificate; without it the public ones.
            The environment has it as CONVOY_CA.
        cert: a PEM file of this client's certificate with its chain; or CONVOY_CERT.
        key: its key, without a pass phrase; or CONVOY_KEY.
        server_name: the name that the server's certificate is for, where that is not the one in the url.
        token: as `convoy token` prints it; or CONVOY_TOKEN.
        token_file: a file that holds the token alone.
        plain_token: send the token without TLS to another machine too: for a network that is trusted.
    """

    tls: bool | None
    ca: str | Path | None
    cert: str | Path | None
    key: str | Path | None
    server_name: str | None
    token: str | None
    token_file: str | Path | None
    plain_token: bool


@dataclass(frozen=True)
class Tls:
    """What TLS is spoken with: PEM texts, and the names of the files for messages."""

    authorities: bytes | None = field(default=None, repr=False)
    chain: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    server_name: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """What a gRPC channel is made with."""
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.chain)

    def context(self) -> ssl.SSLContext:
        """A client of this kind, which looks at the server's certificate not at all: to see what a server speaks.

        Raises:
            OSError: the files hold no such certificates.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if self.authorities is not None:
            context.load_verify_locations(cadata=self.authorities.decode("ascii", "replace"))
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file, _no_password)
        return context


@dataclass(frozen=True)
class Access:
    """How to reach a server; `tls` is None where nothing is encrypted."""

    tls: Tls | None = None
    token: str = field(default="", repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else None


def access(target: str, security: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Access:
    """What `security` and the environment say of a server.

    Args:
        target: where it is, as gRPC takes it.
        security: arguments as in `Security`; they have precedence.
        environment: variables.

    Raises:
        ClientError: an argument is wrong, contradicts another, or names a file that cannot be used; or a token would
            be sent in the clear to another machine.
    """
    arguments = given.options(security, Security)
    tls = _tls(arguments, environment)
    token = _token(arguments, environment)
    if not isinstance(plain := arguments.get("plain_token", False), bool):
        raise given.refusal("plain_token", plain, "True or False")
    if token and tls is None and not plain and not is_local(target):
        raise invalid(
            f"the token would go to {target} without TLS, for everybody on the way to read: add --tls or --ca FILE "
            "(tls=True or ca=FILE in Python), or --plain-token (plain_token=True) where that network is trusted"
        )
    return Access(tls, token)


def _tls(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> Tls | None:
    stated = [name for name in _TLS_ALONE if arguments.get(name)]
    wanted = arguments.get("tls")
    if wanted is not None and not isinstance(wanted, bool):
        raise given.refusal("tls", wanted, "True or False")
    if wanted is False:
        if stated:
            raise invalid(f"{stated[0]} is for TLS, which is turned off; drop one of the two")
        return None
    ca, cert, key = (_file(name, arguments, environment) for name in ("ca", "cert", "key"))
    server_name = given.text("server_name", arguments.get("server_name"))
    if not (wanted or ca or cert or key or server_name):
        return None
    if bool(cert) != bool(key):
        one, other = ("cert", "key") if cert else ("key", "cert")
        raise invalid(f"{one} is given and {other} is not: a client certificate needs both (--cert FILE --key FILE)")
    tls = Tls(_read(ca), _read(cert), _read(key), server_name, *(path for _, path in (ca, cert, key)))
    _check(tls, ca, cert)
    return tls


class _Named(tuple[str, str]):
    """What a file is called in messages, and its path; false where there is none."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return bool(self[1])


def _file(name: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> _Named:
    value = arguments.get(name)
    if value:
        if not isinstance(value, str | os.PathLike):
            raise given.refusal(name, value, "the path of a PEM file")
        return _Named((name, os.fspath(value)))
    return _Named((ENVIRONMENT[name], environment.get(ENVIRONMENT[name], "")))


def _read(named: _Named) -> bytes | None:
    if not named:
        return None
    try:
        return Path(named[1]).read_bytes()
    except (OSError, ValueError) as error:
        raise invalid(f"{named[0]} '{named[1]}' cannot be read: {getattr(error, 'strerror', error)}") from error


def _check(tls: Tls, ca: _Named, cert: _Named) -> None:
    """Whether the files hold what they have to: gRPC would say so by no more than a broken connection."""
    if tls.authorities is not None and b"-----BEGIN CERTIFICATE-----" not in tls.authorities:
        raise invalid(f"{ca[0]} '{ca[1]}' holds no certificate in PEM form")
    try:
        Tls(tls.authorities).context()
    except (OSError, ValueError) as error:
        raise invalid(f"{ca[0]} '{ca[1]}' holds no usable certificate in PEM form: {error}") from error
    try:
        tls.context()
    except (OSError, ValueError) as error:
        raise invalid(
            f"{cert[0]} '{cert[1]}' with the key '{tls.key_file}' cannot be used: {error}; both are PEM files, belong "
            "together, and the key has no pass phrase"
        ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _token(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    file, stated = arguments.get("token_file"), arguments.get("token")
    if file and stated:
        raise invalid("token and token_file are both given; drop one of the two")
    if file:
        where, text = "the token file", _token_in(file)
    elif stated:
        where, text = "token", stated
        if not isinstance(stated, str):
            raise invalid(f"token is of the type {type(stated).__name__}: give a text")
    else:
        where, text = ENVIRONMENT["token"], environment.get(ENVIRONMENT["token"], "")
    text = text.strip()
    if file and not text:
        raise invalid("the token file is empty")
    if not re.fullmatch(r"[\x21-\x7e]*", text) or len(text) > _MOST_TOKEN:
        raise invalid(f"{where} holds no token: that is one word of at most {_MOST_TOKEN} letters, digits and signs")
    return text


def _token_in(file: object) -> str:
    """The file's text. Its name is not told: who mistakes the flag gives the token itself."""
    if not isinstance(file, str | os.PathLike):
        raise invalid(f"token_file is of the type {type(file).__name__}: give the path of a file")
    try:
        with Path(file).open(encoding="utf-8") as opened:
            return opened.read(_MOST_TOKEN + 2)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise invalid(f"the token file cannot be read: {reason}; give a file that holds the token") from None


def hosts(target: str) -> list[str]:
    """The hosts in an address as gRPC takes it; none where they cannot be told, or where it is no network at all."""
    if re.match(r"unix(-abstract)?:", target):  # a machine may be called unix1
        return []
    bare = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?", "", target)
    return [re.sub(r":\d+$", "", each).strip("[]") for each in bare.split(",")]


def is_local(target: str) -> bool:
    """Whether only this machine sees what goes there."""
    return all(each == "localhost" or _is_loopback(each) for each in hosts(target))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
