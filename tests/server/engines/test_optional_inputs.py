"""Inputs that a request may leave out: the file has a default for each, and the config says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import ModelSpec, TensorSpec
from convoynet.server.types import InferRequest
from tests.server.conftest import Serving, code_of
from tests.server.engine_setup import installed, spec_of
from tests.server.onnx_models import write_colors

ENGINES = [pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason="is an extra"))
           for name in ("onnxruntime", "openvino")]  # fmt: skip
Images = NDArray[np.uint8]


def images(count: int) -> Images:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)


def maps(given: Images, classes: list[int]) -> NDArray[np.float64]:
    """What a model that explains answers."""
    return np.array([i.mean(2) if c < 0 else i[..., c] for i, c in zip(given.astype(float), classes, strict=True)])


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    write_colors(tmp_path, explains=True)
    return spec_of(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_engine_runs_batches_with_them_and_without(spec: ModelSpec, engine: str) -> None:
    process = await EngineProcess.start(replace(spec, engine=replace(spec.engine, engine=engine)))
    try:
        for classes in ([-1], [2], [-1, -1, -1], [0, 2, 1], [-1, -1, -1], [1], [-1]):
            given = images(len(classes))
            asked = {} if classes[0] < 0 else {"explain_class": np.array(classes)[:, None]}
            for pad_to in (0, 4):
                result = await process.run([{"input": given, **asked}], pad_to=pad_to)
                np.testing.assert_allclose(result.answers[0]["explanation"], maps(given, classes), rtol=1e-5, atol=1e-3)
                want = given.mean((1, 2)) / 25.5
                np.testing.assert_allclose(result.answers[0]["logits"], want, rtol=1e-5)
    finally:
        await process.close()


def test_openvino_has_them_in_fixed_batches_too(spec: ModelSpec) -> None:
    engines = pytest.importorskip("convoynet.server.engines.openvino")
    engine = engines.OpenVinoEngine(EngineSpec.of(spec), fixed=[2])
    for classes in ([-1, -1], [0, 2], [-1, -1], [1]):
        given = images(len(classes))
        asked = {} if classes[0] < 0 else {"explain_class": np.array(classes)[:, None]}
        found = engine.run({"input": given, **asked})["explanation"]
        np.testing.assert_allclose(found, maps(given, classes), rtol=1e-5, atol=1e-3)


def test_buffers_are_bound_with_them_and_without(spec: ModelSpec) -> None:
    ort = pytest.importorskip("onnxruntime")
    binding = pytest.importorskip("convoynet.server.engines.onnxrt_binding")
    session = ort.InferenceSession(str(spec.engine.file), providers=["CPUExecutionProvider"])
    bound = binding.BoundSession(session, EngineSpec.of(spec), "cpu", 0)
    given = images(2)
    for classes in ([-1, -1], [0, 2], [-1, -1]):
        asked = {} if classes[0] < 0 else {"explain_class": np.array(classes)[:, None]}
        found = bound.run({"input": given, **asked}, ["explanation"])["explanation"]
        np.testing.assert_allclose(found, maps(given, classes), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "datatype", "dims", "reason"),
    [
        ("explain", "INT64", (1,), "the optional input 'explain', but the file has no default for it"),
        ("explain_class", "INT32", (1,), "'explain_class' is INT64 in the file, INT32 in config.pbtxt"),
        ("explain_class", "INT64", (), r"'explain_class' has shape \[-1, 1\] in the file, but \[-1\] in config.pbtxt"),
        ("explain_class", "INT64", (3,), r"has shape \[-1, 1\] in the file, but \[-1, 3\] in config.pbtxt"),
    ],
)
async def test_what_the_file_has_no_default_for_is_refused(
    spec: ModelSpec, engine: str, name: str, datatype: str, dims: tuple[int, ...], reason: str
) -> None:
    other = TensorSpec(name, datatype, np.dtype(datatype.lower()), dims)
    with pytest.raises(InvalidModel, match=reason):
        await EngineProcess.start(replace(spec, engine=replace(spec.engine, engine=engine), optional=(other,)))


def request(given: Images, classes: list[int] | None = None, datatype: str = "INT64") -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="colors")
    message.inputs.add(name="input", datatype="UINT8", shape=given.shape)
    message.raw_input_contents.append(given.tobytes())
    if classes is not None:
        message.inputs.add(name="explain_class", datatype=datatype, shape=[len(classes), 1])
        message.raw_input_contents.append(np.array(classes, datatype.lower()).tobytes())
    message.outputs.add(name="explanation")
    return message


async def test_the_server_takes_requests_with_them_and_without(serving: Serving, tmp_path: Path) -> None:
    write_colors(tmp_path, explains=True)
    async with serving() as running:
        infer = running.stub.ModelInfer
        metadata = await running.stub.ModelMetadata(pb.ModelMetadataRequest(name="colors"))
        assert [tensor.name for tensor in metadata.inputs] == ["input"]
        for classes in (None, [2, 0], None, [2, 0], [-1, 1], [2, 0]):  # what comes again is not parsed again
            answer = await infer(request(given := images(2), classes))
            found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 8, 8)
            np.testing.assert_allclose(found, maps(given, classes or [-1, -1]), rtol=1e-5, atol=1e-3)
        for message, reason in (
            (request(images(2), [2, 3]), "input 'explain_class' for model 'colors' holds 3, -1 to 2 are allowed"),
            (request(images(2), [-2, 0]), "holds -2, -1 to 2 are allowed"),
            (request(images(2), [2]), "have different batch sizes: {'input': 2, 'explain_class': 1}"),
            (request(images(2), [2, 0], "INT32"), "'explain_class' data-type is 'INT32'"),
        ):
            for _ in range(3):
                code, told = await code_of(infer(message))
                assert (code.name, reason in told) == ("INVALID_ARGUMENT", True), told
        message = request(images(2), [2, 0])
        del message.inputs[0], message.raw_input_contents[0]
        code, told = await code_of(infer(message))
        assert "expected number of inputs between 1 and 2 but got 1 inputs" in told
        assert "missing required input(s) ['input']" in told
        assert code.name == "INVALID_ARGUMENT"


async def test_a_model_without_a_batch_axis_is_asked_about_the_images_that_it_gets(
    serving: Serving, tmp_path: Path
) -> None:
    folder = write_colors(tmp_path, explains=True)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    config.max_batch_size = 0
    config.ClearField("dynamic_batching")
    del config.parameters["preprocess"]
    for tensor in (*config.input, *config.output):
        tensor.dims.insert(0, -1)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    async with serving() as running:
        infer = running.stub.ModelInfer
        for classes in ([2, 0, 1], [1]):
            answer = await infer(request(given := images(3), classes))
            found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(3, 8, 8)
            wanted = maps(given, classes if len(classes) == 3 else classes * 3)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)
        for classes in ([2, 0], [2, 0, 1, 1]):
            code, told = await code_of(infer(request(images(3), classes)))
            assert code.name == "INVALID_ARGUMENT"
            assert f"has {len(classes)} rows: one, or as many as input 'input', 3, are allowed" in told


def test_an_optional_input_without_an_open_axis_has_its_own_shape(spec: ModelSpec) -> None:
    taken = TensorSpec("x", "FP32", np.dtype(np.float32), (-1, 4))
    other = replace(taken, name="k", datatype="INT64", dtype=np.dtype(np.int64), dims=(2,))
    batch = replace(spec.batch, max_rows=0)
    model = replace(spec, inputs=(taken,), optional=(other,), values={"k": (0, 9)}, batch=batch, image=None)
    given = {"x": np.zeros((3, 4), np.float32), "k": np.array([4, 5])}
    asked = InferRequest(model="colors", version="", id="", inputs=given, datatypes={"x": "FP32", "k": "INT64"})
    assert model.check(asked) == 1
