"""config.pbtxt's dynamic_batching and its parameters for scheduling, to a BatchPolicy."""

from __future__ import annotations

import math

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import BatchPolicy, QueuePolicy

_MOST_LEVELS = 100


def batch_policy(config: pb.ModelConfig, max_queue: int, latency_slo_s: float = 0.0) -> BatchPolicy:
    """How the requests of a model are scheduled.

    Args:
        config: Of the model.
        max_queue: Requests that may wait where the config does not say.
        latency_slo_s: The latency that admission keeps, in seconds, where the config does not say.

    Raises:
        InvalidModel: A setting is out of range.
    """
    batching = config.dynamic_batching
    levels = _levels(batching, max_queue)
    default = max(batching.default_priority_level, 1)
    return BatchPolicy(
        max_rows=config.max_batch_size,
        max_delay_s=batching.max_queue_delay_microseconds / 1e6,
        max_queue=levels[default - 1].max_queue,
        preferred=_preferred(config),
        levels=levels,
        default_level=default,
        buckets=_buckets(config),
        max_queue_bytes=int(_number(config, "max_queue_bytes", BatchPolicy.max_queue_bytes, whole=True)),
        latency_slo_s=_number(config, "latency_slo_ms", latency_slo_s * 1e3) / 1e3,
    )


def _preferred(config: pb.ModelConfig) -> tuple[int, ...]:
    most = config.max_batch_size
    sizes = config.dynamic_batching.preferred_batch_size
    if most and (wrong := [size for size in sizes if not 1 <= size <= most]):
        raise InvalidModel(f"preferred_batch_size {wrong[0]} does not lie in 1 to max_batch_size, {most}")
    return tuple(sorted(set(sizes))) if most else ()


def _levels(batching: pb.ModelDynamicBatching, max_queue: int) -> tuple[QueuePolicy, ...]:
    """One policy for each priority level, the highest first."""
    count, default = batching.priority_levels, batching.default_priority_level
    if count > _MOST_LEVELS:
        raise InvalidModel(f"priority_levels {count} are too many; {_MOST_LEVELS} at most")
    if (count or default) and not 1 <= default <= count:
        raise InvalidModel(f"default_priority_level {default} does not lie in 1 to priority_levels, {count}")
    own = batching.priority_queue_policy
    if absent := sorted(level for level in own if not 1 <= level <= count):
        raise InvalidModel(f"priority_queue_policy of level {absent[0]} does not lie in 1 to priority_levels, {count}")
    return tuple(
        _queue_policy(own.get(level, batching.default_queue_policy), max_queue) for level in range(1, max(count, 1) + 1)
    )


def _queue_policy(policy: pb.ModelQueuePolicy, max_queue: int) -> QueuePolicy:
    return QueuePolicy(
        max_queue=policy.max_queue_size or max_queue,
        timeout_s=policy.default_timeout_microseconds / 1e6,
        delays=policy.timeout_action == pb.ModelQueuePolicy.DELAY,
    )


def _buckets(config: pb.ModelConfig) -> tuple[int, ...]:
    if "batch_buckets" not in config.parameters:
        return ()
    text, most = config.parameters["batch_buckets"].string_value, config.max_batch_size
    sizes = [int(word) if word.isdecimal() and len(word) < 10 else 0 for word in text.replace(",", " ").split()]
    if not sizes or sizes != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= most:
        raise InvalidModel(
            f"parameter 'batch_buckets' must be ascending batch sizes from 1 to max_batch_size, {most}, such as "
            f"'1,4,8'; got {text!r}"
        )
    return tuple(sizes)


def _number(config: pb.ModelConfig, parameter: str, default: float, whole: bool = False) -> float:
    if parameter not in config.parameters:
        return default
    text = config.parameters[parameter].string_value
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        kind = "a whole number" if whole else "a number"
        raise InvalidModel(f"parameter '{parameter}' must be {kind} above 0, got {text!r}")
    return value
