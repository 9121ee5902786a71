"""`convoy audit`: what a compression changed, on labelled images.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.exporter.commands.cli import guarded, require_page
from convoynet.exporter.commands.compare_command import text
from convoynet.tables import fitted
from convoynet.usage import Parser

if TYPE_CHECKING:
    from convoynet.exporter.auditing.audit import Audit

_DESCRIPTION = """\
Say what compression changed in a model, on labelled images: which answers flipped, which classes paid for it, how far
its confidence can be trusted, whether it still looks at the same evidence, and with --robustness what it can stand. The
average accuracy shows none of this.
"""
_EXAMPLES = """\
examples:
  convoy audit models/resnet20-int8 --against resnet20:trained.th --images test/
      with the PyTorch network that it was made from; test/ has a folder for each class
  convoy audit models/resnet20-half --against models/resnet20 --images test/ --html audit.html
      two exported models; the page has the pictures whose answers flipped
  convoy audit models/resnet20-half --images test/ --max-flips 5 --max-class-drop 3 --max-drift 0.05
      for a pipeline: exit code 3 where more than 5 % of the answers flipped, a class lost more than 3 points, or the
      maps of evidence correlate by less than 0.95
  convoy audit models/resnet20-half --against models/resnet20 --images test/ --robustness --severity 5
      the same pictures spoilt as hard as the benchmarks do, and an attack on both models
  convoy audit models/resnet20-int8 --against models/resnet20 --images val/ --fit-temperature
      the published graph gets an output `probabilities` whose confidence is as large as its accuracy

docs/auditing.md explains every figure. Exit codes: 0; 2 an argument or file is not usable; 3 a gate refused
"""
# As in convoynet.exporter.auditing.audit, which needs onnx.
_MOST_IMAGES, _DRIFT_IMAGES = 5000, 300
_ROBUSTNESS_IMAGES, _MOST_ATTACKED = 300, 100
_MOST_CLASSES = 15
_INDENT = 13


def audit(argv: Sequence[str]) -> int:
    """Say what compression changed in a model: answers, classes, confidence, evidence."""
    return guarded("convoy audit", lambda: _audit(argv))


def _audit(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    page: Path | None = arguments.html
    require_page(page)

    from convoynet.exporter.archs import own
    from convoynet.exporter.auditing import audit as auditing
    from convoynet.exporter.auditing.gates import Gates
    from convoynet.exporter.auditing.robustness import Stress
    from convoynet.exporter.progress import Quiet, Terminal

    gates = Gates(flips=arguments.max_flips, class_drop=arguments.max_class_drop, drift=arguments.max_drift)
    asked = auditing.Asked(
        model=arguments.model,
        images=arguments.images,
        against=arguments.against,
        threads=arguments.threads,
        most=arguments.max_images,
        drift_images=arguments.drift_images,
        drift_needed=arguments.max_drift is not None,
        fit_temperature=arguments.fit_temperature,
        stress=Stress(arguments.robustness, arguments.severity, arguments.attack),
    )
    with own.nothing_on_stdout():
        found = auditing.audit(asked, Quiet() if arguments.json else Terminal())
    if page is not None:
        from convoynet.exporter import atomic_file
        from convoynet.exporter.auditing.page import html

        atomic_file.write(page, html(found).encode())
    sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n" if arguments.json else _text(found))
    sys.stdout.flush()
    gates.check(found)
    if asked.fit_temperature:
        auditing.calibrate(found)
        if not arguments.json:
            sys.stdout.write(
                f"written: {found.model} has the output 'probabilities' now, calibrated; a client names it "
                "(outputs=['probabilities']), and `convoy predict` shows the logits' own probabilities as before\n"
            )


def _text(found: "Audit") -> str:
    from convoynet.exporter.auditing import words

    lines = [f"{found.model} against {found.reference}, on {found.source}", ""]
    lines += [f"{name:<{_INDENT}}{told}" for name, told in words.summary(found)]
    rows = words.classes(found, _MOST_CLASSES)
    lines += ["", text(rows, ("class", "paid")).rstrip("\n")]
    if (more := len(found.answers.classes) - len(rows)) > 0:
        lines.append(f"{more} more classes are in --json and --html")
    for said, table in ((words.severity(found), words.corruptions(found)), (words.size(found), words.attacks(found))):
        if table:
            lines += ["", said, text(table, ("pictures", "attack")).rstrip("\n")]
    lines += [f"note: {note}" for note in found.notes]
    told = "\n".join(lines)
    return (fitted(told, shutil.get_terminal_size().columns, _INDENT) if sys.stdout.isatty() else told) + "\n"


def _parser() -> Parser:
    parser = Parser(
        prog="convoy audit",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="the folder of an exported model; its newest version")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="what it is compared with: the folder of another exported model, an ONNX file, or NAME[:WEIGHTS], a "
        "network of `convoy archs` with the weights of a file (default: the network that it was made from, where its "
        "weights are published)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="images in a folder for each class, named as its label",
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=_MOST_IMAGES,
        metavar="N",
        help=f"look at no more images; of a larger folder at as many evenly spread ones (default {_MOST_IMAGES})",
    )
    parser.add_argument(
        "--drift-images",
        type=int,
        default=_DRIFT_IMAGES,
        metavar="N",
        help=f"compare the evidence (Grad-CAM) of as many of them (default {_DRIFT_IMAGES}; 0: of none)",
    )
    parser.add_argument(
        "--fit-temperature",
        action="store_true",
        help="fit softmax(logits / T) on half of the images, judge it on the other half, and give the published graph "
        "the output `probabilities`",
    )
    stress = parser.add_argument_group("robustness", "what both models can stand; this takes longer than all the rest")
    stress.add_argument(
        "--robustness",
        type=int,
        nargs="?",
        const=_ROBUSTNESS_IMAGES,
        default=0,
        metavar="N",
        help="spoil N pictures in eight ways (noise, blur, JPEG and others, as ImageNet-C and CIFAR-10-C do), and "
        f"attack both models by their own gradients (PGD) on at most {_MOST_ATTACKED} of them (default N: "
        f"{_ROBUSTNESS_IMAGES})",
    )
    stress.add_argument("--severity", type=int, default=3, metavar="1-5", help="of what spoils them (default 3)")
    stress.add_argument(
        "--attack",
        type=int,
        default=1,
        metavar="LEVELS",
        help="change no pixel by more than so many of its 255 levels (default 1; 0: no attack)",
    )
    gates = parser.add_argument_group("gates", "exit code 3, once everything was said, where more changed than this")
    gates.add_argument("--max-flips", type=float, metavar="PERCENT", help="of the answers became others")
    gates.add_argument("--max-class-drop", type=float, metavar="POINTS", help="of accuracy lost by any one class")
    gates.add_argument(
        "--max-drift", type=float, metavar="D", help="of the evidence: 1 less the median correlation of the maps"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, with the pictures")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of one call")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
