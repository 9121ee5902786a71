"""What a user of tritonclient does, printed as JSON: `python talk.py HOST:PORT IMAGE`."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException


def tensor(name: str, values: np.ndarray, datatype: str) -> Any:
    given = triton.InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values)
    return given


def ask(client: Any, model: str, values: np.ndarray, datatype: str = "FP32", **options: Any) -> Any:
    return client.infer(model, [tensor("input", values, datatype)], **options)


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, str]:
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    return {"status": "OK", "message": ""}


def facts(client: Any) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": [client.is_model_ready(name) for name in ("linear", "nothing")],
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("linear", as_json=True),
        "config": client.get_model_config("colors", as_json=True)["config"],
    }


def answers(client: Any, image: bytes) -> dict[str, Any]:
    rows = np.array([[1, 2, 3, 4], [0, 0, 0, 1]], np.float32)
    encoded = np.array([[image], [image]], dtype=np.object_)
    top = [triton.InferRequestedOutput("logits", class_count=2)]
    result = ask(client, "linear", rows, request_id="r7", outputs=top[:0])
    classes = ask(client, "linear", rows, outputs=top).as_numpy("logits")
    images = ask(client, "colors", encoded, "BYTES", outputs=top).as_numpy("logits")
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    return {
        "batched": result.as_numpy("logits").tolist(),
        "id": result.get_response().id,
        "version": result.get_response().model_version,
        "unbatched": ask(client, "single", rows[0]).as_numpy("logits").tolist(),
        "classes": [[text.decode() for text in row] for row in classes],
        "images": [[text.decode() for text in row] for row in images],
        "raw_image": ask(client, "colors", encoded[:1], "BYTES").as_numpy("logits").tolist(),
        "pixels": ask(client, "colors", pixels, "UINT8").as_numpy("logits").tolist(),
        "with_options": ask(
            client, "linear", rows[:1], model_version="1", priority=1, timeout=60_000_000, client_timeout=60,
            parameters={"note": "n", "flag": True, "ratio": 0.5},
        ).as_numpy("logits").tolist(),
        "gzip": ask(client, "linear", rows[:1], compression_algorithm="gzip").as_numpy("logits").tolist(),
    }  # fmt: skip


def errors(client: Any) -> dict[str, dict[str, str]]:
    good = np.zeros((1, 4), np.float32)
    wrong_name = triton.InferInput("zz", [1, 4], "FP32")
    wrong_name.set_data_from_numpy(good)
    short = triton.InferInput("input", [2, 4], "FP32")
    short._raw_content = good.tobytes()
    return {
        "model": failure(ask, client, "nothing", good),
        "version": failure(ask, client, "linear", good, model_version="9"),
        "version_text": failure(ask, client, "linear", good, model_version="abc"),
        "metadata": failure(client.get_model_metadata, "nothing"),
        "config": failure(client.get_model_config, "nothing"),
        "statistics": failure(client.get_inference_statistics, "nothing"),
        "name": failure(client.infer, "linear", [wrong_name]),
        "missing": failure(client.infer, "linear", []),
        "datatype": failure(ask, client, "linear", good.astype(np.float64), "FP64"),
        "shape": failure(ask, client, "linear", np.zeros((1, 5), np.float32)),
        "rank": failure(ask, client, "linear", np.zeros((1, 4, 1), np.float32)),
        "batch": failure(ask, client, "linear", np.zeros((9, 4), np.float32)),
        "size": failure(client.infer, "linear", [short]),
        "output": failure(ask, client, "linear", good, outputs=[triton.InferRequestedOutput("zz")]),
        "id": failure(ask, client, "linear", np.zeros((1, 5), np.float32), request_id="r9"),
        "image": failure(ask, client, "colors", np.array([[b"none"]], np.object_), "BYTES"),
        "deadline": failure(ask, client, "slow", np.ones((1, 1), np.float32), client_timeout=0.02),
        "timeout": failure(ask, client, "slow", np.ones((1, 1), np.float32), timeout=20_000),
        "unload": failure(client.unload_model, "linear"),
    }


def crowd(url: str, clients: int, requests: int) -> list[int]:
    """Every client's own answers: row sums that no other client has."""
    wrong: list[int] = []
    barrier = threading.Barrier(clients)

    def one(number: int) -> None:
        with triton.InferenceServerClient(url) as client:
            barrier.wait()
            for step in range(requests):
                rows = np.array([[number, step, 0, row] for row in range(1 + number % 3)], np.float32)
                expected = [[number, 2 * step, 3 * row - number] for row in range(1 + number % 3)]
                if ask(client, "linear", rows).as_numpy("logits").tolist() != expected:
                    wrong.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def main() -> None:
    url, image = sys.argv[1:]
    data = Path(image).read_bytes()
    with triton.InferenceServerClient(url) as client:
        said = {"facts": facts(client), "answers": answers(client, data), "errors": errors(client)}
        statistics = client.get_inference_statistics("linear")
        said["before"] = json_format.MessageToDict(statistics, preserving_proto_field_name=True)
        said["wrong"] = crowd(url, 64, 8)
        statistics = client.get_inference_statistics("linear")
        said["after"] = json_format.MessageToDict(statistics, preserving_proto_field_name=True)
    print(json.dumps(said))


main()
