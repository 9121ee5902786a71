"""The flags that say what is exported, from which images and for what: all that a sweep's recipes share with an export.

One place for the commands that export, so that a recipe gives the same in each. Imports no heavy library.
"""

import argparse
from typing import Any

from convoynet.exporter.commands import engine_flags, flags, output_flags, preprocessing_flags
from convoynet.exporter.config import default_target


def add_model(parser: argparse.ArgumentParser, *, recipes: bool = False) -> None:
    """Add them in groups; `recipes`, whether these say what the version and the steps of each export are."""
    network = parser.add_argument_group("network")
    flags.add_network(network)
    output_flags.add_outputs(network)
    preprocessing_flags.add_preprocessing(parser.add_argument_group("from an image to the network's input"))
    flags.add_result(parser.add_argument_group("result"), versioned=not recipes)
    flags.add_images(parser.add_argument_group("images"))
    if not recipes:
        flags.add_compression(parser.add_argument_group("compression, in this order"))
    engine_flags.add_engine(parser.add_argument_group("TensorRT engine (--format tensorrt)"))


def take_model(arguments: dict[str, Any]) -> None:
    """Make what was parsed of them, but the steps, the fields of an ExportConfig.

    Raises:
        BadInput: two flags contradict each other.
    """
    arguments["arch"] = arguments.pop("onnx") or arguments["arch"]
    engine_flags.take_batches(arguments)
    preprocessing_flags.take_preprocessing(arguments)
    arguments["target"] = arguments["target"] or default_target(arguments["format"])
