"""The protocol's extensions as tritonclient speaks them, printed as JSON: `python talk_extensions.py HOST:PORT`."""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException


def tensor(values: np.ndarray) -> Any:
    given = triton.InferInput("input", list(values.shape), "FP32")
    given.set_data_from_numpy(values)
    return given


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def stream(url: str) -> list[Any]:
    """Three requests on one stream, the second of them wrong."""
    heard: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: heard.put((result, error)))
        for number, width in enumerate((4, 5, 4)):
            values = np.full((1, width), number, np.float32)
            client.async_stream_infer(
                "linear", [tensor(values)], request_id=str(number), enable_empty_final_response=True
            )
        answers = [heard.get(timeout=60) for _ in range(3)]
        client.stop_stream()
    return [
        [str(error), None] if result is None else [result.as_numpy("logits").tolist(), final(result)]
        for result, error in answers
    ]


def final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def shared_memory(client: Any) -> dict[str, Any]:
    """Rows in and logits out of one region each."""
    rows = np.array([[1, 2, 3, 4], [0, 0, 0, 1]], np.float32)
    places = [shm.create_shared_memory_region(n, f"/convoy_{os.getpid()}_{n}", 64) for n in ("rows", "logits")]
    try:
        shm.set_shared_memory_region(places[0], [rows])
        for name in ("rows", "logits"):
            client.register_system_shared_memory(name, f"/convoy_{os.getpid()}_{name}", 64)
        status = client.get_system_shared_memory_status(as_json=True)
        given = triton.InferInput("input", [2, 4], "FP32")
        given.set_shared_memory("rows", rows.nbytes)
        asked = triton.InferRequestedOutput("logits")
        asked.set_shared_memory("logits", 24)
        answer = client.infer("linear", [given], outputs=[asked])
        return {
            "status": sorted(status["regions"]),
            "in_message": answer.get_response().raw_output_contents[0] != b"",
            "logits": shm.get_contents_as_numpy(places[1], np.float32, [2, 3]).tolist(),
            "again": failure(client.register_system_shared_memory, "rows", f"/convoy_{os.getpid()}_rows", 64),
            "gone": [
                failure(client.unregister_system_shared_memory),
                failure(client.infer, "linear", [given]),
                client.get_system_shared_memory_status(as_json=True),
            ],
        }
    finally:
        for place in places:
            shm.destroy_shared_memory_region(place)


def main() -> None:
    (url,) = sys.argv[1:]
    with triton.InferenceServerClient(url) as client:
        said = {
            "extensions": client.get_server_metadata(as_json=True)["extensions"],
            "stream": stream(url),
            "shared_memory": shared_memory(client),
            "cuda": [
                client.get_cuda_shared_memory_status(as_json=True),
                failure(client.register_cuda_shared_memory, "c", b"A" * 88, 0, 64),
                failure(client.unregister_cuda_shared_memory),
            ],
            "trace": [
                client.update_trace_settings(
                    "linear", {"trace_rate": "5", "trace_level": ["TIMESTAMPS"]}, as_json=True
                ),
                client.get_trace_settings(as_json=True),
                client.update_trace_settings("linear", {"trace_rate": None, "trace_level": None}, as_json=True),
            ],
            "log": [
                client.update_log_settings({"log_verbose_level": 1, "log_format": "ISO8601"}, as_json=True),
                client.update_log_settings({"log_verbose_level": 0, "log_format": "default"}, as_json=True),
                client.get_log_settings(as_json=True),
                failure(client.update_log_settings, {"log_file": "x"}),
            ],
            "repository": [
                failure(client.get_model_repository_index),
                failure(client.unload_model, "single", unload_dependents=True),
                failure(client.load_model, "single"),
            ],
            "statistics": json_format.MessageToDict(client.get_inference_statistics("linear")),
        }
    print(json.dumps(said))


main()
