"""What a model folder says, and every way in which it can be wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from server.repository import Defaults, Found, scan
from tests.server.conftest import fake_model

DEFAULTS = Defaults(max_queue=7, threads=3)


def only(root: Path) -> Found:
    """The one version in a repository."""
    (found,) = scan(root, DEFAULTS)
    return found


def test_a_silent_config_is_completed(tmp_path: Path) -> None:
    fake_model(tmp_path)
    found = only(tmp_path)
    assert found.spec is not None
    assert found.config is not None
    spec = found.spec
    assert (spec.name, spec.version, spec.platform, spec.instances) == ("sum", "1", "fake", 1)
    assert (spec.batch.max_rows, spec.batch.max_delay_s, spec.batch.max_queue) == (8, 0, 7)
    assert (spec.engine.device, spec.engine.threads) == ("auto", 3)
    assert spec.warmup == (1, 8)
    assert list(found.config.dynamic_batching.preferred_batch_size) == [8]


def test_everything_that_the_config_states_is_used(tmp_path: Path) -> None:
    fake_model(
        tmp_path,
        config="""
        max_batch_size: 4
        dynamic_batching { max_queue_delay_microseconds: 500 default_queue_policy { max_queue_size: 3 } }
        instance_group { count: 2 kind: KIND_CPU }
        model_warmup { batch_size: 2 } model_warmup { batch_size: 1 }
        parameters { key: "intra_op_thread_count" value { string_value: "5" } }
        """,
    )
    spec = only(tmp_path).spec
    assert spec is not None
    assert (spec.batch.max_delay_s, spec.batch.max_queue, spec.instances) == (0.0005, 3, 2)
    assert (spec.engine.device, spec.engine.threads, spec.warmup) == ("cpu", 5, (1, 2))


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["10"]),
        ("version_policy { latest { num_versions: 2 } }", ["9", "10"]),
        ("version_policy { all { } }", ["1", "9", "10"]),
        ("version_policy { specific { versions: [9] } }", ["9"]),
    ],
)
def test_version_policies(tmp_path: Path, policy: str, served: list[str]) -> None:
    fake_model(tmp_path, config=f"max_batch_size: 1 {policy}")
    for version in ("9", "10"):
        (tmp_path / "sum" / version).mkdir()
        (tmp_path / "sum" / version / "model.json").write_text("{}")
    assert [f.version for f in scan(tmp_path, DEFAULTS) if f.spec is not None] == served


def edit(before: str, after: str) -> Callable[[Path], object]:
    """Changes the config of the model."""

    def change(folder: Path) -> None:
        text = (folder / "config.pbtxt").read_text()
        assert before in text
        (folder / "config.pbtxt").write_text(text.replace(before, after))

    return change


PREPROCESS = "max_batch_size: 1 parameters {{ key: \"preprocess\" value {{ string_value: '{}' }} }}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "config.pbtxt").unlink(), "no config.pbtxt; `convoy export` writes one"),
        (lambda f: (f / "config.pbtxt").write_bytes(b"\xff\xff"), "cannot be read"),
        (edit("max_batch_size", "max_batch"), "does not parse"),
        (edit('backend: "fake"', 'backend: "pytorch"'), "backend 'pytorch'.* is not one of"),
        (edit('backend: "fake"', 'backend: "fake" name: "other"'), "names it 'other', its folder 'sum'"),
        (lambda f: (f / "1").rename(f / "one"), "no version folder"),
        (lambda f: (f / "1" / "model.json").unlink(), "version 1 has no file model.json"),
        (
            edit('backend: "fake"', 'backend: "fake" default_model_filename: "../../x"'),
            "leads out of the model's folder",
        ),
        (
            edit("dynamic_batching", "version_policy { specific { versions: 4 } } dynamic_batching"),
            "asks for version 4",
        ),
        (edit("dynamic_batching", "instance_group { kind: KIND_MODEL } dynamic_batching"), "instance_group must be"),
        (edit("dims: [1]", 'dims: [1] label_filename: "absent.txt"'), "labels of output 'y' cannot be read"),
        (edit("dims: [1]", 'dims: [1] label_filename: "../../x"'), "leads out of the model's folder"),
        (edit("TYPE_FP32 dims: [4]", "TYPE_INVALID dims: [4]"), "needs a name and a data_type"),
        (edit("max_batch_size: 8", PREPROCESS.format("{")), "'preprocess' of config.pbtxt is not readable"),
        (
            edit(
                "max_batch_size: 8",
                PREPROCESS.format('{"color": "RGB", "resize": 8, "size": [8, 8], "interpolation": "bilinear"}'),
            ),
            "makes rows of shape",
        ),
        (
            edit(
                "max_batch_size: 8",
                PREPROCESS.format('{"color": "CMYK", "resize": 8, "size": [8, 8], "interpolation": "x"}'),
            ),
            "color 'CMYK'",
        ),
    ],
)
def test_a_model_that_cannot_be_served_has_a_reason(
    tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    fake_model(tmp_path)
    change(tmp_path / "sum")
    found = only(tmp_path)
    assert found.spec is None
    assert re.search(reason, found.reason), found.reason


def test_a_name_that_is_no_name_and_hidden_folders(tmp_path: Path) -> None:
    fake_model(tmp_path, "a b")
    (tmp_path / ".tmp").mkdir()
    assert "may hold letters" in only(tmp_path).reason
