"""What is busy beside engines that are measured."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from typing import Any

import numpy as np
import pytest

from convoynet.server.images.images import ImageInput
from convoynet.server.models import service_load
from convoynet.server.models.service_load import Beside, BesideFailed, Work, _from_json, _to_json
from convoynet.server.supervision import processes

IMAGES = [
    ImageInput("RGB", 256, (224, 224), "bilinear", None, np.ones(3, np.float32), np.zeros(3, np.float32), False),
    ImageInput("BGR", (32, 48), (32, 48), "nearest", None, None, None, True),
    ImageInput("L", 0, (28, 28), "bicubic", (0,), np.ones(1, np.float32), np.zeros(1, np.float32), False),
]


async def test_rows_are_shared_by_the_processes() -> None:
    beside = await Beside.start(2, 150_000)
    pids = [process.pid for process in beside._processes]
    asked: list[tuple[int, int]] = []
    ask = beside._ask

    async def watched(at: int, rows: int) -> None:
        asked.append((at, rows))
        await ask(at, rows)

    beside._ask = watched  # type: ignore[method-assign]
    await asyncio.gather(beside.serve(8), beside.serve(1), beside.serve(1))
    assert sorted(asked) == [(0, 1), (0, 4), (1, 1), (1, 4)]
    await beside.close()
    assert len(set(pids)) == 2
    assert all(process.returncode is not None for process in beside._processes)


async def test_a_process_that_dies_is_told() -> None:
    beside = await Beside.start(1, 10)
    await beside.serve(3)
    beside._processes[0].send_signal(signal.SIGKILL)
    with pytest.raises(BesideFailed):
        await beside.serve(1)
    await beside.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_to_all_of_a_group_is_the_servers_alone(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    beside = await Beside.start(1, 10)
    beside._processes[0].send_signal(number)
    await beside.serve(3)
    await beside.close()
    assert "Traceback" not in capfd.readouterr().err


async def test_what_does_not_start_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the one that dies, nor of the other, which is waited for then."""
    monkeypatch.setattr(service_load, "_to_json", lambda _: "no JSON")
    spawn, started = processes.spawn, []

    def second_stands_still(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(spawn(*arguments, **options))
        if len(started) == 2:
            started[-1].send_signal(signal.SIGSTOP)
        return started[-1]

    monkeypatch.setattr(processes, "spawn", second_stands_still)
    with pytest.raises(BesideFailed, match="died"):
        await Beside.start(2, 10, IMAGES[0])
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.color)
def test_images_are_decoded_as_the_model_takes_them(image: ImageInput) -> None:
    taken = _from_json(_to_json(image))
    work = Work(1, taken)
    work.row()
    row = taken.decode(work._passed_on(), 10**6)
    assert row.shape == image.decode(work._passed_on(), 10**6).shape
    assert row.dtype == (np.uint8 if image.scale is None else np.float32)
    work.close()


@pytest.mark.parametrize("size", [1, 2**15, 600_001])
def test_a_row_comes_out_of_the_socket_as_it_went_in(size: int) -> None:
    work = Work(size, None)
    work._batch[:] = 1
    assert work._passed_on() == bytes(size)
    assert not work._batch.any()
    work.close()
