"""TLS and mutual TLS for every port, from files that may change while the server runs."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from convoynet.server.security.reloading import InvalidFile, Reloaded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the certificate with its chain, its key, and who signs the certificates that clients must show."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class _Loaded:
    contexts: Mapping[str, ssl.SSLContext]
    """By what is spoken within TLS."""
    grpc: grpc.ServerCertificateConfiguration


class Certificates(Reloaded[_Loaded]):
    """The certificates that every listener shows, also those that are already listening.

    Attributes:
        files: Where they are.
        mutual: Whether clients must show one.

    Raises:
        InvalidFile: A file cannot be read, or the key is encrypted or not the certificate's.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.mutual = files.client_ca is not None
        named = [f for f in (files.certificate, files.key, files.client_ca) if f is not None]
        super().__init__("TLS certificates", named, lambda: _load(files))

    def context(self, protocol: str) -> ssl.SSLContext:
        """What a listener is made with, of HTTP/1.1 or HTTP2; each handshake takes the newest certificates.

        The callback swaps the whole context, so that a certificate authority can be replaced too: a live context
        could only be given more of them.
        """
        front = _context(self.mutual, protocol)

        def newest(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self.value.contexts[protocol]

        # Called for every handshake, whether the client names a server or not.
        front.sni_callback = newest
        return front

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """What a gRPC port is made with; each handshake takes the newest certificates."""
        shown = self.value

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            if self.value is shown:
                return None
            shown = self.value
            return shown.grpc

        return grpc.dynamic_ssl_server_credentials(shown.grpc, newest, require_client_authentication=self.mutual)


HTTP, HTTP2 = "http/1.1", "h2"
"""Names of protocols within TLS (ALPN)."""


def _context(mutual: bool, protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        # An intermediate authority may be the one that is trusted, as in gRPC.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        # A resumed session would skip the check of the client's certificate against a new authority.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    return context


def _load(files: TlsFiles) -> _Loaded:
    contexts = {protocol: _context(files.client_ca is not None, protocol) for protocol in (HTTP, HTTP2)}

    def no_password() -> str:
        raise InvalidFile(f"the key '{files.key}' is encrypted; give one without a pass phrase")

    try:
        chain, key = files.certificate.read_bytes(), files.key.read_bytes()
        authorities = files.client_ca.read_bytes() if files.client_ca else None
        for context in contexts.values():
            context.load_cert_chain(files.certificate, files.key, no_password)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidFile(
            f"the certificate '{files.certificate}' with the key '{files.key}' cannot be used: "
            f"{error.strerror or error}; both are PEM files and belong together"
        ) from error
    if authorities is not None:
        try:
            for context in contexts.values():
                context.load_verify_locations(cadata=authorities.decode("ascii"))
        except (OSError, ValueError) as error:
            raise InvalidFile(f"'{files.client_ca}' holds no PEM certificates of an authority: {error}") from error
    return _Loaded(contexts, grpc.ssl_server_certificate_configuration([(key, chain)], authorities))


def identity_from_peer(certificate: Mapping[str, Any] | None) -> str:
    """The name in a client's certificate as ssl gives it: its common name, else its first alternative name."""
    if not certificate:
        return ""
    subject = (pair for group in certificate.get("subject", ()) for pair in group)
    common = next((value for name, value in subject if name == "commonName"), "")
    return common or next((value for _, value in certificate.get("subjectAltName", ())), "")


def identity_from_auth(context: Mapping[str, Sequence[bytes]]) -> str:
    """The same from what gRPC knows of a peer (`auth_context`)."""
    for name in ("x509_common_name", "x509_subject_alternative_name"):
        for value in context.get(name, ()):
            if value:
                return value.decode("utf-8", "replace")
    return ""
