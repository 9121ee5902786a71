"""The flags of `convoy export` that say what comes out of the network. Imports no heavy library."""

import argparse

from convoynet.exporter.outputs_asked import LEFT_OUT, LOGITS, TASKS


def add_outputs(group: argparse._ArgumentGroup) -> None:
    """Add what says what comes out of the network."""
    group.add_argument(
        "--outputs",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME[=LAYER],...",
        help=f"names for what a network returns, in its order ({LEFT_OUT} leaves one out), one of them {LOGITS}; "
        f"NAME=LAYER adds what an inner layer computes, as in {LOGITS},features=avgpool (default: the logits alone)",
    )
    group.add_argument(
        "--task",
        choices=tuple(TASKS),
        help="what the outputs mean, which decides what INT8 may lose: classes that exclude each other, labels "
        "that do not, numbers, or an embedding; of a network of your own also maps of classes, or boxes (default: as "
        "the network of the zoo says; else classes where --labels, --num-classes or --eval speak of them, or what the "
        "outputs look like)",
    )
    group.add_argument(
        "--explain",
        action="store_true",
        help="add an output that says where in the image the evidence for the winning class lies (Grad-CAM at the last "
        "map of features; classifiers alone)",
    )
    group.add_argument(
        "--features",
        action="store_true",
        help="add an output with the embedding of each image: what the last layer makes the scores of (classifiers "
        "alone)",
    )
