"""The settings of one server, checked when they are made; built in cli.py and in tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.core import Control
from server.remote import is_remote


@dataclass(frozen=True)
class ServeConfig:
    """What `convoy serve` was told.

    Attributes:
        model_repository: Folder in Triton's layout, a URL of one, or several of both.
        host: Address to listen on.
        grpc_port, metrics_port: 0 lets the system choose a free one.
        threads: CPU threads of each engine.
        max_queue: The most requests that may wait for one model, where its config does not say.
        max_message_bytes: The largest gRPC message in either direction.
        max_image_pixels: The largest encoded image, as its header states.
        drain_seconds: How long to go on serving after SIGTERM while health says NOT_SERVING, so that load
            balancers notice.
        drain_timeout_seconds: How long to wait for the answers that are due after that.
        metrics_aliases: "triton" exposes Triton's metric names as well; "" does not.
        model_control_mode: Who loads and unloads models: "none" after the start, "poll" of the repository, or clients
            ("explicit").
        load_models: With explicit control, what to load at the start; "*" for every model.
        repository_poll_secs: Between two looks at the repository, with "poll".
        default_max_batch_size: Of a model whose config states none and whose file has a free batch axis.
        strict_model_config: Refuses models whose config.pbtxt is missing or states not every input and output.
        require_report: Refuses files whose hash no report.json states.
        model_cache: Folder for the copies of remote repositories.

    Raises:
        ValueError: A setting is out of range; the message names it, what is allowed and the way out.
    """

    model_repository: Path | str | tuple[Path | str, ...]
    threads: int
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    metrics_port: int = 8002
    max_queue: int = 1024
    max_message_bytes: int = 256 * 2**20
    max_image_pixels: int = 50_000_000
    drain_seconds: float = 0.0
    drain_timeout_seconds: float = 30.0
    metrics_aliases: str = ""
    model_control_mode: Control = "none"
    load_models: tuple[str, ...] = ()
    repository_poll_secs: float = 15.0
    default_max_batch_size: int = 32
    strict_model_config: bool = False
    require_report: bool = False
    model_cache: Path = Path("~/.cache/convoy/models")

    @property
    def repositories(self) -> tuple[str, ...]:
        """Every model repository: folders and URLs."""
        given = self.model_repository
        return tuple(map(str, given)) if isinstance(given, tuple) else (str(given),)

    def __post_init__(self) -> None:
        for repository in self.repositories:
            if not is_remote(repository) and not Path(repository).is_dir():
                raise ValueError(f"the model repository '{repository}' is not a folder; `convoy export` makes one")
        if self.load_models and self.model_control_mode != "explicit":
            raise ValueError("--load-model needs --model-control-mode explicit; otherwise every model is loaded")
        for name, low, high in (
            ("grpc_port", 0, 65535),
            ("metrics_port", 0, 65535),
            ("threads", 1, 1024),
            ("max_queue", 1, 10**6),
            ("max_message_bytes", 1024, 2**31 - 1),
            ("max_image_pixels", 1, 10**9),
            ("default_max_batch_size", 1, 2**16),
            ("repository_poll_secs", 0.1, 86400),
            ("drain_seconds", 0, 3600),
            ("drain_timeout_seconds", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie in {low} to {high}, got {value}")
