"""The two sides of every comparison: the PyTorch model, and the exported graph in the runtime that serves it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from convoynet.exporter.archs import Task, own
from convoynet.exporter.archs.onnx_network import OnnxNetwork
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.graph.onnx_from_torch import compared
from convoynet.exporter.graph.onnx_graph import replace
from convoynet.exporter.graph.onnx_session import make_session, session_options

Array = npt.NDArray[Any]
Images = npt.NDArray[np.uint8]
# One array per output, each with the batch first: the logits alone, or boxes, scores, labels and count.
Outputs = tuple[Array, ...]

_CPU, _CUDA, _TENSORRT = (f"{kind}ExecutionProvider" for kind in ("CPU", "CUDA", "Tensorrt"))


class Predictor(Protocol):
    """Something that turns images into outputs."""

    name: str

    def prepare(self, images: Images) -> Array:
        """Turn uint8 NHWC images into what `__call__` takes."""
        ...

    def __call__(self, inputs: Array) -> Outputs:
        """Return its outputs but the class map, which follows from the logits."""
        ...


class Eager:
    """The PyTorch model, run op by op in float32; or an ONNX file that was given in its place, likewise.

    Args:
        model: the module; it is moved to the device.
        preprocess: how images become inputs.
        device: "cpu", "cuda" or "cuda:1".
        exact: without TF32, in which PyTorch otherwise lets GPUs convolve float32, with 10 bits of fraction for 23.
    """

    def __init__(
        self, model: torch.nn.Module, preprocess: Preprocess, device: str = "cpu", *, exact: bool = False
    ) -> None:
        self.device = device
        kind = "eager FP32 without TF32" if exact else "eager FP32"
        self.name = model.title if isinstance(model, OnnxNetwork) else f"PyTorch {torch.__version__} {kind} on {device}"
        self._model = model.eval().to(device)
        self._preprocess = preprocess
        self._exact = exact

    def prepare(self, images: Images) -> Array:
        """Normalise to float32 NCHW."""
        return self._preprocess.normalize(images)

    def __call__(self, inputs: Array) -> Outputs:
        """Return the outputs; the copies to and from a GPU are part of it.

        Raises:
            BadInput: the network's code fails on these images.
        """
        try:
            with torch.inference_mode(), without_tf32() if self._exact else nullcontext():
                made = self._model(torch.from_numpy(inputs).to(self.device))
        except BadInput:  # it says itself what is wrong
            raise
        except Exception as error:  # whatever the network raises
            what = f"the network fails in PyTorch on {len(inputs)} image{'s' * (len(inputs) > 1)}"
            raise own.failed(what, error, "see that its forward takes such images in evaluation mode") from error
        tensors = (made,) if isinstance(made, torch.Tensor) else made
        # NumPy has no bfloat16; the graph of such a network is refused by what reads it.
        outputs = tuple((t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy() for t in tensors)
        if len(inputs) == 1 and any(output.shape[:1] != (1,) for output in outputs):
            # x.squeeze() drops the axis of one image: what the network says of it, it says of two alike.
            return tuple(output[:1] for output in self(np.repeat(inputs, 2, axis=0)))
        return outputs


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let PyTorch compute float32 as float32 on GPUs too."""
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


class Session:
    """An ONNX graph in ONNX Runtime, on CUDA where the target asks for it and the machine has it.

    Args:
        model: the graph as bytes, or the file that holds it.
        preprocess: how images become inputs, where the graph does not do it itself.
        task: says which outputs to return.
        target: "cpu"; "gpu": the CUDA provider, where there is one; "tensorrt": the TensorRT provider, or nothing.
        threads: CPU threads of one call.
        optimized: with all optimisations; those of ONNX Runtime 1.31 make an FP8 graph compute something else, and
            refuse some with FP16 scales.

    Attributes:
        session: ONNX Runtime's own.
        title: the runtime and its version.

    Raises:
        Missing: the TensorRT provider is asked for, and cannot be used here.
    """

    def __init__(
        self,
        model: bytes | Path,
        preprocess: Preprocess,
        *,
        task: Task,
        target: str,
        threads: int,
        optimized: bool = True,
    ) -> None:
        options = session_options(threads, optimized=optimized)
        self.session = make_session(model, options, _providers(target))
        used = self.session.get_providers()[0]
        if target == "tensorrt" and used != _TENSORRT:
            raise Missing(
                f"ONNX Runtime's {_TENSORRT} cannot be used here, it fell back to {used}: it needs an NVIDIA GPU, "
                "onnxruntime-gpu and TensorRT's libraries (pip install tensorrt)"
            )
        self.device = "cpu" if used == _CPU else "cuda"
        self.title = f"ONNX Runtime {onnxruntime.__version__}"
        self.name = f"{self.title} {used}"
        (signature,) = self.session.get_inputs()
        self._input = signature.name
        self._outputs = compared(output.name for output in self.session.get_outputs())
        self._takes_pixels = signature.type == "tensor(uint8)"
        self._preprocess = preprocess

    def prepare(self, images: Images) -> Array:
        """Normalise to float32 NCHW, unless the graph takes the pixels."""
        return images if self._takes_pixels else self._preprocess.normalize(images)

    def __call__(self, inputs: Array) -> Outputs:
        """Return the outputs as numpy arrays."""
        return tuple(self.session.run(self._outputs, {self._input: inputs}))


def _providers(target: str) -> list[str | tuple[str, dict[str, str]]]:
    """What ONNX Runtime shall try, in this order, of what it has and the machine can run."""
    # Float32 as float32: what is compared with PyTorch is the graph, and TF32 would hide in its error.
    cuda = (_CUDA, {"use_tf32": "0"})
    wanted = {"cpu": [], "gpu": [cuda], "tensorrt": [(_TENSORRT, {}), cuda]}[target]
    available = onnxruntime.get_available_providers() if torch.cuda.is_available() else []
    return [*(provider for provider in wanted if provider[0] in available), _CPU]


def inner_session(
    model: onnx.ModelProto, tensors: Sequence[str], *, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """A session on the CPU that returns inner tensors of a graph in the place of its outputs.

    They keep their names and values through ONNX Runtime's optimisations, which are on: they halve the time.
    `optimized` is as for `Session`.
    """
    options = session_options(optimized=optimized, spinning=True)
    # An arena keeps, and doubles, what one image once needed; and in this order a value is reduced as soon as it is
    # there, and not after all the others: at 800 x 800 pixels that is gigabytes.
    options.enable_cpu_mem_arena = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return make_session(_returning(model, tensors), options)


def _returning(model: onnx.ModelProto, tensors: Sequence[str]) -> bytes:
    """A graph with other outputs; the copy that this takes is gone before a session makes its own."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    replace(probed.graph.output, [onnx.ValueInfoProto(name=name) for name in tensors])
    return probed.SerializeToString()
