"""What TensorRT's parser and builder say, in one line that names the node and the way out."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from convoynet.exporter.engine_options import MIB, BuildOptions

_MAX_REASON = 2_000
# Where in TensorRT's source it went wrong, which is for its own makers.
_PLACE = re.compile(r"\s*In \w+ at \S+?:\d+\)?")
_CODE = re.compile(r"^(?:[\w:]+: )?(?:\[\S+\] )?(?:IBuilder::\w+: )?Error Code \d+: ")
_ASSERTION = re.compile(r"Assertion failed: .*?: (?=[A-Z])")
# Follows any other error where there is no GPU, and says nothing.
_NOISE = re.compile(r"catchCudaError|cudaError 35")


class _Known(NamedTuple):
    """An error that is known: how to tell it, and what to say. The pattern may name `node`, `profile` and `why`."""

    pattern: re.Pattern[str]
    line: str


def _known(pattern: str, line: str) -> _Known:
    return _Known(re.compile(pattern, re.I | re.S), line)


_KNOWN = (
    _known(
        r"values for profile (?P<profile>\d+) violate shape constraints: (?:I[A-Z]\w+ )?(?P<node>[^:]+): (?P<why>.*)",
        "{node!r} does not take the batches of profile {profile}, {profiles}: {why}; a graph that was traced at one "
        "batch takes no other: export it again with a dynamic batch, or give its own batch alone",
    ),
    _known(
        r"(?:implementation for node (?P<node>.+?)(?: due to|\.|;|\)|$).*)?(?:insufficient workspace|within workspace "
        r"limit|workspace size)",
        "{layer} needs more scratch memory than {workspace}: give a larger --workspace-mib, or leave it out",
    ),
    _known(
        r"(?:implementation for node (?P<node>.+?)(?:\.|;|\)|$).*)?(?:out ?of ?memory|could not be allocated|bad_alloc|"
        r"insufficient memory|MEM_ALLOC_FAILED)",
        "there is too little memory to build {layer} for {largest} images: end what else uses the GPU, lower the "
        "largest batch of --batch, or give --workspace-mib",
    ),
    _known(
        r"\b(?P<why>FP8|BF16|bfloat16|INT8|FP4|INT4)\b.*(?:hardware|platform|compute capability|SM ?\d|device)",
        "this GPU has no {why}: INT8 needs compute capability 7.5, BF16 8.0 and FP8 8.9; export another precision",
    ),
    _known(
        r"implementation for node (?P<node>.+?)(?:\.|;|\)|$)",
        "there is no kernel for {layer} on this GPU: give a larger --workspace-mib if there is one, or export another "
        "precision",
    ),
    _known(
        r"cudaError|CUDA initialization failure|no CUDA-capable",
        "it needs a GPU, and CUDA finds none that works: nvidia-smi says what is wrong with the driver",
    ),
)


def of_parser(parser: Any) -> str:
    """The errors of a parser in one line, each with the node that it is about."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = dict.fromkeys(f"{error.node_operator()} {error.node_name()!r}: {_reason(error)}" for error in errors)
    line = _one_line(said) or "the parser gave no reason"
    return f"TensorRT cannot read this graph: {line}; use other operators there, or run it in ONNX Runtime"


def _reason(error: Any) -> str:
    code = error.code().name
    words = _plain(error.desc().splitlines())
    # A bare condition of its source, such as "false", says less than its kind.
    if code == "UNSUPPORTED_NODE" and words in {"", "false"}:
        return "TensorRT has no such operator"
    if "Plugin not found" in words:
        return "TensorRT has no such operator, and no plugin for it is installed"
    return words or code.lower().replace("_", " ")


def of_builder(messages: Sequence[str], options: BuildOptions) -> str:
    """What went wrong in a build, from the errors that TensorRT logged meanwhile."""
    text = " ".join(" ".join(messages).split())
    telling = " ".join(" ".join(message for message in messages if not _NOISE.search(message)).split())
    for known in _KNOWN:
        match = known.pattern.search(telling or text)
        if match:
            return f"TensorRT cannot build this graph: {_filled(known, match, options)}"
    words = _plain(messages) or "the builder gave no reason"
    return f"TensorRT cannot build this graph: {words}; convoy lint --for tensorrt may know more"


def _filled(known: _Known, match: re.Match[str], options: BuildOptions) -> str:
    groups = {name: value or "" for name, value in match.groupdict().items()}
    node = groups.get("node", "").strip()
    number = int(groups.get("profile") or 0)
    workspace = options.workspace_bytes
    return known.line.format(
        node=node,
        layer=repr(node) if node else "a layer",
        profile=number,
        profiles=options.profiles[min(number, len(options.profiles) - 1)],
        why=_plain([groups.get("why", "")]).rstrip("."),
        workspace="the GPU has" if workspace is None else f"{workspace // MIB} MiB",
        largest=max(profile.largest for profile in options.profiles),
    )


def _plain(messages: Iterable[str]) -> str:
    """TensorRT's words without codes, places in its source, and what only follows from another error."""
    found = []
    for message in messages:
        if _NOISE.search(message):
            continue
        words = _ASSERTION.sub("", _PLACE.sub("", _CODE.sub("", message.strip())))
        found.append(words.removeprefix("API Usage Error (").removeprefix("Internal Error (").strip())
    # The parser's first line is only "Invalid Node" where it goes on to say why.
    telling = [words for words in found if words and not words.startswith("Invalid Node")] or found
    return _one_line(telling)


def _one_line(parts: Iterable[str]) -> str:
    return " ".join("; ".join(parts).split())[:_MAX_REASON]
