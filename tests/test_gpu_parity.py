"""PyTorch on the GPU, float32 without TF32, against every engine and precision that the GPU has: `make test-gpu`.

gpu_parity.json has the thresholds, and says what each is based on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.evidence import limits, verify
from convoynet.exporter.progress import Quiet
from convoynet.exporter.running.runtime import Eager, Predictor, Session
from convoynet.exporter.studies.precisions import LEAST_COMPUTE_CAPABILITY, PRECISIONS, Network
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.library import find
from convoynet.exporter.tensorrt.runner import Plan
from tests.gpu_thresholds import LIMITS, limit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
]

BATCHES = (1, 5)
OPTIONS = BuildOptions(profiles=(Profile(1, 1, 1), Profile(2, 4, 8)))
# What ONNX Runtime's CUDA provider computes; where it lacks an operator in bfloat16 the test says so and skips.
ENGINES = {
    "onnxruntime cuda": ("fp32", "fp16", "bf16", "int8"),
    "onnxruntime tensorrt": ("fp32", "fp16", "int8"),
    "plan": PRECISIONS,
}


@lru_cache(maxsize=1)
def network(name: str) -> Network:
    return Network(name)


@lru_cache(maxsize=1)
def reference(name: str) -> verify.Reference:
    eager = Eager(network(name).module, network(name).arch.preprocess, "cuda", exact=True)
    outputs = verify.outputs_of(eager, network(name).pictures.check, 4)
    return verify.Reference(eager.name, network(name).arch.task, outputs, untrained=True)


def plan_of(graph: onnx.ModelProto, net: Network, options: BuildOptions = OPTIONS) -> Plan:
    """Build and load; skips where there is no TensorRT, or one that does not have this GPU."""
    try:
        content = build(graph.SerializeToString(), options, Quiet()).content
        plan = Plan(content, net.arch.preprocess, task=net.arch.task)
        plan(plan.prepare(net.pictures.check[:1]))
        return plan
    except Missing as missing:
        pytest.skip(str(missing))
    except BadInput as refused:
        # TensorRT-RTX is for RTX GPUs: its builder works everywhere, and the GPU refuses the engine.
        library = find()
        if library is not None and library.compiles_at_load and "cannot be loaded" in str(refused):
            pytest.skip(f"{library.title} does not run here: {refused}")
        raise


def session_of(graph: onnx.ModelProto, net: Network, target: str, *, optimized: bool) -> Session:
    try:
        session = Session(
            graph.SerializeToString(),
            net.arch.preprocess,
            task=net.arch.task,
            target=target,
            threads=1,
            optimized=optimized,
        )
    except Missing as missing:
        pytest.skip(str(missing))
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        if "NOT_IMPLEMENTED" in str(error):
            pytest.skip(f"ONNX Runtime {onnxruntime.__version__}: {str(error).splitlines()[0]}")
        raise
    if session.device == "cpu":
        pytest.skip("onnxruntime-gpu is not installed, or finds no CUDA (it takes the place of onnxruntime)")
    return session


def predictor(net: Network, engine: str, precision: str) -> Predictor:
    least = LEAST_COMPUTE_CAPABILITY.get(precision, (0, 0))
    if torch.cuda.get_device_capability() < least:
        pytest.skip(f"{torch.cuda.get_device_name()} has no {precision}: it came with compute capability {least}")
    graph = net.graph(precision)
    if engine == "plan":
        return plan_of(graph, net)
    target = "tensorrt" if engine.endswith("tensorrt") else "gpu"
    return session_of(graph, net, target, optimized=precision != "fp8")


@pytest.mark.parametrize(
    ("name", "engine", "precision"),
    [(name, engine, precision) for name in LIMITS for engine, has in ENGINES.items() for precision in has],
)
def test_parity(name: str, engine: str, precision: str) -> None:
    net = network(name)
    exported = predictor(net, engine, precision)
    found = verify.measure_parity(reference(name), exported, net.pictures.check, BATCHES).parity
    figure, bound = limit(name, engine, precision)
    value = getattr(found, figure)
    print(f"{name} {exported.name} {precision}: {figure} {value:.3g}, threshold {bound:.3g}")
    assert (value <= bound) if figure == "max_rel_error" else (value is None or value >= bound)


def test_without_tf32_the_reference_is_float32() -> None:
    net = network("resnet20")
    pixels = net.pictures.check
    cpu = verify.outputs_of(Eager(net.module, net.arch.preprocess), pixels)[0]
    gpu = verify.outputs_of(Eager(net.module, net.arch.preprocess, "cuda", exact=True), pixels)[0]
    assert np.abs(cpu - gpu).max() <= limits.FP32_MAX_REL_ERROR / 10 * np.abs(cpu).max()


def test_batches_of_several_profiles_and_none(tmp_path: Path) -> None:
    net = network("lenet5")
    plan = plan_of(net.graph("fp32"), net)
    inputs = plan.prepare(net.pictures.check[np.arange(8) % len(net.pictures.check)])
    whole = plan(inputs)[0]
    for batch in (1, 2, 5, 8):
        np.testing.assert_allclose(plan(inputs[:batch])[0], whole[:batch], rtol=1e-2, atol=1e-2)
    with pytest.raises(BadInput, match=r"batch 9: this plan takes 1 to 1, 2 to 8 images"):
        plan(np.concatenate((inputs, inputs[:1])))
    enqueue, made = plan.bind(inputs)
    enqueue()
    enqueue()
    plan.synchronize()
    np.testing.assert_array_equal(made["logits"].cpu().numpy(), whole)


@pytest.fixture
def full_gpu() -> Iterator[None]:
    """All of the GPU's memory is taken but 32 MiB."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken: list[Any] = [torch.empty(max(free - 2**25, 0), dtype=torch.uint8, device="cuda")]
    yield
    taken.clear()
    torch.cuda.empty_cache()


def test_too_little_memory_is_one_line(request: pytest.FixtureRequest) -> None:
    net = network("resnet20")
    plan = plan_of(net.graph("fp32"), net, BuildOptions(profiles=(Profile(1, 64, 8192),)))
    inputs = plan.prepare(net.pictures.check[np.arange(8192) % len(net.pictures.check)])
    request.getfixturevalue("full_gpu")
    with pytest.raises(BadInput, match="too little memory") as refused:
        plan(inputs)
    assert "\n" not in str(refused.value)
