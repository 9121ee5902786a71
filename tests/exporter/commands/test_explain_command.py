"""`convoy explain`: models that are published, and ONNX files, get an explanation."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from convoynet.explain import explain
from convoynet.exporter.publishing import explained_model
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.onnx_runs import session_of

CONFIG = """name: "net"
backend: "onnxruntime"
max_batch_size: 4
input { name: "image" data_type: TYPE_FP32 dims: [1, 6, 6] }
output { name: "scores" data_type: TYPE_FP32 dims: 3 }
parameters { key: "task" value { string_value: "classification" } }
parameters { key: "verified_version" value { string_value: "2" } }
"""
POLICIES = {"all": "", "specific": "versions: 2", "latest": "num_versions: 2"}


def network(*, convolves: bool = True) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    layer = (
        [helper.make_node("Conv", ["image", "kernel"], ["map"])]
        if convolves
        else [helper.make_node("Tanh", ["image"], ["map"])]
    )
    nodes = [
        *layer,
        helper.make_node("Relu", ["map"], ["features"]),
        helper.make_node("ReduceMean", ["features", "axes"], ["row"], keepdims=0),
        helper.make_node("MatMul", ["row", "weights"], ["scores"]),
    ]
    channels = 5 if convolves else 1
    constants = {
        "axes": np.array([2, 3]),
        "weights": random.standard_normal((channels, 3)).astype(np.float32),
        **({"kernel": random.standard_normal((5, 1, 3, 3)).astype(np.float32)} if convolves else {}),
    }
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 6, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The second version of a model, with the labels and the report of an export."""
    folder = tmp_path / "models" / "net"
    (folder / "2").mkdir(parents=True)
    onnx.save(network(), folder / "2" / "model.onnx")
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "labels.txt").write_text("a\nb\nc\n")
    entry = {"format": "onnx", "file": "2/model.onnx", "sha256": "0" * 64, "bytes": 7, "opset": 20}
    for place in (folder, folder / "2"):
        (place / "report.json").write_text(json.dumps({"version": 2, "formats": [entry], "precision": "fp32"}))
        (place / "report.md").write_text(f"| file | 2/model.onnx, 7 bytes, opset 20, sha256 {'0' * 12} |\n")
    return folder


def test_a_published_model_gets_a_next_version(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (model / "2" / "model.onnx").read_bytes()
    assert explain(["--add", str(model), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    file = model / "3" / "model.onnx"
    assert told == {"file": str(file), "features": "features", "size": [4, 4]}
    assert (model / "2" / "model.onnx").read_bytes() == before
    config = text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())
    assert [(out.name, list(out.dims)) for out in config.output] == [("scores", [3]), ("explanation", [4, 4])]
    assert [(one.name, list(one.dims), one.optional) for one in config.input[1:]] == [("explain_class", [1], True)]
    assert config.parameters["values.explain_class"].string_value == "-1 to 2"
    assert config.parameters["seldom_outputs"].string_value == "explanation"
    assert config.parameters["verified_version"].string_value == "3"
    assert (model / "labels.txt").read_text() == "a\nb\nc\n"
    for place in (model, model / "3"):
        report = json.loads((place / "report.json").read_text())
        assert (report["version"], report["precision"]) == (3, "fp32")
        assert report["formats"][0]["bytes"] == file.stat().st_size
        assert report["explanation"]["features"] == "features"
        assert f"3/model.onnx, {file.stat().st_size:,} bytes" in (place / "report.md").read_text()
    images = np.random.default_rng(1).standard_normal((2, 1, 6, 6)).astype(np.float32)
    old, new = (session_of(model / number / "model.onnx") for number in ("2", "3"))
    scores, maps = new.run(["scores", "explanation"], {"image": images})
    assert np.array_equal(scores, old.run(["scores"], {"image": images})[0])
    features = np.maximum(0, _convolved(images))
    weights = numpy_helper.to_array(next(t for t in network().graph.initializer if t.name == "weights"))
    chosen = weights.T[scores.argmax(1)]
    wanted = np.maximum(0, np.einsum("nc,nchw->nhw", chosen, features) / 16)
    assert np.allclose(maps, wanted, atol=1e-5)


def _convolved(images: np.ndarray) -> np.ndarray:
    kernel = numpy_helper.to_array(next(t for t in network().graph.initializer if t.name == "kernel"))
    windows = np.lib.stride_tricks.sliding_window_view(images[:, 0], (3, 3), (1, 2))
    result: np.ndarray = np.einsum("nhwij,cij->nchw", windows, kernel[:, 0])
    return result


@pytest.mark.parametrize(("batch", "dims"), [("n", [-1, 4, 4]), (2, [2, 4, 4])])
def test_a_config_that_states_the_batch_states_it_of_the_explanation(
    model: Path, batch: str | int, dims: list[int]
) -> None:
    graph = network()
    for value in (*graph.graph.input, *graph.graph.output):
        size = value.type.tensor_type.shape.dim[0]
        size.CopyFrom(helper.make_tensor_value_info("", 1, [batch]).type.tensor_type.shape.dim[0])
    onnx.save(graph, model / "2" / "model.onnx")
    changes = {"max_batch_size: 4": "", "[1, 6, 6]": f"[{dims[0]}, 1, 6, 6]", "dims: 3": f"dims: [{dims[0]}, 3]"}
    config = CONFIG
    for old, new in changes.items():
        config = config.replace(old, new)
    (model / "config.pbtxt").write_text(config)
    assert explain(["--add", str(model)]) == 0
    made = text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())
    assert list(made.output[1].dims) == dims
    assert list(made.input[1].dims) == [dims[0], 1]


def test_a_file_gets_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    assert explain(["--add", str(tmp_path / "net.onnx"), "--output", str(tmp_path / "made.onnx")]) == 0
    assert "the winning class, 4 x 4 at features" in capsys.readouterr().out
    assert [value.name for value in onnx.load(tmp_path / "made.onnx").graph.output] == ["scores", "explanation"]


def test_a_file_is_not_written_over_the_one_that_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(network(), file)
    before = file.read_bytes()
    assert explain(["--add", str(file), "--output", str(tmp_path / "." / "net.onnx")]) == 2
    assert "is the file that --add reads: name another" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_features_come_with_it_where_they_are_asked_for(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = network()
    for node in graph.graph.node:  # its map is called as the output will be
        for names in (node.input, node.output):
            names[:] = ["evidence" if name == "features" else name for name in names]
    onnx.save(graph, model / "2" / "model.onnx")
    assert explain(["--add", str(model), "--features", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    size = told["embedding"]["size"]
    config = text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())
    assert [(out.name, list(out.dims)) for out in config.output[1:]] == [("explanation", [4, 4]), ("features", [size])]
    assert config.parameters["seldom_outputs"].string_value == "explanation"
    report = json.loads((model / "3" / "report.json").read_text())
    assert report["features"] == told["embedding"]
    images = np.random.default_rng(1).standard_normal((2, 1, 6, 6)).astype(np.float32)
    session = session_of(model / "3" / "model.onnx")
    (found,) = session.run(["features"], {"image": images})
    assert np.allclose(found, np.maximum(0, _convolved(images)).mean((2, 3)), atol=1e-5)
    file = str(model / "3" / "model.onnx")
    assert explain(["--add", file, "--output", str(model.parent / "again.onnx"), "--features"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("none", "no such file or folder"),
        ("no map", "has no feature map"),
        ("segmentation", "net is for segmentation"),
        ("engine", "is a TensorRT engine: export it again"),
        ("twice", "has an output 'explanation' already"),
        ("optional", "net has an optional input 'scale', and what is explained takes images alone"),
        ("output", "is for an ONNX file"),
        ("ensemble", "is served as ensemble, not as an ONNX graph"),
        ("file", "names net.onnx, and what is explained is model.onnx"),
        ("all", "has versions served beside the newest"),
        ("specific", "has versions served beside the newest"),
        ("latest", "has versions served beside the newest"),
        ("regression", "its outputs are no classes (regression)"),
        ("no version", "no model's folder"),
    ],
)
def test_what_gets_none_is_told_in_one_line(
    model: Path, change: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, config = ["--add", str(model)], model / "config.pbtxt"
    if change == "none":
        arguments[1] += "s"
    elif change == "no map":
        onnx.save(network(convolves=False), model / "2" / "model.onnx")
    elif change == "segmentation":
        config.write_text(CONFIG.replace("classification", "segmentation"))
    elif change == "engine":
        config.write_text(CONFIG.replace('"onnxruntime"', '"tensorrt"'))
    elif change == "ensemble":
        config.write_text(CONFIG.replace('backend: "onnxruntime"', 'platform: "ensemble"'))
    elif change == "file":
        config.write_text(CONFIG + 'default_model_filename: "net.onnx"')
    elif change in POLICIES:
        config.write_text(f"{CONFIG}version_policy {{ {change} {{ {POLICIES[change]} }} }}")
    elif change == "regression":
        (model / "2" / "report.json").write_text(json.dumps({"parity": {"spread": {"kind": "regression"}}}))
    elif change == "optional":
        config.write_text(CONFIG + 'input { name: "scale" data_type: TYPE_FP32 dims: [1] optional: true }')
    elif change == "twice":
        assert explain(arguments) == 0
    elif change == "output":
        arguments += ["--output", "made.onnx"]
    else:
        arguments[1] = str(model.parent)
    capsys.readouterr()
    assert explain(arguments) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert len(told.splitlines()) == 1
    assert sorted(entry.name for entry in model.parent.iterdir()) == ["net"]


@pytest.mark.parametrize(("off", "code"), [(1e-7, 0), (1e-5, 3)])
def test_answers_may_differ_by_rounding_alone(
    off: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = explained_model._in_onnxruntime

    def with_explanation_off(model: onnx.ModelProto, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        made = run(model, given, output)
        return made + np.float32(off * np.abs(made).max()) if len(model.graph.output) > 1 else made

    monkeypatch.setattr(explained_model, "_in_onnxruntime", with_explanation_off)
    onnx.save(network(), tmp_path / "net.onnx")
    assert explain(["--add", str(tmp_path / "net.onnx"), "--output", str(tmp_path / "made.onnx")]) == code
    assert ("gives other scores" in capsys.readouterr().err) == bool(code)
