"""A folder of models, and the folder of one model that is served under a name from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoynet.server.errors import InvalidModel
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.repository import Repository
from tests.server.repositories import DEFAULTS, write_plain


async def test_a_models_own_folder_is_one_model_of_the_given_name(tmp_path: Path) -> None:
    home = write_plain(tmp_path, "resnet", versions=(1, 3), config='name: "resnet"')
    repository = Repository([Folder(home, "pets")], DEFAULTS)
    assert await repository.names() == {"pets"}
    (found,) = await repository.read("pets")
    assert found.spec is not None, found.reason
    assert (found.spec.name, found.spec.version) == ("pets", "3")
    assert found.config is not None
    assert found.config.name == "pets"
    assert (await repository.fingerprints())["pets"] == await repository.fingerprint("pets") != ""
    assert await repository.fingerprint("3") == ""
    with pytest.raises(InvalidModel, match="no model repository holds a folder '3'"):
        await repository.read("3")


async def test_a_folder_named_as_the_model_may_hold_another_models_config(tmp_path: Path) -> None:
    """KServe mounts every model at /mnt/models; one may well be called `models`."""
    home = write_plain(tmp_path, "models", config='name: "resnet"')
    (found,) = await Repository([Folder(home, "models")], DEFAULTS).read("models")
    assert found.spec is not None
    assert found.spec.name == "models"


def test_a_version_with_a_models_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"")
    assert Folder(tmp_path, "pets").folders() == {"pets": tmp_path}


def test_a_repository_is_one_whatever_its_models_are_called(tmp_path: Path) -> None:
    write_plain(tmp_path, "1")
    write_plain(tmp_path, "resnet")
    assert Folder(tmp_path, "pets").folders() == {"1": tmp_path / "1", "resnet": tmp_path / "resnet"}
    assert Folder(tmp_path, "pets").find("pets") is None


async def test_the_models_folder_may_be_a_link_where_it_was_given(tmp_path: Path) -> None:
    home = write_plain(tmp_path, "resnet")
    (tmp_path / "link").symlink_to(home)
    (found,) = await Repository([Folder(tmp_path / "link", "pets")], DEFAULTS).read("pets")
    assert found.spec is not None
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "resnet").symlink_to(home)
    with pytest.raises(InvalidModel, match="symbolic link"):
        await Repository([Folder(tmp_path / "models")], DEFAULTS).read("resnet")
