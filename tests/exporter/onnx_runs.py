"""Run ONNX graphs in ONNX Runtime, and look at what it makes of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray


def run(model: onnx.ModelProto, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    # Without it sums of INT8 products saturate on processors without VNNI, and a graph is not as exact as it is.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


def run_basic(model: onnx.ModelProto, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    """With the optimisations that leave FP8 and FP16 scales as they are: see the lint rules fp8 and fp16-scale."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def fused_operators(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the file suits this CPU alone
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return operators(onnx.load(options.optimized_model_filepath))


def signal_to_noise_db(reference: NDArray[np.float32], value: NDArray[np.float32]) -> float:
    signal = reference.astype(np.float64)
    noise = signal - value.astype(np.float64)
    return float(10 * np.log10((signal**2).sum() / (noise**2).sum()))
