"""A closed-loop load generator, the measuring part of `convoy bench`.

Each of N workers sends a request, waits for its answer and sends the next, so that N requests are in flight.
The request is serialised once: the generator adds neither tensors nor protobuf to what it measures.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.client.client import Client, infer_request, task_of
from convoynet.server.client.connection import Connection, connect
from convoynet.server.client.errors import invalid
from convoynet.server.client.operations import usual_outputs

_SERVICE = "/inference.GRPCInferenceService"
# One HTTP/2 connection is one core's work on either side; clients in the field do not share one either.
_MAX_CONNECTIONS = 8
# A refused request is answered in microseconds: without a pause its worker would measure only refusals.
_SEEN = 0.8
"""Of the requests that were answered, the part that a server's statistics must know of to be about them."""
_PAUSE_AFTER_ERROR_S = 0.01


@dataclass(frozen=True)
class Load:
    """What every worker sends.

    Attributes:
        url: the server's gRPC address.
        model: its name, for the server's statistics.
        payload: one serialised ModelInferRequest.
        images: rows in one request.
        version: the model's version, "" for the newest.
        connection: how the server is reached; None for what the environment says.
    """

    url: str
    model: str
    payload: bytes
    images: int = 1
    version: str = ""
    connection: Connection | None = None


@dataclass(frozen=True)
class ServerShare:
    """What the server's own statistics say: milliseconds for one request, and rows in a batch."""

    request_ms: float
    queue_ms: float
    compute_input_ms: float
    compute_infer_ms: float
    compute_output_ms: float
    mean_batch: float


@dataclass(frozen=True)
class LoadResult:
    """One level of concurrency; latencies are of successful requests that ended within the window.

    Attributes:
        concurrency: requests in flight.
        duration_s: length of the window; warm-up is not in it.
        requests: successful requests.
        requests_per_s: their rate.
        images_per_s: rows per second.
        mean_ms: mean latency; like the percentiles NaN where no request succeeded.
        p50_ms: median latency.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        max_ms: the slowest.
        errors: failed requests by status code.
        client_cores: CPU time that this generator took, in cores; near 1 it is what limits the throughput.
        server: the server's view; None where it tells none.
        no_server: why it tells none, where it says so.
    """

    concurrency: int
    duration_s: float
    requests: int
    requests_per_s: float
    images_per_s: float
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    errors: dict[str, int]
    client_cores: float
    server: ServerShare | None
    no_server: str = ""


@dataclass
class _Window:
    """What the workers record; `start` and `end` are perf_counter seconds, known once the warm-up is over."""

    start: float = float("inf")
    end: float = float("inf")
    stop: bool = False
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def run_load(
    load: Load, concurrency: int, *, duration_s: float = 5.0, warmup_s: float = 1.0, timeout_s: float = 30.0
) -> LoadResult:
    """Keep `concurrency` requests in flight for `duration_s` seconds, after `warmup_s` that do not count.

    Takes at most warmup_s + duration_s + timeout_s, and a little: the last requests are awaited, not
    cancelled, but only what ends within the window is counted.

    Args:
        load: the request and where it goes.
        concurrency: requests in flight, at least 1.
        duration_s: length of the window in seconds.
        warmup_s: load before the window, for connections and caches.
        timeout_s: deadline of each request.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(load, concurrency, duration_s, warmup_s, timeout_s))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _run(load: Load, concurrency: int, duration_s: float, warmup_s: float, timeout_s: float) -> LoadResult:
    reached = load.connection or connect(load.url)
    channels = [
        reached.aio_channel(("grpc.use_local_subchannel_pool", 1)) for _ in range(min(concurrency, _MAX_CONNECTIONS))
    ]
    window = _Window()
    try:
        # No serializer: bytes go out and come in as they are.
        calls = [channel.unary_unary(f"{_SERVICE}/ModelInfer") for channel in channels]
        send = [partial(call, load.payload, timeout=timeout_s, metadata=reached.metadata) for call in calls]
        workers = [asyncio.create_task(_work(send[i % len(send)], window)) for i in range(concurrency)]
        await asyncio.sleep(warmup_s)
        before, _ = await _statistics(channels[0], load, reached, timeout_s)
        cpu = time.process_time()
        window.start = time.perf_counter()
        await asyncio.sleep(duration_s)
        window.end = time.perf_counter()
        cores = (time.process_time() - cpu) / (window.end - window.start)
        after, why = await _statistics(channels[0], load, reached, timeout_s)
        window.stop = True
        await asyncio.gather(*workers)
    finally:
        for channel in channels:
            await channel.close()
    result = _result(load, concurrency, window, cores, _share(before, after, len(window.latencies)))
    return replace(result, no_server=why)


async def _work(send: Callable[[], object], window: _Window) -> None:
    clock = time.perf_counter
    while not window.stop:
        begin = clock()
        code = None
        try:
            await send()  # type: ignore[misc]  # an awaitable call object
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        end = clock()
        if window.start <= end <= window.end:
            if code is None:
                window.latencies.append(end - begin)
            else:
                window.errors[code] += 1
        if code is not None:
            await asyncio.sleep(_PAUSE_AFTER_ERROR_S)


async def _statistics(
    channel: grpc.aio.Channel, load: Load, reached: Connection, timeout_s: float
) -> tuple[pb.ModelStatistics | None, str]:
    """The model's totals; None where the server has none to give, and why where it says so."""
    call = channel.unary_unary(
        f"{_SERVICE}/ModelStatistics",
        request_serializer=pb.ModelStatisticsRequest.SerializeToString,
        response_deserializer=pb.ModelStatisticsResponse.FromString,
    )
    request = pb.ModelStatisticsRequest(name=load.model, version=load.version)
    try:
        answer = await call(request, timeout=timeout_s, metadata=reached.metadata)
    except grpc.aio.AioRpcError as error:
        return None, str(reached.error(error)) if error.code() is grpc.StatusCode.PERMISSION_DENIED else ""
    return (answer.model_stats[-1] if answer.model_stats else None), ""


def _share(before: pb.ModelStatistics | None, after: pb.ModelStatistics | None, answered: int) -> ServerShare | None:
    """The server's view of `answered` requests; None where its statistics are not about them.

    Behind a load balancer the two may come from two servers, each of which answered a part.
    """
    if before is None or after is None:
        return None
    old, new = before.inference_stats, after.inference_stats
    requests = new.success.count - old.success.count
    executions = after.execution_count - before.execution_count
    if executions <= 0 or requests < max(_SEEN * answered, 1) or new.queue.ns < old.queue.ns:
        return None

    def per_request(earlier: pb.StatisticDuration, later: pb.StatisticDuration) -> float:
        return (later.ns - earlier.ns) / requests / 1e6

    return ServerShare(
        request_ms=per_request(old.success, new.success),
        queue_ms=per_request(old.queue, new.queue),
        compute_input_ms=per_request(old.compute_input, new.compute_input),
        compute_infer_ms=per_request(old.compute_infer, new.compute_infer),
        compute_output_ms=per_request(old.compute_output, new.compute_output),
        mean_batch=(after.inference_count - before.inference_count) / executions,
    )


def _result(load: Load, concurrency: int, window: _Window, cores: float, server: ServerShare | None) -> LoadResult:
    duration = window.end - window.start
    milliseconds = np.array(window.latencies or [np.nan]) * 1e3
    p50, p95, p99 = (float(p) for p in np.percentile(milliseconds, (50, 95, 99)))
    rate = len(window.latencies) / duration
    return LoadResult(
        concurrency=concurrency,
        duration_s=duration,
        requests=len(window.latencies),
        requests_per_s=rate,
        images_per_s=rate * load.images,
        mean_ms=float(milliseconds.mean()),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(milliseconds.max()),
        errors=dict(window.errors),
        client_cores=cores,
        server=server,
    )


def make_load(client: Client, model: str, *, batch: int = 1, image: Path | None = None, version: str = "") -> Load:
    """One request for the model: seeded random tensors of its input shapes, or an image file `batch` times.

    It is sent once, so that a load is a request that the model takes.

    Raises:
        ClientError: the server does not know the model or refuses the request, or no input can be made up.
        OSError: `image` cannot be read.
    """
    metadata = client.model_metadata(model, version)
    config = client.model_config(model, version)
    batched = config.max_batch_size > 0
    if batch > 1 and not batched:
        raise invalid(f"model '{model}' takes no batches, leave out --batch")
    inputs: dict[str, datatypes.Array | list[bytes]] = {}
    if image is not None:
        inputs[metadata.inputs[0].name] = [image.read_bytes()] * batch
    else:
        rng = np.random.default_rng(0)
        for tensor in metadata.inputs:
            dims = [batch, *tensor.shape[1:]] if batched else list(tensor.shape)
            if any(dim < 0 for dim in dims) or tensor.datatype == "BYTES":
                raise invalid(
                    f"input '{tensor.name}' ({tensor.datatype} {list(tensor.shape)}) cannot be made up, "
                    "give a file with --input image.jpg"
                )
            values = rng.random(dims) * (255 if tensor.datatype in ("UINT8", "INT8") else 1)
            inputs[tensor.name] = values.astype(datatypes.numpy_dtype(tensor.datatype))
    types = {tensor.name: "BF16" for tensor in metadata.inputs if tensor.datatype == "BF16" and image is None}
    # As `convoy predict` asks: a segmentation network's logits are a hundred times its class map.
    outputs = ["classes"] if task_of(config) == "segmentation" else usual_outputs(config)
    request = infer_request(model, inputs, outputs=outputs, options={"version": version, "datatypes": types})
    client.send(request)
    return Load(client.url, model, request.SerializeToString(), batch, version, client.connection)
