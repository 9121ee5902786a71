"""For processes of this package's own modules."""

from __future__ import annotations

import os
from pathlib import Path


def package_environment() -> dict[str, str]:
    """The environment in which `python -P -m server...` finds this package.

    Not from where the server was started: a folder is no place to import from because somebody stands in it.
    """
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), root)))}
