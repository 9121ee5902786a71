"""One contract for every engine, and what ONNX Runtime refuses to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from server import engines, repository
from server.engines.base import Engine
from server.errors import InvalidModel
from server.spec import ModelSpec
from tests.server.conftest import fake_model
from tests.server.models import LINEAR_WEIGHTS, write_linear, write_segmenter


def spec_of(root: Path) -> ModelSpec:
    """The spec of the one model in a repository."""
    (found,) = repository.scan(root, repository.Defaults(4, 1))
    assert found.spec is not None, found.reason
    return found.spec


def fake(root: Path) -> tuple[ModelSpec, Callable[[np.ndarray], np.ndarray]]:
    fake_model(root)
    return spec_of(root), lambda x: x.sum(axis=1, keepdims=True)


def onnxruntime(root: Path) -> tuple[ModelSpec, Callable[[np.ndarray], np.ndarray]]:
    pytest.importorskip("onnxruntime", reason="the engine is an extra")
    write_linear(root)
    return spec_of(root), lambda x: x @ LINEAR_WEIGHTS


@pytest.mark.parametrize("make", [fake, onnxruntime])
def test_contract(tmp_path: Path, make: Callable[[Path], tuple[ModelSpec, Callable[[np.ndarray], np.ndarray]]]) -> None:
    spec, expected = make(tmp_path)
    engine: Engine = engines.load(spec)
    assert engine.device
    name, output = spec.inputs[0].name, spec.outputs[0]
    kept = []
    for rows in (1, 3, 8, 2):
        x = np.random.default_rng(rows).standard_normal((rows, 4), dtype=np.float32)
        x.setflags(write=False)  # inputs are views of the message on the wire
        answer = engine.run({name: x})
        assert list(answer) == [output.name]
        assert answer[output.name].dtype == output.dtype
        kept.append((answer[output.name], expected(x)))
    for got, want in kept:  # an answer stays what it was while the engine goes on
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    engine.close()


@pytest.mark.parametrize("backend", ["fake", "onnxruntime"])
def test_outputs_of_several_types_and_ranks(tmp_path: Path, backend: str) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="the engine is an extra")
        write_segmenter(tmp_path, cell=4)
    else:
        outputs = "".join(
            f'output {{ name: "{name}" data_type: {kind} dims: {dims} }}\n'
            for name, kind, dims in (("logits", "TYPE_FP32", [3, 10, 10]), ("classes", "TYPE_UINT8", [10, 10]))
        )
        fake_model(tmp_path, config=f"max_batch_size: 8\n{outputs}")
    spec = spec_of(tmp_path)
    engine: Engine = engines.load(spec)
    inputs = spec.blank(2)
    every = [tensor.name for tensor in spec.outputs]
    assert list(engine.run(inputs)) == every
    assert list(engine.run(inputs, ["classes"])) == ["classes"]
    assert list(engine.run(inputs, {"classes", "logits"})) == [name for name in every if name != "y"]
    classes = engine.run(inputs, ["classes"])["classes"]
    assert (classes.dtype, classes.shape) == (np.uint8, (2, 10, 10))
    engine.close()


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('name: "input"', 'name: "image"', "states the input 'image', but the file has input"),
        ('name: "logits"', 'name: "scores"', "states the output 'scores', but the file has logits"),
        (
            "data_type: TYPE_FP32\n  dims: 4",
            "data_type: TYPE_UINT8\n  dims: 4",
            "input 'input' is FP32 in the file, UINT8",
        ),
        ("dims: 4", "dims: 5", r"input 'input' has shape \['batch', 4\] in the file, but \[-1, 5\]"),
        ("KIND_CPU", "KIND_GPU", "asks for a GPU .*or could not start|KIND_GPU|could not start"),
    ],
)
def test_a_file_that_is_not_what_the_config_says(tmp_path: Path, before: str, after: str, reason: str) -> None:
    config = write_linear(tmp_path) / "config.pbtxt"
    text = config.read_text()
    if "KIND" in before and before not in text:
        text += "\ninstance_group { kind: KIND_CPU }\n"
    assert before in text
    config.write_text(text.replace(before, after))
    with pytest.raises(InvalidModel, match=reason):
        engines.load(spec_of(tmp_path))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (write_linear(tmp_path) / "1" / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InvalidModel, match=r"ONNX Runtime does not take model\.onnx") as caught:
        engines.load(spec_of(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
