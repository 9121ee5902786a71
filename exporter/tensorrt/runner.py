"""Serialized engines ("plans") on a GPU, in torch's CUDA memory and on its streams: for parity and speed."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from convoynet.exporter.archs import Task
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.engine_options import Profile
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.graph.onnx_from_torch import compared
from convoynet.exporter.running.runtime import Array, Images, Outputs
from convoynet.exporter.tensorrt.library import Library, find, recorder

# How a plan begins: four letters for the library, and from byte 24 on its version, a byte for each number.
_LIBRARIES = MappingProxyType({b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"})
_VERSION = slice(24, 28)
# DataType of TensorRT -> torch's; the others are no inputs or outputs that numpy could take.
_TYPES = MappingProxyType(
    {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "UINT8": torch.uint8,
        "INT8": torch.int8,
        "INT32": torch.int32,
        "INT64": torch.int64,
        "BOOL": torch.bool,
    }
)
_MAX_REASON = 2_000
_UNLOADABLE = "cannot be loaded"
_REBUILD = "build it again here: convoy build MODEL.onnx --output MODEL.plan"


@dataclass(frozen=True)
class Header:
    """What the first bytes of a plan say: the library that made it, and that library's version."""

    library: str
    version: str


def read_header(content: bytes) -> Header:
    """Read the library and the version from a plan, which needs neither TensorRT nor a GPU.

    Raises:
        BadInput: it does not begin as a plan does.
    """
    library = _LIBRARIES.get(content[:4])
    if library is None or len(content) < _VERSION.stop:
        raise BadInput(f"no TensorRT plan: it begins with {content[:4]!r}; {_REBUILD}")
    return Header(library, ".".join(map(str, content[_VERSION])))


def choose_profile(profiles: Sequence[Profile], batch: int) -> int:
    """The number of the profile for a batch: of those that take it, the one that was tuned for the nearest size.

    Raises:
        BadInput: no profile takes it.
    """
    fits = [index for index, profile in enumerate(profiles) if profile.smallest <= batch <= profile.largest]
    if not fits:
        ranges = ", ".join(f"{profile.smallest} to {profile.largest}" for profile in profiles)
        raise BadInput(f"batch {batch}: this plan takes {ranges} images; build it with --batch that holds {batch}")
    return min(fits, key=lambda index: (abs(profiles[index].usual - batch), profiles[index].largest))


class Plan:
    """A plan on one GPU: a session like the others of `convoynet.exporter.running.runtime`.

    Args:
        content: the plan, or the file that holds it.
        preprocess: how images become inputs, where the engine does not do it itself.
        task: says which outputs a call returns; `run` returns any.
        device: the GPU's number, as CUDA counts.
        version_compatible: the plan was built so; it then brings code of its own to run here.
        beside: outputs that the network lacks, since an export added them; they are not returned.

    Attributes:
        outputs: the names of all that the engine returns.
        profiles: the batch sizes that it was built for.

    Raises:
        Missing: there is no TensorRT of the kind that made it, or no such GPU.
        BadInput: no plan, a plan of another library, version or GPU, or too little memory for it.
    """

    def __init__(
        self,
        content: bytes | Path,
        preprocess: Preprocess,
        *,
        task: Task = "classification",
        device: int = 0,
        version_compatible: bool = False,
        beside: Collection[str] = (),
    ) -> None:
        plan = content if isinstance(content, bytes) else _read(content)
        library = _library_for(read_header(plan), version_compatible=version_compatible)
        _require_gpu(device)
        self.device = "cuda"
        self._title = torch.cuda.get_device_name(device)
        self.name = f"{library.title} on {self._title}"
        self._gpu = _device(device)
        self._words = recorder(library)
        self._words.errors.clear()
        self._runtime = library.module.Runtime(self._words)
        if version_compatible:
            self._runtime.engine_host_code_allowed = True
        with _memory(self._gpu, "plan"):
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise BadInput(self._refusal(_UNLOADABLE))
            self._stream = torch.cuda.Stream(self._gpu)  # type: ignore[no-untyped-call]
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name).name == "INPUT"]
        self.outputs = tuple(name for name in names if name not in inputs)
        if len(inputs) != 1:
            raise BadInput(f"the plan has the inputs {', '.join(inputs)}; one is wanted")
        (self._input,) = inputs
        self._types = {name: self._type(name) for name in names}
        counts = range(self._engine.num_optimization_profiles)
        self.profiles = tuple(
            Profile(*(int(shape[0]) for shape in self._engine.get_tensor_profile_shape(self._input, index)))
            for index in counts
        )
        self._contexts: dict[int, Any] = {}
        self._bound: tuple[torch.Tensor, Mapping[str, torch.Tensor]] | None = None
        self._wanted = tuple(name for name in compared(self.outputs) if name not in beside)
        self._takes_pixels = self._types[self._input] == torch.uint8
        self._preprocess = preprocess

    def prepare(self, images: Images) -> Array:
        """Normalise to float32 NCHW, unless the engine takes the pixels."""
        return images if self._takes_pixels else self._preprocess.normalize(images)

    def __call__(self, inputs: Array) -> Outputs:
        """Return the outputs as numpy arrays; the copies to and from the GPU are part of it."""
        found = self.run(inputs, self._wanted)
        return tuple(found[name] for name in self._wanted)

    def run(self, inputs: Array, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run one batch.

        Args:
            inputs: what `prepare` returns, the batch first.
            outputs: names of the outputs to copy out; all if None.

        Returns:
            One array for each of them; bfloat16 as float32, which numpy has.

        Raises:
            BadInput: the batch is outside every profile, or the GPU has too little memory for it.
        """
        with _memory(self._gpu, f"batch of {len(inputs)}"):
            enqueue, made = self.bind(inputs)
            enqueue()
            self.synchronize()
            wanted = made if outputs is None else {name: made[name] for name in outputs}
            return {name: _numpy(tensor) for name, tensor in wanted.items()}

    def bind(self, inputs: Array) -> tuple[Callable[[], None], Mapping[str, torch.Tensor]]:
        """Copy a batch to the GPU and give it room for its outputs there.

        Returns:
            A function that enqueues one run on the plan's stream, any number of times, until the next `bind`; and
            the outputs by name, CUDA tensors that hold the values once `synchronize` has returned.

        Raises:
            BadInput: as for `run`.
        """
        context = self._context(choose_profile(self.profiles, len(inputs)))
        with torch.cuda.stream(self._stream):
            source = torch.from_numpy(np.ascontiguousarray(inputs)).to(self._gpu, self._types[self._input])
            if not context.set_input_shape(self._input, tuple(source.shape)):
                raise BadInput(self._refusal(f"does not take {list(source.shape)}"))
            made = {name: self._room(context, name) for name in self.outputs}
        for name, tensor in {self._input: source, **made}.items():
            context.set_tensor_address(name, tensor.data_ptr())

        # The engine knows addresses alone: what lies there has to stay.
        self._bound = (source, made)

        def enqueue() -> None:
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise BadInput(self._refusal(f"does not run a batch of {len(inputs)}"))

        return enqueue, made

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        self._stream.synchronize()

    def _context(self, profile: int) -> Any:
        """One execution context for each profile that is used, since changing it would wait for the GPU."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                full = not self._words.errors or "memory" in self._words.errors[0].lower()
                words = f"{_memory_words(self._gpu, 'plan')}: {self._reason()}" if full else self._refusal(_UNLOADABLE)
                raise BadInput(words)
            if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
                raise BadInput(self._refusal(f"does not take its profile {profile}"))
            self.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _room(self, context: Any, name: str) -> torch.Tensor:
        shape = tuple(context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise BadInput(f"output {name!r} has the shape {list(shape)}: it depends on the values, not the batch")
        return torch.empty(shape, dtype=self._types[name], device=self._gpu)

    def _type(self, name: str) -> torch.dtype:
        stated = self._engine.get_tensor_dtype(name).name
        if stated not in _TYPES:
            raise BadInput(f"{name!r} is {stated}, which cannot be handed over; allowed are {', '.join(_TYPES)}")
        return _TYPES[stated]

    def _refusal(self, what: str) -> str:
        return f"the plan {what} on {self._title}: {self._reason()}; {_REBUILD}"

    def _reason(self) -> str:
        """The first of TensorRT's errors since the last; the others follow from it."""
        words = " ".join(self._words.errors[0].split())[:_MAX_REASON] if self._words.errors else "it gives no reason"
        self._words.errors.clear()
        return words


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from error


def _library_for(header: Header, *, version_compatible: bool) -> Library:
    library = find()
    package = header.library.replace("_", "-")
    if library is None:
        raise Missing(f"the plan needs {header.library} {header.version}: pip install {package}=={header.version}")
    # A version-compatible plan runs under newer versions than its own, which TensorRT itself judges.
    same = version_compatible or header.version == library.version
    if header.library != library.name or not same:
        raise BadInput(
            f"the plan was built by {header.library} {header.version}, and here is {library.name} {library.version}; "
            f"{_REBUILD}"
        )
    return library


def _require_gpu(device: int) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device >= count:
        has = "none" if count == 0 else f"{count}, counted from 0"
        raise Missing(
            f"a plan runs on an NVIDIA GPU: GPU {device} was asked for and torch finds {has}; look at nvidia-smi, or "
            "run the ONNX file on the CPU"
        )


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


@contextmanager
def _memory(gpu: torch.device, what: str) -> Iterator[None]:
    """Turn torch's exception for a full GPU into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BadInput(_memory_words(gpu, what)) from error


def _memory_words(gpu: torch.device, what: str) -> str:
    free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(gpu))
    return (
        f"{gpu} has too little memory for this {what}: {free:.1f} of {total:.1f} GiB are free; end other programs on "
        "it, or build with a smaller --batch"
    )


def _numpy(tensor: torch.Tensor) -> Array:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
