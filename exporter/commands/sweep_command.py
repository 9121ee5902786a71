"""`convoy sweep`: try recipes on one network and draw accuracy, latency and size of what they give.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from convoynet.exporter import recipe
from convoynet.exporter.commands import cli, model_flags
from convoynet.exporter.commands.compare_command import text
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput
from convoynet.usage import Parser

_DESCRIPTION = """\
Export one network by several recipes, and show which of the results are worth having.

Each recipe becomes a model of its own, NAME-RECIPE, in the model repository. A sweep that was interrupted goes on where
it stopped.
"""
_EXAMPLES = """\
examples:
  convoy sweep --arch resnet56 --weights trained.pt --calibration train/ --eval test/
      the usual recipes: INT8, pruned by a quarter, a half and three quarters, with and without INT8
  convoy sweep --arch resnet56 --weights trained.pt --finetune train/ --eval test/ recipes/*.toml
      your own; docs/compression.md says how to write them
  convoy sweep --onnx theirs.onnx --calibration photos/
      of an ONNX file, which is neither pruned nor trained: INT8 by several calibrations, with and without refinement

Exit codes: 0; 2 an argument, file or recipe is not usable; 4 a part is not installed
"""


def sweep(argv: Sequence[str]) -> int:
    """Try recipes on one network, and draw accuracy, latency and size of what they give."""
    return cli.guarded(
        "convoy sweep", lambda: _sweep(argv), "interrupted; recipes that were done are kept, and are not done again"
    )


def _sweep(argv: Sequence[str]) -> None:
    arguments = vars(_parser().parse_args(argv))
    as_json, output, files = (arguments.pop(name) for name in ("json", "output", "recipes"))
    model_flags.take_model(arguments)
    recipes = _recipes(files)

    from convoynet.exporter.archs import own
    from convoynet.exporter.progress import Interruptible, Quiet, Terminal
    from convoynet.exporter.studies import variants
    from convoynet.exporter.studies.sweep import PAGE_FILE, with_baseline
    from convoynet.exporter.studies.sweep import sweep as run

    progress = Interruptible(Quiet() if as_json else Terminal(), cli.interrupted)
    # Of the recipes some train.
    finetune = arguments.pop("finetune")
    with own.nothing_on_stdout():  # a network may print
        results = run(ExportConfig(**arguments), recipes, output, progress, finetune)
    if as_json:
        sys.stdout.write(json.dumps([result.to_json() for result in results], indent=2) + "\n")
        return
    found = [result.variant for result in results if result.variant is not None]
    beaten = variants.dominated(found)
    if found:
        shown = with_baseline(results)
        rows = [variants.columns(one, shown[0]) | {"beaten by": beaten.get(one.name, "")} for one in shown]
        sys.stdout.write(text(rows))
        sys.stdout.writelines(f"{line}\n" for line in variants.doubts(shown))
        sys.stdout.write(f"plot: {output / PAGE_FILE}\n")
    for result in results:
        if result.refused:
            sys.stdout.write(f"{result.name} was refused: {result.refused}\n")
    sys.stdout.flush()


def _recipes(files: Sequence[Path]) -> Mapping[str, tuple[recipe.Step, ...]]:
    """All recipes, read before any work starts."""
    found = {}
    for file in files:
        if file.stem in found:
            raise BadInput(f"{file}: there are two recipes of the name {file.stem!r}; rename one")
        found[file.stem] = recipe.load(file)
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="convoy sweep",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE.toml", help="default: the usual ones")
    model_flags.add_model(parser, recipes=True)
    parser.add_argument(
        "--output", type=Path, default=Path("sweep"), metavar="DIR", help="for the plot and the page (default sweep)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
