"""convoynet.server.client.client against a real server in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.client.client import Client, ClientError, Unreachable, infer_request, target
from tests.server import onnx_models
from tests.server.client.conftest import png


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("client") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_linear(repository, "single", max_batch=0)
    onnx_models.write_colors(repository)
    onnx_models.write_slow(repository)
    with onnx_models.serve(repository) as server:
        yield server


def test_infer_returns_what_the_model_computes(client: Client) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    answer = client.infer("linear", {"input": rows})
    assert list(answer) == ["logits"]
    assert answer["logits"].dtype == np.float32
    np.testing.assert_allclose(answer["logits"], rows @ onnx_models.LINEAR_WEIGHTS, rtol=1e-6)


def test_infer_without_a_batch_axis(client: Client) -> None:
    row = np.array([1, 2, 3, 4], np.float32)
    assert client.infer("single", {"input": row})["logits"].tolist() == [2.5, 4, 11]


def test_infer_classes(client: Client) -> None:
    rows = np.array([[1, 2, 3, 4], [9, 0, 0, 0]], np.float32)
    answer = client.infer("linear", {"input": rows}, class_count=2)["logits"]
    assert answer.tolist() == [
        [b"11.000000:2:two", b"4.000000:1:one"],
        [b"9.000000:0:zero", b"0.000000:1:one"],
    ]
    named = client.infer("linear", {"input": rows}, outputs=["logits"], class_count=1)["logits"]
    assert named.tolist() == [[b"11.000000:2:two"], [b"9.000000:0:zero"]]


def test_tensors_larger_than_grpcs_default_limit(client: Client) -> None:
    image = b"\x89PNG" + bytes(5 * 2**20)
    with pytest.raises(ClientError, match="not a readable image") as caught:
        client.infer("colors", {"input": [image]})
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_model_facts(client: Client) -> None:
    assert client.server_ready()
    assert client.server_metadata().name == "convoy"
    assert client.model_ready("linear")
    assert not client.model_ready("nothing")
    assert client.models() == ["colors", "linear", "single", "slow"]
    metadata = client.model_metadata("linear")
    assert (metadata.inputs[0].datatype, list(metadata.inputs[0].shape)) == ("FP32", [-1, 4])
    config = client.model_config("colors")
    assert config.parameters["activation"].string_value == "softmax"
    assert config.max_batch_size == 8


def test_statistics_count_what_was_sent(client: Client) -> None:
    (before,) = client.statistics("single")
    client.infer("single", {"input": np.zeros(4, np.float32)})
    (after,) = client.statistics("single")
    assert after.inference_count == before.inference_count + 1
    assert {each.name for each in client.statistics()} == {"colors", "linear", "single", "slow"}


def test_classify_bytes_and_paths_over_several_batches(client: Client, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue"))
    colors = [*onnx_models.COLORS * 3, "blue"]
    # PIL's "green" is half as bright: logits 0, 128/25.5, 0.
    images = [png(color) for color in colors[:-1]]
    answers = client.classify("colors", [*images, tmp_path / "blue.png"])
    assert [answer[0].label for answer in answers] == colors
    scores = {"red": 10.0, "green": 128 / 25.5, "blue": 10.0}
    for color, answer in zip(colors, answers, strict=True):
        best = np.exp(scores[color])
        assert answer[0].probability == pytest.approx(best / (best + 2), rel=1e-5)
        assert answer[0].class_index == onnx_models.COLORS.index(color)
        assert sum(each.probability for each in answer) == pytest.approx(1)
    assert [len(answer) for answer in client.classify("colors", images[:2], top=2)] == [2, 2]
    assert client.classify("colors", []) == []


@pytest.mark.parametrize(
    ("model", "value", "code", "message"),
    [
        ("nothing", np.zeros((1, 4), np.float32), "NOT_FOUND", "unknown model: 'nothing' is not found"),
        ("linear", np.zeros((1, 5), np.float32), "INVALID_ARGUMENT", r"Expected \[-1,4\], got \[1,5\]"),
        ("linear", np.zeros((1, 4)), "INVALID_ARGUMENT", "'FP64', but model 'linear' expects 'FP32'"),
        ("linear", np.zeros((9, 4), np.float32), "INVALID_ARGUMENT", "batch-size must be <= 8 for 'linear'"),
        ("linear", np.zeros((1, 4), np.complex64), "INVALID_ARGUMENT", "input 'input': numpy dtype 'complex64'"),
        ("colors", [b"no image"], "INVALID_ARGUMENT", "not a readable image"),
    ],
)
def test_errors_keep_the_code_and_take_one_line(
    client: Client, model: str, value: np.ndarray, code: str, message: str
) -> None:
    with pytest.raises(ClientError, match=message) as caught:
        client.infer(model, {"input": value})
    assert caught.value.code.name == code
    assert "\n" not in str(caught.value)


def test_timeout_is_the_deadline(client: Client) -> None:
    with pytest.raises(ClientError) as caught:
        client.infer("slow", {"input": np.ones((1, 1), np.float32)}, timeout=0.02)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    # The server lets go of it: the next request is answered.
    assert client.infer("slow", {"input": np.full((1, 1), 3, np.float32)})["logits"].tolist() == [[3]]


def test_threads_share_one_client_and_get_their_own_answers(client: Client) -> None:
    barrier = threading.Barrier(16)

    def ask(number: int) -> None:
        barrier.wait()
        for step in range(10):
            row = np.array([[number, step, 0, 1]], np.float32)
            assert client.infer("linear", {"input": row})["logits"].tolist() == [[number, 2 * step, 3 - number]]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))


def test_no_server() -> None:
    with Client("127.0.0.1:1") as client:
        assert not client.server_ready()
        with pytest.raises(Unreachable, match=r"no server at 127.0.0.1:1 \(connection refused\)"):
            client.model_ready("linear")


def test_closed_client(live: onnx_models.LiveServer) -> None:
    client = Client(live.url)
    client.close()
    with pytest.raises(ClientError, match="closed channel") as caught:
        client.model_ready("linear")
    assert caught.value.code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gpu-box", "gpu-box:8001"),
        ("gpu-box:9001", "gpu-box:9001"),
        ("grpc://gpu-box:9001/", "gpu-box:9001"),
        ("[::1]", "[::1]:8001"),
        ("[::1]:9001", "[::1]:9001"),
        ("unix:/run/convoy.sock", "unix:/run/convoy.sock"),
    ],
)
def test_target(url: str, expected: str) -> None:
    assert target(url) == expected


@pytest.mark.parametrize(
    ("url", "message"), [("http://gpu-box:8000", "give the gRPC address as HOST:PORT"), (":8001", "names no host")]
)
def test_target_refuses(url: str, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        target(url)


def test_request_message() -> None:
    values = np.array([[1.0, 2.0]], np.float32)
    request = infer_request(
        "m",
        {"x": values, "images": [b"ab", b""]},
        outputs=["y"],
        class_count=3,
        options={
            "version": "2",
            "request_id": "r1",
            "priority": 1,
            "parameters": {"flag": True, "count": 3, "ratio": 0.5, "note": "n"},
            "datatypes": {"x": "BF16"},
        },
    )
    assert request == pb.ModelInferRequest(
        model_name="m",
        model_version="2",
        id="r1",
        parameters={
            "priority": pb.InferParameter(uint64_param=1),
            "flag": pb.InferParameter(bool_param=True),
            "count": pb.InferParameter(int64_param=3),
            "ratio": pb.InferParameter(double_param=0.5),
            "note": pb.InferParameter(string_param="n"),
        },
        inputs=[
            {"name": "x", "datatype": "BF16", "shape": [1, 2]},
            {"name": "images", "datatype": "BYTES", "shape": [2, 1]},
        ],
        outputs=[{"name": "y", "parameters": {"classification": {"int64_param": 3}}}],
        raw_input_contents=[b"\x80\x3f\x00\x40", b"\x02\0\0\0ab\0\0\0\0"],
    )
