"""Publishing: all of it or nothing, on a real file system."""

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, Task
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph import onnx_from_torch
from convoynet.exporter.publishing import model_config
from convoynet.exporter.publishing.repository import Staging, staging, versions
from convoynet.exporter.recipe import Fp8, Fp16, Int8, Step
from convoynet.protos.inference import model_config_pb2 as pb

RGB = Preprocess(size=(224, 200), resize=256, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))


def arch_of(preprocess: Preprocess, task: Task = "classification") -> Arch:
    return dataclasses.replace(archs.get("resnet18"), preprocess=preprocess, task=task)


def publish(root: Path, text: str, version: int | None = None, *, force: bool = False) -> Path:
    with staging(root, "net", version, force=force, needed_bytes=1) as open_staging:
        fill(open_staging, text)
        return open_staging.commit()


def fill(open_staging: Staging, text: str) -> None:
    (open_staging.folder / "model.onnx").write_text(text)
    for name in ("config.pbtxt", "report.json"):
        (open_staging.model / name).write_text(text)


def tree(root: Path) -> dict[str, str | None]:
    return {str(path.relative_to(root)): path.read_text() if path.is_file() else None for path in root.rglob("*")}


def test_versions_count_up_and_the_models_files_follow_the_newest(tmp_path: Path) -> None:
    assert publish(tmp_path, "one") == tmp_path / "net" / "1"
    assert publish(tmp_path, "two") == tmp_path / "net" / "2"
    publish(tmp_path, "nine", 9)
    publish(tmp_path, "five", 5)
    assert versions(tmp_path / "net") == [1, 2, 5, 9]
    assert tree(tmp_path) == {
        "net": None, "net/config.pbtxt": "nine", "net/report.json": "nine",
        "net/1": None, "net/1/model.onnx": "one", "net/2": None, "net/2/model.onnx": "two",
        "net/5": None, "net/5/model.onnx": "five", "net/9": None, "net/9/model.onnx": "nine",
    }  # fmt: skip


def test_an_existing_version_is_replaced_only_by_force(tmp_path: Path) -> None:
    publish(tmp_path, "one")
    with pytest.raises(BadInput, match=r"version 1 of net exists.*--force"):
        publish(tmp_path, "other", 1)
    assert publish(tmp_path, "other", 1, force=True).joinpath("model.onnx").read_text() == "other"
    assert tree(tmp_path)["net/config.pbtxt"] == "other"


def test_a_version_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    with staging(tmp_path, "net", None, force=False, needed_bytes=1) as late:
        fill(late, "late")
        (tmp_path / "net" / "1").mkdir(parents=True)
        (tmp_path / "net" / "1" / "model.onnx").write_text("early")
        with pytest.raises(BadInput, match="appeared"):
            late.commit()
    assert tree(tmp_path)["net/1/model.onnx"] == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_two_at_once_get_two_numbers(tmp_path: Path) -> None:
    with staging(tmp_path, "net", None, force=False, needed_bytes=1) as late:
        fill(late, "late")
        assert publish(tmp_path, "early").name == "2"
        with pytest.raises(BadInput, match="version 1 of net is being written by another process"):
            publish(tmp_path, "same", 1)
        late.commit()
    assert tree(tmp_path) == {
        "net": None, "net/config.pbtxt": "early", "net/report.json": "early",
        "net/1": None, "net/1/model.onnx": "late", "net/2": None, "net/2/model.onnx": "early",
    }  # fmt: skip


def test_a_version_that_no_longer_fits_is_not_published(tmp_path: Path) -> None:
    def refuse() -> None:
        raise BadInput("does not fit")

    publish(tmp_path, "one")
    before = tree(tmp_path)
    with staging(tmp_path, "net", None, force=False, needed_bytes=1) as late:
        fill(late, "late")
        with pytest.raises(BadInput, match="does not fit"):
            late.commit(fits=refuse)
    assert tree(tmp_path) == before


def fail_before_commit(root: Path, error: type[BaseException]) -> None:
    with staging(root, "net", None, force=False, needed_bytes=1) as open_staging:
        fill(open_staging, "x")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_before_the_commit_leaves_nothing_not_even_the_folders(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        fail_before_commit(tmp_path / "a" / "b", error)
    assert tree(tmp_path) == {}


def make_file_at_version(root: Path) -> None:
    (root / "net" / "2").write_text("in the way")


def make_folder_at_config(root: Path) -> None:
    (root / "net" / "report.json").unlink()
    (root / "net" / "report.json").mkdir()


@pytest.mark.parametrize("obstacle", [make_file_at_version, make_folder_at_config])
def test_a_failure_in_the_middle_of_the_commit_puts_everything_back(
    tmp_path: Path, obstacle: Callable[[Path], None]
) -> None:
    """Something stands where a file of the model, or the version, should go: the rename itself fails."""
    publish(tmp_path, "one")
    obstacle(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(BadInput):
        publish(tmp_path, "two")
    assert tree(tmp_path) == before


def test_the_name_is_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "net").write_text("x")
    with pytest.raises(BadInput, match="is a file"):
        publish(tmp_path, "one")


def test_a_repository_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root, words in (
        (tmp_path / "file" / "models", "Not a directory"),
        (tmp_path / "file", "File exists"),
        (Path("/proc/models"), "No such file"),
    ):
        with pytest.raises(BadInput, match=f"cannot write to the model repository.*{words}"):
            publish(root, "one")


def test_too_little_room_is_told_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match="free space"),
        staging(tmp_path / "m", "net", None, force=False, needed_bytes=2**62),
    ):
        pytest.fail("the work began")
    assert tree(tmp_path) == {}


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = publish(tmp_path, "one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o755


def test_folders_that_are_no_versions_do_not_count(tmp_path: Path) -> None:
    for name in ("3", "03", "x4", "0", "-7", ".8", "²"):
        (tmp_path / name).mkdir()
    (tmp_path / "9").write_text("a file")
    assert versions(tmp_path) == [3]
    assert versions(tmp_path / "absent") == []


def test_config_says_what_the_graph_takes() -> None:
    config = model_config.model_config(ExportConfig("resnet18", batch=(1, 6)), arch_of(RGB), [[7]])
    assert text_format.Parse(model_config.config_text(config), pb.ModelConfig()) == config
    assert (config.backend, config.platform, config.max_batch_size) == ("onnxruntime", "onnxruntime_onnx", 6)
    assert config.input[0].name == onnx_from_torch.INPUT_NAME
    assert config.input[0].data_type == pb.TYPE_FP32
    assert config.input[0].format == pb.ModelInput.FORMAT_NCHW
    assert list(config.input[0].dims) == [3, 224, 200]
    assert list(config.output[0].dims) == [7]
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert config.HasField("dynamic_batching")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 4, 6]
    assert '"mean": [0.1, 0.2, 0.3]' in config.parameters["preprocess"].string_value


def test_config_of_a_graph_that_normalises_names_no_mean() -> None:
    config = model_config.model_config(
        ExportConfig("resnet18", input="uint8", target="gpu", steps=(Int8(),)), arch_of(RGB), [[7]]
    )
    assert config.input[0].data_type == pb.TYPE_UINT8
    assert config.input[0].format == pb.ModelInput.FORMAT_NHWC
    assert list(config.input[0].dims) == [224, 200, 3]
    assert "mean" not in config.parameters["preprocess"].string_value
    assert "std" not in config.parameters["preprocess"].string_value
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    told = {key: config.parameters[key].string_value for key in ("arch", "precision", "target", "task", "activation")}
    assert told == {
        "arch": "resnet18",
        "precision": "int8",
        "target": "gpu",
        "task": "classification",
        "activation": "softmax",
    }


@pytest.mark.parametrize(
    ("steps", "level"),
    [((), None), ((Int8(),), None), ((Fp16(),), None), ((Int8(), Fp16()), "basic"), ((Fp8(),), "basic")],
    ids=lambda value: "+".join(step.kind for step in value) if isinstance(value, tuple) else value,
)
def test_config_says_where_onnx_runtimes_optimizations_are_wrong(steps: tuple[Step, ...], level: str | None) -> None:
    config = model_config.model_config(ExportConfig("resnet18", target="gpu", steps=steps), arch_of(RGB), [[7]])
    told = config.parameters["graph_optimization"].string_value if "graph_optimization" in config.parameters else None
    assert told == level


def test_config_of_maps_and_boxes() -> None:
    maps = model_config.model_config(ExportConfig("fcn"), arch_of(RGB, "segmentation"), [[21, 224, 200]])
    described = [(out.name, out.data_type, list(out.dims), out.label_filename) for out in maps.output]
    assert described == [
        ("logits", pb.TYPE_FP32, [21, 224, 200], "labels.txt"),
        ("classes", pb.TYPE_UINT8, [224, 200], ""),
    ]
    assert maps.max_batch_size == 8
    many = model_config.model_config(ExportConfig("vgg16"), arch_of(RGB, "segmentation"), [[1000, 6, 6]])
    assert many.output[1].data_type == pb.TYPE_INT32  # a byte cannot hold 1,000 classes
    boxes = model_config.model_config(ExportConfig("frcnn"), arch_of(RGB, "detection"), [[100, 4], [100], [100], [1]])
    assert [(out.name, out.data_type, list(out.dims), out.label_filename) for out in boxes.output] == [
        ("boxes", pb.TYPE_FP32, [100, 4], ""),
        ("scores", pb.TYPE_FP32, [100], "labels.txt"),
        ("labels", pb.TYPE_INT64, [100], ""),
        ("count", pb.TYPE_INT64, [1], ""),
    ]
    assert (boxes.parameters["task"].string_value, boxes.max_batch_size) == ("detection", 4)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_warmup_sizes(largest: int, sizes: list[int]) -> None:
    assert model_config.warmup_sizes(largest) == sizes


def test_changes_against_the_earlier_config(tmp_path: Path) -> None:
    old = model_config.model_config(ExportConfig("resnet18"), arch_of(RGB), [[7]])
    assert model_config.changes(tmp_path, old) == []
    (tmp_path / "config.pbtxt").write_text(model_config.config_text(old))
    assert model_config.changes(tmp_path, old) == []
    new = model_config.model_config(ExportConfig("resnet18", input="uint8", batch=(1, 8)), arch_of(RGB), [[9]])
    told = " | ".join(model_config.changes(tmp_path, new))
    assert "FP32[3, 224, 200] to input UINT8[224, 200, 3]" in told
    assert "output changes from logits 7 to logits 9" in told
    assert "largest batch changes from 32 to 8" in told
    (tmp_path / "config.pbtxt").write_text("{ not a config")
    assert "could not be read" in model_config.changes(tmp_path, new)[0]
