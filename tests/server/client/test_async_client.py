"""convoynet.AsyncClient against a real server: what `Client` does, awaited."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from convoynet import AsyncClient, Client, ClientError, Unreachable
from convoynet.server.client.client_codec import infer_request
from tests.server import onnx_models
from tests.server.client.conftest import png

ROWS = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)
EXPECTED = ROWS @ onnx_models.LINEAR_WEIGHTS


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("awaited") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_colors(repository)
    onnx_models.write_slow(repository)
    onnx_models.write_segmenter(repository)
    onnx_models.write_detector(repository)
    with onnx_models.serve(repository) as server:
        yield server


def test_it_has_what_the_blocking_one_has() -> None:
    def surface(kind: type) -> dict[str, inspect.Signature]:
        named = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
        return {name: inspect.signature(method) for name, method in named.items()}

    assert surface(AsyncClient) == surface(Client)
    ours, theirs = inspect.signature(AsyncClient.__init__), inspect.signature(Client.__init__)
    assert ours == theirs


async def test_every_method_says_what_the_blocking_client_says(live: onnx_models.LiveServer) -> None:
    images = [png("blue"), png("red")]
    with Client(live.url) as blocking:
        async with AsyncClient(live.url) as client:
            assert await client.server_ready() is True
            assert await client.model_ready("linear") is True
            assert await client.model_ready("nothing") is False
            assert await client.models() == blocking.models()
            assert await client.server_metadata() == blocking.server_metadata()
            assert await client.model_metadata("linear") == blocking.model_metadata("linear")
            assert await client.model_config("colors") == blocking.model_config("colors")
            assert [each.name for each in await client.statistics("linear")] == ["linear"]
            for answer in (
                await client.infer("linear", {"input": ROWS}),
                await client.infer("linear", ROWS, request_id="r"),
                await client.send(infer_request("linear", {"input": ROWS})),
            ):
                np.testing.assert_allclose(answer["logits"], EXPECTED, rtol=1e-6)
            best = await client.infer("linear", {"input": ROWS}, class_count=1)
            assert (
                best["logits"].tolist() == blocking.infer("linear", {"input": ROWS}, class_count=1)["logits"].tolist()
            )
            assert await client.classify("colors", images, top=2) == blocking.classify("colors", images, top=2)
            (ours,), (theirs,) = (
                await client.segment("segmenter", images[:1]),
                blocking.segment("segmenter", images[:1]),
            )
            np.testing.assert_array_equal(ours.classes, theirs.classes)
            assert ours.shares == theirs.shares
            assert await client.detect("detector", images) == blocking.detect("detector", images)


async def test_errors_are_the_same(live: onnx_models.LiveServer) -> None:
    async with AsyncClient(live.url) as client:
        for call, says in [
            (client.infer("nothing", {"input": ROWS}), "unknown model: 'nothing' is not found"),
            (client.infer("linear", {"input": "cat.jpg"}), "input 'input' is 'cat.jpg'"),
            (client.infer("linear", ROWS, timeout=-1), "timeout is -1"),
            (client.infer("linear", ROWS, prio=1), "unknown option 'prio'"),
            (client.classify("linear", [png("red")], top=0), "top is 0"),
            (client.segment("linear", [png("red")]), "is for classification, not for segmentation"),
        ]:
            with pytest.raises(ClientError, match=says):
                await call
        with pytest.raises(ClientError) as caught:
            await client.infer("slow", {"input": np.ones((1, 1), np.float32)}, timeout=0.02)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    async with AsyncClient("127.0.0.1:1") as client:
        assert not await client.server_ready()
        with pytest.raises(Unreachable, match=r"no server at 127.0.0.1:1 \(connection refused\)"):
            await client.model_ready("linear")


async def test_a_cancelled_task_cancels_its_call_and_the_client_goes_on(live: onnx_models.LiveServer) -> None:
    async with AsyncClient(live.url) as client:
        await client.server_ready()
        task = asyncio.create_task(client.infer("slow", {"input": np.ones((1, 1), np.float32)}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        np.testing.assert_allclose((await client.infer("linear", ROWS))["logits"], EXPECTED, rtol=1e-6)


async def test_a_closed_client_says_so_also_to_calls_that_still_run(live: onnx_models.LiveServer) -> None:
    client = AsyncClient(live.url)
    await client.server_ready()
    task = asyncio.create_task(client.infer("slow", {"input": np.ones((1, 1), np.float32)}))
    await asyncio.sleep(0)  # it has begun
    await client.close()
    for call in (task, client.server_ready()):
        with pytest.raises(ClientError, match="the client is closed") as caught:
            await call
        assert caught.value.code is grpc.StatusCode.CANCELLED


def test_it_may_be_made_before_there_is_a_loop() -> None:
    client = AsyncClient("127.0.0.1:1")
    assert client.url == "127.0.0.1:1"
