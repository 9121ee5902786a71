"""Configurations and files that come with a load: whose place they take, where they lie, and when they go."""

from __future__ import annotations

import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.errors import InvalidModel, LoadFailed
from convoynet.server.repository.overlay import remove_overlay, write_overlay
from tests.server.repositories import Stage, write_plain

CONFIG = {
    "backend": "fake",
    "maxBatchSize": 8,
    "input": [{"name": "x", "dataType": "TYPE_FP32", "dims": ["1"]}],
    "output": [{"name": "y", "dataType": "TYPE_FP32", "dims": [1]}],
}


async def test_files_of_a_request_are_private_and_go_with_the_model(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    await stage.core.load("m", CONFIG, {"file:3/model.json": b"{}", "labels.txt": b"one"})
    file = stage.made[0].spec.engine.file
    folder = file.parent.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert file.read_bytes() == b"{}"
    assert await stage.ask("m") == 3
    assert stage.core.config("m").max_batch_size == 8
    # Other files take their place: the old ones are removed once the old version has answered.
    await stage.core.load("m", CONFIG, {"4/model.json": b"{}"})
    assert not folder.exists()
    folder = stage.made[1].spec.engine.file.parent.parent
    with pytest.raises(LoadFailed, match=r"has no file model.json"):
        await stage.core.load("m", CONFIG, {"4/other": b"{}"})
    assert await stage.ask("m") == 4
    await stage.core.unload("m")
    assert not folder.exists()


async def test_a_config_of_a_request_takes_the_place_of_the_one_on_disk(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    await stage.core.load("m", {**CONFIG, "maxBatchSize": 2})
    assert stage.core.model("m").spec.batch.max_rows == 2
    (tmp_path / "m" / "1" / "model.json").write_text("{ }")
    await stage.core.refresh()
    assert stage.core.model("m").spec.batch.max_rows == 2
    await stage.core.load("m")
    assert stage.core.model("m").spec.batch.max_rows == 8
    for wrong, reason in (({**CONFIG, "nonsense": 1}, "no ModelConfig"), ({**CONFIG, "name": "n"}, "must agree")):
        with pytest.raises(LoadFailed, match=reason):
            await stage.core.load("m", wrong)


async def test_files_of_a_request_are_refused_where_a_report_is_required(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.repository._defaults = replace(stage.repository._defaults, require_report=True)
    with pytest.raises(LoadFailed, match="which --require-report asks for"):
        await stage.core.load("m", CONFIG, {"1/model.json": b"{}"})
    for name in ("report.json", "1/report.json"):
        with pytest.raises(LoadFailed, match=r"may not bring a report.json"):
            await stage.core.load("m", CONFIG, {"1/model.json": b"{}", name: b"{}"})


async def test_what_a_request_leaves_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    (tmp_path / "private").mkdir()
    stage = Stage(tmp_path / "models")
    (tmp_path / "models").mkdir()
    stage.broken["m"] = "no"
    for config in (CONFIG, {"nonsense": 1}):
        with pytest.raises(LoadFailed):
            await stage.core.load("m", config, {"1/model.json": b"{}"})
    assert list((tmp_path / "private").iterdir()) == []


NAMES = st.text(st.sampled_from("ab1.-_/\\~\0 \n:é") | st.characters(), max_size=20)


@given(NAMES)
def test_files_of_a_request_never_leave_their_folder(name: str) -> None:
    try:
        folder = write_overlay({f"file:{name}": b"x"})
    except InvalidModel:
        return
    try:
        (file,) = [path for path in folder.rglob("*") if path.is_file()]
        assert file.resolve().is_relative_to(folder.resolve())
        assert str(file.relative_to(folder)) == name.removeprefix("file:")
    finally:
        remove_overlay(folder)


@pytest.mark.parametrize("name", ["../x", "1/../x", "/etc/x", "1/2/x", "0/x", "01/x", "1/.x", "config.pbtxt", "1/"])
def test_names_that_files_of_a_request_may_not_have(name: str) -> None:
    with pytest.raises(InvalidModel):
        write_overlay({f"file:{name}": b""})
