"""What can be asked of a network that is an ONNX file, checked before any work starts. Imports no heavy library."""

from collections.abc import Mapping
from typing import Any

from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Bf16, Fp8, Fp16, Int8

ONNX_SUFFIX = ".onnx"


def is_onnx(arch: str) -> bool:
    """Whether `arch` is an ONNX file."""
    return arch.endswith(ONNX_SUFFIX)


def check(config: Mapping[str, Any]) -> None:
    """See that nothing is asked that takes the network in PyTorch; `config` are the fields of an ExportConfig.

    Raises:
        BadInput: something is; the message names it.
    """
    file = config["arch"]
    options = {
        f"--weights {config['weights']}": config["weights"] != "default",
        "--num-classes": config["num_classes"] is not None,
        "--fully-convolutional": config["fully_convolutional"],
        "--finetune": config["finetune"] is not None,
        "--made-images statistics": config["made_images"] == "statistics",
    }
    asked = [option for option, given in options.items() if given]
    for place, step in enumerate(config["steps"], 1):
        if isinstance(step, Int8) and step.qat_epochs:
            asked.append("--qat")
        elif not isinstance(step, Int8 | Fp8 | Fp16 | Bf16):
            asked.append(f"step {place} ({step.kind})")
    if asked:
        raise BadInput(
            f"{asked[0]} needs the network in PyTorch, and {file} is an ONNX file, whose weights are its own: drop it, "
            "or export the network itself with --arch package.module:factory"
        )
