"""What can be asked of a TensorRT engine, checked before any work starts. Imports no heavy library."""

from collections.abc import Mapping
from typing import Any

from convoynet.exporter.engine_options import MAX_BATCH, OPTIMIZATION_LEVELS
from convoynet.exporter.errors import BadInput


def check(config: Mapping[str, Any]) -> None:
    """See that an engine's options go together, or that none is given; `config` are the fields of an ExportConfig.

    Raises:
        BadInput: naming the option, its value and what is allowed.
    """
    if config["format"] != "tensorrt":
        _require_no_options(config)
        return
    if config["target"] == "cpu":
        raise BadInput("--format tensorrt is for GPUs: drop --target cpu, or use --format onnx there")
    _check_profiles(config)
    level, workspace = config["optimization_level"], config["workspace_mib"]
    if level is not None and level not in OPTIMIZATION_LEVELS:
        raise BadInput(f"--optimization-level {level} is not in 0..{OPTIMIZATION_LEVELS.stop - 1}")
    if workspace is not None and workspace < 1:
        raise BadInput(f"--workspace-mib {workspace} is not 1 or more")
    if config["defer_build"] and config["timing_cache"] is not None:
        raise BadInput(
            f"--timing-cache {config['timing_cache']} is for a build here, and --defer-build leaves that to the "
            "server; drop one of them"
        )


def _require_no_options(config: Mapping[str, Any]) -> None:
    for option, value in (
        ("--batch with three numbers, or given several times,", config["profiles"]),
        ("--defer-build", config["defer_build"]),
        ("--optimization-level", config["optimization_level"] is not None),
        ("--workspace-mib", config["workspace_mib"] is not None),
        ("--timing-cache", config["timing_cache"]),
        ("--version-compatible", config["version_compatible"]),
        ("--hardware-compatible", config["hardware_compatible"]),
    ):
        if value:
            raise BadInput(f"{option} is for TensorRT engines: add --format tensorrt or drop it")


def _check_profiles(config: Mapping[str, Any]) -> None:
    """See that the profiles take every batch from one image up to the largest."""
    batch, profiles = config["batch"], config["profiles"]
    if batch is not None and profiles:
        raise BadInput("batch and profiles exclude each other; give profiles alone")
    given = sorted((one.smallest, one.largest, str(one)) for one in profiles)
    if batch is not None:
        given = [(*batch, "{}:{}".format(*batch))]
    reach = 0
    for low, high, text in given:
        if high > MAX_BATCH:
            raise BadInput(f"--batch {text} has more than {MAX_BATCH} images")
        if low > reach + 1:
            missing = f"{reach + 1}" if low == reach + 2 else f"{reach + 1} to {low - 1}"
            raise BadInput(
                f"--batch {text}: no profile of the engine takes a batch of {missing}, and a server forms all "
                f"sizes from 1 on; begin it at {reach + 1}"
            )
        reach = max(reach, high)
