"""The flags of `convoy export`, and the steps of compression that they stand for. Imports no heavy library."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convoynet.exporter import recipe
from convoynet.exporter.commands.engine_flags import batch_option
from convoynet.exporter.config import (
    DEFAULT_OPSET,
    FORMATS,
    INPUTS,
    MADE_IMAGES,
    MAX_PIXELS,
    OPSETS,
    TARGETS,
)
from convoynet.exporter.engine_options import MAX_BATCH, USUAL_BATCH
from convoynet.exporter.errors import BadInput
from convoynet.exporter.onnx_asked import ONNX_SUFFIX, is_onnx
from convoynet.exporter.recipe import (
    CALIBRATION_METHODS,
    DEFAULT_METHOD,
    ORIGINAL,
    PRUNE_METHODS,
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
)

# What recovery on a few hundred unlabelled images takes: a CPU minute for a small network.
RECOVERY_STEPS = 150
_QAT_EPOCHS = 2
# Flags that say how a step works, and the flag that asks for the step.
_BELONG_TO = {
    "prune_method": ("prune",),
    "reconstruct": ("prune",),
    "calibration_method": ("int8", "fp8"),
    "keep_biases": ("int8",),
    "refine": ("int8",),
    "adaround": ("int8",),
    "qat": ("int8",),
}
_NAMES = (
    "separable", "prune", "prune_method", "reconstruct", "low_rank", "sparsity", "epochs", "distill", "int8", "fp8",
    "fp16", "bf16", "calibration_method", "keep_biases", "refine", "adaround", "qat",
)  # fmt: skip


def add_network(group: argparse._ArgumentGroup) -> None:
    """Add what says which network it is."""
    named = group.add_mutually_exclusive_group(required=True)
    named.add_argument(
        "--arch",
        metavar="NAME|timm:NAME|MODULE:FACTORY|FILE.pt2",
        help="a network that `convoy archs` lists; timm:NAME, torchvision:NAME or hf-hub:OWNER/NAME, with the "
        "library's own preprocessing and labels (`convoy archs --all` lists 1,400); your own function that returns "
        "one, such as package.module:factory, found from the current directory; or a file of torch.export.save, which "
        "may run code: open only those that you trust",
    )
    named.add_argument(
        "--onnx",
        type=onnx_file,
        metavar="FILE.onnx",
        help="in the place of --arch: an ONNX file of any exporter, which is the reference then; it is linted, "
        "cleaned, quantized and verified against itself. What changes or trains a network needs PyTorch's",
    )
    group.add_argument(
        "--weights",
        default="default",
        metavar="default|random|FILE",
        help="published weights (the default, may download; of your own network those that it was built with), "
        "random ones, or a checkpoint: .pt .pth .th .safetensors, read without running code from it",
    )
    group.add_argument(
        "--ema", action="store_true", help="take the averaged weights of a checkpoint that has both (state_dict_ema)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights and made images (default 0)")
    group.add_argument("--num-classes", type=int, metavar="N", help="size of the output (default: the network's)")
    group.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, one a line, in the order of the outputs"
    )
    group.add_argument(
        "--input-size",
        type=size_option,
        metavar="H[xW]",
        help="size of the image in pixels, such as 384 or 256x320, where the network takes it (default: the "
        "network's; 224 for your own)",
    )
    group.add_argument(
        "--fully-convolutional",
        action="store_true",
        help="turn the fully connected layers of VGG, AlexNet and the like into convolutions: an image larger than "
        "the network's own gives a map of logits",
    )


def onnx_file(text: str) -> str:
    """Read the name of an ONNX file."""
    if not is_onnx(text):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {ONNX_SUFFIX}; give the file such a name")
    return text


def size_option(text: str) -> tuple[int, int]:
    """Read a size in pixels, H or HxW, as (height, width)."""
    height, cross, width = text.partition("x")
    try:
        size = int(height), int(width if cross else height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not H or HxW, like 384 or 256x320") from error
    if not all(1 <= pixels <= MAX_PIXELS for pixels in size):
        raise argparse.ArgumentTypeError(f"{text!r} is not within 1 and {MAX_PIXELS} pixels")
    return size


def add_result(group: argparse._ArgumentGroup, *, versioned: bool = True) -> None:
    """Add what says where the model goes, and for what; `versioned`, whether one can choose a version."""
    group.add_argument(
        "--model-repository",
        dest="repository",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="where to publish (default models)",
    )
    group.add_argument(
        "--name",
        default="",
        metavar="NAME",
        help="the model's name there (default: the arch, the factory or the file's stem)",
    )
    if versioned:
        group.add_argument("--version", type=int, metavar="N", help="version to publish (default: the next)")
        group.add_argument("--force", action="store_true", help="replace --version where it exists")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx (the default), or tensorrt: an engine for NVIDIA GPUs, and its graph beside it",
    )
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="machine that will run it; decides how INT8 is written, and a model made for one is slow or wrong on "
        "the other (default: gpu where an NVIDIA GPU is found or the format is tensorrt, else cpu)",
    )
    group.add_argument(
        "--input",
        choices=INPUTS,
        default="float32",
        help="float32: clients normalise; uint8: clients send pixels, a quarter of the bytes (default float32)",
    )
    group.add_argument(
        "--batch",
        dest="batches",
        action="append",
        default=[],
        type=batch_option,
        metavar="MIN[:USUAL]:MAX",
        help=f"batch sizes that the model must take, at most {MAX_BATCH} (default 1:32; segmentation 1:8, "
        f"detection 1:4). A TensorRT engine is tuned for USUAL (default {USUAL_BATCH}), and may have several of these, "
        "each a profile",
    )
    group.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help=f"ONNX operator set, {OPSETS.start} to {OPSETS.stop - 1} (default {DEFAULT_OPSET}, or what a step needs)",
    )


def add_images(group: argparse._ArgumentGroup) -> None:
    """Add what says where images are, and what is measured on them."""
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="typical images, at any depth; they set the INT8 ranges and check the result "
        "(default: packaged or made ones, which suit a trial only)",
    )
    group.add_argument(
        "--calibration-samples",
        type=int,
        default=256,
        metavar="N",
        help="images to calibrate on; more takes longer (default 256)",
    )
    group.add_argument(
        "--made-images",
        choices=MADE_IMAGES,
        help="what stands in for --calibration: images made from the statistics of a trained network's batch norms, in "
        "up to two minutes, or noise (default: statistics for --int8 and --fp8, where the network has them)",
    )
    group.add_argument(
        "--finetune",
        type=Path,
        metavar="DIR",
        help="images to train on, in class folders, or without them for distillation alone; without this, a network "
        "that was pruned, factorized or made sparse is distilled on the images of --calibration",
    )
    group.add_argument(
        "--eval", type=Path, metavar="DIR", help="class folders to measure accuracy on, before and after"
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="refuse when top-1 on --eval falls by more percentage points than this; INT8 and FP8 first leave as many "
        "layers in higher precision as that takes",
    )


def add_compression(group: argparse._ArgumentGroup) -> None:
    """Add the steps, in the order in which they are done."""
    group.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE.toml",
        help="the steps and all their parameters, in the place of the flags below; every report.json holds one",
    )
    group.add_argument(
        "--separable",
        action="store_true",
        help="replace standard convolutions by depthwise-separable ones; needs training to be of use",
    )
    group.add_argument(
        "--prune",
        type=float,
        metavar="RATIO",
        help="remove channels until this share of the multiply-adds is gone, such as 0.5",
    )
    group.add_argument(
        "--prune-method",
        choices=PRUNE_METHODS,
        help="which channels go: small weights, small batch-norm scales, little effect on the loss by its gradient or "
        "on the answers by trying, or any (default magnitude)",
    )
    group.add_argument(
        "--reconstruct",
        action="store_true",
        help="then fit the weights that are left to what each layer made before, on the images of --calibration",
    )
    group.add_argument(
        "--low-rank",
        type=float,
        metavar="RATIO",
        help="factorize layers so that this share of their parameters is gone, where that is measured to be faster",
    )
    group.add_argument(
        "--sparsity",
        metavar=f"{SPARSE_PATTERN}|RATIO",
        help=f"zero single weights: {SPARSE_PATTERN} for the sparse tensor cores of GPUs, or a share of each layer",
    )
    group.add_argument("--epochs", type=int, metavar="N", help="passes over --finetune's images (default 10)")
    group.add_argument(
        "--distill",
        nargs="?",
        const=ORIGINAL,
        metavar="TEACHER",
        help="train towards the outputs of a teacher: the network as it was (the default, and after a step that "
        "changed it always on), or NAME or NAME:WEIGHTS of the zoo",
    )
    _add_precision(group)


def _add_precision(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--int8", action="store_true", help="quantize weights and activations to 8 bits")
    group.add_argument("--fp8", action="store_true", help="quantize to 8-bit floating point, for GPUs that have it")
    group.add_argument("--fp16", action="store_true", help="half precision for all, or for what --int8 leaves; GPUs")
    group.add_argument("--bf16", action="store_true", help="bfloat16 for all; GPUs")
    group.add_argument(
        "--calibration-method",
        choices=CALIBRATION_METHODS,
        help="how to choose the range of each activation: minmax keeps the largest value, percentile cuts the rarest "
        f"off, entropy and mse clip where least is lost, auto tries all for each tensor and takes longer (default "
        f"{DEFAULT_METHOD})",
    )
    group.add_argument(
        "--keep-biases",
        action="store_true",
        help="with --int8, leave out what every export does where measurement says that it helps: moving all biases "
        "at once by what rounding did to the means",
    )
    group.add_argument(
        "--refine",
        action="store_true",
        help="equalize layers and correct biases before --int8, each where measurement says that it helps; minutes for "
        "an ImageNet network, and half a decibel or so",
    )
    group.add_argument(
        "--adaround",
        action="store_true",
        help="learn which way to round each weight, layer by layer; minutes, and better INT8",
    )
    group.add_argument(
        "--qat",
        nargs="?",
        type=int,
        const=_QAT_EPOCHS,
        metavar="EPOCHS",
        help=f"fine-tune with the rounding in the loop, on --finetune's or --calibration's images (default "
        f"{_QAT_EPOCHS} epochs)",
    )


def take_steps(arguments: dict[str, Any]) -> tuple[Step, ...]:
    """Take the flags of `add_compression` that describe steps out of parsed `arguments`, and return the steps.

    Raises:
        BadInput: a flag that belongs to a step that is not asked for, or flags beside a recipe.
    """
    path = arguments.pop("recipe")
    given = {name: arguments.pop(name) for name in _NAMES}
    named = [name for name, value in given.items() if value not in (None, False)]
    if path is not None:
        if named:
            raise BadInput(f"--recipe {path} says what the steps are; drop {_flag(named[0])} or the recipe")
        return recipe.load(path)
    for name, owners in _BELONG_TO.items():
        if name in named and not set(owners) & set(named):
            raise BadInput(f"{_flag(name)} does nothing without {' or '.join(map(_flag, owners))}; add it or drop this")
    structure = _structure(given)
    training = _training(given, structure, arguments)
    steps = (*structure, *training, *_precision(given))
    recipe.check_order(steps)
    return steps


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _structure(given: Mapping[str, Any]) -> list[Step]:
    steps: list[Step] = []
    if given["separable"]:
        steps.append(Separable())
    if given["prune"] is not None:
        method, reconstruct = given["prune_method"] or "magnitude", given["reconstruct"]
        steps.append(Prune(given["prune"], method=method, reconstruct=reconstruct))
    if given["low_rank"] is not None:
        steps.append(LowRank(given["low_rank"]))
    if (sparsity := given["sparsity"]) is not None:
        steps.append(Sparsify() if sparsity == SPARSE_PATTERN else Sparsify("unstructured", _share(sparsity)))
    return steps


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"--sparsity {text!r} is neither {SPARSE_PATTERN} nor a share such as 0.8") from error


def _training(given: Mapping[str, Any], structure: list[Step], arguments: Mapping[str, Any]) -> list[Step]:
    """The fine-tuning that the flags ask for, or that a changed network needs, where there are images for it."""
    epochs, teacher, folder = given["epochs"], given["distill"], arguments["finetune"]
    if folder is None and arguments["calibration"] is None:
        if epochs is not None or teacher is not None:
            name = "epochs" if epochs is not None else "distill"
            raise BadInput(f"{_flag(name)} needs images to train on: add --finetune DIR")
        return []
    asked = epochs is not None or teacher is not None or (folder is not None and given["qat"] is None)
    if not asked and not structure:
        return []
    length = {"epochs": epochs} if epochs is not None else {} if folder is not None else {"steps": RECOVERY_STEPS}
    distill = teacher is not None or bool(structure) or folder is None
    return [Finetune(**length, distill=distill, teacher=teacher or ORIGINAL)]


def _precision(given: Mapping[str, Any]) -> list[Step]:
    method = {"method": given["calibration_method"]} if given["calibration_method"] else {}
    steps: list[Step] = []
    if given["int8"]:
        refine = given["refine"]
        qat_epochs = given["qat"] or 0
        means = not given["keep_biases"]
        steps.append(
            Int8(
                **method, equalize=refine, correct_means=means, correct_bias=refine, adaround=given["adaround"],
                qat_epochs=qat_epochs,
            )
        )  # fmt: skip
    if given["fp8"]:
        steps.append(Fp8(**method))
    if given["fp16"]:
        steps.append(Fp16())
    if given["bf16"]:
        steps.append(Bf16())
    return steps
