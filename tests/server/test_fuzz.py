"""Bytes that no client should send: every call ends with a status, and the server is none the worse for them."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import random
import re
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from PIL import Image

from convoynet.protos.inference import grpc_service_pb2 as pb
from tests.server.conftest import fake_model, infer_request, sums
from tests.server.onnx_models import write_colors
from tests.server.process import ServeProcess

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
PATH = f"/{SERVICE.full_name}"
UNARY = [rpc for rpc in SERVICE.methods if not rpc.server_streaming]
PATIENCE_S = 60.0
# A bug in the server is INTERNAL with this text; a hang is the client's deadline.
BUG = "internal error"
PATH_OF_OURS = re.compile(r"/(tmp|usr|home|root|opt|proc)/|\.py\b")
# What these calls do when they succeed is not what is tested here.
HARMLESS = [rpc for rpc in UNARY if not rpc.name.startswith(("RepositoryModel", "LogSettings", "TraceSetting"))]
Shot = tuple[str, bytes]


def image_bytes(side: int = 8, form: str = "PNG") -> bytes:
    """A good picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 127, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def picture(data: bytes) -> pb.ModelInferRequest:
    """A request of the model that takes encoded images."""
    request = pb.ModelInferRequest(model_name="colors")
    request.inputs.add(name="input", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(struct.pack("<I", len(data)) + data)
    return request


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bits, bytes, cuts, repeats, lengths that are far too large."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at:] = b""
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 16))
            case 3:
                changed[at : at + rng.randint(1, 8)] = b""
            case 4:
                changed[at:at] = changed[at : at + 32]
            case _:
                changed[at : at + 5] = rng.choice([b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\x80" * 5])
    return bytes(changed)


def seeds() -> list[tuple[str, Message]]:
    """A good request of every RPC, and several of inference."""
    typed = infer_request(1)
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.fp32_contents.extend([0, 1, 0, 0])
    asking = infer_request(1, 2, timeout=10**6, priority=1)
    asking.outputs.add(name="y").parameters["classification"].int64_param = 1
    found: list[tuple[str, Message]] = [("ModelInfer", r) for r in (infer_request(1), typed, asking)]
    found += [("ModelInfer", picture(image_bytes(form=form))) for form in ("PNG", "JPEG", "WEBP")]
    for rpc in HARMLESS:
        message = GetMessageClass(rpc.input_type)()
        for name in ("name", "model_name"):
            if name in rpc.input_type.fields_by_name:
                setattr(message, name, "sum")
        found.append((rpc.name, message))
    return found


def random_shots(count: int) -> Iterator[Shot]:
    """Mutations of good requests, their fields' values out of bounds, and bytes out of nowhere."""
    rng = random.Random(5)
    good = seeds()
    for _ in range(count):
        rpc, message = rng.choice(good)
        match rng.randrange(4):
            case 0:
                yield rpc, rng.randbytes(rng.randint(0, 200))
            case 1 if isinstance(message, pb.ModelInferRequest):
                yield rpc, odd(message, rng).SerializeToString()
            case 2 if isinstance(message, pb.ModelInferRequest) and message.model_name == "colors":
                form = rng.choice(["PNG", "JPEG", "WEBP"])
                yield rpc, picture(mutated(image_bytes(form=form), rng)).SerializeToString()
            case _:
                yield rpc, mutated(message.SerializeToString(), rng)


def odd(good: pb.ModelInferRequest, rng: random.Random) -> pb.ModelInferRequest:
    """A request that parses, with a value or two that make no sense."""
    request = pb.ModelInferRequest()
    request.CopyFrom(good)
    numbers = [-1, 0, 0, 1, 3, 8, 2**31, 2**40, 2**62, -(2**63)]
    texts = ["", "x", "sum", "FP32", "BYTES", "INT64", "BF16", "../..", "\0", "é" * 1000, "%s{}"]
    for _ in range(rng.randint(1, 3)):
        tensor = request.inputs[0] if request.inputs else request.inputs.add()
        match rng.randrange(9):
            case 0:
                tensor.shape[:] = [rng.choice(numbers) for _ in range(rng.randint(0, 5))]
            case 1:
                tensor.datatype = rng.choice(texts)
            case 2:
                tensor.name = rng.choice(texts)
            case 3:
                request.model_name = rng.choice(texts)
            case 4:
                request.model_version = rng.choice([*texts, "1", "-1", "9" * 100])
            case 5:
                name = rng.choice(
                    ["timeout", "priority", "sequence_id", "convoy_timings", "triton_x", rng.choice(texts)]
                )
                request.parameters[name].int64_param = rng.choice(numbers)
            case 6:
                asked = request.outputs.add(name=rng.choice(["y", "logits", *texts]))
                asked.parameters["classification"].int64_param = rng.choice(numbers)
            case 7:
                request.raw_input_contents.append(rng.randbytes(rng.randint(0, 64)))
            case _:
                tensor.parameters["shared_memory_region"].string_param = rng.choice(texts)
    return request


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int, rows: int) -> bytes:
    """A PNG whose header states that size, with `rows` rows of black behind it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(bytes(rows * (3 * width + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


BOMBS: dict[str, Callable[[], bytes]] = {
    "huge by its header": lambda: png_bomb(100_000, 100_000, 0),
    "wider than memory": lambda: png_bomb(2**31 - 1, 1, 0),
    "small file, many pixels": lambda: png_bomb(20_000, 10_000, 2000),
    "cut in its header": lambda: image_bytes()[:20],
    "cut in its pixels": lambda: image_bytes(64, "JPEG")[:-200],
    "a text of megabytes": lambda: (
        image_bytes()[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27), 9)) + image_bytes()[33:]
    ),
    "empty": lambda: b"",
    "not an image": lambda: b"GIF89a" + bytes(100),
    "a path": lambda: b"/etc/passwd",
}


FOUND: dict[str, Shot] = {
    # Each was a bug.
    "typed, and nothing of a huge shape": (
        "ModelInfer",
        bytes.fromhex("0a0373756d2a1d1204424631361a15008080808080808080408080808008808080808020"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_is_refused(server: ServeProcess, name: str) -> None:
    assert shoot(server, iter([FOUND[name]])) == {"INVALID_ARGUMENT": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    root = tmp_path_factory.mktemp("models")
    fake_model(root)
    write_colors(root)
    with ServeProcess(root) as running:
        yield running


def status(server: ServeProcess, sent: object, call: Callable[[], object]) -> str:
    """How a call ends; a bug, a hang or a path in the message fails the test and shows what was sent."""
    try:
        call()
    except grpc.RpcError as error:
        code, text = error.code(), error.details() or ""
        assert BUG not in text, (sent, server.log()[-3000:])
        assert code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN), (sent, code, text)
        assert code is not grpc.StatusCode.DEADLINE_EXCEEDED or "Request timeout expired" in text, sent
        assert not PATH_OF_OURS.search(text), text
        return str(code.name)
    return "OK"


def shoot(server: ServeProcess, shots: Iterator[Shot]) -> Counter[str]:
    """Sends each and tells how they ended; the server must be well after that."""
    ended: Counter[str] = Counter()
    with grpc.insecure_channel(server.url) as channel:
        for shot in shots:
            call = channel.unary_unary(f"{PATH}/{shot[0]}")
            ended[status(server, shot, lambda call=call, shot=shot: call(shot[1], timeout=PATIENCE_S))] += 1  # type: ignore[misc]
        infer = channel.unary_unary(f"{PATH}/ModelInfer", response_deserializer=pb.ModelInferResponse.FromString)
        assert sums(infer(infer_request(3).SerializeToString(), timeout=PATIENCE_S)) == [3]
    assert server.process.poll() is None
    assert "Traceback" not in server.log()
    return ended


@pytest.mark.parametrize("count", [1500, pytest.param(50_000, marks=pytest.mark.slow)])
def test_random_bytes_get_a_status_and_leave_nothing_behind(server: ServeProcess, count: int) -> None:
    shoot(server, random_shots(300))
    tree, before = len(server.tree()), server.resident_bytes()
    ended = shoot(server, random_shots(count))
    assert len(server.tree()) == tree
    assert server.resident_bytes() < before + 32 * 2**20
    # The mutations are of use only where many are refused and some are not.
    assert ended["OK"] > count / 50
    assert ended["INVALID_ARGUMENT"] > count / 5
    assert server.metric("convoy_inflight_requests") == server.metric("convoy_queue_depth") == 0


def test_streams_of_random_bytes_end_with_a_status(server: ServeProcess) -> None:
    rng = random.Random(6)
    good = [message for rpc, message in seeds() if rpc == "ModelInfer"]
    with grpc.insecure_channel(server.url) as channel:
        for _ in range(60):
            sent = [mutated(rng.choice(good).SerializeToString(), rng) for _ in range(rng.randint(0, 20))]
            call = channel.stream_stream(f"{PATH}/ModelStreamInfer")
            status(server, sent, lambda: list(call(iter(sent), timeout=PATIENCE_S)))  # noqa: B023
    shoot(server, iter([]))


def http_shots(count: int) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Method, path, body and headers: good ones with changes, in JSON and with binary tensors behind it."""
    rng = random.Random(7)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    plain = json.dumps({"inputs": [{**tensor, "data": [1, 2, 3, 4]}]}).encode()
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 16}}]}).encode()
    for _ in range(count):
        binary = rng.random() < 0.5
        body = head + bytes(16) if binary else plain
        headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
        path = "/v2/models/sum/infer"
        match rng.randrange(7):
            case 0:
                path = "/v2/" + mutated(b"models/sum/versions/1/infer", rng).hex()
            case 1:
                headers["Inference-Header-Content-Length"] = rng.choice(["-1", "0", "x", "9" * 30, "5"])
            case 2:
                headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "br", "x"])
            case 4:
                body, headers = odd_json(rng), {}
            case 3:
                headers["X-Request-Id"] = "x" * rng.randint(1, 4000)
            case _:
                body = mutated(body, rng)
        yield rng.choice(["POST"] * 8 + ["GET", "PUT", "X"]), path, body, headers


def odd_json(rng: random.Random) -> bytes:
    """JSON of the right kind with a value or two that make no sense."""
    numbers = [-1, 0, 1, 4, 2**31, 2**40, 2**63, 2**70, 1.5, True, None, "4", [4]]
    words: list[object] = ["", "x", "y", "FP32", "BYTES", "INT64", "BF16", "BOOL", "é" * 500, "\0", 7, None, [], {}]
    datas: list[object] = [
        [1, 2, 3, 4],
        [[1, 2], [3]],
        [],
        [[]],
        [[[[[[[[1]]]]]]]],
        "abcd",
        None,
        [None] * 4,
        ["NaN"] * 4,
    ]
    datas += [[1e400, -1e400, 1e39, 0], [2**70, 0, 0, 0], [{}, {}, {}, {}], {"0": 1}, [True, False, 1, 0]]
    tensor: dict[str, object] = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    document: dict[str, object] = {"inputs": [tensor]}
    parameters = {"classification": rng.choice(numbers), "binary_data": rng.choice(words)}
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(8):
            case 0:
                tensor["shape"] = [rng.choice(numbers) for _ in range(rng.randint(0, 5))]
            case 1:
                tensor[rng.choice(["name", "datatype", "shape", "data"])] = rng.choice(words)
            case 2:
                tensor["data"] = rng.choice(datas)
            case 3:
                tensor["parameters"] = {"binary_data_size": rng.choice(numbers)}
            case 4:
                document["outputs"] = [{"name": rng.choice(["y", *words]), "parameters": parameters}]
            case 5:
                document["parameters"] = {rng.choice(["timeout", "priority", "x", "triton_x"]): rng.choice(numbers)}
            case 6:
                document[rng.choice(["id", "inputs", "outputs", "parameters"])] = rng.choice(words)
            case _:
                return b"[" * rng.choice([10, 2000, 200_000])
    return json.dumps(document).encode()


def test_http_that_makes_no_sense_gets_a_status(server: ServeProcess) -> None:
    ended: Counter[int] = Counter()
    for shot in http_shots(600):
        method, path, body, headers = shot
        connection = http.client.HTTPConnection(server.http, timeout=PATIENCE_S)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        connection.close()
        # 501 for what it has not, 504 for a timeout that the request asked for.
        assert answer.status < 500 or answer.status in (501, 504), (shot, answer.status, text)
        assert not PATH_OF_OURS.search(text), (shot, text)
        ended[answer.status] += 1
    assert ended[200] > 20
    assert ended[400] > 200
    shoot(server, iter([]))


def test_bytes_that_are_no_http_close_their_connection_alone(server: ServeProcess) -> None:
    rng = random.Random(8)
    starts = [
        b"",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
    ]
    before = server.resident_bytes()
    for address in (server.url, server.http):
        host, _, port = address.rpartition(":")
        for _ in range(40):
            with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw, contextlib.suppress(OSError):
                raw.sendall(rng.choice(starts) + rng.randbytes(rng.randint(0, 2000)))
    shoot(server, iter([]))
    assert server.resident_bytes() < before + 32 * 2**20


@pytest.mark.parametrize("name", BOMBS)
def test_pictures_that_mean_harm_are_refused(server: ServeProcess, name: str) -> None:
    data = BOMBS[name]()
    shoot(server, iter([("ModelInfer", picture(image_bytes()).SerializeToString())]))
    before = server.resident_bytes()
    ended = shoot(server, iter([("ModelInfer", picture(data).SerializeToString())] * 5))
    assert ended == {"INVALID_ARGUMENT": 5}
    assert server.resident_bytes() < before + 96 * 2**20


def test_a_message_over_the_limit_is_refused_by_its_size(tmp_path: Path) -> None:
    fake_model(tmp_path)
    with ServeProcess(tmp_path, "--max-message-bytes", "65536") as server, grpc.insecure_channel(server.url) as channel:
        call = channel.unary_unary(f"{PATH}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(100_000), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        shoot(server, iter([("ModelInfer", infer_request(1).SerializeToString())]))
