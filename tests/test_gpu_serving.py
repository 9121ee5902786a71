"""Plans on a real GPU, as the server builds and runs them: `make test-gpu`. Has never run where there is no GPU."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.models.plan_builds import PlanBuilds
from convoynet.server.spec import ModelSpec
from tests.server.conftest import Running, Serving, code_of, serving  # noqa: F401 - a fixture
from tests.server.models.test_plan_builds import write_command, write_deferred
from tests.server.repositories import until

NEAR = {"rtol": 2e-2, "atol": 2e-2}
"""TF32, which TensorRT may use for FP32, has 10 bits behind the point."""


def _gpus() -> int:
    if find_spec("cuda") is None:
        return 0
    from cuda.bindings import runtime

    error, count = runtime.cudaGetDeviceCount()
    return count if error == runtime.cudaError_t.cudaSuccess else 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _gpus(), reason="there is no NVIDIA GPU, or no cuda-bindings"),
    pytest.mark.skipif(
        not (find_spec("tensorrt") or find_spec("tensorrt_rtx")), reason="neither tensorrt nor tensorrt-rtx is there"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`convoy build`, also where the installed entry points are older than the sources."""
    folder = write_command(tmp_path_factory.mktemp("command"), "convoynet.exporter.commands.build_command:build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plans of all tests are: one build serves most of them."""
    return tmp_path_factory.mktemp("cache")


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


def images(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 4), np.float32)


def reference(spec: ModelSpec, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes on the CPU."""
    session = ort.InferenceSession(str(spec.engine.file), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["logits"], {"input": x})[0]
    return found


async def answers(spec: ModelSpec, cache: Path) -> tuple[list[np.ndarray], dict[str, str]]:
    """The bare engine's answers to batches of every size, and its info."""
    built = replace(spec, engine=await PlanBuilds(cache).built(spec))
    engine = engines.load(EngineSpec.of(built)).engine
    found = [engine.run({"input": images(rows, rows)})["logits"].copy() for rows in range(1, 9)]
    info = dict(engine.info)
    engine.close()
    return found, info


async def test_every_batch_size_is_near_onnx_runtime_with_graphs_and_without(tmp_path: Path, cache: Path) -> None:
    with_graphs, without = tmp_path / "graphs", tmp_path / "plain"
    spec = write_deferred(with_graphs)
    found, info = await answers(spec, cache)
    assert info["cuda_graphs"] == "yes"
    for rows, values in enumerate(found, start=1):
        np.testing.assert_allclose(values, reference(spec, images(rows, rows)), **NEAR)
    plain, info = await answers(write_deferred(without, parameter("cuda_graphs", "false")), cache)
    assert info["cuda_graphs"] == "no"
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def request(x: np.ndarray) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="linear")
    message.inputs.add(name="input", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    return message


async def ask(running: Running, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A request of 1 to 8 rows; what was sent and what came back."""
    x = images(1 + number % 8, number)
    response = await running.stub.ModelInfer(request(x))
    return x, np.frombuffer(response.raw_output_contents[0], np.float32).reshape(len(x), -1)


@pytest.mark.parametrize("count", [1, 2])
async def test_two_hundred_requests_at_once_get_their_own_answers(
    serving: Serving,  # noqa: F811
    tmp_path: Path,
    cache: Path,
    count: int,
) -> None:
    spec = write_deferred(tmp_path)
    file = tmp_path / "linear" / "config.pbtxt"
    file.write_text(file.read_text().replace("KIND_GPU", f"KIND_GPU count: {count} gpus: [0]"))
    async with serving(root=tmp_path, engine_cache=cache) as running:
        model: Any = running.app.core.model("linear")
        assert model.info["execution_contexts"] == str(count)
        for x, y in await asyncio.gather(*(ask(running, number) for number in range(200))):
            np.testing.assert_allclose(y, reference(spec, x), **NEAR)


async def test_an_engine_that_is_killed_is_started_again(
    serving: Serving,  # noqa: F811
    tmp_path: Path,
    cache: Path,
) -> None:
    spec = write_deferred(tmp_path)
    async with serving(root=tmp_path, engine_cache=cache) as running:
        model: Any = running.app.core.model("linear")
        engine = model._instances[0].engine
        calls = [asyncio.ensure_future(code_of(running.stub.ModelInfer(request(images(8, i))))) for i in range(200)]
        await until(lambda: any(place.answer for place in engine._places))
        os.kill(engine.pid, signal.SIGKILL)
        codes = {code for code, _ in await asyncio.gather(*calls)}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        x, y = await ask(running, 5)
        np.testing.assert_allclose(y, reference(spec, x), **NEAR)
        assert model._instances[0].engine.pid != engine.pid
