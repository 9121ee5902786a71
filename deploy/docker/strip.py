"""Takes out of a virtual environment what a server never opens: `python3 strip.py /opt/convoy`.

Said in one place, since half of what the engines' packages bring is for other devices, formats and developers. A name
that matches nothing is an error: a new version of a package may have moved what it was meant for.
"""

import shutil
import sys
from pathlib import Path

# Beneath site-packages. OpenVINO serves ONNX files on CPUs here, so other devices and formats go.
UNUSED = {
    "pip": ["pip", "pip-*"],
    "setuptools": ["setuptools", "setuptools-*", "pkg_resources", "_distutils_hack", "distutils-precedence.pth"],
    "botocore": ["botocore/data/*/"],  # what 400 services understand
    "openvino": [
        "openvino/libs/libopenvino_intel_[gn]pu_plugin.so",
        "openvino/libs/cache.json",  # compiled kernels for the GPU plugin
        "openvino/libs/libopenvino_tensorflow*",
        "openvino/libs/libopenvino_p[ay]*_frontend*",  # PaddlePaddle, PyTorch
        "openvino/libs/libopenvino_jax*",
        "openvino/libs/libopenvino_gguf*",
        "openvino/include",
        "openvino/cmake",
        "openvino/tools",
        "openvino/frontend/[jpt]*",
    ],
    "onnxruntime": [
        "onnxruntime/transformers",
        "onnxruntime/quantization",
        "onnxruntime/tools",
        "onnxruntime/datasets",
    ],
    "numpy": ["numpy/**/tests", "numpy/f2py"],
}
# Of Amazon's services those that a model repository is read from and that log in to it.
KEPT = {"s3", "signin", "sso", "sso-oidc", "sts"}


def main(environment: Path) -> None:
    """Strips it; the packages that it does not have are passed over."""
    (packages,) = environment.glob("lib/python3*/site-packages")
    for package, patterns in UNUSED.items():
        if (packages / package).exists():
            for pattern in patterns:
                remove(packages, pattern)
    for folder in list(environment.rglob("__pycache__")):
        shutil.rmtree(folder)


def remove(packages: Path, pattern: str) -> None:
    """Removes what matches, at least one file or folder."""
    found = [path for path in packages.glob(pattern) if path.name not in KEPT]
    if not found:
        sys.exit(f"strip.py: nothing is called {pattern}: bring UNUSED up to date")
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


main(Path(sys.argv[1]))
