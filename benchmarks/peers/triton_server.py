"""Triton Inference Server from PyTriton's wheel, which has the Python backend and no other."""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytriton
from session import arguments, stated

HERE = Path(__file__).parent


def write_repository(folder: Path, models: Path, tritonserver: Path) -> None:
    """Models and the backend, with the part of it that is made for this Python."""
    shutil.copytree(tritonserver / "backends", folder / "backends")
    stub = tritonserver / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    for model in stated(models):
        version = folder / "models" / model.name / "1"
        version.mkdir(parents=True)
        shutil.copy(HERE / "triton_model.py", version / "model.py")
        datatype = model.datatype.replace("BYTES", "STRING")
        (version.parent / "config.pbtxt").write_text(
            f'backend: "python"\nmax_batch_size: {model.max_batch}\n'
            f'input {{ name: "input" data_type: TYPE_{datatype} dims: {list(model.shape)} }}\n'
            f'output {{ name: "logits" data_type: TYPE_FP32 dims: [{model.classes}] }}\n'
            "instance_group { count: 1 kind: KIND_CPU }\ndynamic_batching { }\n"
        )


if __name__ == "__main__":
    asked = arguments()
    package = Path(pytriton.__file__).parent
    made = Path(tempfile.mkdtemp(prefix="peers-triton-"))
    write_repository(made, asked.models, package / "tritonserver")
    libraries = f"{sysconfig.get_config_var('LIBDIR')}:{package.parent / 'nvidia_pytriton.libs'}"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "PEERS_MODELS": str(asked.models),
        "PEERS_PATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)]),
    }
    flags = {
        "model-repository": made / "models", "backend-directory": made / "backends", "grpc-address": "127.0.0.1",
        "grpc-port": asked.port, "http-address": "127.0.0.1", "http-port": asked.port + 1, "allow-metrics": "false",
        "backend-config": f"python,shm-region-prefix-name=peers{os.getpid()}",
    }  # fmt: skip
    command = str(package / "tritonserver" / "bin" / "tritonserver")
    os.execve(command, [command, *(f"--{name}={value}" for name, value in flags.items())], environment)
