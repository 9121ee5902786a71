"""The names of classes: labels.txt, and whatever file config.pbtxt names."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.files import read_lines
from convoynet.server.repository.layout import inside

log = logging.getLogger(__name__)

LABELS_FILE = "labels.txt"


class LabelFiles:
    """The files of a model's folder that hold names. Each is read once: what was counted is what is served."""

    def __init__(self, folder: Path, names: Path | None = None) -> None:
        """Args: the folder, and what is in the place of its labels.txt."""
        self._folder, self._names = folder, names
        self._lines: dict[str, list[str]] = {}

    def lines(self, name: str, what: str) -> list[str]:
        """The lines of a file.

        Args:
            name: Its path in the folder.
            what: Where the name comes from, for the message.

        Raises:
            InvalidModel, OSError: It cannot be read.
        """
        if name not in self._lines:
            other = self._names if name == LABELS_FILE else None
            self._lines[name] = read_lines(other or inside(self._folder, name, what))
        return self._lines[name]

    def of(self, output: pb.ModelOutput) -> list[str]:
        """The classes of an output, in their order.

        Raises:
            InvalidModel: Its file cannot be read.
        """
        name = output.label_filename
        leads_out = f"label_filename of output '{output.name}'"
        inside(self._folder, name, leads_out)
        try:
            return self.lines(name, leads_out)
        except (OSError, InvalidModel) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise InvalidModel(f"labels of output '{output.name}' cannot be read: {why}") from error


def complete_labels(config: pb.ModelConfig, files: LabelFiles) -> None:
    """Takes labels.txt for the first output where no output has labels and the file has a line for each class."""
    if any(o.label_filename for o in config.output) or not config.output or not _is_classification(config):
        return
    try:
        lines = len(files.lines(LABELS_FILE, LABELS_FILE))
    except (FileNotFoundError, NotADirectoryError):  # a model may be a file
        return
    except (OSError, InvalidModel) as error:
        log.warning("model %s: %s is not used: %s", config.name, LABELS_FILE, error)
        return
    dims = config.output[0].dims
    if -1 in dims or math.prod(dims) == lines:
        config.output[0].label_filename = LABELS_FILE
    else:
        log.warning("model %s: %s has %d lines for an output of %s: not used", config.name, LABELS_FILE, lines, dims)


def add_labels(files: LabelFiles, config: pb.ModelConfig) -> None:
    """Names the classes of maps and boxes, whose outputs the classification extension cannot label."""
    labelled = next((output for output in config.output if output.label_filename), None)
    if not _is_classification(config) and labelled is not None and "labels" not in config.parameters:
        config.parameters["labels"].string_value = json.dumps(files.of(labelled), ensure_ascii=False)


def _is_classification(config: pb.ModelConfig) -> bool:
    return "task" not in config.parameters or config.parameters["task"].string_value == "classification"
