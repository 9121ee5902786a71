"""The settings of one server, checked when they are made.

Flags, the config file and their documentation come of the fields: server/settings.py.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from convoynet.server.host import available_cpus, available_memory
from convoynet.server.repository.layout import is_remote, is_version
from convoynet.server.repository.lone_files import Preprocessing

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def setting(
    help: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    choices: tuple[str, ...] = (),
    bounds: tuple[float, float] | None = None,
    live: bool = False,
) -> Any:
    """A field of ServeConfig.

    Args:
        help: What it is, for people, in one line; with its unit.
        default: Its value where nothing says otherwise; without one it must be given.
        factory: Makes the default when it depends on the machine.
        choices: What a text may be; "" may always be where it is the default.
        bounds: The least and the greatest number.
        live: Whether a running server takes a new value over on SIGHUP.
    """
    metadata = {"help": help, "choices": choices, "bounds": bounds, "live": live}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ServeConfig:
    """What `convoy serve` was told. Each field is a flag, a key of the config file and an environment variable.

    Raises:
        ValueError: A setting is out of range; the message names it, what is allowed and the way out.
    """

    model_repository: tuple[str, ...] = setting(
        "folders of models in Triton's layout, or their s3://, gs://, http://", ("models",)
    )
    model_name: str = setting(
        "where --model-repository is one model's own folder (as KServe mounts it), the name to serve it under", ""
    )
    onnx: tuple[str, ...] = setting(
        "ONNX files, or folders of such, each a model by itself with its config completed", ()
    )
    mean: str = setting("of --onnx: R,G,B on the scale of 0 to 1, subtracted from the pixels of encoded images", "")
    std: str = setting("of --onnx: R,G,B that the rest is divided by", "")
    input_size: str = setting("of --onnx: H or HxW in pixels, where the file leaves the image's size open", "")
    resize: str = setting("of --onnx: the shorter side in pixels, or HxW, before the centre is cut out", "")
    interpolation: str = setting(
        "of --onnx: how images are resized",
        "",
        choices=("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"),
    )
    channel_order: str = setting("of --onnx: bgr for networks trained on OpenCV's images", "", choices=("rgb", "bgr"))
    labels: Path | None = setting("of --onnx: file with a class name a line, in the order of the outputs", None)
    host: str = setting("address to listen on; 0.0.0.0 for every one", "127.0.0.1")
    grpc_port: int = setting("port of gRPC; 0 for a free one", 8001, bounds=(0, 65535))
    http_port: int = setting("port of HTTP; 0 for a free one, -1 for no HTTP", 8000, bounds=(-1, 65535))
    page: bool = setting("show a page about the server and its models at / of the HTTP port", True)
    metrics_port: int = setting("port of the metrics' HTTP; 0 for a free one", 8002, bounds=(0, 65535))
    threads: int = setting(
        "CPU threads of each engine; by default the cores that this process may use",
        factory=available_cpus,
        bounds=(1, 1024),
    )
    tune: bool = setting(
        "measure how many engines with how many threads serve a model best, where its config and --threads do not say",
        True,
    )
    tune_in_service: bool = setting(
        "have processes do what front ends and decoders do for each request while that is measured; else engines alone",
        True,
    )
    max_queue: int = setting("requests that may wait for a model; one more is refused", 1024, bounds=(1, 10**6))
    latency_slo: float = setting(
        "seconds within which to answer; more load than that allows is refused; 0 for no objective",
        0.0,
        bounds=(0, 3600),
    )
    response_cache_bytes: int = setting(
        "room for the answers of models whose config asks for a response cache; 0 for none", 0, bounds=(0, 2**40)
    )
    max_message_bytes: int = setting(
        "largest gRPC message, in either direction, and HTTP body", 2**28, bounds=(1024, 2**31 - 1)
    )
    max_inflight_bytes: int = setting(
        "bytes of requests and answers that the server holds at once, over all protocols; more is refused; by default "
        "an eighth of the memory that this process may use",
        factory=lambda: max(available_memory() // 8, 2**20),
        bounds=(2**20, 2**50),
    )
    frontends: str = setting(
        "processes that end gRPC, a number or auto: 1 up to 4 cores, then a quarter of the cores, at most 16", "auto"
    )
    grpc_stack: str = setting(
        "what ends gRPC's HTTP/2: the server's own code, or grpcio's: a fraction of the small requests a second",
        "native",
        choices=("native", "grpcio"),
    )
    max_streams: int = setting("calls that one gRPC connection may have under way", 1024, bounds=(1, 10**6))
    grpc_keepalive_time: int = setting(
        "milliseconds after which a silent gRPC connection is pinged", 7_200_000, bounds=(1000, 2**31 - 1)
    )
    grpc_keepalive_timeout: int = setting(
        "milliseconds within which the answer to such a ping must come", 20_000, bounds=(1, 2**31 - 1)
    )
    grpc_keepalive_permit_without_calls: bool = setting(
        "allow pings, in both directions, while a gRPC connection has no call under way", True
    )
    grpc_http2_max_pings_without_data: int = setting(
        "pings that the server sends without any data between them; 0 for any number", 2, bounds=(0, 2**31 - 1)
    )
    grpc_http2_min_recv_ping_interval_without_data: int = setting(
        "milliseconds that must lie between two pings of a client without any data between them",
        5000,
        bounds=(0, 2**31 - 1),
    )
    grpc_http2_max_ping_strikes: int = setting(
        "pings too early after which a gRPC connection is ended; 0 for any number", 2, bounds=(0, 2**31 - 1)
    )
    grpc_max_connection_age: int = setting(
        "milliseconds after which a gRPC connection is asked to end; 0 for never", 0, bounds=(0, 2**31 - 1)
    )
    grpc_max_connection_age_grace: int = setting(
        "milliseconds that its calls then have to finish; 0 for any time", 0, bounds=(0, 2**31 - 1)
    )
    max_image_pixels: int = setting(
        "largest encoded image, as its header states", 50_000_000, bounds=(1, 10**9), live=True
    )
    image_decoder: str = setting(
        "what decodes JPEGs: the CPU, as accuracy is measured with, the GPU (nvJPEG), or the GPU where it can",
        "cpu",
        choices=("cpu", "gpu", "auto"),
    )
    drain_seconds: float = setting(
        "go on serving so many seconds after SIGTERM, as NOT_SERVING", 0.0, bounds=(0, 3600), live=True
    )
    drain_timeout_seconds: float = setting(
        "then wait so many seconds for due answers", 30.0, bounds=(0, 3600), live=True
    )
    engine_timeout_seconds: float = setting(
        "end an engine that takes so many seconds for a batch; one that is far slower than measured ends sooner "
        "(docs/operations.md)",
        60.0,
        bounds=(1, 86400),
    )
    load_timeout_seconds: float = setting(
        "give up reading, loading and warming up a model, or building its plan, after so many seconds",
        1800.0,
        bounds=(1, 604800),
    )
    start_patience_seconds: float = setting(
        "once a model is ready, start without those that are still loading so many seconds after the start began",
        120.0,
        bounds=(0, 86400),
    )
    allow_client_shm: bool = setting(
        "let clients share POSIX memory and memory of a GPU with the server; only for clients that you trust", False
    )
    triton_compat: bool = setting("answer with Triton's status codes where they differ", False)
    metrics_aliases: str = setting("expose Triton's nv_* metric names as well", "", choices=("triton",))
    model_control_mode: str = setting(
        "who loads and unloads models after the start: nobody, changes in the repository, or clients",
        "none",
        choices=("none", "poll", "explicit"),
    )
    load_model: tuple[str, ...] = setting("with explicit control, what to load at the start; * for every model", ())
    repository_poll_secs: float = setting(
        "seconds between two looks at the repository, with poll", 15.0, bounds=(0.1, 86400)
    )
    default_max_batch_size: int = setting(
        "of a model whose config states none and whose file has a free batch axis", 32, bounds=(1, 2**16)
    )
    strict_model_config: bool = setting("refuse models whose config.pbtxt does not state every input and output", False)
    require_report: bool = setting("refuse files whose hash no report.json states", False)
    model_cache: Path = setting("folder for the copies of remote repositories", Path("~/.cache/convoy/models"))
    model_cache_bytes: int = setting(
        "room for the copy of each remote repository; a larger one is refused", 2**38, bounds=(1, 2**50)
    )
    engine_cache: Path = setting("folder for TensorRT plans that the server builds", Path("~/.cache/convoy/engines"))
    tls_cert: Path | None = setting("certificate with its chain, PEM: TLS on every port", None)
    tls_key: Path | None = setting("its key, PEM, not encrypted", None)
    tls_client_ca: Path | None = setting("authorities, PEM: clients must show a certificate of theirs", None)
    auth_tokens: Path | None = setting("file of who may call what; `convoy token` makes it", None)
    management: str = setting(
        "take calls that load, unload, register memory or change settings: on, off, or the gRPC (and HTTP) port of a "
        "listener of their own on 127.0.0.1, as 8101 or 8101,8100; by default on where `host` is this machine alone",
        "",
    )
    log_level: str = setting("least level that is logged", "info", choices=LEVELS, live=True)
    log_format: str = setting("lines for people, or one JSON object a line", "text", choices=FORMATS, live=True)
    log_requests: bool = setting("log a line for every request", False, live=True)
    otlp_endpoint: str = setting(
        "URL of an OpenTelemetry collector (OTLP over gRPC), such as http://127.0.0.1:4317", ""
    )
    trace_rate: int = setting(
        "trace one request in so many, of those whose client does not say; 0 for none",
        1000,
        bounds=(0, 2**32 - 1),
        live=True,
    )

    def __post_init__(self) -> None:
        self._check_repository()
        for each in fields(self):
            value, bounds, choices = getattr(self, each.name), each.metadata["bounds"], each.metadata["choices"]
            flag = f"--{each.name.replace('_', '-')}"
            if bounds and not bounds[0] <= value <= bounds[1]:
                raise ValueError(f"{flag} must lie in {bounds[0]} to {bounds[1]}, got {value}")
            if choices and value not in (*choices, each.default):
                raise ValueError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
        if not re.fullmatch(r"auto|[1-9]|[1-5][0-9]|6[0-4]", self.frontends):
            raise ValueError(f"--frontends must be auto or a number in 1 to 64, got '{self.frontends}'")
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

    def _check_repository(self) -> None:
        for repository in self.model_repository:
            if not is_remote(repository) and not Path(repository).is_dir():
                raise ValueError(
                    f"the model repository '{repository}' is not a folder; `convoy export` makes one, "
                    "--model-repository names another"
                )
            if not self.model_name and not is_remote(repository) and _is_model(Path(repository)):
                raise ValueError(
                    f"'{repository}' is the folder of one model; give the repository that it is in, "
                    f"'{Path(repository).resolve().parent}', or a name for the model with --model-name"
                )
        for file in self.onnx:
            if not Path(file).is_file() and not Path(file).is_dir():
                raise ValueError(f"'{file}' is neither a file nor a folder")
        sources = [*self.model_repository, *self.onnx]
        if self.model_name and (len(sources) != 1 or is_remote(sources[0])):
            raise ValueError("--model-name goes with one --model-repository, which is a local folder, or one ONNX file")
        asked = self.preprocessing.asked
        if not self.onnx and (asked or self.labels is not None):
            raise ValueError("--mean, --resize, --labels and the like are for ONNX files: other models' config says it")
        if self.labels is not None and not self.labels.exists():
            raise ValueError(f"--labels {self.labels}: no such file")
        if self.load_model and self.model_control_mode != "explicit":
            raise ValueError("--load-model needs --model-control-mode explicit; otherwise every model is loaded")

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the input of --onnx's files; raises ValueError where that cannot be."""
        return Preprocessing(self.mean, self.std, self.input_size, self.resize, self.interpolation, self.channel_order)

    @property
    def frontend_count(self) -> int:
        """Processes that end gRPC; engines and the core process need the other cores more."""
        cores = available_cpus()
        return int(self.frontends) if self.frontends != "auto" else 1 if cores <= 4 else min(cores // 4, 16)

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


def _is_model(folder: Path) -> bool:
    """Whether it is the folder of one model: a config, and beside it versions alone."""
    inside = [each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")]
    return (folder / "config.pbtxt").is_file() and bool(inside) and all(map(is_version, inside))
