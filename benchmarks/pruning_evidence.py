"""Which way of pruning keeps the answers and the evidence: one network, equal multiply-adds, equal steps of training.

    python benchmarks/pruning_evidence.py --weights resnet56.th --train train/ --test test/ --save

Both folders hold one folder for each class. Every row has the nearest plan below the same multiply-adds (scope
"uniform"), and is trained for the same number of steps with the unpruned network as the teacher; what slimming trains
before it prunes comes out of these steps. Judged by top-1 and by the evidence, as `convoy audit` has it. With --save,
rows that stand in the file with the same settings are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pruning
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.auditing.drift import drift
from convoynet.exporter.auditing.subjects import Subject, scored
from convoynet.exporter.compression.channel_plan import Planner, Rules
from convoynet.exporter.compression.channel_scores import channel_scores
from convoynet.exporter.compression.losses import of_step
from convoynet.exporter.compression.prune import Pruner
from convoynet.exporter.compression.reconstruct import reconstruct
from convoynet.exporter.compression.trace_channels import trace_channels
from convoynet.exporter.compression.train import Settings, train
from convoynet.exporter.data.images import load_images
from convoynet.exporter.evidence import report
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.recipe import Finetune

RESULTS = Path(__file__).parent / "results"
FILE = "pruning-evidence-ARCH.json"
LOOKS, LOOK_BATCH = 512, 64
# What goes first, and what is done beside.
METHODS = {
    "magnitude": ("magnitude", ""),
    "taylor": ("taylor", ""),
    "ablation": ("ablation", ""),
    "magnitude + hints": ("magnitude", "hints"),
    "magnitude + attention transfer": ("magnitude", "attention"),
    "magnitude + reconstruction": ("magnitude", "reconstruction"),
    "bn": ("bn", ""),
    "slimming": ("bn", "slimming"),
}
STANDARDS = ("magnitude", "taylor")
HEAD = (
    "| method | untrained: top-1, evidence | top-1 | against magnitude | against Taylor "
    "| evidence: median | against magnitude | against Taylor | fifth percentile |"
)


class ScaleSize:
    """The L1 norm of batch normalisation's scales: Z. Liu et al. 2017, "Network Slimming", equation 1.

    Args:
        network: gets a hook until `close`; a copy of it keeps it, and is looked at then.
        norms: names of the scales.
        weight: of the norm in the loss.
    """

    def __init__(self, network: nn.Module, norms: Sequence[str], weight: float) -> None:
        self._seen: list[Tensor] = []
        seen = self._seen

        def hook(module: nn.Module, _: Any, __: Any) -> None:
            seen[:] = [weight * torch.stack([module.get_parameter(name).abs().sum() for name in norms]).sum()]

        self._handle = network.register_forward_hook(hook)

    def __call__(self) -> Tensor:
        """Of the latest run."""
        return self._seen[0]

    def close(self) -> None:
        """Take the hook out."""
        self._handle.remove()


class Bench(pruning.Bench):
    """The network, the images, how it is pruned and judged."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.looks = torch.from_numpy(self.evenly(LOOKS))
        size = self.arch.input_size
        self.channels = trace_channels(self.module, size)
        self.macs = archs.count(self.module, size).macs
        self.subject = self._subject(self.module)
        seen = self.labelled[:: -(-len(self.labelled) // options.drift_images)]
        self.seen = load_images([path for path, _ in seen], self.arch.preprocess)
        with torch.no_grad():
            answers = self.module(torch.from_numpy(self.arch.preprocess.normalize(self.seen)))
        self.answers = answers.argmax(1).numpy()
        self._pruned: dict[str, tuple[nn.Module, float, float]] = {}
        self.untrained: dict[str, dict[str, Any]] = {}

    def _subject(self, module: nn.Module) -> Subject:
        graph = onnx_from_torch(module, self.arch.preprocess, uint8_input=False)
        return Subject("network", scored(graph, "network", len(self.labels)), self.arch.preprocess, self.labels)

    def judged(self, module: nn.Module) -> dict[str, Any]:
        """Top-1, and how far the evidence moved."""
        places = np.arange(len(self.seen))
        moved = drift((self.subject, self._subject(module)), self.seen, places, self.answers, self.progress)
        return {
            "top1": self.top1(module),
            "correlation": moved.median,
            "percentile_5": float(np.percentile(moved.correlation, 5)),
            "peak_moved": moved.moved,
        }

    def cut(self, module: nn.Module, criterion: str) -> tuple[nn.Module, Tensor]:
        """A network with fewer channels, and which labels are gone."""
        looks = self.looks[:: LOOKS // self.options.ablated] if criterion == "ablation" else self.looks
        scores = channel_scores(module, self.channels, criterion, looks.split(LOOK_BATCH), 0, self.progress)
        planner = Planner(self.channels, scores, Rules("uniform", None, "cpu"), self.macs)
        kept = planner.within((1 - self.options.ratio) * self.macs)
        pruner = Pruner(module, self.channels, planner, self.arch.input_size)
        pruned = pruner.pruned(kept)
        pruner.require_equal(pruned, kept)
        return pruned, planner.removed(kept, self.channels.size)

    def pruned(self, method: str) -> tuple[nn.Module, float, float]:
        """The published network, pruned, as `estimated` has it, and the seconds; made once, whatever the seed."""
        criterion, beside = METHODS[method]
        key = f"{criterion} {beside == 'reconstruction'}"
        if key not in self._pruned:
            began = time.process_time()
            made, gone = self.cut(self.module, criterion)
            if beside == "reconstruction":
                looks = self.looks.split(LOOK_BATCH)
                reconstruct(self.module, made, self.channels, gone, looks, self.progress)
            took = round(time.process_time() - began, 1)
            estimated = self.estimated(made)
            self._pruned[key] = made, self.top1(estimated), took
            # What was fitted to the maps of the whole network was so with its statistics.
            self.untrained[method] = self.judged(made if beside == "reconstruction" else estimated)
        made, share, took = self._pruned[key]
        return copy.deepcopy(made), share, took


def measure(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Prune, train, judge."""
    options, (criterion, beside) = bench.options, METHODS[method]
    began = time.process_time()
    steps = options.steps
    if beside == "slimming":
        steps = options.steps // 2
        slim = copy.deepcopy(bench.module)
        extra = ScaleSize(slim, bench.channels.norms, options.l1)
        _train(bench, (slim, bench.module), Finetune(steps=options.steps - steps), Settings(seed=seed), extra)
        extra.close()
        network, _ = bench.cut(slim, criterion)
        took = round(time.process_time() - began, 1)
        share = bench.top1(bench.estimated(network))
    else:
        network, share, took = bench.pruned(method)
    found: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "macs": archs.count(network, bench.arch.input_size).macs,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "pruning_seconds": took,
        "estimated": share,
    }
    began = time.process_time()
    step = Finetune(steps=steps, hints=beside == "hints", attention=beside == "attention")
    losses = _train(bench, (network, bench.module), step, Settings(seed=seed, reestimate=True), None)
    found["last_losses"] = float(np.mean(losses[-10:]))
    found["training_seconds"] = round(time.process_time() - began, 1)
    return found | bench.judged(network)


def _train(
    bench: Bench,
    networks: tuple[nn.Module, nn.Module],
    step: Finetune,
    settings: Settings,
    added: Callable[[], Tensor] | None,
) -> list[float]:
    """Train the first of the networks in place, the second being the teacher; returns the losses."""
    step = replace(step, batch=bench.options.batch, lr=bench.options.lr)
    base = of_step(step)

    def loss(student: Tensor, wanted: Tensor | None, labels: Tensor | None) -> Tensor:
        own = base(student, wanted, labels)
        return own if added is None else own + added()

    return train(*networks, bench.train, step, replace(settings, loss=loss), bench.progress).losses


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each method the mean and the spread over the seeds, and the difference to each standard, seed by seed."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["seed"]: row for row in rows if row["method"] == method}
        told: dict[str, Any] = {"method": method, "seeds": sorted(own)}
        for key in ("top1", "correlation", "percentile_5", "estimated"):
            told[key] = _spread([row[key] for row in own.values()])
            for standard in STANDARDS:
                others = {row["seed"]: row for row in rows if row["method"] == standard}
                both = sorted(own.keys() & others.keys())
                told[f"{key} against {standard}"] = _spread([own[seed][key] - others[seed][key] for seed in both])
        found.append(told)
    return found


def _spread(values: Sequence[float]) -> list[float]:
    """Mean, and standard deviation of the sample; nothing of nothing."""
    if not values:
        return []
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0]


def markdown(found: Mapping[str, Any]) -> str:
    """The figures for people: means and standard deviations over the seeds."""
    rows, whole = found["rows"], found["whole"]
    low, high = (choose(row["macs"] for row in rows) / found["macs"] for choose in (min, max))
    lines = [
        f"{found['arch']}, {whole['top1']:.2%} top-1 unpruned; {low:.1%} to {high:.1%} of the multiply-adds left; "
        f"{found['steps']} steps of {found['batch']} images at lr {found['lr']:g}, distilled; seeds "
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))}; top-1 of {found['tests']} images, evidence of "
        f"{found['drift_images']}; ablation by {found['ablated']} images, Taylor and reconstruction by {LOOKS}; "
        f"slimming: L1 of {found['l1']:g} in half of the steps. Mean and standard deviation, differences seed by seed.",
        "",
        HEAD,
        "|---" * HEAD.count(" | ") + "|---|",
    ]
    for row in summary(rows):
        cells = [
            row["method"],
            _untrained(found["untrained"].get(row["method"])),
            _percent(row["top1"]),
            *(_points(row[f"top1 against {standard}"]) for standard in STANDARDS),
            _number(row["correlation"]),
            *(_difference(row[f"correlation against {standard}"]) for standard in STANDARDS),
            _number(row["percentile_5"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _untrained(judged: Mapping[str, Any] | None) -> str:
    return "" if judged is None else f"{judged['top1']:.1%}, {judged['correlation']:.4f}"


def _percent(spread: Sequence[float]) -> str:
    return f"{spread[0]:.2%} ± {100 * spread[1]:.2f}"


def _points(spread: Sequence[float]) -> str:
    return f"{100 * spread[0]:+.2f} ± {100 * spread[1]:.2f}" if spread else ""


def _number(spread: Sequence[float]) -> str:
    return f"{spread[0]:.4f} ± {spread[1]:.4f}"


def _difference(spread: Sequence[float]) -> str:
    return f"{spread[0]:+.4f} ± {spread[1]:.4f}" if spread else ""


def main() -> None:
    """Measure, and tell."""
    options = _options()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    found: dict[str, Any] = {
        "environment": report.environment(options.threads),
        "arch": bench.arch.name,
        "weights": options.weights.name,
        "whole": {"top1": bench.top1(bench.module)},
        "macs": bench.macs,
        "tests": len(bench.tests),
        "drift_images": len(bench.seen),
        **{key: getattr(options, key) for key in ("ratio", "steps", "batch", "lr", "l1", "ablated")},
        "untrained": bench.untrained,
        "rows": [],
    }
    file = RESULTS / f"pruning-evidence-{bench.arch.name}.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if options.save and file.exists() else {}
    if all(
        earlier.get(key) == value for key, value in found.items() if key not in ("environment", "untrained", "rows")
    ):
        found["rows"] = earlier["rows"]
        bench.untrained.update(earlier.get("untrained", {}))
    for seed in options.seeds:
        for method in options.methods:
            if any((row["method"], row["seed"]) == (method, seed) for row in found["rows"]):
                continue
            found["rows"].append(measure(bench, method, seed))
            print(json.dumps(found["rows"][-1]), flush=True)
            if options.save:
                whole = found | {"summary": summary(found["rows"])}
                file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
                file.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found), end="")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, metavar="DIR")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the multiply-adds that go (default 0.5)")
    parser.add_argument("--steps", type=int, default=40, help="of training, in all (default 40)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--l1", type=float, default=0.1, help="weight of the L1 norm in slimming (default 0.1)")
    parser.add_argument("--ablated", type=int, default=64, help="images that ablation looks at (default 64)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tests", type=int, default=1000, help="images for top-1 (default 1000)")
    parser.add_argument("--drift-images", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{FILE} and the table beside it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
