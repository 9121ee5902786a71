"""Polling: what is new, changed or gone, and only once its files are at rest."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from convoynet.server.models.watcher import Watcher
from tests.server.repositories import EnsembleStage, Stage, write_ensemble, write_plain


def watched(root: Path) -> tuple[Stage, Watcher]:
    """A stage with polling, and what polls."""
    stage = Stage(root, "poll")
    return stage, Watcher(stage.repository, stage.core, 1.0)


async def test_new_changed_and_removed_models_are_found_when_they_are_at_rest(tmp_path: Path) -> None:
    write_plain(tmp_path, "kept")
    write_plain(tmp_path, "changed")
    gone = write_plain(tmp_path, "gone")
    stage, watcher = watched(tmp_path)
    await stage.core.start()
    await watcher.poll()
    await watcher.poll()
    assert len(stage.made) == 3
    write_plain(tmp_path, "changed", versions=(2,))
    write_plain(tmp_path, "new")
    shutil.rmtree(gone)
    await watcher.poll()
    assert {m.spec.name for m in stage.core} == {"kept", "changed", "gone"}
    assert await stage.ask("changed") == 1
    await watcher.poll()
    assert {(m.spec.name, m.spec.version) for m in stage.core} == {("kept", "1"), ("changed", "2"), ("new", "1")}
    assert [m.closed for m in stage.made if m.spec.name == "kept"] == [False]
    assert await stage.states("gone") == [("1", "UNAVAILABLE")]
    write_plain(tmp_path, "gone")
    await watcher.poll()
    await watcher.poll()
    assert await stage.ask("gone") == 1


async def test_a_model_that_is_being_copied_waits(tmp_path: Path) -> None:
    folder = write_plain(tmp_path, "m")
    stage, watcher = watched(tmp_path)
    await stage.core.start()
    await watcher.poll()
    (folder / "2").mkdir()
    for content in ("{", "{ ", "{  }"):
        (folder / "2" / "model.json").write_text(content)
        await watcher.poll()
        assert await stage.ask("m") == 1
    await watcher.poll()
    assert await stage.ask("m") == 2


async def test_a_broken_model_is_tried_again_only_when_it_changes(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage, watcher = watched(tmp_path)
    stage.broken["m"] = "no"
    await stage.core.start()
    for _ in range(3):
        await watcher.poll()
    assert len(stage.made) == 1
    stage.broken.clear()
    write_plain(tmp_path, "m", config="dynamic_batching { }")
    for _ in range(2):
        await watcher.poll()
    assert await stage.ask("m") == 1


async def test_an_ensemble_is_loaded_when_the_model_that_it_lacked_is_there(tmp_path: Path) -> None:
    write_ensemble(tmp_path, "both", [("a", "x", "y")])
    stage = EnsembleStage(tmp_path, "poll")
    watcher = Watcher(stage.repository, stage.core, 1.0)
    await stage.core.start()
    await watcher.poll()
    assert await stage.states("both") == [("1", "UNAVAILABLE")]
    write_plain(tmp_path, "a")
    await watcher.poll()
    await watcher.poll()
    assert await stage.ask("both") == 1


async def test_a_file_that_replaces_another_of_its_size_and_time_is_seen(tmp_path: Path) -> None:
    folder = write_plain(tmp_path, "m")
    before = await Stage(tmp_path).repository.fingerprint("m")
    file = folder / "1" / "model.json"
    other = folder / "1" / "other"
    shutil.copy2(file, other)
    other.replace(file)
    assert await Stage(tmp_path).repository.fingerprint("m") != before


async def test_a_refresh_by_hand_loads_nothing_new_with_explicit_control(tmp_path: Path) -> None:
    write_plain(tmp_path, "m")
    stage = Stage(tmp_path)
    await stage.core.load("m")
    write_plain(tmp_path, "m", versions=(2,))
    write_plain(tmp_path, "n")
    await stage.core.refresh()
    assert [(m.spec.name, m.spec.version) for m in stage.core] == [("m", "2")]
    shutil.rmtree(tmp_path / "m")
    await stage.core.refresh()
    assert await stage.ask("m") == 2


async def test_a_repository_that_goes_away_is_looked_at_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "models"
    write_plain(root, "m")
    stage = Stage(root, "poll")
    looks = 0

    async def sleep(seconds: float) -> None:
        nonlocal looks
        assert seconds == 5.0
        looks += 1
        if looks == 2:
            root.rename(tmp_path / "away")
        if looks == 3:
            (tmp_path / "away").rename(root)
            write_plain(root, "m", versions=(2,))
        if looks == 6:
            raise asyncio.CancelledError

    await stage.core.start()
    with pytest.raises(asyncio.CancelledError):
        await Watcher(stage.repository, stage.core, 5.0, sleep).run()
    assert "cannot be polled" in caplog.text
    assert await stage.ask("m") == 2
