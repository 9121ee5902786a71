"""KServe's Python SDK: a custom model over the session; the SDK has no batching."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from session import Session, Stated, arguments, stated


class Network(Model):
    """One of the models. The engine runs in a thread, so that the event loop goes on."""

    def __init__(self, model: Stated) -> None:
        super().__init__(model.name)
        self.session = Session(model)
        self.pool = ThreadPoolExecutor(1)
        self.ready = True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        """KServe's hook."""
        rows = payload.inputs[0].as_numpy()
        # A hop to a thread costs more than a network that takes no time.
        tiny = self.session.stated.classes <= 10
        logits = (
            self.session(rows)
            if tiny
            else await asyncio.get_running_loop().run_in_executor(self.pool, self.session, rows)
        )
        output = InferOutput(name="logits", shape=list(logits.shape), datatype="FP32")
        output.set_data_from_numpy(logits, binary_data=True)
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    asked = arguments()
    server = ModelServer(
        http_port=asked.port + 1, grpc_port=asked.port, enable_grpc=True, workers=1, access_log_format=None
    )
    server.start([Network(model) for model in stated(asked.models)])
