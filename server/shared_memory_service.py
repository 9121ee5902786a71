"""The RPCs that register memory which clients share with the server."""

from __future__ import annotations

from protos.inference import grpc_service_pb2 as pb
from server.codec import SHARED_MEMORY_IS_OFF
from server.errors import InvalidRegion, Unimplemented, UnknownRegion
from server.shared_memory import Regions
from server.types import Call

_CUDA_HANDLE_BYTES = 64


class SharedMemoryService:
    """System shared memory, and what there is to say of CUDA's: no engine here reads device memory of a client's."""

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
        """Checks the request and says that there is no engine for it."""
        self._on()
        if len(request.raw_handle) != _CUDA_HANDLE_BYTES or not request.name or not request.byte_size:
            raise InvalidRegion(
                f"a CUDA shared-memory region needs a name, a size and a handle of {_CUDA_HANDLE_BYTES} bytes, got "
                f"{len(request.raw_handle)} bytes for {request.name[:128]!r} of size {request.byte_size}"
            )
        raise Unimplemented(
            "CUDA shared memory needs an engine that reads device memory, and this server has none; register system "
            "shared memory instead"
        )

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, call: Call
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Does nothing: no such region is registered, which is what is asked for."""
        self._on()
        return pb.CudaSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, call: Call
    ) -> pb.CudaSharedMemoryStatusResponse:
        """None; an error where one is named."""
        self._on()
        if request.name:
            raise UnknownRegion(f"Unable to find cuda shared memory region: '{request.name}'")
        return pb.CudaSharedMemoryStatusResponse()

    def _on(self) -> Regions:
        if self._regions is None:
            raise Unimplemented(SHARED_MEMORY_IS_OFF)
        return self._regions
