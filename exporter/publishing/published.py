"""An exported model, read back from the files that Convoy wrote beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.publishing import model_config
from convoynet.exporter.publishing.model_folder import GRAPH_FILE
from convoynet.exporter.publishing.parameters import parameter
from convoynet.exporter.publishing.repository import versions
from convoynet.protos.inference import model_config_pb2 as pb

_REPORT_FILE = "report.json"
# What a report or a config that is none raises where it is read.
_BROKEN = (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, text_format.ParseError)


@dataclass(frozen=True)
class Published:
    """The newest version of a model in a repository.

    Attributes:
        folder: the model's.
        version: its number.
        config: config.pbtxt.
        report: report.json.
        graph: model.onnx.
        labels: the class names.
        preprocess: how a picture becomes its input; without the normalisation that the graph does itself.
        pictures: all of it in words.
    """

    folder: Path
    version: int
    config: pb.ModelConfig
    report: dict[str, Any]
    graph: bytes
    labels: list[str]
    preprocess: Preprocess
    pictures: str

    @property
    def precision(self) -> str:
        """As the report names it."""
        return str(self.report["precision"])

    @property
    def kind(self) -> str:
        """What the outputs mean, where the report tells; else ""."""
        return str((self.report.get("parity", {}).get("spread") or {}).get("kind", ""))

    @property
    def task(self) -> str:
        """Classification, segmentation or detection."""
        return parameter(self.config, "task") or "classification"


def is_published(folder: Path) -> bool:
    """Whether a folder looks like that of an exported model."""
    return (folder / model_config.CONFIG_FILE).is_file()


def read_published(folder: Path) -> Published:
    """Read the newest version of a model.

    Raises:
        BadInput: it is none that `convoy export` published.
    """
    try:
        config = text_format.Parse((folder / model_config.CONFIG_FILE).read_text("utf-8"), pb.ModelConfig())
        report = json.loads((folder / _REPORT_FILE).read_text("utf-8"))
        described = json.loads(parameter(config, "preprocess"))
        version = max(versions(folder))
        content = (folder / str(version) / GRAPH_FILE).read_bytes()
        labels = (folder / model_config.LABELS_FILE).read_text("utf-8").splitlines()
        preprocess = Preprocess.from_json(described)
        # The graph that takes pixels has the mean in it: the report's line has it too.
        pictures = str(report["input"].get("preprocessing") or preprocess.line).partition("; ")[0]
        found = Published(folder, version, config, report, content, labels, preprocess, pictures)
        _ = int(report["parameters"]["after"]), int(report["macs"]["after"]), found.precision, found.kind
    except _BROKEN as error:
        raise BadInput(f"{folder} is no model that `convoy export` published: {error}") from error
    return found


def other_classes(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """In words, how the classes of two models differ, by the first that does."""
    pairs = zip_longest(map(repr, ours), map(repr, theirs), fillvalue="none")
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    return f"other classes ({len(ours)} and {len(theirs)}, such as {here} and {there})"
