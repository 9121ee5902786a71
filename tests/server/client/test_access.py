"""Both clients, `predict` and `bench` with a server that has TLS, asks for certificates and for tokens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from convoynet.server.client.access import ENVIRONMENT, Access, access
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.bench import bench
from convoynet.server.client.client import Client, ClientError, Unreachable
from convoynet.server.client.connection import connect
from convoynet.server.client.predict import predict
from convoynet.server.security.token_command import token
from tests.server import onnx_models
from tests.server.certificates import Authority, Pair
from tests.server.process import ServeProcess

ROWS = np.ones((1, 4), np.float32)
KINDS = ("blocking", "awaiting")


@dataclass(frozen=True)
class Town:
    """Certificates, tokens, and servers of each kind."""

    authority: Authority
    stranger: Authority
    client: Pair
    impostor: Pair
    tokens: dict[str, str]
    plain: ServeProcess
    secure: ServeProcess
    mutual: ServeProcess
    expired: ServeProcess

    @property
    def ca(self) -> str:
        return str(self.authority.file)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    root = tmp_path_factory.mktemp("access")
    onnx_models.write_linear(root / "models")
    onnx_models.write_colors(root / "models")
    authority, stranger = Authority(root), Authority(root, "stranger")
    tokens = {}
    for name, role in (("camera", "infer"), ("bench", "infer,read"), ("prometheus", "read")):
        with pytest.MonkeyPatch.context() as patch, (root / f"{name}.token").open("w+") as out:
            patch.setattr("sys.stdout", out)
            assert token([name, role, "--file", str(root / "tokens")]) == 0
            out.seek(0)
            tokens[name] = out.read().strip()

    def tls(pair: Pair, *more: str) -> ServeProcess:
        flags = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key), *more)
        return servers.enter_context(ServeProcess(root / "models", *flags))

    with ExitStack() as servers:
        yield Town(
            authority,
            stranger,
            authority.sign("client", client=True),
            stranger.sign("impostor", client=True),
            tokens,
            servers.enter_context(ServeProcess(root / "models")),
            tls(authority.sign("server"), "--auth-tokens", str(root / "tokens")),
            tls(authority.sign("server2"), "--tls-client-ca", str(authority.file)),
            tls(authority.sign("late", expired=True)),
        )


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)


async def asked(kind: str, url: str, **security: Any) -> str:
    """What a client says of one inference: "" where it is answered, else the error."""
    failed: ClientError | None = None
    try:
        if kind == "blocking":
            with Client(url, timeout=60, **security) as client:
                answer = client.infer("linear", {"input": ROWS})
        else:
            async with AsyncClient(url, timeout=60, **security) as other:
                answer = await other.infer("linear", {"input": ROWS})
    except ClientError as error:
        failed = error
    if failed is not None:
        assert "\n" not in str(failed)
        assert not isinstance(failed, Unreachable), failed
        return f"{failed.code.name}: {failed}"
    np.testing.assert_allclose(answer["logits"], ROWS @ onnx_models.LINEAR_WEIGHTS)
    return ""


@pytest.mark.parametrize("kind", KINDS)
async def test_who_has_what_the_server_asks_for_is_answered(
    town: Town, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    camera = town.tokens["camera"]
    assert await asked(kind, town.plain.url) == ""
    assert await asked(kind, town.secure.url, ca=town.ca, token=camera) == ""
    assert await asked(kind, f"grpcs://{town.secure.url}", ca=Path(town.ca), token=f" {camera}\n") == ""
    (tmp_path / "token").write_text(f"{camera}\n")
    assert await asked(kind, town.secure.url, ca=town.ca, token_file=tmp_path / "token", server_name="localhost") == ""
    pair = {"cert": town.client.certificate, "key": town.client.key}
    assert await asked(kind, town.mutual.url, ca=town.ca, **pair) == ""
    for name, value in {"CONVOY_CA": town.ca, "CONVOY_TOKEN": camera}.items():
        monkeypatch.setenv(name, value)
    assert await asked(kind, town.secure.url) == ""
    assert await asked(kind, town.plain.url, tls=False) == ""
    monkeypatch.setenv("CONVOY_CERT", str(town.client.certificate))
    monkeypatch.setenv("CONVOY_KEY", str(town.client.key))
    assert await asked(kind, town.mutual.url) == ""


REFUSED: dict[str, tuple[str, str, str]] = {
    "TLS is not spoken": ("secure.url", "", "UNAVAILABLE: the server at {} speaks TLS: say so by --tls"),
    "nor by HTTP": ("secure.http", "", "UNAVAILABLE: the server at {} speaks TLS: say so by --tls"),
    "TLS where there is none": ("plain.url", "ca", "UNAVAILABLE: the server at {} does not speak TLS: leave it out by"),
    "an authority that is not known": (
        "secure.url",
        "tls",
        "UNAVAILABLE: the certificate of {} is not trusted (unable",
    ),
    "another authority": ("secure.url", "stranger", "UNAVAILABLE: the certificate of {} is not signed by '"),
    "another name": ("secure.url", "ca name", "UNAVAILABLE: the certificate of {} is not for 'box': use a name"),
    "a certificate of yesterday": ("expired.url", "ca", "UNAVAILABLE: the certificate of {} is not valid now (certif"),
    "no client certificate": (
        "mutual.url",
        "ca",
        "UNAVAILABLE: the server at {} seems to ask for a client certificate (it",
    ),
    "a stranger's": ("mutual.url", "ca impostor", "UNAVAILABLE: the server at {} does not take the client certificate"),
    "HTTP's port": ("plain.http", "", "UNAVAILABLE: {} is a port for HTTP, not for gRPC: give the gRPC port"),
    "HTTP's port with TLS": ("secure.http", "ca", "UNAVAILABLE: {} is a port for HTTP, not for gRPC: give the gRPC"),
    "the metrics' port": ("plain.metrics", "", "UNAVAILABLE: {} is a port for HTTP, not for gRPC: give the gRPC port"),
    "no token": ("secure.url", "ca", "UNAUTHENTICATED: this call needs a token: send it as the header `authorization"),
    "a wrong token": (
        "secure.url",
        "ca wrong",
        "UNAUTHENTICATED: the token is not known to this server (this client: ",
    ),
    "a token without the role": ("secure.url", "ca prometheus", "PERMISSION_DENIED: ModelInfer needs the role infer,"),
}
"""Why -> the port, what the client has, and what it says."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("why", REFUSED)
async def test_what_keeps_a_client_out_is_one_line_with_the_cause_and_the_way_out(
    town: Town, kind: str, why: str
) -> None:
    place, has, says = REFUSED[why]
    server, _, port = place.partition(".")
    url = getattr(getattr(town, server), port)
    things = {
        "ca": {"ca": town.ca},
        "tls": {"tls": True},
        "stranger": {"ca": town.stranger.file},
        "name": {"server_name": "box"},
        "impostor": {"cert": town.impostor.certificate, "key": town.impostor.key},
        "wrong": {"token": "convoy_wrong"},
        "prometheus": {"token": town.tokens["prometheus"]},
    }
    security = {key: value for each in has.split() for key, value in things[each].items()}
    said = await asked(kind, url, **security)
    assert said.startswith(says.format(url)), said
    assert any(way in said for way in ("--", "give the gRPC port", "renew it there")), said
    assert "convoy_" not in said


def test_a_server_that_cannot_be_talked_to_is_not_one_that_is_not_ready(town: Town) -> None:
    with Client(town.secure.url) as client, pytest.raises(ClientError, match="speaks TLS"):
        client.server_ready()


Texts = pytest.CaptureFixture[str]


def test_predict_and_bench_measure_a_server_with_tls_and_tokens(
    town: Town, tmp_path: Path, capsys: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    url = ("--url", town.secure.url)
    (tmp_path / "token").write_text(town.tokens["camera"])
    flags = ("--ca", town.ca, "--token-file", str(tmp_path / "token"))
    assert predict(["--model", "colors", *url, *flags, "--json", str(tmp_path / "red.png")]) == 0
    assert json.loads(capsys.readouterr().out)[0]["predictions"][0]["label"] == "red"
    monkeypatch.setenv("CONVOY_CA", town.ca)
    monkeypatch.setenv("CONVOY_TOKEN", town.tokens["bench"])
    load = ("--model", "linear", *url, "--concurrency", "2", "--warmup", "0.1", "--duration")
    for seconds in (0.3, 1, 4, 16):  # as long as it takes a busy machine to answer something within the window
        code = bench([*load, str(seconds), "--json"])
        (result,) = json.loads(capsys.readouterr().out)
        assert result["errors"] == {}
        if result["server"] is not None:
            break
    assert (code, result["requests"] > 0, result["server"]["mean_batch"] >= 1) == (0, True, True)
    monkeypatch.setenv("CONVOY_TOKEN", town.tokens["camera"])
    bench([*load, "0.3"])
    said = " ".join(capsys.readouterr().out.split())
    assert "No queue, compute and batch: ModelStatistics needs the role manage or read, the caller has infer" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "speaks TLS: say so by --tls"),
        (("--tls",), "is not trusted"),
        (("--ca", "absent.pem"), "ca 'absent.pem' cannot be read: No such file"),
        (("--tls", "--token", "convoy_wrong"), "is not trusted"),
    ],
)
def test_the_commands_say_it_in_one_line(town: Town, capsys: Texts, flags: tuple[str, ...], says: str) -> None:
    for command, more in ((predict, ["cat.jpg"]), (bench, [])):
        assert command(["--model", "linear", "--url", town.secure.url, *flags, *more]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert says in err
        assert "convoy_wrong" not in err


def test_nothing_else_comes_to_stderr_not_even_from_grpc(town: Town) -> None:
    command = [
        sys.executable,
        "-m",
        "convoynet.server.cli",
        "bench",
        "--model",
        "linear",
        "--url",
        town.secure.url,
        "--tls",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"convoy bench: the certificate of {town.secure.url} is not trusted")


def wrong(**security: Any) -> str:
    with pytest.raises(ClientError) as caught:
        connect("127.0.0.1", security)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arguments_that_cannot_be_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, other = authority.sign("one"), authority.sign("other")
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "half").write_text("-----BEGIN CERTIFICATE-----\nabc\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for security, says in [
        ({"ca": tmp_path / "text"}, "holds no certificate in PEM form"),
        ({"ca": tmp_path / "half"}, "holds no usable certificate in PEM form"),
        ({"ca": tmp_path}, "cannot be read: Is a directory"),
        ({"ca": 5}, "ca is 5 (int): give the path of a PEM file"),
        ({"cert": pair.certificate}, "cert is given and key is not"),
        ({"key": pair.key}, "key is given and cert is not"),
        ({"cert": pair.certificate, "key": other.key}, "cannot be used: "),
        ({"cert": pair.key, "key": pair.certificate}, "both are PEM files, belong together"),
        ({"ca": authority.file, "tls": False}, "ca is for TLS, which is turned off"),
        ({"tls": "yes"}, "tls is 'yes' (str): give True or False"),
        ({"plain_token": "no"}, "plain_token is 'no' (str): give True or False"),
        ({"server_name": 3}, "server_name is 3 (int)"),
        ({"token": "convoy_a", "token_file": tmp_path / "text"}, "token and token_file are both given"),
        ({"token": "convoy_a b"}, "token holds no token: that is one word"),
        ({"token": "convoy_\u00e4"}, "token holds no token"),
        ({"token": "convoy_" + "a" * 5000}, "token holds no token"),
        ({"token": b"convoy_a"}, "token is of the type bytes: give a text"),
        (
            {"token_file": "convoy_a"},
            "the token file cannot be read: No such file or directory; give a file that holds",
        ),
        ({"token_file": tmp_path / "empty"}, "the token file is empty"),
        ({"token_file": tmp_path / "bytes"}, "the token file cannot be read: it is no text"),
        ({"token_file": tmp_path / "text"}, "the token file holds no token"),
        ({"cafile": "x"}, "unknown option 'cafile', expected one of tls, ca, cert"),
    ]:
        said = wrong(**security)
        assert says in said
        assert "convoy_" not in said
    with pytest.raises(ClientError, match="asks for TLS, which is turned off"):
        connect("grpcs://box", {"tls": False})


def test_a_key_with_a_pass_phrase_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    pair = Authority(tmp_path).sign("one")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    form, how = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, how))
    assert "the key has no pass phrase" in wrong(cert=pair.certificate, key=pair.key)


LOCAL = (
    *("127.0.0.1:8001", "127.9.9.9:1", "localhost:8001", "[::1]:8001", "dns:///localhost:1"),
    *("unix:/run/convoy.sock", "unix-abstract:convoy"),
)
ELSEWHERE = (
    *("box:8001", "10.0.0.1:8001", "[fe80::1]:8001", "dns:///box:8001", "localhost.evil.org:8001"),
    *("ipv4:127.0.0.1:8001,10.0.0.1:8001", "xds:///box", "127.0.0.1.evil.org:8001"),
    *("unix1:8001", "unix.example.org:8001", "unixbox"),
)


@pytest.mark.parametrize("target", [*LOCAL, *ELSEWHERE])
def test_a_token_goes_to_another_machine_under_tls_alone_unless_that_is_asked_for(target: str) -> None:
    for security, environment in (({"token": "convoy_a"}, {}), ({}, {"CONVOY_TOKEN": "convoy_a"})):
        if target in LOCAL:
            assert access(target, security, environment).metadata == (("authorization", "Bearer convoy_a"),)
        else:
            with pytest.raises(ClientError, match="without TLS, for everybody on the way to read: add --tls") as caught:
                access(target, security, environment)
            assert "convoy_a" not in str(caught.value)
            assert access(target, {**security, "plain_token": True}, environment).tls is None
            assert access(target, {**security, "tls": True}, environment).tls is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_is_for_this_machine_goes_to_no_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC goes to the proxy of $http_proxy for any address, and the token would with it, in the clear."""
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        proxy.setblocking(False)
        for name in ("http_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        client = Client(f"{host}:{closed.getsockname()[1]}", token="convoy_a", timeout=60)
        with client, pytest.raises(Unreachable, match="connection refused"):
            client.models()
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_token_stands_in_no_representation() -> None:
    reached = connect("127.0.0.1", {"token": "convoy_a"})
    assert "convoy_a" not in f"{reached!r} {reached.access!r}"
    assert access("127.0.0.1:1", {}, {}) == Access()


def test_the_environment_is_read_when_a_client_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CONVOY_TOKEN", "convoy_a")
    assert connect("127.0.0.1").metadata == (("authorization", "Bearer convoy_a"),)
    assert connect("127.0.0.1", {"token": "convoy_b"}).metadata == (("authorization", "Bearer convoy_b"),)
