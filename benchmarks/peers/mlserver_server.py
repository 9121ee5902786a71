"""MLServer: a custom runtime over the session, adaptive batching, everything in one process."""

import asyncio
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import Session, arguments, stated


class Network(MLModel):  # type: ignore[misc]
    """One of the models."""

    async def load(self) -> bool:
        """MLServer's hook."""
        folder = Path(os.environ["PEERS_MODELS"])
        self.session = next(Session(model) for model in stated(folder) if model.name == self.name)
        self.pool = ThreadPoolExecutor(1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """MLServer's hook."""
        given = payload.inputs[0]
        if given.datatype == "BYTES":
            rows = np.array([item if isinstance(item, bytes) else item.encode("latin-1") for item in given.data.root])
        else:
            rows = NumpyCodec.decode_input(given)
        tiny = self.session.stated.classes <= 10
        logits = (
            self.session(rows)
            if tiny
            else await asyncio.get_running_loop().run_in_executor(self.pool, self.session, rows)
        )
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])


def write_settings(folder: Path, models: Path, port: int) -> None:
    """The folder that `mlserver start` reads."""
    settings = {"host": "127.0.0.1", "grpc_port": port, "http_port": port + 1, "metrics_port": port + 2}
    settings |= {"debug": False, "use_structured_logging": False, "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings))
    for model in stated(models):
        (folder / model.name).mkdir()
        of_model = {"name": model.name, "implementation": "mlserver_server.Network"}
        # Its batching cannot stack BYTES.
        if model.datatype != "BYTES":
            of_model |= {"max_batch_size": model.max_batch, "max_batch_time": 0.0001}
        (folder / model.name / "model-settings.json").write_text(json.dumps(of_model))


if __name__ == "__main__":
    asked = arguments()
    made = tempfile.mkdtemp(prefix="peers-mlserver-")
    write_settings(Path(made), asked.models, asked.port)
    os.environ |= {"PEERS_MODELS": str(asked.models), "PYTHONPATH": str(Path(__file__).parent)}
    command = str(Path(sys.executable).with_name("mlserver"))
    os.execv(command, [command, "start", made])
