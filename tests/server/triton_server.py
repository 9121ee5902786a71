"""A real Triton 2.51, for the tests that compare answers: `make triton` fetches it, nothing else is needed.

Its one backend here runs Python models; those below compute what the ONNX and fake models beside them compute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc

HOME = Path(__file__).parents[2] / "build" / "triton"
_TRITON = HOME / "pytriton" / "tritonserver"
_STUB = _TRITON / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
_MODEL = """\
import sys
import time

# Its numpy first: with a numpy of another generation every output is empty.
sys.path.insert(0, {home!r})
import numpy as np
import triton_python_backend_utils as pb_utils


def compute(x):
{body}


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            inputs = {{t.name(): t.as_numpy() for t in request.inputs()}}
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor(n, v) for n, v in compute(inputs).items()]))
        return answers
"""


def missing() -> str:
    """Why there is no Triton here; "" where there is one."""
    if not (_TRITON / "bin" / "tritonserver").exists():
        return "build/triton is missing: `make triton` fetches it"
    return "" if _STUB.exists() else f"this Triton has no Python backend for {_STUB.name}"


def write_model(root: Path, name: str, config: str, body: str, labels: str = "") -> None:
    """A Python model: `body` is a function's, from a dict of inputs `x` to a dict of outputs."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "model.py").write_text(_MODEL.format(home=str(HOME), body=indented))
    (root / name / "config.pbtxt").write_text('backend: "python"\n' + config)
    if labels:
        (root / name / "labels.txt").write_text(labels)


@contextmanager
def serve(repository: Path, port: int, *flags: str) -> Iterator[grpc_service_pb2_grpc.GRPCInferenceServiceStub]:
    """Triton over the repository; yields a stub once it is ready."""
    backends = repository.parent / "backends"
    shutil.copytree(_TRITON / "backends", backends)
    shutil.copy(_STUB / "triton_python_backend_stub", backends / "python")
    libraries = f"{sysconfig.get_config_var('LIBDIR')}:{HOME / 'nvidia_pytriton.libs'}"
    command = [
        *(str(_TRITON / "bin" / "tritonserver"), f"--model-repository={repository}", f"--backend-directory={backends}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false"),
        *(f"--backend-config=python,shm-region-prefix-name=convoy{port}", "--disable-auto-complete-config", *flags),
    ]
    log_file = repository.parent / "triton.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "LD_LIBRARY_PATH": libraries}
        )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            _wait(stub, process, log_file)
            yield stub
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(
    stub: grpc_service_pb2_grpc.GRPCInferenceServiceStub, process: subprocess.Popen[bytes], log_file: Path
) -> None:
    until = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < until:
        try:
            if stub.ServerReady(pb.ServerReadyRequest(), timeout=10, wait_for_ready=True).ready:
                return
        except grpc.RpcError:
            continue
    raise RuntimeError(f"Triton did not come up:\n{log_file.read_text()}")
