"""The linter: what a runtime will refuse, misread or run badly in an ONNX model, found without running it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from convoynet.exporter.errors import Refused
from convoynet.exporter.linting import graph, kernels, quantization, whole
from convoynet.exporter.linting.model import RUNTIMES, Family, Finding, Problem, Runtime, Severity, Subject

Check = Callable[[Subject, Runtime], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """One thing to look for.

    Attributes:
        name: as docs/linting.md lists it.
        severity: how bad it is for each family of runtimes that it concerns.
        check: finds it in a model.
        last: whether it is looked for only where no other rule has found an error.
    """

    name: str
    severity: Mapping[Family, Severity]
    check: Check
    last: bool = False


def _everywhere(severity: Severity) -> dict[Family, Severity]:
    return {"onnxruntime": severity, "openvino": severity, "tensorrt": severity}


# What TensorRT would otherwise read as other numbers than ONNX says, some of it in silence.
TENSORRT_QUANTIZATION = (
    Rule("quantized-type", {"tensorrt": "error"}, quantization.types_that_tensorrt_misreads),
    Rule("int32-bias", {"tensorrt": "error"}, quantization.int32_biases),
    Rule("zero-point", {"tensorrt": "error"}, quantization.zero_points),
    Rule("scale", _everywhere("error"), quantization.scales),
)
RULES: tuple[Rule, ...] = (
    Rule("external-data", _everywhere("error"), graph.missing_external_data),
    # TensorRT's parser goes by operators, and takes newer opsets where it knows all of them.
    Rule("opset", {"onnxruntime": "error", "tensorrt": "warning"}, graph.opset),
    Rule("ir-version", {"onnxruntime": "error"}, graph.ir_version),
    Rule("training-mode", _everywhere("error"), graph.training_mode),
    *TENSORRT_QUANTIZATION,
    Rule("quantization-opset", _everywhere("error"), quantization.operators_newer_than_the_opset),
    Rule("uint8-input", {"tensorrt": "error"}, graph.raw_uint8_inputs),
    Rule("unsupported-operator", {"tensorrt": "error"}, graph.unsupported_operators),
    Rule("no-kernel", {"onnxruntime": "error", "openvino": "error"}, kernels.operators_without_kernel),
    # A plugin may have it.
    Rule("custom-operator", {**_everywhere("error"), "tensorrt": "warning"}, graph.custom_operators),
    Rule("data-dependent", _everywhere("warning"), graph.data_dependent_operators),
    Rule("control-flow", {"tensorrt": "warning"}, graph.control_flow),
    Rule("signed-activations", {"onnxruntime": "warning"}, quantization.signed_activations),
    Rule("fp8", {"onnxruntime": "error"}, quantization.fp8_pairs),
    Rule("fp16-scale", {"onnxruntime": "error"}, quantization.fp16_scales),
    Rule("bfloat16", {"onnxruntime": "error"}, quantization.bfloat16_layers),
    Rule("bfloat16-scale", {"openvino": "error"}, quantization.bfloat16_scales),
    Rule("fp16", {"onnxruntime": "warning"}, quantization.fp16_layers),
    Rule("float-weights", _everywhere("warning"), quantization.float_weights),
    Rule("per-tensor-weights", _everywhere("warning"), quantization.one_scale_for_all_channels),
    Rule("odd-channels", {"tensorrt": "warning"}, quantization.odd_channels),
    Rule("batch-norm", _everywhere("warning"), graph.unfolded_batch_norms),
    Rule("auxiliary-output", _everywhere("warning"), graph.auxiliary_outputs),
    Rule("static-batch", _everywhere("warning"), graph.static_batch),
    Rule("dynamic-size", {"tensorrt": "warning"}, graph.dynamic_size),
    Rule("wide-numbers", _everywhere("warning"), graph.wide_numbers),
    Rule("invalid", _everywhere("warning"), whole.broken_rules, last=True),
    Rule("refused", {"onnxruntime": "error", "openvino": "error"}, whole.refused, last=True),
)


def lint(
    model: onnx.ModelProto, runtime: Runtime, *, folder: Path | None = None, rules: Iterable[Rule] = RULES
) -> list[Finding]:
    """Look for what a runtime will refuse, misread or run badly.

    Args:
        model: any ONNX model; it is not changed. Weights in files of their own need not be loaded.
        runtime: what is to run it, of `RUNTIMES`.
        folder: where the model's file is; without it files of weights are not looked for.
        rules: those to apply.

    Returns:
        The findings, errors first, then in the order of the rules and of the nodes.
    """
    subject = Subject(model, folder)
    found: list[Finding] = []
    for rule in sorted(rules, key=lambda rule: rule.last):
        if runtime.family in rule.severity and not (rule.last and any(item.severity == "error" for item in found)):
            severity = rule.severity[runtime.family]
            found += [Finding(rule.name, severity, *problem) for problem in rule.check(subject, runtime)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def require_clean(model: onnx.ModelProto, target: str) -> None:
    """Let a graph pass only if the linter has no error for the runtime of an export's target, "cpu" or "gpu".

    Raises:
        Refused: it has; the message has the first.
    """
    runtime = RUNTIMES["onnxruntime" if target == "cpu" else "tensorrt"]
    errors = [finding for finding in lint(model, runtime) if finding.severity == "error"]
    if errors:
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Refused(f"the graph is none for {runtime.title}: {errors[0].line}{more}; nothing was published")
