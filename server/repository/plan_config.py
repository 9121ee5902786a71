"""config.pbtxt's parameters of a TensorRT plan, to PlanOptions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.engines.plan_checks import LIBRARIES, rebuild
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.parameters import choice, text
from convoynet.server.spec import Placement, PlanOptions

_PROFILE = re.compile(r"([1-9][0-9]{0,5}):([1-9][0-9]{0,5}):([1-9][0-9]{0,5})")
_BUILD_NUMBERS = {"tensorrt_optimization_level": "--optimization-level", "tensorrt_workspace_mib": "--workspace-mib"}
_BUILD_SWITCHES = {
    "tensorrt_version_compatible": "--version-compatible",
    "tensorrt_hardware_compatible": "--hardware-compatible",
    "tensorrt_sparse_weights": "--sparse-weights",
}


def of_plans(places: Sequence[Placement]) -> tuple[tuple[Placement, ...], int]:
    """The engine processes of a plan, and the batches that each takes at a time.

    The instances on one GPU are execution contexts of one process. Of a context's two batches one is copied while the
    other is computed.
    """
    contexts = Counter(places)
    return tuple(contexts), 2 * max(contexts.values())


def plan_options(config: pb.ModelConfig) -> PlanOptions:
    """What a config says of its plan.

    Raises:
        InvalidModel: A parameter is none of those that it may be, or the profiles do not hold `max_batch_size`.
    """
    deferred = choice(config, "tensorrt_build", ("", "deferred")) == "deferred"
    profiles = _profiles(config, required=deferred)
    return PlanOptions(
        library=choice(config, "tensorrt_library", ("", *LIBRARIES)),
        version=text(config, "tensorrt_version"),
        compute_capability=text(config, "compute_capability"),
        profiles=profiles,
        version_compatible=_truth(config, "version_compatible"),
        hardware_compatible=_truth(config, "hardware_compatible"),
        cuda_graphs=_truth(config, "cuda_graphs", "true"),
        build=_build_flags(config, profiles) if deferred else None,
    )


def _profiles(config: pb.ModelConfig, *, required: bool) -> tuple[tuple[int, int, int], ...]:
    stated = text(config, "tensorrt_profiles")
    if not stated and not required:
        return ()
    found = []
    for word in stated.split(","):
        match = _PROFILE.fullmatch(word.strip())
        sizes = tuple(map(int, match.groups())) if match else (1, 0, 0)
        if not sizes[0] <= sizes[1] <= sizes[2]:
            raise InvalidModel(
                "parameter 'tensorrt_profiles' must be the smallest, usual and largest batch of each profile, such as "
                f"'1:8:64' or '1:1:1,2:16:64'; got {stated!r}"
            )
        found.append((sizes[0], sizes[1], sizes[2]))
    most = max(largest for *_, largest in found)
    if config.max_batch_size > most:
        raise InvalidModel(
            f"max_batch_size is {config.max_batch_size}, but the plan takes batches up to {most} (tensorrt_profiles "
            f"'{stated}'): lower max_batch_size, or raise tensorrt_profiles and run {rebuild(config.name)}"
        )
    return tuple(found)


def _build_flags(config: pb.ModelConfig, profiles: tuple[tuple[int, int, int], ...]) -> tuple[str, ...]:
    flags = [word for profile in profiles for word in ("--batch", ":".join(map(str, profile)))]
    for parameter, flag in _BUILD_NUMBERS.items():
        if number := text(config, parameter):
            if not number.isdecimal():
                raise InvalidModel(f"parameter '{parameter}' must be a number of at least 0, got {number!r}")
            flags += [flag, number]
    return (*flags, *(flag for name, flag in _BUILD_SWITCHES.items() if _truth(config, name)))


def _truth(config: pb.ModelConfig, parameter: str, default: str = "false") -> bool:
    other = "true" if default == "false" else "false"
    return choice(config, parameter, (default, other)) == "true"
