"""What pruning costs a trained network, and what training gives back, beside torch-pruning.

    python benchmarks/pruning.py --arch resnet56 --weights resnet56.th --train train/ --test test/ --minutes 25

Both folders hold one folder for each class. For each ratio of multiply-adds that goes: as pruned, with batch statistics
estimated again, and fine-tuned with the unpruned network as the teacher for about so many minutes; and torch-pruning's
network (MagnitudePruner, the same multiply-adds) as pruned and with batch statistics estimated again, where it can be
run. Figures go into
benchmarks/results/pruning-ARCH.json; a training that was interrupted goes on (checkpoints lie in --work).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.compression.data import TrainingImages, images_from_folder
from convoynet.exporter.compression.history import plot
from convoynet.exporter.compression.prune import prune
from convoynet.exporter.compression.train import Settings, train
from convoynet.exporter.data.images import labelled_images
from convoynet.exporter.evidence import accuracy, report
from convoynet.exporter.progress import Terminal
from convoynet.exporter.recipe import Finetune, Prune
from convoynet.exporter.running.runtime import Eager

RESULTS = Path(__file__).parent / "results"
STATISTICS = 1024
# Images with which the speed of training is found out.
TRIAL_STEPS = 8


class Bench:
    """The network, the images, and how a module is judged."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.progress = Terminal()
        self.arch = archs.get(options.arch)
        module = self.arch.build(self.arch.num_classes)
        none = np.empty((0, *self.arch.preprocess.size, self.arch.preprocess.channels), np.uint8)
        weights.load(module, self.arch, str(options.weights), seed=0, images=none)
        self.module = self.arch.deploy(module).eval()
        self.labels = sorted(path.name for path in options.test.iterdir() if path.is_dir())
        self.labelled = labelled_images(options.test, self.labels)
        self.tests = self.labelled[:: -(-len(self.labelled) // options.tests)]
        self.train: TrainingImages = images_from_folder(options.train, self.arch.preprocess, self.labels, self.progress)
        self.inputs = self.evenly(STATISTICS)
        self.example = torch.zeros(1, self.arch.preprocess.channels, *self.arch.preprocess.size)

    def evenly(self, count: int) -> NDArray[np.float32]:
        """So many training images, as the network takes them."""
        return self.arch.preprocess.normalize(self.train.batch(self.train.evenly(count), None))

    def top1(self, module: nn.Module) -> float:
        """The share of the test images that a module gets right."""
        eager = Eager(module, self.arch.preprocess)
        return accuracy.hit_rates([eager], self.tests, self.arch.preprocess, self.progress)[0][0]

    def estimated(self, module: nn.Module) -> nn.Module:
        """A copy with batch statistics of training images."""
        made = copy.deepcopy(module)
        weights.estimate_statistics(made, self.inputs, 128)
        return made


def measure(bench: Bench, ratio: float) -> dict[str, Any]:
    """Prune, judge, train, judge."""
    options = bench.options
    step = Prune(ratio, method=options.method, scope=options.scope)
    batches = [torch.from_numpy(bench.inputs[at : at + 64]) for at in range(0, 512, 64)]
    pruned, done = prune(
        bench.module,
        bench.example,
        step,
        target="cpu",
        batches=batches,
        seed=0,
        latency=None,
        progress=bench.progress,
    )
    found = {"ratio": ratio, "macs": done["macs"], "parameters": done["parameters"], "pruned": bench.top1(pruned)}
    found["estimated"] = bench.top1(bench.estimated(pruned))
    epochs = options.epochs or max(1, int(60 * options.minutes / _epoch_seconds(bench, pruned)))
    finetune = Finetune(epochs=epochs, batch=options.batch, lr=options.lr, label_weight=options.label_weight)
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.work / f"{options.arch}-{ratio}-{options.method}-{epochs}.pt"
    began = time.perf_counter()
    happened = train(
        pruned, bench.module, bench.train, finetune, Settings(checkpoint=checkpoint, reestimate=True), bench.progress
    )
    found["finetuned"] = bench.top1(pruned)
    found["finetune"] = finetune.to_dict() | {"images": len(bench.train)}
    # Of the training itself: the clock of this run would leave out what an earlier one did.
    found["finetune_minutes"] = round(sum(epoch.seconds for epoch in happened.epochs) / 60, 2)
    found["this_run_minutes"] = round((time.perf_counter() - began) / 60, 2)
    plot(happened, RESULTS / f"pruning-{options.arch}-{ratio}.png")
    return found | {"torch_pruning": _torch_pruning(bench, done["macs"]["after"])}


def _epoch_seconds(bench: Bench, module: nn.Module) -> float:
    """How long an epoch takes, by a few steps."""
    step = Finetune(steps=TRIAL_STEPS, batch=bench.options.batch)
    happened = train(copy.deepcopy(module), bench.module, bench.train, step, Settings(reestimate=True), bench.progress)
    steps = -(-len(bench.train) // bench.options.batch)
    return steps / TRIAL_STEPS * sum(epoch.seconds for epoch in happened.epochs)


def _torch_pruning(bench: Bench, macs: int) -> dict[str, Any] | None:
    """torch-pruning's own pruner, to about as many multiply-adds; its ratio is found by bisection."""
    try:
        import torch_pruning
    except ImportError:
        return None
    low, high, best = 0.0, 0.95, None
    for _ in range(8):
        ratio = (low + high) / 2
        module = copy.deepcopy(bench.module)
        ignored = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        torch_pruning.pruner.MagnitudePruner(
            module,
            bench.example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=ignored,
        ).step()
        try:
            left = archs.count(module, bench.arch.input_size).macs
        except RuntimeError as error:  # shortcuts that pad with zeros are beyond it
            return {"version": version("torch-pruning"), "failed": str(error).splitlines()[0]}
        if left <= macs:
            high, best = ratio, (module, ratio, left)
        else:
            low = ratio
    if best is None:
        return None
    module, ratio, left = best
    figures = {"version": version("torch-pruning"), "pruning_ratio": ratio, "macs": left}
    return figures | {"pruned": bench.top1(module), "estimated": bench.top1(bench.estimated(module))}


def table(found: dict[str, Any]) -> Table:
    """The figures for people."""
    shown = Table(title=f"{found['arch']}, top-1 {found['top1']:.2%} on {found['test_images']} images")
    for column in ("multiply-adds", "as pruned", "statistics", "fine-tuned", "points", "minutes", "torch-pruning"):
        shown.add_column(column, justify="right")
    for row in found["rows"]:
        other = row["torch_pruning"]
        shown.add_row(
            f"{row['macs']['after'] / row['macs']['before']:.1%}",
            f"{row['pruned']:.2%}",
            f"{row['estimated']:.2%}",
            f"{row['finetuned']:.2%}",
            f"{100 * (row['finetuned'] - found['top1']):+.2f}",
            f"{row['finetune_minutes']:.1f}",
            _shown(other),
        )
    return shown


def _shown(other: dict[str, Any] | None) -> str:
    """What torch-pruning gave, as pruned and with batch statistics estimated again."""
    if other is None:
        return "not installed"
    return "breaks the network" if "failed" in other else f"{other['pruned']:.2%}, {other['estimated']:.2%}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, metavar="DIR")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tests", type=int, default=5000, help="images to test on (default 5000)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 0.75], help="shares that go (default 0.5 0.75)"
    )
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--scope", default="uniform")
    parser.add_argument("--minutes", type=float, default=25, help="of fine-tuning, for each ratio (default 25)")
    parser.add_argument("--epochs", type=int, help="of fine-tuning, in the place of --minutes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--label-weight", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("build") / "pruning", help="for checkpoints")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    found: dict[str, Any] = {
        "arch": bench.arch.name,
        "top1": bench.top1(bench.module),
        "test_images": len(bench.tests),
        "environment": report.environment(options.threads),
    }
    file = RESULTS / f"pruning-{bench.arch.name}.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    # Ratios that this run leaves out keep their rows, where the machine and the images are the same.
    same = all(earlier.get(key) == found[key] for key in found)
    rows = {row["ratio"]: row for row in earlier["rows"]} if same else {}
    for ratio in options.ratios:
        rows[ratio] = measure(bench, ratio)
        found["rows"] = [rows[key] for key in sorted(rows)]
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print(table(found))


if __name__ == "__main__":
    main()
