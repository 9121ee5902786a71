"""`convoynet.export`: an export for programs. `convoy export` parses its flags, and calls the same.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from convoynet.exporter.commands import flags, model_flags
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput, lacking
from convoynet.exporter.onnx_asked import is_onnx
from convoynet.exporter.recipe import Step

if TYPE_CHECKING:
    from torch import nn

    from convoynet.exporter.pipeline.pipeline import Published
    from convoynet.exporter.progress import Progress

# What stands between the numbers of a flag that takes several.
_BETWEEN = {"input_size": "x", "resize": "x", "crop": "x", "mean": ",", "std": ",", "outputs": ",", "batch": ":"}


_PLAIN = "what the flag takes, a text, a path or a number; pictures are files in a folder"


class _Keywords(argparse.ArgumentParser):
    """Reads keywords as the flags that they are called like."""

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch(r"argument --(.*): ignored explicit argument (.*)", message):
            message = f"{found[1].replace('-', '_')} is True or False, not {found[2]}"
        raise BadInput(message)


def export(
    network: str | Path | nn.Module,
    *,
    steps: Sequence[Step] | None = None,
    progress: bool = False,
    **options: Any,
) -> Published:
    """Turn a network into a verified, compressed model in a model repository, as `convoy export` does.

        published = convoynet.export(my_module.eval(), name="cats", int8=True, calibration="photos/")
        published.path                           # models/cats/1
        published.report.parity.top1_agreement   # and all that report.json says

    Args:
        network: a `torch.nn.Module` in memory, which stays as it is; or what `--arch` takes, such as "resnet50",
            "package.module:factory" or "FILE.pt2"; or the path of an ONNX file, as `--onnx` takes it.
        steps: the steps of compression and all their parameters (convoynet.exporter.recipe), in the place of flags.
        progress: whether to show what is done, on stderr.
        options: the flags of `convoy export`, by their names with underscores: `int8=True`, `calibration="photos/"`,
            `target="cpu"`, `mean=(0.5, 0.5, 0.5)`, `input_size=(256, 320)`, `batch=(1, 64)`, `max_drop=0.5`,
            `model_repository="models"` and all the others (docs/exporting.md). None and False are as if not given.
            A module in memory is named by its class unless there is a `name`.

    Returns:
        What was published: `path` (the folder of the version), `name`, `version` and the `report`.

    Raises:
        BadInput: an argument or a file is not usable.
        Refused: the result is too far from the network, or not fit for the runtime; nothing was published.
        Missing: a library or a device is not there.
    """
    from convoynet.exporter.progress import Quiet, Terminal

    config = config_of(_arguments(network, options))
    try:
        if steps is not None:
            if config.steps:
                raise BadInput(f"steps say what is done; drop {config.steps[0].kind} or them")
            config = replace(config, steps=tuple(steps))
        if not isinstance(network, str | Path):
            config = replace(config, network=_in_memory(network))
        return publish(config, Terminal() if progress else Quiet())
    except ImportError as error:
        raise lacking(error) from error


def config_of(arguments: dict[str, Any]) -> ExportConfig:
    """The export that parsed flags ask for.

    Raises:
        BadInput: naming the flag, its value and what is allowed.
    """
    model_flags.take_model(arguments)
    return ExportConfig(steps=flags.take_steps(arguments), **arguments)


def publish(config: ExportConfig, progress: Progress) -> Published:
    """Export, verify and publish; errors are those of `export`."""
    from convoynet.exporter.pipeline import first_look

    first_look.check(config)  # before the seconds that PyTorch takes

    from convoynet.exporter.pipeline import pipeline

    return pipeline.run(config, progress)


def _arguments(network: object, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the parser of `convoy export` has them."""
    if isinstance(network, str | Path):
        given = [f"--{'onnx' if is_onnx(str(network)) else 'arch'}={network}"]
    elif callable(getattr(network, "state_dict", None)):
        kind = type(network)
        given = [f"--arch={kind.__module__}:{kind.__qualname__}"]
    else:
        raise BadInput(f"network is of the type {type(network).__name__}: give a torch.nn.Module, a name or a file")
    for name, value in options.items():
        given += _as_flags(name, value)
    parser = _Keywords(prog="export", allow_abbrev=False, add_help=False)
    model_flags.add_model(parser)
    known, unknown = parser.parse_known_args(given)
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0].replace("-", "_")
        close = difflib.get_close_matches(name, [*vars(known), "model_repository", "batch"], n=1)
        hint = f"; did you mean {close[0]}?" if close else "; `convoy export --help` lists them"
        raise BadInput(f"export() has no option {name}{hint}")
    return vars(known)


def _as_flags(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if not isinstance(value, str | os.PathLike | Real | tuple | list):
        raise BadInput(f"{name} is of the type {type(value).__name__}: give {_PLAIN}")
    if isinstance(value, tuple | list):
        if name == "check_preprocessing":
            return [flag, *map(str, value)]
        if name == "batch" and not all(isinstance(size, int) for size in value):
            return [each for profile in value for each in _as_flags(name, profile)]
        value = _BETWEEN.get(name, ",").join(map(str, value))
    return [f"{flag}={value}"]


def _in_memory(network: nn.Module) -> nn.Module:
    """A copy on the CPU: what is done to it is not done to the caller's."""
    import torch

    from convoynet.exporter.archs.wrapped import copy_of

    if not isinstance(network, torch.nn.Module):
        raise BadInput(f"network is of the type {type(network).__name__}: give a torch.nn.Module, a name or a file")
    return copy_of(network).cpu()
