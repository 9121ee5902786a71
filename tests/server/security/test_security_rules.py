"""The rules that would have prevented nearly every known hole of model servers: one test, or one group, for each."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.repository import repository
from convoynet.server.security.security import NEEDS, digest
from tests.server import onnx_models
from tests.server.conftest import Running, Serving, code_of, fake_model, infer_request
from tests.server.http.test_api import ENDPOINTS
from tests.server.http_calls import call

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "server"


def sources() -> Iterator[tuple[Path, ast.AST]]:
    """Every module of the server, parsed."""
    for file in sorted(SERVER.rglob("*.py")):
        yield file, ast.parse(file.read_text())


async def rpc_code(channel: aio.Channel, rpc: str, request: Any = None) -> tuple[grpc.StatusCode, str]:
    """What one RPC ends with, by its name."""
    method = SERVICE.methods_by_name[rpc]
    call_ = channel.unary_unary(
        f"/{SERVICE.full_name}/{rpc}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=lambda data: data,
    )
    return await code_of(call_(request or message_factory.GetMessageClass(method.input_type)(), timeout=60))


# No pickle anywhere: models are ONNX, IR or plans, and configurations are data.


def test_no_pickle_anywhere() -> None:
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"}
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "yaml.load"), f"{file.name}:{node.lineno}"
                assert "allow_pickle" not in {k.arg for k in node.keywords}, f"{file.name}:{node.lineno}"
                continue
            else:
                continue
            for name in names:
                assert name.partition(".")[0] not in forbidden, f"{file.name}:{node.lineno}"
                # Its connections, queues and processes pickle; its shared memory does not.
                if name.partition(".")[0] == "multiprocessing":
                    assert name.startswith("multiprocessing.shared_memory"), f"{file.name}:{node.lineno}"


# Management RPCs are off, or on a listener of their own.


async def test_management_rpcs_are_off_or_on_a_separate_listener(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    managing = {rpc for rpc, needs in NEEDS.items() if needs == {"manage"}}
    async with serving(management="0,0") as running:
        for rpc in managing:
            code, text = await rpc_code(running.channel, rpc)
            assert (code, "--management" in text) == (grpc.StatusCode.PERMISSION_DENIED, True), rpc
        for endpoint, (method, document, rpc, _) in ENDPOINTS.items():
            if rpc in managing:
                answer = await call(running.app.http_port, method, endpoint.split()[1], document)
                assert answer.status == 403, endpoint
        async with aio.insecure_channel(f"127.0.0.1:{running.app.management_ports[0]}") as channel:
            for rpc in managing:
                assert (await rpc_code(channel, rpc))[0] is not grpc.StatusCode.PERMISSION_DENIED, rpc


async def test_the_management_listener_asks_for_tokens_too(serving: Serving, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    fake_model(folder)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"camera infer {digest('aremac')}\n")
    async with serving(root=folder, management="0,0", auth_tokens=tokens) as running:
        async with aio.insecure_channel(f"127.0.0.1:{running.app.management_ports[0]}") as channel:
            assert (await rpc_code(channel, "RepositoryModelLoad"))[0] is grpc.StatusCode.UNAUTHENTICATED
        path = "/v2/repository/models/sum/load"
        headers = {"Authorization": "Bearer aremac"}
        assert (await call(running.app.management_ports[1], "POST", path, headers=headers)).status == 403


# Bind 127.0.0.1 unless told otherwise.


def _reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


async def test_bind_to_this_machine_unless_told(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    # 127.0.0.2 is this machine as well, and no address that a server of 127.0.0.1 listens on.
    async with serving(management="0,0") as running:
        app = running.app
        for port in (app.grpc_port, app.http_port, app.metrics_port, *app.management_ports):
            assert _reachable("127.0.0.1", port)
            assert not _reachable("127.0.0.2", port)
    async with serving(host="0.0.0.0", management="0,0") as running:
        app = running.app
        assert all(_reachable("127.0.0.2", port) for port in (app.grpc_port, app.http_port, app.metrics_port))
        assert not any(_reachable("127.0.0.2", port) for port in app.management_ports)


# Names are matched strictly and stay inside the repository; symbolic links out of it are refused.


@pytest.mark.parametrize("name", ["a b", "-a", "a\n", "é", "a" * 129, "a;b", "%2e%2e"])
def test_names_are_strict(tmp_path: Path, name: str) -> None:
    fake_model(tmp_path, name)
    (found,) = repository.scan(tmp_path, repository.Defaults(8, 1))
    assert found.spec is None
    assert "may hold letters" in found.reason


@pytest.mark.parametrize("version", ["01", "1a", "-1", "+1", "1\uff11", "0"])
def test_versions_are_strict(tmp_path: Path, version: str) -> None:
    fake_model(tmp_path)
    (tmp_path / "sum" / "1").rename(tmp_path / "sum" / version)
    (found,) = repository.scan(tmp_path, repository.Defaults(8, 1))
    assert found.spec is None


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "link"])
def test_labels_stay_inside_the_model(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "models"
    fake_model(folder)
    (tmp_path / "secret").write_text("s")
    (folder / "secret").write_text("s")
    (folder / "sum" / "link").symlink_to(tmp_path / "secret")
    config = folder / "sum" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [1] }", f'dims: [1] label_filename: "{file}" }}'))
    found = next(f for f in repository.scan(folder, repository.Defaults(8, 1)) if f.name == "sum")
    assert found.spec is None
    assert "leads out of the model's folder" in found.reason


@pytest.mark.parametrize("file", ["../../other/1/model.json", "/etc/hostname"])
def test_model_files_stay_inside_the_model(tmp_path: Path, file: str) -> None:
    fake_model(tmp_path)
    fake_model(tmp_path, "other")
    config = tmp_path / "sum" / "config.pbtxt"
    config.write_text(config.read_text() + f'default_model_filename: "{file}"\n')
    found = next(f for f in repository.scan(tmp_path, repository.Defaults(8, 1)) if f.name == "sum")
    assert found.spec is None, "a model file outside its folder is served"


@pytest.mark.parametrize("what", ["model", "file"])
def test_symbolic_links_out_of_the_repository_are_refused(tmp_path: Path, what: str) -> None:
    folder, outside = tmp_path / "models", tmp_path / "outside"
    fake_model(outside)
    folder.mkdir()
    if what == "model":
        (folder / "sum").symlink_to(outside / "sum")
    else:
        fake_model(folder)
        (folder / "sum" / "1" / "model.json").unlink()
        (folder / "sum" / "1" / "model.json").symlink_to(outside / "sum" / "1" / "model.json")
    assert not [f for f in repository.scan(folder, repository.Defaults(8, 1)) if f.spec is not None]


@pytest.mark.parametrize("name", ["../sum", "/etc", "a/b", "..", "", "a\0b"])
async def test_loads_of_names_that_lead_elsewhere_are_refused(serving: Serving, tmp_path: Path, name: str) -> None:
    fake_model(tmp_path / "models")
    fake_model(tmp_path)
    async with serving(root=tmp_path / "models", management="on") as running:
        code, text = await code_of(running.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name)))
        assert code is not grpc.StatusCode.OK
        assert str(tmp_path) not in text


# Shared memory: the server's own has no name that others could open; clients' is off.


async def test_the_servers_own_shared_memory_has_no_name(serving: Serving, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("needs /dev/shm")
    onnx_models.write_linear(tmp_path)
    before = {entry.name for entry in shm.iterdir()}
    async with serving() as running:
        assert running.app.core.ready
        new = [entry for entry in shm.iterdir() if entry.name not in before and entry.stat().st_uid == os.getuid()]
        # Other programs of this user may make some meanwhile; ours would say so.
        assert not [entry.name for entry in new if "convoy" in entry.name]
        assert all(entry.stat().st_mode & 0o077 == 0 for entry in new)


async def test_client_shared_memory_is_off_by_default(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(management="on") as running:
        for rpc in ("SystemSharedMemoryRegister", "CudaSharedMemoryRegister"):
            code, text = await rpc_code(running.channel, rpc)
            assert code is not grpc.StatusCode.OK
            assert "--allow-client-shm" in text


# Errors carry no paths.


async def test_errors_carry_no_paths(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, fail_above=0)
    onnx_models.write_colors(tmp_path)
    fake_model(tmp_path, "broken")
    (tmp_path / "broken" / "1" / "model.json").write_text("{")
    fake_model(tmp_path, "unreadable")
    (tmp_path / "unreadable" / "config.pbtxt").write_bytes(b"\xff")
    async with serving() as running:
        texts = [(await code_of(running.stub.ModelInfer(infer_request(1, model=name))))[1] for name in _models(running)]
        texts += [(await rpc_code(running.channel, rpc.name))[1] for rpc in SERVICE.methods if not rpc.server_streaming]
        for endpoint, (method, document, _, _) in ENDPOINTS.items():
            texts.append((await call(running.app.http_port, method, endpoint.split()[1], document)).body.decode())
        headers = {"Content-Type": "image/png"}
        answer = await call(running.app.http_port, "POST", "/v2/models/colors/infer", b"no image", headers)
        texts.append(answer.body.decode())
        for text in texts:
            for secret in (str(tmp_path), str(ROOT), "/tmp", "site-packages", ".py", "Traceback"):
                assert secret not in text
        assert sum(bool(text) for text in texts) > 20


def _models(running: Running) -> list[str]:
    return [*{m.spec.name for m in running.app.core}, *{name for name, _ in running.app.core.failed}, "nothing"]


# No file is named from afar.


async def test_no_remote_file_paths_in_trace_settings(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    target = tmp_path / "written"
    request = pb.TraceSettingRequest()
    request.settings["trace_file"].value.append(str(target))
    async with serving(management="on") as running:
        assert (await rpc_code(running.channel, "TraceSetting", request))[0] is not grpc.StatusCode.OK
        assert not target.exists()


async def test_no_remote_file_paths_in_log_settings(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    target = tmp_path / "written"
    request = pb.LogSettingsRequest()
    request.settings["log_file"].string_param = str(target)
    async with serving(management="on") as running:
        assert (await rpc_code(running.channel, "LogSettings", request))[0] is not grpc.StatusCode.OK
        assert not target.exists()


# One place authorizes, whatever the front end.


async def test_the_same_authorization_for_every_front_end(serving: Serving, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    fake_model(folder)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"nobody read {digest('x')}\n")
    async with serving(root=folder, auth_tokens=tokens) as running:
        for endpoint, (method, document, rpc, message) in ENDPOINTS.items():
            code, _ = await rpc_code(running.channel, rpc, message)
            answer = await call(running.app.http_port, method, endpoint.split()[1], document)
            refused = bool(NEEDS[rpc])
            assert (code is grpc.StatusCode.UNAUTHENTICATED) == refused, rpc
            assert (answer.status == 401) == refused, endpoint


async def test_the_same_authorization_for_streams(serving: Serving, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    fake_model(folder)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"nobody read {digest('x')}\n")
    async with serving(root=folder, auth_tokens=tokens) as running:
        texts: list[str] = []
        code = None
        try:
            stream = running.stub.ModelStreamInfer(iter([infer_request(1)]))
            texts = [reply.error_message async for reply in stream]
        except aio.AioRpcError as error:
            code = error.code()
        # A stream is refused as a whole, or each of its requests in a reply.
        assert code is grpc.StatusCode.UNAUTHENTICATED or (texts and all(texts))


def test_only_the_dispatcher_and_the_metrics_port_ask_the_guard() -> None:
    askers = {
        file.name
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("guard.check")
    }
    assert askers == {"dispatch.py", "application.py"}


# What is code is not loaded: no backend that runs a model's own, and plans only with their hash.


@pytest.mark.parametrize("backend", ["python", "pytorch", "tensorflow", "custom", "../onnxruntime", "/lib/evil.so"])
def test_backends_that_run_a_models_own_code_are_refused(tmp_path: Path, backend: str) -> None:
    fake_model(tmp_path)
    config = tmp_path / "sum" / "config.pbtxt"
    config.write_text(config.read_text().replace('"fake"', f'"{backend}"'))
    (found,) = repository.scan(tmp_path, repository.Defaults(8, 1))
    assert found.spec is None
    assert "is not one of" in found.reason


def test_plans_are_loaded_with_their_hash_alone(tmp_path: Path) -> None:
    fake_model(tmp_path)
    config = tmp_path / "sum" / "config.pbtxt"
    config.write_text(config.read_text().replace('"fake"', '"tensorrt"'))
    plan = tmp_path / "sum" / "1" / "model.plan"
    plan.write_bytes(b"plan")
    (found,) = repository.scan(tmp_path, repository.Defaults(8, 1))
    assert found.spec is None
    assert found.reason == (
        "version 1 has no report.json that names 1/model.plan, which a TensorRT plan needs, since it may hold code: "
        "`convoy export` writes one"
    )
    formats = [{"file": "1/model.plan", "sha256": hashlib.sha256(b"plan").hexdigest()}]
    (tmp_path / "sum" / "report.json").write_text(json.dumps({"formats": formats}))
    (found,) = repository.scan(tmp_path, repository.Defaults(8, 1))
    assert found.spec is not None
    plan.write_bytes(b"another")
    (found,) = repository.scan(tmp_path, repository.Defaults(8, 1))
    assert "report.json says" in found.reason
