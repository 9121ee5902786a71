"""Model repositories in object stores and on web servers, copied to a local folder through fsspec."""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import hashlib
import json
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from convoynet.server.errors import InvalidModel
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.layout import is_name, is_version
from convoynet.server.supervision.threads import Threads

log = logging.getLogger(__name__)

_MANIFEST = ".convoy-remote.json"
_SILENCE_SECONDS = 60.0
"""What a remote place may take to connect, and to send the next part of an answer."""
_MOST_FILES = 100_000
"""Files and folders of a remote place that are looked at."""
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "LastModified", "Last-Modified", "updated", "mtime",
         "last_modified", "created")  # fmt: skip
"""What the file systems of fsspec call the mark of a file's content, best first."""


class Remote(Folder):
    """A copy of a remote repository in a folder of the local cache. One process uses a folder at a time.

    Attributes:
        root: The folder, in the layout of a model repository.
    """

    def __init__(self, url: str, cache: Path, *, seconds: float = 1800.0, most_bytes: int = 2**38) -> None:
        """Opens the file system of a URL; nothing is fetched yet.

        Args:
            url: The place.
            cache: The local folder for copies.
            seconds: What one sync() may take; a later one goes on where it ended.
            most_bytes: What the copy may take.

        Raises:
            InvalidModel: What the URL needs is not installed, or nothing knows its protocol.
        """
        try:
            import fsspec

            self._files, self._path = fsspec.core.url_to_fs(url, **_timeouts(url))
            self._callback = fsspec.callbacks.Callback
        except ImportError as error:
            raise InvalidModel(
                f"the model repository '{_shown(url)}' needs the module {error.name or error}: "
                "pip install 'convoynet[remote]'"
            ) from error
        except ValueError as error:
            raise InvalidModel(f"the model repository '{_shown(url)}' cannot be opened: {error}") from error
        self._url = _shown(url)
        self._seconds, self._most_bytes = seconds, most_bytes
        self._threads = Threads()
        self._turn = asyncio.Lock()
        super().__init__(cache / hashlib.sha256(url.encode()).hexdigest()[:16])

    async def sync(self) -> None:
        """Makes the folder like the remote place: fetches what is new or changed, removes what is gone.

        A file appears whole or not at all, and what was fetched is not fetched again, also after a failure. What is
        gone is removed when everything else is there.

        Raises:
            OSError: The place cannot be reached, is too large or too slow, or the folder cannot be written; what was
                fetched stays.
        """
        stop = threading.Event()
        try:
            async with asyncio.timeout(self._seconds), self._turn:
                await self._threads.run(self._seconds, self._sync, stop)
        except TimeoutError as error:
            raise OSError(f"the model repository '{self._url}' was not read within {self._seconds:g} s") from error
        except OSError as error:
            raise OSError(f"the model repository '{self._url}' cannot be read: {error}") from error
        except Exception as error:  # the clients of object stores have no common base below Exception
            raise OSError(f"the model repository '{self._url}' cannot be read: {type(error).__name__}") from error
        finally:
            # A thread that was given up must not go on beside the next one.
            stop.set()

    def _sync(self, stop: threading.Event) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files.invalidate_cache()
        remote = self._list()
        known = self._manifest()
        room = self._most_bytes
        for name, (path, mark) in remote.items():
            file = self.root / name
            if known.get(name) == mark and mark[1] and file.is_file() and file.stat().st_size == mark[0]:
                room = self._room(room, file.stat().st_size)
                continue
            if stop.is_set():
                raise OSError("nobody waits for it any more")
            self._fetch(path, file, room, stop)
            room = self._room(room, file.stat().st_size)
            log.info("fetched %s of %s", name, self._url)
            known[name] = [file.stat().st_size, mark[1]]
            self._write_manifest(known)
        self._write_manifest({name: known[name] for name in remote})
        for file in [path for path in self.root.rglob("*") if path.is_file()]:
            if str(file.relative_to(self.root)) not in {_MANIFEST, *remote}:
                file.unlink()
        for folder in sorted((p for p in self.root.rglob("*") if p.is_dir()), reverse=True):
            with contextlib.suppress(OSError):  # only what is empty can be removed
                folder.rmdir()

    def _room(self, room: int, size: int) -> int:
        if size > room:
            raise OSError(f"it holds more than {self._most_bytes} bytes (--model-cache-bytes)")
        return room - size

    def _list(self, folder: str = "", above: tuple[str, ...] = ()) -> dict[str, tuple[str, list[Any]]]:
        """Remote paths and marks (size, tag) of the files of models, by their names below the root.

        Folder by folder, so that one that cannot be listed is an error and does not look empty.
        """
        found: dict[str, tuple[str, list[Any]]] = {}
        for info in self._files.ls(folder or self._path, detail=True):
            path = info["name"]
            names = (*above, unquote(path.rstrip("/").rpartition("/")[2]))
            if path.rstrip("/") == (folder or self._path).rstrip("/") or not is_name(names[-1]):
                continue
            if info["type"] == "directory":
                if len(names) == 1 or (len(names) == 2 and is_version(names[1])):
                    found |= self._list(path, names)
            elif _is_file_of_model("/".join(names)):
                listed = info.get("size") is not None and _tag(info)
                stated = info if listed else self._files.info(path)
                if len(found) >= _MOST_FILES:
                    raise OSError(f"it holds more than {_MOST_FILES} files")
                found["/".join(names)] = (path, [stated.get("size"), _tag(stated)])
        return found

    def _fetch(self, path: str, file: Path, room: int, stop: threading.Event) -> None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".fetch-", dir=self.root)
        os.close(handle)
        try:
            self._files.get_file(path, temporary, callback=self._watch(room, stop))
            self._room(room, Path(temporary).stat().st_size)
            # A file that did not change keeps its inode, so that nobody takes it for another.
            if file.is_file() and filecmp.cmp(temporary, file, shallow=False):
                Path(temporary).unlink()
            else:
                Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _watch(self, room: int, stop: threading.Event) -> Any:
        """What fsspec tells of every part that it has fetched: ends a file that is too large, or that nobody wants."""
        check = self._room

        class Watch(self._callback):  # type: ignore[misc, name-defined]  # fsspec has no types
            def relative_update(self, inc: int = 1) -> None:
                super().relative_update(inc)
                check(room, self.value)
                if stop.is_set():
                    raise OSError("nobody waits for it any more")

        return Watch()

    def _manifest(self) -> dict[str, list[Any]]:
        try:
            read = json.loads((self.root / _MANIFEST).read_text())
            return {str(k): list(v) for k, v in read.items() if _is_file_of_model(str(k))}
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            return {}

    def _write_manifest(self, known: dict[str, list[Any]]) -> None:
        temporary = self.root / f"{_MANIFEST}.new"
        temporary.write_text(json.dumps(known))
        temporary.replace(self.root / _MANIFEST)


def _timeouts(url: str) -> dict[str, Any]:
    """What makes the clients of fsspec give up a place that does not answer, as far as they can be told."""
    protocol = url.partition("://")[0]
    if protocol in ("http", "https"):
        import aiohttp

        times = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
        return {"client_kwargs": {"timeout": times}}
    if protocol in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": _SILENCE_SECONDS, "read_timeout": _SILENCE_SECONDS}}
    return {}


def _is_file_of_model(name: str) -> bool:
    """MODEL/FILE or MODEL/VERSION/FILE, of names that may be."""
    parts = name.split("/")
    return len(parts) in (2, 3) and all(map(is_name, parts)) and (len(parts) == 2 or is_version(parts[1]))


def _tag(info: dict[str, Any]) -> str:
    return next((f"{key}={info[key]}" for key in _TAGS if info.get(key)), "")


def _shown(url: str) -> str:
    """The URL without a user's name, password or query, which may be secrets."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
