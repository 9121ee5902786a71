"""What a model folder says, and every way in which it can be wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convoynet.protos.inference import grpc_service_pb2 as service_pb
from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.layout import inside, is_name, is_version
from convoynet.server.repository.repository import Repository, scan
from convoynet.server.repository.specs import Defaults, Found
from tests.server.conftest import Serving, fake_model
from tests.server.onnx_models import write_linear
from tests.server.repositories import describe_onnx

DEFAULTS = Defaults(max_queue=7, threads=3)
LINEAR_WITH_CLASS = """backend: "onnxruntime"
input { name: "input" data_type: TYPE_FP32 dims: 4 }
input { name: "class" data_type: TYPE_INT64 dims: 1 optional: true }
output { name: "logits" data_type: TYPE_FP32 dims: 3 }
"""


def only(root: Path) -> Found:
    """The one version in a repository."""
    (found,) = scan(root, DEFAULTS)
    return found


def test_a_silent_config_is_completed(tmp_path: Path) -> None:
    fake_model(tmp_path)
    found = only(tmp_path)
    assert found.spec is not None
    assert found.config is not None
    spec = found.spec
    assert (spec.name, spec.version, spec.platform, spec.instances) == ("sum", "1", "fake", 1)
    assert (spec.batch.max_rows, spec.batch.max_delay_s, spec.batch.max_queue) == (8, 0, 7)
    assert (spec.engine.device, spec.engine.threads) == ("auto", 3)
    assert spec.warmup == (1, 8)
    assert list(found.config.dynamic_batching.preferred_batch_size) == [8]


def test_everything_that_the_config_states_is_used(tmp_path: Path) -> None:
    fake_model(
        tmp_path,
        config="""
        max_batch_size: 4
        dynamic_batching { max_queue_delay_microseconds: 500 default_queue_policy { max_queue_size: 3 } }
        instance_group { count: 2 kind: KIND_CPU }
        model_warmup { batch_size: 2 } model_warmup { batch_size: 1 }
        parameters { key: "intra_op_thread_count" value { string_value: "5" } }
        """,
    )
    spec = only(tmp_path).spec
    assert spec is not None
    assert (spec.batch.max_delay_s, spec.batch.max_queue, spec.instances) == (0.0005, 3, 2)
    assert (spec.engine.device, spec.engine.threads, spec.warmup) == ("cpu", 5, (1, 2))


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["10"]),
        ("version_policy { latest { num_versions: 2 } }", ["9", "10"]),
        ("version_policy { all { } }", ["1", "9", "10"]),
        ("version_policy { specific { versions: [9] } }", ["9"]),
    ],
)
def test_version_policies(tmp_path: Path, policy: str, served: list[str]) -> None:
    fake_model(tmp_path, config=f"max_batch_size: 1 {policy}")
    for version in ("9", "10"):
        (tmp_path / "sum" / version).mkdir()
        (tmp_path / "sum" / version / "model.json").write_text("{}")
    assert [f.version for f in scan(tmp_path, DEFAULTS) if f.spec is not None] == served


def edit(before: str, after: str) -> Callable[[Path], object]:
    """Changes the config of the model."""

    def change(folder: Path) -> None:
        text = (folder / "config.pbtxt").read_text()
        assert before in text
        (folder / "config.pbtxt").write_text(text.replace(before, after))

    return change


PREPROCESS = "max_batch_size: 1 parameters {{ key: \"preprocess\" value {{ string_value: '{}' }} }}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "config.pbtxt").unlink(), "config.pbtxt has to state every input and output"),
        (lambda f: (f / "config.pbtxt").write_bytes(b"\xff\xff"), "config.pbtxt is not UTF-8"),
        (edit("max_batch_size", "max_batch"), "does not parse"),
        (edit('backend: "fake"', 'backend: "pytorch"'), "backend 'pytorch'.* is not one of"),
        (edit('backend: "fake"', 'backend: "fake" name: "other"'), "names it 'other', its folder 'sum'"),
        (lambda f: (f / "1").rename(f / "one"), "no version folder"),
        (lambda f: (f / "1" / "model.json").unlink(), "version 1 has no file model.json"),
        (
            edit('backend: "fake"', 'backend: "fake" default_model_filename: "../../x"'),
            "leads out of the model's folder",
        ),
        (
            edit("dynamic_batching", "version_policy { specific { versions: 4 } } dynamic_batching"),
            r"asks for versions \[4\]; there are \[1\]",
        ),
        (edit("dynamic_batching", "instance_group { kind: KIND_MODEL } dynamic_batching"), "instance_group must be"),
        (edit("dims: [1]", 'dims: [1] label_filename: "absent.txt"'), "labels of output 'y' cannot be read"),
        (edit("dims: [1]", 'dims: [1] label_filename: "../../x"'), "leads out of the model's folder"),
        (edit("TYPE_FP32 dims: [4]", "TYPE_INVALID dims: [4]"), "has to state every input and output"),
        (edit("max_batch_size: 8", PREPROCESS.format("{")), "'preprocess' of config.pbtxt is not readable"),
        (
            edit(
                "max_batch_size: 8",
                PREPROCESS.format('{"color": "RGB", "resize": 8, "size": [8, 8], "interpolation": "bilinear"}'),
            ),
            "makes rows of shape",
        ),
        (
            edit(
                "max_batch_size: 8",
                PREPROCESS.format('{"color": "CMYK", "resize": 8, "size": [8, 8], "interpolation": "x"}'),
            ),
            "color 'CMYK'",
        ),
    ],
)
def test_a_model_that_cannot_be_served_has_a_reason(
    tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    fake_model(tmp_path)
    change(tmp_path / "sum")
    found = only(tmp_path)
    assert found.spec is None
    assert re.search(reason, found.reason), found.reason


def test_a_name_that_is_no_name_and_hidden_folders(tmp_path: Path) -> None:
    fake_model(tmp_path, "a b")
    (tmp_path / ".tmp").mkdir()
    assert "may hold letters" in only(tmp_path).reason


def repository(root: Path, **defaults: Any) -> Repository:
    """A repository whose ONNX files are described by ONNX Runtime."""
    return Repository([Folder(root)], replace(DEFAULTS, **defaults), describe_onnx)


async def test_a_model_without_a_config_is_completed_from_its_file(tmp_path: Path) -> None:
    folder = write_linear(tmp_path)
    (folder / "config.pbtxt").unlink()
    (found,) = await repository(tmp_path).read("linear")
    assert found.spec is not None
    assert found.config is not None
    assert (found.config.backend, found.config.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert found.config.default_model_filename == "model.onnx"
    assert found.config.max_batch_size == found.spec.batch.max_rows == 32
    assert [(t.name, t.data_type, list(t.dims)) for t in found.config.input] == [("input", pb.TYPE_FP32, [4])]
    assert [(t.name, t.data_type, list(t.dims)) for t in found.config.output] == [("logits", pb.TYPE_FP32, [3])]
    assert found.spec.labels == {"logits": ["zero", "one", "two"]}
    (found,) = await repository(tmp_path, max_batch_size=5).read("linear")
    assert found.config is not None
    assert found.config.max_batch_size == 5


async def test_a_model_without_a_config_is_served(tmp_path: Path, serving: Serving) -> None:
    (write_linear(tmp_path) / "config.pbtxt").unlink()
    message = service_pb.ModelInferRequest(model_name="linear")
    message.inputs.add(name="input", datatype="FP32", shape=[2, 4])
    message.raw_input_contents.append(np.eye(4, dtype=np.float32)[:2].tobytes())
    async with serving() as running:
        response = await running.stub.ModelInfer(message)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1, 0, -1, 0, 2, 0]


@pytest.mark.parametrize(
    ("text", "batch", "dims"),
    [
        ("max_batch_size: 2", 2, [4]),
        ("max_batch_size: 0", 0, [-1, 4]),
        ("# max_batch_size: 0", 32, [4]),
        ('input { name: "input" }', 32, [4]),
        ('input { name: "input" data_type: TYPE_FP32 dims: [4] }', 32, [4]),
        ('input { name: "input" data_type: TYPE_FP32 dims: [-1, 4] }', 0, [-1, 4]),
        ('output { name: "logits" data_type: TYPE_FP32 dims: [3] } max_batch_size: 7', 7, [4]),
    ],
)
async def test_a_partial_config_is_completed(tmp_path: Path, text: str, batch: int, dims: list[int]) -> None:
    folder = write_linear(tmp_path)
    (folder / "config.pbtxt").write_text(text)
    (found,) = await repository(tmp_path).read("linear")
    assert found.config is not None
    assert found.config.max_batch_size == batch
    assert list(found.config.input[0].dims) == dims
    assert list(found.config.output[0].dims) == ([3] if batch else [-1, 3])


async def test_a_file_without_a_free_batch_axis_gets_no_batching(tmp_path: Path) -> None:
    folder = write_linear(tmp_path, max_batch=0)
    (folder / "config.pbtxt").write_text("")
    (found,) = await repository(tmp_path).read("linear")
    assert found.config is not None
    assert (found.config.max_batch_size, list(found.config.input[0].dims)) == (0, [4])
    (folder / "config.pbtxt").write_text("max_batch_size: 4")
    with pytest.raises(InvalidModel, match="not every input and output of the file has a free batch axis"):
        await repository(tmp_path).read("linear")


async def test_labels_that_do_not_fit_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_linear(tmp_path)
    (folder / "config.pbtxt").unlink()
    (folder / "labels.txt").write_text("one\n")
    (found,) = await repository(tmp_path).read("linear")
    assert found.spec is not None
    assert found.spec.labels == {}
    assert "labels.txt has 1 lines" in caplog.text


async def test_a_whole_config_needs_no_look_into_the_file(tmp_path: Path) -> None:
    write_linear(tmp_path)
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("linear")
    assert found.spec is not None


@pytest.mark.parametrize(
    ("text", "file", "reason"),
    [
        ("", "model.plan", "has no report.json that names 1/model.plan"),
        ('backend: "tensorrt"', "model.onnx", "version 1 has no file model.plan"),
        ('backend: "tensorrt" default_model_filename: "model.onnx"', "model.onnx", "has to state every input and outp"),
        ("", "model.pt", "holds no model: none of model.onnx, model.xml, model.plan"),
        ('input { name: "zz" }', "model.onnx", "states the input 'zz', but the file has input"),
        ('output { name: "zz" }', "model.onnx", "states the output 'zz', but the file has logits"),
        ('backend: "onnxruntime"', "model.xml", "version 1 has no file model.onnx"),
        ("sequence_batching { }", "model.onnx", "sequence_batching is not supported"),
        ("model_transaction_policy { decoupled: true }", "model.onnx", "decoupled .* is not supported"),
        ('input { name: "input" reshape { shape: [2] } }', "model.onnx", "reshape of 'input' is not supported"),
        ('input { name: "input" optional: true }', "model.onnx", "every input is optional: one at least must not be"),
        (
            'backend: "fake" input { name: "a" data_type: TYPE_FP32 dims: 1 optional: true } '
            'output { name: "b" data_type: TYPE_FP32 dims: 1 }',
            "model.json",
            "input 'a' is optional, which those of an ONNX file alone can be",
        ),
        (
            LINEAR_WITH_CLASS + 'parameters { key: "values.class" value { string_value: "9 to 0" } }',
            "model.onnx",
            "parameter 'values.class' must be two whole numbers as in '-1 to 9'",
        ),
        (
            'parameters { key: "seldom_outputs" value { string_value: "maps" } }',
            "model.onnx",
            "parameter 'seldom_outputs' names 'maps', which is no output: they are logits",
        ),
        (
            'parameters { key: "seldom_outputs" value { string_value: "logits" } }',
            "model.onnx",
            "parameter 'seldom_outputs' names every output: one at least must not be among them",
        ),
        ('input { name: "input" allow_ragged_batch: true }', "model.onnx", "allow_ragged_batch of input 'input'"),
        ('output { name: "logits" is_shape_tensor: true }', "model.onnx", "is_shape_tensor of 'logits'"),
        ("batch_input { kind: BATCH_ELEMENT_COUNT }", "model.onnx", "batch_input is not supported"),
        ('model_operations { op_library_filename: "x.so" }', "model.onnx", "custom operators"),
        ("max_batch_size: -1", "model.onnx", "max_batch_size must be at least 0"),
        ('input { name: "input" dims: [0] }', "model.onnx", "dims of input 'input' must be at least 1"),
        ('input { name: "a" } input { name: "a" }', "model.onnx", "the input 'a' is stated twice"),
        ("version_policy { specific { } }", "model.onnx", "asks for versions"),
    ],
)
async def test_what_this_server_does_not_do_is_refused_with_one_line(
    tmp_path: Path, text: str, file: str, reason: str
) -> None:
    folder = write_linear(tmp_path)
    (folder / "1" / "model.onnx").rename(folder / "1" / file)
    (folder / "config.pbtxt").write_text(text)
    try:
        (found,) = await repository(tmp_path).read("linear")
        said = found.reason
    except InvalidModel as error:
        said = str(error)
    assert re.search(reason, said), said
    assert str(tmp_path) not in said
    assert "\n" not in said


async def test_strict_configs_are_not_completed(tmp_path: Path) -> None:
    folder = write_linear(tmp_path)
    strict = repository(tmp_path, strict_config=True)
    assert (await strict.read("linear"))[0].spec is not None
    (folder / "config.pbtxt").write_text('backend: "onnxruntime"')
    with pytest.raises(InvalidModel, match="does not state every input and output, which --strict-model-config"):
        await strict.read("linear")
    (folder / "config.pbtxt").unlink()
    with pytest.raises(InvalidModel, match=r"no config.pbtxt, which --strict-model-config"):
        await strict.read("linear")


def report(folder: Path, file: Path, key: str) -> None:
    """A report beside a model, of the form that `convoy export` writes."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "report.json").write_text(json.dumps({"formats": [{"file": key, "sha256": digest}]}))


@pytest.mark.parametrize("place", [".", "1"])
async def test_a_file_that_is_not_the_reports_is_refused(tmp_path: Path, place: str) -> None:
    folder = write_linear(tmp_path)
    file = folder / "1" / "model.onnx"
    report(folder / place, file, "1/model.onnx")
    assert (await repository(tmp_path, require_report=True).read("linear"))[0].spec is not None
    file.write_bytes(file.read_bytes() + b"\0")
    (found,) = await repository(tmp_path).read("linear")
    assert found.spec is None
    assert re.fullmatch(r"the sha256 of 1/model.onnx is \w{12}..., but report.json says \w{12}.*", found.reason)


async def test_one_version_that_is_not_the_reports_does_not_hide_another(tmp_path: Path) -> None:
    folder = write_linear(tmp_path)
    shutil.copytree(folder / "1", folder / "2")
    report(folder / "1", folder / "1" / "model.onnx", "1/model.onnx")
    (folder / "1" / "model.onnx").write_bytes(b"x")
    (folder / "config.pbtxt").write_text("version_policy { all { } }")
    first, second = await repository(tmp_path).read("linear")
    assert first.spec is None
    assert second.spec is not None


async def test_a_file_without_a_report_is_loaded_with_a_line_in_the_log_unless_one_is_required(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_linear(tmp_path)
    caplog.set_level("INFO")
    assert (await repository(tmp_path).read("linear"))[0].spec is not None
    assert "loaded unchecked" in caplog.text
    assert (
        "which --require-report asks for" in (await repository(tmp_path, require_report=True).read("linear"))[0].reason
    )
    (folder / "report.json").write_text("[1]")
    assert "report.json cannot be read (TypeError)" in (await repository(tmp_path).read("linear"))[0].reason


@pytest.mark.parametrize("link", ["model", "1", "1/model.onnx", "1/weights.bin", "labels.txt", "config.pbtxt"])
async def test_symbolic_links_out_of_a_models_folder_are_refused(tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    folder = write_linear(tmp_path / "models", "model")
    target = tmp_path / "models" / link if link == "model" else folder / link
    if target.exists():
        target.rename(outside)
    else:
        outside.write_text("x")
    target.symlink_to(outside)
    with pytest.raises(InvalidModel, match="symbolic link") as caught:
        await repository(tmp_path / "models").read("model")
    assert str(tmp_path) not in str(caught.value)


async def test_symbolic_links_within_a_models_folder_are_followed(tmp_path: Path) -> None:
    folder = write_linear(tmp_path)
    (folder / "1" / "model.onnx").rename(folder / "kept.onnx")
    (folder / "1" / "model.onnx").symlink_to("../kept.onnx")
    assert (await repository(tmp_path).read("linear"))[0].spec is not None


async def test_a_name_in_two_repositories_is_refused(tmp_path: Path) -> None:
    write_linear(tmp_path / "a")
    write_linear(tmp_path / "b")
    write_linear(tmp_path / "b", "other")
    both = Repository([Folder(tmp_path / "a"), Folder(tmp_path / "b")], DEFAULTS)
    assert await both.names() == {"linear", "other"}
    assert (await both.read("other"))[0].spec is not None
    with pytest.raises(InvalidModel, match="2 model repositories hold a model 'linear': rename all but one"):
        await both.read("linear")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab1.-_/\\~\0 \n:é") | st.characters(), max_size=20))
def test_no_name_leads_out_of_a_folder(tmp_path: Path, name: str) -> None:
    if is_name(name):
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    try:
        file = inside(tmp_path, name, "it")
    except (InvalidModel, OSError, UnicodeEncodeError):
        return
    assert file.resolve().is_relative_to(tmp_path.resolve())


@given(st.text(st.sampled_from("0123456789-+ ²٣_.") | st.characters(), max_size=20))
def test_versions_are_positive_numbers_in_one_spelling(text: str) -> None:
    if is_version(text):
        assert str(int(text)) == text
        assert int(text) > 0
