"""What every session of ONNX Runtime begins with: it computes as the server's do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

_ERRORS_ONLY = 3
_IN_32_BITS = "session.x64quantprecision"
CPU = ("CPUExecutionProvider",)


def session_options(
    threads: int = 0, *, optimized: bool | None = True, spinning: bool = False
) -> onnxruntime.SessionOptions:
    """Options of a session.

    Args:
        threads: of an operator; 0 for one a core.
        optimized: whether ONNX Runtime improves the graph: True for all that it can, False for what leaves the scales
            of FP8 and FP16 alone, None for nothing.
        spinning: whether idle threads keep their cores, which is quicker where nothing else wants these. The server's
            do not.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    # Without VNNI a processor adds pairs of 8-bit products in 16 bits, which overflow: INT8 of MobileNetV2 is a quarter
    # of its largest logit away then. So it adds them in 32, in 1.3 times the time; with VNNI nothing changes.
    options.add_session_config_entry(_IN_32_BITS, "1")
    level = onnxruntime.GraphOptimizationLevel
    if not optimized:
        options.graph_optimization_level = level.ORT_DISABLE_ALL if optimized is None else level.ORT_ENABLE_BASIC
    return options


def make_session(
    model: bytes | Path, options: onnxruntime.SessionOptions, providers: Sequence[Any] = CPU
) -> onnxruntime.InferenceSession:
    """A graph or a file in ONNX Runtime, with `session_options`.

    Raises:
        Exception: ONNX Runtime does not take it; its own exceptions have no common base.
    """
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
    except NoKernel:
        # Without VNNI it lacks the sums of 32 bits for a QLinearConv of signed numbers alone, whose others are right.
        options.add_session_config_entry(_IN_32_BITS, "0")
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
