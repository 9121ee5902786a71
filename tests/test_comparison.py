"""docs/comparison.md: its figures are those of the committed results, and each mark of a source has its source."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "comparison.md").read_text()
AT_ONCE = 32
CASES = ("tiny", "uint8", "jpeg")
# As the tables call them, to as the results do.
PEERS = {
    "amd-epyc": {"Convoy": "convoy", "Triton 2.51, Python backend": "triton", "PyTriton 0.7": "pytriton"},
    "intel-r-xeon-r-processor": {
        "Convoy, present gRPC": "convoy-native",
        "Convoy, grpcio": "convoy",
        "Triton 2.51, Python backend": "triton",
        "PyTriton 0.7": "pytriton",
        "KServe's Python server": "kserve",
        "MLServer": "mlserver",
        "LitServe 0.2.19": "litserve",
    },
}


def test_speeds_are_those_of_the_results() -> None:
    tables = re.findall(r"^\| server \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert len(tables) == len(PEERS)
    for (machine, peers), table in zip(PEERS.items(), tables, strict=True):
        file = f"benchmarks/results/peers-{machine}-2-cores.json"
        assert f"`{file}`" in PAGE
        rows = [row for row in json.loads((ROOT / file).read_text())["rows"] if not row["paced"]]
        shown = {name: figures for name, *figures in (line.strip("| \n").split(" | ") for line in table.splitlines())}
        assert shown == {name: [_rate(rows, peer, case) for case in CASES] for name, peer in peers.items()}


def _rate(rows: list[dict[str, Any]], peer: str, case: str) -> str:
    measured = (peer, case, AT_ONCE)
    found = [row for row in rows if (row["peer"], row["case"], row["concurrency"]) == measured]
    return f"{median(row['requests_per_s'] for row in found):,.0f}"


def test_every_mark_has_its_source() -> None:
    told = {mark for marks in re.findall(r"\[([A-Z]\d(?:, [A-Z]\d)*)\]", PAGE) for mark in marks.split(", ")}
    assert told == set(re.findall(r"^\| ([A-Z]\d) \|", PAGE, re.MULTILINE))
