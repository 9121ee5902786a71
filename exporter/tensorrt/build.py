"""ONNX to serialized TensorRT engines ("plans"): for one graph, the batches that it is to take, and how hard to try."""

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from convoynet.exporter import atomic_file
from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.progress import Progress
from convoynet.exporter.tensorrt import layers, words
from convoynet.exporter.tensorrt.gpu import Gpu, find_gpu
from convoynet.exporter.tensorrt.layers import Layer
from convoynet.exporter.tensorrt.library import Library, library_title, recorder, require
from convoynet.exporter.tensorrt.monitor import monitor
from convoynet.exporter.tensorrt.network import Parsed, parse

ANY_GPU = "any"
# The first with tensor cores for FP8.
_FP8_CAPABILITY = (8, 9)
_PERCENT = 100


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, and what it was built with.

    Attributes:
        content: the serialized engine.
        library: "tensorrt" or "tensorrt_rtx".
        version: of the library.
        compute_capability: of the GPU that it was built for, "9.0"; "any" where it is compiled on the GPU that loads
            it; "" where the builder's GPU could not be asked.
        driver_version: of the machine that built it; "" without a GPU.
        seconds: that reading and building took.
        layers: of the engine as it runs, or, where none can be asked for want of a GPU, of the parsed network.
        inspected: whether `layers` are the engine's own.
        notes: what the library did not do of what was asked, each in one line.
    """

    content: bytes
    library: str
    version: str
    compute_capability: str
    driver_version: str
    seconds: float
    layers: tuple[Layer, ...]
    inspected: bool = False
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The library for people."""
        return library_title(self.library, self.version)

    @property
    def is_portable(self) -> bool:
        """Whether the GPU that loads it compiles it."""
        return self.compute_capability == ANY_GPU

    @property
    def runs_on(self) -> str:
        """What kind of engine this is and where it runs, in one line."""
        if self.is_portable:
            return (
                f"a portable engine, which {self.title} compiles on the GPU that loads it; by its "
                "documentation RTX GPUs of compute capability 8.0, 8.6, 8.9, 12.0 and later"
            )
        gpu = f"compute capability {self.compute_capability}" if self.compute_capability else "the kind that built it"
        return f"an engine for GPUs of {gpu} and {self.title}"


def build(model: bytes | Path, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Build a serialized engine. Ctrl-C ends the build at its next step.

    Args:
        model: an ONNX model, or the file that holds it. Its types and its Q/DQ pairs decide the precisions.
        options: the batches, and how to build.
        progress: shows how far it is.

    Raises:
        Missing: there is no TensorRT that builds here, or it lacks what `options` ask for.
        BadInput: no ONNX model; a graph for CPUs, which TensorRT would misread; batches that are not the graph's; or
            what the parser or the builder refuses: one line with the node and the way out.
    """
    began = time.perf_counter()
    library, gpu = require(), find_gpu()
    notes = _notes(library, gpu, options)
    with progress.step(f"read the graph with {library.title}"):
        parsed = parse(library, model)
    found = layers.of_network(parsed.network)
    _require_fp8(library, gpu, found)
    config = parsed.builder.create_builder_config()
    for profile in options.profiles:
        config.add_optimization_profile(_shapes(parsed, profile))
    _configure(library, config, options)
    with _timing_cache(library, config, options.timing_cache, notes):
        content = _serialize(parsed, config, options, progress)
    inspected = _inspect(library, content) if gpu else None
    return BuiltEngine(
        content=content,
        library=library.name,
        version=library.version,
        compute_capability=ANY_GPU if library.compiles_at_load else gpu.compute_capability if gpu else "",
        driver_version=gpu.driver_version if gpu else "",
        seconds=round(time.perf_counter() - began, 2),
        layers=found if inspected is None else inspected,
        inspected=inspected is not None,
        notes=tuple(notes),
    )


def _notes(library: Library, gpu: Gpu | None, options: BuildOptions) -> list[str]:
    """Say what the library does not do of what was asked, where the engine serves without it.

    Raises:
        Missing: the engine would not be what was asked for.
    """
    if not library.compiles_at_load:
        return []
    if options.version_compatible:
        raise Missing(
            "TensorRT-RTX has no version-compatible engines: leave --version-compatible out and build again after an "
            "update, or build with tensorrt"
        )
    if options.refit != "no" and gpu is None:
        raise Missing(
            f"TensorRT-RTX builds plans for --{options.refit} on a GPU alone, and there is none here: build there, or "
            f"leave --{options.refit} out"
        )
    notes = []
    if options.hardware_compatible:
        notes.append("TensorRT-RTX needs no --hardware-compatible: its engines are compiled on the GPU that loads them")
    if options.timing_cache is not None:
        notes.append(f"TensorRT-RTX has no timing cache: {options.timing_cache} is left as it is")
    return notes


def _require_fp8(library: Library, gpu: Gpu | None, found: tuple[Layer, ...]) -> None:
    first = next((layer for layer in found if layer.precision == "fp8"), None)
    if library.compiles_at_load or gpu is None or first is None:
        return
    if tuple(map(int, gpu.compute_capability.split("."))) < _FP8_CAPABILITY:
        raise BadInput(
            f"{first.type.lower()} {first.name!r} is in FP8, which needs compute capability 8.9 (Ada) or later, and "
            f"this GPU has {gpu.compute_capability}: export --int8 instead"
        )


def _shapes(parsed: Parsed, profile: Profile) -> Any:
    """The optimization profile of a batch: the first axis of every input is dynamic, or has one size for all."""
    shapes = parsed.builder.create_optimization_profile()
    sizes = (profile.smallest, profile.usual, profile.largest)
    for tensor in parsed.inputs:
        if not len(tensor.shape):
            raise BadInput(f"input {tensor.name!r} has no axes, and so no batch: an engine takes batches here")
        axis, *rest = tensor.shape
        if -1 in rest:
            raise BadInput(
                f"input {tensor.name!r} has the shape {list(tensor.shape)}: besides the batch, an engine takes one "
                "size; export it with --input-size"
            )
        if axis != -1 and set(sizes) != {axis}:
            raise BadInput(
                f"input {tensor.name!r} has the shape {list(tensor.shape)}, so that batch {profile} is none of its: "
                f"give --batch {axis}, or export it with a dynamic batch"
            )
        if axis == -1:
            shapes.set_shape(tensor.name, *((size, *rest) for size in sizes))
    return shapes


def _configure(library: Library, config: Any, options: BuildOptions) -> None:
    module = library.module
    # The inspector then knows the precision of each layer.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.hardware_compatible and not library.compiles_at_load:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    flags = module.BuilderFlag
    wanted = {
        flags.VERSION_COMPATIBLE: options.version_compatible,
        flags.SPARSE_WEIGHTS: options.sparse_weights,
        flags.REFIT: options.refit != "no",
        flags.STRIP_PLAN: options.refit == "strip",
    }
    for flag, on in wanted.items():
        if on:
            config.set_flag(flag)


@contextlib.contextmanager
def _timing_cache(library: Library, config: Any, file: Path | None, notes: list[str]) -> Iterator[None]:
    """Give the builder what the file remembers, and keep what it learns in the block."""
    if file is None or library.compiles_at_load:
        yield
        return
    try:
        kept = file.read_bytes()
    except FileNotFoundError:
        kept = b""
    except OSError as error:
        raise BadInput(f"timing cache {file}: {error.strerror}; name a file that can be read and written") from error
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        notes.append(f"timing cache {file} is of another GPU or version: it was begun anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    atomic_file.write(file, bytes(config.get_timing_cache().serialize()))


def _serialize(parsed: Parsed, config: Any, options: BuildOptions, progress: Progress) -> bytes:
    """Build in a thread of its own, so that a signal interrupts this one and not a callback within TensorRT."""
    logger = recorder(parsed.library)
    logger.errors.clear()
    percents: SimpleQueue[int | None] = SimpleQueue()
    stop = threading.Event()
    reached = 0

    def report(share: float) -> None:
        nonlocal reached
        for _ in range(reached, min(int(share * _PERCENT), _PERCENT)):
            reached += 1
            percents.put(reached)

    config.progress_monitor = monitor(parsed.library, report, stop.is_set)
    made: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            made.append(parsed.builder.build_serialized_network(parsed.network, config))
            report(1.0)
        except BaseException as error:
            failed.append(error)
        finally:
            percents.put(None)

    def watched() -> Generator[int, None, None]:
        worker = threading.Thread(target=work, name="tensorrt build")
        worker.start()
        try:
            yield from iter(percents.get, None)
        finally:
            stop.set()
            worker.join()

    with contextlib.closing(watched()) as shown:
        for _ in progress.track(shown, f"build an engine with {parsed.library.title}", _PERCENT):
            pass
    if failed and not isinstance(failed[0], (MemoryError, RuntimeError)):
        raise failed[0]
    if failed or made[0] is None:
        said = [
            *logger.errors,
            *("out of memory" if isinstance(error, MemoryError) else str(error) for error in failed),
        ]
        raise BadInput(words.of_builder(said, options))
    return bytes(made[0])


def _inspect(library: Library, content: bytes) -> tuple[Layer, ...] | None:
    """The layers of the engine itself; None where it cannot be loaded here."""
    engine = library.module.Runtime(recorder(library)).deserialize_cuda_engine(content)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return layers.of_engine(inspector.get_engine_information(library.module.LayerInformationFormat.JSON))
