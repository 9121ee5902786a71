"""The results of benchmarks/gpu.py as the tables of gpu.md and a plot.

python benchmarks/gpu_report.py benchmarks/results/gpu-*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("gpu.md")
# What is between these lines of gpu.md is made here.
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
NOTHING = "Not measured yet: no GPU has run this benchmark."
REFERENCE = "pytorch eager fp32"
_COLUMNS = 3


def main(files: Sequence[str]) -> int:
    """Writes page and plots of some results."""
    for file in map(Path, files):
        write(json.loads(file.read_text()), file.with_suffix(".png"))
    return 0


def write(stated: Mapping[str, Any], picture: Path) -> None:
    """Put the tables of a device into gpu.md, in the place of what was there, and draw its plot."""
    plot(stated, picture)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(stated, picture)}{END}{after}")


def tables(stated: Mapping[str, Any], picture: Path) -> str:
    """All of them, as Markdown."""
    rows = stated["rows"]
    if not rows:
        return f"{NOTHING}\n"
    about = ", ".join(f"{name} {value}" for name, value in stated["environment"].items() if value)
    parts = [f"\n{stated['device']}; {about}.\n"]
    for network, found in bare(rows).items():
        parts += [f"\n### {network}: bare engines, images/s by batch size, input on the GPU\n\n", _bare_table(found)]
    parts += [_table(title, heads, _listed(rows, kind, figures)) for kind, title, heads, figures in _LISTS]
    failed = [f"- {key}: {row['error']}\n" for key, row in rows.items() if "error" in row]
    if failed:
        parts += ["\n### Rows that failed\n\n", *failed]
    if picture.is_file():
        parts.append(f"\n![images/s by batch size](results/{picture.name})\n")
    return "".join(parts)


def bare(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Images/s with the input on the GPU: by network, then "engine precision", then batch size."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for kind, network, engine, precision, row, figures in _split(rows):
        if kind == "bare" and "error" not in figures:
            rates = found.setdefault(network, {}).setdefault(f"{engine} {precision}", {})
            rates[int(row)] = figures["resident_per_s"]
    return found


def plot(stated: Mapping[str, Any], path: Path) -> None:
    """A panel a network: images/s over the batch size, a line an engine and precision."""
    found = bare(stated["rows"])
    if not found:
        return
    across = min(len(found), _COLUMNS)
    down = -(-len(found) // across)
    figure = Figure(figsize=(5 * across, 3.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (network, engines) in zip(panels, found.items(), strict=False):
        for name, rates in engines.items():
            style = "--" if name.startswith("pytorch") else "-"
            axes.plot(list(rates), list(rates.values()), style, marker=".", linewidth=1, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(network, fontsize=10)
        axes.set_xlabel("batch")
        axes.set_ylabel("images/s")
        axes.legend(fontsize=6)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.suptitle(stated["device"], fontsize=11)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _bare_table(engines: Mapping[str, Mapping[int, float]]) -> str:
    """With the best of each line against the best of PyTorch eager FP32."""
    batches = sorted({batch for rates in engines.values() for batch in rates})
    reference = max(engines.get(REFERENCE, {}).values(), default=None)
    lines = []
    for name, rates in engines.items():
        ratio = f"{max(rates.values()) / reference:.1f}" if reference else "-"
        lines.append([name, *(_number(rates.get(batch)) for batch in batches), ratio])
    return _markdown(["engine", *map(str, batches), "best / eager FP32"], lines)


_LISTS = (
    (
        "served",
        "Served over gRPC, against the bare engine with the host's copies in the same run",
        ("images/s", "bare", "ratio", "in flight", "p99 ms", "client cores"),
        ("images_per_s", "bare_per_s", "ratio", "in_flight", "p99_ms", "client_cores"),
    ),
    (
        "latency",
        "Latency of requests of 8 images at shares of the peak, in ms",
        ("images/s offered", "p50", "p95", "p99"),
        ("offered_images_per_s", "p50_ms", "p95_ms", "p99_ms"),
    ),
    (
        "frontends",
        "Requests/s of 4 KB by number of front ends",
        ("requests/s", "p99 ms", "cores", "client cores"),
        ("requests_per_s", "p99_ms", "cores", "client_cores"),
    ),
)


def _listed(rows: Mapping[str, Mapping[str, Any]], wanted: str, figures: Sequence[str]) -> list[list[str]]:
    return [
        [network, f"{engine} {precision}", row, *(_number(found.get(figure)) for figure in figures)]
        for kind, network, engine, precision, row, found in _split(rows)
        if kind == wanted and "error" not in found
    ]


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f"\n### {title}\n\n{_markdown(['network', 'engine', 'row', *heads], lines)}" if lines else ""


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _split(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str, str, Mapping[str, Any]]]:
    for key, figures in rows.items():
        kind, network, engine, precision, row = key.split(" | ")
        yield kind, network, engine, precision, row, figures


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
