"""`convoy serve FILE.onnx`, and a folder of such files: no config, no copy, nothing written beside them."""

import io
import json
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from PIL import Image

import convoynet
from convoynet.server import serve
from convoynet.server.config import ServeConfig
from convoynet.server.repository.lone_files import LoneFiles, Preprocessing, model_name, split
from tests.exporter.given_files import CLASSES, SIZE, by_hand
from tests.exporter.graph.test_onnx_given import a_second_input, quantized_file
from tests.server.onnx_models import write_linear

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
GIVEN = {"mean": ",".join(map(str, MEAN)), "std": ",".join(map(str, STD)), "resize": f"{SIZE}x{SIZE}"}


def with_weights_beside(path: Path) -> Path:
    by_hand(path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=256)
    return path


def of_the_file(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, dict(zip([one.name for one in session.get_inputs()], inputs.values(), strict=True)))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, in a folder that nobody may write to."""
    folder = tmp_path_factory.mktemp("nets")
    by_hand(folder / "plain.onnx", opset=9, weights_are_inputs=True)
    by_hand(folder / "nhwc.onnx", layout="NHWC", names=("input:0", "a b/ü:0"))
    by_hand(folder / "open.onnx", size=("h", "w"), output_shape=False)
    by_hand(folder / "one image.onnx", batch=1)
    by_hand(folder / "half.onnx", kind=TensorProto.FLOAT16)
    by_hand(folder / "two.onnx", change=a_second_input)
    quantized_file(folder / "quantized.onnx")
    with_weights_beside(folder / "beside.onnx")
    (folder / "broken.onnx").write_bytes(b"no model")
    (folder / "notes.txt").write_text("no model either")
    by_hand(folder / "missing.onnx")
    onnx.save(
        onnx.load(folder / "missing.onnx"), folder / "missing.onnx",
        save_as_external_data=True, location="gone.bin", size_threshold=256,
    )  # fmt: skip
    (folder / "gone.bin").unlink()
    for file in ("outside", "away"):
        model = onnx.load(folder / "beside.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                place = "../secret" if file == "outside" else "/etc/passwd"
                entry.value = place if entry.key == "location" else entry.value
        (folder / f"{file}.onnx").write_bytes(model.SerializeToString())
    (folder.parent / "secret").write_bytes(bytes(2**16))
    return folder


@pytest.fixture(scope="module")
def served(nets: Path) -> Iterator[convoynet.Server]:
    before = {file.name: file.stat().st_mtime_ns for file in nets.iterdir()}
    mode = nets.stat().st_mode
    nets.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with convoynet.serve(nets, threads=1, tune=False) as server:
            yield server
    finally:
        nets.chmod(mode)
    assert {file.name: file.stat().st_mtime_ns for file in nets.iterdir()} == before


NAMES = {
    "plain": (32, [3, SIZE, SIZE]),
    "nhwc": (32, [SIZE, SIZE, 3]),
    "open": (32, [3, -1, -1]),
    "one_image": (0, [1, 3, SIZE, SIZE]),
    "half": (32, [3, SIZE, SIZE]),
    "quantized": (32, [3, SIZE, SIZE]),
    "beside": (32, [3, SIZE, SIZE]),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_served_and_answers_as_itself(name: str, served: convoynet.Server, nets: Path) -> None:
    largest, dims = NAMES[name]
    with served.client() as client:
        config = client.model_config(name)
        assert (config.max_batch_size, list(config.input[0].dims)) == (largest, dims)
        kind = np.float16 if name == "half" else np.float32
        shape = [3 if largest else 1, *(size if size > 0 else SIZE for size in dims)][0 if largest else 1 :]
        inputs = np.random.default_rng(0).random(shape, np.float32).astype(kind)
        found = client.infer(name, inputs)
    (wanted,) = of_the_file(nets / f"{name.replace('_', ' ')}.onnx", data=inputs)
    np.testing.assert_allclose(found[config.output[0].name], wanted, 2e-2 if kind is np.float16 else 1e-4, 1e-2)


def test_several_inputs_are_served(served: convoynet.Server, nets: Path) -> None:
    images, times = np.ones((1, 3, SIZE, SIZE), np.float32), np.array([2], np.float32)
    with served.client() as client:
        found = client.infer("two", {"data": images, "times": times})
    np.testing.assert_allclose(found["scaled"], of_the_file(nets / "two.onnx", data=images, times=times)[0], 1e-4, 1e-4)


def test_what_cannot_be_served_is_said_and_hides_no_other(served: convoynet.Server) -> None:
    said = {line.split(":")[0]: line for line in served.log().splitlines() if line.startswith("NOT SERVED ")}
    assert sorted(said) == [f"NOT SERVED {name} 1" for name in ("away", "broken", "missing", "outside")]
    assert "leads out of the model's folder" in said["NOT SERVED outside 1"]
    assert "leads out of the model's folder" in said["NOT SERVED away 1"]
    assert "is no ONNX file" in said["NOT SERVED broken 1"]
    assert "has weights in 'gone.bin', which is not there" in said["NOT SERVED missing 1"]


def jpeg(color: tuple[int, int, int]) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(written, "PNG")
    return written.getvalue()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_encoded_images_by_flags_and_labels(layout: str, tmp_path: Path) -> None:
    path = by_hand(tmp_path / "small.onnx", layout=layout, size=("h", "w"), output_shape=False)
    labels = tmp_path / "names.txt"
    labels.write_text("".join(f"class {index}\n" for index in range(CLASSES)))
    flags = {**GIVEN, "input_size": str(SIZE), "labels": labels, "channel_order": "bgr"}
    with convoynet.load(path, threads=1, tune=False, **flags) as model:
        stated = json.loads(model.config.parameters["preprocess"].string_value)
        found = model([jpeg((200, 100, 50)), jpeg((0, 0, 0))])
        (best,) = model.predict(jpeg((200, 100, 50)), top=1)[0]
    assert (model.name, stated["color"], stated["mean"], stated["size"]) == ("small", "BGR", list(MEAN), [SIZE, SIZE])
    pixels = np.array([[50, 100, 200], [0, 0, 0]], np.float32) / 255
    images = np.broadcast_to(((pixels - MEAN) / STD)[:, :, None, None], (2, 3, SIZE, SIZE)).astype(np.float32)
    images = images if layout == "NCHW" else images.transpose(0, 2, 3, 1)
    (wanted,) = of_the_file(path, data=np.ascontiguousarray(images))
    np.testing.assert_allclose(found["prob"], wanted, 1e-3, 1e-3)
    assert best.label == f"class {wanted[0].argmax()}"


def test_pixels_are_left_to_a_file_that_takes_them(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "pixels.onnx", layout="NHWC", kind=TensorProto.UINT8)
    with convoynet.load(path, threads=1, tune=False, resize=str(SIZE)) as model:
        found = model(jpeg((200, 100, 50)))
    images = np.broadcast_to(np.array([200, 100, 50], np.uint8), (1, SIZE, SIZE, 3)).copy()
    np.testing.assert_allclose(found["prob"], of_the_file(path, data=images)[0], 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("make", "flags", "line"),
    [
        (lambda path: by_hand(path, batch=1), GIVEN, "has no free batch axis"),
        (lambda path: by_hand(path, change=a_second_input), GIVEN, "for one input, the images, and it has 2"),
        (lambda path: by_hand(path, kind=TensorProto.FLOAT16), GIVEN, "is FP16"),
        (
            by_hand,
            {**GIVEN, "input_size": "32"},
            "--input-size 32: its input 'data' takes images of 16x16",
        ),
        (by_hand, {"mean": "0.5", "std": "0.5"}, "has 3 channels, and --mean 1"),
        (lambda path: by_hand(path, kind=TensorProto.UINT8), GIVEN, "normalises pixels itself"),
    ],
)
def test_flags_that_do_not_suit_a_file(
    make: Callable[[Path], Path], flags: dict[str, str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(convoynet.NotStarted) as told:
        convoynet.load(make(tmp_path / "odd.onnx"), threads=1, tune=False, **flags)
    assert line in str(told.value)
    assert "\n" not in str(told.value)


def settings_of(**options: Any) -> ServeConfig:
    return ServeConfig(model_repository=(), **options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"onnx": ("absent.onnx",)}, "'absent.onnx' is neither a file nor a folder"),
        ({"onnx": (".",), "mean": "0.5"}, "--mean and --std belong together"),
        ({"onnx": (".",), "mean": "1,2", "std": "1,1"}, "--mean '1,2' is not R,G,B or one number"),
        ({"onnx": (".",), "mean": "1", "std": "0"}, "--std 0 must be above 0"),
        ({"onnx": (".",), "resize": "axb"}, "--resize 'axb' is not H or HxW"),
        ({"onnx": (".",), "input_size": "99999"}, "--input-size '99999' is not H or HxW"),
        ({"onnx": (".",), "interpolation": "best"}, "--interpolation must be one of nearest"),
        ({"onnx": (".",), "labels": Path("absent.txt")}, "--labels absent.txt: no such file"),
        ({"onnx": (".", "."), "model_name": "a"}, "--model-name goes with one --model-repository"),
        ({"resize": "8"}, "are for ONNX files: other models' config says it"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        settings_of(**options)


def test_names_and_what_is_served_of_what_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [model_name(Path(name)) for name in ("a.onnx", "my net v1.2.onnx", "ü.onnx", "_x.onnx")] == [
        "a", "my_net_v1.2", "model", "x",
    ]  # fmt: skip
    for name in ("a b.onnx", "a_b.onnx", ".hidden.onnx"):
        (tmp_path / name).write_bytes(b"")
    source = LoneFiles(tmp_path)
    assert source.folders() == {"a_b": (tmp_path / "a b.onnx").resolve()}
    assert "a_b.onnx is not served: a b.onnx has the name of its model" in caplog.text
    assert LoneFiles(tmp_path / "a b.onnx", "mine").folders() == {"mine": (tmp_path / "a b.onnx").resolve()}
    assert not Preprocessing().asked
    write_linear(tmp_path / "models")
    both = tmp_path / "both"
    write_linear(both)
    (both / "x.onnx").write_bytes(b"")
    paths = [str(tmp_path / "models"), str(tmp_path / "a b.onnx"), str(both), "s3://bucket/models"]
    assert split(paths) == ([paths[0], paths[2], paths[3]], [paths[1], paths[2]])


def test_the_command_takes_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = by_hand(tmp_path / "small.onnx")
    assert serve.serve([str(path), "--name", "mine", "--print-config"]) == 0
    said = capsys.readouterr().out
    assert f"onnx = [{json.dumps(str(path))}]" in said
    assert 'model_name = "mine"' in said
    assert "model_repository = []" in said
    assert serve.serve(["--onnx", str(path), "--print-config"]) == 0
    assert "model_repository = []" in capsys.readouterr().out
    assert serve.serve([str(tmp_path / "absent.onnx")]) == 2
    assert "absent.onnx' is neither a file nor a folder" in capsys.readouterr().err


def test_a_folder_is_watched_like_a_repository(tmp_path: Path) -> None:
    by_hand(tmp_path / "first.onnx")
    with (
        convoynet.serve(tmp_path, threads=1, tune=False, model_control_mode="poll", repository_poll_secs=0.2) as server,
        server.client() as client,
    ):
        assert client.models() == ["first"]
        whole = by_hand(tmp_path / ".second.onnx", names=("data", "other"))
        whole.replace(tmp_path / "second.onnx")
        until(lambda: client.models() == ["first", "second"])
        by_hand(tmp_path / ".first.onnx", names=("data", "new")).replace(tmp_path / "first.onnx")
        until(lambda: client.model_config("first").output[0].name == "new")
        (tmp_path / "second.onnx").unlink()
        until(lambda: client.models() == ["first"])


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)
