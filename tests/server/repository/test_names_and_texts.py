"""What stands in repositories beside models, names that are none, and texts as people's editors save them."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidModel, printable
from convoynet.server.observing.logs import JsonFormatter, TextFormatter
from convoynet.server.repository import folder as folders
from convoynet.server.repository.files import read_lines
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.model_config import config_from_json, read_config
from convoynet.server.repository.repository import Repository
from tests.server.conftest import Serving, fake_model, infer_request
from tests.server.repositories import DEFAULTS, write_plain

STRAYS = (
    "lost+found",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "__pycache__",
    ".ipynb_checkpoints",
    ".snapshot",
    "..data",
    "..2026_01_01_00_00_00.1",
    "checkpoints",
    "docs",
    "caf\u00e9",
)


def test_what_holds_nothing_of_a_model_is_passed_over_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_plain(tmp_path, "m")
    for name in STRAYS:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("models")
    repository = Folder(tmp_path)
    for _ in range(3):
        assert list(repository.folders()) == ["m"]
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'lost+found'" in message
    assert ".snapshot" not in message
    (tmp_path / "another").mkdir()
    repository.folders()
    assert "'another'" in caplog.records[-1].getMessage()
    assert "lost" not in caplog.records[-1].getMessage()


def test_a_folder_that_nobody_may_read_is_a_model_where_it_is_named_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path) != str(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    for name in ("lost+found", "resnet"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    assert list(Folder(tmp_path).folders()) == ["resnet"]


@pytest.mark.parametrize("inner", ["config.pbtxt", "1/", "01/", "model.onnx", "7/model.onnx"])
def test_what_holds_a_part_of_a_model_is_meant_as_one(tmp_path: Path, inner: str) -> None:
    path = tmp_path / "m" / inner
    (path if inner.endswith("/") else path.parent).mkdir(parents=True)
    if not inner.endswith("/"):
        path.write_bytes(b"")
    assert list(Folder(tmp_path).folders()) == ["m"]


def test_a_repository_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_FOLDERS", 3)
    for name in "abc":
        (tmp_path / name).mkdir()
    assert Folder(tmp_path).folders() == {}
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="more than 3 folders"):
        Folder(tmp_path).folders()


BAD_NAMES = (b"bad\xff\xfe", b"two\nREADY fake line", b"a\x1b[31mb", b"right\xe2\x80\xaeleft", b"caf\xc3\xa9", b"a b")


async def test_names_that_are_no_text_spoil_nothing(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    for name in BAD_NAMES:
        os.makedirs(os.fsencode(tmp_path) + b"/" + name + b"/1")  # noqa: PTH103  pathlib takes no bytes
    async with serving() as running:
        index = await running.stub.RepositoryIndex(pb.RepositoryIndexRequest())
        reasons = {model.name: model.reason for model in index.models}
        assert set(reasons) == {
            "sum",
            "bad\\udcff\\udcfe",
            "two\\nREADY fake line",
            "a\\x1b[31mb",
            "right\\u202eleft",
            "caf\u00e9",
            "a b",
        }
        assert all("may hold letters" in why for name, why in reasons.items() if name != "sum")
        metrics = generate_latest(running.app._metrics.registry).decode()
        assert metrics.count("convoy_model_load_failed{") == len(BAD_NAMES)
        assert not [line for line in metrics.splitlines() if line.startswith("READY")]
        await running.stub.ModelInfer(infer_request(1))
        marks = await running.app._repository.fingerprints()
        for name in reasons:  # or each look would find it changed
            assert running.app.core.fingerprint(name) == marks[name] != ""


def _record(message: str, *more: object) -> logging.LogRecord:
    return logging.LogRecord("name", logging.ERROR, "", 0, message, more, None)


def test_no_text_of_others_makes_lines_in_the_log() -> None:
    record = _record("model %s failed", "a\nREADY \u2028\x85\udcff\x1b[0m")
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        line.encode()
    assert "a\\nREADY" in TextFormatter().format(record)


def test_reasons_are_one_line() -> None:
    assert str(InvalidModel("Got 1\n index: 2\r\n  Expected\x0b3 \udcff")) == "Got 1 index: 2 Expected 3 \\udcff"
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"cat\ndog", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\r\ndog\r\nbird\r\n", ["cat", "dog", "bird"]),
        (b"cat\rdog\r", ["cat", "dog"]),
        (b"cat\n\ndog\n\n", ["cat", "", "dog", ""]),
        ("cat\x0bx\nd\x0cog\x1c\n\x85b\u2028i\u2029rd\n".encode(), ["cat\x0bx", "d\x0cog\x1c", "\x85b\u2028i\u2029rd"]),
    ],
)
def test_lines_end_where_a_line_ends(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_lines(tmp_path / "labels.txt") == lines


@pytest.mark.parametrize("content", ["c\u00e4t\n".encode("latin-1"), "cat\n".encode("utf-16")])
def test_a_text_that_is_not_utf8_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(InvalidModel, match=r"labels.txt is not UTF-8 \(byte \d\): save it as UTF-8"):
        read_lines(tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("text", "size", "stated"),
    [
        ("", 0, False),
        ("max_batch_size: 4", 4, True),
        ("max_batch_size: 0", 0, True),
        ("max_batch_size:0", 0, True),
        ("max_batch_size  :\n 0", 0, True),
        ("max_batch_size: 0x0", 0, True),
        ("# max_batch_size: 4", 0, False),
        ('parameters { key: "max_batch_size: 4" value { string_value: "max_batch_size: 4" } }', 0, False),
        ('parameters { key: "#" value { string_value: "#ff0000" } } max_batch_size: 0', 0, True),
        ("parameters { key: 'a' value { string_value: '\\n#' } } # max_batch_size: 1\nmax_batch_size: 2", 2, True),
        ("\ufeffmax_batch_size: 4", 4, True),
        ("\ufeff# a\r\nmax_batch_size: 0\r\n", 0, True),
        ("# a\rmax_batch_size: 4\r", 4, True),
    ],
)
def test_whether_a_batch_size_is_stated_is_parsed(tmp_path: Path, text: str, size: int, stated: bool) -> None:
    (tmp_path / "config.pbtxt").write_bytes(text.encode())
    found = read_config(tmp_path)
    assert found is not None
    assert (found.config.max_batch_size, found.batch) == (size, stated)


def test_the_same_in_json() -> None:
    for value, stated in (({"max_batch_size": 0}, True), ({"maxBatchSize": 3}, True), ({"maxBatchSize": None}, False)):
        assert config_from_json(value).batch is stated


async def test_a_mount_of_a_config_map_is_a_model(tmp_path: Path) -> None:
    """Kubernetes puts the files into a hidden folder and links to them, folder by folder."""
    plain = write_plain(tmp_path / "elsewhere", "m")
    home = tmp_path / "models" / "m"
    (home / "..2026_01_01").mkdir(parents=True)
    (plain / "config.pbtxt").rename(home / "..2026_01_01" / "config.pbtxt")
    (home / "..data").symlink_to("..2026_01_01")
    (home / "config.pbtxt").symlink_to("..data/config.pbtxt")
    (plain / "1").rename(home / "1")
    (found,) = await Repository([Folder(tmp_path / "models")], DEFAULTS).read("m")
    assert found.spec is not None, found.reason


async def test_a_model_of_several_files_is_a_folder(tmp_path: Path) -> None:
    """Triton takes 1/model.onnx/model.onnx, with external data beside it."""
    home = write_plain(tmp_path, "m")
    (home / "1" / "model.json").rename(home / "1" / "file")
    (home / "1" / "model.json").mkdir()
    (home / "1" / "file").rename(home / "1" / "model.json" / "model.json")
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("m")
    assert found.spec is not None, found.reason
    assert found.spec.engine.file == home / "1" / "model.json" / "model.json"
    (home / "config.pbtxt").write_text((home / "config.pbtxt").read_text().replace('backend: "fake"', ""))
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("m")
    assert found.spec is not None, found.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('backend: "fake" platform: "tensorrt_plan"', "states backend 'fake', whose platform is 'fake', and platform"),
        ('backend: "Fake"', "backend 'Fake' .* is not one of"),
        ('platform: "pytorch_libtorch"', r"platform 'pytorch_libtorch'\) is not one of"),
    ],
)
async def test_spellings_that_are_none_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    home = write_plain(tmp_path, "m")
    (home / "config.pbtxt").write_text((home / "config.pbtxt").read_text().replace('backend: "fake"', text))
    with pytest.raises(InvalidModel, match=reason):
        await Repository([Folder(tmp_path)], DEFAULTS).read("m")


async def test_versions_that_are_not_there_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_plain(tmp_path, "m", versions=(1, 2), config="version_policy { specific { versions: [1, 3] } }")
    (found,) = await Repository([Folder(tmp_path)], DEFAULTS).read("m")
    assert found.version == "1"
    assert "asks for versions that are not there: [3]" in caplog.text
