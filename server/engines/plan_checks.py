"""Whether a TensorRT plan fits the TensorRT and the GPU that are here; each refusal says how to rebuild it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from convoynet.server.engines.device import Device
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import PlanOptions

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""The modules that run plans, the preferred one first."""
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_AMPERE = (8, 0)
"""The least compute capability for which hardware-compatible plans are built."""
_MIB = 2**20


def rebuild(model: str) -> str:
    """What makes the plan of a model anew, for people."""
    return f"`convoy build models/{model}`"


def library(plan: PlanOptions, model: str) -> tuple[Any, str]:
    """The module that runs a plan, and what it is for people, with its version.

    Args:
        plan: What is known of it.
        model: Its model's name.

    Raises:
        InvalidModel: It is not installed, or of a version that does not run the plan.
    """
    here = [name for name in LIBRARIES if find_spec(name) is not None]
    wanted = plan.library or next(iter(here), LIBRARIES[0])
    if wanted not in here:
        other = f", or rebuild it with {_NAMES[here[0]]}, which is: {rebuild(model)}" if here else ""
        raise InvalidModel(
            f"its plan needs {_NAMES[wanted]}, which is not installed: pip install {_PACKAGES[wanted]}{other}"
        )
    try:
        module = import_module(wanted)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidModel(
            f"{_NAMES[wanted]} cannot be imported ({reason}): pip install --force-reinstall {_PACKAGES[wanted]}"
        ) from error
    _check_version(plan, model, wanted, module.__version__)
    return module, f"{_NAMES[wanted]} {module.__version__}"


def _check_version(plan: PlanOptions, model: str, name: str, here: str) -> None:
    if not plan.version or plan.version == here:
        return
    built, have = _numbers(plan.version), _numbers(here)
    if plan.version_compatible and built[:1] == have[:1] and built <= have:
        return
    later = " or later of the same major version" if plan.version_compatible else ""
    raise InvalidModel(
        f"its plan was built with {_NAMES[name]} {plan.version} and runs with that version{later} alone; here is "
        f"{here}: {rebuild(model)}, or pip install {_PACKAGES[name]}=={plan.version}"
    )


def check_gpu(plan: PlanOptions, device: Device, model: str) -> None:
    """Holds the GPU against the one that a plan was built on.

    Raises:
        InvalidModel: It does not run the plan.
    """
    built, here = plan.compute_capability, device.compute_capability
    if built in ("", "any", here) or (plan.hardware_compatible and _numbers(here) >= _AMPERE):
        return
    raise InvalidModel(
        f"its plan was built for GPUs of compute capability {built}; {device.name} has {here}: {rebuild(model)} on "
        "this machine, or build it with --hardware-compatible"
    )


def check_rows(most: int, profiles: list[tuple[int, int, int]], model: str) -> None:
    """Holds the largest batch that the config allows against the plan's optimization profiles.

    Raises:
        InvalidModel: No profile takes it.
    """
    if most > max(high for *_, high in profiles):
        stated = ",".join(":".join(map(str, profile)) for profile in profiles)
        raise InvalidModel(
            f"max_batch_size is {most}, but the profiles of the plan are {stated} (smallest, usual, largest batch): "
            f"lower max_batch_size, or raise tensorrt_profiles and run {rebuild(model)}"
        )


def check_memory(device: Device, nbytes: int, what: str) -> None:
    """Checks that the GPU has room before anything is allocated.

    Args:
        device: The GPU.
        nbytes: What is needed, in bytes.
        what: What for.

    Raises:
        InvalidModel: It has not.
    """
    free, total = device.memory()
    if nbytes > free:
        raise InvalidModel(
            f"{what} needs {-(-nbytes // _MIB)} MiB of the memory of {device.name}, of which {free // _MIB} of "
            f"{total // _MIB} MiB are free: lower max_batch_size or the count of instance_group, or serve fewer models"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) if word.isdecimal() and len(word) < 10 else 0 for word in version.split("."))
