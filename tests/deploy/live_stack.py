"""Two Convoys with everything that alerts are for going wrong, and a Prometheus and an Alertmanager that watch them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import yaml

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from tests.deploy.observability import DEPLOY, PROMETHEUS, RULE_FILES
from tests.server.conftest import fake_model, infer_request
from tests.server.onnx_models import write_colors
from tests.server.process import ServeProcess

Tool = Callable[[str], str]

FASTER = {
    "1m": "5s", "2m": "2s", "3m": "2s", "5m": "12s", "10m": "40s", "15m": "2s", "30m": "15s",
    "1h": "20s", "2h": "20s", "6h": "25s", "1d": "240s", "3d": "40s",
}  # fmt: skip
"""Windows of the copy that runs here. Every `for` is 2 s; rules are evaluated each second."""


class Gpu:
    """What Convoy would say of a GPU, as text that Prometheus scrapes."""

    def __init__(self) -> None:
        self.throttled = 1
        gpu = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(gpu.text().encode())

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def text(self) -> str:
        of = 'gpu="0",uuid="GPU-1"'
        values = {
            "utilization_ratio": 0.5, "memory_used_bytes": 1e10, "memory_total_bytes": 8e10, "power_watts": 300,
            "power_limit_watts": 700, "temperature_celsius": 88,
        }  # fmt: skip
        lines = [f"convoy_gpu_{name}{{{of}}} {value}" for name, value in values.items()]
        lines.append(f'convoy_gpu_throttled{{{of},reason="hw_thermal_slowdown"}} {self.throttled}')
        return "\n".join(lines) + "\n"

    def __enter__(self) -> Gpu:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Traffic:
    """Ten times a second a few requests to one model, until stop(); what becomes of them the metrics tell."""

    def __init__(self, url: str, model: str, *, value: float = 1.0, at_once: int = 1) -> None:
        self._over = threading.Event()
        self._arguments = (url, infer_request(value, model=model), at_once)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        url, request, at_once = self._arguments
        with grpc.insecure_channel(url) as channel:
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            under_way: list[grpc.Future] = []
            while not self._over.wait(0.1):
                under_way = [call for call in under_way if not call.done()]
                under_way += [stub.ModelInfer.future(request, timeout=10) for _ in range(at_once)]
            for call in under_way:
                call.cancel()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def until(holds: Callable[[], Any], what: Callable[[], object] = lambda: "") -> None:
    """Waits until something is so."""
    end = time.monotonic() + 150
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.3)


def get(url: str, **parameters: str) -> Any:
    """JSON over HTTP."""
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        return json.load(answer)


def is_up(url: str) -> bool:
    """Whether a Prometheus or an Alertmanager is ready."""
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=30):
            return True
    except OSError:
        return False


class Stack:
    """Two services of Convoy, Prometheus, Alertmanager, and everything that alerts are for going wrong.

    Attributes:
        main: The Convoy with the models that fail.
        second: The one whose engines crash; later it has no traffic, and then it is gone.
        lone: The file of its only model.
        gpu: What stands for a GPU.
    """

    def __init__(self, folder: Path, tool: Tool, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        root = self.root = folder / "models"
        fake_model(root, "good")
        slo = 'parameters { key: "latency_slo_ms" value { string_value: "900" } }'
        fake_model(root, "careful", config=f"max_batch_size: 8\ndynamic_batching {{ }}\n{slo}\n")
        fake_model(root, "failing", fail_above=100)
        fake_model(root, "slow", seconds=0.4)
        one = "max_batch_size: 1\ndynamic_batching { default_queue_policy { max_queue_size: 4 } }\n"
        fake_model(root, "full", config=one, seconds=0.5)
        fake_model(root, "mended")
        (root / "mended" / "1" / "model.json").write_text("{")
        write_colors(root)
        fake_model(folder / "others", "lone")
        self.lone = folder / "others" / "lone" / "1" / "model.json"
        self._kills = 0
        self.gpu = stack.enter_context(Gpu())
        explicit = {"model_control_mode": "explicit", "load_model": "*"}
        self.main = stack.enter_context(ServeProcess(root, **explicit))
        self._second_metrics = free_port()
        self.second = self.start_second()
        self.traffic = {name: Traffic(self.main.url, name) for name in ("good", "careful", "slow")}
        self.traffic["failing"] = Traffic(self.main.url, "failing", value=1000)
        self.traffic["full"] = Traffic(self.main.url, "full", at_once=2)
        self.traffic["lone"] = Traffic(self.second.url, "lone")
        alertmanager, prometheus = free_port(), free_port()
        self.alertmanager, self.prometheus = f"http://127.0.0.1:{alertmanager}", f"http://127.0.0.1:{prometheus}"
        # Debian's own names of the two programs.
        self._start(
            tool("prometheus-alertmanager"), f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address=127.0.0.1:{alertmanager}",
            "--cluster.listen-address=",
        )  # fmt: skip
        self._start(
            tool("prometheus"), f"--config.file={self._config()}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{prometheus}",
        )  # fmt: skip
        until(lambda: is_up(self.alertmanager) and is_up(self.prometheus))
        self._late = threading.Thread(target=self._load_late, daemon=True)
        self._late.start()

    def start_second(self) -> ServeProcess:
        self.second = ServeProcess(self._folder / "others", metrics_port=str(self._second_metrics))
        self._stack.push(self.second)
        return self.second

    def _start(self, *command: str) -> None:
        log = self._stack.enter_context((self._folder / f"{Path(command[0]).name}.log").open("w"))
        process = subprocess.Popen(command, stdout=log, stderr=log)
        self._stack.callback(process.wait, 30)
        self._stack.callback(process.terminate)

    def _config(self) -> Path:
        """prometheus.yml with what is here as its targets, and the rules with shorter windows."""
        for file in RULE_FILES:
            text = re.sub(r"\[(\d+[mhd])\]", lambda found: f"[{FASTER[found[1]]}]", file.read_text())
            text = re.sub(r"^( +for): \w+$", r"\1: 2s", text, flags=re.MULTILINE)
            text = re.sub(r"^( +interval): \w+$", r"\1: 1s", text, flags=re.MULTILINE)
            (self._folder / file.name).write_text(text)
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [self.alertmanager[len("http://") :]]
        (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "convoy")
        del job["dns_sd_configs"], job["relabel_configs"]
        targets = {"main": self.main.metrics, "second": f"127.0.0.1:{self._second_metrics}", "gpus": self.gpu.address}
        job["static_configs"] = [
            {"targets": [address], "labels": {"namespace": "test", "service": service}}
            for service, address in targets.items()
        ]
        config["scrape_configs"] = [job]
        path = self._folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    def load(self, model: str) -> None:
        """Has the main Convoy load a model."""
        with grpc.insecure_channel(self.main.url) as channel:
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model), timeout=120)

    def _load_late(self) -> None:
        """A model whose warm-up takes as long as an alert needs, and more."""
        warmup = "".join(f'model_warmup {{ name: "w{n}" batch_size: {n} }}\n' for n in (1, 2))
        fake_model(self.root, "late", config=f"max_batch_size: 2\ndynamic_batching {{ }}\n{warmup}", seconds=10)
        self.load("late")

    def kill_engines(self, for_good: bool) -> None:
        """Kills the second service's engine whenever it has started anew, or once more so that none starts."""
        if for_good:
            self.lone.write_text("{")
        if self.second.metric("convoy_engine_restarts_total") >= self._kills:
            self._kills += 1
            for engine in self.second.engines():
                os.kill(engine, signal.SIGKILL)

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """The labels and values that an expression has now."""
        found = get(f"{self.prometheus}/api/v1/query", query=expr)["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def firing(self) -> set[tuple[str, str, str]]:
        """(alert, window, model or else service) of the alerts that fire."""
        found = get(f"{self.prometheus}/api/v1/alerts")["data"]["alerts"]
        labels = [each["labels"] for each in found if each["state"] == "firing"]
        return {(of["alertname"], of.get("window", ""), of.get("model", of["service"])) for of in labels}
