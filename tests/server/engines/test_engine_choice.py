"""How the engine of a model is chosen, what it reads from the file, and which files it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from convoynet import processor
from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import InvalidModel
from convoynet.server.repository import repository
from convoynet.server.spec import EngineOptions
from tests.server.engine_setup import installed, rows, spec_of
from tests.server.onnx_models import (
    LINEAR_WEIGHTS,
    write_large_sums,
    write_linear,
    write_quantized,
    write_segmenter,
    write_signed_sums,
    write_texts,
)


def _computes(engine: engines.Engine) -> None:
    for count in range(1, 9):  # in a fixed batch as well as between them
        request = rows(count)
        np.testing.assert_allclose(engine.run(request)["logits"], request["input"] @ LINEAR_WEIGHTS, rtol=1e-5)
    engine.close()


async def test_openvino_is_given_the_batches_that_it_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="the engine is an extra")
    from convoynet.server.engines import openvino

    write_linear(tmp_path)
    spec = EngineSpec.of(spec_of(tmp_path, "openvino"))
    assert spec.max_rows == 8
    fixed = {1: 1.0, 2: 1.2, 3: 1.5, 4: 1.4, 6: 3.0, 8: 2.0}
    seconds = iter(x for rows, own in fixed.items() for x in (1.5 * rows, own))
    monkeypatch.setattr(openvino, "_LARGE_SECONDS", 100)
    monkeypatch.setattr(openvino, "_FIXED_SECONDS", 1000)
    monkeypatch.setattr(openvino, "_seconds", lambda *_: next(seconds))
    engine = openvino.OpenVinoEngine(spec)
    assert engine.buckets == (1, 2, 4, 8)  # three rows take as long as four, six longer than eight
    assert engine.info["fixed_batches"] == "1 2 4 8"
    _computes(engine)
    seconds = iter((1.5, 1.0, 3.0, 2.9))
    engine = openvino.OpenVinoEngine(spec)
    assert engine.info["fixed_batches"] == "1"  # of two rows nothing was gained, and larger ones were not tried
    assert engine.buckets == tuple(range(1, 9))
    _computes(engine)
    seconds = iter((1.5, 1.4))
    engine = openvino.OpenVinoEngine(spec)
    assert engine.buckets == ()
    _computes(engine)


async def test_openvino_is_given_the_batches_that_the_config_states(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the engine is an extra")
    write_linear(tmp_path)
    engine = engines.load(replace(EngineSpec.of(spec_of(tmp_path, "openvino")), buckets=(5, 8))).engine
    assert engine.buckets == (5, 8)
    assert set(engine.info["fixed_batches"].split()) <= {"5", "8"}
    _computes(engine)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
async def test_describe_reads_the_file(tmp_path: Path, backend: str) -> None:
    if not installed(backend):
        pytest.skip(f"{backend} is an extra")
    folder = write_segmenter(tmp_path, cell=4)
    inputs, outputs = await EngineProcess.describe(folder / "1" / "model.onnx", backend)
    assert [(t.name, t.datatype, t.dims) for t in inputs] == [("input", "FP32", (-1, 3, 40, 40))]
    assert [(t.name, t.datatype, t.dims) for t in outputs] == [
        ("logits", "FP32", (-1, 3, 10, 10)),
        ("classes", "UINT8", (-1, 10, 10)),
    ]


@pytest.mark.parametrize("engine_name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('name: "input"', 'name: "image"', "states the input 'image', but the file has input"),
        ('name: "logits"', 'name: "scores"', "states the output 'scores', but the file has logits"),
        ("TYPE_FP32\n  dims: 4", "TYPE_UINT8\n  dims: 4", "input 'input' is FP32 in the file, UINT8"),
        ("dims: 4", "dims: 5", r"input 'input' has shape \[-1, 4\] in the file, but \[-1, 5\]"),
        ("KIND_CPU", "KIND_GPU", "asks for a GPU|could not start|OpenVINO runs on the CPU"),
    ],
)
def test_a_file_that_is_not_what_the_config_says(
    tmp_path: Path, engine_name: str, before: str, after: str, reason: str
) -> None:
    pytest.importorskip(engine_name, reason="the engine is an extra")
    config = write_linear(tmp_path) / "config.pbtxt"
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, after))
    with pytest.raises(InvalidModel, match=reason):
        engines.load(EngineSpec.of(spec_of(tmp_path, engine_name)))


def options(**stated: str) -> EngineOptions:
    return EngineOptions(
        **{"backend": "onnxruntime", "file": Path("model.onnx"), "device": "cpu", "threads": 1, **stated}
    )


def test_openvino_is_chosen_on_x86_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="the engine is an extra")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    both = ("openvino", "onnxruntime") if installed("onnxruntime") else ("openvino",)
    assert engines.choose(options()) == both
    assert engines.choose(options(engine="onnxruntime")) == ("onnxruntime",)
    assert engines.choose(options(engine="openvino")) == ("openvino",)
    assert engines.choose(options(backend="openvino")) == ("openvino",)
    assert engines.choose(options(device="gpu")) == ("onnxruntime",)
    monkeypatch.setattr(engines, "visible_gpus", lambda: 1)
    assert engines.choose(options(device="auto")) == ("onnxruntime",)
    monkeypatch.setattr(engines, "visible_gpus", lambda: 0)
    assert engines.choose(options(device="auto")) == both
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert engines.choose(options()) == ("onnxruntime",)


async def test_onnx_runtime_takes_what_openvino_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not installed("openvino") or not installed("onnxruntime"):
        pytest.skip("the engines are extras")
    write_texts(tmp_path)
    process = await EngineProcess.start(spec_of(tmp_path, ""))
    await process.close()
    assert process.info["runtime"].startswith("ONNX Runtime")
    assert "input 'input'" in process.info["passed_over"]
    assert "runs in ONNX Runtime" in caplog.text


@pytest.mark.parametrize("engine_name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("numbers", "scale", "want"),
    [
        (TensorProto.INT8, TensorProto.FLOAT, [0, 0.51, 1.2, 3]),
        (TensorProto.UINT8, TensorProto.FLOAT16, [0, 0.51, 1.2, 3]),
        (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT, [0, 0.48, 1.2, 2.88]),
        (TensorProto.INT8, TensorProto.BFLOAT16, None),
    ],
    ids=["INT8", "UINT8 with FP16", "FP8", "INT8 with BF16"],
)
def test_quantized_graphs_are_computed_right_or_refused(
    tmp_path: Path, engine_name: str, numbers: int, scale: int, want: list[float] | None
) -> None:
    pytest.importorskip(engine_name, reason="the engine is an extra")
    write_quantized(tmp_path, numbers=numbers, scale=scale)
    config = tmp_path / "quantized" / "config.pbtxt"
    config.write_text(config.read_text() + 'parameters { key: "graph_optimization" value { string_value: "basic" } }\n')
    spec = EngineSpec.of(spec_of(tmp_path, engine_name))
    if want is None:
        with pytest.raises(InvalidModel, match=r"bfloat16|NOT_IMPLEMENTED"):
            engines.load(spec)
        return
    engine = engines.load(spec).engine
    x = np.array([[-1, 0.5, 1.2, 3]], np.float32)
    np.testing.assert_allclose(engine.run({"input": x})["logits"][0], want, rtol=1e-3)
    engine.close()


def test_the_spec_travels_whole(tmp_path: Path) -> None:
    write_segmenter(tmp_path)
    spec = EngineSpec.of(spec_of(tmp_path))
    assert EngineSpec.from_json(spec.to_json()) == spec


def test_a_parameter_that_is_none_of_the_choices(tmp_path: Path) -> None:
    config = write_linear(tmp_path) / "config.pbtxt"
    config.write_text(config.read_text() + 'parameters { key: "engine" value { string_value: "tvm" } }\n')
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert found.reason == "parameter 'engine' must be onnxruntime or openvino, got 'tvm'"


def test_an_engine_that_the_export_verified_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    both = {"openvino": "OpenVINO 1: 40 dB", "onnxruntime": "ONNX Runtime 1: 40 dB"}
    one = {"onnxruntime": "ONNX Runtime 1: 40 dB"}
    other = {"openvino": "OpenVINO 1: far"}
    assert engines.choose(replace(options(), verified=both)) == ("openvino", "onnxruntime")
    assert engines.choose(replace(options(), verified=one)) == ("onnxruntime",)
    assert engines.choose(replace(options(), verified=one, excluded=other)) == ("onnxruntime",)
    assert engines.choose(replace(options(), excluded=one)) == ("openvino",)
    # What nobody verified here, and nobody excluded.
    assert engines.choose(replace(options(), verified={"tensorrt": "40 dB"})) == ("openvino", "onnxruntime")
    # Who asks for an engine gets it.
    assert engines.choose(replace(options(engine="openvino"), verified=one, excluded=other)) == ("openvino",)
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else True)
    assert engines.choose(replace(options(), verified={"openvino": "40 dB"})) == ("onnxruntime",)
    with pytest.raises(InvalidModel, match=r"excluded onnxruntime, .*ONNX Runtime 1: 40 dB; .*verified \(openvino\)"):
        engines.choose(replace(options(), verified={"openvino": "40 dB"}, excluded=one))


VERIFIED = '{"openvino": "OpenVINO 1.0: 40 dB", "onnxruntime": "ONNX Runtime 1.0: 41 dB"}'


@pytest.mark.parametrize(
    ("parameters", "chosen"),
    [
        ({"verified_engines": VERIFIED}, ("openvino", "onnxruntime")),
        ({"verified_engines": '{"onnxruntime": "x"}'}, ("onnxruntime",)),
        ({"excluded_engines": '{"openvino": "x"}'}, ("onnxruntime",)),
        ({"excluded_engines": '{"openvino": "x"}', "verified_version": "1"}, ("onnxruntime",)),
        ({"excluded_engines": '{"openvino": "x"}', "verified_version": "2"}, ("openvino", "onnxruntime")),
        ({"verified_engines": "{}"}, ("openvino", "onnxruntime")),
    ],
    ids=["both", "one", "the other", "of this version", "of another version", "nothing"],
)
def test_what_config_states_of_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, str], chosen: tuple[str, ...]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    _state(write_linear(tmp_path), parameters)
    assert engines.choose(spec_of(tmp_path, "").engine) == chosen


@pytest.mark.parametrize(
    "stated", ["[]", "openvino", '{"openvino": 1}', '{"openvino', '{"tensorflow": "x"}', "[" * 9999]
)
@pytest.mark.parametrize("parameter", ["verified_engines", "excluded_engines"])
def test_what_config_cannot_state_of_engines(tmp_path: Path, parameter: str, stated: str) -> None:
    _state(write_linear(tmp_path), {parameter: stated})
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert found.spec is None
    assert f"parameter '{parameter}'" in found.reason


def _state(folder: Path, parameters: dict[str, str]) -> None:
    config = folder / "config.pbtxt"
    lines = [f'parameters {{ key: "{k}" value {{ string_value: {json.dumps(v)} }} }}' for k, v in parameters.items()]
    config.write_text("\n".join((config.read_text(), *lines)))


@pytest.mark.parametrize("engine_name", ["onnxruntime", ""], ids=["ONNX Runtime", "by default"])
def test_sums_of_8_bit_products_do_not_overflow_on_any_processor(tmp_path: Path, engine_name: str) -> None:
    """Without VNNI, pairs of them are added in 16 bits where nobody asks for more: half of these would be 101."""
    pytest.importorskip("onnxruntime", reason="the engine is an extra")
    write_large_sums(tmp_path)
    spec = EngineSpec.of(spec_of(tmp_path, engine_name))
    for count in (1, 8):
        x = np.full((count, 64), 255, np.float32)
        want = np.array([[127, 100, -127, 1]] * count) * 64 * 255
        np.testing.assert_array_equal(engines.load(spec).engine.run({"input": x})["logits"], want)


def test_a_convolution_of_signed_numbers_alone_is_taken_on_any_processor(tmp_path: Path) -> None:
    """Without VNNI ONNX Runtime has no kernel that adds its products in 32 bits, and refuses to be asked for it."""
    pytest.importorskip("onnxruntime", reason="the engine is an extra")
    write_signed_sums(tmp_path)
    x = np.full((2, 1, 8, 8), 127, np.int8)
    found = engines.load(EngineSpec.of(spec_of(tmp_path, "onnxruntime"))).engine.run({"input": x})["logits"]
    np.testing.assert_array_equal(found, np.array([[127, 100, -127, 1]] * 2).reshape(2, 4, 1, 1))


@pytest.mark.parametrize("narrow", [True, False], ids=["without VNNI", "with it"])
def test_openvino_says_where_its_sums_may_overflow(
    tmp_path: Path, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name, reason="the engine is an extra")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(engines, "adds_in_16_bits", lambda: narrow)
    monkeypatch.setattr("convoynet.server.engines.openvino.adds_in_16_bits", lambda: narrow)
    write_large_sums(tmp_path / "int8")
    write_linear(tmp_path / "float")
    told = {}
    for name, preferred in {"int8": "onnxruntime" if narrow else "openvino", "float": "openvino"}.items():
        assert engines.choose(spec_of(tmp_path / name, "").engine)[0] == preferred
        told[name] = engines.load(EngineSpec.of(spec_of(tmp_path / name, "openvino"))).engine.info
    assert ("inexact" in told["int8"], "inexact" in told["float"]) == (narrow, False)


def test_a_processor_adds_in_16_bits_where_its_flags_say_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, narrow in {
        "x86_64 flags : sse4_2 avx avx2": True,
        "x86_64 flags : avx2 avx512f": True,
        "x86_64 flags : avx2 avx512f avx512_vnni": False,
        "x86_64 flags : avx2 avx_vnni": False,
        "aarch64 Features : asimddp": False,
        "x86_64": False,
    }.items():
        monkeypatch.setattr(processor, "processor", lambda flags=flags: flags)
        assert processor.adds_in_16_bits() == narrow, flags


async def test_sums_that_may_overflow_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino", reason="the engine is an extra")
    write_large_sums(tmp_path)
    process = await EngineProcess.start(spec_of(tmp_path, "openvino"))
    await process.close()
    assert ("products of 8 bits in 16 bits" in caplog.text) == processor.adds_in_16_bits()
