"""What the benchmarks of quantization take from the command line: a trained network, and images of class folders."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.data.images import calibration_images, labelled_images, load_images
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.running.runtime import Array


@dataclass(frozen=True)
class Trained:
    """A network: its float32 graph, uint8 NHWC images to calibrate and to test on, and the classes of the latter."""

    arch: Arch
    sha256: str
    graph: onnx.ModelProto
    images: Array
    pictures: Array
    labels: Array


def parser(text: str, *, samples: int, tests: int, tests_for: str = "test on") -> argparse.ArgumentParser:
    """The options that `load` reads."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arch", default="resnet20")
    made.add_argument("--weights", type=Path, required=True)
    made.add_argument("--calibration", type=Path, required=True, metavar="DIR")
    made.add_argument("--test", type=Path, required=True, metavar="DIR")
    made.add_argument("--samples", type=int, default=samples, help=f"images to calibrate on (default {samples})")
    made.add_argument("--tests", type=int, default=tests, help=f"images to {tests_for} (default {tests})")
    made.add_argument("--threads", type=int, default=1)
    return made


def load(options: argparse.Namespace, opset: int = 20) -> Trained:
    """Build the network, read its weights and the images, and export it."""
    torch.set_num_threads(options.threads)
    arch = archs.get(options.arch)
    module = arch.build(arch.num_classes)
    none = np.empty((0, *arch.preprocess.size, arch.preprocess.channels), np.uint8)
    loaded = weights.load(module, arch, str(options.weights), seed=0, images=none)
    return of_module(arch, arch.deploy(module), loaded.sha256, options, opset)


def of_module(arch: Arch, module: nn.Module, sha256: str, options: argparse.Namespace, opset: int = 20) -> Trained:
    """Read the images for a network with weights, and export it."""
    images, _ = calibration_images(arch.preprocess, options.calibration, options.samples, 0, arch.name)
    labelled = labelled_images(options.test, sorted(path.name for path in options.test.iterdir() if path.is_dir()))
    labelled = labelled[:: -(-len(labelled) // options.tests)]
    pictures = load_images([path for path, _ in labelled], arch.preprocess)
    graph = onnx_from_torch(module, arch.preprocess, uint8_input=False, opset=opset)
    return Trained(arch, sha256, graph, images, pictures, np.array([label for _, label in labelled]))
