"""What a user of tritonclient.http does, printed as JSON: `python talk_http.py HOST:PORT IMAGE`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException


def tensor(name: str, values: np.ndarray, datatype: str, binary: bool = True) -> Any:
    given = triton.InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def ask(client: Any, model: str, values: np.ndarray, datatype: str = "FP32", **options: Any) -> Any:
    binary = options.pop("binary", True)
    return client.infer(model, [tensor("input", values, datatype, binary)], **options)


def outcome(call: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    try:
        value = call(*arguments, **options)
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message(), "value": None}
    return {"status": "200", "message": "", "value": value if isinstance(value, dict | list | bool) else None}


def facts(client: Any) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": [client.is_model_ready(name) for name in ("linear", "nothing")],
        "version": client.is_model_ready("linear", "1"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata("linear"),
        "config": client.get_model_config("colors"),
    }


def answers(client: Any, image: bytes) -> dict[str, Any]:
    rows = np.array([[1, 2, 3, 4], [0, 0, 0, 1]], np.float32)
    encoded = np.array([[image], [image]], dtype=np.object_)
    top = [triton.InferRequestedOutput("logits", class_count=2)]
    top_json = [triton.InferRequestedOutput("logits", binary_data=False, class_count=2)]
    plain = [triton.InferRequestedOutput("logits", binary_data=False)]
    result = ask(client, "linear", rows, request_id="r7")
    # The client keeps a connection for an answer that nobody has read: they are fetched before anything else is asked.
    waiting = [client.async_infer("linear", [tensor("input", rows * number, "FP32")]) for number in range(4)]
    fetched = [each.get_result().as_numpy("logits").tolist() for each in waiting]
    return {
        "batched": result.as_numpy("logits").tolist(),
        "id": result.get_response()["id"],
        "version": result.get_response()["model_version"],
        "json_in": ask(client, "linear", rows, binary=False).as_numpy("logits").tolist(),
        "json_out": ask(client, "linear", rows, outputs=plain).as_numpy("logits").tolist(),
        "json_both": ask(client, "linear", rows, binary=False, outputs=plain).as_numpy("logits").tolist(),
        "unbatched": ask(client, "single", rows[0]).as_numpy("logits").tolist(),
        "classes": [[t.decode() for t in row] for row in ask(client, "linear", rows, outputs=top).as_numpy("logits")],
        "classes_json": ask(client, "linear", rows, outputs=top_json).as_numpy("logits").tolist(),
        "images": [
            [t.decode() for t in row] for row in ask(client, "colors", encoded, "BYTES", outputs=top).as_numpy("logits")
        ],
        "with_options": ask(
            client, "linear", rows[:1], model_version="1", priority=1, timeout=60_000_000, query_params={"a": "b"},
            parameters={"note": "n", "flag": True, "ratio": 0.5},
        ).as_numpy("logits").tolist(),
        "gzip": ask(client, "linear", rows, request_compression_algorithm="gzip").as_numpy("logits").tolist(),
        "deflate": ask(
            client, "linear", rows, request_compression_algorithm="deflate", response_compression_algorithm="gzip"
        ).as_numpy("logits").tolist(),
        "async": fetched,
    }  # fmt: skip


def errors(client: Any) -> dict[str, dict[str, Any]]:
    good = np.zeros((1, 4), np.float32)
    wrong_name = tensor("zz", good, "FP32")
    short = triton.InferInput("input", [2, 4], "FP32")
    short._raw_data = good.tobytes()
    short._parameters["binary_data_size"] = 16
    return {
        "model": outcome(ask, client, "nothing", good),
        "version": outcome(ask, client, "linear", good, model_version="9"),
        "version_text": outcome(ask, client, "linear", good, model_version="abc"),
        "metadata": outcome(client.get_model_metadata, "nothing"),
        "config": outcome(client.get_model_config, "nothing"),
        "statistics": outcome(client.get_inference_statistics, "nothing"),
        "name": outcome(client.infer, "linear", [wrong_name]),
        "missing": outcome(client.infer, "linear", []),
        "datatype": outcome(ask, client, "linear", good.astype(np.float64), "FP64"),
        "shape": outcome(ask, client, "linear", np.zeros((1, 5), np.float32)),
        "batch": outcome(ask, client, "linear", np.zeros((9, 4), np.float32)),
        "size": outcome(client.infer, "linear", [short]),
        "output": outcome(ask, client, "linear", good, outputs=[triton.InferRequestedOutput("zz")]),
        "id": outcome(ask, client, "linear", np.zeros((1, 5), np.float32), request_id="r9"),
        "image": outcome(ask, client, "colors", np.array([[b"none"]], np.object_), "BYTES"),
        "timeout": outcome(ask, client, "slow", np.ones((1, 1), np.float32), timeout=20_000),
    }


def management(client: Any) -> dict[str, dict[str, Any]]:
    """Every other call of the client, once."""
    return {
        "index": outcome(client.get_model_repository_index),
        "unload": outcome(client.unload_model, "single"),
        "load": outcome(client.load_model, "single"),
        "trace": outcome(client.get_trace_settings),
        "trace_update": outcome(client.update_trace_settings, settings={"trace_rate": "7"}),
        "trace_model": outcome(client.get_trace_settings, "linear"),
        "log": outcome(client.get_log_settings),
        "log_update": outcome(client.update_log_settings, {"log_verbose_level": 0}),
        "system_status": outcome(client.get_system_shared_memory_status),
        "system_register": outcome(client.register_system_shared_memory, "r", "/no_such_region_of_ours", 16),
        "system_unregister": outcome(client.unregister_system_shared_memory),
        "cuda_status": outcome(client.get_cuda_shared_memory_status),
        "cuda_register": outcome(client.register_cuda_shared_memory, "r", b"AAE=", 0, 16),
        "cuda_unregister": outcome(client.unregister_cuda_shared_memory),
    }


async def aio(url: str) -> list[Any]:
    """Forty requests at once by the asynchronous client."""
    async with triton_aio.InferenceServerClient(url) as client:

        async def one(number: int) -> Any:
            rows = np.array([[number, 0, 0, 0]], np.float32)
            return (await client.infer("linear", [tensor("input", rows, "FP32")])).as_numpy("logits")[0].tolist()

        return list(await asyncio.gather(*(one(number) for number in range(40))))


def main() -> None:
    url, image = sys.argv[1], Path(sys.argv[2]).read_bytes()
    # Not in a `with`: closing after a failure would wait for what never comes, and hide it.
    client = triton.InferenceServerClient(url, concurrency=4)
    said = {
        "facts": facts(client),
        "answers": answers(client, image),
        "errors": errors(client),
        "management": management(client),
        "aio": asyncio.run(aio(url)),
        "statistics": [client.get_inference_statistics("linear", "1"), client.get_inference_statistics()],
    }
    client.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
