"""Tokens, roles and management listeners, over both protocols."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server.errors import NotPermitted, ServerError, Unauthenticated
from convoynet.server.frontend.listeners import Access
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.security.reloading import InvalidFile, Reloaded
from convoynet.server.security.security import NEEDS, ROLES, Guard, digest, read_tokens
from convoynet.server.security.token_command import token
from convoynet.server.types import Call
from tests.server.certificates import Authority
from tests.server.conftest import Running, Serving, code_of, config, fake_model, infer_request
from tests.server.http_calls import Answer, call, sum_request
from tests.server.security.test_tls import ask, secure

TOKENS = {"camera": "infer", "dashboard": "read", "operator": "manage", "everything": "infer,read,manage"}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token file; each token is its holder's name backwards."""
    file = tmp_path / "tokens"
    lines = [f"{name} {roles} {digest(name[::-1])}" for name, roles in TOKENS.items()]
    file.write_text("\n".join(["# who may do what", "", *lines]) + "\n")
    return file


def guard(file: Path) -> Guard:
    return Guard(Reloaded("tokens", [file], lambda: read_tokens(file)))


def caller(name: str = "", **options: Any) -> Call:
    metadata = (("authorization", f"Bearer {name[::-1]}"),) if name else ()
    return Call("grpc", metadata=metadata, **options)


def allowed(checked: Guard, rpc: str, call_: Call, request: object = None) -> bool:
    try:
        checked.check(rpc, call_, request)
    except ServerError:
        return False
    return True


def test_every_rpc_has_its_roles() -> None:
    assert set(NEEDS) == {rpc.name for rpc in SERVICE.methods} | {
        *("Metrics", "Overview", "ModelReport", "Page", "OpenApi"),
    }
    assert all(needs <= set(ROLES) for needs in NEEDS.values())
    open_to_all = {rpc for rpc, needs in NEEDS.items() if not needs}
    assert open_to_all == {"ServerLive", "ServerReady", "ModelReady", "Page", "OpenApi"}


def test_each_role_may_do_its_part_and_no_more(tokens: Path) -> None:
    checked = guard(tokens)
    for rpc, needs in NEEDS.items():
        for name, roles in TOKENS.items():
            assert allowed(checked, rpc, caller(name)) == (not needs or bool(needs & set(roles.split(",")))), (
                rpc,
                name,
            )
        assert allowed(checked, rpc, caller()) == (not needs)
        assert allowed(checked, rpc, caller("nobody")) == (not needs)


def test_an_update_of_settings_is_management_and_a_look_is_reading(tokens: Path) -> None:
    checked = guard(tokens)
    looks: list[tuple[str, Any]] = [
        ("LogSettings", pb.LogSettingsRequest()),
        ("TraceSetting", pb.TraceSettingRequest()),
    ]
    for rpc, message in looks:
        assert allowed(checked, rpc, caller("dashboard", management=False), message)
        message.settings["x"].SetInParent()
        assert not allowed(checked, rpc, caller("dashboard"), message)
        assert allowed(checked, rpc, caller("operator"), message)
        assert not allowed(checked, rpc, caller("operator", management=False), message)


def test_without_tokens_only_the_listener_counts() -> None:
    assert all(allowed(Guard(), rpc, Call("grpc")) for rpc in NEEDS)
    closed = [rpc for rpc in NEEDS if not allowed(Guard(), rpc, Call("grpc", management=False))]
    assert set(closed) == {rpc for rpc, needs in NEEDS.items() if needs == {"manage"}}
    with pytest.raises(NotPermitted, match="RepositoryModelLoad is a management call"):
        Guard().check("RepositoryModelLoad", Call("grpc", management=False))


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ((), "needs a token: send it as the header"),
        ((("authorization", "Basic aremac"),), "needs a token"),
        ((("authorization", "Bearer"),), "needs a token"),
        ((("authorization", "Bearer wrong"),), "the token is not known"),
        ((("x-api-key", "wrong"),), "the token is not known"),
        ((("authorization", "Bearer é\U0001f600"),), "the token is not known"),
        ((("authorization", b"Bearer aremac"),), "needs a token"),
    ],
)
def test_wrong_tokens_are_unauthenticated(
    tokens: Path, metadata: tuple[tuple[str, str | bytes], ...], text: str
) -> None:
    with pytest.raises(Unauthenticated, match=text) as caught:
        guard(tokens).check("ModelInfer", Call("grpc", metadata=metadata))
    assert "aremac" not in str(caught.value)


@pytest.mark.parametrize("header", [("authorization", "bearer aremac"), ("x-api-key", "aremac")])
def test_both_headers_carry_a_token(tokens: Path, header: tuple[str, str]) -> None:
    guard(tokens).check("ModelInfer", Call("http", metadata=(header,)))


def test_a_certificate_has_the_roles_of_its_name_and_a_wrong_token_beside_it_is_refused(tokens: Path) -> None:
    tokens.write_text(tokens.read_text() + "spiffe://house/camera infer certificate\n")
    checked = guard(tokens)
    identity = {"identity": "spiffe://house/camera"}
    assert allowed(checked, "ModelInfer", caller(**identity))
    assert not allowed(checked, "ModelStatistics", caller(**identity))
    assert allowed(checked, "ModelStatistics", caller("dashboard", **identity))
    assert not allowed(checked, "ModelInfer", caller("nobody", **identity))
    assert not allowed(checked, "ModelInfer", caller(identity="camera"))
    assert not allowed(checked, "ModelInfer", caller(identity="spiffe://house/camera2"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "has 0 entries"),
        ("a infer", "line 1 of the token file .* got 2 words"),
        ("a infer,root certificate", "roles must be some of infer, read, manage"),
        ("a infer secret-in-plain-text", "the third word must be sha256:"),
        (f"a\tinfer\tsha256:{'A' * 64}", "64 hexadecimal digits"),
        (f"-a infer sha256:{'a' * 64}", "the name may hold"),
    ],
)
def test_wrong_token_files_are_refused_and_never_quoted(tmp_path: Path, line: str, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(line)
    with pytest.raises(InvalidFile, match=text) as caught:
        read_tokens(file)
    assert "secret-in-plain-text" not in str(caught.value)
    with pytest.raises(InvalidFile, match="cannot be read"):
        read_tokens(tmp_path / "none")


def test_a_changed_file_counts_and_a_broken_one_keeps_the_old_entries(
    tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = Reloaded("tokens", [tokens], lambda: read_tokens(tokens))
    checked = Guard(entries)
    tokens.write_text("")
    with caplog.at_level(logging.ERROR):
        assert not entries.refresh()
        assert not entries.refresh()
    assert len(caplog.records) == 1
    assert allowed(checked, "ModelInfer", caller("camera"))
    tokens.write_text(f"new infer {digest('wen')}\n")
    assert entries.refresh()
    assert not allowed(checked, "ModelInfer", caller("camera"))
    assert allowed(checked, "ModelInfer", caller("new"))


def test_the_command_adds_a_token_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    made = []
    for name in ("a", "b"):
        assert token([name, "infer,read", "--file", str(file)]) == 0
        made.append(capsys.readouterr().out.strip())
    assert file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]
    checked = guard(file)
    for one in made:
        assert one not in file.read_text()
        checked.check("ModelInfer", Call("grpc", metadata=(("authorization", f"Bearer {one}"),)))
    assert token(["c", "infer"]) == 0
    shown = capsys.readouterr()
    assert digest(shown.out.strip()) in shown.err
    assert token(["c", "root"]) == 2
    assert token(["c d", "infer"]) == 2
    file.write_text("broken")
    assert token(["c", "infer", "--file", str(file)]) == 1
    assert file.read_text() == "broken"


async def over_both(running: Running, name: str) -> tuple[grpc.StatusCode, Answer]:
    """One inference over each protocol with that caller's token, "" for none."""
    metadata = (("authorization", f"Bearer {name[::-1]}"),) if name else ()
    code, _ = await code_of(running.stub.ModelInfer(infer_request(1), metadata=metadata))
    headers = {"Authorization": f"Bearer {name[::-1]}"} if name else {}
    return code, await call(running.app.http_port, "POST", "/v2/models/sum/infer", sum_request(1), headers)


@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_both_protocols_refuse_alike_and_count(
    serving: Serving, tmp_path: Path, tokens: Path, frontends: str
) -> None:
    folder = tmp_path / "served"
    fake_model(folder)
    async with serving(root=folder, auth_tokens=tokens, frontends=frontends) as running:
        code, answer = await over_both(running, "")
        assert (code, answer.status) == (grpc.StatusCode.UNAUTHENTICATED, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        code, answer = await over_both(running, "dashboard")
        assert (code, answer.status) == (grpc.StatusCode.PERMISSION_DENIED, 403)
        assert answer.json == {"error": "ModelInfer needs the role infer, the caller has read"}
        code, answer = await over_both(running, "camera")
        assert (code, answer.status) == (grpc.StatusCode.OK, 200)
        assert running.metric("convoy_rejected_total", model="", version="", reason="auth") == 4
        # What probes need is open to everybody.
        assert (await running.stub.ModelReady(pb.ModelReadyRequest(name="sum"))).ready
        assert (await call(running.app.http_port, "GET", "/v2/health/ready")).status == 200
        # Metrics need the role read.
        port = running.app.metrics_port
        assert (await call(port, "GET", "/metrics")).status == 401
        for name, status in (("camera", 403), ("dashboard", 200)):
            answer = await call(port, "GET", "/metrics", headers={"Authorization": f"Bearer {name[::-1]}"})
            assert answer.status == status
        # A new file counts without a restart.
        tokens.write_text(f"dashboard infer {digest('draobhsad')}\n")
        await running.app.reload(running.app._config)
        code, answer = await over_both(running, "dashboard")
        assert (code, answer.status) == (grpc.StatusCode.OK, 200)


async def test_certificates_have_roles_over_both_protocols(root: Path, tokens: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tokens.write_text(tokens.read_text() + "lens infer certificate\n")
    pair = authority.sign("server")
    settings = {"tls_client_ca": authority.file, "auth_tokens": tokens}
    async with secure(root, pair, **settings) as app:
        for name, code, status in (("lens", None, 200), ("other", grpc.StatusCode.UNAUTHENTICATED, 401)):
            shows = authority.sign(name, client=True)
            got, _ = await code_of(ask(app, authority, shows))
            assert got is (code or grpc.StatusCode.OK)
            answer = await call(
                app.http_port, "POST", "/v2/models/sum/infer", sum_request(1), context=authority.client_context(shows)
            )
            assert answer.status == status


LOAD = pb.RepositoryModelLoadRequest(model_name="sum")


async def management(port: int) -> grpc.StatusCode:
    """What a gRPC listener says to a management call."""
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return (await code_of(stub.RepositoryModelLoad(LOAD)))[0]


async def test_management_has_listeners_of_its_own(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    path = "/v2/repository/models/sum/load"
    async with serving(management="0,0") as running:
        grpc_port, http_port = running.app.management_ports
        assert await management(running.app.grpc_port) is grpc.StatusCode.PERMISSION_DENIED
        refused = await call(running.app.http_port, "POST", path)
        assert (refused.status, "--management" in refused.json["error"]) == (403, True)
        # Past the guard: what the call itself says is another matter.
        assert await management(grpc_port) is not grpc.StatusCode.PERMISSION_DENIED
        assert (await call(http_port, "POST", path)).status != 403
        assert (await call(http_port, "POST", "/v2/models/sum/infer", sum_request(1))).status == 200
    async with serving(management="off") as running:
        assert running.app.management_ports == ()
        assert await management(running.app.grpc_port) is grpc.StatusCode.PERMISSION_DENIED
    async with serving() as running:  # on 127.0.0.1
        assert await management(running.app.grpc_port) is not grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("host", "management", "takes"),
    [
        ("127.0.0.1", "", True),
        ("::1", "", True),
        ("localhost", "", True),
        ("0.0.0.0", "", False),
        ("example.org", "", False),
        ("0.0.0.0", "on", True),
        ("127.0.0.1", "off", False),
        ("127.0.0.1", "8101", False),
    ],
)
def test_management_is_on_by_itself_on_this_machine_alone(
    tmp_path: Path, host: str, management: str, takes: bool
) -> None:
    assert config(tmp_path, host=host, management=management).takes_management is takes


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tls_cert": Path("a")}, "--tls-cert and --tls-key go together"),
        ({"tls_client_ca": Path("a")}, "--tls-client-ca needs --tls-cert"),
        ({"management": "maybe"}, "--management must be on, off"),
        ({"management": "70000"}, "--management must be on, off"),
        ({"http_port": -2}, "--http-port must lie in -1 to 65535"),
        ({"max_streams": 0}, "--max-streams must lie in 1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        config(tmp_path, **settings)


def test_a_wide_listener_without_protection_is_said(
    tmp_path: Path, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Access(config(tmp_path), lambda: None)
    assert not caplog.records
    Access(config(tmp_path, host="0.0.0.0"), lambda: None)
    assert "listening on 0.0.0.0 without --tls-cert and --auth-tokens" in caplog.text
    caplog.clear()
    Access(config(tmp_path, host="0.0.0.0", auth_tokens=tokens), lambda: None)
    assert "without --tls-cert:" in caplog.text


def test_a_bad_file_ends_the_command_with_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("x")
    command = [sys.executable, "-m", "convoynet.server.cli", "serve", "--model-repository", str(root)]
    done = subprocess.run(
        [*command, "--auth-tokens", str(tmp_path / "tokens")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("convoy serve: line 1 of the token file")
    assert "Traceback" not in done.stderr
