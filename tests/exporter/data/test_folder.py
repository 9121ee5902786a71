"""Which files of a folder are images, and what is said of the others."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from convoynet.exporter.data.folder import list_images, survey
from convoynet.exporter.errors import BadInput


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), 99).save(path)
    return path


def test_list_images_is_recursive_sorted_and_ignores_other_files(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/deep/1.png", "c.webp", "b/.hidden.png", ".cache/1.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a/deep/1.png", "b/2.JPG", "c.webp"]


def test_list_images_refuses_a_missing_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="gone: no such folder of images"):
        list_images(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"holds no image; looked for \.jpg"):
        list_images(tmp_path)


def test_links_that_lead_in_circles_end_and_each_image_is_taken_once(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train"
    (folder / "cat").mkdir(parents=True)
    for index in range(3):
        save(folder / "cat" / f"{index}.png")
    (folder / "latest").symlink_to(".")
    (folder / "cat" / "all").symlink_to("../..")
    (folder / "another").symlink_to("cat")
    (folder / "elsewhere").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").mkdir()
    save(tmp_path / "outside" / "3.tif")
    found = survey(folder)
    assert [path.relative_to(folder).as_posix() for path in found.images] == [
        "cat/0.png", "cat/1.png", "cat/2.png", "elsewhere/3.tif",
    ]  # fmt: skip
    assert found.left_out == {"links to a folder above": 2, "links to folders that are there already": 1}


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    save(tmp_path / "a.TIFF")
    for name in ("a.gif", "b.gif", "notes.txt", "README", ".hidden.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "gone.png").symlink_to("nothing.png")
    assert survey(tmp_path).line == (
        f"left out of {tmp_path}: 2 .gif files, 1 .txt file, 1 file without a suffix, 1 hidden, "
        "1 link to nothing, or no files"
    )
    (tmp_path / "a.TIFF").unlink()
    with pytest.raises(BadInput, match=r"holds no image; looked for \.jpg.*left out: .*\.gif files"):
        survey(tmp_path)


def test_many_reasons_are_counted_together(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for index in range(20):
        (tmp_path / f"x.s{index:02}").write_text("")
    (tmp_path / "y.s00").write_text("")
    (tmp_path / ("x." + "long" * 40)).write_text("")
    line = survey(tmp_path).line
    assert line.startswith(f"left out of {tmp_path}: 2 .s00 files, 1 .s01 file, ")
    assert line.endswith(", 13 for 13 more")
    assert len(line) < 300 + len(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made."""
    save(tmp_path / "a.png")
    save(tmp_path / "closed" / "b.png")
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == closed:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    closed = "closed"
    assert survey(tmp_path).left_out == {"folders that cannot be read": 1}
    closed = tmp_path.name
    with pytest.raises(BadInput, match="cannot be read: Permission denied"):
        survey(tmp_path)


def test_links_whose_names_are_too_long_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("x" * 300)
    (tmp_path / "c.png").symlink_to("c.png")
    assert survey(tmp_path).left_out == {"files that cannot be looked at": 1, "links to nothing, or no files": 1}
