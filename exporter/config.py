"""What one export is asked to do, checked before any work starts. Imports no heavy library."""

import re
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path, PurePath

from convoynet.exporter import engine_asked, onnx_asked, outputs_asked
from convoynet.exporter.engine_options import MAX_BATCH, MIB, USUAL_BATCH, BuildOptions, Profile
from convoynet.exporter.errors import BadInput
from convoynet.exporter.onnx_asked import is_onnx
from convoynet.exporter.recipe import (
    SPARSE_PATTERN,
    Bf16,
    Finetune,
    Fp8,
    Fp16,
    Int8,
    LowRank,
    Prune,
    Separable,
    Sparsify,
    Step,
    check_order,
    trains,
)

FORMATS = ("onnx", "tensorrt")
TARGETS = ("cpu", "gpu")
INPUTS = ("float32", "uint8")
# As timm, torchvision and Pillow name them.
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CHANNEL_ORDERS = ("rgb", "bgr")
MADE_IMAGES = ("statistics", "noise")
OPSETS = range(18, 25)
DEFAULT_OPSET = 20
# Q/DQ pairs as TensorRT 10 and later read them, FP16 scales and FP8 came with 19, convolutions in bfloat16 with 22.
_STEP_OPSETS = {"int8": 19, "fp8": 19, "fp16": 19, "bf16": 22}
# By task: what a class map or a hundred boxes of an image take of memory limits the batch.
DEFAULT_BATCHES = {"classification": (1, 32), "segmentation": (1, 8), "detection": (1, 4)}
MAX_PIXELS = 2**16
PROGRAM_SUFFIX = ".pt2"
_LIBRARIES = ("timm", "torchvision", "hf-hub")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def default_target(format: str) -> str:
    """The machine that a model of this format is for where nothing says which: "gpu" where there is one here."""
    found = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    return "gpu" if found or format == "tensorrt" else "cpu"


def is_program(arch: str) -> bool:
    """Whether `arch` is the file of a torch.export program."""
    return arch.endswith(PROGRAM_SUFFIX)


def is_factory(arch: str) -> bool:
    """Whether `arch` is the user's own "package.module:factory"."""
    return ":" in arch and not is_program(arch) and not is_library(arch) and not is_onnx(arch)


def is_library(arch: str) -> bool:
    """Whether `arch` is a library's name for a network: "timm:NAME", "torchvision:NAME" or "hf-hub:OWNER/NAME"."""
    return split_library(arch)[0] in _LIBRARIES


def split_library(arch: str) -> tuple[str, str]:
    """The library and the name in it."""
    library, _, name = arch.partition(":")
    return library, name


def default_name(arch: str) -> str:
    """The model's name where none is given: that of the network, of the factory, or of the program's file."""
    if is_program(arch) or is_onnx(arch):
        return PurePath(arch).stem
    if is_library(arch):
        return split_library(arch)[1].rpartition("/")[2]
    return arch.rpartition(":")[2].rpartition(".")[2] if is_factory(arch) else arch


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Attributes:
        arch: a name that `convoy archs` lists, a library's, as in "timm:NAME", "package.module:factory", or a
            torch.export program's FILE.pt2, or a FILE.onnx of any exporter.
        network: a PyTorch module in the place of what `arch` names; `arch` is what its class is called.
        given: precision of what `arch` is already, where that is an ONNX file.
        weights: "default" (the published ones), "random" (seeded by `seed`) or the path of a checkpoint.
        ema: take the averaged weights of a checkpoint that has such beside the others.
        seed: seeds random weights and made images.
        num_classes: size of the output; None means the network's own, or one for each line of `labels`.
        labels: file with one class name a line, in the order of the outputs; None means the network's own.
        outputs: names for what the network returns, in its order, or NAME=LAYER; () means the logits alone.
        task: what the rows that it returns mean, one of TASKS; None means what is known of it.
        explain: add the output "explanation", where the evidence for a class lies.
        features: add the output "features", what the last layer makes the scores of.
        repository: folder of the model repository; made where it is missing.
        input_size: (height, width) of the image in pixels; None means the network's own.
        resize: shorter side, or (height, width), that an image is resized to before the centre is cut out; None means
            the network's own.
        crop: share of the resized image's shorter side that is cut out, in the place of `resize`.
        interpolation: how images are resized, one of INTERPOLATIONS; None means the network's own.
        channel_order: of colour, "rgb" or "bgr"; None means the network's own.
        check_preprocessing: an .npy file with the input that the user's own pipeline makes of an image, and that
            image; the export is refused where ours differs.
        mean: of each channel, on the 0..1 scale, subtracted from the pixels; None means the network's own.
        std: of each channel, on the 0..1 scale, that the rest is divided by; None means the network's own.
        fully_convolutional: turn the classifier's fully connected layers into convolutions, for a map of logits.
        name: the model's name in the repository; "" means `default_name(arch)`.
        version: number of the version to publish; None means the next one.
        format: "onnx", or "tensorrt" for an engine beside the graph that it was built from.
        target: "cpu" or "gpu", the kind of machine that will run it.
        input: "float32" (normalised NCHW) or "uint8" (NHWC pixels, the graph normalises them).
        steps: what compresses it, in this order; none of them leaves it as it is, in float32.
        calibration: folder of images that stand for the real traffic; None means packaged or made ones.
        calibration_samples: how many of them to use, at most.
        made_images: where no folder is given, "statistics" for images made from the network's batch normalisations or
            "noise"; None means the former where they serve a quantization.
        finetune: folder of images to train on, in class folders where labels are to count; None means that a step
            that trains takes the images of `calibration`, without labels.
        eval: folder of class folders on which accuracy is measured.
        max_drop: percentage points of top-1 accuracy that may be lost on `eval`.
        batch: smallest and largest batch that the model must take, in images; None means DEFAULT_BATCHES'.
        profiles: batches of the engine, in the place of `batch`; () means one profile, of `batch`.
        opset: ONNX operator set of the graph; None means DEFAULT_OPSET, or a later one that a step needs.
        force: overwrite `version` where it exists.
        defer_build: leave the engine to the server, which builds it for its own GPU at first load.
        optimization_level: how long TensorRT searches, 0 to 5; None means its own default, as for the rest.
        workspace_mib: memory that one layer of the engine may take for scratch, in MiB.
        timing_cache: file in which TensorRT keeps its measurements between builds.
        version_compatible: an engine that later versions of TensorRT take too.
        hardware_compatible: an engine for other GPUs than that of the machine that builds it.
    """

    arch: str
    weights: str = "default"
    ema: bool = False
    seed: int = 0
    num_classes: int | None = None
    labels: Path | None = None
    input_size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    crop: float | None = None
    interpolation: str | None = None
    channel_order: str | None = None
    check_preprocessing: tuple[Path, Path] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fully_convolutional: bool = False
    outputs: tuple[str, ...] = ()
    task: str | None = None
    explain: bool = False
    features: bool = False
    repository: Path = Path("models")
    name: str = ""
    version: int | None = None
    format: str = "onnx"
    target: str = "cpu"
    input: str = "float32"
    steps: tuple[Step, ...] = ()
    calibration: Path | None = None
    calibration_samples: int = 256
    made_images: str | None = None
    finetune: Path | None = None
    eval: Path | None = None
    max_drop: float | None = None
    batch: tuple[int, int] | None = None
    profiles: tuple[Profile, ...] = ()
    opset: int | None = None
    force: bool = False
    defer_build: bool = False
    optimization_level: int | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    given: str = "fp32"
    network: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a disk.

        Raises:
            BadInput: naming the option, its value and what is allowed.
        """
        self._check_choices()
        self._check_numbers()
        self._check_image()
        self._check_combinations()
        engine_asked.check(vars(self))

    @property
    def model_name(self) -> str:
        """The model's name in the repository."""
        return self.name or default_name(self.arch)

    @property
    def quantization(self) -> Int8 | Fp8 | None:
        """The step that quantizes, where there is one."""
        return next((step for step in self.steps if isinstance(step, Int8 | Fp8)), None)

    @property
    def half(self) -> Fp16 | Bf16 | None:
        """The step that gives what is not quantized a 16-bit type, where there is one."""
        return next((step for step in self.steps if isinstance(step, Fp16 | Bf16)), None)

    @property
    def of_the_module(self) -> tuple[tuple[int, Separable | Prune | Sparsify | LowRank | Finetune], ...]:
        """The steps that change the PyTorch module, each with its place in `steps`, from 1 on."""
        kinds = Separable | Prune | Sparsify | LowRank | Finetune
        return tuple((place, step) for place, step in enumerate(self.steps, 1) if isinstance(step, kinds))

    @property
    def precision(self) -> str:
        """The precision of the published graph, as the report names it: fp32, int8, fp16, int8+fp16 and so on."""
        return "+".join(step.kind for step in (self.quantization, self.half) if step is not None) or self.given

    @property
    def onnx_opset(self) -> int:
        """The ONNX operator set of the graph; of a given file, the least."""
        default = 0 if is_onnx(self.arch) else DEFAULT_OPSET
        return self.opset or max([default, *(_STEP_OPSETS.get(step.kind, 0) for step in self.steps)])

    @property
    def publishes_engine(self) -> bool:
        """Whether an engine is built here and published."""
        return self.format == "tensorrt" and not self.defer_build

    @property
    def is_2_of_4_sparse(self) -> bool:
        """Whether a step leaves two of four weights zero, for the sparse tensor cores of GPUs."""
        return any(isinstance(step, Sparsify) and step.pattern == SPARSE_PATTERN for step in self.steps)

    def batch_range(self, task: str) -> tuple[int, int]:
        """The smallest and the largest batch for a network of this task."""
        if self.profiles:
            return min(one.smallest for one in self.profiles), max(one.largest for one in self.profiles)
        return self.batch or DEFAULT_BATCHES[task]

    def build_options(self, task: str) -> BuildOptions:
        """How the engine of a network of this task is built."""
        low, high = self.batch_range(task)
        return BuildOptions(
            profiles=self.profiles or (Profile(low, max(low, min(high, USUAL_BATCH)), high),),
            optimization_level=self.optimization_level,
            workspace_bytes=None if self.workspace_mib is None else self.workspace_mib * MIB,
            timing_cache=self.timing_cache,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            sparse_weights=self.is_2_of_4_sparse,
        )

    def _check_choices(self) -> None:
        for option, value, allowed in (
            ("--format", self.format, FORMATS),
            ("--target", self.target, TARGETS),
            ("--input", self.input, INPUTS),
            ("--interpolation", self.interpolation or INTERPOLATIONS[0], INTERPOLATIONS),
            ("--channel-order", self.channel_order or CHANNEL_ORDERS[0], CHANNEL_ORDERS),
            ("--made-images", self.made_images or MADE_IMAGES[0], MADE_IMAGES),
        ):
            if value not in allowed:
                raise BadInput(f"{option} {value!r} is not one of {', '.join(allowed)}")
        # An unknown arch is reported as such, with close matches, by the registry.
        if self.name and not _MODEL_NAME.fullmatch(self.name):
            raise BadInput(
                f"--name {self.name!r} is no model name: a letter or digit, then up to 127 of letters, digits, . _ -"
            )
        derived = default_name(self.arch) != self.arch
        if derived and not self.name and not _MODEL_NAME.fullmatch(self.model_name):
            flag = "--onnx" if is_onnx(self.arch) else "--arch"
            raise BadInput(
                f"{flag} {self.arch} gives the model the name {self.model_name!r}, which is none; add --name"
            )
        if not self.weights:
            raise BadInput("--weights is empty; give default, random or a checkpoint file")

    def _check_numbers(self) -> None:
        low, high = self.batch or (1, 1)
        if not 1 <= low <= high <= MAX_BATCH:
            raise BadInput(f"--batch {low}:{high} must be MIN:MAX with 1 <= MIN <= MAX <= {MAX_BATCH}")
        if self.opset is not None and self.opset not in OPSETS:
            raise BadInput(f"--opset {self.opset} is not in {OPSETS.start}..{OPSETS.stop - 1}")
        for option, value, least, most in (
            ("--seed", self.seed, 0, 2**63 - 1),
            ("--num-classes", self.num_classes, 1, 1_000_000),
            ("--version", self.version, 1, 2**63 - 1),
            ("--calibration-samples", self.calibration_samples, 1, 100_000),
            ("--max-drop", self.max_drop, 0, 100),
        ):
            # Written so that NaN fails too.
            if value is not None and not least <= value <= most:
                raise BadInput(f"{option} {value} is not in {least}..{most}")

    def _check_image(self) -> None:
        if self.input_size is not None and not all(1 <= pixels <= MAX_PIXELS for pixels in self.input_size):
            raise BadInput(f"--input-size {_size(self.input_size)} is not within 1 and {MAX_PIXELS} pixels")
        sides = self.resize if isinstance(self.resize, tuple) else (1 if self.resize is None else self.resize,)
        if not all(1 <= pixels <= MAX_PIXELS for pixels in sides):
            raise BadInput(f"--resize {'x'.join(map(str, sides))} is not within 1 and {MAX_PIXELS} pixels")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise BadInput(f"--crop {self.crop:g} is no share above 0 and up to 1")
        if self.crop is not None and self.resize is not None:
            raise BadInput(
                f"--resize and --crop {self.crop:g} both say how large the image is before the crop; drop one of them"
            )
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if values is not None and (len(values) not in (1, 3) or not all(isfinite(value) for value in values)):
                raise BadInput(f"{option} {_values(values)} needs three numbers for RGB, or one for greyscale")
        if self.mean is None and self.std is None:
            return
        if self.mean is None or self.std is None or len(self.mean) != len(self.std):
            raise BadInput("--mean and --std belong together: as many numbers in the one as in the other")
        # The usual slip is to give them for pixels of 0 to 255.
        if not all(-1 <= value <= 1 for value in self.mean) or not all(0 < value <= 1 for value in self.std):
            raise BadInput(
                f"--mean {_values(self.mean)} --std {_values(self.std)} must be for pixels from 0 to 1: "
                "divide those for 0 to 255 by 255"
            )

    def _check_images_of_steps(self) -> None:
        for place, step in self.of_the_module:
            if isinstance(step, Finetune) and self.finetune is None and self.calibration is None:
                raise BadInput(
                    f"step {place} ({step.kind}) needs images: add --finetune DIR, or --calibration DIR to train "
                    f"without labels"
                )
            if isinstance(step, Prune) and step.reconstruct and self.calibration is None:
                raise BadInput(f"step {place} ({step.kind}): reconstruct needs images: add --calibration DIR")

    def _check_combinations(self) -> None:
        check_order(self.steps)
        outputs_asked.check(self.outputs, self.task, self.eval, self.steps)
        outputs_asked.check_added(self.task, self.outputs, explain=self.explain, features=self.features)
        if is_onnx(self.arch):
            onnx_asked.check(vars(self))
        for step in self.steps:
            needed = _STEP_OPSETS.get(step.kind, 0)
            if self.opset is not None and self.opset < needed:
                raise BadInput(f"--{step.kind} needs --opset {needed} or more, not {self.opset}")
        for precision in (self.half, self.quantization):
            if isinstance(precision, Fp16 | Bf16 | Fp8) and self.target == "cpu":
                raise BadInput(
                    f"--{precision.kind} needs --target gpu: on a CPU it is no faster than float32, or does "
                    "not run; use --int8 there"
                )
        if self.ema and self.weights in ("default", "random"):
            raise BadInput(f"--ema chooses among the weights of a file, and --weights is {self.weights}; drop --ema")
        self._check_images_of_steps()
        if self.finetune is not None and not trains(self.steps):
            raise BadInput(f"--finetune {self.finetune}: no step of the recipe trains; add one, or drop this")
        if self.max_drop is not None and self.eval is None:
            raise BadInput(f"--max-drop {self.max_drop:g} needs --eval DIR, the images to measure it on")
        if self.made_images is not None and self.calibration is not None:
            raise BadInput(f"--made-images {self.made_images} does nothing beside --calibration; drop one of them")
        if self.force and self.version is None:
            raise BadInput("--force overwrites a version, so it needs --version N; without both, a new one is added")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _values(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
