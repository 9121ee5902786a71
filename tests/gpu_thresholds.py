"""The thresholds of test_gpu_parity.py, out of gpu_parity.json."""

import json
from pathlib import Path

LIMITS: dict[str, dict[str, dict[str, float]]] = json.loads(Path(__file__).with_name("gpu_parity.json").read_text())[
    "limits"
]
# TensorRT computes float32 in TF32, unless it is built otherwise.
_TF32_ENGINES = frozenset({"onnxruntime tensorrt", "plan"})


def limit(name: str, engine: str, precision: str) -> tuple[str, float]:
    """The figure of a parity that counts, and its bound: "max_rel_error" at most, "sqnr_db" at least."""
    key = "tf32" if precision == "fp32" and engine in _TF32_ENGINES else precision
    ((figure, bound),) = LIMITS[name][key].items()
    return figure, bound
