"""`convoy explain`: the exporter adds an output that explains to a model, the server's client asks a model for it.

Here, since the exporter and the server do not import each other.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from convoynet.exporter.commands import explain_command as adding
from convoynet.server.explaining import command, flags
from convoynet.usage import Parser

_METHODS = (
    "ask a model: by random masks, by a square that moves, or by the channels of a map of features that it answers"
)
_DESCRIPTION = """\
Say where in an image the evidence for an answer lies.

With --method a model is asked about copies of the image, in each of which other parts are hidden: any model that a
server answers for, or that lies here (--local), also one of which nothing else is known. With --add an output is added
to a classifier that says it with each answer, of the winning class or of another that an input asks about: Grad-CAM at
its last map of features, as `convoy export --explain` does.
"""
_EXAMPLES = """\
examples:
  convoy explain --method rise --model resnet50 cat.jpg
      2,000 random masks, at the lowest priority that the model has; a picture and the numbers go to explanations/
  convoy explain --method occlusion --model resnet50 --class tabby --window 32 --stride 8 cat.jpg
      how far the score of the class falls behind each square
  convoy explain --method score-cam --model resnet50-maps cat.jpg
      by a map of features: of a model exported with --outputs logits,maps=layer4
  convoy explain --method rise --model fasterrcnn_resnet101_fpn --object 2 street.jpg
      the object with the second highest score
  convoy explain --method rise --local theirs.onnx --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 cat.jpg
      a file of any exporter, without a server
  convoy explain --add models/resnet50
      the newest version again with the output, as the next one; a server that watches the repository takes it
  convoy explain --add theirs.onnx --output explained.onnx
      a file of any exporter

docs/explaining.md says what the maps are.

exit codes:
  0    done
  1    some images failed; the others are explained
  2    nothing could be explained, or an argument or a file is not usable
  3    --add is refused: the answers would change
  130  interrupted
"""


def explain(argv: Sequence[str]) -> int:
    """Say where in an image the evidence for an answer lies."""
    parser, of_adding, of_asking = _parser()
    arguments = parser.parse_args(argv)
    strange, mode = (of_asking, "--method") if arguments.add is not None else (of_adding, "--add")
    for action in strange:
        if getattr(arguments, action.dest) not in (action.default, []):
            name = action.option_strings[0] if action.option_strings else "an image"
            parser.error(f"{name} goes with {mode}")
    if arguments.add is not None:
        return adding.run(arguments)
    flags.check(parser, arguments)
    return command.run(arguments)


def _parser() -> tuple[Parser, list[argparse.Action], list[argparse.Action]]:
    """The parser, and what belongs to either way alone."""
    parser = Parser(
        prog="convoy explain",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--method", choices=flags.METHODS, help=_METHODS)
    way.add_argument(
        "--add", type=Path, metavar="MODEL", help="a model's folder in a repository, or an ONNX file (with --output)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help=f"where the pictures and numbers go (default: the folder {flags.FOLDER}); with --add the new ONNX file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    common = list(parser._actions)
    adding.add_flags(parser.add_argument_group("with --add"))
    of_adding = [action for action in parser._actions if action not in common]
    flags.add_flags(parser)
    return parser, of_adding, [action for action in parser._actions if action not in (*common, *of_adding)]
