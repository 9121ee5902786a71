"""docs/other-languages.md: its commands make programs of other languages, and those talk to a server as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.clients.conftest import NO_NETWORK, REPOSITORY
from tests.server import onnx_models
from tests.server.certificates import Authority
from tests.server.process import ServeProcess

pytestmark = pytest.mark.deploy

PAGE = (REPOSITORY / "docs" / "other-languages.md").read_text()
(ANSWER,) = re.findall(r"```text\n(grey.*?)```", PAGE, re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")
NEEDS = {
    "Go": ("protoc", "go", "protoc-gen-go", "protoc-gen-go-grpc", "/usr/share/gocode/src/google.golang.org/grpc"),
    "Java": (
        *("protoc", "javac", "java", "/usr/bin/grpc_java_plugin"),
        *(f"/usr/share/java/{name}.jar" for name in ("grpc-netty", "protobuf", "netty-tcnative", "perfmark-api")),
    ),
    "JavaScript": ("node", "npm"),
}
TOO_OLD = "/usr/share/gocode/src/github.com/golang/protobuf/proto/table_unmarshal.go"
"""Of the older of Debian's two libraries of protocol buffers, which does not know what protoc-gen-go writes now."""


def commands(language: str) -> tuple[str, str, str]:
    """Those of a section of the page: to install what it needs, to make and run the program, to run it with TLS."""
    section = PAGE.split(f"\n## {language}\n")[1].split("\n## ")[0]
    install, run, secure = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return install, run, secure


def numbers(printed: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(printed)]


class Places:
    """A folder in which the page's commands find what they name, and two servers: one that is open, one with TLS."""

    def __init__(self, folder: Path, live: ServeProcess, secure: ServeProcess) -> None:
        self._folder = folder
        port = secure.url.rpartition(":")[2]
        self._addresses = {"127.0.0.1:8001": live.url, "convoy.example:8001": f"localhost:{port}"}

    def bash(self, script: str) -> subprocess.CompletedProcess[str]:
        """Runs lines of the page; ends at the first that fails."""
        for stated, real in self._addresses.items():
            script = script.replace(stated, real)
        command = ["bash", "-e", "-c", script]
        return subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("languages")
    for name in ("src", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    Image.new("RGB", (320, 280), (200, 100, 0)).save(folder / "cat.jpg", quality=95)
    models, tokens = folder / "models", str(folder / "tokens")
    onnx_models.write_photos(models)
    authority = Authority(folder)
    pair = authority.sign("server")
    with (folder / "token").open("w") as token:
        command = [sys.executable, "-m", "convoynet.server.cli", "token", "camera", "infer", "--file", tokens]
        subprocess.run(command, stdout=token, check=True)
    tls = ["--tls-cert", str(pair.certificate), "--tls-key", str(pair.key), "--auth-tokens", tokens]
    with ServeProcess(models) as live, ServeProcess(models, *tls) as secure:
        yield Places(folder, live, secure)


@pytest.mark.parametrize("language", NEEDS)
def test_a_program_from_proto_to_answer(places: Places, language: str) -> None:
    lacking = [name for name in NEEDS[language] if shutil.which(name) is None and not Path(name).exists()]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} is not installed: docs/other-languages.md names the packages")
    if language == "Go" and Path(TOO_OLD).exists():
        pytest.skip("golang-github-golang-protobuf-1-5-dev is not installed")
    install, run, secure = commands(language)
    if language == "JavaScript":
        installed = places.bash(install)
        if installed.returncode and NO_NETWORK.search(installed.stderr):
            pytest.skip("gRPC for Node.js cannot be installed without a network")
        assert installed.returncode == 0, installed.stderr
    done = places.bash(run + secure + secure.replace("$(cat token)", ""))
    assert NUMBER.sub("#", done.stdout) == NUMBER.sub("#", ANSWER * 2), done.stderr
    # Each is a mean of 50,000 values: CPUs add them in other orders.
    assert numbers(done.stdout) == pytest.approx(numbers(ANSWER * 2), abs=1e-3)
    assert done.returncode == 1
    assert re.search("^unauthenticated: this call needs a token", done.stderr, re.IGNORECASE | re.MULTILINE)
