"""Run ONNX graphs in ONNX Runtime, and look at what it makes of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from convoynet.exporter.graph.onnx_session import make_session, session_options


def session_of(model: onnx.ModelProto | bytes | Path, *, optimized: bool | None = True) -> onnxruntime.InferenceSession:
    """As Convoy's own are: a plain one's sums of INT8 products overflow on processors without VNNI."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return make_session(source, session_options(optimized=optimized))


def run(model: onnx.ModelProto, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    session = session_of(model)
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


def run_basic(model: onnx.ModelProto, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    """With the optimisations that leave FP8 and FP16 scales as they are: see the lint rules fp8 and fp16-scale."""
    session = session_of(model, optimized=False)
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def fused_operators(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = session_options()  # at this level it does not warn that the file suits this CPU alone
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return operators(onnx.load(options.optimized_model_filepath))


def signal_to_noise_db(reference: NDArray[np.float32], value: NDArray[np.float32]) -> float:
    signal = reference.astype(np.float64)
    noise = signal - value.astype(np.float64)
    return float(10 * np.log10((signal**2).sum() / (noise**2).sum()))
