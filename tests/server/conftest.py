"""A real server in the test's own process, over models of the fake engine, with real gRPC between."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import selectors
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server import app as app_module
from convoynet.server.app import App
from convoynet.server.config import ServeConfig
from convoynet.server.engines import patience, process
from convoynet.server.supervision import ending, processes
from convoynet.server.types import Tensor


def with_own_connections(make: Callable[..., Any]) -> Callable[..., Any]:
    """Has a channel share no connection with another: an earlier test's may have failed to a port of this number."""
    signature = inspect.signature(make)

    @wraps(make)
    def made(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        options = bound.arguments.get("options") or ()
        bound.arguments["options"] = (*options, ("grpc.use_local_subchannel_pool", 1))
        return make(*bound.args, **bound.kwargs)

    return made


for _module in (grpc, aio):
    for _name in ("insecure_channel", "secure_channel"):
        setattr(_module, _name, with_own_connections(getattr(_module, _name)))


def fake_model(root: Path, name: str = "sum", *, config: str = "", **engine: float) -> None:
    """A model [n, 4] -> [n, 1] that adds up its rows, takes `seconds` a batch and fails above `fail_above`."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(engine))
    (root / name / "config.pbtxt").write_text(
        'backend: "fake"\n'
        'input { name: "x" data_type: TYPE_FP32 dims: [4] }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }\n'
        + (config or "max_batch_size: 8\ndynamic_batching { }\n")
    )


def infer_request(*rows: float, model: str = "sum", **parameters: int) -> pb.ModelInferRequest:
    """A request whose row i adds up to rows[i]."""
    values = np.zeros((len(rows), 4), np.float32)
    values[:, 1] = rows
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="x", datatype="FP32", shape=values.shape)
    message.raw_input_contents.append(values.tobytes())
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    return message


def sums(response: pb.ModelInferResponse) -> list[float]:
    """The answer to infer_request()."""
    values: Tensor = np.frombuffer(response.raw_output_contents[0], np.float32)
    return [float(v) for v in values]


class Running:
    """A server that runs, and a stub that talks to it."""

    def __init__(self, app: App, stub: Any, channel: aio.Channel) -> None:
        self.app, self.stub, self.channel = app, stub, channel

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample, 0 where there is none yet."""
        return self.app._metrics.registry.get_sample_value(name, labels) or 0.0

    async def until(self, holds: Callable[[Any], bool], model: str = "sum") -> None:
        """Waits until something holds of a model."""
        while not holds(self.app.core.model(model)):
            await asyncio.sleep(0.002)

    async def late(self, ask: Callable[[float], Any], model: str = "sum") -> grpc.StatusCode:
        """How `ask(seconds)` ends, a call with that deadline, once it has reached a model that is held."""
        for seconds in (0.5, 5.0, 50.0):  # a slow machine takes the first half second for the way
            call = asyncio.ensure_future(code_of(ask(seconds)))
            while not call.done():
                if self.app.core.model(model).inflight:
                    return (await call)[0]
                await asyncio.sleep(0.002)
        raise AssertionError("no call has reached the model")

    @contextmanager
    def held(self, model: str = "sum") -> Iterator[None]:
        """A model's engines stand still: what reaches them stays in flight, however slow or busy the machine is.

        The server takes none of them for hung within a minute.
        """
        pids = [instance.engine.pid for instance in self.app.core.model(model)._instances]
        usual = patience._LEAST_SECONDS, process.PING_SECONDS, processes.STOPPED_SECONDS
        patience._LEAST_SECONDS = process.PING_SECONDS = processes.STOPPED_SECONDS = 3600.0  # type: ignore[attr-defined]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            patience._LEAST_SECONDS, process.PING_SECONDS, processes.STOPPED_SECONDS = usual  # type: ignore[attr-defined]
            for pid in pids:
                with suppress(ProcessLookupError):  # of a server that gave up waiting
                    os.kill(pid, signal.SIGCONT)


Serving = Callable[..., Any]


def config(root: Path, **changes: Any) -> ServeConfig:
    """Settings of a server of `root` on free ports."""
    usual = {"threads": 1, "tune": False, "start_patience_seconds": 3600, "drain_timeout_seconds": 3600.0}
    ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
    return ServeConfig(**{"model_repository": (str(root),), **usual, **ports, **changes})


@pytest.fixture(autouse=True, scope="session")
def no_tuning() -> None:
    """Servers in processes of their own measure nothing: their models are tiny, and would be measured each time."""
    os.environ["CONVOY_TUNE"] = "false"
    # Busy cores load models slowly; a test waits for all of them.
    os.environ["CONVOY_START_PATIENCE_SECONDS"] = "600"
    # They end killed processes slowly too; one that a test leaves behind fails another, or the whole run at its end.
    app_module._END_SECONDS = ending._KILL_SECONDS = 240.0


@pytest.fixture(autouse=True, scope="session")
async def session_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all tests."""
    return asyncio.get_running_loop()


@pytest.fixture(autouse=True)
def watches_nothing_closed(session_loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Fails a test that has closed what the event loop still watches.

    asyncio takes whatever gets that number next for watched already, and its bytes are never read: a later test hangs.
    """
    yield
    selector = getattr(session_loop, "_selector", None)
    if not isinstance(selector, selectors.EpollSelector) or not Path("/proc/self/fdinfo").is_dir():
        return
    watched = re.findall(r"^tfd:\s*(\d+)", Path(f"/proc/self/fdinfo/{selector.fileno()}").read_text(), re.MULTILINE)
    closed = {number: key.data for number, key in selector.get_map().items() if str(number) not in watched}
    for number in closed:
        selector.unregister(number)  # or every test from here on would fail
    assert not closed, "closed while the event loop watched it"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one model of the fake engine."""
    folder = tmp_path / "models"
    folder.mkdir()
    fake_model(folder)
    return folder


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    """`async with serving(**ServeConfig fields) as running:` over the models in tmp_path, or in `root`."""

    @asynccontextmanager
    async def run(**settings: Any) -> AsyncIterator[Running]:
        app = App(config(settings.pop("root", tmp_path), **settings))
        try:
            await app.start()
            async with aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
                yield Running(app, grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel), channel)
        finally:
            await app.stop()

    return run


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status that a call ends with."""
    try:
        await call
    except aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""
