"""Plans without a GPU: what is known before one is touched, each refusal, and the calls that a GPU will get."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.tensorrt import runner
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.library import Library, find
from convoynet.exporter.tensorrt.runner import Header, Plan, choose_profile, read_header
from tests.exporter.onnx_runs import session_of
from tests.exporter.small_nets import PREPROCESS, logits_of, pixels, small_net

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16), Profile(8, 32, 64))

needs_tensorrt = pytest.mark.skipif(find() is None, reason="needs tensorrt or tensorrt_rtx: pip install tensorrt-rtx")


def plan_of(library: str, version: tuple[int, int, int, int]) -> bytes:
    return {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}[library] + bytes(20) + bytes(version) + bytes(36)


@pytest.fixture(scope="module")
def built() -> bytes:
    shape: list[str | int | None] = ["batch", 3, 4, 4]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "relu", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return build(model.SerializeToString(), BuildOptions(profiles=(Profile(1, 2, 4),)), Quiet()).content


@needs_tensorrt
def test_a_plan_says_who_made_it(built: bytes) -> None:
    library = find()
    assert library is not None
    assert read_header(built) == Header(library.name, library.version)


def test_the_header_of_either_library_is_read() -> None:
    assert read_header(plan_of("tensorrt", (10, 13, 2, 6))) == Header("tensorrt", "10.13.2.6")
    assert read_header(plan_of("tensorrt_rtx", (1, 7, 1, 116))) == Header("tensorrt_rtx", "1.7.1.116")


@pytest.mark.parametrize("content", [b"", b"vtrt", b"\x08\x0a model of ONNX" + bytes(40)])
def test_what_is_no_plan_is_refused(content: bytes) -> None:
    with pytest.raises(BadInput, match=r"no TensorRT plan.*convoy build"):
        Plan(content, PREPROCESS)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.plan: cannot be read"):
        Plan(tmp_path / "model.plan", PREPROCESS)


@needs_tensorrt
def test_a_plan_of_another_version_or_library_says_how_to_build_it_again(built: bytes) -> None:
    library = find()
    assert library is not None
    older = built[:24] + bytes((1, 0, 0, 9)) + built[28:]
    with pytest.raises(BadInput, match=rf"built by {library.name} 1\.0\.0\.9.*{library.version}.*convoy build"):
        Plan(older, PREPROCESS)
    other = {"tensorrt": "tensorrt_rtx", "tensorrt_rtx": "tensorrt"}[library.name]
    with pytest.raises(BadInput, match=rf"built by {other} 9\.9\.9\.9, and here is {library.name}"):
        Plan(plan_of(other, (9, 9, 9, 9)), PREPROCESS)


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find", lambda: None)
    with pytest.raises(Missing, match=r"pip install tensorrt-rtx==1\.7\.1\.116"):
        Plan(plan_of("tensorrt_rtx", (1, 7, 1, 116)), PREPROCESS)


@needs_tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(built: bytes) -> None:
    with pytest.raises(Missing, match="GPU 0 was asked for and torch finds none"):
        Plan(built, PREPROCESS)


@pytest.mark.parametrize(("batch", "number"), [(1, 0), (2, 1), (8, 1), (16, 1), (17, 2), (24, 2), (64, 2)])
def test_the_profile_tuned_for_the_nearest_size_is_chosen(batch: int, number: int) -> None:
    assert choose_profile(PROFILES, batch) == number


@pytest.mark.parametrize("batch", [0, 65])
def test_a_batch_outside_every_profile_is_refused(batch: int) -> None:
    with pytest.raises(BadInput, match=f"batch {batch}: this plan takes 1 to 1, 1 to 16, 8 to 64 images"):
        choose_profile(PROFILES, batch)


class Context:
    """As IExecutionContext, over ONNX Runtime: reads and writes the addresses that it is told."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (batch, *_) = self.shapes["input"]
        return (batch, 20)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.ran.append((self.profile, self.shapes["input"][0]))
        if self.engine.broken:
            return False
        inputs = np.empty(self.shapes["input"], np.uint8)
        ctypes.memmove(inputs.ctypes.data, self.addresses["input"], inputs.nbytes)
        (made,) = self.engine.session.run(None, {"input": inputs})
        ctypes.memmove(self.addresses["logits"], made.ctypes.data, made.nbytes)
        return True


class Engine:
    """As ICudaEngine."""

    num_io_tensors = 2
    num_optimization_profiles = 2

    def __init__(self, model: bytes, said: SimpleNamespace) -> None:
        self.said = said  # the library's logger
        self.session = session_of(model)
        self.ran: list[tuple[int | None, int]] = []
        self.contexts: list[Context] = []
        self.broken = self.full = False
        self.words: list[str] = []

    def get_tensor_name(self, index: int) -> str:
        return ("input", "logits")[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INPUT" if name == "input" else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="UINT8" if name == "input" else "FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, 32, 32, 3) for size in ((1, 1, 2), (1, 8, 16))[profile]]

    def create_execution_context(self) -> Context | None:
        if self.full:
            self.said.errors.extend(self.words)
            return None
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Runtime:
    """As Runtime."""

    engine: Engine | None = None

    def __init__(self, logger: Any) -> None:
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Runtime.engine


@pytest.fixture(scope="module")
def model() -> bytes:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True).SerializeToString()


@pytest.fixture
def engine(model: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """What a plan loads, on a GPU that is the CPU's memory."""
    words = SimpleNamespace(errors=["Error Code 1: the engine was\nbuilt for another device"])
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    library = Library("tensorrt", "10.13.2.6", SimpleNamespace(Runtime=Runtime))
    monkeypatch.setattr(runner, "find", lambda: library)
    monkeypatch.setattr(runner, "recorder", lambda _: words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Paper")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**29, 2**34))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(runner, "_device", lambda _: torch.device("cpu"))
    Runtime.engine = Engine(model, words)
    yield Runtime.engine
    Runtime.engine = None


PLAN = plan_of("tensorrt", (10, 13, 2, 6))


def test_batches_run_in_the_context_of_their_profile(engine: Engine) -> None:
    plan = Plan(PLAN, PREPROCESS)
    assert plan.name == "TensorRT 10.13.2.6 on NVIDIA Paper"
    assert plan.outputs == ("logits",)
    assert plan.profiles == (Profile(1, 1, 2), Profile(1, 8, 16))
    images = pixels(5)
    for batch in (1, 5, 1):
        (logits,) = plan(plan.prepare(images[:batch]))
        np.testing.assert_allclose(logits, logits_of(small_net(), images[:batch]), rtol=1e-3, atol=1e-4)
    assert engine.ran == [(0, 1), (1, 5), (0, 1)]
    assert len(engine.contexts) == 2
    with pytest.raises(BadInput, match="batch 17: this plan takes 1 to 2, 1 to 16"):
        plan.run(pixels(17))


def test_what_is_bound_runs_any_number_of_times(engine: Engine) -> None:
    plan = Plan(PLAN, PREPROCESS)
    enqueue, made = plan.bind(pixels(2))
    enqueue()
    enqueue()
    plan.synchronize()
    assert list(made) == ["logits"]
    np.testing.assert_allclose(made["logits"].numpy(), logits_of(small_net(), pixels(2)), rtol=1e-3, atol=1e-4)
    assert len(engine.ran) == 2


def test_each_refusal_of_the_library_is_one_line(engine: Engine) -> None:
    engine.full = True
    with pytest.raises(BadInput, match=r"too little memory for this plan: 0\.5 of 16\.0 GiB are free.*--batch") as full:
        Plan(PLAN, PREPROCESS).run(pixels(1))
    assert "\n" not in str(full.value)
    engine.words = ["[exec] Error Code 2: OutOfMemory (no further information)"]
    with pytest.raises(BadInput, match=r"too little memory .*: \[exec\] Error Code 2: OutOfMemory"):
        Plan(PLAN, PREPROCESS).run(pixels(1))
    engine.words = ["no kernel image is available for execution on the device"]
    with pytest.raises(BadInput, match=r"the plan cannot be loaded on NVIDIA Paper: no kernel image.*convoy build"):
        Plan(PLAN, PREPROCESS).run(pixels(1))
    assert engine.said.errors == []
    engine.full, engine.broken = False, True
    with pytest.raises(BadInput, match="does not run a batch of 1 on NVIDIA Paper"):
        Plan(PLAN, PREPROCESS).run(pixels(1))
    Runtime.engine = None
    with pytest.raises(BadInput, match=r"cannot be loaded on NVIDIA Paper: .*convoy build") as unfit:
        Plan(PLAN, PREPROCESS)
    assert "\n" not in str(unfit.value)


def test_the_reason_is_the_librarys_first_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    words = SimpleNamespace(errors=["of an earlier call"])
    monkeypatch.setattr(runner, "recorder", lambda _: words)

    def refuse(runtime: Runtime, plan: bytes) -> None:
        words.errors.extend(["Error Code 6: built for\nanother device", "what followed from it"])

    monkeypatch.setattr(Runtime, "deserialize_cuda_engine", refuse)
    with pytest.raises(BadInput, match="Error Code 6: built for another device; build it again"):
        Plan(PLAN, PREPROCESS)


def test_a_full_gpu_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plan = Plan(PLAN, PREPROCESS)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BadInput, match="too little memory for this batch of 3"):
        plan.run(pixels(3))


@needs_tensorrt
def test_the_calls_are_those_of_the_library() -> None:
    library = find()
    assert library is not None
    for stand_in, name in ((Context, "IExecutionContext"), (Engine, "ICudaEngine"), (Runtime, "Runtime")):
        real = getattr(library.module, name)
        for call in vars(stand_in):
            assert call.startswith("_") or hasattr(real, call) or call == "engine", f"{name} has no {call}"
    assert hasattr(library.module.Runtime, "engine_host_code_allowed")
    assert {"INPUT", "OUTPUT"} <= set(dir(library.module.TensorIOMode))
    assert set(runner._TYPES) <= set(dir(library.module.DataType))
