"""One contract for every engine in its process: answers, failures, its end, and its memory."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.buffers import SharedBuffer, Slot
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import EngineFailed, EngineLost, InvalidModel, RowsDiffer
from convoynet.server.types import Tensor
from tests.server.conftest import fake_model
from tests.server.engine_setup import installed, rows, spec_of
from tests.server.onnx_models import (
    LINEAR_WEIGHTS,
    write_doubling,
    write_linear,
    write_pairs,
    write_segmenter,
    write_slow,
    write_texts,
)

ENGINES = ("fake", "onnxruntime", "openvino")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine that is installed."""
    if not installed(request.param):
        pytest.skip(f"{request.param} is an extra")
    name: str = request.param
    return name


FAKE = """max_batch_size: 8
input {{ name: "input" data_type: {0} dims: {1} }}
output {{ name: "{2}" data_type: {0} dims: {3} }}
"""
Sum = Callable[[Tensor], Tensor]


def fake_with(root: Path, config: str, **stated: float) -> None:
    """A fake model with inputs and outputs of its own."""
    fake_model(root, config="", **stated)
    (root / "sum" / "config.pbtxt").write_text(f'backend: "fake"\n{config}')


def write_sums(root: Path, engine: str) -> Sum:
    """A model FP32 [4] -> FP32; what it computes."""
    if engine == "fake":
        fake_with(root, FAKE.format("TYPE_FP32", "4", "logits", "1"))
        return lambda x: x.sum(axis=1, keepdims=True)
    write_linear(root)
    return lambda x: x @ LINEAR_WEIGHTS


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=ENGINES)
async def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[EngineProcess, Sum]]:
    """An engine process that tests share, and what it computes."""
    if not installed(request.param):
        pytest.skip(f"{request.param} is an extra")
    root = tmp_path_factory.mktemp(request.param)
    expected = write_sums(root, request.param)
    process = await EngineProcess.start(spec_of(root, request.param))
    yield process, expected
    await process.close()


async def test_each_request_gets_its_own_rows_to_keep(running: tuple[EngineProcess, Sum]) -> None:
    process, expected = running
    assert process.device
    assert process.info["runtime"]
    kept = []
    for counts in ((1,), (3, 1, 2), (8,), (1,) * 8, (2, 5), (3, 1, 2)):
        requests = [rows(count, seed) for seed, count in enumerate(counts)]
        for pad_to in (0, 8):
            result = await process.run(requests, pad_to=pad_to)
            assert result.started <= result.input_ready <= result.infer_done
            kept.append((requests, result.answers))
    for requests, answers in kept:  # an answer stays what it was while the engine goes on
        for request, answer in zip(requests, answers, strict=True):
            assert list(answer) == ["logits"]
            assert answer["logits"].flags.owndata
            np.testing.assert_allclose(answer["logits"], expected(request["input"]), rtol=1e-5, atol=1e-6)


async def test_callers_that_go_away_disturb_nobody(running: tuple[EngineProcess, Sum]) -> None:
    process, expected = running
    chance = random.Random(1)

    async def client(seed: int) -> bool:
        request = rows(1 + seed % 3, seed)
        task = asyncio.ensure_future(process.run([request, rows(2, seed)]))
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        if seed % 3 == 0:
            task.cancel()
        try:
            result = await task
        except asyncio.CancelledError:
            return False
        np.testing.assert_allclose(result.answers[0]["logits"], expected(request["input"]), rtol=1e-5, atol=1e-6)
        return True

    answered = await asyncio.gather(*(client(seed) for seed in range(120)))
    assert answered.count(False) > 10
    assert answered.count(True) >= 80


async def test_signals_for_the_whole_group_do_not_end_it(running: tuple[EngineProcess, Sum]) -> None:
    process, _ = running
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert (await process.run([rows(1)])).answers
    name = Path(f"/proc/{process.pid}/comm").read_text()
    assert name.startswith("convoy ")


async def test_outputs_of_several_types_and_ranks(tmp_path: Path, engine: str) -> None:
    if engine == "fake":
        outputs = "".join(
            f'output {{ name: "{name}" data_type: {kind} dims: {dims} }}\n'
            for name, kind, dims in (("logits", "TYPE_FP32", [3, 10, 10]), ("classes", "TYPE_UINT8", [10, 10]))
        )
        fake_with(tmp_path, f'max_batch_size: 8\ninput {{ name: "input" data_type: TYPE_FP32 dims: [4] }}\n{outputs}')
    else:
        write_segmenter(tmp_path, cell=4)
    spec = spec_of(tmp_path, engine)
    process = await EngineProcess.start(spec)
    every = ["logits", "classes"]
    assert [t.name for t in process.outputs] == every
    requests = [EngineSpec.of(spec).blank(2), EngineSpec.of(spec).blank(1)]
    for wanted, want in (((), every), (["classes"], ["classes"]), ({"classes", "logits"}, every)):
        result = await process.run(requests, wanted)
        assert [list(answer) for answer in result.answers] == [want, want]
        assert [(a["classes"].dtype, a["classes"].shape) for a in result.answers] == [
            (np.uint8, (2, 10, 10)),
            (np.uint8, (1, 10, 10)),
        ]
    await process.close()


async def test_free_dimensions_and_buffers_that_grow(tmp_path: Path, engine: str) -> None:
    if engine == "fake":
        fake_with(tmp_path, FAKE.format("TYPE_FP32", "-1", "total", "1"))
    else:
        write_doubling(tmp_path)
    process = await EngineProcess.start(spec_of(tmp_path, engine))
    for n in (3, 300_000, 5, 0, 300_000, 700_000):  # the large ones are copied in a thread
        requests = [{"input": np.full((count, n), value, np.float32)} for value, count in enumerate((1, 2))]
        answers = (await process.run(requests, pad_to=4)).answers
        for value, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            assert answer["total"].ravel().tolist() == [value * n] * len(request["input"])
            if "doubled" in answer:
                np.testing.assert_array_equal(answer["doubled"], request["input"] * 2)
    await process.close()


async def test_a_batch_is_filled_up(running: tuple[EngineProcess, Sum]) -> None:
    process, expected = running
    requests = [rows(2), rows(1)]
    for pad_to in (0, 3, 4, 8):
        answers = (await process.run(requests, pad_to=pad_to)).answers
        for request, answer in zip(requests, answers, strict=True):
            np.testing.assert_allclose(answer["logits"], expected(request["input"]), rtol=1e-5, atol=1e-6)


async def test_texts(tmp_path: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.skip("OpenVINO takes no texts")
    if engine == "fake":
        fake_with(tmp_path, FAKE.format("TYPE_STRING", "2", "logits", "1"))
    else:
        write_texts(tmp_path)
    process = await EngineProcess.start(spec_of(tmp_path, engine))
    first = np.array([[b"a", b""], ["é".encode(), b"four"]], object)
    second = np.array([[b"x" * 70_000, b"y"]], object)
    for pad_to in (0, 5):
        result = await process.run([{"input": first}, {"input": second}], pad_to=pad_to)
        texts = [answer["logits"].tolist() for answer in result.answers]
        want = [[[b"1"], [b"6"]], [[b"70001"]]] if engine == "fake" else [first.tolist(), second.tolist()]
        assert texts == want
    await process.close()


async def test_without_a_batch_axis(tmp_path: Path, engine: str) -> None:
    if engine == "fake":
        fake_with(tmp_path, FAKE.format("TYPE_FP32", "4", "logits", "1").replace("size: 8", "size: 0"))
    else:
        write_linear(tmp_path, max_batch=0)
    process = await EngineProcess.start(spec_of(tmp_path, engine))
    x = np.array([1, 2, 3, 4], np.float32)
    (answer,) = (await process.run([{"input": x}])).answers
    assert answer["logits"].tolist() == ([10] if engine == "fake" else (x @ LINEAR_WEIGHTS).tolist())
    await process.close()


async def test_a_batch_that_fails(tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    if engine == "fake":
        fake_with(tmp_path, FAKE.format("TYPE_FP32", "4", "logits", "1"), fail_above=100)
    else:
        write_pairs(tmp_path)
    spec = spec_of(tmp_path, engine)
    process = await EngineProcess.start(spec)
    good, bad = {"input": np.ones((2, 4), np.float32)}, {"input": np.full((3, 4), 99, np.float32)}
    for _ in range(2):
        # OpenVINO makes something of three rows all the same.
        with pytest.raises(
            EngineFailed, match=f"^model '{spec.name}' failed to run the batch$|for a batch of 3$"
        ) as caught:
            await process.run([bad])
        assert isinstance(caught.value, RowsDiffer) or f"model {spec.name}" in caplog.text
        assert (await process.run([good])).answers[0]["logits"].shape[0] == 2
    await process.close()


async def test_a_file_that_is_no_model(tmp_path: Path, engine: str) -> None:
    write_sums(tmp_path, engine)
    spec = spec_of(tmp_path, engine)
    spec.engine.file.write_bytes(b"not a model")
    spec = replace(spec, engine=replace(spec.engine, files=()))
    with pytest.raises(InvalidModel, match=rf"(does not take )?{spec.engine.file.name}( is not JSON)?: .") as caught:
        await EngineProcess.start(spec)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


async def test_kill_during_a_batch_and_between(tmp_path: Path, engine: str) -> None:
    if engine == "fake":
        fake_with(tmp_path, FAKE.format("TYPE_FP32", "1", "logits", "1"))
    else:
        write_slow(tmp_path, loops=40)
    spec = spec_of(tmp_path, engine)
    request = {"input": np.ones((1, 1), np.float32)}
    for during in (True, False):
        process = await EngineProcess.start(spec)
        if during:
            os.kill(process.pid, signal.SIGSTOP)  # or it might be done before it is killed
            batch = asyncio.ensure_future(process.run([request]))
            queued = asyncio.ensure_future(process.run([request]))
            while process._places[0].answer is None:
                await asyncio.sleep(0)
            os.kill(process.pid, signal.SIGKILL)
            message = f"^engine of model '{spec.name}' was lost while it ran the batch; try again$"
            for task in (batch, queued):
                with pytest.raises(EngineLost, match=message):
                    await task
        else:
            os.kill(process.pid, signal.SIGKILL)
        assert await process.lost == "killed by SIGKILL"
        with pytest.raises(EngineLost):
            await process.run([request])
        await process.close()


def held() -> set[str]:
    """The memory of engines that this process has open or mapped."""
    gc.collect()
    links = [f"{f.name} {f.readlink()}" for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return {name for name in [*links, *mapped] if "memfd:convoy" in name}


async def test_close_gives_everything_back(tmp_path: Path, engine: str) -> None:
    write_sums(tmp_path, engine)
    before = held()
    process = await EngineProcess.start(spec_of(tmp_path, engine))
    result = await process.run([rows(2)])
    assert len(held() - before) == 6  # two files, each open, mapped, and open once more by its mapping
    assert not process.lost.done()
    await process.close()
    await process.close()
    assert held() <= before
    assert process._socket.fileno() == -1
    assert not Path(f"/proc/{process.pid}").exists()
    assert result.answers[0]["logits"].shape[0] == 2
    with pytest.raises(EngineLost):
        await process.run([rows(2)])


def test_it_dies_with_the_server(tmp_path: Path) -> None:
    """Also in the middle of a batch, when it cannot notice that the socket is closed."""
    fake_with(tmp_path, FAKE.format("TYPE_FP32", "4", "logits", "1").replace("size: 8", "size: 1"))
    (tmp_path / "sum" / "1" / "model.json").write_text('{"seconds": 0.2}')
    code = """
import asyncio, sys
from pathlib import Path
import numpy as np
from convoynet.server.repository import repository
from convoynet.server.engines.process import EngineProcess

async def main():
    (found,) = repository.scan(Path(sys.argv[1]), repository.Defaults(4, 1))
    process = await EngineProcess.start(found.spec)
    print(process.pid, flush=True)
    while True:
        await process.run([{"input": np.zeros((1, 4), np.float32)}])

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        engine_process = os.pidfd_open(int(server.stdout.readline()))
        server.kill()
    ended, _, _ = select.select([engine_process], [], [], 20)
    os.close(engine_process)
    assert ended


def test_shared_memory_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    ours = SharedBuffer.create("convoy test")
    theirs = SharedBuffer(os.dup(ours.descriptor))
    slot = Slot("x", "INT32", (2, 3), 24, 64)
    for buffer in (ours, theirs):
        assert buffer.reach(88)
        assert not buffer.reach(64)
    ours.array(slot)[:] = [[1, 2, 3], [4, 5, 6]]
    assert theirs.array(slot).tolist() == [[1, 2, 3], [4, 5, 6]]
    before = theirs.array(slot)
    assert ours.reach(1 << 20)
    assert theirs.reach(1 << 20)
    ours.array(slot)[0, 0] = 7
    assert before[0, 0] == 7
    ours.close()
    theirs.close()
