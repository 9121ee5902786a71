"""The zoo as a table, recorded in a file so that listing it takes no time.

Run `python -m convoynet.exporter.archs.table` after adding or changing a network.
"""

import json
from typing import Any

import torch

from convoynet.exporter import archs, assets


def row(name: str) -> dict[str, Any]:
    """What `convoy archs` says about the network called `name`; counts are for its default classes."""
    arch = archs.get(name)
    # On the meta device a network has shapes and no numbers, so that VGG costs no more than LeNet.
    with torch.device("meta"):
        count = archs.count(arch.build(arch.num_classes), arch.input_size)
    return {
        "name": arch.name,
        "paper": arch.paper,
        "source": arch.source,
        "parameters": count.parameters,
        "macs": count.macs,
        "input_size": list(arch.input_size),
        "num_classes": arch.num_classes,
        "published_weights": arch.published is not None,
    }


def record() -> None:
    """Write the table of the whole registry into the package."""
    rows = [row(name) for name in archs.names()]
    assets.ZOO.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
