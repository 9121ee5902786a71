"""What config.pbtxt says about scheduling, and every way in which it can be wrong."""

from __future__ import annotations

import pytest
from google.protobuf import text_format

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.batch_config import batch_policy
from convoynet.server.spec import BatchPolicy, QueuePolicy


def read(text: str) -> BatchPolicy:
    return batch_policy(text_format.Parse(text, pb.ModelConfig()), max_queue=7)


def parameter(name: str, value: str) -> str:
    return f'max_batch_size: 8 parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def test_a_silent_config() -> None:
    assert read("max_batch_size: 8") == BatchPolicy(8, 0.0, 7, levels=(QueuePolicy(7),))
    assert read("dynamic_batching { preferred_batch_size: 0 }").preferred == ()


def test_all_that_it_can_say() -> None:
    policy = read("""
        max_batch_size: 8
        dynamic_batching {
          preferred_batch_size: [8, 4]
          max_queue_delay_microseconds: 500
          preserve_ordering: true
          priority_levels: 3
          default_priority_level: 2
          default_queue_policy {
            default_timeout_microseconds: 2000000 timeout_action: DELAY allow_timeout_override: true
          }
          priority_queue_policy { key: 1 value { max_queue_size: 3 } }
        }
        parameters { key: "batch_buckets" value { string_value: "1, 4,8" } }
        parameters { key: "max_queue_bytes" value { string_value: "1000000" } }
        parameters { key: "latency_slo_ms" value { string_value: "12.5" } }
        """)
    late = QueuePolicy(7, 2.0, delays=True)
    assert policy == BatchPolicy(
        max_rows=8,
        max_delay_s=0.0005,
        max_queue=7,
        preferred=(4, 8),
        levels=(QueuePolicy(3), late, late),
        default_level=2,
        buckets=(1, 4, 8),
        max_queue_bytes=1_000_000,
        latency_slo_s=0.0125,
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_batch_size: 8 dynamic_batching { preferred_batch_size: [4, 9] }", "preferred_batch_size 9 .*8"),
        ("max_batch_size: 8 dynamic_batching { preferred_batch_size: -1 }", "preferred_batch_size -1"),
        ("dynamic_batching { priority_levels: 101 default_priority_level: 1 }", "priority_levels 101 are too many"),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level 0 does not lie in 1 to priority_levels, 2"),
        ("dynamic_batching { default_priority_level: 1 }", "default_priority_level 1 .* 0"),
        ("dynamic_batching { priority_queue_policy { key: 1 value { } } }", "priority_queue_policy of level 1 .* 0"),
        (parameter("batch_buckets", "4,2"), "'batch_buckets' must be ascending .*'4,2'"),
        (parameter("batch_buckets", "4,4"), "must be ascending"),
        (parameter("batch_buckets", "0,4"), "must be ascending"),
        (parameter("batch_buckets", "4,9"), "max_batch_size, 8"),
        (parameter("batch_buckets", "four"), "got 'four'"),
        (parameter("batch_buckets", ""), "got ''"),
        (parameter("max_queue_bytes", "1.5"), "'max_queue_bytes' must be a whole number above 0, got '1.5'"),
        (parameter("max_queue_bytes", "0"), "got '0'"),
        (parameter("latency_slo_ms", "-1"), "'latency_slo_ms' must be a number above 0, got '-1'"),
        (parameter("latency_slo_ms", "nan"), "got 'nan'"),
        (parameter("latency_slo_ms", "inf"), "got 'inf'"),
    ],
)
def test_a_setting_out_of_range_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        read(text)
