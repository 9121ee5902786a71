"""Checks a model's files against the hashes in the report that its export wrote beside them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from convoynet.server.engines.base import file_mark
from convoynet.server.engines.onnx_file import read_onnx
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.files import open_regular, read_regular
from convoynet.server.repository.layout import inside

log = logging.getLogger(__name__)

REPORT_FILE = "report.json"
_MAX_REPORT_BYTES = 64 * 2**20


Marks = tuple[tuple[str, str, str], ...]
"""Files by their paths, each with its file_mark() and SHA-256."""


def checked_files(folder: Path, version: str, file: Path, *, required: str = "") -> Marks:
    """Checks the files that a version is made of, as check_hash() does; blocks while it reads them.

    Args:
        folder: The model's folder.
        version: The version, as text.
        file: What is to be loaded; the weights that it has in files of their own are checked with it.
        required: Why a file that no report names is refused, as in "which X asks for"; "" where it is not.

    Returns:
        The files as they were when they were checked: engines load no others.

    Raises:
        InvalidModel: See check_hash(); or its weights lie somewhere else, or are missing.
    """
    checked = [_checked(folder, version, file, required)]
    beside = []
    if file.suffix == ".onnx":
        beside = [_beside(file, name) for name in sorted(read_onnx(file).external)]
    elif file.suffix == ".xml" and file.with_suffix(".bin").is_file():
        beside = [file.with_suffix(".bin")]
    return (*checked, *(_checked(folder, version, each, required) for each in beside))


def _checked(folder: Path, version: str, file: Path, required: str) -> tuple[str, str, str]:
    # The mark before the content: what is changed meanwhile is noticed.
    mark = file_mark(file)
    return str(file), mark, check_hash(folder, version, file, required=required)


def _beside(file: Path, name: str) -> Path:
    """A file of weights that an ONNX file names."""
    weights = inside(file.parent, name, f"a file of weights that {file.name} names")
    if not weights.is_file():
        raise InvalidModel(f"{file.name} has weights in {name[:200]!r}, which is not there: copy it as well")
    return weights


def check_hash(folder: Path, version: str, file: Path, *, required: str = "") -> str:
    """Compares the SHA-256 of a model's file with report.json's; blocks while it reads the file.

    The report in the version's own folder counts, then the one in the model's folder where it is of this version.

    Args:
        folder: The model's folder.
        version: The version, as text.
        file: What is to be loaded, in the version's folder.
        required: Why a file that no report names is refused, as in "which X asks for"; "" where it is not.

    Returns:
        It.

    Raises:
        InvalidModel: The file is not the one of the report, the report cannot be read, or one is required.
    """
    stated, key = None, file.name
    if folder.is_dir():  # a model that is a file has no report
        key = f"{version}/{file.relative_to(folder / version)}"
        stated = _stated(folder / version / REPORT_FILE, key) or _stated(folder / REPORT_FILE, key)
    if stated is None:
        if required:
            raise InvalidModel(
                f"version {version} has no {REPORT_FILE} that names {key}, {required}: `convoy export` writes one"
            )
        if folder.is_dir():
            log.info(
                "model %s version %s has no report that names its file %s: it is loaded unchecked",
                folder.name, version, file.name,
            )  # fmt: skip
    with open_regular(file) as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if stated is not None and actual != stated:
        raise InvalidModel(
            f"the sha256 of {key} is {actual[:12]}..., but {REPORT_FILE} says {stated[:12]}...: the file was changed "
            "or damaged after its export; copy or export it again"
        )
    return actual


def _stated(report: Path, key: str) -> str | None:
    """The hash that a report gives for a file, or None where it gives none."""
    try:
        formats = json.loads(read_regular(report, _MAX_REPORT_BYTES))["formats"]
        return next((str(f["sha256"]).lower() for f in formats if f["file"] == key), None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidModel(
            f"{REPORT_FILE} cannot be read ({type(error).__name__}): export again, or remove it to load unchecked"
        ) from error
