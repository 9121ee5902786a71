"""One network in every precision that a GPU has: what parity is checked on and speed is measured with on GPUs."""

from functools import cached_property

import onnx
import torch

from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_bf16, to_fp16
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.recipe import DEFAULT_METHOD
from convoynet.exporter.running.pictures import Pictures
from convoynet.exporter.studies import zoo

# "int8+fp16": what is not quantized computes in FP16, as `--int8 --fp16` exports it.
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8+fp16", "fp8")
# GPUs have FP8 from Ada and Hopper on, bfloat16 from Ampere on.
LEAST_COMPUTE_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0)}
_OPSETS = {"bf16": 22}
_OPSET = 20
_BATCH = 4


class Network:
    """A network of the zoo with seeded random weights, and its graphs.

    Args:
        name: as `convoy archs` lists it.
        pictures: to calibrate on and to check with; None for the images that the thresholds were recorded on.
        uint8_input: whether the graphs take pixels.
    """

    def __init__(self, name: str, pictures: Pictures | None = None, *, uint8_input: bool = False) -> None:
        self.name = name
        self.arch: Arch = zoo.network(name)
        self.pictures = pictures or zoo.pictures_for(name, None, zoo.TEST_SAMPLES, zoo.TEST_CHECKS)
        self._uint8_input = uint8_input
        self._exact: dict[int, onnx.ModelProto] = {}

    @cached_property
    def module(self) -> torch.nn.Module:
        """The PyTorch network, on the CPU, in evaluation mode."""
        torch.manual_seed(zoo.SEED)
        module = self.arch.build(self.arch.num_classes)
        weights.load(module, self.arch, "random", seed=zoo.SEED, images=self.pictures.calibration)
        return module.eval()

    def graph(self, precision: str) -> onnx.ModelProto:
        """The ONNX graph for a GPU in one of PRECISIONS.

        Raises:
            BadInput: it is none of them.
        """
        exact = self._exported(_OPSETS.get(precision, _OPSET))
        match precision:
            case "fp32":
                return exact
            case "fp16":
                return to_fp16(exact, self._ranges)
            case "bf16":
                return to_bf16(exact)
            case "int8" | "fp8":
                return quantize(exact, self._ranges, "gpu", (), precision)
            case "int8+fp16":
                return to_fp16(self.graph("int8"), self._ranges)
        raise BadInput(f"precision {precision!r}; allowed are {', '.join(PRECISIONS)}")

    def _exported(self, opset: int) -> onnx.ModelProto:
        if opset not in self._exact:
            cpu = self.module.to("cpu")
            self._exact[opset] = onnx_from_torch(
                cpu, self.arch.preprocess, task=self.arch.task, uint8_input=self._uint8_input, opset=opset
            )
        return self._exact[opset]

    @cached_property
    def _ranges(self) -> dict[str, Range]:
        images = self.pictures.calibration
        prepared = images if self._uint8_input else self.arch.preprocess.normalize(images)
        return calibrate(
            self._exported(_OPSET),
            (prepared[at : at + _BATCH] for at in range(0, len(prepared), _BATCH)),
            DEFAULT_METHOD,
        )
