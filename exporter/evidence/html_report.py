"""report.html: the evidence of an export in one file that opens by itself, plots included."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from convoynet.exporter import assets
from convoynet.exporter.evidence import engines
from convoynet.exporter.evidence.report import Report, answers_line, megabytes, others, spread_error
from convoynet.exporter.evidence.speed import line, shown
from convoynet.exporter.evidence.told import file_line, layers_line

HTML_FILE = "report.html"
_TEMPLATE = "report.html.j2"
_NUMBERS = 4
_WIDE = 20
_WIDE_PLOT = 1.5
_PLOTS = {
    "parity": "Each point is one output for one image: the nearer to the line, the closer is the export to {who}.",
    "speed": "Images a second of {who} and each engine, medians of rounds in turn; a line spans half of the rounds.",
    "divergence": "How much larger each tensor is than its error against the float32 graph; below the dashed line the "
    "two have parted.",
    "sensitivity": "What the outputs lose when one layer alone is quantized: the lowest points cost most.",
    "qat": "The loss over the steps of quantization-aware training.",
    "training": "The loss over the steps of a training and, where it was measured, what became of held-out images.",
}
"""What a plot shows, by the beginning of its file's name; `who` made the reference."""


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
        answers=answers_line(report.answers) if report.answers else "",
        by_class=_by_class(report.answers) if report.answers else [],
        engines=engines.rows(report.engines, report.precision),
        others=[{"": name, " ": told} for name, told in others(report.parity)],
        verdicts=[one.row for one in report.verdicts],
        speed=line(report.speed).replace("`", ""),
        stages=[_stage(stage) for stage in report.stages],
        tensors=_tensors(report),
        plots=[_plot(plot, report.parity.who) for plot in plots],
        files=[{"": entry["format"], " ": file_line(entry)} for entry in report.formats],
        machine=_machine(report),
        engine_layers=layers_line(report.engine) if report.engine else "",
        table=table,
        facts=lambda step: [{"": key, " ": value} for key, value in step.items() if not _is_table(value)],
        tables_of=_tables_of,
        rows_of=list,
    )


def _plot(plot: Path, who: str) -> dict[str, Any]:
    said, content = _PLOTS.get(plot.stem.partition("-")[0], "").format(who=who), plot.read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of a PNG
    wide = width > _WIDE_PLOT * height
    return {"title": plot.stem, "said": said, "wide": wide, "data": base64.b64encode(content).decode()}


def _tensors(report: Report) -> list[dict[str, Any]]:
    tensors = report.divergence["tensors"] if report.divergence else []
    return [
        {"tensor": one["tensor"], "layer": one.get("layer"), "operator": one["operator"], "dB": one["sqnr_db"]}
        for one in tensors
    ]


def _cards(report: Report) -> list[dict[str, str]]:
    """The figures that are looked at first, each with a sentence that says what it is."""
    speed, parity = report.speed, report.parity
    smaller = report.reference_bytes / report.formats[0]["bytes"]
    fast = {"value": "withheld", "label": "speed", "said": f"{speed['withheld'][:1].upper()}{speed['withheld'][1:]}."}
    if not speed["withheld"]:
        ratio = speed["images_per_second"] / speed["reference_images_per_second"]
        fast = {
            "value": f"{ratio:.1f}x",
            "label": f"{report.parity.who}'s speed, {shown(speed['images_per_second'])} images/s",
            "said": f"At batch {speed['batch']}, both on the same machine and threads, in turn.",
        }
    cards = [
        fast,
        {
            "value": f"{smaller:.1f}x",
            "label": f"smaller, {megabytes(report.formats[0]['bytes'])}",
            "said": f"The file, against the {report.weights_named}.",
        },
        {
            "value": f"{parity.agreement:.1%}",
            "label": parity.agreement_name,
            "said": f"With {parity.who}, on {parity.samples} images{_within(parity.agreement_interval)}.",
        },
    ]
    if report.accuracy is not None:
        change = 100 * (report.accuracy.top1 - report.accuracy.reference_top1)
        high, low = (-100 * end for end in report.accuracy.drop_interval)
        cards.append(
            {
                "value": f"{report.accuracy.top1:.2%}",
                "label": f"top-1, {change:+.2f} points",
                "said": f"The right class comes first{_within(report.accuracy.interval)}; the change lies between "
                f"{low:+.2f} and {high:+.2f}.",
            }
        )
    if parity.sqnr_db is not None:
        cards.append(
            {
                "value": f"{parity.sqnr_db:.1f} dB",
                "label": "signal to noise of the outputs",
                "said": f"How much larger {parity.who}'s outputs are than the error: 20 dB is 10 times, 40 dB 100.",
            }
        )
    return cards


def _within(interval: tuple[float, float] | None) -> str:
    """The interval of a share, behind what it is an interval of."""
    return "" if interval is None else f", 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _before_after(report: Report) -> list[dict[str, Any]]:
    speed, accuracy = report.speed, report.accuracy
    rows = [
        ("parameters", f"{report.parameters['before']:,}", f"{report.parameters['after']:,}"),
        ("multiply-adds", f"{report.macs['before']:,}", f"{report.macs['after']:,}"),
        ("bytes", f"{report.reference_bytes:,}", f"{report.formats[0]['bytes']:,}"),
    ]
    references = {timing["batch"]: timing["rates"][0] for timing in speed["measured"]}
    for batch in speed["batches"]:
        before = after = "withheld"
        if not batch["withheld"]:
            quartiles = references[batch["batch"]]["quartiles"], batch["quartiles"]
            rates = batch["reference_images_per_second"], batch["images_per_second"]
            before, after = (
                f"{shown(r)} ({shown(q[0])} to {shown(q[1])})" for r, q in zip(rates, quartiles, strict=True)
            )
        rows.append((f"images/s at batch {batch['batch']}", before, after))
    if accuracy is not None:
        sides = ((accuracy.reference_top1, accuracy.reference_interval), (accuracy.top1, accuracy.interval))
        before, after = (f"{share:.2%} ({100 * low:.1f} to {100 * high:.1f})" for share, (low, high) in sides)
        rows.append((f"top-1 on {accuracy.samples} images", before, after))
        rows.append(("top-5", f"{accuracy.reference_top5:.2%}", f"{accuracy.top5:.2%}"))
    return [{"": name, report.before: before, report.precision: after} for name, before, after in rows]


def _by_class(answers: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "class": one["class"],
            "images": one["images"],
            "before": f"{one['before']:.1%}{_ends(one['before_interval'])}",
            "after": f"{one['after']:.1%}{_ends(one['after_interval'])}",
            "lost": one["lost"],
            "gained": one["gained"],
            "p": f"{one['p']:.2g}",
            "": "paid" if one["paid"] else "",
        }
        for one in answers["classes"]
    ]


def _ends(interval: Sequence[float]) -> str:
    return f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


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


def table(rows: Sequence[Mapping[str, Any]], name: str) -> Markup:
    """A table of rows with the same keys; a column in which nothing stands is left out.

    Args:
        rows: The first cell of each names it. Where no key is a word there is no head.
        name: What the table is of, for whoever hears it.
    """
    if not rows:
        return Markup("")
    columns = [key for key in rows[0] if any(row.get(key) not in (None, "") for row in rows)]
    head = Markup("")
    if any(column.strip() for column in columns):
        head = Markup("").join(
            Markup('<th scope="col">{}</th>').format(column) if column.strip() else Markup("<td></td>")
            for column in columns
        )
        head = Markup("<tr>{}</tr>").format(head)
    lines = []
    for row in rows:
        first, *others = (row.get(key) for key in columns)
        cells = Markup("").join(Markup("<td{}>{}</td>").format(_class(value), _cell(value)) for value in others)
        lines.append(Markup('<tr><th scope="row"{}>{}</th>{}</tr>').format(_class(first), _cell(first), cells))
    # Whoever has no mouse scrolls what has the focus.
    return Markup('<div class="scroll" role="region" tabindex="0" aria-label="{}"><table>{}{}</table></div>').format(
        name, head, Markup("").join(lines)
    )


def _class(value: object) -> Markup:
    """What is long is broken into lines: a table wider than the page hides its last columns."""
    return Markup(' class="text"') if isinstance(value, str) and len(value) > _WIDE else Markup("")


def _cell(value: object) -> Markup:
    if value is None:
        return Markup("")
    return escape(f"{value:.{_NUMBERS}g}" if isinstance(value, float) else str(value))
