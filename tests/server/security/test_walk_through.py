"""docs/security.md, "A server with both, step by step": every command and program of it, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.server import onnx_models
from tests.server.process import ServeProcess

PAGE = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
STEPS = PAGE[PAGE.index("## A server with both, step by step") : PAGE.index("## How clients connect")]
CERTIFICATES, SERVE, CLIENTS, FLAGS, MUTUAL_CERTIFICATE, MUTUAL_SERVE, MUTUAL_CLIENT = re.findall(
    r"```sh\n(.*?)```", STEPS, re.DOTALL
)
(PROGRAM,) = re.findall(r"```python\n(.*?)```", STEPS, re.DOTALL)

pytestmark = [
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a repository, an image, and the certificates of the first steps."""
    folder = tmp_path_factory.mktemp("steps")
    onnx_models.write_photos(folder / "models")
    Image.new("RGB", (320, 280), (200, 100, 0)).save(folder / "cat.jpg", quality=95)
    shell(CERTIFICATES, folder)
    return folder


def shell(commands: str, folder: Path, server: ServeProcess | None = None) -> str:
    """Runs them as a user's shell would, with the ports of this test's server; returns what they print."""
    if server is not None:
        # The default, in the place of a port that other tests may have.
        commands = re.sub(r"^(convoy (?:predict|bench))", rf"\1 --url {server.url}", commands, flags=re.MULTILINE)
        commands = commands.replace("localhost:8000", f"localhost:{server.http.rpartition(':')[2]}")
    bare = {name: value for name, value in os.environ.items() if not name.startswith("CONVOY_")}
    environment = {**bare, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(command: str, folder: Path) -> Iterator[ServeProcess]:
    program, name, repository, models, *flags = shlex.split(command)
    assert (program, name, repository) == ("convoy", "serve", "--model-repository")
    files = dict(zip(flags[::2], flags[1::2], strict=True))
    with ServeProcess(folder / models, *(part for f, v in files.items() for part in (f, str(folder / v)))) as server:
        yield server


def test_tls_and_tokens(folder: Path) -> None:
    with serving(SERVE, folder) as server:
        out = shell(CLIENTS, folder, server)
        assert re.search(r"cat.jpg\s+red\s+0", out)
        assert "in flight" in out
        assert '"name":"resnet50"' in out
        assert re.search(r"cat.jpg\s+red\s+0", shell(FLAGS, folder, server))
        program = PROGRAM.replace("localhost:8001", f"localhost:{server.url.rpartition(':')[2]}")
        assert shell(f"python - <<'PROGRAM'\n{program}PROGRAM\n", folder) == "red\n"


def test_mutual_tls(folder: Path) -> None:
    shell(MUTUAL_CERTIFICATE, folder)
    with serving(MUTUAL_SERVE, folder) as server:
        assert re.search(r"cat.jpg\s+red\s+0", shell(MUTUAL_CLIENT, folder, server))


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    for name in ("authority.key", "server.key", "tokens", "camera.token"):
        assert (folder / name).stat().st_mode & 0o077 == 0
