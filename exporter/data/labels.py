"""Files of class names."""

from pathlib import Path

from convoynet.exporter.errors import BadInput


def read_labels(file: Path) -> list[str]:
    """The class names of --labels, one a line; empty lines at the end do not count.

    Raises:
        BadInput: the file cannot be read, or a line has no name.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"--labels {file} cannot be read: {reason}") from error
    labels = [line.strip() for line in lines]
    while labels and not labels[-1]:
        labels.pop()
    if not labels or not all(labels):
        raise BadInput(f"--labels {file} must have one class name on every line, and at least one")
    return labels
