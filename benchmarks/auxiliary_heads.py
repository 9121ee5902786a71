"""GoogLeNet trained from nothing with and without its auxiliary classifiers, as a fine-tuning has them.

    python benchmarks/auxiliary_heads.py --train train/ --test test/ --save

Both folders hold one folder for each class. Both trainings begin with the same weights and see the same images in the
same order; the accuracy is of the last classifier alone, which is all that an export keeps. Few steps on small images
say that both run, and how they begin: not what auxiliary classifiers are worth at the end of a long training.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.archs.auxiliary import with_auxiliaries
from convoynet.exporter.compression.data import images_from_folder
from convoynet.exporter.compression.train import Settings, train
from convoynet.exporter.data.images import labelled_images
from convoynet.exporter.evidence import accuracy, report
from convoynet.exporter.progress import Terminal
from convoynet.exporter.recipe import Finetune
from convoynet.exporter.running.runtime import Eager

RESULTS = Path(__file__).parent / "results"
FILE = "auxiliary-heads.json"
STATISTICS = 256


def main() -> None:
    """Train both for each seed, and tell what the images of the test say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="googlenet")
    parser.add_argument("--train", type=Path, required=True, metavar="DIR")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR")
    parser.add_argument("--side", type=int, default=64, help="pixels of an image (default 64)")
    parser.add_argument("--steps", type=int, default=300, help="of 64 images (default 300)")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tests", type=int, default=1000, help="images to judge by (default 1000)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{FILE}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(options, seed, heads=heads) for seed in options.seeds for heads in (False, True)]
    if options.save:
        told = {"environment": report.environment(options.threads), "arch": options.arch, "side": options.side}
        (RESULTS / FILE).write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        (low, high), with_heads = row["interval"], "with" if row["heads"] else "without"
        print(
            f"seed {row['seed']}, {with_heads} auxiliary classifiers: top-1 {row['top1']:.1%} "
            f"({low:.1%} to {high:.1%}), last loss {row['last_loss']:.3f}"
        )


def measure(options: argparse.Namespace, seed: int, *, heads: bool) -> dict[str, Any]:
    """One training."""
    arch, size = archs.get(options.arch), (options.side, options.side)
    preprocess = replace(arch.preprocess, size=size, resize=size)
    arch = replace(arch, preprocess=preprocess)
    assert arch.auxiliaries is not None
    labels = sorted(path.name for path in options.train.iterdir() if path.is_dir())
    progress = Terminal()
    data = images_from_folder(options.train, preprocess, labels, progress)
    torch.manual_seed(seed)
    module = arch.build(len(labels))
    weights.load(module, arch, "random", seed=seed, images=data.batch(data.evenly(STATISTICS), None))
    step = Finetune(steps=options.steps, distill=False, lr=options.lr)
    settings = Settings(seed=seed, auxiliary_weight=arch.auxiliaries.weight)
    student = with_auxiliaries(module, arch.auxiliaries, (3, *size), len(labels), {}) if heads else module
    assert student is not None
    happened = train(student, None, data, step, settings, progress)
    module.eval()
    tests = labelled_images(options.test, labels)
    tests = tests[:: max(1, -(-len(tests) // options.tests))]
    ((top1, _),) = accuracy.hit_rates([Eager(module, preprocess)], tests, preprocess, progress)
    return {
        "seed": seed,
        "heads": heads,
        "top1": top1,
        "interval": list(accuracy.wilson(round(top1 * len(tests)), len(tests))),
        "tests": len(tests),
        "last_loss": happened.losses[-1],
        "seconds": round(sum(epoch.seconds for epoch in happened.epochs), 1),
        "step": asdict(step),
    }


if __name__ == "__main__":
    main()
