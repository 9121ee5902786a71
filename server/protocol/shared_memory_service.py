"""The RPCs that register memory which clients share with the server."""

from __future__ import annotations

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRegion, Unimplemented
from convoynet.server.memory.shared_memory import CudaRegion, Regions
from convoynet.server.protocol.codec import SHARED_MEMORY_IS_OFF
from convoynet.server.types import Call

_CUDA_HANDLE_BYTES = 64


class SharedMemoryService:
    """System and CUDA shared memory."""

    def __init__(self, regions: Regions | None) -> None:
        self._regions = regions

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, call: Call
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Makes a region known by a name."""
        self._on().register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, call: Call
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forgets a region, or all where no name is given; requests that use it are still answered."""
        self._on().unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, call: Call
    ) -> pb.SystemSharedMemoryStatusResponse:
        """The regions, or the one that is named."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._on().status(request.name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.size
        return response

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, call: Call
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Makes a region on a GPU known by a name."""
        regions = self._on()
        if len(request.raw_handle) != _CUDA_HANDLE_BYTES or not request.name or not request.byte_size:
            raise InvalidRegion(
                f"a CUDA shared-memory region needs a name, a size and a handle of {_CUDA_HANDLE_BYTES} bytes, got "
                f"{len(request.raw_handle)} bytes for {request.name[:128]!r} of size {request.byte_size}"
            )
        await regions.register_cuda(request.name, request.raw_handle, request.device_id, request.byte_size)
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, call: Call
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Forgets a region, or all of CUDA's where no name is given; requests that use it are still answered."""
        self._on().unregister(request.name, CudaRegion)
        return pb.CudaSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, call: Call
    ) -> pb.CudaSharedMemoryStatusResponse:
        """The regions, or the one that is named."""
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._on().cuda_status(request.name):
            status = response.regions[region.name]
            status.name, status.device_id, status.byte_size = region.name, region.device, region.size
        return response

    def _on(self) -> Regions:
        if self._regions is None:
            raise Unimplemented(SHARED_MEMORY_IS_OFF)
        return self._regions
