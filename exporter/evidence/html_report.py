"""report.html: the evidence of an export in one file that opens by itself, plots included."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from convoynet.exporter import assets
from convoynet.exporter.evidence import engines
from convoynet.exporter.evidence.report import Report, megabytes, others, spread_error
from convoynet.exporter.evidence.speed import line, shown
from convoynet.exporter.evidence.told import file_line, layers_line

HTML_FILE = "report.html"
_TEMPLATE = "report.html.j2"
_NUMBERS = 4
_WIDE = 20


def html(report: Report, plots: Sequence[Path]) -> str:
    """Return the page.

    Args:
        report: what to tell.
        plots: PNG files, which go into the page.
    """
    templates = Environment(loader=FileSystemLoader(assets.FOLDER), autoescape=True)
    return templates.get_template(_TEMPLATE).render(
        report=report,
        cards=_cards(report),
        before_after=_before_after(report),
        engines=engines.rows(report.engines, report.precision),
        others=[{"": name, " ": told} for name, told in others(report.parity)],
        verdicts=[one.row for one in report.verdicts],
        speed=line(report.speed),
        stages=[_stage(stage) for stage in report.stages],
        plots=[{"title": plot.stem, "data": base64.b64encode(plot.read_bytes()).decode()} for plot in plots],
        files=[{"": entry["format"], " ": file_line(entry)} for entry in report.formats],
        machine=_machine(report),
        engine_layers=layers_line(report.engine) if report.engine else "",
        table=_table,
        facts=lambda step: [{"": key, " ": value} for key, value in step.items() if not _is_table(value)],
        tables_of=_tables_of,
        rows_of=list,
    )


def _cards(report: Report) -> list[dict[str, str]]:
    speed, parity = report.speed, report.parity
    smaller = report.reference_bytes / report.formats[0]["bytes"]
    fast = {"value": "withheld", "label": f"speed: {speed['withheld']}"}
    if not speed["withheld"]:
        ratio = speed["images_per_second"] / speed["reference_images_per_second"]
        fast = {"value": f"{ratio:.1f}x", "label": f"PyTorch's speed, {shown(speed['images_per_second'])} images/s"}
    cards = [
        fast,
        {"value": f"{smaller:.1f}x", "label": f"smaller, {megabytes(report.formats[0]['bytes'])}"},
        {"value": f"{parity.agreement:.1%}", "label": parity.agreement_name},
    ]
    if report.accuracy is not None:
        change = 100 * (report.accuracy.top1 - report.accuracy.reference_top1)
        cards.append({"value": f"{report.accuracy.top1:.2%}", "label": f"top-1, {change:+.2f} points"})
    if parity.sqnr_db is not None:
        cards.append({"value": f"{parity.sqnr_db:.1f} dB", "label": "signal to noise of the outputs"})
    return cards


def _before_after(report: Report) -> list[dict[str, Any]]:
    speed, accuracy = report.speed, report.accuracy
    rows = [
        ("parameters", f"{report.parameters['before']:,}", f"{report.parameters['after']:,}"),
        ("multiply-adds", f"{report.macs['before']:,}", f"{report.macs['after']:,}"),
        ("bytes", f"{report.reference_bytes:,}", f"{report.formats[0]['bytes']:,}"),
    ]
    for batch in speed["batches"]:
        before, after = (
            "withheld" if batch["withheld"] else shown(batch[key])
            for key in ("reference_images_per_second", "images_per_second")
        )
        rows.append((f"images/s at batch {batch['batch']}", before, after))
    if accuracy is not None:
        rows.append((f"top-1 on {accuracy.samples} images", f"{accuracy.reference_top1:.2%}", f"{accuracy.top1:.2%}"))
        rows.append(("top-5", f"{accuracy.reference_top5:.2%}", f"{accuracy.top5:.2%}"))
    return [{"": name, "PyTorch FP32": before, report.precision: after} for name, before, after in rows]


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    parity = stage["parity"]
    return {
        "stage": stage["stage"],
        "file": megabytes(stage["bytes"]) if stage.get("bytes") else "",
        "top-1 agreement": _share(parity["top1_agreement"]),
        "matched detections": _share(parity["matched"]),
        "signal to noise": "" if parity["sqnr_db"] is None else f"{parity['sqnr_db']:.1f} dB",
        "error of the spread": spread_error(parity),
        "smallest cosine": "" if parity["min_cosine"] is None else f"{parity['min_cosine']:.6f}",
        "largest error": f"{parity['max_rel_error']:.1e}",
        "top-1": _share(stage.get("top1")),
        "run by": parity["runtime"],
    }


def _machine(report: Report) -> list[dict[str, Any]]:
    machine = report.environment
    rows = {
        "processor": machine["cpu"],
        "GPU": machine["gpu"] or "none",
        "threads": machine["threads"],
        "platform": machine["platform"],
        "Python": machine["python"],
        **machine["libraries"],
        "seconds": report.seconds,
    }
    return [{"": key, " ": value} for key, value in rows.items()]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _tables_of(step: Mapping[str, Any]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for key, value in step.items():
        if _is_table(value):
            yield key, value


def _table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """A table of rows with the same keys; a column in which nothing stands is left out."""
    if not rows:
        return Markup("")
    columns = [key for key in rows[0] if any(row.get(key) not in (None, "") for row in rows)]
    head = Markup("").join(Markup("<th>{}</th>").format(column) for column in columns)
    lines = [
        Markup("").join(Markup("<td{}>{}</td>").format(_class(row.get(key)), _cell(row.get(key))) for key in columns)
        for row in rows
    ]
    body = Markup("").join(Markup("<tr>{}</tr>").format(line) for line in lines)
    return Markup('<div class="scroll"><table><tr>{}</tr>{}</table></div>').format(head, body)


def _class(value: object) -> Markup:
    """What is long is broken into lines: a table wider than the page hides its last columns."""
    return Markup(' class="text"') if isinstance(value, str) and len(value) > _WIDE else Markup("")


def _cell(value: object) -> Markup:
    if value is None:
        return Markup("")
    return escape(f"{value:.{_NUMBERS}g}" if isinstance(value, float) else str(value))
