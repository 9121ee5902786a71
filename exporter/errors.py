"""What can go wrong in an export, each with the exit code that `convoy export` ends with.

ExporterError
├── BadInput             2   an argument or a file of the user's is not usable
│   └── NoGradient           a node of a graph has no gradient here
├── Refused              3   too far from the PyTorch model, or not fit for its runtime; nothing was published
└── Missing              4   a library or a device that this needs is not there

Every message is one line that names the value, what is allowed and the way out.
"""

from convoynet.errors import ConvoyError

_SHORT = 400  # characters


class ExporterError(ConvoyError):
    """The root: what a user can be told in one line."""

    exit_code = 1


class BadInput(ExporterError):
    """An argument, folder or file of the user's is not usable."""

    exit_code = 2


class NoGradient(BadInput):
    """A node of a graph has no gradient here, which training needs, and looking into the graph.

    Args:
        node: of which operator, by which name, used how.
        instead: what else can be done than leave out what trains.
    """

    def __init__(self, node: str, instead: str = "") -> None:
        super().__init__(f"{node} cannot be trained: leave out what trains the graph (qat_epochs, adaround){instead}")
        self.node = node


class Refused(ExporterError):
    """The parity or accuracy check, or the linter, refused the result."""

    exit_code = 3


class Missing(ExporterError):
    """A library or a device that this step needs is not there."""

    exit_code = 4


def lacking(error: ImportError) -> Missing:
    """The error for a library of the exporter's that is not there."""
    name = error.name or str(error)
    return Missing(f"{name} is missing or does not load; pip install 'convoynet[export,cpu]' brings it")


def reason(error: BaseException) -> str:
    """What an exception says, all of it in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def short_reason(error: BaseException) -> str:
    """The beginning of it, for libraries that print the file that they could not read."""
    text = reason(error)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"
