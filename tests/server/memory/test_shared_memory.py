"""Memory that clients share with the server: what may be registered, tensors in it, and when it goes away."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRegion, InvalidRequest, RegionExists, UnknownRegion
from convoynet.server.gpus import visible_gpus
from convoynet.server.memory.shared_memory import Regions
from convoynet.server.protocol import answers
from tests.server.conftest import Serving, code_of, fake_model, infer_request

FOLDER = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="POSIX shared memory is a folder on Linux alone")


@pytest.fixture
def file() -> Iterator[Path]:
    """An object of 4096 bytes."""
    path = FOLDER / f"convoy-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(4096))
    yield path
    path.unlink()


def _open(path: Path) -> bool:
    """Whether this process has the object open, or mapped."""
    links = (link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return any(path.name in link.name for link in links) or path.name in Path("/proc/self/maps").read_text()


def test_a_region_is_seen_by_both_sides(file: Path) -> None:
    regions = Regions()
    regions.register("r", f"/{file.name}", 16, 64)
    regions.place("r", 8, 4).write(b"abcd")
    assert file.read_bytes()[24:28] == b"abcd"
    assert regions.read("r", 6, 6) == b"\0\0abcd"
    (status,) = regions.status("r")
    assert (status.name, status.key, status.offset, status.size) == ("r", f"/{file.name}", 16, 64)


def test_what_was_read_does_not_change_with_what_the_client_writes_on(file: Path) -> None:
    regions = Regions()
    regions.register("r", file.name, 0, 64)
    tensor = np.frombuffer(regions.read("r", 0, 64), np.uint8)
    file.write_bytes(b"\1" * 4096)
    assert tensor.sum() == 0


def test_an_object_in_use_is_closed_with_its_last_place(file: Path) -> None:
    regions = Regions()
    regions.register("r", file.name, 0, 64)
    place = regions.place("r", 0, 64)
    regions.unregister("r")
    assert _open(file)
    place.write(b"late")
    assert file.read_bytes()[:4] == b"late"
    with pytest.raises(UnknownRegion, match="Unable to find shared memory region: 'r'"):
        regions.read("r", 0, 4)
    del place
    assert not _open(file)


def test_what_cannot_be_registered_is_not_kept_open(file: Path) -> None:
    with pytest.raises(InvalidRegion):
        Regions().register("r", file.name, 0, 5000)
    assert not _open(file)


def test_regions_leave_descriptors_for_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (40, 40))
    regions = Regions()
    for number in range(10):
        regions.register(f"r{number}", file.name, 0, 64)
    with pytest.raises(InvalidRegion, match="10 regions at once"):
        regions.register("r", file.name, 0, 64)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/../etc/passwd",
        "/..",
        "/.",
        "a/b",
        "/a\0b",
        "/" + "a" * 256,
        "//x",
        "/triton_python_backend_shm_region_1",
    ],
)
def test_names_of_objects_are_checked(key: str) -> None:
    with pytest.raises(InvalidRegion, match="Unable to open shared memory region"):
        Regions().register("r", key, 0, 1)


def test_links_and_folders_are_no_objects(file: Path) -> None:
    link = FOLDER / f"{file.name}-link"
    link.symlink_to(file)
    folder = FOLDER / f"{file.name}-folder"
    folder.mkdir()
    pipe = FOLDER / f"{file.name}-pipe"
    os.mkfifo(pipe)
    try:
        for path in (link, folder, pipe):
            with pytest.raises(InvalidRegion):
                Regions().register("r", path.name, 0, 1)
    finally:
        link.unlink()
        folder.rmdir()
        pipe.unlink()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 4097), (4096, 1), (0, 0), (-1, 4), (2**63, 4), (2**64 - 8, 16), (0, 2**64 - 1), (1, 4096)]
)
def test_sizes_are_checked_against_the_object(file: Path, offset: int, size: int) -> None:
    with pytest.raises(InvalidRegion, match="Invalid shared memory region"):
        Regions().register("r", file.name, offset, size)


def test_names_of_regions_are_checked_and_taken_once(file: Path) -> None:
    regions = Regions()
    regions.register("r", file.name, 0, 64)
    with pytest.raises(RegionExists, match="'r' already in manager"):
        regions.register("r", file.name, 0, 64)
    for name in ("", "a b", "x" * 129):
        with pytest.raises(InvalidRegion, match="region name"):
            regions.register(name, file.name, 0, 64)


@pytest.mark.parametrize(("offset", "size"), [(64, 1), (-1, 4), (0, 65), (60, 8), (0, 0), (0, -4), (2**62, 4)])
def test_views_stay_within_the_region(file: Path, offset: int, size: int) -> None:
    regions = Regions()
    regions.register("r", file.name, 0, 64)
    for ask in (regions.check, regions.read, regions.place):
        with pytest.raises(InvalidRequest, match="Invalid offset"):
            ask("r", offset, size)


def test_an_object_that_was_made_smaller_is_its_owners_error(file: Path) -> None:
    regions = Regions()
    regions.register("r", file.name, 0, 4096)
    place = regions.place("r", 2048, 64)
    os.truncate(file, 100)
    for ask in (regions.check, regions.read, regions.place):
        with pytest.raises(InvalidRequest, match="Invalid offset"):
            ask("r", 0, 4096)
    with pytest.raises(InvalidRegion, match="Unable to write to shared memory region 'r': it was made smaller"):
        place.write(b"late")
    assert file.stat().st_size == 100, "a late answer makes nothing larger again"
    assert regions.read("r", 0, 100) == bytes(100)
    os.truncate(file, 8192)
    assert regions.read("r", 0, 4096) == bytes(4096)


def test_an_object_that_is_cut_between_the_check_and_the_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = Regions()
    regions.register("r", file.name, 0, 4096)
    real = os.pread

    def cut_first(descriptor: int, size: int, offset: int) -> bytes:
        os.truncate(file, 10)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", cut_first)
    with pytest.raises(InvalidRequest, match="Invalid offset"):
        regions.read("r", 0, 4096)


def test_a_full_file_system_is_the_clients_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    regions = Regions()
    regions.register("r", file.name, 0, 4096)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InvalidRegion, match="Unable to write to shared memory region 'r': No space left on device"):
        regions.place("r", 0, 64).write(b"x")


def test_reads_and_writes_go_on_where_the_system_stops_early(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 7), offset))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    regions = Regions()
    regions.register("r", file.name, 0, 64)
    regions.place("r", 1, 50).write(bytes(range(50)))
    assert regions.read("r", 1, 50) == bytes(range(50))


def _register(file: Path, size: int = 4096) -> pb.SystemSharedMemoryRegisterRequest:
    return pb.SystemSharedMemoryRegisterRequest(name="r", key=f"/{file.name}", byte_size=size)


def _request(offset: int = 0) -> pb.ModelInferRequest:
    """Two rows from the region; the answer goes to its byte 2048."""
    message = infer_request(0, 0)
    del message.raw_input_contents[:]
    output = message.outputs.add(name="y")
    for tensor, at, size in ((message.inputs[0], offset, 32), (output, 2048, 64)):
        tensor.parameters["shared_memory_region"].string_param = "r"
        tensor.parameters["shared_memory_offset"].int64_param = at
        tensor.parameters["shared_memory_byte_size"].int64_param = size
    return message


async def test_inference_through_shared_memory(serving: Serving, tmp_path: Path, file: Path) -> None:
    fake_model(tmp_path)
    file.write_bytes(np.arange(8, dtype=np.float32).tobytes().rjust(132, b"\0").ljust(4096, b"\0"))
    async with serving(allow_client_shm=True) as running:
        await running.stub.SystemSharedMemoryRegister(_register(file))
        answer = await running.stub.ModelInfer(_request(offset=100))
        assert (list(answer.outputs[0].shape), list(answer.raw_output_contents)) == ([2, 1], [b""])
        assert np.frombuffer(file.read_bytes(), np.float32, 2, 2048).tolist() == [6, 22]
        regions = (await running.stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())).regions
        assert {n: (r.key, r.byte_size) for n, r in regions.items()} == {"r": (f"/{file.name}", 4096)}
        code, text = await code_of(running.stub.ModelInfer(_request(offset=4080)))
        assert (code, "Invalid offset + byte size" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        await running.stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
        assert (await code_of(running.stub.ModelInfer(_request())))[0] is grpc.StatusCode.NOT_FOUND


async def test_a_region_that_is_unregistered_during_a_request_lives_until_its_end(
    serving: Serving, tmp_path: Path, file: Path
) -> None:
    fake_model(tmp_path)
    async with serving(allow_client_shm=True) as running:
        await running.stub.SystemSharedMemoryRegister(_register(file))
        with running.held():
            call = running.stub.ModelInfer(_request())
            await running.until(lambda model: model.inflight == 1)
            await running.stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="r"))
            assert _open(file)
        assert (await call).outputs[0].name == "y"


async def test_sizes_are_bounded_before_memory_is_taken(serving: Serving, tmp_path: Path, file: Path) -> None:
    """An object of a terabyte costs its owner nothing."""
    config = 'max_batch_size: 8 parameters { key: "max_queue_bytes" value { string_value: "1000000" } }'
    fake_model(tmp_path, config=config)
    os.truncate(file, 2**40)
    async with serving(allow_client_shm=True) as running:
        await running.stub.SystemSharedMemoryRegister(_register(file, 2**40))
        message = _request()
        message.inputs[0].shape[:] = [2**35, 4]
        message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 2**39
        code, text = await code_of(running.stub.ModelInfer(message))
        assert (code, "at most 1000000 may wait" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        message.inputs[0].shape[:] = [2**34, 4]
        code, text = await code_of(running.stub.ModelInfer(message))
        assert (code, "Expected 274877906944, got 549755813888" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_an_object_that_is_cut_during_a_request_ends_nothing_else(
    serving: Serving, tmp_path: Path, file: Path
) -> None:
    fake_model(tmp_path, seconds=0.3)
    async with serving(allow_client_shm=True) as running:
        await running.stub.SystemSharedMemoryRegister(_register(file))
        call = running.stub.ModelInfer(_request())
        while not any(model.inflight for model in running.app.core):
            await running.stub.ServerLive(pb.ServerLiveRequest())
        os.truncate(file, 10)
        code, text = await code_of(call)
        assert (code, "it was made smaller" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert (await running.stub.ModelInfer(infer_request(1, 1))).outputs[0].name == "y"


async def test_an_output_may_go_where_its_input_is(serving: Serving, tmp_path: Path, file: Path) -> None:
    fake_model(tmp_path)
    file.write_bytes(np.arange(8, dtype=np.float32).tobytes().ljust(4096, b"\0"))
    async with serving(allow_client_shm=True) as running:
        await running.stub.SystemSharedMemoryRegister(_register(file))
        message = _request()
        message.outputs[0].parameters["shared_memory_offset"].int64_param = 0
        await running.stub.ModelInfer(message)
        assert np.frombuffer(file.read_bytes(), np.float32, 4).tolist() == [6, 22, 2, 3]


def test_two_outputs_in_one_place_are_refused(file: Path) -> None:
    regions = Regions()
    regions.register("a", file.name, 0, 4096)
    regions.register("b", file.name, 1000, 3096)
    written: list[tuple[str, object, int, int]] = []
    answers._put(b"12345678", "y", regions.place("a", 1000, 3096), written)
    answers._put(b"12345678", "after", regions.place("b", 8, 100), written)
    with pytest.raises(InvalidRegion, match="output 'z' would overwrite output 'y'"):
        answers._put(b"abc", "z", regions.place("b", 7, 100), written)
    assert file.read_bytes()[1000:1016] == b"1234567812345678"


async def test_client_shared_memory_is_off_by_default(serving: Serving, tmp_path: Path, file: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        stub = running.stub
        for call in (
            stub.SystemSharedMemoryRegister(_register(file)),
            stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest()),
            stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest()),
            stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest()),
            stub.ModelInfer(_request()),
        ):
            code, text = await code_of(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert "--allow-client-shm" in text
        assert "system_shared_memory" not in (await stub.ServerMetadata(pb.ServerMetadataRequest())).extensions


@pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU, and nothing is missing")
async def test_cuda_regions_say_what_is_missing(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(allow_client_shm=True) as running:
        stub = running.stub
        handle = pb.CudaSharedMemoryRegisterRequest(name="c", raw_handle=bytes(64), byte_size=4)
        code, text = await code_of(stub.CudaSharedMemoryRegister(handle))
        assert (code, "register system shared memory" in text) == (grpc.StatusCode.UNIMPLEMENTED, True)
        assert re.search("needs (an NVIDIA GPU and its driver|the package cuda-bindings)", text)
        assert "cuda_shared_memory" not in (await stub.ServerMetadata(pb.ServerMetadataRequest())).extensions
        handle.raw_handle = b"1"
        assert (await code_of(stub.CudaSharedMemoryRegister(handle)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        await stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())
        assert not (await stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest())).regions
        unknown = stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(name="c"))
        assert (await code_of(unknown))[0] is grpc.StatusCode.NOT_FOUND
