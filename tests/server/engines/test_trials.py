"""An engine serves a model only where it answers as ONNX defines: found out before, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T

from convoynet.server import engines
from convoynet.server.engines import trial, trials
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.finite import FiniteEngine
from convoynet.server.engines.onnx_file import read_onnx
from convoynet.server.engines.process import EngineProcess
from convoynet.server.engines.trials import Trials, Verdict
from convoynet.server.errors import InvalidModel
from convoynet.server.models.examination import examine
from convoynet.server.repository import repository
from convoynet.server.repository.completion import Description
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.repository import Repository
from convoynet.server.repository.specs import Defaults
from convoynet.server.spec import EngineOptions, ModelSpec
from tests.server.engine_setup import installed, spec_of
from tests.server.onnx_graphs import FLOAT, INT32, INT64, UINT8, node, write_graph
from tests.server.onnx_models import write_linear, write_pairs, write_quantized, write_texts

pytestmark = pytest.mark.skipif(
    not (installed("openvino") and installed("onnxruntime")), reason="the engines are extras"
)

B = "B"
NAN, INF = float("nan"), float("inf")


def verdict_of(spec: EngineSpec) -> Verdict:
    """What a trial in this process finds."""
    found: dict[str, Any] = {}
    for more in trial.try_model(spec):
        found |= more
    return Verdict.of(found)


class InProcess(Trials):
    """Trials in this process, which are quicker."""

    async def verdict(self, spec: EngineSpec) -> Verdict:
        return verdict_of(spec)


async def describe(file: Path, backend: str) -> Description:
    """What ONNX Runtime says of a file."""
    options = EngineOptions(backend, file, "cpu", 1, engine="onnxruntime", graph_optimization="basic")
    engine = engines.make("onnxruntime", EngineSpec(file.name, "", (), (), 0, options))
    return engine.inputs, engine.outputs


async def whole_spec(root: Path, trials: Trials | None = None) -> ModelSpec:
    """The spec of the one model in a repository, completed as the server does it."""
    sources, defaults = [Folder(root)], Defaults(4, 1, max_batch_size=8)
    (found,) = await Repository(sources, defaults, describe, trials or InProcess()).read("graph")
    assert found.spec is not None, found.reason
    return found.spec


def io(kind: int, shape: tuple[int | str, ...] = (B, 3), out: int | None = None) -> tuple[Any, Any]:
    """x and y of one shape."""
    return [("x", kind, shape)], [("y", kind if out is None else out, shape)]


# What is computed, the constants, the types of x and y, an x that tells, and what ONNX makes of it.
NUMBERS: dict[str, tuple[Any, dict[str, Any], int, int, Any, Any]] = {
    "INT64 beyond 32 bits": (
        node("Add", "x c", "y"),
        {"c": np.int64(1)},
        INT64,
        INT64,
        [2**40 + 5, -(2**45), 2**31],
        [2**40 + 6, 1 - 2**45, 2**31 + 1],
    ),
    "INT64 remainder": (
        node("Mod", "x c", "y"),
        {"c": np.int64(1000003)},
        INT64,
        INT64,
        [2**40 + 5, 2**50 + 1, 7],
        [(2**40 + 5) % 1000003, (2**50 + 1) % 1000003, 7],
    ),
    "INT64 passed through": (
        node("Identity", "x", "y"),
        {},
        INT64,
        INT64,
        [2**53 + 1, -1, 2**62],
        [2**53 + 1, -1, 2**62],
    ),
    "FP64": (
        node("Mul", "x c", "y"),
        {"c": np.float64(3)},
        T.DOUBLE,
        T.DOUBLE,
        [0.1, 1e300, 16777217.0],
        [0.1 * 3, 3e300, 50331651.0],
    ),
    "UINT32 to INT64": (
        node("Cast", "x", "y", to=INT64),
        {},
        T.UINT32,
        INT64,
        [2**32 - 1, 2**31, 7],
        [2**32 - 1, 2**31, 7],
    ),
    "UINT64": (
        node("Add", "x c", "y"),
        {"c": np.uint64(1)},
        T.UINT64,
        T.UINT64,
        [2**63, 2**40, 1],
        [2**63 + 1, 2**40 + 1, 2],
    ),
    "INT32 divided": (
        node("Div", "x c", "y"),
        {"c": np.int32(2)},
        INT32,
        INT32,
        [-3, 2**31 - 1, 2**24 + 3],
        [-1, 2**30 - 1, 2**23 + 1],
    ),
    "INT32 multiplied": (
        node("Mul", "x c", "y"),
        {"c": np.int32(3)},
        INT32,
        INT32,
        [2**24 + 1, 5, -(2**25) - 1],
        [3 * 2**24 + 3, 15, -3 * 2**25 - 3],
    ),
    "INT32 widened": (
        node("Cast", "x", "y", to=INT64),
        {},
        INT32,
        INT64,
        [2**31 - 1, -(2**31), 7],
        [2**31 - 1, -(2**31), 7],
    ),
    "UINT8 wraps": (node("Add", "x c", "y"), {"c": np.uint8(10)}, UINT8, UINT8, [1, 250, 255], [11, 4, 9]),
    "UINT8 below 0": (node("Sub", "x c", "y"), {"c": np.uint8(10)}, UINT8, UINT8, [1, 250, 9], [247, 240, 255]),
    "INT8 wraps": (node("Add", "x c", "y"), {"c": np.int8(100)}, T.INT8, T.INT8, [27, 28, -128], [127, -128, -28]),
    "floats to INT64": (
        node("Cast", "x", "y", to=INT64),
        {},
        FLOAT,
        INT64,
        [2.0**40, -(2.0**33), 7.9],
        [2**40, -(2**33), 7],
    ),
    "floats to INT32": (node("Cast", "x", "y", to=INT32), {}, FLOAT, INT32, [-1.9, 100, 2.0**30], [-1, 100, 2**30]),
    "halves to even": (node("Round", "x", "y"), {}, FLOAT, FLOAT, [0.5, 1.5, -2.5], [0, 2, -2]),
    "NaN and ReLU": (node("Relu", "x", "y"), {}, FLOAT, FLOAT, [NAN, -1, INF], [NAN, 0, INF]),
    "NaN and Max": (node("Max", "x c", "y"), {"c": np.float32(0)}, FLOAT, FLOAT, [NAN, -1, 2], [NAN, 0, 2]),
    "NaN and Min": (node("Min", "x c", "y"), {"c": np.float32(0)}, FLOAT, FLOAT, [NAN, -1, -INF], [NAN, -1, -INF]),
    "NaN and Clip": (
        node("Clip", "x l c", "y"),
        {"l": np.float32(0), "c": np.float32(6)},
        FLOAT,
        FLOAT,
        [NAN, -1, INF],
        [NAN, 0, 6],
    ),
    "FP16": (node("Add", "x c", "y"), {"c": np.float16(1)}, T.FLOAT16, T.FLOAT16, [1.5, -1, 1000], [2.5, 0, 1001]),
    "BF16": (node("Cast", "x", "y", to=FLOAT), {}, T.BFLOAT16, FLOAT, [1.5, -2, 1.0078125], [1.5, -2, 1.0078125]),
    "to BF16": (node("Cast", "x", "y", to=T.BFLOAT16), {}, FLOAT, T.BFLOAT16, [1.5, -2, 257], [1.5, -2, 256]),
    "BOOL": (node("Not", "x", "y"), {}, T.BOOL, T.BOOL, [True, False, True], [False, True, False]),
}


@pytest.mark.parametrize("what", NUMBERS)
async def test_whatever_engine_serves_the_numbers_are_those_of_onnx(tmp_path: Path, what: str) -> None:
    one, constants, kind, out, x, y = NUMBERS[what]
    write_graph(tmp_path, [one], *io(kind, out=out), constants)
    spec = await whole_spec(tmp_path)
    examined = await examine(spec, InProcess())
    loaded = engines.load(EngineSpec.of(examined.spec))
    assert ("passed_over" in examined.told) == (examined.spec.engine.engine == "onnxruntime")
    for rows in (1, 2):  # also the size that OpenVINO has compiled the graph for
        given = np.array([x] * rows, spec.inputs[0].dtype)
        found = loaded.engine.run({"x": given})["y"]
        assert found.dtype == spec.outputs[0].dtype
        np.testing.assert_array_equal(found, np.array([y] * rows, found.dtype))
    loaded.engine.close()


async def test_what_a_model_does_after_floats_is_tried_too(tmp_path: Path) -> None:
    """The inputs are plain floats; what OpenVINO makes of the numbers within is not."""
    graphs: dict[str, tuple[list[Any], dict[str, Any], int, list[int | str]]] = {
        "places beyond 32 bits": (
            [node("ArgMax", "x", "a", axis=1, keepdims=1), node("Add", "a c", "y")],
            {"c": np.int64(2**40)},
            INT64,
            [B, 1],
        ),
        "a NaN made within": ([node("Log", "x", "a"), node("Relu", "a", "y")], {}, FLOAT, [B, 3]),
        "a large product": (
            [node("Cast", "x", "a", to=INT64), node("Mul", "a c", "y")],
            {"c": np.int64(10**9 + 7)},
            INT64,
            [B, 3],
        ),
        "what is always different": ([node("RandomNormalLike", "x", "a"), node("Add", "x a", "y")], {}, FLOAT, [B, 3]),
    }
    for name, (nodes, constants, out, shape) in graphs.items():
        write_graph(tmp_path / name, nodes, [("x", FLOAT, [B, 3])], [("y", out, shape)], constants)
        examined = await examine(await whole_spec(tmp_path / name), InProcess())
        assert examined.spec.engine.engine == "onnxruntime", name
        assert examined.told["passed_over"], name


async def test_of_equal_numbers_the_first_comes_first_in_every_batch(tmp_path: Path) -> None:
    outputs = [("v", FLOAT, [B, 2]), ("i", INT64, [B, 2])]
    nodes = [node("TopK", "x k", "v i", axis=1)]
    write_graph(tmp_path, nodes, [("x", FLOAT, [B, 4])], outputs, {"k": np.int64([2])})
    examined = await examine(await whole_spec(tmp_path), InProcess())
    engine = engines.load(EngineSpec.of(examined.spec)).engine
    for rows in range(1, 9):
        found = engine.run({"x": np.array([[5, 5, 1, 5]] * rows, np.float32)})
        assert (found["v"].tolist(), found["i"].tolist()) == ([[5, 5]] * rows, [[0, 1]] * rows)
    engine.close()


async def test_what_onnx_runtime_refuses_is_answered_by_no_other(tmp_path: Path) -> None:
    """OpenVINO reads 0 beyond a table, and beyond the end of an odd number of rows."""
    table = {"t": np.arange(1, 5, dtype=np.float32)}
    write_graph(tmp_path / "a", [node("Gather", "t x", "y")], *io(INT32, out=FLOAT), table)
    write_pairs(tmp_path / "b")
    for spec in (await whole_spec(tmp_path / "a"), spec_of(tmp_path / "b", "")):
        examined = await examine(spec, InProcess())
        assert examined.spec.engine.engine == "onnxruntime"
        assert "that ONNX Runtime refuses" in examined.told["passed_over"]


async def test_networks_stay_with_the_faster_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "adds_in_16_bits", lambda: False)  # else INT8 stays with the one that is exact
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 3, 3, 3), np.float32), "v": rng.standard_normal((8, 10), np.float32)}
    nodes = [node("Conv", "x w", "a", pads=[1] * 4), node("Relu", "a", "b"), node("GlobalAveragePool", "b", "p")]
    nodes += [node("Flatten", "p", "f"), node("MatMul", "f v", "y"), node("ArgMax", "y", "best", axis=1, keepdims=0)]
    outputs = [("y", FLOAT, [B, 10]), ("best", INT64, [B])]
    write_graph(tmp_path / "net", nodes, [("x", FLOAT, [B, 3, 16, 16])], outputs, weights)
    examined = await examine(await whole_spec(tmp_path / "net"), InProcess())
    assert examined.spec.engine.engine == ""
    assert examined.told == {"compared": "as ONNX Runtime, on 5 batches of test numbers"}
    write_quantized(tmp_path / "int8", numbers=T.INT8, scale=FLOAT)
    verdict = verdict_of(EngineSpec.of(spec_of(tmp_path / "int8", "")))
    assert (verdict.engine, verdict.differs) == ("openvino", "")


def test_a_batch_that_is_not_finite_runs_in_the_other_engine(tmp_path: Path) -> None:
    write_linear(tmp_path)
    spec = EngineSpec.of(spec_of(tmp_path, "openvino"))
    made: list[engines.Engine] = []

    def other() -> engines.Engine:
        made.append(engines.make("onnxruntime", spec))
        return made[-1]

    engine = FiniteEngine(engines.make("openvino", spec), other, spec)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(engine.run({"input": x})["logits"], [[1.5, 2, 2]] * 2)
    assert not made
    for number in (np.nan, np.inf):
        x[1, 0] = number
        found = engine.run({"input": x})["logits"]
        np.testing.assert_array_equal(found[0], [1.5, 2, 2])
        assert not np.isfinite(found[1, 0])
    assert len(made) == 1
    engine.close()


async def test_an_engine_that_the_config_asks_for_is_compared_and_said_to_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 'parameters { key: "engine" value { string_value: "openvino" } }'
    write_graph(tmp_path, [node("Add", "x c", "y")], *io(UINT8), {"c": np.uint8(10)}, config=asked)
    examined = await examine(await whole_spec(tmp_path), InProcess())
    assert examined.spec.engine.engine == "openvino"
    assert "OpenVINO's output 'y' is 255" in examined.told["compared"]
    assert "otherwise than ONNX Runtime, but the config asks for it" in caplog.text


async def test_without_onnx_runtime_nothing_is_compared_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_linear(tmp_path)

    def find(name: str) -> object:
        return None if name == "onnxruntime" else name

    monkeypatch.setattr(trial, "find_spec", find)
    monkeypatch.setattr(engines, "find_spec", find)
    verdict = verdict_of(EngineSpec.of(spec_of(tmp_path, "")))
    assert verdict.uncompared == "ONNX Runtime is not installed"
    assert verdict.shown  # OpenVINO's own answers tell of the rows

    class Known(Trials):
        async def verdict(self, spec: EngineSpec) -> Verdict:
            return verdict

    examined = await examine(spec_of(tmp_path, ""), Known())
    assert examined.told == {"compared": "not with ONNX Runtime: ONNX Runtime is not installed"}
    assert "not with ONNX Runtime" in caplog.text


async def test_an_engine_that_kills_the_process_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_linear(tmp_path)
    command = trials.processes.command
    killer = (
        "import os, signal, sys; from convoynet.server import engines; from convoynet.server.engines import trial\n"
        "make = engines.make\n"
        "def made(name, *rest, **more):\n"
        "    if name in WHO: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return make(name, *rest, **more)\n"
        "engines.make = made; trial.main()"
    )

    def broken(who: tuple[str, ...]) -> Callable[..., list[str]]:
        return lambda module: [command(module)[0], "-c", killer.replace("WHO", repr(who))]

    monkeypatch.setattr(trials.processes, "command", broken(("openvino",)))
    examined = await examine(spec_of(tmp_path, ""), Trials(tmp_path))
    assert examined.spec.engine.engine == "onnxruntime"
    assert "died" in examined.told["passed_over"]
    assert examined.together
    monkeypatch.setattr(trials.processes, "command", broken(("openvino", "onnxruntime")))
    examined = await examine(spec_of(tmp_path, ""), Trials(tmp_path))
    assert examined.spec.engine.engine == "onnxruntime"
    assert not (tmp_path / "trials.json").exists()  # the next start tries again


async def test_a_trial_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_linear(tmp_path)
    python = trials.processes.command("m")[0]
    monkeypatch.setattr(trials.processes, "command", lambda _: [python, "-c", "import time; time.sleep(1000)"])
    monkeypatch.setattr(trials, "_SECONDS", 0.2)
    verdict = await Trials(tmp_path).verdict(EngineSpec.of(spec_of(tmp_path, "")))
    assert verdict.died


async def test_a_verdict_is_kept_for_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_linear(tmp_path / "models")
    spec = EngineSpec.of(spec_of(tmp_path / "models", ""))
    verdict = await Trials(tmp_path).verdict(spec)
    assert (verdict.engine, verdict.differs, verdict.shown) == ("openvino", "", True)

    async def tried(*_: object) -> Verdict:
        raise AssertionError("it is known")

    monkeypatch.setattr(trials, "_try", tried)
    assert await Trials(tmp_path).verdict(spec) == verdict
    moved = tmp_path / "elsewhere.onnx"
    moved.write_bytes((folder / "1" / "model.onnx").read_bytes())
    monkeypatch.setattr(trials, "_EDITION", -1)
    with pytest.raises(AssertionError, match="it is known"):
        await Trials(tmp_path).verdict(spec)
    monkeypatch.undo()
    monkeypatch.setattr(trials, "_try", tried)
    with moved.open("ab") as opened:
        opened.write(b"\x18\x01")  # a field that changes nothing, but it is another content
    other = replace(spec, options=replace(spec.options, file=moved, files=()))
    with pytest.raises(AssertionError, match="it is known"):
        await Trials(tmp_path).verdict(other)


ROWS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "each for itself": ([node("Softmax", "x", "y", axis=1)], {}, ""),
    "softmax over the batch": ([node("Softmax", "x", "y", axis=0)], {}, "otherwise alone"),
    "less the mean of the batch": (
        [node("ReduceMean", "x z", "m"), node("Sub", "x m", "y")],
        {"z": np.int64([0])},
        "otherwise alone",
    ),
    "sums along the batch": ([node("CumSum", "x z", "y")], {"z": np.int64(0)}, "otherwise alone"),
    "the largest of the batch": (
        [node("ReduceMax", "x z", "m"), node("Div", "x m", "y")],
        {"z": np.int64([0])},
        "otherwise alone",
    ),
    "objects": (
        [node("ReduceSum", "x o", "s", keepdims=0), node("Greater", "s z", "k"), node("Compress", "x k", "y", axis=0)],
        {"o": np.int64([1]), "z": np.float32(0)},
        "has the shape",
    ),
    "twice the rows": ([node("Concat", "x x", "y", axis=0)], {}, "has the shape"),
    "one row for all": ([node("ReduceMax", "x z", "y")], {"z": np.int64([0])}, "refused"),
    "no rows": ([node("ReduceMax", "x", "y", keepdims=0)], {}, "has the shape"),
    "rows and columns": ([node("Transpose", "x", "y")], {}, "refused"),
}


@pytest.mark.parametrize("what", ROWS)
async def test_a_batch_axis_is_believed_when_runs_show_it(tmp_path: Path, what: str) -> None:
    nodes, constants, told = ROWS[what]
    shape: list[int | str] | None = None if what in ("no rows", "rows and columns") else [B, 3]
    write_graph(tmp_path, nodes, [("x", FLOAT, [B, 3])], [("y", FLOAT, shape)], constants)
    spec = await whole_spec(tmp_path)
    assert spec.batch.max_rows == (0 if told else 8)
    stated = f"max_batch_size: 8 {INPUT} {OUTPUT}"
    write_graph(tmp_path / "stated", nodes, [("x", FLOAT, [B, 3])], [("y", FLOAT, shape)], constants, config=stated)
    by_name = spec_of(tmp_path / "stated", "onnxruntime")
    if told == "refused":  # the file itself says that there is no such axis
        with pytest.raises(InvalidModel, match=r"in the file|fixed batch"):
            engines.load(EngineSpec.of(by_name))
        return
    examined = await examine(by_name, InProcess())
    assert examined.together == (not told)
    assert told in examined.told.get("batching", "")


INPUT = 'input { name: "x" data_type: TYPE_FP32 dims: [3] }'
OUTPUT = 'output { name: "y" data_type: TYPE_FP32 dims: [3] }'


async def test_names_in_the_file_speak_against_a_batch_axis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    relu = [node("Relu", "x", "y")]
    write_graph(tmp_path / "a", relu, [("x", FLOAT, ["B", 3])], [("y", FLOAT, ["K", 3])])
    assert (await whole_spec(tmp_path / "a")).batch.max_rows == 0
    assert "'x' 'B', of 'y' 'K'" in caplog.text
    write_graph(tmp_path / "b", relu, [("x", FLOAT, ["B", 3])], [("y", FLOAT, ["K", 3])], config="max_batch_size: 4")
    assert (await whole_spec(tmp_path / "b")).batch.max_rows == 4  # who says so himself knows it
    write_graph(tmp_path / "c", relu, [("x", FLOAT, ["B", 3])], [("y", FLOAT, [None, 3])])
    assert (await whole_spec(tmp_path / "c")).batch.max_rows == 8


async def test_an_unknown_rank_is_not_rank_0(tmp_path: Path) -> None:
    nodes = [node("Mul", "x two", "a"), node("Squeeze", "a", "y")]
    shapes = [("x", FLOAT, [B, "N", 1])], [("y", FLOAT, None)]
    write_graph(tmp_path / "a", nodes, *shapes, {"two": np.float32([2])})
    assert read_onnx(tmp_path / "a/graph/1/model.onnx").unranked == {"y"}
    spec = await whole_spec(tmp_path / "a")
    assert [(t.name, t.dims) for t in spec.outputs] == [("y", (-1, -1))]
    x = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    loaded = engines.load(EngineSpec.of((await examine(spec, InProcess())).spec))
    np.testing.assert_array_equal(loaded.engine.run({"x": x})["y"], 2 * x[..., 0])
    loaded.engine.close()
    write_graph(tmp_path / "b", [node("Relu", "x", "y")], [("x", FLOAT, None)], [("y", FLOAT, None)])
    with pytest.raises(InvalidModel, match="does not say how many dimensions input 'x' has"):
        await whole_spec(tmp_path / "b")


WARM = 'model_warmup { name: "w" batch_size: 1 inputs { key: "x" value { dims: [ 3, 8, 8 ] zero_data: true } } }'


@pytest.mark.parametrize("warm", [WARM, ""], ids=["the sizes of model_warmup", "sizes that are found"])
async def test_free_dimensions_that_1_does_not_fit(tmp_path: Path, warm: str) -> None:
    write_graph(
        tmp_path, [node("Conv", "x w", "y")], [("x", FLOAT, [B, 3, "H", "W"])], [("y", FLOAT, [B, 2, "h", "w"])],
        {"w": np.ones((2, 3, 5, 5), np.float32)}, config=warm,
    )  # fmt: skip
    examined = await examine(await whole_spec(tmp_path), InProcess())
    assert (examined.spec.batch.max_rows, examined.spec.shapes) == (8, {"x": (3, 8, 8)})
    loaded = engines.load(EngineSpec.of(examined.spec))
    assert (loaded.cold, loaded.passed_over) == ("", "")
    assert loaded.engine.run({"x": np.ones((1, 3, 8, 8), np.float32)})["y"].ravel().tolist() == [75] * 32
    loaded.engine.close()


async def test_what_cannot_be_warmed_up_blindly_is_served_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Its length must be a multiple of 13.
    shapes = [("x", FLOAT, [B, "L"])], [("y", FLOAT, [B, "n", 13])]
    write_graph(tmp_path / "a", [node("Reshape", "x s", "y")], *shapes, {"s": np.int64([0, -1, 13])})
    examined = await examine(await whole_spec(tmp_path / "a"), InProcess())
    assert examined.spec.warmup == ()
    assert "state one in model_warmup" in caplog.text
    loaded = engines.load(EngineSpec.of(examined.spec))
    assert loaded.engine.run({"x": np.ones((1, 26), np.float32)})["y"].shape == (1, 2, 13)
    loaded.engine.close()
    config = 'max_batch_size: 8 model_warmup { batch_size: 1 inputs { key: "x" value { dims: [ 12 ] } } }'
    write_graph(tmp_path / "b", [node("Reshape", "x s", "y")], *shapes, {"s": np.int64([0, -1, 13])}, config=config)
    examined = await examine(await whole_spec(tmp_path / "b"), InProcess())
    with pytest.raises(InvalidModel, match="warm-up with a batch of 1 failed"):
        engines.load(EngineSpec.of(examined.spec))


async def test_a_graph_without_inputs_has_an_answer(tmp_path: Path) -> None:
    write_graph(tmp_path, [node("Constant", "", "y", value_floats=[1.0, 2.0])], [], [("y", FLOAT, [2])])
    spec = await whole_spec(tmp_path)
    process = await EngineProcess.start((await examine(spec, InProcess())).spec)
    assert (await process.run([{}])).answers[0]["y"].tolist() == [1, 2]
    await process.close()


def test_a_file_that_changes_after_it_was_checked_is_not_run(tmp_path: Path) -> None:
    folder = write_graph(
        tmp_path, [node("Mul", "x w", "y")], *io(FLOAT), {"w": np.float32([2])}, external="weights.bin",
        config=f"max_batch_size: 8 {INPUT} {OUTPUT}",
    )  # fmt: skip
    spec = EngineSpec.of(spec_of(tmp_path))
    assert [Path(name).name for name, *_ in spec.options.files] == ["model.onnx", "weights.bin"]
    engines.load(spec).engine.close()
    for name in ("weights.bin", "model.onnx"):
        file = folder / "1" / name
        before, content = file.stat(), file.read_bytes()
        file.write_bytes(content)
        engines.load(spec).engine.close()  # what it holds is the same
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p leaves it
        with pytest.raises(InvalidModel, match=f"{name} was changed after it had been checked"):
            engines.load(spec)
        file.write_bytes(content)
    (folder / "1" / "weights.bin").unlink()
    with pytest.raises(InvalidModel, match=r"weights\.bin was changed"):
        engines.load(spec)
    (found,) = repository.scan(tmp_path, Defaults(4, 1))
    assert "weights in 'weights.bin', which is not there" in found.reason


def test_texts_are_tried_too(tmp_path: Path) -> None:
    write_texts(tmp_path)
    verdict = verdict_of(EngineSpec.of(spec_of(tmp_path, "")))
    assert verdict.shown
    assert "none of a type that this engine has" in verdict.differs


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x3a\xff\xff\xff\x7f", b"\x3a\x7f"])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"model\.onnx is no ONNX file"):
        read_onnx(file)


def test_graphs_within_graphs_have_an_end(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        size, head = len(content), bytearray()
        while size > 127:
            head.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *head, size]) + content

    graph = b""
    for _ in range(40):
        graph = field(1, field(5, field(6, graph)))  # a graph's node's attribute's graph
    (tmp_path / "model.onnx").write_bytes(field(7, graph))
    with pytest.raises(InvalidModel, match="lie more than 32 deep"):
        read_onnx(tmp_path / "model.onnx")
