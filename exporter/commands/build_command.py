"""`convoy build`: an ONNX graph to a TensorRT engine, or the engine of a published model again.

Importable without torch, onnx and TensorRT, as `convoynet.exporter.commands.cli` is; the work needs TensorRT alone.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from convoynet.exporter import atomic_file
from convoynet.exporter.commands.cli import guarded, interrupted
from convoynet.exporter.engine_options import (
    MIB,
    OPTIMIZATION_LEVELS,
    BuildOptions,
    Profile,
    Refit,
    require_folder_of_cache,
)
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Interruptible, Progress, Quiet, Terminal
from convoynet.usage import Parser

if TYPE_CHECKING:
    from convoynet.exporter.tensorrt.build import BuiltEngine

T = TypeVar("T")

_DESCRIPTION = """\
Build a TensorRT engine (a "plan") from an ONNX graph.

The graph says the precisions: Q/DQ pairs make INT8 or FP8, its types FP16 or BF16 (convoy export --target gpu with
--int8, --fp8, --fp16, --bf16). `tensorrt` builds for the GPU of this machine, and its engine runs there and with this
version alone, unless --version-compatible or --hardware-compatible says more. `tensorrt-rtx` builds without a GPU, and
its engine is compiled on the GPU that loads it. The first of them that can build here is taken.
"""
_EXAMPLES = """\
examples:
  convoy build model.onnx --output model.plan --batch 1:8:64
      batches of 1 to 64 images, tuned for 8
  convoy build model.onnx --output model.plan --batch 1 --batch 2:32:64
      one profile for a single image, one for many: each is fastest where it was tuned
  convoy build models/resnet101
      after an update of TensorRT or on another GPU: the plan of the newest version again, in place, from the
      model.onnx beside it and as its config.pbtxt says
  convoy build model.onnx --output model.plan --batch 1:8:64 --timing-cache kernels.cache --optimization-level 5
      search longest, and remember what was measured: the next build is faster

docs/tensorrt.md explains the choices. Exit codes: 0 built; 2 an argument, the graph or the batches are not usable;
4 no TensorRT here, or it lacks what was asked for
"""


def build(argv: Sequence[str]) -> int:
    """Build a TensorRT engine from an ONNX graph, or that of a published model again."""
    return guarded("convoy build", lambda: _build(argv))


def _build(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    source: Path = arguments.model
    if arguments.output is None and not source.is_dir():
        raise BadInput(f"{source}: no model's folder in a repository; for an ONNX file say --output model.plan as well")
    require_folder_of_cache(arguments.timing_cache)
    progress = Interruptible(_shown(arguments.progress), interrupted)
    result = _built(arguments, progress) if arguments.output else _rebuilt(arguments, progress)
    sys.stdout.write(result.json() if arguments.json else result.text(with_layers=arguments.layers))
    sys.stdout.flush()


@dataclass(frozen=True)
class _Result:
    """An engine that was built, how, and the file that it is in."""

    engine: "BuiltEngine"
    options: BuildOptions
    file: Path

    def json(self) -> str:
        from convoynet.exporter.tensorrt.layers import by_precision

        engine = self.engine
        told: dict[str, Any] = {
            "library": engine.library,
            "version": engine.version,
            "compute_capability": engine.compute_capability,
            "driver_version": engine.driver_version,
            "bytes": len(engine.content),
            "seconds": engine.seconds,
            "profiles": [str(profile) for profile in self.options.profiles],
            "layers": by_precision(engine.layers),
            "inspected": engine.inspected,
            "details": [asdict(layer) for layer in engine.layers],
            "notes": list(engine.notes),
            "file": str(self.file),
        }
        return json.dumps(told) + "\n"

    def text(self, *, with_layers: bool) -> str:
        from convoynet.exporter.tensorrt.layers import by_precision

        engine = self.engine
        counts = [f"{count} in {kind}" for kind, count in by_precision(engine.layers).items()] or ["none computes"]
        of = "the engine" if engine.inspected else "the graph, which TensorRT fuses further"
        rows = [
            ("built", f"{self.file}, {len(engine.content) / 1e6:.1f} MB in {engine.seconds:.1f} s"),
            ("batches", ", ".join(map(str, self.options.profiles))),
            ("layers", f"{', '.join(counts)} (of {of})"),
            ("kind", engine.runs_on),
            *(("note", note) for note in engine.notes),
        ]
        lines = [f"{key:<10}{value}" for key, value in rows]
        if with_layers:
            width = max((len(layer.name) for layer in engine.layers), default=0)
            lines += [
                f"{layer.name:<{width}}  {layer.type.lower():<18}  {' '.join(layer.inputs)} -> {layer.precision}"
                for layer in engine.layers
            ]
        return "\n".join(lines) + "\n"


def _built(arguments: argparse.Namespace, progress: Progress) -> _Result:
    """Build a file from a file."""
    from convoynet.exporter.commands.inspect_command import model_file
    from convoynet.exporter.tensorrt.build import build as build_engine

    options = _changed(arguments, None)
    if not arguments.output.parent.is_dir():
        raise BadInput(f"--output {arguments.output}: there is no folder {arguments.output.parent}")
    engine = build_engine(model_file(arguments.model), options, progress)
    atomic_file.write(arguments.output, engine.content)
    return _Result(engine, options, arguments.output)


def _rebuilt(arguments: argparse.Namespace, progress: Progress) -> _Result:
    """Build the plan of a model's folder again."""
    from convoynet.exporter.publishing.model_folder import rebuild

    done = rebuild(arguments.model, lambda stated: _changed(arguments, stated), progress)
    return _Result(done.engine, done.options, done.plan)


def _changed(arguments: argparse.Namespace, stated: BuildOptions | None) -> BuildOptions:
    """The options that the flags give; where they give none, those of `stated`."""
    refit: Refit = "strip" if arguments.strip else "refit" if arguments.refit else "no"
    flags = {
        "profiles": tuple(arguments.batch),
        "optimization_level": arguments.optimization_level,
        "workspace_bytes": None if arguments.workspace_mib is None else arguments.workspace_mib * MIB,
        "timing_cache": arguments.timing_cache,
        "version_compatible": arguments.version_compatible,
        "hardware_compatible": arguments.hardware_compatible,
        "sparse_weights": arguments.sparse_weights,
        "refit": refit,
    }
    # 0 is a level, and equal to False.
    given: dict[str, Any] = {key: value for key, value in flags.items() if value or (value == 0 and value is not False)}
    if refit == "no":
        del given["refit"]
    return BuildOptions(**{"profiles": (), **given}) if stated is None else replace(stated, **given)


def _parser() -> Parser:
    parser = Parser(
        prog="convoy build",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="an ONNX file (with --output), or a model's folder in a repository, whose plan is built again",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the plan goes")
    parser.add_argument(
        "--batch",
        type=_profile,
        action="append",
        default=[],
        metavar="MIN:USUAL:MAX",
        help="images of a call: the fewest, the number to tune for, the most; or N for that alone. Given several "
        "times it makes several profiles",
    )
    _add_how(parser)
    parser.add_argument(
        "--progress",
        choices=("bar", "json", "none"),
        default="bar",
        help='on stderr: a bar (default), a line of JSON {"phase", "fraction"} for each hundredth, or nothing',
    )
    parser.add_argument("--layers", action="store_true", help="list each layer, with what it reads and writes")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _add_how(parser: Parser) -> None:
    parser.add_argument(
        "--optimization-level",
        type=int,
        choices=OPTIMIZATION_LEVELS,
        metavar="0-5",
        help="how long to search for fast kernels (default: TensorRT's own, 3)",
    )
    parser.add_argument(
        "--workspace-mib",
        type=int,
        metavar="N",
        help="scratch memory that a layer may take (default: all that the GPU has)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="remember which kernels were fastest; one file for each GPU and version (tensorrt only)",
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="for later versions too; larger and often slower (tensorrt only)",
    )
    parser.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="for every GPU from Ampere on; often slower (tensorrt-rtx always)",
    )
    parser.add_argument(
        "--sparse-weights",
        action="store_true",
        help="use the kernels for weights of which two in four are zero (convoy export --sparsity 2:4)",
    )
    exchange = parser.add_mutually_exclusive_group()
    exchange.add_argument("--refit", action="store_true", help="weights can be exchanged without another build")
    exchange.add_argument(
        "--strip",
        action="store_true",
        help="leave out the weights, which a refit brings: a small plan, not served",
    )


def _profile(text: str) -> Profile:
    try:
        return Profile.parse(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _shown(kind: str) -> Progress:
    if kind == "json":
        return _Lines()
    return Terminal() if kind == "bar" else Quiet()


class _Lines:
    """Progress for a program: a JSON object a line on stderr, {"phase": str, "fraction": 0..1}."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield `items`, and say after each which share of `total` is done."""
        self._say(label, 0.0)
        for done, item in enumerate(items, 1):
            yield item
            self._say(label, min(1.0, done / total) if total else 0.0)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Say that the block begins and ends."""
        self._say(label, 0.0)
        yield
        self._say(label, 1.0)

    def _say(self, phase: str, fraction: float) -> None:
        sys.stderr.write(json.dumps({"phase": phase, "fraction": round(fraction, 3)}) + "\n")
        sys.stderr.flush()
