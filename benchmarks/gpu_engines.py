"""The bare engines of benchmarks/gpu.py: images/s of a network in a loop, with and without the copies to the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch

from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.progress import Quiet
from convoynet.exporter.running.runtime import Array, Session, without_tf32
from convoynet.exporter.studies.precisions import Network
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.runner import Plan

# One profile for single images, one for what a server gathers, one for whole batches.
PROFILES = (Profile(1, 1, 1), Profile(2, 8, 16), Profile(16, 64, 128))
_CHUNK_SECONDS = 0.05


class Bare(Protocol):
    """An engine under the stopwatch."""

    name: str

    def prepare(self, images: Array) -> Array:
        """What the engine takes for uint8 images."""
        ...

    def host(self, inputs: Array) -> None:
        """One run from the host's memory to the host's memory."""
        ...

    def resident(self, inputs: Array) -> Callable[[], None]:
        """Copies a batch to the device and returns what starts one run there; `wait` waits for all of them."""
        ...

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        ...


class Torch:
    """PyTorch: "eager", "channels-last" or "compile"; "eager exact" without TF32."""

    def __init__(self, network: Network, mode: str, precision: str, device: str) -> None:
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._format = torch.contiguous_format if mode.startswith("eager") else torch.channels_last
        self._exact = mode == "eager exact"
        model = network.module.to(device, self._dtype, memory_format=self._format)
        self._model: Any = torch.compile(model) if mode == "compile" else model
        self._device = device
        self._normalize = network.arch.preprocess.normalize
        self.name = f"PyTorch {torch.__version__} {mode} {precision}"

    def prepare(self, images: Array) -> Array:
        """Normalised float32."""
        return self._normalize(images)

    def host(self, inputs: Array) -> None:
        """The copies are part of it."""
        self._run(self._on_device(inputs)).cpu()

    def resident(self, inputs: Array) -> Callable[[], None]:
        """The network alone."""
        there = self._on_device(inputs)
        return lambda: self._run(there)

    def wait(self) -> None:
        """All streams."""
        if self._device != "cpu":
            torch.cuda.synchronize()

    def _on_device(self, inputs: Array) -> torch.Tensor:
        return torch.from_numpy(inputs).to(self._device, self._dtype).contiguous(memory_format=self._format)

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            if not self._exact:
                return self._model(inputs)
            with without_tf32():
                return self._model(inputs)


class OnnxRuntime:
    """A session, bound to memory of its device for the resident runs."""

    def __init__(self, file: Path, network: Network, target: str, precision: str) -> None:
        arch = network.arch
        threads = torch.get_num_threads()
        optimized = precision != "fp8"
        self._session = Session(
            file, arch.preprocess, task=arch.task, target=target, threads=threads, optimized=optimized
        )
        if target != "cpu" and self._session.device == "cpu":
            raise SystemExit("onnxruntime-gpu is not installed, or finds no CUDA")
        self.name = f"{self._session.name} {precision}"

    def prepare(self, images: Array) -> Array:
        """Pixels or floats."""
        return self._session.prepare(images)

    def host(self, inputs: Array) -> None:
        """As the session runs it."""
        self._session(inputs)

    def resident(self, inputs: Array) -> Callable[[], None]:
        """With bound input and outputs; a run waits for its own end."""
        inner: onnxruntime.InferenceSession = self._session.session
        binding = inner.io_binding()
        value = onnxruntime.OrtValue.ortvalue_from_numpy(inputs, self._session.device, 0)
        binding.bind_ortvalue_input(inner.get_inputs()[0].name, value)
        for output in inner.get_outputs():
            binding.bind_output(output.name, self._session.device)
        return lambda: inner.run_with_iobinding(binding)

    def wait(self) -> None:
        """Nothing is left."""


class TensorRt:
    """A plan, built from the graph or read from an earlier run's file."""

    def __init__(self, file: Path, network: Network, precision: str) -> None:
        plan = file.with_suffix(".plan")
        if not plan.is_file():
            plan.write_bytes(build(file, BuildOptions(profiles=PROFILES), Quiet()).content)
        try:
            self._plan = Plan(plan, network.arch.preprocess, task=network.arch.task)
        except Exception:
            plan.unlink()
            raise
        self.name = f"{self._plan.name} {precision}"

    def prepare(self, images: Array) -> Array:
        """Pixels or floats."""
        return self._plan.prepare(images)

    def host(self, inputs: Array) -> None:
        """With the copies."""
        self._plan(inputs)

    def resident(self, inputs: Array) -> Callable[[], None]:
        """Enqueues one run."""
        return self._plan.bind(inputs)[0]

    def wait(self) -> None:
        """For the plan's stream."""
        self._plan.synchronize()


def graph_file(network: Network, precision: str, work: Path) -> Path:
    """The graph that takes pixels, made once for all runs."""
    file = work / "graphs" / f"{network.name}-{precision}.onnx"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_bytes(network.graph(precision).SerializeToString())
        partial.rename(file)
    return file


def bare(network: Network, engine: str, precision: str, device: str, work: Path) -> Bare:
    """An engine by the name that a row has."""
    library, _, mode = engine.partition(" ")
    if library == "pytorch":
        return Torch(network, mode, precision, device)
    file = graph_file(network, precision, work)
    if library == "onnxruntime":
        return OnnxRuntime(file, network, {"cpu": "cpu", "cuda": "gpu", "tensorrt": "tensorrt"}[mode], precision)
    return TensorRt(file, network, precision)


def measure(case: Mapping[str, Any], seconds: float, device: str, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images/s at each batch size of a case: {"host", "resident", "engine"}, or {"error"} where one does not run."""
    network = Network(case["network"], uint8_input=True)
    engine = bare(network, case["engine"], case["precision"], device, work)
    images = network.pictures.check
    for row in case["rows"]:
        batch = int(row)
        try:
            inputs = engine.prepare(images[np.arange(batch) % len(images)])
            enqueue = engine.resident(inputs)
            resident = batch * rate(enqueue, engine.wait, seconds)
            host = batch * rate(lambda inputs=inputs: engine.host(inputs), engine.wait, seconds)
        except Exception as error:  # too little memory for one size is no reason to leave the others out
            yield row, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            continue
        yield row, {"resident_per_s": resident, "host_per_s": host, "engine": engine.name}


def rate(run: Callable[[], None], wait: Callable[[], None], seconds: float) -> float:
    """Runs a second, over `seconds` after a warm-up; the device is waited for in between, not after each."""
    for _ in range(3):  # kernels are chosen, graphs compiled, memory is taken
        run()
    wait()
    begun = time.perf_counter()
    run()
    wait()
    chunk = max(1, int(_CHUNK_SECONDS / max(time.perf_counter() - begun, 1e-6)))
    count, begun = 0, time.perf_counter()
    while True:
        for _ in range(chunk):
            run()
        wait()
        count += chunk
        passed = time.perf_counter() - begun
        if passed >= seconds:
            return count / passed
