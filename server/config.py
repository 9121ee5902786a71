"""The settings of one server, checked when they are made; built in cli.py and in tests."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeConfig:
    """What `convoy serve` was told.

    Attributes:
        model_repository: Folder in Triton's layout.
        host: Address to listen on.
        grpc_port, http_port, metrics_port: 0 lets the system choose a free one; http_port -1 serves no HTTP.
        threads: CPU threads of each engine.
        max_queue: The most requests that may wait for one model, where its config does not say.
        max_message_bytes: The largest gRPC message in either direction, and the largest HTTP body that comes in.
        max_streams: The most calls that one gRPC connection may have under way; the client waits with more.
        max_image_pixels: The largest encoded image, as its header states.
        drain_seconds: How long to go on serving after SIGTERM while health says NOT_SERVING, so that load
            balancers notice.
        drain_timeout_seconds: How long to wait for the answers that are due after that.
        tls_cert, tls_key: PEM files of the certificate and its key for every port; None for none.
        tls_client_ca: PEM file of the authorities whose certificates clients must show; None asks for none.
        auth_tokens: File of who may call what; None lets everybody call everything.
        management: Who takes management calls: "on", "off", the port of a gRPC listener of its own on 127.0.0.1, or
            two ports, gRPC and HTTP ("8101,8100"). "" is on where `host` is this machine alone, else off.
        metrics_aliases: "triton" exposes Triton's metric names as well; "" does not.

    Raises:
        ValueError: A setting is out of range; the message names it, what is allowed and the way out.
    """

    model_repository: Path
    threads: int
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    max_queue: int = 1024
    max_message_bytes: int = 256 * 2**20
    max_streams: int = 1024
    max_image_pixels: int = 50_000_000
    drain_seconds: float = 0.0
    drain_timeout_seconds: float = 30.0
    metrics_aliases: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    auth_tokens: Path | None = None
    management: str = ""

    def __post_init__(self) -> None:
        if not self.model_repository.is_dir():
            raise ValueError(
                f"the model repository '{self.model_repository}' is not a folder; `convoy export` makes one"
            )
        for name, low, high in (
            ("grpc_port", 0, 65535),
            ("http_port", -1, 65535),
            ("metrics_port", 0, 65535),
            ("threads", 1, 1024),
            ("max_queue", 1, 10**6),
            ("max_message_bytes", 1024, 2**31 - 1),
            ("max_streams", 1, 10**6),
            ("max_image_pixels", 1, 10**9),
            ("drain_seconds", 0, 3600),
            ("drain_timeout_seconds", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie in {low} to {high}, got {value}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if not re.fullmatch(r"(on|off|[0-9]{1,5}(,[0-9]{1,5})?)?", self.management) or any(
            port > 65535 for port in self.management_ports
        ):
            raise ValueError(
                "--management must be on, off, the gRPC port of a listener of its own, or its gRPC and HTTP ports as "
                f"8101,8100; got '{self.management}'"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def takes_management(self) -> bool:
        """Whether the public listeners take management calls."""
        return self.management == "on" or (not self.management and self.loopback)

    @property
    def management_ports(self) -> tuple[int, ...]:
        """The ports of the management listener: none, gRPC alone, or gRPC and HTTP."""
        ports = self.management.split(",")
        return tuple(map(int, ports)) if ports[0].isdecimal() else ()
