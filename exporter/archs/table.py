"""The zoo as a table, recorded in a file so that listing it takes no time.

Run `python -m convoynet.exporter.archs.table` after adding or changing a network.
"""

import importlib
import json
import pkgutil
from typing import Any

import torch

from convoynet.exporter import archs, assets
from convoynet.exporter.archs.registry import registered


def networks() -> dict[str, str]:
    """The name of each network that a module here registers, and that module's name."""
    for module in pkgutil.iter_modules(archs.__path__):
        importlib.import_module(f"{archs.__name__}.{module.name}")
    own = f"{archs.__name__}."
    return {name: module.removeprefix(own) for name, module in sorted(registered().items()) if module.startswith(own)}


def row(name: str) -> dict[str, Any]:
    """What is recorded of the network called `name`; counts are for its default classes."""
    arch = archs.get(name)
    # On the meta device a network has shapes and no numbers, so that VGG costs no more than LeNet.
    with torch.device("meta"):
        count = archs.count(arch.build(arch.num_classes), arch.input_size)
    return {
        "name": arch.name,
        "module": networks()[name],
        "paper": arch.paper,
        "source": arch.source,
        "task": arch.task,
        "parameters": count.parameters,
        "macs": count.macs,
        "input_size": list(arch.input_size),
        "num_classes": arch.num_classes,
        "fixed_classes": arch.fixed_classes,
        "published_weights": arch.published_weights,
    }


def record() -> None:
    """Write the table of the whole registry into the package."""
    rows = [row(name) for name in networks()]
    assets.ZOO.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
