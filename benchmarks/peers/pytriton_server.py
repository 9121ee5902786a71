"""PyTriton: Triton's front end, which hands every batch to this process."""

import os
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import Session, Stated, arguments, stated


def network(model: Stated) -> Callable[..., Any]:
    """The function that PyTriton calls."""
    session = Session(model)

    @batch  # type: ignore[untyped-decorator]
    def infer(**inputs: Any) -> dict[str, Any]:
        return {"logits": session(inputs["input"])}

    return infer  # type: ignore[no-any-return]


if __name__ == "__main__":
    library = str(sysconfig.get_config_var("LIBDIR"))
    if library not in os.environ.get("LD_LIBRARY_PATH", ""):
        # Triton's own process must load the library of this very Python, not one that the system has.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_LIBRARY_PATH": library})
    asked = arguments()
    config = TritonConfig(
        grpc_port=asked.port, http_port=asked.port + 1, grpc_address="127.0.0.1", http_address="127.0.0.1",
        allow_metrics=False,
    )  # fmt: skip
    with Triton(config=config) as triton:
        for model in stated(asked.models):
            dtype = bytes if model.datatype == "BYTES" else model.dtype
            triton.bind(
                model_name=model.name,
                infer_func=network(model),
                inputs=[
                    Tensor(name="input", dtype=bytes if model.datatype == "BYTES" else model.dtype, shape=model.shape)
                ],
                outputs=[Tensor(name="logits", dtype=np.float32, shape=(model.classes,))],
                config=ModelConfig(max_batch_size=model.max_batch, batcher=DynamicBatcher()),
                strict=False,
            )
        triton.serve()
