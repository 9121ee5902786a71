"""The served side of benchmarks/gpu.py: what comes through gRPC of what the same engine does in a loop."""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import overload
import serving
import uvloop
from convoy_server import convoy
from grpc import aio
from PIL import Image

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.client.client import CHANNEL_OPTIONS, Client
from convoynet.server.client.load import Load, make_load, run_load

Rows = Iterator[tuple[str, dict[str, Any]]]
BATCHES = (1, 8, 32, 128)
# Requests in flight, for each image of a request fewer.
LEVELS = (4, 16, 64, 256)
MAX_BATCH = 128
_REGION = "convoy-bench"
_SHARED = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_PHOTO = (500, 375)


@dataclass(frozen=True)
class Way:
    """How images reach the server: the kind of request, and images in one."""

    kind: str
    images: int


WAYS = {
    "uint8 x1": Way("tensor", 1),
    "uint8 x32": Way("tensor", 32),
    "jpeg x1": Way("jpeg", 1),
    "jpeg x8": Way("jpeg", 8),
    "shm x1": Way("shm", 1),
    "shm x32": Way("shm", 32),
}


@dataclass(frozen=True)
class Peak:
    """The best of some levels of load, over all generators: rates add up, of latencies the worst generator's count."""

    in_flight: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    client_cores: float
    errors: int


def measure(case: Mapping[str, Any], seconds: float, device: str, work: Path) -> Rows:
    """The rows of a served case: each way's best images/s and its share of the bare engine's best in this run."""
    repository = exported(case, device, work)
    model = repository / case["network"]
    loops = serving.bare_loops(model, seconds, os.cpu_count() or 1, BATCHES)
    best = max(loops.values())
    with convoy(repository, "--allow-client-shm", "--log-level", "error") as server:
        for row in case["rows"]:
            try:
                with request(server.url, model.name, WAYS[row]) as load:
                    peak = peak_of(load, seconds)
            except Exception as error:
                yield row, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
                continue
            yield row, {**vars(peak), "bare_per_s": best, "bare": loops, "ratio": peak.images_per_s / best}


def latency(case: Mapping[str, Any], seconds: float, device: str, work: Path) -> Rows:
    """Latencies at shares of the peak: requests come at random times, whether or not earlier ones are answered."""
    repository = exported(case, device, work)
    model = case["network"]
    with (
        convoy(repository, "--log-level", "error") as server,
        request(server.url, model, Way("tensor", 8)) as load,
    ):
        peak = peak_of(load, seconds, processes=1)
        for row in case["rows"]:
            offered = int(row.removesuffix("%")) / 100 * peak.images_per_s / load.images
            outcome = uvloop.run(_opened(load, offered, seconds))
            found = {"offered_images_per_s": offered * load.images, "peak_images_per_s": peak.images_per_s}
            latencies = {"p50_ms": outcome.p50_ms, "p95_ms": outcome.p95_ms, "p99_ms": outcome.p99_ms}
            yield row, {**found, **latencies, "images": load.images, "codes": outcome.codes}


def front_ends(case: Mapping[str, Any], seconds: float, device: str, work: Path) -> Rows:
    """Requests/s of 4 KB by the number of front ends, with an engine that only adds up; the GPU has no part in it."""
    import frontends  # with servers of others, which may not be installed

    del device
    version = work / "tiny" / "tiny" / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.json").write_text("{}")
    (version.parent / "config.pbtxt").write_text(frontends.CONFIG)
    for row in case["rows"]:
        with convoy(version.parents[1], "--frontends", row, "--log-level", "error") as server:
            peak = peak_of(Load(server.url, "tiny", frontends.request()), seconds)
        yield row, {**vars(peak), "requests_per_s": peak.images_per_s, "cores": os.cpu_count()}


def exported(case: Mapping[str, Any], device: str, work: Path) -> Path:
    """A repository with this one model, exported by the command that users have, once for all runs."""
    folder = work / "models" / "-".join((case["network"], case["engine"], case["precision"].replace("+", "-")))
    if not (folder / case["network"] / "config.pbtxt").is_file():
        flags = {"fp32": [], "int8+fp16": ["--int8", "--fp16"]}.get(case["precision"], [f"--{case['precision']}"])
        command = [
            sys.executable,
            "-m",
            "convoynet.server.cli",
            "export",
            "--arch",
            case["network"],
            "--weights",
            "random",
        ]
        command += ["--input", "uint8", "--calibration-samples", "32", "--batch", f"1:{MAX_BATCH}", *flags]
        command += ["--target", "cpu" if device == "cpu" else "gpu", "--format", case["engine"]]
        command += ["--model-repository", str(folder)]
        done = subprocess.run(command, check=False, text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"convoy export: {done.stderr.strip().splitlines()[-1]}")
    return folder


@contextmanager
def request(url: str, model: str, way: Way) -> Iterator[Load]:
    """The request of a way, for as long as the block lasts: a region of shared memory ends with it."""
    with Client(url, timeout=60) as client:
        if way.kind == "jpeg":
            with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
                file.write(_jpeg())
                file.flush()
                yield make_load(client, model, batch=way.images, image=Path(file.name))
            return
        load = make_load(client, model, batch=way.images)
    if way.kind == "tensor":
        yield load
        return
    message = pb.ModelInferRequest.FromString(load.payload)
    (content,) = message.raw_input_contents
    del message.raw_input_contents[:]
    file = _SHARED / f"{_REGION}-{uuid.uuid4().hex}"
    parameters = message.inputs[0].parameters
    parameters["shared_memory_region"].string_param = _REGION
    parameters["shared_memory_byte_size"].int64_param = len(content)
    register = pb.SystemSharedMemoryRegisterRequest(name=_REGION, key=f"/{file.name}", byte_size=len(content))
    with grpc.insecure_channel(url) as channel:
        call = partial(_call, channel)
        file.write_bytes(content)
        try:
            call("SystemSharedMemoryRegister", register)
            yield replace(load, payload=message.SerializeToString())
            call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=_REGION))
        finally:
            file.unlink()


def peak_of(load: Load, seconds: float, processes: int | None = None) -> Peak:
    """The level of load at which most images come back; `processes` generators (default: one for four cores)."""
    count = processes or max(1, (os.cpu_count() or 1) // 4)
    levels = sorted({max(count, level // load.images) for level in LEVELS})
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        return max((_drive(pool, count, load, level, seconds) for level in levels), key=lambda peak: peak.images_per_s)


def _drive(pool: ProcessPoolExecutor, count: int, load: Load, level: int, seconds: float) -> Peak:
    each = level // count
    futures = [pool.submit(run_load, load, each, duration_s=seconds, warmup_s=min(1.0, seconds)) for _ in range(count)]
    found = [future.result() for future in futures]
    return Peak(
        each * count,
        sum(result.images_per_s for result in found),
        *(max(getattr(result, name) for result in found) for name in ("p50_ms", "p95_ms", "p99_ms")),
        sum(result.client_cores for result in found),
        sum(sum(result.errors.values()) for result in found),
    )


async def _opened(load: Load, rate: float, seconds: float) -> overload.Outcome:
    options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    channels = [aio.insecure_channel(load.url, options=options) for _ in range(overload.CHANNELS)]
    calls = [channel.unary_unary(overload.METHOD) for channel in channels]
    arguments = argparse.Namespace(seconds=seconds, slo=float("inf"))
    try:
        return await overload.opened(calls, load.payload, rate, arguments)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


def _call(channel: grpc.Channel, method: str, message: Any) -> None:
    """A call whose answer says nothing."""
    path = f"/inference.GRPCInferenceService/{method}"
    channel.unary_unary(path, request_serializer=type(message).SerializeToString)(message, timeout=60)


def _jpeg() -> bytes:
    """A picture of the size that ImageNet's have, with the edges and the noise that make a decoder work."""
    rng = np.random.default_rng(0)
    width, height = _PHOTO
    coarse = rng.integers(0, 255, (height // 25, width // 25, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(_PHOTO, Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()
