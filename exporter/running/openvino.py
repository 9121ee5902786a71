"""The exported graph in OpenVINO, told what the server tells it."""

import importlib.util
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from convoynet.exporter.archs import Task
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.graph.onnx_from_torch import compared
from convoynet.exporter.running.runtime import Array, Images, Outputs


def installed() -> bool:
    """Whether there is an OpenVINO to use."""
    return importlib.util.find_spec("openvino") is not None


def may_serve() -> bool:
    """Whether a server on this machine may take OpenVINO for an ONNX graph: where it is faster, on x86."""
    return installed() and platform.machine() in ("x86_64", "AMD64")


@cache
def core() -> Any:
    """OpenVINO, once for the process.

    Each further one that compiles gives the thread another stack to handle signals on, and one that goes away after a
    younger one leaves a stack that is gone: the next signal, a Ctrl-C, ends the process with a segmentation fault.
    """
    import openvino

    return openvino.Core()


def properties(threads: int) -> Mapping[str, Any]:
    """What the server gives OpenVINO (server/engines/openvino.py): a test holds the two to each other."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        # Where the processor has bfloat16, OpenVINO would use it for what the graph states as float32.
        "INFERENCE_PRECISION_HINT": "f32",
    }


class OpenVino:
    """An ONNX graph in OpenVINO on the CPU, in the precision that the graph states.

    Args:
        model: the graph as bytes, or the file that holds it.
        preprocess: how images become inputs, where the graph does not do it itself.
        task: says which outputs to return.
        threads: CPU threads of one call.

    Attributes:
        title: the runtime and its version.

    Raises:
        RuntimeError: OpenVINO does not take the graph.
    """

    device = "cpu"

    def __init__(self, model: bytes | Path, preprocess: Preprocess, *, task: Task, threads: int) -> None:
        import openvino

        self.title = f"OpenVINO {openvino.__version__.partition('-')[0]}"
        self.name = f"{self.title} CPU"
        self._preprocess = preprocess
        compiled = core().compile_model(core().read_model(model), "CPU", dict(properties(threads)))
        self._outputs = compared(output.any_name for output in compiled.outputs)
        self._request = compiled.create_infer_request()
        self._input = compiled.input(0).any_name
        self._takes_pixels = compiled.input(0).element_type == openvino.Type.u8

    def prepare(self, images: Images) -> Array:
        """Normalise to float32 NCHW, unless the graph takes the pixels."""
        return images if self._takes_pixels else self._preprocess.normalize(images)

    def __call__(self, inputs: Array) -> Outputs:
        """Return the outputs as numpy arrays."""
        self._request.infer({self._input: inputs}, share_inputs=inputs.flags.writeable, share_outputs=True)
        return tuple(self._request.get_tensor(name).data.copy() for name in self._outputs)
