"""instance_group of config.pbtxt to the device of each engine of a model."""

from __future__ import annotations

from collections.abc import Sequence

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import Placement

_MOST = 256
"""Each is a process."""
_GROUP = pb.ModelInstanceGroup
_DEVICES = {_GROUP.KIND_AUTO: "auto", _GROUP.KIND_GPU: "gpu", _GROUP.KIND_CPU: "cpu"}


def placements(groups: Sequence[pb.ModelInstanceGroup], gpus: int) -> tuple[Placement, ...]:
    """Where each engine of a model runs, in the order of the groups; the groups are completed with what is assumed.

    As in Triton `count` is of each GPU that a group names, KIND_GPU without `gpus` is every GPU that there is, and
    KIND_AUTO with `gpus` is the CPU where one of them is missing.

    Args:
        groups: At least one; a `count` of 0 is 1.
        gpus: How many GPUs there are; 0 leaves it to the engine to say what it misses.

    Raises:
        InvalidModel: A kind that there is not here, or a GPU that there is not.
    """
    count = sum(max(group.count, 1) * max(len(group.gpus), 1) for group in groups)
    if count > _MOST:
        raise InvalidModel(f"instance_group asks for {count} engines, {_MOST} are allowed")
    return tuple(place for group in groups for place in _placed(group, gpus))


def _placed(group: pb.ModelInstanceGroup, gpus: int) -> list[Placement]:
    if group.kind not in _DEVICES:
        kind = _GROUP.Kind.Name(group.kind) if group.kind in _GROUP.Kind.values() else group.kind
        raise InvalidModel(f"instance_group must be of KIND_CPU, KIND_GPU or KIND_AUTO, got {kind}")
    group.count = max(group.count, 1)
    if group.kind == _GROUP.KIND_CPU and group.gpus:
        raise InvalidModel(f"instance_group of KIND_CPU names the GPUs {list(group.gpus)}: use KIND_GPU, or no gpus")
    if len(set(group.gpus)) < len(group.gpus) or min(group.gpus, default=0) < 0:
        raise InvalidModel(f"instance_group has gpus {list(group.gpus)}: each must be 0 or more and named once")
    missing = [gpu for gpu in group.gpus if gpu >= gpus]
    if group.kind == _GROUP.KIND_AUTO and missing:
        return [Placement("cpu")] * group.count
    if missing and gpus:
        raise InvalidModel(
            f"instance_group names GPU {missing[0]}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}, "
            "numbered from 0 as CUDA_VISIBLE_DEVICES leaves them"
        )
    if group.kind == _GROUP.KIND_GPU and not group.gpus:
        group.gpus.extend(range(gpus))
    device = _DEVICES[group.kind]
    return [Placement(device, (gpu,)) for gpu in group.gpus for _ in range(group.count)] or (
        [Placement(device)] * group.count
    )
