"""The same calls to a real Triton and to Convoy: the same codes, texts and fields, but for the documented differences.

The table of docs/triton-differences.md is what this test reads: a difference that is not in it fails, and so does a
row that is no longer true.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from onnx import TensorProto, helper

from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server.protocol.dispatch import SERVICE
from tests.server import onnx_models, triton_server
from tests.server.process import free_port
from tests.server.triton_cases import cases, facts, shared_memory
from tests.server.triton_requests import KEY, REGION_BYTES, VALUES, Case, infer, with_parameters

PATIENCE_S = 60.0
CASES = {case.name: case for case in cases()}
REGION = Path("/dev/shm" + KEY)
_LABELS = "zero\none\ntwo\n"
_LINEAR = f'return {{"logits": x["input"] @ np.array({onnx_models.LINEAR_WEIGHTS.tolist()}, np.float32)}}'
_SAME = 'return {n.replace("in_", "out_"): v for n, v in x.items()}'
_ONNX_TYPES = {"BYTES": "STRING", "FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE"}
_COMPATIBLE = {
    *("ModelStatistics unknown", "ModelStatistics unknown version", "region of no key", "region whose key is missing"),
    *("region of a private key", "region of a path", "region beyond the file", "region of a huge size"),
    *("region with a huge offset", "region whose sum overflows", "region of no bytes"),
    "output to a region that is too small",
}
"""Differences of the code alone."""
_PREFIX = re.compile(r"\[request id: [^\]]*\] ")
_BY_NATURE = {"platform", "backend", "default_model_filename", "optimization", "version_policy", "trace_mode"} | {
    "ns",
    "last_inference",
}
"""Fields that name the software, its engines and its times, or say more than Triton does."""


class Answer(NamedTuple):
    code: str
    text: str
    fields: Any

    def __str__(self) -> str:
        return f"{self.code} {self.text} {json.dumps(self.fields, sort_keys=True)}"


class Difference(NamedTuple):
    """One row of the table: a code and pieces of the answer, on each side."""

    triton: list[str]
    convoy: list[str]


def _differences() -> dict[str, Difference]:
    """The table, by the calls that its rows name."""
    text = (Path(__file__).parents[3] / "docs" / "triton-differences.md").read_text()
    table: dict[str, Difference] = {}
    for line in text.splitlines():
        cells = line.strip().strip("|").split("|")
        names = re.findall(r"`([^`]+)`", cells[0])
        if len(cells) == 4 and names and names[0] in CASES:
            triton, convoy = (re.findall(r"`([^`]+)`", cell) for cell in cells[1:3])
            table |= {name: Difference(triton, convoy) for name in names}
    return table


DIFFERENCES = _differences()
DEADLY = {name for name, row in DIFFERENCES.items() if row.triton[0] == "dies"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Answer]]:
    """What both servers say to every call that they survive."""
    if why := triton_server.missing():
        pytest.skip(why)
    root = tmp_path_factory.mktemp("parity")
    _write_models(root / "triton" / "models", root / "convoy" / "models")
    said = {}
    REGION.write_bytes(np.ones(REGION_BYTES // 4, np.float32).tobytes())
    try:
        port = free_port()
        flags = ("--model-control-mode=explicit", "--load-model=*")
        with triton_server.serve(root / "triton" / "models", port, *flags) as stub:
            said["triton"] = {name: _answer(stub, case) for name, case in CASES.items() if name not in DEADLY}
            said["triton"] |= _overload(stub)
        REGION.write_bytes(np.ones(REGION_BYTES // 4, np.float32).tobytes())
        control = ("--no-tune", "--model-control-mode", "explicit", "--load-model")
        for side, extra in {"convoy": ("*",), "compatible": ("linear", "slow", "--triton-compat")}.items():
            with (
                onnx_models.serve(root / "convoy" / "models", "--allow-client-shm", *control, *extra) as server,
                grpc.insecure_channel(server.url) as channel,
            ):
                stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
                chosen = CASES if side == "convoy" else {c.name: c for c in (*facts(), *shared_memory())}
                said[side] = {name: _answer(stub, case) for name, case in chosen.items()} | _overload(stub)
    finally:
        REGION.unlink()
    return said


def _overload(stub: grpc_service_pb2_grpc.GRPCInferenceServiceStub) -> dict[str, Answer]:
    """What is said to a request for which there is no place, and to one whose time runs out in the queue."""
    message = infer(model_name="slow")
    hurried = with_parameters(infer(model_name="slow"), timeout=50_000)
    refused = late = None
    while refused is None:  # again where this process was so slow that each found a place
        calls = [stub.ModelInfer.future(message, timeout=PATIENCE_S) for _ in range(8)]
        failed = [call for call in calls if call.exception() is not None]
        refused = failed[0] if failed else None
    while late is None or late.exception() is None:  # the same
        running = stub.ModelInfer.future(message, timeout=PATIENCE_S)
        late = stub.ModelInfer.future(hurried, timeout=PATIENCE_S)
        assert running.exception() is None
    answers = {}
    for name, call in {"full queue": refused, "late": late}.items():
        answers[name] = Answer(call.code().name, _PREFIX.sub("", call.details() or ""), [])
    return answers


def _answer(stub: grpc_service_pb2_grpc.GRPCInferenceServiceStub, case: Case) -> Answer:
    """What is said; of statistics several times in a row: Triton counts a request only after its answer has left."""
    answers = [_ask(stub, case)]
    while case.rpc == "ModelStatistics" and len(answers) < 5:
        time.sleep(0.1)
        again = _ask(stub, case)
        answers = [*answers, again] if again == answers[-1] else [again]
    return answers[-1]


def _ask(stub: grpc_service_pb2_grpc.GRPCInferenceServiceStub, case: Case) -> Answer:
    call = getattr(stub, case.rpc)
    heard: list[Any] = []
    try:
        if case.rpc == "ModelStreamInfer":
            replies = call(iter(case.messages), timeout=PATIENCE_S, metadata=case.metadata)
            heard.extend(map(_fields, replies))
        else:
            heard.append(_fields(call(case.messages[0], timeout=PATIENCE_S, metadata=case.metadata)))
    except grpc.RpcError as error:
        return Answer(error.code().name, _PREFIX.sub("", error.details()), heard)
    return Answer("OK", "", heard)


def _fields(message: Message) -> Any:
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for answer in (fields, fields.get("infer_response", {})):
        if "raw_output_contents" in answer:
            # Where no outputs are named, Triton gives them in an order of its own.
            pairs = zip(answer.pop("outputs"), answer.pop("raw_output_contents"), strict=True)
            answer["outputs"] = sorted([*pairs], key=lambda pair: str(pair[0]["name"]))
    if "error_message" in fields:
        fields["error_message"] = _PREFIX.sub("", fields["error_message"])
    return _without(fields)


def _without(value: Any) -> Any:
    """Without what differs by nature. A stream's parameter is looked at."""
    if isinstance(value, list | tuple):
        return [_without(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "triton_final_response" in value:
        return value
    kept = {key: _without(each) for key, each in value.items() if key not in _BY_NATURE}
    for group in kept.get("instance_group", []):
        group.pop("name", None)
        kept.pop("parameters", None)  # of the config: what the engine says of itself
    return kept


@pytest.mark.parametrize("name", CASES)
def test_convoy_answers_as_triton_does(answers: dict[str, dict[str, Answer]], name: str) -> None:
    ours = answers["convoy"][name]
    if name not in DIFFERENCES:
        assert ours == answers["triton"][name]
        return
    row = DIFFERENCES[name]
    assert ours.code == row.convoy[0]
    assert [piece for piece in row.convoy[1:] if piece not in str(ours)] == [], ours
    if name not in DEADLY:
        theirs = answers["triton"][name]
        assert theirs.code == row.triton[0]
        assert [piece for piece in row.triton[1:] if piece not in str(theirs)] == [], theirs
        assert ours != theirs, "this difference is gone: take it out of docs/triton-differences.md"


@pytest.mark.parametrize("name", [n for n, row in DIFFERENCES.items() if n in _COMPATIBLE])
def test_the_compatible_server_has_tritons_codes(answers: dict[str, dict[str, Answer]], name: str) -> None:
    assert answers["compatible"][name] == answers["triton"][name]


def test_refusals_under_load(answers: dict[str, dict[str, Answer]]) -> None:
    texts = {"full queue": "Exceeds maximum queue size", "late": "Request timeout expired"}
    codes = {"full queue": "RESOURCE_EXHAUSTED", "late": "DEADLINE_EXCEEDED"}
    for name, text in texts.items():
        assert answers["convoy"][name] == Answer(codes[name], text, [])
        assert answers["compatible"][name] == answers["triton"][name] == Answer("UNAVAILABLE", text, [])


def test_there_are_enough_calls_of_every_rpc() -> None:
    assert len(CASES) - len(DIFFERENCES) >= 60
    assert {case.rpc for case in CASES.values()} == {rpc.name for rpc in SERVICE.methods}


def _write_models(triton: Path, convoy: Path) -> None:
    """The same models for both: Python ones for Triton, ONNX ones for Convoy."""
    for name in ("linear", "other", "single"):
        folder = onnx_models.write_linear(convoy, name, max_batch=0 if name == "single" else 8)
        config = (folder / "config.pbtxt").read_text()
        triton_server.write_model(triton, name, _python(config), _LINEAR, _LABELS)
    _write_identity(convoy, "half", {"input": ("logits", "FP16")}, [4], batched=True)
    _write_identity(convoy, "types", {f"in_{d}": (f"out_{d}", d) for d in VALUES}, [2])
    _write_identity(convoy, "texts", {"in_BYTES": ("out_BYTES", "BYTES")}, [2])
    _write_slow(triton, convoy)
    for name in ("half", "types", "texts"):
        config = (convoy / name / "config.pbtxt").read_text()
        triton_server.write_model(
            triton, name, _python(config), 'return {"logits": x["input"]}' if name == "half" else _SAME
        )


def _write_slow(triton: Path, convoy: Path) -> None:
    """The linear model's tensors, 0.3 seconds a batch of one row, two places in the queue."""
    policy = "default_timeout_microseconds: 9000000 allow_timeout_override: true max_queue_size: 2"
    config = (convoy / "linear" / "config.pbtxt").read_text()
    config = config.replace('label_filename: "labels.txt"', "").replace("max_batch_size: 8", "max_batch_size: 1")
    config = _python(config).replace('name: "linear"', 'name: "slow"', 1)
    config = re.sub(r"dynamic_batching \{\s*\}", f"dynamic_batching {{ default_queue_policy {{ {policy} }} }}", config)
    triton_server.write_model(triton, "slow", config, f"time.sleep(0.3)\n{_LINEAR}")
    folder = convoy / "slow" / "1"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text('{"seconds": 0.3}')
    (convoy / "slow" / "config.pbtxt").write_text(f'backend: "fake"\n{config}')


def _python(config: str) -> str:
    return re.sub(r"^(backend|platform|default_model_filename):.*\n", "", config, flags=re.MULTILINE)


def _write_identity(
    root: Path, name: str, tensors: dict[str, tuple[str, str]], dims: list[int], *, batched: bool = False
) -> None:
    """A model that gives back each input: `tensors` has its output and its datatype."""
    rows = ["batch"] if batched else []
    lines = [
        f'backend: "onnxruntime"\nmax_batch_size: {8 if batched else 0}',
        "instance_group { count: 1 kind: KIND_CPU }",
        # OpenVINO's CPU plugin computes INT64 with 32 bits.
        'parameters { key: "engine" value { string_value: "onnxruntime" } }',
    ]
    values: dict[str, list[onnx.ValueInfoProto]] = {"input": [], "output": []}
    for one, (other, datatype) in tensors.items():
        data_type = f"TYPE_{datatype.replace('BYTES', 'STRING')}"
        kind = TensorProto.DataType.Value(_ONNX_TYPES.get(datatype, datatype))
        for side, tensor in (("input", one), ("output", other)):
            lines.append(f'{side} {{ name: "{tensor}" data_type: {data_type} dims: {dims} }}')
            values[side].append(helper.make_tensor_value_info(tensor, kind, [*rows, *dims]))
    nodes = [helper.make_node("Identity", [one], [other]) for one, (other, _) in tensors.items()]
    graph = helper.make_graph(nodes, name, values["input"], values["output"])
    folder = root / name / "1"
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    (root / name / "config.pbtxt").write_text("\n".join(lines) + "\n")
