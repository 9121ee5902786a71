"""Quantize one ONNX file with one other tool; `quantizers.py` runs this in the interpreter that has the tool.

    python quantizers_worker.py TOOL VARIANT FLOAT.onnx IMAGES.npy OUT.onnx

It imports nothing of ours: the tools' pins conflict with each other and with the exporter's. What it prints last is one
line of JSON: the tool's version and the seconds that it took.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

# The images come in batches of this size, which divides 448: ONNX Runtime's entropy fails on a smaller last one.
BATCH = 56
# Its smallest and largest values are the same in any batches, and of 56 images at 260 x 260 pixels it keeps 12 GB.
SMALL_BATCH = 8


def onnxruntime_static(variant: str, source: Path, images: np.ndarray, made: Path) -> str:
    """ONNX Runtime's `quantize_static`: "s8-METHOD" for TensorRT, "u8-METHOD" for its own CPU kernels.

    With "-tensor" behind it there is one scale for all channels of a layer's weights, the default of `quantize_static`.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    kind, method, *scales = variant.split("-")
    size = SMALL_BATCH if method == "minmax" else BATCH

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(images[at : at + size] for at in range(0, len(images), size))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {input_name(source): batch}

    signed = kind == "s8"
    # TensorRT knows neither zero points nor INT32 biases; these are the options that leave both away.
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if signed else {}
    quantize_static(
        str(source),
        str(made),
        Reader(),
        per_channel=scales != ["tensor"],
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method={"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}[method],
        extra_options=options,
    )
    return "onnxruntime"


def nncf(variant: str, source: Path, images: np.ndarray, made: Path) -> str:
    """NNCF's `quantize` with its defaults ("default"), or without bias correction ("no-bias-correction")."""
    import nncf

    name = input_name(source)
    batches = [{name: images[at : at + BATCH]} for at in range(0, len(images), BATCH)]
    advanced = nncf.AdvancedQuantizationParameters(disable_bias_correction=variant == "no-bias-correction")
    quantized = nncf.quantize(
        onnx.load(source), nncf.Dataset(batches), subset_size=len(batches), advanced_parameters=advanced
    )
    onnx.save(quantized, made)
    return "nncf"


def modelopt(variant: str, source: Path, images: np.ndarray, made: Path) -> str:
    """ModelOpt's `quantize` to INT8 with its "max" or "entropy" calibration, the rest left in FP32."""
    from modelopt.onnx.quantization import quantize

    quantize(
        str(source),
        quantize_mode="int8",
        calibration_data={input_name(source): images},
        calibration_method=variant,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(made),
    )
    return "nvidia-modelopt"


def onnxsim(variant: str, source: Path, images: np.ndarray, made: Path) -> str:
    """Quantize by onnxsim's `quantize_static`, which knows UINT8 alone."""
    import onnxsim

    name = input_name(source)
    batches = [{name: images[at : at + BATCH]} for at in range(0, len(images), BATCH)]
    onnx.save(onnxsim.quantize_static(onnx.load(source), batches, method=variant), made)
    return "onnxsim"


TOOLS: dict[str, Callable[[str, Path, np.ndarray, Path], str]] = {
    "onnxruntime": onnxruntime_static,
    "nncf": nncf,
    "modelopt": modelopt,
    "onnxsim": onnxsim,
}


def input_name(source: Path) -> str:
    """The name of the only input of a graph."""
    name: str = onnx.load(source, load_external_data=False).graph.input[0].name
    return name


def main() -> None:
    """Quantize, and say how long it took."""
    tool, variant, source, images, made = sys.argv[1:]
    began = time.perf_counter()
    package = TOOLS[tool](variant, Path(source), np.load(images), Path(made))
    seconds = round(time.perf_counter() - began, 1)
    said: dict[str, Any] = {"version": importlib.metadata.version(package), "seconds": seconds}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
