"""Remote repositories: what is fetched, what is not fetched again, and what may not be named."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.errors import InvalidModel
from convoynet.server.models.watcher import Watcher
from convoynet.server.repository.layout import is_remote
from convoynet.server.repository.remote import Remote, _is_file_of_model, _shown
from convoynet.server.repository.repository import Repository
from tests.server.repositories import DEFAULTS, Stage, write_plain

fsspec = pytest.importorskip("fsspec", reason="needs convoynet[remote]")


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def upload(files: Any, name: str, *, version: int = 1) -> None:
    """A model in memory."""
    tensor = "data_type: TYPE_FP32 dims: [1]"
    files.pipe(f"/models/{name}/{version}/model.json", b"{}")
    files.pipe(
        f"/models/{name}/config.pbtxt",
        f'backend: "fake" max_batch_size: 8 input {{ name: "x" {tensor} }} output {{ name: "y" {tensor} }}'.encode(),
    )


def fetched(files: Any) -> list[str]:
    """From now on, the files that are fetched."""
    paths: list[str] = []
    real = files.get_file

    def get_file(path: str, *args: Any, **kwargs: Any) -> Any:
        paths.append(path)
        return real(path, *args, **kwargs)

    files.get_file = get_file
    return paths


async def test_files_are_fetched_once_and_follow_the_remote_place(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    remote = Remote("memory://models", tmp_path)
    remote._files = memory
    paths = fetched(memory)
    try:
        await remote.sync()
        assert sorted(paths) == ["/models/m/1/model.json", "/models/m/config.pbtxt"]
        assert (remote.root / "m" / "1" / "model.json").read_bytes() == b"{}"
        again = Remote("memory://models", tmp_path)
        await again.sync()
        assert len(paths) == 2
        memory.pipe("/models/m/2/model.json", b"{ }")
        memory.rm("/models/m/1", recursive=True)
        await again.sync()
        assert paths[2:] == ["/models/m/2/model.json"]
        assert sorted(p.name for p in (remote.root / "m").iterdir()) == ["2", "config.pbtxt"]
        # What was damaged in the cache is fetched again.
        (remote.root / "m" / "2" / "model.json").write_bytes(b"")
        await again.sync()
        assert paths[3:] == ["/models/m/2/model.json"]
    finally:
        del memory.get_file


async def test_a_download_that_breaks_off_leaves_nothing_half_and_goes_on_later(memory: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        upload(memory, name)
    remote = Remote("memory://models", tmp_path)
    paths: list[str] = []
    real = memory.get_file

    def get_file(path: str, target: str, **_: Any) -> Any:
        paths.append(path)
        if len(paths) == 3:
            Path(target).write_bytes(b"ha")
            raise ConnectionResetError("gone")
        return real(path, target)

    memory.get_file = get_file
    try:
        with pytest.raises(OSError, match="the model repository 'memory://models' cannot be read: gone"):
            await remote.sync()
        whole = [p for p in remote.root.rglob("*") if p.is_file() and not p.name.startswith(".convoy")]
        assert len(whole) == 2
        await remote.sync()
        assert len(paths) == 5
    finally:
        del memory.get_file


async def test_files_without_a_mark_are_fetched_again_but_stay_what_they_are(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    remote = Remote("memory://models", tmp_path)
    repository = Repository([remote], DEFAULTS)
    await remote.sync()
    before = await repository.fingerprints()
    manifest = remote.root / ".convoy-remote.json"
    manifest.write_text("nonsense")
    (remote.root / "stale" / "1").mkdir(parents=True)
    (remote.root / "stale" / "1" / "model.json").write_text("{}")
    paths = fetched(memory)
    try:
        await remote.sync()
    finally:
        del memory.get_file
    assert len(paths) == 2
    assert await repository.fingerprints() == before
    assert set(json.loads(manifest.read_text())) == {"m/1/model.json", "m/config.pbtxt"}


async def test_polling_a_remote_repository_loads_what_is_new(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    stage = Stage(tmp_path, "poll")
    stage.repository._sources = [Remote("memory://models", tmp_path / "cache")]
    await stage.core.start()
    watcher = Watcher(stage.repository, stage.core, 1.0)
    await watcher.poll()
    upload(memory, "m", version=3)
    upload(memory, "n")
    await watcher.poll()
    await watcher.poll()
    assert await stage.ask("m") == 3
    assert await stage.ask("n") == 1


async def test_a_remote_file_is_checked_against_its_report(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    stated = {"formats": [{"file": "1/model.json", "sha256": hashlib.sha256(b"other").hexdigest()}]}
    memory.pipe("/models/m/1/report.json", json.dumps(stated).encode())
    repository = Repository([Remote("memory://models", tmp_path)], DEFAULTS)
    await repository.sync()
    (found,) = await repository.read("m")
    assert "the file was changed or damaged" in found.reason


async def test_a_folder_by_url_and_two_repositories(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    write_plain(tmp_path / "disk", "n")
    sources = [Remote("memory://models", tmp_path / "c"), Remote(f"file://{tmp_path}/disk", tmp_path / "c")]
    repository = Repository(sources, DEFAULTS)
    await repository.sync()
    assert await repository.names() == {"m", "n"}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


async def test_a_web_server_that_lists_its_folders(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="needs convoynet[remote]")
    write_plain(tmp_path / "site" / "models", "m")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            remote = Remote(f"http://127.0.0.1:{server.server_port}/models", tmp_path / "cache")
            paths = fetched(remote._files)
            await remote.sync()
            assert (remote.root / "m" / "1" / "model.json").read_bytes() == b"{}"
            await remote.sync()
            assert len(paths) == 2
            assert (await Repository([remote], DEFAULTS).read("m"))[0].spec is not None
        finally:
            await asyncio.to_thread(server.shutdown)
            thread.join()


async def test_what_is_not_there_is_one_line(memory: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the model repository 'memory://absent' cannot be read"):
        await Remote("memory://absent", tmp_path).sync()
    with pytest.raises(InvalidModel, match="'nonsense://x' cannot be opened: Protocol not known"):
        Remote("nonsense://x", tmp_path)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InvalidModel, match=r"needs the module fsspec: pip install 'convoynet\[remote\]'"):
        Remote("s3://bucket/models", tmp_path)


def test_urls_are_told_from_folders_and_shown_without_secrets() -> None:
    assert is_remote("s3://bucket/models")
    assert not is_remote("models")
    assert _shown("https://user:secret@host:1/models?token=secret") == "https://host:1/models"


@given(st.text(st.sampled_from("ab1.-_/\\~\0 ") | st.characters(), max_size=30))
def test_no_remote_name_leads_out_of_the_cache(name: str) -> None:
    root = Path("/cache")
    if _is_file_of_model(name):
        assert (root / name).resolve().is_relative_to(root)
        assert 2 <= len(name.split("/")) <= 3


@pytest.mark.parametrize("name", ["../m/x", "m/../x", "m/x/y", "m/1/2/x", "/m/x", "m", "m/.hidden", ".git/x", "m/01/x"])
def test_names_that_are_no_files_of_models(name: str) -> None:
    assert not _is_file_of_model(name)


async def test_a_place_that_does_not_answer_is_given_up(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    release = threading.Event()
    remote = Remote("memory://models", tmp_path, seconds=0.1)
    real = memory.get_file

    def get_file(*args: Any, **kwargs: Any) -> Any:
        release.wait()
        return real(*args, **kwargs)

    memory.get_file = get_file
    try:
        with pytest.raises(OSError, match=r"'memory://models' .*within 0\.1 s"):
            await remote.sync()
    finally:
        release.set()
        del memory.get_file
    remote._seconds = 60
    await remote.sync()
    assert (remote.root / "m" / "1" / "model.json").read_bytes() == b"{}"


async def test_a_place_that_is_too_large_is_refused(memory: Any, tmp_path: Path) -> None:
    upload(memory, "m")
    memory.pipe("/models/m/1/weights.bin", bytes(5000))
    with pytest.raises(OSError, match=r"it holds more than 4000 bytes \(--model-cache-bytes\)"):
        await Remote("memory://models", tmp_path, most_bytes=4000).sync()
    assert not list(tmp_path.rglob(".fetch-*"))
