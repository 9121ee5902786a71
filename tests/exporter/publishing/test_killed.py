"""Publishing, killed at every step, by several at once, and on disks that are full or read-only."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from convoynet.exporter.errors import BadInput
from convoynet.exporter.publishing import swap
from convoynet.exporter.publishing.repository import staging, versions, writing

NAMES = ("config.pbtxt", "labels.txt", "report.json")

# Every step that changes the file system tells the audit hook beforehand; renameat2 is looked up right before its call.
KILLED_AT_EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from convoynet.exporter.publishing import swap
from tests.exporter.publishing.test_killed import contents, publish, whole

root, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    swap._exchange = lambda one, other: False
steps = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "ctypes.dlsym", "ctypes.dlsym/handle", "os.chmod"}
left, count = None, 0

def hook(event, arguments):
    global left
    if left is not None and event in steps:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
for before, after in (
    ([(1, "one")], (2, "two", False)),
    ([(1, "one")], (1, "new", True)),
    ([(1, "one"), (2, "two")], (2, "new", True)),
    ([(1, "one"), (3, "three")], (2, "two", False)),
):
    for kill_at in range(1, 100):
        shutil.rmtree(root, ignore_errors=True)
        for version, text in before:
            publish(root, text, version)
        old = contents(root)
        pid = os.fork()
        if pid == 0:
            left = kill_at
            publish(root, after[1], after[0], force=after[2])
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        new = contents(root)
        lost = not exchange and not (root / "net").exists()  # for an instant, until the next one publishes
        assert lost or new == old or whole(root, *after[:2]), (before, after, kill_at, new)
        publish(root, "next")
        hidden = [path.name for path in root.iterdir() if path.name.startswith(".")]
        assert not hidden, (before, after, kill_at, hidden)
        now = contents(root)
        assert old.keys() <= now.keys(), (before, after, kill_at, old.keys() - now.keys())
        count += 1
        if not killed:
            break
    else:
        raise AssertionError("it never got to the end")
print(count)
"""


def publish(root: Path, text: str, version: int | None = None, *, force: bool = False) -> Path:
    """Publish a version whose files hold `text`."""
    with staging(root, "net", version, force=force, needed_bytes=1) as place:
        with writing(root):
            (place.folder / "model.onnx").write_text(text * 1000)
            (place.folder / "report.json").write_text(text)
            for name in NAMES:
                (place.model / name).write_text(text)
        return place.commit()


def contents(root: Path) -> dict[str, str]:
    """What every file that a server sees holds."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    shown = [path.relative_to(root) for path in found]
    return {str(path): (root / path).read_text() for path in shown if not path.parts[0].startswith(".")}


def whole(root: Path, version: int, text: str) -> bool:
    """Whether a version is there, and the model's files are the newest version's."""
    model = root / "net"
    folder = model / str(version)
    if not folder.is_dir() or (folder / "model.onnx").read_text() != text * 1000:
        return False
    newest = (model / str(versions(model)[-1]) / "report.json").read_text()
    return (folder / "report.json").read_text() == text and {(model / name).read_text() for name in NAMES} == {newest}


@pytest.mark.parametrize("how", ["exchange", "two steps"])
def test_killed_at_every_step_the_old_or_the_new_is_whole(tmp_path: Path, how: str) -> None:
    memory = Path("/dev/shm")  # thousands of files are synced, which takes a disk minutes
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        ran = subprocess.run(
            [sys.executable, "-c", KILLED_AT_EVERY_STEP, f"{folder}/models", how],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 60


def test_the_files_of_the_versions_that_stay_are_the_same_files(tmp_path: Path) -> None:
    """A server that polls compares times and inodes, and reloads what differs."""
    published = publish(tmp_path, "one")
    (published / "weights.bin").symlink_to("model.onnx")
    (published.parent / "notes").mkdir()
    (published.parent / "notes" / "mine.txt").write_text("kept")
    before = (published / "model.onnx").stat()
    publish(tmp_path, "two")
    after = (published / "model.onnx").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (published / "weights.bin").readlink() == Path("model.onnx")
    assert (published.parent / "notes" / "mine.txt").read_text() == "kept"


def test_permissions_of_a_models_folder_stay(tmp_path: Path) -> None:
    model = publish(tmp_path, "one").parent
    model.chmod(0o750)
    publish(tmp_path, "two")
    assert model.stat().st_mode & 0o777 == 0o750


def test_what_lives_or_is_not_ours_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / ".convoy-training").mkdir()
    (tmp_path / ".convoy-0123456789abcdef").mkdir()  # as a process that was killed leaves it
    with staging(tmp_path, "other", None, force=False, needed_bytes=1) as place:
        publish(tmp_path, "one")
        assert place.folder.is_dir()
        assert not (tmp_path / ".convoy-0123456789abcdef").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".convoy-training", "net"]


def test_a_link_for_a_model_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "elsewhere", "one")
    (tmp_path / "net").symlink_to(tmp_path / "elsewhere" / "net")
    with pytest.raises(BadInput, match="is a symbolic link"):
        publish(tmp_path, "two")


def test_a_lock_that_nobody_gives_back_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "_LOCK_WAIT", 0.05)
    with (
        swap.held(tmp_path),
        pytest.raises(BadInput, match="another process has been publishing there"),
    ):
        publish(tmp_path, "one")


def test_a_mount_point_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, "one")

    def cross_device(one: Path, other: Path) -> bool:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(swap, "_exchange", cross_device)
    with pytest.raises(BadInput, match="cannot be renamed: it is a mount point"):
        publish(tmp_path, "two")
    assert contents(tmp_path)["net/config.pbtxt"] == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False).returncode:
        pytest.skip("may not mount")
    try:
        publish(tmp_path, "one")
        before = contents(tmp_path)
        with pytest.raises(BadInput, match="No space left"):
            publish(tmp_path, "a long text " * 100)
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["net"]
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(BadInput, match="Read-only file system"):
            publish(tmp_path, "two")
        assert contents(tmp_path) == before
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
        shutil.rmtree(tmp_path, ignore_errors=True)
