"""Configs that ask for more than there may be: refused with one line before anything is made of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.protobuf import text_format

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.models.core import Core
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.repository import Repository
from convoynet.server.repository.warmup import warmup_shapes, warmup_sizes
from tests.server.repositories import DEFAULTS, Stage, write_plain


async def _reason(root: Path) -> str:
    try:
        (found,) = await Repository([Folder(root)], DEFAULTS).read("m")
    except InvalidModel as error:
        return str(error)
    return found.reason


MANY = "".join(f'input {{ name: "i{n}" data_type: TYPE_FP32 dims: [1] }} ' for n in range(4096))
LARGE = (
    'model_warmup { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: [300000, 300000] } } }'
)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            'model_warmup { name: "w" batch_size: 1000000000 }',
            "model_warmup 'w' has batch_size 1000000000, max_batch_size is 8",
        ),
        (LARGE, "model_warmup 'w' takes 360000000000 bytes, 1073741824 may wait"),
        ('input { name: "z" data_type: TYPE_FP32 dims: [300000, 300000] }', "one row of its inputs takes 3600000000"),
        ("instance_group { count: 257 kind: KIND_CPU }", "asks for 257 engines, 256 are allowed"),
        ("instance_group { count: 100 } instance_group { count: 200 }", "asks for 300 engines"),
        (MANY, "states 4097 inputs, 4096 are allowed"),
        (f'output {{ name: "{"n" * 2000}" data_type: TYPE_FP32 dims: [1] }}', "has 2000 characters, 1024 are allowed"),
        (
            'parameters { key: "intra_op_thread_count" value { string_value: "100000000" } }',
            "must be a whole number of 0",
        ),
        (f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{"9" * 5000}" }} }}', "0 to 1024"),
        ('parameters { key: "intra_op_thread_count" value { string_value: "\u0663" } }', "0 to 1024"),
        (f'parameters {{ key: "batch_buckets" value {{ string_value: "{"9" * 5000}" }} }}', "must be ascending"),
        ("#" * 2**20, "config.pbtxt is larger than 1048576 bytes"),
    ],
)
async def test_what_is_too_much_is_refused(tmp_path: Path, config: str, reason: str) -> None:
    write_plain(tmp_path, "m", config=config)
    assert reason in await _reason(tmp_path)


async def test_an_ensemble_of_too_many_steps_is_refused(tmp_path: Path) -> None:
    tensor = "data_type: TYPE_FP32 dims: [1]"
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text(
        f'platform: "ensemble" input {{ name: "x" {tensor} }} output {{ name: "y" {tensor} }} ensemble_scheduling {{'
        + "step { model_name: 'a' }" * 1025
        + "}"
    )
    assert await _reason(tmp_path) == "an ensemble may have 1024 steps, this one has 1025"


async def test_a_warm_up_that_nobody_asked_for_is_no_larger_than_it_need_be(tmp_path: Path) -> None:
    home = write_plain(tmp_path, "m", dims=2**20)
    (home / "config.pbtxt").write_text((home / "config.pbtxt").read_text().replace("size: 8", "size: 2147483647"))
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("m")
    assert found.spec is not None
    assert found.spec.warmup == (1, 64)
    assert found.spec.batch.max_rows == 2**31 - 1


@pytest.mark.parametrize(("stated", "threads"), [("0", DEFAULTS.threads), (" 3 ", 3), ("1024", 1024)])
async def test_a_thread_count_of_0_is_the_default(tmp_path: Path, stated: str, threads: int) -> None:
    config = f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{stated}" }} }}'
    write_plain(tmp_path, "m", config=config)
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("m")
    assert found.spec is not None, found.reason
    assert found.spec.engine.threads == threads


@pytest.mark.parametrize("field", ["dataType", "kind"])
async def test_numbers_that_stand_for_nothing_are_refused_in_a_load_request(tmp_path: Path, field: str) -> None:
    tensor = {"name": "x", "dims": [1], "dataType": 99 if field == "dataType" else "TYPE_FP32"}
    config = {"backend": "fake", "input": [tensor], "output": [{**tensor, "dataType": "TYPE_FP32"}]}
    if field == "kind":
        config["instanceGroup"] = [{"kind": 99}]
    write_plain(tmp_path, "m")
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("m", config)
    assert ("needs a name and a data_type" if field == "dataType" else "got 99") in found.reason


async def test_models_are_loaded_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        write_plain(tmp_path, f"m{number}")
    stage = Stage(tmp_path, "none")
    load, under_way, most = Core._load, 0, 0

    async def counting(core: Core, name: str) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0)
            await load(core, name)
        finally:
            under_way -= 1

    monkeypatch.setattr(Core, "_load", counting)
    await stage.core.start()
    assert len(stage.made) == 200
    assert most == 64


WARMED = """
backend: "fake" max_batch_size: 8
input {{ name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 1 ] }}
model_warmup {{ name: "w" {0} }}
"""
ONE = 'inputs { key: "x" value { data_type: TYPE_FP32 dims: [%s] } }'


@pytest.mark.parametrize(
    ("stated", "sizes", "shape"),
    [
        ("batch_size: 4 " + ONE % "5, 3", (4,), (5, 3)),
        ("batch_size: 0 " + ONE % "2, 5, 3", (2,), (5, 3)),  # Triton's form with the rows in the dims
        (ONE % "5, 3", (1,), (5, 3)),
        ("batch_size: 0", (1,), None),
    ],
)
def test_a_warm_up_states_rows_and_dims(stated: str, sizes: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    config = text_format.Parse(WARMED.format(stated), pb.ModelConfig())
    assert warmup_sizes(config, 10**6) == sizes
    assert warmup_shapes(config).get("x") == shape
