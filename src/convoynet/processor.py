"""The processor of this machine, as far as engines compute otherwise on it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The make of the processor and what it can do: engines compute otherwise on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    facts = dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features")))
    return " ".join([platform.machine(), *(" ".join(line.split()) for line in facts)])


def adds_in_16_bits() -> bool:
    """Whether the processor adds pairs of 8-bit products in 16 bits, where they overflow: x86 without VNNI or AMX."""
    words = set(processor().split())
    return "avx2" in words and not words & {"avx512_vnni", "avx_vnni", "amx_int8"}
