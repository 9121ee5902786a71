"""Memory of a GPU that clients share: the bookkeeping over a stand-in device, CUDA's own where there is a GPU."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gc
import json
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import app
from convoynet.server.errors import InvalidRegion, InvalidRequest, RegionExists, UnknownRegion
from convoynet.server.gpus import visible_gpus
from convoynet.server.memory.shared_memory import CudaRegion, Region, Regions
from convoynet.server.memory.shared_memory_cuda import CudaMemory
from tests.server import http_calls
from tests.server.conftest import Serving, code_of, fake_model, infer_request

HANDLE = bytes(range(64))


class Memory:
    """`size` bytes of a device that is a bytearray: nothing comes or goes but by fetch and store."""

    def __init__(self, size: int) -> None:
        self.device = bytearray(size)
        self._host = np.zeros(size, np.uint8)
        self.host = memoryview(self._host)

    def fetch(self, offset: int, size: int) -> None:
        self.host[offset : offset + size] = self.device[offset : offset + size]

    def store(self, offset: int, data: bytes | memoryview) -> None:
        self.device[offset : offset + len(data)] = data


class Device:
    """Two devices with memory of 4096 bytes behind one handle.

    Attributes:
        opened: What was opened, as long as somebody holds it.
        memory: The last of it, as the client sees it.
    """

    def __init__(self) -> None:
        self.opened: weakref.WeakSet[Memory] = weakref.WeakSet()
        self.memory = bytearray()

    def open(self, handle: bytes, device: int, size: int) -> Memory:
        if handle != HANDLE or device not in (0, 1) or size > 4096:
            raise InvalidRegion("failed to use the CUDA shared memory region: invalid argument")
        memory = Memory(size)
        self.memory = memory.device
        self.opened.add(memory)
        return memory


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def regions(device: Device) -> Regions:
    return Regions(device.open)


async def test_bytes_go_both_ways(regions: Regions, device: Device) -> None:
    await regions.register_cuda("c", HANDLE, 1, 64)
    device.memory[8:12] = b"abcd"
    assert (regions.read("c", 8, 4)) == b"abcd"
    place = regions.place("c", 16, 8)
    place.write(b"efgh")
    assert (place.size, bytes(device.memory[16:20])) == (8, b"efgh")
    assert regions.cuda_status("c") == regions.cuda_status()
    (region,) = regions.cuda_status()
    assert (region.name, region.device, region.size) == ("c", 1, 64)


async def test_a_request_sees_what_the_client_wrote_last(regions: Regions, device: Device) -> None:
    await regions.register_cuda("c", HANDLE, 0, 64)
    for text in (b"one", b"two"):
        device.memory[:3] = text
        assert (regions.read("c", 0, 3)) == text


async def test_two_requests_do_not_see_each_others_bytes(regions: Regions, device: Device) -> None:
    await regions.register_cuda("c", HANDLE, 0, 64)
    device.memory[:3] = b"one"
    first = regions.read("c", 0, 3)
    device.memory[:3] = b"two"
    assert (regions.read("c", 0, 3), first) == (b"two", b"one")


async def test_regions_of_gpus_are_bounded_together(
    regions: Regions, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convoynet.server.memory.shared_memory.CUDA_BYTES", 100)
    await regions.register_cuda("a", HANDLE, 0, 64)
    with pytest.raises(InvalidRegion, match="it has 64 bytes, 36 more are allowed"):
        await regions.register_cuda("b", HANDLE, 0, 64)
    assert len(device.opened) == 1
    regions.unregister("a", CudaRegion)
    await regions.register_cuda("b", HANDLE, 0, 64)


@pytest.mark.parametrize(("offset", "size"), [(64, 1), (-1, 4), (0, 65), (60, 8), (0, 0), (0, -4), (2**62, 4)])
async def test_views_and_places_stay_within_the_region(regions: Regions, offset: int, size: int) -> None:
    await regions.register_cuda("c", HANDLE, 0, 64)
    for ask in (regions.check, regions.read, regions.place):
        with pytest.raises(InvalidRequest, match="Invalid offset"):
            ask("c", offset, size)


async def test_both_kinds_share_the_names_and_nothing_else(regions: Regions) -> None:
    await regions.register_cuda("c", HANDLE, 0, 64)
    with pytest.raises(RegionExists, match="'c' already in manager"):
        regions.register("c", "/nothing", 0, 1)
    with pytest.raises(RegionExists):
        await regions.register_cuda("c", HANDLE, 0, 64)
    with pytest.raises(UnknownRegion, match="registered as CUDA shared memory, not system shared memory"):
        regions.status("c")
    assert regions.status() == []
    regions.unregister("", Region)
    regions.unregister("c", Region)
    assert len(regions.cuda_status()) == 1
    regions.unregister("c", CudaRegion)
    with pytest.raises(UnknownRegion, match="Unable to find cuda shared memory region: 'c'"):
        regions.cuda_status("c")


@pytest.mark.parametrize(("handle", "number", "size"), [(bytes(64), 0, 64), (HANDLE, 2, 64), (HANDLE, 0, 4097)])
async def test_what_cannot_be_opened_leaves_nothing(
    regions: Regions, device: Device, handle: bytes, number: int, size: int
) -> None:
    with pytest.raises(InvalidRegion, match="failed to use the CUDA shared memory region"):
        await regions.register_cuda("c", handle, number, size)
    assert regions.cuda_status() == []
    with pytest.raises(InvalidRegion, match="region name"):
        await regions.register_cuda("a name", HANDLE, 0, 64)
    assert not device.opened


async def test_a_name_that_was_taken_meanwhile_keeps_its_first_region(regions: Regions, device: Device) -> None:
    opened = device.open

    def open_late(handle: bytes, number: int, size: int) -> Memory:
        regions._regions["c"] = CudaRegion("c", 7, 1, opened(handle, number, size))
        return opened(handle, number, size)

    regions._open_device = open_late
    with pytest.raises(RegionExists):
        await regions.register_cuda("c", HANDLE, 0, 64)
    assert [region.device for region in regions.cuda_status()] == [7]


async def test_memory_in_use_stays_until_its_last_user_is_gone(regions: Regions, device: Device) -> None:
    await regions.register_cuda("c", HANDLE, 0, 64)
    place = regions.place("c", 0, 4)
    regions.unregister("c", CudaRegion)
    await asyncio.sleep(0)  # the loop holds what it resumed this test with until its next turn
    assert len(device.opened) == 1
    place.write(b"late")
    assert device.memory[:4] == b"late"
    del place
    gc.collect()
    assert not device.opened


class Cuda:
    """The calls of cuda.bindings that are made, over a device whose memory is the host's.

    Attributes:
        freed: What was given back.
        cudaMemoryType, cudaMemcpyKind, cudaIpcMemLazyEnablePeerAccess: As in the real ones.
    """

    cudaMemoryType = SimpleNamespace(cudaMemoryTypeDevice=2)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(self) -> None:
        self.client = ctypes.create_string_buffer(4096)
        self.on = 0
        self.freed: list[str] = []
        self._pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}

    class cudaIpcMemHandle_t:
        def __init__(self) -> None:
            self.raw = ctypes.create_string_buffer(64)

        def getPtr(self) -> int:
            return ctypes.addressof(self.raw)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (0,)

    def cudaIpcOpenMemHandle(self, handle: cudaIpcMemHandle_t, flags: int) -> tuple[int, int]:
        return (0, ctypes.addressof(self.client)) if handle.raw.raw == HANDLE else (1, 0)

    def cudaPointerGetAttributes(self, address: int) -> tuple[int, SimpleNamespace]:
        return 0, SimpleNamespace(type=2, device=self.on)

    def cuMemGetAddressRange(self, address: int) -> tuple[int, int, int]:
        return 0, ctypes.addressof(self.client), 4096

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        pinned = ctypes.create_string_buffer(size)
        self._pinned[ctypes.addressof(pinned)] = pinned
        return 0, ctypes.addressof(pinned)

    def cudaMemcpy(self, to: int, source: int, size: int, kind: int) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self._pinned[address]
        self.freed.append("pinned")
        return (0,)

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[int]:
        self.freed.append("mapping")
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"invalid argument"


def test_bytes_go_through_page_locked_memory_that_is_given_back_with_its_last_view() -> None:
    cuda = Cuda()
    memory = CudaMemory(cuda, cuda, HANDLE, 0, 64)
    cuda.client[8:12] = b"abcd"
    memory.fetch(8, 4)
    tensor = np.frombuffer(memory.host[8:12], np.uint8)
    memory.store(16, b"efgh")
    assert (tensor.tobytes(), cuda.client[16:20]) == (b"abcd", b"efgh")
    del memory
    gc.collect()
    assert cuda.freed == []
    del tensor
    gc.collect()
    assert cuda.freed == ["pinned", "mapping"]


def test_what_the_client_states_is_held_against_what_is_there() -> None:
    cuda = Cuda()
    with pytest.raises(InvalidRegion, match="has less than 4097 bytes"):
        CudaMemory(cuda, cuda, HANDLE, 0, 4097)
    assert cuda.freed == ["mapping"]
    with pytest.raises(InvalidRegion, match="not on device 1"):
        CudaMemory(cuda, cuda, HANDLE, 1, 64)
    with pytest.raises(InvalidRegion, match="failed to use the CUDA shared memory region: invalid argument"):
        CudaMemory(cuda, cuda, bytes(64), 0, 64)


def test_every_call_is_one_of_the_bindings() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is part of the gpu extra")
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in vars(Cuda):
        if name.startswith("cu"):
            assert hasattr(driver if name == "cuMemGetAddressRange" else runtime, name), name
    assert runtime.cudaMemoryType.cudaMemoryTypeDevice == Cuda.cudaMemoryType.cudaMemoryTypeDevice
    assert not runtime.cudaError_t.cudaSuccess
    assert not driver.CUresult.CUDA_SUCCESS
    handle = runtime.cudaIpcMemHandle_t()
    ctypes.memmove(handle.getPtr(), HANDLE, 64)
    assert ctypes.string_at(handle.getPtr(), 64) == HANDLE


def _register(size: int = 4096) -> pb.CudaSharedMemoryRegisterRequest:
    return pb.CudaSharedMemoryRegisterRequest(name="c", raw_handle=HANDLE, device_id=0, byte_size=size)


def _request() -> pb.ModelInferRequest:
    """Two rows from the region's byte 64; the answer goes to its byte 2048."""
    message = infer_request(0, 0)
    del message.raw_input_contents[:]
    output = message.outputs.add(name="y")
    for tensor, at, size in ((message.inputs[0], 64, 32), (output, 2048, 8)):
        tensor.parameters["shared_memory_region"].string_param = "c"
        tensor.parameters["shared_memory_offset"].int64_param = at
        tensor.parameters["shared_memory_byte_size"].int64_param = size
    return message


async def test_inference_through_memory_of_a_gpu(
    serving: Serving, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "Regions", lambda: Regions(device.open))
    fake_model(tmp_path)
    async with serving(allow_client_shm=True) as running:
        await running.stub.CudaSharedMemoryRegister(_register())
        device.memory[64:96] = np.arange(8, dtype=np.float32).tobytes()
        answer = await running.stub.ModelInfer(_request())
        assert (list(answer.outputs[0].shape), list(answer.raw_output_contents)) == ([2, 1], [b""])
        assert np.frombuffer(device.memory, np.float32, 2, 2048).tolist() == [6, 22]
        status = (await running.stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest())).regions
        assert {n: (r.device_id, r.byte_size) for n, r in status.items()} == {"c": (0, 4096)}
        await running.stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(name="c"))
        assert (await code_of(running.stub.ModelInfer(_request())))[0] is grpc.StatusCode.NOT_FOUND
        code, text = await code_of(running.stub.CudaSharedMemoryRegister(_register(8192)))
        assert (code, "invalid argument" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_memory_that_is_unregistered_during_a_request_gets_its_answer(
    serving: Serving, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "Regions", lambda: Regions(device.open))
    fake_model(tmp_path)
    async with serving(allow_client_shm=True) as running:
        await running.stub.CudaSharedMemoryRegister(_register())
        device.memory[64:96] = np.ones(8, np.float32).tobytes()
        with running.held():
            call = running.stub.ModelInfer(_request())
            await running.until(lambda model: model.inflight == 1)
            await running.stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())
        await call
        assert np.frombuffer(device.memory, np.float32, 2, 2048).tolist() == [4, 4]


async def test_the_same_over_http(
    serving: Serving, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "Regions", lambda: Regions(device.open))
    fake_model(tmp_path)
    async with serving(allow_client_shm=True) as running:
        port, path = running.app.http_port, "/v2/cudasharedmemory"
        handle = {"raw_handle": {"b64": base64.b64encode(HANDLE).decode()}, "device_id": 1, "byte_size": 4096}
        assert (await http_calls.call(port, "POST", f"{path}/region/c/register", handle)).status == 200
        (region,) = (await http_calls.call(port, "GET", f"{path}/status")).json
        assert (region["name"], region["device_id"], int(region["byte_size"])) == ("c", 1, 4096)
        device.memory[:32] = np.arange(8, dtype=np.float32).tobytes()
        place = {"shared_memory_region": "c", "shared_memory_byte_size": 32}
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "parameters": place}]}
        answer = await http_calls.call(port, "POST", "/v2/models/sum/infer", body)
        assert answer.json["outputs"][0]["data"] == [6, 22]
        assert (await http_calls.call(port, "POST", f"{path}/region/c/unregister")).status == 200
        assert (await http_calls.call(port, "POST", "/v2/models/sum/infer", body)).status == 404


TRITONCLIENT = textwrap.dedent(
    """
    import json, sys
    import numpy as np
    import tritonclient.grpc as grpc
    import tritonclient.utils.cuda_shared_memory as memory

    client = grpc.InferenceServerClient(sys.argv[1])
    region = memory.create_shared_memory_region("c", 4096, 0)
    memory.set_shared_memory_region(region, [np.arange(8, dtype=np.float32).reshape(2, 4)])
    client.register_cuda_shared_memory("c", memory.get_raw_handle(region), 0, 4096)
    given = grpc.InferInput("x", [2, 4], "FP32")
    given.set_shared_memory("c", 32)
    asked = grpc.InferRequestedOutput("y")
    asked.set_shared_memory("c", 8, 2048)
    client.infer("sum", [given], outputs=[asked])
    answer = memory.get_contents_as_numpy(region, np.float32, [2, 1], 2048).ravel().tolist()
    client.unregister_cuda_shared_memory("c")
    print(json.dumps(answer))
    """
)
BINDINGS = textwrap.dedent(
    """
    import ctypes, json, sys
    import cuda.bindings.runtime as cuda
    import grpc
    import numpy as np
    from convoynet.protos.inference import grpc_service_pb2 as pb, grpc_service_pb2_grpc as rpc

    def call(function, *arguments):
        status, *found = function(*arguments)
        assert not status, status
        return found[0] if found else None

    stub = rpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
    # More than one block of 2 MiB, so that the allocation ends where it says.
    size = 4 << 20
    memory, values, answer = call(cuda.cudaMalloc, size), np.arange(8, dtype=np.float32), np.zeros(2, np.float32)
    call(cuda.cudaMemcpy, memory, values.ctypes.data, 32, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
    call(cuda.cudaDeviceSynchronize)
    handle = ctypes.string_at(call(cuda.cudaIpcGetMemHandle, memory).getPtr(), 64)
    try:
        stub.CudaSharedMemoryRegister(pb.CudaSharedMemoryRegisterRequest(name="b", raw_handle=handle, byte_size=2**40))
    except grpc.RpcError as error:
        assert "has less than" in error.details(), error.details()
    else:
        raise AssertionError("more bytes than there are")
    stub.CudaSharedMemoryRegister(pb.CudaSharedMemoryRegisterRequest(name="c", raw_handle=handle, byte_size=size))
    message = pb.ModelInferRequest(model_name="sum")
    message.inputs.add(name="x", datatype="FP32", shape=[2, 4])
    message.outputs.add(name="y")
    for tensor, at, length in ((message.inputs[0], 0, 32), (message.outputs[0], 2048, 8)):
        tensor.parameters["shared_memory_region"].string_param = "c"
        tensor.parameters["shared_memory_offset"].int64_param = at
        tensor.parameters["shared_memory_byte_size"].int64_param = length
    stub.ModelInfer(message)
    call(cuda.cudaMemcpy, answer.ctypes.data, int(memory) + 2048, 8, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
    stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(name="c"))
    print(json.dumps(answer.tolist()))
    """
)


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize(
    ("needs", "script"),
    [("cuda.bindings.runtime", BINDINGS), ("tritonclient.utils.cuda_shared_memory", TRITONCLIENT)],
    ids=["bindings", "tritonclient"],
)
async def test_a_client_shares_memory_of_a_real_gpu(serving: Serving, tmp_path: Path, needs: str, script: str) -> None:
    tried = subprocess.run([sys.executable, "-c", f"import {needs}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{needs} cannot be imported: {tried.stderr.splitlines()[-1]}")
    fake_model(tmp_path)
    async with serving(allow_client_shm=True) as running:
        assert "cuda_shared_memory" in (await running.stub.ServerMetadata(pb.ServerMetadataRequest())).extensions
        address = f"127.0.0.1:{running.app.grpc_port}"
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, address, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
        )
        said, _ = await client.communicate()
    assert client.returncode == 0
    assert json.loads(said) == [6, 22]
