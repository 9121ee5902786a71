"""What grpcio can do at all: a handler on raw bytes that answers the same bytes whatever it is sent."""

import asyncio

import grpc
import uvloop
from grpc import aio
from session import arguments


async def serve(port: int) -> None:
    """Answers with as many bytes as a classifier of a thousand classes would."""
    answer = bytes(4096)

    async def infer(payload: bytes, context: object) -> bytes:
        return answer

    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    server = aio.server(options=options)
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(arguments().port))
