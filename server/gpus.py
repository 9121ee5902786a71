"""The GPUs that engines may use, counted without a call to the driver."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

_DEVICES = Path("/dev")


def visible_gpus() -> int:
    """How many NVIDIA GPUs CUDA numbers here, from 0 on: the driver's files, as CUDA_VISIBLE_DEVICES narrows them."""
    files = sum(1 for path in _DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    # WSL has one file for all of them.
    there = files or int((_DEVICES / "dxg").exists())
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is None or not there:
        return there

    def is_there(name: str) -> bool:
        return int(name) < there if name.isdecimal() else name.startswith(("GPU-", "MIG-"))

    # CUDA takes the list up to the first entry that is no GPU.
    return sum(1 for _ in takewhile(is_there, map(str.strip, stated.split(","))))
