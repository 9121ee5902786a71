"""What one export is asked to do, checked before any work starts. Imports no heavy library."""

import re
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import BadInput

FORMATS = ("onnx",)
TARGETS = ("cpu", "gpu")
INPUTS = ("float32", "uint8")
CALIBRATION_METHODS = ("minmax", "percentile")
OPSETS = range(18, 25)
# QuantizeLinear and DequantizeLinear as TensorRT 10 and later read them came with opset 19.
INT8_OPSET = 19
MAX_BATCH = 4096
# By task: what a class map or a hundred boxes of an image take of memory limits the batch.
DEFAULT_BATCHES = {"classification": (1, 32), "segmentation": (1, 8), "detection": (1, 4)}
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def find_target() -> str:
    """Return "gpu" where the NVIDIA driver offers a device on this machine, else "cpu"."""
    return "gpu" if Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists() else "cpu"


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Attributes:
        arch: a name that `convoy archs` lists.
        weights: "default" (the published ones), "random" (seeded by `seed`) or the path of a checkpoint.
        seed: seeds random weights and made images.
        num_classes: size of the output; None means the network's own, or one for each line of `labels`.
        labels: file with one class name a line, in the order of the outputs; None means the network's own.
        repository: folder of the model repository; made where it is missing.
        name: the model's name in the repository; "" means `arch`.
        version: number of the version to publish; None means the next one.
        format: "onnx".
        target: "cpu" or "gpu", the kind of machine that will run it.
        input: "float32" (normalised NCHW) or "uint8" (NHWC pixels, the graph normalises them).
        int8: quantize weights and activations to 8-bit integers.
        calibration: folder of images that stand for the real traffic; None means packaged or made ones.
        calibration_samples: how many of them to use, at most.
        calibration_method: "minmax" or "percentile"; None means "percentile" where `int8` asks for one.
        eval: folder of class folders on which accuracy is measured.
        max_drop: percentage points of top-1 accuracy that may be lost on `eval`.
        batch: smallest and largest batch that the model must take, in images; None means DEFAULT_BATCHES'.
        opset: ONNX operator set of the graph.
        force: overwrite `version` where it exists.
    """

    arch: str
    weights: str = "default"
    seed: int = 0
    num_classes: int | None = None
    labels: Path | None = None
    repository: Path = Path("models")
    name: str = ""
    version: int | None = None
    format: str = "onnx"
    target: str = "cpu"
    input: str = "float32"
    int8: bool = False
    calibration: Path | None = None
    calibration_samples: int = 256
    calibration_method: str | None = None
    eval: Path | None = None
    max_drop: float | None = None
    batch: tuple[int, int] | None = None
    opset: int = 20
    force: bool = False

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a disk.

        Raises:
            BadInput: naming the option, its value and what is allowed.
        """
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    @property
    def model_name(self) -> str:
        """The model's name in the repository."""
        return self.name or self.arch

    @property
    def precision(self) -> str:
        """The precision of the published graph, as the report names it."""
        return "int8" if self.int8 else "fp32"

    @property
    def method(self) -> str:
        """The calibration method that is used where there is a calibration."""
        return self.calibration_method or "percentile"

    def batch_range(self, task: str) -> tuple[int, int]:
        """The smallest and the largest batch for a network of this task."""
        return self.batch or DEFAULT_BATCHES[task]

    def _check_choices(self) -> None:
        for option, value, allowed in (
            ("--format", self.format, FORMATS),
            ("--target", self.target, TARGETS),
            ("--input", self.input, INPUTS),
            ("--calibration-method", self.method, CALIBRATION_METHODS),
        ):
            if value not in allowed:
                raise BadInput(f"{option} {value!r} is not one of {', '.join(allowed)}")
        # An unknown arch is reported as such, with close matches, by the registry.
        if self.name and not _MODEL_NAME.fullmatch(self.name):
            raise BadInput(
                f"--name {self.name!r} is no model name: a letter or digit, then up to 127 of letters, digits, . _ -"
            )
        if not self.weights:
            raise BadInput("--weights is empty; give default, random or a checkpoint file")

    def _check_numbers(self) -> None:
        low, high = self.batch or (1, 1)
        if not 1 <= low <= high <= MAX_BATCH:
            raise BadInput(f"--batch {low}:{high} must be MIN:MAX with 1 <= MIN <= MAX <= {MAX_BATCH}")
        if self.opset not in OPSETS:
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

    def _check_combinations(self) -> None:
        if self.int8 and self.opset < INT8_OPSET:
            raise BadInput(f"--int8 needs --opset {INT8_OPSET} or more, not {self.opset}")
        if self.calibration_method and not self.int8:
            raise BadInput(
                f"--calibration-method {self.calibration_method} does nothing without --int8; add it or drop this"
            )
        if self.max_drop is not None and self.eval is None:
            raise BadInput(f"--max-drop {self.max_drop:g} needs --eval DIR, the images to measure it on")
        if self.force and self.version is None:
            raise BadInput("--force overwrites a version, so it needs --version N; without both, a new one is added")
