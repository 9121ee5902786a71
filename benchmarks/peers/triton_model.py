"""A model of Triton's Python backend; triton_server.py puts it into the repository."""

import os
import sys
from pathlib import Path

# The backend's process has a Python path of its own. The environment's numpy must come before any other: with numpy 2
# that process reads wrong sizes and gives out empty tensors.
sys.path[:0] = os.environ["PEERS_PATH"].split(os.pathsep)

import numpy as np  # noqa: E402
import triton_python_backend_utils as backend  # noqa: E402
from session import Session, stated  # noqa: E402


class TritonPythonModel:
    """Triton's name for it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Triton's hook."""
        models = stated(Path(os.environ["PEERS_MODELS"]))
        self.session = next(Session(model) for model in models if model.name == args["model_name"])

    def execute(self, requests: list) -> list:
        """Triton's hook: the requests of one batch."""
        rows = [backend.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        logits = self.session(rows[0] if len(rows) == 1 else np.concatenate(rows))
        ends = np.cumsum([len(each) for each in rows])[:-1]
        return [
            backend.InferenceResponse([backend.Tensor("logits", np.ascontiguousarray(part))])
            for part in np.split(logits, ends)
        ]
