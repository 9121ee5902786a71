"""Plans that the server has built at the first load: by a stand-in of `convoy build`, and by the real one."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from convoynet.server.app import App
from convoynet.server.errors import InvalidModel
from convoynet.server.models.plan_builds import PlanBuilds
from convoynet.server.repository import repository
from convoynet.server.spec import ModelSpec
from tests.server.conftest import Serving, config, fake_model, infer_request, sums
from tests.server.onnx_models import write_linear
from tests.server.repositories import until

STAND_IN = '''
import json, os, sys, time
from pathlib import Path

def build(argv):
    """Build."""
    folder = Path(__file__).parent
    assert argv[1] == "--output" and argv[-3:] == ["--progress", "json", "--json"], argv
    with (folder / "log").open("a") as log:
        log.write(f"begin {os.getpid()}\\n")
    for fraction in (0.0, 0.01, 0.5, 1.0):
        sys.stderr.write(json.dumps({"phase": "building", "fraction": fraction}) + "\\n")
    sys.stderr.write("[I] something that is no progress\\n")
    sys.stderr.flush()
    while not (folder / "go").exists():
        time.sleep(0.01)
    if (folder / "go").read_text():
        sys.stderr.write(f"convoy build: {argv[0]}: " + (folder / "go").read_text() + "\\n")
        return 2
    Path(argv[2]).write_bytes(b"a plan")
    print(json.dumps({"library": "tensorrt", "version": "9.9", "compute_capability": "any", "seconds": 1.5}))
    with (folder / "log").open("a") as log:
        log.write("end\\n")
    return 0
'''


def write_command(folder: Path, entry: str) -> Path:
    """Makes `convoy build` run `entry`: a distribution of our name, found before the installed one."""
    metadata = folder / "convoynet-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: convoynet\nVersion: 0.0.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[convoy.commands]\nbuild = {entry}\nserve = convoynet.server.serve:serve\n"
    )
    return folder


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in that builds when `go` is there, and fails with the text in it."""
    folder = write_command(tmp_path / "command", "stand_in_build:build")
    (folder / "stand_in_build.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def write_deferred(root: Path, extra: str = "") -> ModelSpec:
    """A deferred plan of the model `linear`."""
    file = write_linear(root) / "config.pbtxt"
    text = file.read_text().replace('"onnxruntime"', '"tensorrt"').replace("KIND_CPU", "KIND_GPU")
    stated = {"tensorrt_build": "deferred", "tensorrt_profiles": "1:8:64", "tensorrt_optimization_level": "2"}
    lines = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in stated.items())
    text = re.sub(r'platform: ".*"', 'platform: "tensorrt_plan" default_model_filename: "model.onnx"', text)
    file.write_text(text + lines + extra)
    (found,) = (f for f in repository.scan(root, repository.Defaults(4, 1)) if f.name == "linear")
    assert found.spec is not None, found.reason
    return found.spec


def begun(command: Path) -> list[str]:
    return (command / "log").read_text().splitlines() if (command / "log").exists() else []


async def test_a_plan_is_built_once(tmp_path: Path, command: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    spec = write_deferred(tmp_path / "models")
    assert spec.engine.plan is not None
    assert spec.engine.plan.build == ("--batch", "1:8:64", "--optimization-level", "2")
    (command / "go").write_text("")
    cache = tmp_path / "cache"
    options = await PlanBuilds(cache).built(spec)
    assert options.file.read_bytes() == b"a plan"
    plan = options.plan
    assert plan is not None
    assert (plan.library, plan.version, plan.compute_capability, plan.build) == ("tensorrt", "9.9", "any", None)
    told = [r.getMessage() for r in caplog.records if r.name == "convoynet.server.models.plan_builds"]
    percent = [
        "building its plan: building, 0 %",
        "building its plan: building, 50 %",
        "building its plan: building, 100 %",
    ]
    assert [line.partition(": ")[2] for line in told] == [
        "its TensorRT plan is built now; that takes up to minutes", *percent, "its plan is built, in 2 s",
    ]  # fmt: skip
    assert await PlanBuilds(cache).built(spec) == options
    assert len(begun(command)) == 2  # one beginning, one end
    file = spec.engine.file
    file.write_bytes(file.read_bytes() + b"\0")
    assert (await PlanBuilds(cache).built(spec)).file != options.file
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".json", ".plan", ".plan"]


async def test_a_build_that_fails_says_why_in_one_line(tmp_path: Path, command: Path) -> None:
    spec = write_deferred(tmp_path / "models")
    (command / "go").write_text("node 'conv1': no such kernel; export with --target gpu")
    with pytest.raises(InvalidModel) as caught:
        await PlanBuilds(tmp_path / "cache").built(spec)
    assert str(caught.value) == (
        "its plan cannot be built: model.onnx: node 'conv1': no such kernel; export with --target gpu"
    )
    assert list((tmp_path / "cache").iterdir()) == []


async def test_one_build_at_a_time_and_a_cancelled_one_ends(tmp_path: Path, command: Path) -> None:
    spec = write_deferred(tmp_path / "models")
    builds = PlanBuilds(tmp_path / "cache")
    first = asyncio.ensure_future(builds.built(spec))
    await until(lambda: len(begun(command)) == 1)
    second = asyncio.ensure_future(builds.built(spec))
    process = int(begun(command)[0].split()[1])
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    await until(lambda: len(begun(command)) == 2)  # only now the other one began
    (command / "go").write_text("")
    assert (await second).file.exists()


async def test_other_models_serve_while_a_plan_is_built(
    tmp_path: Path, command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    write_deferred(root)
    fake_model(root)
    app = App(config(root, engine_cache=tmp_path / "cache"))
    starting = asyncio.ensure_future(app.start())
    await until(lambda: bool(begun(command)) and any(m.spec.name == "sum" for m in app.core))
    model = app.core.model("sum")
    assert model.state == "ready"
    assert [line.state for line in await app.core.index() if line.name == "linear"] == ["LOADING"]
    process = int(begun(command)[0].split()[1])
    app.core.abandon()  # as SIGTERM does
    await starting
    assert app.core.failed[("linear", "1")] == "its load was stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    await app.stop()


async def test_an_unload_ends_the_build(serving: Serving, tmp_path: Path, command: Path) -> None:
    root = tmp_path / "models"
    write_deferred(root)
    fake_model(root)
    async with serving(root=root, model_control_mode="explicit", engine_cache=tmp_path / "cache") as running:
        loading = asyncio.ensure_future(running.app.core.load("linear"))
        await until(lambda: bool(begun(command)))
        await running.app.core.unload("linear")
        with pytest.raises(Exception, match="its load was stopped"):
            await loading
        await running.app.core.load("sum")
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"tensorrt_profiles": ""}, "must be the smallest, usual and largest batch of each profile"),
        ({"tensorrt_profiles": "8:1:64"}, "got '8:1:64'"),
        (
            {"tensorrt_profiles": "1:1:1,1:2:4"},
            r"max_batch_size is 8, but the plan takes .* up to 4 .*build models/linear",
        ),
        ({"tensorrt_build": "later"}, "'tensorrt_build' must be deferred, got 'later'"),
        ({"tensorrt_workspace_mib": "much"}, "must be a number of at least 0, got 'much'"),
        ({"tensorrt_sparse_weights": "yes"}, "must be false or true, got 'yes'"),
        ({"tensorrt_library": "cudnn"}, "must be tensorrt or tensorrt_rtx, got 'cudnn'"),
    ],
)
def test_parameters_of_plans_are_checked(tmp_path: Path, parameters: dict[str, str], reason: str) -> None:
    write_deferred(tmp_path)
    file = tmp_path / "linear" / "config.pbtxt"
    file.write_text(file.read_text().replace("max_batch_size: 64", "max_batch_size: 8"))
    lines = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in parameters.items())
    file.write_text(file.read_text() + lines)
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert re.search(reason, found.reason), found.reason


async def test_the_real_command_builds_and_the_load_says_that_there_is_no_gpu(
    serving: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra")
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is an extra")
    if find_spec("tensorrt") or cuda.cudaGetDeviceCount()[0] == cuda.cudaError_t.cudaSuccess:
        pytest.skip(
            "there is a GPU, or TensorRT, which needs one to build: tests/test_gpu_serving.py serves such a plan"
        )
    if find_spec("convoynet.exporter.commands.build_command") is None:
        pytest.skip("there is no `convoy build`")
    folder = write_command(tmp_path / "command", "convoynet.exporter.commands.build_command:build")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    root, cache = tmp_path / "models", tmp_path / "cache"
    write_deferred(root)
    fake_model(root)
    async with serving(root=root, engine_cache=cache) as running:
        reason = running.app.core.failed[("linear", "1")]
        assert re.fullmatch(
            r"a TensorRT plan runs on an NVIDIA GPU, and none can be used here: .* \(cudaError.*", reason
        )
        assert str(tmp_path) not in reason
        assert sums(await running.stub.ModelInfer(infer_request(5))) == [5]
    (plan,) = cache.glob("*.plan")
    assert plan.stat().st_size > 1000
    facts = json.loads(plan.with_suffix(".json").read_text())
    assert (facts["library"], facts["compute_capability"]) == ("tensorrt_rtx", "any")


def test_sigterm_ends_the_build_and_the_server(tmp_path: Path, command: Path) -> None:
    root = tmp_path / "models"
    write_deferred(root)
    log = tmp_path / "log"
    ports = [word for port in ("grpc", "http", "metrics") for word in (f"--{port}-port", "0")]
    arguments = ["--model-repository", str(root), "--engine-cache", str(tmp_path / "cache"), *ports]
    with log.open("w") as stream:
        server = subprocess.Popen([sys.executable, "-m", "convoynet.server.cli", "serve", *arguments], stderr=stream)
    try:
        while not begun(command):
            assert server.poll() is None, log.read_text()
            time.sleep(0.01)
        server.terminate()
        assert server.wait(60) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun(command)[0].split()[1]), 0)
    assert "its load was stopped" in log.read_text()
