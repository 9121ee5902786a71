"""What a report says of an engine, when it is exported and when it is built again. Imports neither torch nor onnx."""

import hashlib
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convoynet.exporter.engine_options import BuildOptions
from convoynet.exporter.errors import BadInput
from convoynet.exporter.tensorrt.build import BuiltEngine
from convoynet.exporter.tensorrt.layers import by_precision


def markdown(text: str) -> str:
    """A text of whatever origin for report.md: one line, no markup, no link, no new column."""
    line = html.escape(" ".join(text.split()), quote=False)
    return line.replace("|", "/").replace("`", "'").replace("](", "] (")


FORMAT = "tensorrt"
_REPORT_FILE, _TEXT_FILE, PAGE_FILE = "report.json", "report.md", "report.html"
# How the texts for people write a line of ours.
_WRITTEN: Mapping[str, Callable[[str], str]] = {
    _TEXT_FILE: markdown,
    PAGE_FILE: lambda line: html.escape(line, quote=False),
}


@dataclass(frozen=True)
class Told:
    """What the report of a model says of its engine."""

    engine: BuiltEngine
    options: BuildOptions

    @property
    def line(self) -> str:
        """All of it for people."""
        engine = self.engine
        return (
            f"{engine.title} built it: {len(engine.content) / 1e6:.1f} MB in {engine.seconds:.1f} s for batches "
            f"{self.options.profiles_text}; {engine.runs_on}"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What it was built with, and for which batches."""
        return {
            "library": self.engine.library,
            "version": self.engine.version,
            "compute_capability": self.engine.compute_capability,
            "driver_version": self.engine.driver_version,
            "profiles": [str(profile) for profile in self.options.profiles],
        }

    @property
    def measures(self) -> dict[str, Any]:
        """Size, seconds and layers."""
        return {
            "bytes": len(self.engine.content),
            "seconds": self.engine.seconds,
            "precisions": by_precision(self.engine.layers),
            "inspected": self.engine.inspected,
            "layers": [asdict(layer) for layer in self.engine.layers],
        }

    def file(self, name: str) -> dict[str, Any]:
        """The entry of `formats`; `name` is the file's path in the model's folder."""
        digest = hashlib.sha256(self.engine.content).hexdigest()
        return {"format": FORMAT, "file": name, **self.facts, "sha256": digest, "bytes": len(self.engine.content)}

    def update(self, source: Path, target: Path, plan: str) -> None:
        """Copy the report of the folder `source`, where it has one, to `target`, with the facts of this engine."""
        if not (source / _REPORT_FILE).is_file():
            return
        try:
            report = json.loads((source / _REPORT_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{source / _REPORT_FILE} is no JSON ({error}): mend or remove it") from error
        updated = self._updated(report, plan)
        _replace(target / _REPORT_FILE, json.dumps(updated, indent=2, allow_nan=False) + "\n")
        for name, written in _WRITTEN.items():
            if (source / name).is_file():
                text = (source / name).read_text(encoding="utf-8")
                for before, after in zip(_lines(report), _lines(updated), strict=True):
                    text = text.replace(written(before), written(after)) if before else text
                _replace(target / name, text)

    def _updated(self, report: Mapping[str, Any], plan: str) -> dict[str, Any]:
        others = [found for found in report.get("formats", []) if found.get("format") != FORMAT]
        # The figures of the report are those of the export, not of this engine.
        state = {"published": True, "deferred": False, "ran": False, "line": self.line}
        return {**report, "formats": [self.file(plan), *others], "engine": {**self.facts, **self.measures, **state}}


def file_line(entry: Mapping[str, Any]) -> str:
    """Say what a file of `formats` is, and how to know it again."""
    if entry["format"] == FORMAT:
        made = f"{entry['library']} {entry['version']}, compute capability {entry['compute_capability']}"
        made += f", driver {entry['driver_version']}" if entry["driver_version"] else ", without a GPU"
    else:
        made = f"opset {entry['opset']}"
    return f"{entry['file']}, {entry['bytes']:,} bytes, {made}, sha256 {entry['sha256'][:12]}"


def layers_line(engine: Mapping[str, Any]) -> str:
    """How many layers of an engine compute in each precision; "" where there is no engine."""
    if not engine.get("precisions"):
        return ""
    source = "" if engine.get("inspected") else " (as parsed: an engine is inspected on a GPU)"
    return ", ".join(f"{count} {precision}" for precision, count in engine["precisions"].items()) + source


def _lines(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """The lines of a report's texts that tell of its engine; "" for what it does not tell."""
    engine = report.get("engine") or {}
    plan: Mapping[str, Any] = next((entry for entry in report.get("formats", []) if entry.get("format") == FORMAT), {})
    return engine.get("line", ""), layers_line(engine), file_line(plan) if "compute_capability" in plan else ""


def _replace(file: Path, text: str) -> None:
    # The name may be a second one of the published file, which stays as it is.
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")
