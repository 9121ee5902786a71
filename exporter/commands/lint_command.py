"""`convoy lint`: what a runtime will refuse, misread or run badly in an ONNX model, each with its fix.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convoynet.exporter.commands.cli import guarded
from convoynet.exporter.commands.inspect_command import model_file
from convoynet.exporter.errors import Refused
from convoynet.usage import Parser

if TYPE_CHECKING:
    from convoynet.exporter.linting.model import Finding, Runtime

_DESCRIPTION = """\
Say what a runtime will refuse, misread or run badly in an ONNX model, and what to do about it. Nothing is run.
"""
_EXAMPLES = """\
examples:
  convoy lint model.onnx --for tensorrt
      will TensorRT read this file, and read it right?
  convoy lint models/resnet50 --for openvino --json
      the newest version of an exported model

docs/linting.md lists the rules. Exit codes: 0 no errors (warnings perhaps); 2 an argument or file is not usable;
3 errors
"""
# As in convoynet.exporter.linting.model, which needs onnx.
_RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt11", "tensorrt10", "openvino")
_DEFAULT = ("onnxruntime", "tensorrt")
_OF_TARGET = {"cpu": ("onnxruntime", "openvino"), "gpu": ("tensorrt",)}
_REPORT = "report.json"
_PIPE_WIDTH = 120


def lint(argv: Sequence[str]) -> int:
    """Say what a runtime will refuse, misread or run badly in an ONNX model."""
    return guarded("convoy lint", lambda: _lint(argv))


def _lint(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    file = model_file(Path(arguments.model))

    from convoynet.exporter.graph.onnx_read import read_model, reading
    from convoynet.exporter.linting.lint import lint as findings
    from convoynet.exporter.linting.model import RUNTIMES

    model = read_model(file, weights=False)
    names = dict.fromkeys(arguments.runtimes or _runtimes_of(file))
    with reading(str(file), model):
        results = [(RUNTIMES[name], findings(model, RUNTIMES[name], folder=file.parent)) for name in names]
    if arguments.json:
        sys.stdout.write(json.dumps(_to_json(file, results), indent=2) + "\n")
    else:
        sys.stdout.write(_text(file, results))
    sys.stdout.flush()
    if any(_count(found, "error") for _, found in results):
        raise SystemExit(Refused.exit_code)


def _runtimes_of(file: Path) -> tuple[str, ...]:
    """Those that serve the target which the report beside an exported model names, else the usual ones."""
    try:
        target = json.loads((file.parent / _REPORT).read_text(encoding="utf-8"))["target"]
        return _OF_TARGET[target]
    except (OSError, ValueError, KeyError, TypeError):
        return _DEFAULT


def _parser() -> Parser:
    parser = Parser(
        prog="convoy lint",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="PATH", help="an ONNX file, or a model's folder in a repository")
    parser.add_argument(
        "--for",
        dest="runtimes",
        action="append",
        choices=_RUNTIMES,
        metavar="RUNTIME",
        help=f"{', '.join(_RUNTIMES)}; may be given several times (default: those of the target that the "
        f"model's report names, else {' and '.join(_DEFAULT)}). tensorrt is the newest",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


_Results = list[tuple["Runtime", list["Finding"]]]


def _to_json(file: Path, results: _Results) -> dict[str, Any]:
    return {
        "file": str(file),
        "runtimes": [
            {
                "runtime": runtime.name,
                "errors": _count(found, "error"),
                "warnings": _count(found, "warning"),
                "findings": [asdict(finding) for finding in found],
            }
            for runtime, found in results
        ],
    }


def _count(found: Sequence["Finding"], severity: str) -> int:
    return sum(finding.severity == severity for finding in found)


def _text(file: Path, results: _Results) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    # Captured, since rich ends the process itself when the reader of a pipe goes away.
    with console.capture() as text:
        for runtime, found in results:
            console.print(Text(_summary(file, runtime, found), style="bold"))
            table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column(no_wrap=True)
            table.add_column(style="cyan", no_wrap=True)
            table.add_column(overflow="fold")
            for first, others in _grouped(found):
                where = f"{first.node} and {others} more" if others else first.node
                words = Text.assemble(f"{where}: {first.message}\n", (f"fix: {first.fix}", "green"))
                severity = Text(first.severity, style="red" if first.severity == "error" else "yellow")
                table.add_row(severity, first.rule, words)
            if found:
                console.print(table)
    return text.get()


def _summary(file: Path, runtime: "Runtime", found: Sequence["Finding"]) -> str:
    if not found:
        return f"{file} for {runtime.title}: nothing found"
    counts = [(_count(found, severity), severity) for severity in ("error", "warning")]
    parts = [f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count]
    return f"{file} for {runtime.title}: {', '.join(parts)}"


def _grouped(found: Sequence["Finding"]) -> list[tuple["Finding", int]]:
    """The first finding of those that say the same of different nodes, and how many others there are."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.rule, finding.message, finding.fix), []).append(finding)
    return [(group[0], len(group) - 1) for group in groups.values()]
