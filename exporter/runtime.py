"""The two sides of every comparison: the PyTorch model, and the exported graph in the runtime that serves it."""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from exporter.images import Preprocess

Array = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]

_ERRORS_ONLY = 3


class Predictor(Protocol):
    """Something that turns images into logits."""

    name: str

    def prepare(self, images: Images) -> npt.NDArray[np.generic]:
        """Turn uint8 NHWC images into what `__call__` takes."""
        ...

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return float32 logits [n, classes]."""
        ...


class Eager:
    """The PyTorch model, run op by op in float32."""

    def __init__(self, model: torch.nn.Module, preprocess: Preprocess, device: str = "cpu") -> None:
        self.device = device
        self.name = f"PyTorch {torch.__version__} eager FP32 on {device}"
        self._model = model.eval().to(device)
        self._preprocess = preprocess

    def prepare(self, images: Images) -> npt.NDArray[np.generic]:
        """Normalise to float32 NCHW."""
        return self._preprocess.normalize(images)

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return float32 logits [n, classes]; the copies to and from a GPU are part of it."""
        with torch.inference_mode():
            logits: torch.Tensor = self._model(torch.from_numpy(inputs).to(self.device))
            result: Array = logits.float().cpu().numpy()
        return result


class Session:
    """An ONNX graph in ONNX Runtime, on CUDA where the target asks for it and the machine has it.

    Args:
        model: the graph as bytes, or the file that holds it.
        preprocess: how images become inputs, where the graph does not do it itself.
        target: "cpu" or "gpu".
        threads: CPU threads of one call.
    """

    def __init__(self, model: bytes | Path, preprocess: Preprocess, *, target: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = threads
        # As the server runs it: spinning threads take the cores from whatever else wants them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        cuda = target == "gpu" and torch.cuda.is_available()
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        source = model if isinstance(model, bytes) else str(model)
        self._session = onnxruntime.InferenceSession(source, options, providers=providers)
        used = self._session.get_providers()[0]
        self.device = "cuda" if used == "CUDAExecutionProvider" else "cpu"
        self.name = f"ONNX Runtime {onnxruntime.__version__} {used}"
        (signature,) = self._session.get_inputs()
        self._input = signature.name
        self._takes_pixels = signature.type == "tensor(uint8)"
        self._preprocess = preprocess

    def prepare(self, images: Images) -> npt.NDArray[np.generic]:
        """Normalise to float32 NCHW, unless the graph takes the pixels."""
        return images if self._takes_pixels else self._preprocess.normalize(images)

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return float32 logits [n, classes]."""
        (logits,) = self._session.run(None, {self._input: inputs})
        result: Array = logits
        return result
