"""An ONNX file in the place of a network: looked at before any work starts, and what an export does otherwise."""

from dataclasses import replace
from pathlib import Path

from convoynet.exporter.archs import Arch
from convoynet.exporter.archs.onnx_network import OnnxNetwork
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput, ExporterError, reason
from convoynet.exporter.graph.onnx_read import read_model, reading
from convoynet.exporter.inspecting.inspection import inspection
from convoynet.exporter.inspecting.trace_from_onnx import trace_from_onnx
from convoynet.exporter.linting.lint import lint
from convoynet.exporter.linting.model import RUNTIMES

# The precision of a graph with integer operators.
_QUANTIZED = "int8"


def lint_file(path: Path) -> None:
    """See that ONNX Runtime, which runs the file as the reference, takes it.

    Raises:
        BadInput: it does not, or the file is no ONNX model; the message has the linter's first error.
    """
    model = read_model(path, weights=False)
    with reading(str(path), model):
        errors = [
            found for found in lint(model, RUNTIMES["onnxruntime"], folder=path.parent) if found.severity == "error"
        ]
    if errors:
        more = f" ({len(errors) - 1} more: convoy lint {path})" if len(errors) > 1 else ""
        raise BadInput(f"{path}: {errors[0].line}{more}")


def as_given(config: ExportConfig, arch: Arch) -> tuple[ExportConfig, list[str]]:
    """The export as the file lets it be, and what a person should know of it.

    Raises:
        BadInput: the file is quantized already and another precision is asked for, or it takes one image at a time and
            batches are asked for.
    """
    network = arch.build(arch.num_classes)
    assert isinstance(network, OnnxNetwork)
    given, notes = network.given, list(network.notes)
    if given.quantized:
        if config.precision != config.given:
            raise BadInput(
                f"--{config.precision.replace('+', ' --')}: {given.path} is quantized already (it has "
                f"{given.quantized}): publish it as it is without the flag, or quantize the float model that it was "
                "made from"
            )
        config = replace(config, given=_QUANTIZED)
        notes.append(f"the file is quantized already (it has {given.quantized}): it is published as it is")
    if given.batch is not None:
        low, high = config.batch or (1, 1)
        if config.profiles or (low, high) != (1, 1):
            raise BadInput(f"--batch {low}:{high}: {given.path} takes one image at a time; leave the option out")
        config = replace(config, batch=(1, 1))
    if arch.task == "segmentation":
        notes.append("its output has a value for each place: taken for the logits of a class map")
    try:
        trace = trace_from_onnx(arch.name, given.model, arch.preprocess.size)
        network.macs = inspection(trace, fully_convolutional=False).macs
    except ExporterError as error:
        notes.append(f"its multiply-adds could not be counted: {reason(error)}")
    return config, notes
