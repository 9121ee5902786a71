"""The report that an export leaves beside its model, for people: where it lies, and its bytes."""

from __future__ import annotations

import json
from pathlib import Path

from convoynet.server.errors import InvalidModel
from convoynet.server.repository.files import read_regular
from convoynet.server.repository.hashes import REPORT_FILE
from convoynet.server.repository.layout import inside
from convoynet.server.spec import ModelSpec

PAGE_FILE = "report.html"
_MOST_BYTES = 32 * 2**20


def report_page(spec: ModelSpec) -> Path | None:
    """Where the page of a version's report lies, or None where there is none; blocks while it looks.

    The page in the version's own folder counts, then the one in the model's folder where its report is of this version.
    """
    folder = next((path for path in spec.engine.file.parents if path.name == spec.version), None)
    if spec.engine.file.name == spec.version:  # an ensemble has no file
        folder = spec.engine.file
    if folder is None:
        return None
    for page in (folder / PAGE_FILE, folder.parent / PAGE_FILE):
        if page.is_file() and (page.parent == folder or _version(page.with_name(REPORT_FILE)) == spec.version):
            return page
    return None


def read_report_page(page: Path) -> bytes:
    """All of it; blocks.

    Raises:
        InvalidModel: It leads out of its folder, is no regular file, or is larger than a report gets.
        OSError: It is not there any more, or cannot be read.
    """
    return read_regular(inside(page.parent, page.name, PAGE_FILE), _MOST_BYTES)


def _version(report: Path) -> str:
    try:
        return str(json.loads(read_regular(report))["version"])
    except (OSError, InvalidModel, ValueError, KeyError, TypeError, RecursionError):
        return ""
