"""LitServe: an API for each model, batching, JSON over HTTP, since it has no gRPC; rows come in base64."""

import base64
from typing import Any

import litserve
import numpy as np
from session import Session, Stated, arguments, stated


class Network(litserve.LitAPI):  # type: ignore[misc]
    """One of the models."""

    def __init__(self, model: Stated) -> None:
        # Without a timeout its workers poll their queue and take a core for it.
        super().__init__(api_path=f"/{model.name}", max_batch_size=model.max_batch, batch_timeout=0.002)
        self.model = model

    def setup(self, device: str) -> None:
        """LitServe's hook, in the worker process."""
        self.session = Session(self.model)

    def decode_request(self, request: dict[str, str]) -> Any:
        """LitServe's hook."""
        data = base64.b64decode(request["b64"])
        if self.model.datatype == "BYTES":
            return data
        return np.frombuffer(data, self.model.dtype).reshape(self.model.shape)

    def batch(self, inputs: list[Any]) -> Any:
        """LitServe's hook."""
        return np.array(inputs, np.object_) if self.model.datatype == "BYTES" else np.stack(inputs)

    def predict(self, x: Any) -> Any:
        """LitServe's hook."""
        return self.session(x)

    def unbatch(self, output: Any) -> list[Any]:
        """LitServe's hook."""
        return list(output)

    def encode_response(self, output: Any) -> list[float]:
        """LitServe's hook."""
        logits: list[float] = output.tolist()
        return logits


if __name__ == "__main__":
    asked = arguments()
    apis = [Network(model) for model in stated(asked.models)]
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(
        host="127.0.0.1", port=asked.port, num_api_servers=1, generate_client_file=False, log_level="warning",
        access_log=False,
    )  # fmt: skip
