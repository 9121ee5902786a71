"""What an export found out: report.json for programs, report.md and the lines of a terminal for people."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convoynet.exporter.evidence import engines, speed
from convoynet.exporter.evidence.accuracy import Accuracy
from convoynet.exporter.evidence.parity import PYTORCH, Parity
from convoynet.exporter.evidence.told import file_line, layers_line, markdown
from convoynet.exporter.evidence.verdicts import Verdict, line, verdicts

SCHEMA_VERSION = 1
# The widest cell of the engines' columns on a terminal.
_CELL = 40
# Classes that a line names.
_MOST_PAID = 5
JSON_FILE, TEXT_FILE = "report.json", "report.md"
PARITY_PLOT, SPEED_PLOT = "parity.png", "speed.png"
_LIBRARIES = (
    "convoynet",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "numpy",
    "tensorrt",
    "tensorrt-rtx",
)


@dataclass(frozen=True)
class Report:
    """Everything that report.json says; docs/exporting.md explains the parts.

    Shares (agreement, accuracy) are 0 to 1, sizes are bytes, speeds are images per second.
    """

    name: str
    version: int
    arch: str
    paper: str
    weights: dict[str, str]
    target: str
    precision: str
    input: dict[str, Any]
    classes: int
    formats: list[dict[str, Any]]
    reference_bytes: int
    parameters: dict[str, int]
    macs: dict[str, int]
    images: dict[str, Any]
    parity: Parity
    stages: list[dict[str, Any]]
    accuracy: Accuracy | None
    speed: dict[str, Any]
    calibration: dict[str, Any] | None
    compression: list[dict[str, Any]]
    engine: dict[str, Any] | None
    # What each engine that may serve the model gave; `parity`, `accuracy` and `speed` are the first one's.
    engines: list[dict[str, Any]]
    caveats: list[str]
    environment: dict[str, Any]
    # The steps as a recipe that makes this again, and what else it takes.
    recipe: str = ""
    seed: int = 0
    # To the PyTorch model after the steps that changed it, where there are such.
    parity_to_compressed: Parity | None = None
    # What the images say about --max-drop, where it was given.
    max_drop: dict[str, Any] | None = None
    # What became of the answers on --eval's images: flips, classes, calibration; of the engine that serves.
    answers: dict[str, Any] | None = None
    divergence: dict[str, Any] | None = None
    arithmetic: dict[str, Any] | None = None
    sensitivity: list[dict[str, Any]] | None = None
    # The map of features that explanations are of, and how far they are from PyTorch's gradient.
    explanation: dict[str, Any] | None = None
    # The tensor that the output of features is read from, and how many there are.
    features: dict[str, Any] | None = None
    seconds: float = 0.0

    def finished(self, seconds: float) -> "Report":
        """Return the same report with the time that the export took."""
        return replace(self, seconds=round(seconds, 2))

    @property
    def before(self) -> str:
        """The model that everything is compared with, for a column or an axis."""
        return "PyTorch FP32" if self.parity.who == PYTORCH else self.parity.who

    @property
    def weights_named(self) -> str:
        """The weights whose size the file's is compared with."""
        return "float32 weights of the network that was named" if self.parity.who == PYTORCH else "weights as given"

    @property
    def verdicts(self) -> list[Verdict]:
        """What the gates judged each output by."""
        return verdicts(self.parity_to_compressed or self.parity, self.precision)

    def to_json(self) -> str:
        """Return report.json's text: strict JSON, which has no NaN."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"


def _explanation(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    height, width = found["size"]
    error = found["max_rel_error"]
    compared = "" if error is None else f", {error:.1e} from PyTorch's gradient in float32"
    return f"Grad-CAM of the winning class at {found['features']}, {height} x {width}{compared}"


def environment(threads: int) -> dict[str, Any]:
    """Return the machine and the libraries that the figures were measured with."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def text(report: Report) -> str:
    """Return report.md: one screen for a person."""
    file = report.formats[0]
    parity = report.parity
    low, high = report.input["batch"]
    of = "the float32 weights' size" if parity.who == PYTORCH else f"the size of {parity.who}'s weights"
    smaller = f", {file['bytes'] / report.reference_bytes:.2f} of {of}" if report.reference_bytes else ""
    rows = [
        ("weights", f"{report.weights['source']} (sha256 {report.weights['sha256'][:12]})"),
        ("network", f"{report.parameters['after'] / 1e6:.2f} M parameters, {report.macs['after'] / 1e9:.3f} G MACs"),
        ("multiply-adds", report.arithmetic["line"] if report.arithmetic else ""),
        *(("file", file_line(entry)) for entry in report.formats),
        ("input", f"{report.input['dtype']} {report.input['shape']}, batch {low} to {high}"),
        ("preprocessing", report.input.get("preprocessing", "")),
        ("preprocessing checked", report.input.get("preprocessing_check", "")),
        ("size", f"{megabytes(file['bytes'])}{smaller}"),
        ("speed", speed.line(report.speed)),
        (parity.agreement_name, f"{parity.agreement:.2%}, {parity.samples} images"),
        ("top-5 agreement", "" if parity.top5_agreement is None else f"{parity.top5_agreement:.2%}"),
        ("smallest cosine", "" if parity.min_cosine is None else f"{parity.min_cosine:.6f}"),
        ("error against spread", parity.spread.line if parity.spread is not None else ""),
        ("signal to noise", "" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB"),
        ("largest error", error_of(parity)),
        *others(parity),
        ("accuracy", accuracy_line(report.accuracy) if report.accuracy else _unmeasured(parity)),
        ("answers", answers_line(report.answers) if report.answers else ""),
    ]  # fmt: skip
    if report.max_drop:
        rows.append((f"--max-drop {report.max_drop['allowed']:g}", report.max_drop["line"]))
    if report.calibration:
        rows.append(("calibration", f"{_methods(report.calibration)}, {report.calibration['source']}"))
    rows.append(("biases", _biases(report)))
    rows.append(("explanation", _explanation(report.explanation)))
    rows.append(("features", f"{report.features['size']} at {report.features['tensor']}" if report.features else ""))
    if report.engine:
        rows.append(("engine", report.engine["line"]))
        rows.append(("layers of the engine", layers_line(report.engine)))
    lines = [
        f"# {markdown(report.name)}, version {report.version}",
        "",
        markdown(f"{report.arch} in {report.precision} for a {report.target} machine. {report.paper}"),
        "",
        "| | |",
        "|---|---|",
        *(f"| {markdown(key)} | {markdown(value)} |" for key, value in rows if value),
        "",
        markdown(
            f"Compared with {parity.reference}; exported model in {parity.runtime}, at batch sizes "
            f"{', '.join(map(str, parity.batch_sizes))}, on {report.images['check']}."
        ),
        "",
        f"![exported outputs against {parity.who}'s]({PARITY_PLOT}) ![images per second]({SPEED_PLOT})",
        "",
    ]
    if report.verdicts:
        lines += ["What was judged:", "", *_table([one.row for one in report.verdicts]), ""]
    lines += [*_table(engines.rows(report.engines, report.precision)), ""]
    if len(report.stages) > 1:
        lines += [*_stage_table(report), ""]
    if report.caveats:
        lines += ["Mind:", "", *(f"- {markdown(caveat)}" for caveat in report.caveats), ""]
    machine = report.environment
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    lines.append(markdown(f"Measured on {machine['gpu'] or machine['cpu']}, {threads}."))
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows with the same keys as a Markdown table."""
    head = [" | ".join(map(markdown, rows[0])), " | ".join("---" for _ in rows[0])]
    return [f"| {line} |" for line in (*head, *(" | ".join(map(markdown, row.values())) for row in rows))]


def _stage_table(report: Report) -> list[str]:
    """The stages of the export, each against the PyTorch model that was named, as a Markdown table."""
    lines = [
        "| stage | agreement | signal to noise | error of the spread | top-1 | file |",
        "|---|---|---|---|---|---|",
    ]
    for stage in report.stages:
        parity = Parity.from_json(stage["parity"])
        cells = [
            stage["stage"],
            f"{parity.agreement:.2%}",
            "" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB",
            spread_error(stage["parity"]),
            "" if stage.get("top1") is None else f"{stage['top1']:.2%}",
            megabytes(stage["bytes"]) if stage.get("bytes") else "",
        ]
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return lines


def summary(report: Report, folder: Path, repository: Path) -> str:
    """Return what a terminal shows at the end of an export."""
    parity, file = report.parity, report.formats[0]
    weights = "float32 weights" if parity.who == PYTORCH else f"weights in {parity.who}"
    rows = [
        ("preprocessing", report.input.get("preprocessing", "")),
        ("checked", report.input.get("preprocessing_check", "")),
        ("reference", parity.reference if parity.who != PYTORCH else ""),
        ("parity", f"{parity.samples} images, {likeness(parity)}, max error {error_of(parity)}"),
        *others(parity),
        ("judged", line(report.verdicts)),
        ("accuracy", accuracy_line(report.accuracy) if report.accuracy else ""),
        ("answers", answers_line(report.answers) if report.answers else ""),
        ("max drop", report.max_drop["line"] if report.max_drop and report.max_drop["decision"] != "undecided" else ""),
        ("size", f"{megabytes(report.reference_bytes)} of {weights} -> {megabytes(file['bytes'])} file"),
        ("speed", speed.line(report.speed)),
        ("arithmetic", f"{report.arithmetic['line']} of the multiply-adds" if report.arithmetic else ""),
        ("biases", _biases(report)),
        ("engine", report.engine["line"] if report.engine else ""),
        ("layers", layers_line(report.engine) if report.engine else ""),
    ]  # fmt: skip
    ends = [
        *(("mind", caveat) for caveat in report.caveats),
        ("published", f"{folder} (evidence: {folder.parent / TEXT_FILE})"),
        ("next", f"convoy serve --model-repository {repository}"),
    ]  # fmt: skip
    return "\n".join((*_lines(rows), *_columns(report), *_lines(ends)))


def _lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{key:<10} {' '.join(value.split())}" for key, value in rows if value]


def _columns(report: Report) -> list[str]:
    """The engines as columns, for a terminal."""
    rows = engines.rows(report.engines, report.precision)
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    *_, serves = lines
    # The reasons are sentences: they stand below.
    told = zip(lines[0], serves, strict=True)
    reasons = [f"{title}: {text.removeprefix('no: ')}" for title, text in told if len(text) > _CELL]
    lines[-1] = [text if len(text) <= _CELL else "no" for text in serves]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [*table, *(f"excluded   {' '.join(reason.split())}" for reason in reasons)]


def _unmeasured(parity: Parity) -> str:
    return "not measured (--eval DIR measures it)" if parity.task == "classification" else ""


def _biases(report: Report) -> str:
    """What quantization did to them; "" where there was none, or it was not to."""
    return next((str(step["biases"]) for step in report.compression if "biases" in step), "")


def _methods(calibration: dict[str, Any]) -> str:
    """Name the method, and for how many tensors which one chose the range."""
    chosen = sorted(calibration["tensors"].items(), key=lambda item: -item[1])
    counts = ", ".join(f"{name} {count}" for name, count in chosen)
    return f"{calibration['method']} ({counts} tensors)"


def likeness(parity: Parity) -> str:
    """Say in a few words how alike two models are."""
    if parity.spread is not None:
        figure = f"{parity.spread.line}, "
    else:
        figure = "" if parity.min_cosine is None else f"cosine >= {parity.min_cosine:.5f}, "
    return f"{figure}{parity.agreement_name} {parity.agreement:.2%}"


def spread_error(parity: Mapping[str, Any]) -> str:
    """The error as a share of the outputs' spread, of a parity as report.json has it; "" where there is none."""
    return engines.figure(parity.get("spread"), "error", ".2g")


def error_of(parity: Parity) -> str:
    """Say how large the largest error is."""
    if parity.task == "detection":
        return f"{parity.max_abs_error:.2g} pixels, {parity.max_rel_error:.1e} of the largest coordinate"
    largest = "logit" if parity.decides else "value"
    return f"{parity.max_abs_error:.2g} ({parity.max_rel_error:.1e} of the largest {largest})"


def others(parity: Parity) -> list[tuple[str, str]]:
    """A row for each output behind the logits."""
    return [(f"output {name}", f"{likeness(one)}, max error {error_of(one)}") for name, one in parity.others.items()]


def accuracy_line(accuracy: Accuracy) -> str:
    """Return top-1 before and after, and the difference in percentage points."""
    change = 100 * (accuracy.top1 - accuracy.reference_top1)
    high, low = (-100 * end for end in accuracy.drop_interval)
    return (
        f"top-1 {accuracy.reference_top1:.2%} -> {accuracy.top1:.2%} ({change:+.2f} points, 95 % interval {low:+.2f} "
        f"to {high:+.2f}; {accuracy.lost} right answers lost, {accuracy.gained} gained) on {accuracy.samples} images"
    )


def answers_line(answers: Mapping[str, Any]) -> str:
    """Say how many answers became others, which classes paid, and how sure the models are."""
    flips, error = answers["flips"], answers["calibration_error"]
    ways = ", ".join(f"{flips[way]['count']} {way.replace('_', ' ')}" for way in flips if way != "share")
    paid = ", ".join(answers["paid"][:_MOST_PAID]) + (", ..." if len(answers["paid"]) > _MOST_PAID else "")
    return (
        f"{flips['share']:.2%} flipped ({ways}); {f'paid: {paid}' if paid else 'no class paid'}; calibration error "
        f"{error['before']:.3f} -> {error['after']:.3f}"
    )


def megabytes(count: int) -> str:
    """Return a number of bytes for a person."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
