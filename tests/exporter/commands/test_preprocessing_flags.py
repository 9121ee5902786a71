"""The flags of preprocessing, as they are written on a command line."""

import argparse
from typing import Any

import pytest

from convoynet.exporter.commands import flags
from convoynet.exporter.commands.preprocessing_flags import add_preprocessing, take_preprocessing
from convoynet.exporter.errors import BadInput


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    flags.add_network(parser.add_argument_group("network"))
    add_preprocessing(parser.add_argument_group("preprocessing"))
    arguments = vars(parser.parse_args(["--arch", "x", *argv]))
    take_preprocessing(arguments)
    return arguments


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--resize", "256"], {"resize": 256}),
        (["--resize", "40x48"], {"resize": (40, 48)}),
        (["--crop", "0.875"], {"crop": 0.875, "input_size": None}),
        (["--crop", "87.5%"], {"crop": 0.875}),
        (["--crop", "1"], {"crop": 1.0}),
        (["--resize", "256", "--crop", "224"], {"resize": 256, "crop": None, "input_size": (224, 224)}),
        (["--crop", "224x192", "--input-size", "224x192"], {"crop": None, "input_size": (224, 192)}),
        (
            ["--interpolation", "lanczos", "--channel-order", "bgr"],
            {"interpolation": "lanczos", "channel_order": "bgr"},
        ),
        (["--mean", "0.5", "--std", "0.25"], {"mean": (0.5,), "std": (0.25,)}),
    ],
)
def test_are_read(argv: list[str], expected: dict[str, Any]) -> None:
    found = parsed(*argv)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "argv",
    [["--resize", "x"], ["--resize", "0"], ["--crop", "0"], ["--crop", "-1"], ["--crop", "1.5"], ["--mean", "a"]],
)
def test_what_cannot_be_read(argv: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError, match=r"is neither a share|is not"):
        parsed(*argv)


def test_two_sizes_of_the_input() -> None:
    with pytest.raises(
        BadInput, match="--crop 224x224 and --input-size 256x256: what is cut out is the network's input"
    ):
        parsed("--crop", "224", "--input-size", "256")
