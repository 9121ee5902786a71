"""The evidence that is published with a model: the report in three forms, and plots."""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.evidence.html_report import HTML_FILE, html
from convoynet.exporter.evidence.parity import Comparison
from convoynet.exporter.evidence.report import JSON_FILE, PARITY_PLOT, SPEED_PLOT, TEXT_FILE, Report, likeness, text
from convoynet.exporter.evidence.speed import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE_WIDTH = 60
Plots = Mapping[str, Callable[[Path], None]]
NO_PLOTS: Plots = MappingProxyType({})


def write(report: Report, folder: Path, compared: Comparison, more: Plots = NO_PLOTS) -> list[Path]:
    """Write report.json, report.md, report.html and the plots into `folder`; returns their paths.

    Args:
        report: what to tell.
        folder: an existing folder.
        compared: has the values for the first plot.
        more: file name -> what draws a further plot into a file.
    """
    paths = [folder / file for file in (JSON_FILE, TEXT_FILE, HTML_FILE)]
    plots = [folder / file for file in (PARITY_PLOT, SPEED_PLOT, *more)]
    _plot_parity(report, compared, plots[0])
    _plot_speed(report, plots[1])
    for path in plots[2:]:
        more[path.name](path)
    for path, content in zip(paths, (report.to_json(), text(report), html(report, plots)), strict=True):
        # Names of files can be no text at all, and are shown by their bytes.
        path.write_text(content, encoding="utf-8", errors="backslashreplace")
    return paths + plots


def _plot_parity(report: Report, compared: Comparison, path: Path) -> None:
    from matplotlib.figure import Figure

    value = "score" if report.parity.task == "detection" else "logit"
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    ends = [float(compared.reference.min()), float(compared.reference.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    axes.scatter(compared.reference, compared.exported, s=4, alpha=0.5, color="#2a6fbb", linewidths=0, zorder=2)
    axes.set_xlabel(f"{value}, {report.before}")
    axes.set_ylabel(f"{value}, exported {report.precision}")
    axes.set_title(textwrap.fill(f"{report.name}: {likeness(report.parity)}", _TITLE_WIDTH), fontsize=10)
    _save(figure, path)


def _plot_speed(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    timings = report.speed["measured"]
    places = np.arange(len(timings))
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    if report.speed["withheld"]:
        axes.text(0.5, 0.5, "withheld", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        _save(figure, path)
        return
    sides = [(rate["engine"], rate["precision"]) for rate in timings[0]["rates"]]
    width = 0.8 / len(sides)
    for index, (engine, precision) in enumerate(sides):
        rates = [timing["rates"][index] for timing in timings]
        heights = np.array([rate["images_per_second"] for rate in rates])
        ends = np.array([rate["quartiles"] for rate in rates]).T
        shift = (index - (len(sides) - 1) / 2) * width
        color = "0.65" if not index else f"C{index - 1}"
        bars = axes.bar(places + shift, heights, width, label=f"{engine} {precision}", color=color)
        axes.errorbar(places + shift, heights, np.abs(ends - heights), fmt="none", ecolor="0.2", elinewidth=0.8)
        axes.bar_label(bars, [shown(height) for height in heights], fontsize=7, padding=3)
    axes.set_xticks(places, [f"batch {timing['batch']}" for timing in timings])
    axes.set_ylabel("images per second")
    axes.set_title(f"{report.name}: speed", fontsize=10)
    axes.margins(y=0.08)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)  # it covers no bar there
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    # Without the library's stamp equal figures are equal files.
    figure.savefig(path, dpi=100, metadata={"Software": None})
