"""The TensorRT engine on a simulated GPU: what it computes, in which order, and what it refuses."""

from __future__ import annotations

import json
import random
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoynet.server.engines import child
from convoynet.server.engines.base import EngineSpec, PipelinedEngine, tensor_of
from convoynet.server.engines.buffers import SharedBuffer, Table
from convoynet.server.engines.tensorrt import TensorRtEngine
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import EngineOptions, PlanOptions
from tests.server import simulated_tensorrt
from tests.server.simulated_gpu import SimulatedGpu

PROFILES = [[1, 1, 4], [4, 8, 16]]


def spec_of(
    tmp_path: Path, *, slots: int = 2, most: int = 16, buckets: tuple[int, ...] = (), **stated: Any
) -> EngineSpec:
    """A plan x FP32 [n, 3] -> y FP32 [n, 1]; `stated` replaces what it says, or parts of PlanOptions."""
    names = set(PlanOptions.__dataclass_fields__)
    plan = PlanOptions(**{k: v for k, v in stated.items() if k in names})
    content = {"x": [-1, 3], "profiles": PROFILES, **{k: v for k, v in stated.items() if k not in names}}
    file = tmp_path / "model.plan"
    file.write_text(json.dumps(content))
    x = tensor_of("x", "FP32", (3,))
    return EngineSpec(
        "net", "1", (x,), (tensor_of("y", "FP32", (1,)),), most,
        EngineOptions("tensorrt", file, "gpu", 1, slots=slots, plan=plan), buckets=buckets,
    )  # fmt: skip


def engine_of(spec: EngineSpec, gpu: SimulatedGpu) -> TensorRtEngine:
    return TensorRtEngine(spec, simulated_tensorrt.of(gpu), gpu)


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 9, (rows, 3)).astype(np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    return 2 * x.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("graphs", [True, False])
def test_every_batch_size_is_computed(tmp_path: Path, graphs: bool) -> None:
    gpu = SimulatedGpu()
    engine = engine_of(spec_of(tmp_path, cuda_graphs=graphs), gpu)
    assert isinstance(engine, PipelinedEngine)
    assert engine.buckets[-1] == 16
    assert engine.info["cuda_graphs"] == ("yes" if graphs else "no")
    gpu.freeze()
    gpu.launched = 0
    for rows in range(1, 17):
        x = images(rows, rows)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], expected(x))
    assert gpu.launched == (16 if graphs else 0)
    engine.close()
    assert gpu.closed


@pytest.mark.parametrize("contexts", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_batches_in_flight_never_touch_each_other(tmp_path: Path, contexts: int, seed: int) -> None:
    """Batches begin and end in random order; the simulated GPU finds whatever nothing orders."""
    gpu, chance = SimulatedGpu(seed), random.Random(seed)
    engine = engine_of(spec_of(tmp_path, slots=2 * contexts, buckets=(2, 8)), gpu)
    gpu.freeze()
    slots = 2 * contexts
    buffers = [(np.zeros((16, 3), np.float32), np.zeros((16, 1), np.float32)) for _ in range(slots)]
    running: dict[int, tuple[Any, np.ndarray, int]] = {}
    for step in range(120):
        slot = chance.randrange(slots)
        x, y = buffers[slot]
        if slot in running:
            batch, given, rows = running.pop(slot)
            batch.wait()
            with gpu.host_may_touch(y.ctypes.data):
                np.testing.assert_array_equal(y[:rows], expected(given))
            continue
        rows = chance.randint(1, 16)
        with gpu.host_may_touch(x.ctypes.data):
            x[:rows] = images(rows, step)
        batch = engine.prepare(slot, {"x": x[:rows]}, {"y": y[:rows]})
        batch.submit()
        running[slot] = batch, x[:rows].copy(), rows


def test_a_batch_that_is_not_waited_for_is_a_race_that_the_simulation_finds(tmp_path: Path) -> None:
    gpu = SimulatedGpu()
    engine = engine_of(spec_of(tmp_path), gpu)
    x, y = images(2), np.zeros((2, 1), np.float32)
    first, other = engine.prepare(0, {"x": x}, {"y": y}), engine.prepare(0, {"x": images(2)}, {"y": y.copy()})
    first.submit()
    with pytest.raises(AssertionError, match="touch"):
        other.submit()


def test_buckets_lie_in_profiles_and_are_those_of_the_config(tmp_path: Path) -> None:
    assert set(engine_of(spec_of(tmp_path), SimulatedGpu()).buckets) <= {1, 2, 4, 8, 16}
    assert engine_of(spec_of(tmp_path, buckets=(3, 5)), SimulatedGpu()).buckets == (3, 5, 16)
    # No profile has less than 4 rows, or 9 to 11.
    gapped = spec_of(tmp_path, profiles=(), buckets=(1, 9), most=10)
    gapped.options.file.write_text(json.dumps({"x": [-1, 3], "profiles": [[4, 8, 8], [12, 12, 12]]}))
    engine = engine_of(gapped, SimulatedGpu())
    assert engine.buckets == (4, 12)
    x = images(10)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], expected(x))


def test_a_network_that_cannot_be_captured_runs_without_graphs(tmp_path: Path) -> None:
    gpu = SimulatedGpu()
    gpu.captures = False
    engine = engine_of(spec_of(tmp_path), gpu)
    assert engine.info["cuda_graphs"].startswith("no: operation not permitted")
    x = images(3)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], expected(x))
    assert gpu.launched == 0


def test_the_engine_process_answers_batches_of_several_slots(tmp_path: Path) -> None:
    """The child's own loop, over a socket and shared memory, with two batches begun before the first is waited for."""
    gpu = SimulatedGpu()
    spec = spec_of(tmp_path, slots=4, buckets=(4, 16))
    engine = engine_of(spec, gpu)
    ours = [(SharedBuffer.create("in"), SharedBuffer.create("out")) for _ in range(4)]
    theirs = [(SharedBuffer(i.descriptor), SharedBuffer(o.descriptor)) for i, o in ours]
    pipeline = child.Pipeline(engine, theirs)
    assert [nbytes >= size for (_, nbytes), size in zip(gpu.pinned, engine.largest * 4, strict=True)] == [True] * 8
    gpu.freeze()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    serving = threading.Thread(target=pipeline.serve, args=[there])
    serving.start()
    for turn in range(6):
        begun = {}
        for slot in range(4):
            x = images(1 + (slot + turn) % 16, 4 * turn + slot)
            table = Table.of([("x", "FP32", x.shape, x.nbytes)])
            ours[slot][0].reach(table.size)
            ours[slot][0].array(table.slots[0])[:] = x
            here.send(bytes([slot]) + json.dumps({"inputs": table.to_json(), "outputs": ["y"]}).encode())
            begun[slot] = x
        for _ in range(4):
            answer = here.recv(child.MESSAGE_BYTES)
            (y,) = Table.from_json(answer[1 + child.TIME.size :]).slots
            ours[answer[0]][1].reach(y.offset + y.nbytes)
            np.testing.assert_array_equal(ours[answer[0]][1].array(y), expected(begun.pop(answer[0])))
        assert not begun
    here.close()
    serving.join(60)
    assert not serving.is_alive()
    there.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"most": 17},
            r"^max_batch_size is 17, but the profiles of the plan are 1:1:4,4:8:16 .*`convoy build models/net`",
        ),
        ({"x": [-1, -1]}, r"^'x' has the free dimensions \[-1, -1\], but a plan is served with a free batch alone"),
        ({"types": {"y": "FP8"}}, "^'y' has the type FP8, which no client can send or receive$"),
        ({"types": {"x": "UINT8"}}, "^input 'x' is UINT8 in the file, FP32 in config.pbtxt$"),
        (
            {"compute_capability": "8.9"},
            "^its plan was built for GPUs of compute capability 8.9; Simulated GPU has 9.0",
        ),
        ({"fails": True}, "^Simulated GPU failed to load the plan: a batch of 16 cannot be run"),
    ],
)
def test_plans_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    gpu = SimulatedGpu()
    with pytest.raises(InvalidModel, match=reason) as caught:
        engine_of(spec_of(tmp_path, **changes), gpu)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("compute_capability", ["", "any", "9.0", "8.0"])
def test_plans_that_fit_the_gpu(tmp_path: Path, compute_capability: str) -> None:
    compatible = compute_capability == "8.0"
    spec = spec_of(tmp_path, compute_capability=compute_capability, hardware_compatible=compatible)
    engine_of(spec, SimulatedGpu()).close()


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    spec.options.file.write_bytes(b"not a plan")
    gpu = SimulatedGpu()
    reason = (
        r"^tensorrt 11.0.0.1 does not take model.plan \(Serialization assertion failed: magic tag\): "
        "`convoy build models/net`$"
    )
    with pytest.raises(InvalidModel, match=reason):
        engine_of(spec, gpu)
    assert gpu.closed


def test_too_little_memory_is_told_before_anything_is_allocated(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    size = spec.options.file.stat().st_size
    with pytest.raises(
        InvalidModel, match=r"^the plan needs 1 MiB of the memory of Simulated GPU, of which 0 of 0 MiB"
    ):
        engine_of(spec, SimulatedGpu(memory=size - 1))
    with pytest.raises(InvalidModel, match=r"^with 1 execution contexts it needs 1 MiB .* lower max_batch_size"):
        engine_of(spec, SimulatedGpu(memory=size))
    with pytest.raises(InvalidModel, match=r"set KIND_GPU in config\.pbtxt"):
        TensorRtEngine(
            replace(spec, options=replace(spec.options, device="cpu")), simulated_tensorrt.of(SimulatedGpu())
        )


def test_without_a_batch_axis(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, most=0, x=[2, 3], profiles=())
    spec.options.file.write_text(json.dumps({"x": [2, 3], "profiles": [[2, 2, 2]]}))
    spec = replace(spec, inputs=(tensor_of("x", "FP32", (2, 3)),), outputs=(tensor_of("y", "FP32", (2, 1)),))
    engine = engine_of(spec, SimulatedGpu())
    np.testing.assert_array_equal(engine.run({"x": images(2)})["y"], expected(images(2)))
