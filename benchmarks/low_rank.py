"""What low-rank factorization does to a trained network: parameters, likeness, and where it does not pay.

    python benchmarks/low_rank.py --train train/ --images train/ --test test/
    python benchmarks/low_rank.py --arch vgg16 --weights vgg16.pt --images photos/

The fully connected layers of VGG-16 (or --layers of any --arch) lose the share --ratio of their parameters, once by
the singular values of the weights alone and once by what their outputs are on some of the images; the logits of both
are compared with the network's own on other images, those of --test where it is given. Then the gate measures every
layer of every kind in ONNX Runtime and refuses what is not faster. Random weights have a flat spectrum and say nothing:
the weights must be trained ones. Without --weights, VGG-16 with batch normalisation for 32x32 images is trained here
on the class folders --train. Figures go into benchmarks/results/low-rank-ARCH.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import small_images
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.compression.latency import seconds_of
from convoynet.exporter.compression.low_rank import factorize
from convoynet.exporter.data.images import calibration_images, labelled_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence import accuracy, report
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Terminal
from convoynet.exporter.recipe import LOW_RANK_LAYERS, LowRank
from convoynet.exporter.running.pictures import Pictures, divide
from convoynet.exporter.running.runtime import Eager

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BATCH = 16


def network(options: argparse.Namespace) -> tuple[Arch, nn.Module, dict[str, Any]]:
    """The trained network, and what the file says of its weights."""
    if options.weights is None:
        arch = small_images.vgg16()
        module, training = small_images.trained(arch, options)
        return arch, module, {"training": training}
    arch = archs.get(options.arch)
    module = arch.build(options.num_classes or arch.num_classes)
    none = np.empty((0, *arch.preprocess.size, arch.preprocess.channels), np.uint8)
    loaded = weights.load(module, arch, options.weights, seed=0, images=none)
    return arch, arch.deploy(module).eval(), {"weights_sha256": loaded.sha256}


def divided(options: argparse.Namespace, arch: Arch) -> Pictures:
    """Images to factorize by, and others to compare on."""
    if options.test is not None:
        (seen, source), (check, check_source) = (
            calibration_images(arch.preprocess, folder, count, 0, arch.name)
            for folder, count in ((options.images, options.samples), (options.test, options.checks))
        )
        return Pictures(seen, check, source, check_source)
    images, source = calibration_images(arch.preprocess, options.images, options.samples + options.checks, 0, arch.name)
    if len(images) < 2:
        raise BadInput(f"--images {options.images} has {len(images)} image: some to factorize by, others to check on")
    return divide(images, source, options.samples, options.checks)


def _told(source: str, options: argparse.Namespace) -> str:
    """Where images are from, by the names of the folders: where these lie is nobody's business."""
    for folder in (options.images, options.test):
        source = source.replace(str(folder), Path(str(folder)).name)
    return source


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Factorize in both ways, compare, time, and let the gate decide."""
    arch, module, weights_of = network(options)
    pictures = divided(options, arch)
    seen, held_out = (
        torch.from_numpy(arch.preprocess.normalize(part)).split(BATCH)
        for part in (pictures.calibration, pictures.check)
    )
    example = torch.zeros(1, *arch.input_size)
    clock = partial(seconds_of, threads=options.threads, rounds=options.rounds)
    step = LowRank(ratio=options.ratio, layers=tuple(options.layers), gate=False)
    reference = logits(module, held_out)
    variants: dict[str, nn.Module] = {"as it is": module}
    rows: dict[str, dict[str, Any]] = {}
    for name, given in (("weights", None), ("weights and images", seen)):
        smaller, done = factorize(module, example, step, images=given, progress=Terminal())
        variants[name] = smaller
        before, after = (
            sum(row["parameters"][when if row["kept"] else "before"] for row in done["layers"])
            for when in ("before", "after")
        )
        rows[name] = {
            "parameters_of_these_layers": {"before": before, "after": after},
            "parameters": done["parameters"],
            "layers": done["layers"],
            "ranks_of_99_percent": ranks(module, example, options.layers, given),
        } | likeness(reference, logits(smaller, held_out))
    accuracies = top1(variants, arch, options.test)
    graphs = [
        onnx_from_torch(variant, arch.preprocess, uint8_input=False, task=arch.task).SerializeToString()
        for variant in variants.values()
    ]
    seconds = dict(zip(variants, clock(graphs), strict=True))
    _, gated = factorize(module, example, LowRank(ratio=options.ratio), seconds=clock, progress=Terminal())
    return {
        "arch": arch.name,
        **weights_of,
        "ratio": options.ratio,
        "layers": options.layers,
        "images": {
            "factorized_by": _told(pictures.calibration_source, options),
            "checked_on": _told(pictures.check_source, options),
        },
        "factorized": rows,
        "top1": accuracies,
        "seconds_of_one_image": seconds,
        "gate": gated["layers"],
        "environment": report.environment(options.threads),
    }


def ranks(
    module: nn.Module, example: Tensor, layers: Sequence[str], images: Sequence[Tensor] | None
) -> dict[str, list[int]]:
    """The least rank of each layer that has 99 % of the energy: of its weights, or of its outputs on images."""
    step = LowRank(energy=0.99, layers=tuple(layers), gate=False)
    _, done = factorize(module, example, step, images=images, progress=Terminal())
    return {row["layer"]: row["rank"] for row in done["layers"]}


def top1(variants: dict[str, nn.Module], arch: Arch, folder: Path | None) -> dict[str, float]:
    """The share of the images in class folders that each network gets right; none without a folder."""
    if folder is None:
        return {}
    labelled = labelled_images(folder, arch.labels())
    runners = [Eager(module, arch.preprocess) for module in variants.values()]
    rates = accuracy.hit_rates(runners, labelled, arch.preprocess, Terminal())
    return {name: first for name, (first, _) in zip(variants, rates, strict=True)}


def logits(module: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """float64 [n, classes]."""
    with torch.no_grad():
        return torch.cat([module(batch).flatten(1) for batch in images]).double()


def likeness(reference: Tensor, found: Tensor) -> dict[str, float]:
    """How alike two sets of logits are, image by image."""
    cosines = nn.functional.cosine_similarity(reference, found).numpy()
    same = reference.argmax(1) == found.argmax(1)
    return {
        "mean_cosine": float(cosines.mean()),
        "min_cosine": float(np.min(cosines)),
        "top1_agreement": float(same.double().mean()),
    }


def show(found: dict[str, Any]) -> None:
    """Print both tables."""
    table = Table(title=f"{found['arch']}: {', '.join(found['layers'])} layers, {found['ratio']:.0%} less")
    for column in ("by", "their parameters", "times", "mean cosine", "least", "same class", "top-1", "ms"):
        table.add_column(column, justify="right")
    for name, row in found["factorized"].items():
        before, after = (row["parameters_of_these_layers"][when] for when in ("before", "after"))
        figures = [f"{before / 1e6:.2f} M → {after / 1e6:.2f} M", f"{before / max(after, 1):.1f}"]
        figures += [f"{row['mean_cosine']:.4f}", f"{row['min_cosine']:.4f}", f"{row['top1_agreement']:.1%}"]
        whole, smaller = (found["seconds_of_one_image"][key] for key in ("as it is", name))
        accuracy = " → ".join(f"{found['top1'][key]:.2%}" for key in ("as it is", name)) if found["top1"] else ""
        table.add_row(name, *figures, accuracy, f"{1e3 * whole:.2f} → {1e3 * smaller:.2f}")
    Console().print(table)
    gate = Table(title="the gate")
    for column in ("layer", "shape", "rank", "us", "kept"):
        gate.add_column(column)
    for row in found["gate"]:
        times = row.get("seconds")
        text = f"{1e6 * times['before']:.1f} → {1e6 * times['after']:.1f}" if times else ""
        shape, rank = ("x".join(map(str, row[key])) for key in ("shape", "rank"))
        gate.add_row(row["layer"], shape, rank, text, "yes" if row["kept"] else "no")
    Console().print(gate)


def main() -> None:
    """Measure, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vgg16")
    parser.add_argument("--weights", metavar="FILE", help="trained weights of the network")
    small_images.add_training(parser, epochs=2, lr=0.02, required=False)
    parser.add_argument("--num-classes", type=int, help="of the weights (default: the network's own)")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="images, at any depth")
    parser.add_argument("--test", type=Path, metavar="DIR", help="class folders, to compare and to measure accuracy on")
    parser.add_argument("--samples", type=int, default=256, help="images to factorize by (default 256)")
    parser.add_argument("--checks", type=int, default=256, help="other images to compare on (default 256)")
    parser.add_argument("--ratio", type=float, default=0.8, help="share of parameters to remove (default 0.8)")
    parser.add_argument("--layers", nargs="+", default=["linear"], choices=LOW_RANK_LAYERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="measurements, of which the median counts (default 15)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    if options.weights is None and options.train is None:
        parser.error("give --weights FILE, or --train DIR to train VGG-16 here")
    torch.set_num_threads(options.threads)
    found = measure(options)
    show(found)
    path = options.results / f"low-rank-{found['arch']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
