"""The settings of one server, checked when they are made; built in cli.py and in tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeConfig:
    """What `convoy serve` was told.

    Attributes:
        model_repository: Folder in Triton's layout.
        host: Address to listen on.
        grpc_port, metrics_port: 0 lets the system choose a free one.
        threads: CPU threads of each engine.
        max_queue: The most requests that may wait for one model, where its config does not say.
        max_message_bytes: The largest gRPC message in either direction.
        max_image_pixels: The largest encoded image, as its header states.
        drain_seconds: How long to go on serving after SIGTERM while health says NOT_SERVING, so that load
            balancers notice.
        drain_timeout_seconds: How long to wait for the answers that are due after that.
        frontends: Processes that end gRPC; with 1 the one process does everything.
        metrics_aliases: "triton" exposes Triton's metric names as well; "" does not.

    Raises:
        ValueError: A setting is out of range; the message names it, what is allowed and the way out.
    """

    model_repository: Path
    threads: int
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    metrics_port: int = 8002
    max_queue: int = 1024
    max_message_bytes: int = 256 * 2**20
    max_image_pixels: int = 50_000_000
    drain_seconds: float = 0.0
    drain_timeout_seconds: float = 30.0
    frontends: int = 1
    metrics_aliases: str = ""

    def __post_init__(self) -> None:
        if not self.model_repository.is_dir():
            raise ValueError(
                f"the model repository '{self.model_repository}' is not a folder; `convoy export` makes one"
            )
        for name, low, high in (
            ("grpc_port", 0, 65535),
            ("metrics_port", 0, 65535),
            ("threads", 1, 1024),
            ("max_queue", 1, 10**6),
            ("max_message_bytes", 1024, 2**31 - 1),
            ("max_image_pixels", 1, 10**9),
            ("frontends", 1, 64),
            ("drain_seconds", 0, 3600),
            ("drain_timeout_seconds", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie in {low} to {high}, got {value}")


def frontends_for(cores: int) -> int:
    """The `--frontends auto` of a machine: the core process and the engines need the other cores more."""
    return 1 if cores <= 4 else min(cores // 4, 16)
