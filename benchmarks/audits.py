"""What compression changes in networks with weights: answers, classes, confidence, evidence, robustness, in one table.

    python benchmarks/audits.py --arch resnet56 --weights resnet56.th --train train/ --test test/ --save
    python benchmarks/audits.py --arch squeezenet1_0 --weights squeezenet.pth --photos photos/ --save
    PYTHONPATH=packages:docs/examples python benchmarks/audits.py --arch efficientnet_lite0:network --name lite0 \
        --untrained efficientnet_lite0:untrained --mean 127/255 --std 128/255 --resize 256 --photos photos/ --save

Every variant is exported by `convoy export` and held against the float32 one by what `convoy audit --robustness` does:
the float32 one against itself, and once for each of `--seeds`, which choose the images that calibrate, the weights and
the order of training: INT8, random weights, and with `--train` half and a quarter of the multiply-adds, trained with
labels alone and with the unpruned network as the teacher as well. `--train` and `--test` hold a folder for each class;
a photograph of `--photos` has a WordNet id before its first underscore. Robustness, which takes most of the time, is
that of the first seed. A variant that stands in --work with the same settings is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import ImageNetInfo

from convoynet.exporter.auditing.audit import Asked, audit
from convoynet.exporter.auditing.robustness import Stress
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.evidence import report
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Terminal
from convoynet.exporter.recipe import Finetune, Int8, Prune, Step

RESULTS = Path(__file__).parent / "results"
FILE = "audits.json"
PLAIN, ATTACKS = "none", ("own attack", "noise")
HEAD = (
    "| variant | seed | top-1 | flips | worst class | paid | ECE | evidence: median, 5 % | same answers | spoilt "
    "| attacked | noise as large |"
)


def variants(options: argparse.Namespace) -> Mapping[str, tuple[Step, ...]]:
    """What is done to the network, by name."""
    found: dict[str, tuple[Step, ...]] = {"float32": (), "int8": (Int8(),)}
    if options.train is None:
        return found
    for name, ratio in (("half", 0.5), ("quarter", 0.75)):
        for suffix, distill in (("", False), ("-distilled", True)):
            trained = Finetune(steps=options.steps, distill=distill)
            found[f"{name}{suffix}"] = (Prune(ratio), trained)
    return found


def main() -> None:
    """Export, audit, tell."""
    options = _options()
    network = options.name or options.arch.partition(":")[0]
    images = options.test or _class_folders(options.photos, options.work / "photographs")
    given = {"mean": options.mean, "std": options.std}
    number = {key: tuple([float(Fraction(text))] * 3) for key, text in given.items() if text}
    plain = ExportConfig(
        options.arch,
        weights=str(options.weights or "default"),
        repository=options.work / network,
        calibration=options.train or options.photos,
        resize=options.resize,
        batch=(1, 32),
        input="uint8",
        force=True,
        version=1,
        **number,
    )
    rows = []
    exact = _published(replace(plain, name="float32"))
    for name, steps in {**variants(options), "random": ()}.items():
        for seed in (0,) if name == "float32" else options.seeds:
            asked = replace(plain, name=f"{name}-{seed}", steps=steps, seed=seed)
            if name == "float32":
                model = exact
            elif name == "random":
                arch = options.untrained or (options.weights and options.arch)
                if not arch:
                    continue  # a network that brings its weights has no others
                model = _published(replace(asked, arch=arch, weights="random"))
            else:
                model = _published(replace(asked, finetune=options.train if len(steps) > 1 else None))
            rows.append(_row(name, seed, model, exact, images, options))
    found = {
        "weights": options.weights and options.weights.name,
        "steps": options.train and options.steps,
        "rows": rows,
    }
    file = RESULTS / FILE
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["networks"] if file.is_file() else {}
    known[network] = found
    if options.save:
        whole = {"environment": report.environment(options.threads), "networks": known}
        file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(known), encoding="utf-8")
    print(markdown({network: found}), end="")


def _published(config: ExportConfig) -> Path:
    """A model's folder; made where there is none with these settings."""
    told = {key: str(value) for key, value in vars(config).items() if key != "network"}
    mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    folder = config.repository / config.model_name
    made = config.repository / f"{config.model_name}.settings"
    if not (folder / "report.json").is_file() or not made.is_file() or made.read_text() != mark:
        run(config, Terminal())
        made.write_text(mark)
    return folder


def _row(name: str, seed: int, model: Path, exact: Path, images: Path, options: argparse.Namespace) -> dict[str, Any]:
    stress = Stress(images=options.spoilt, severity=3, size=1) if seed == options.seeds[0] else Stress()
    asked = Asked(model=model, images=images, against=str(exact), threads=options.threads, stress=stress)
    found = audit(asked, Terminal())
    answers, moved, stands = found.answers, found.drift, found.robustness
    spoilt, attacks = ((), ()) if stands is None else (stands.rows, stands.attacks)
    return {
        "variant": name,
        "seed": seed,
        "images": answers.images,
        "top1": answers.top1[1],
        "interval": list(answers.top1_intervals[1]),
        "flips": answers.flipped,
        "worst_class": found.labels[answers.worst_class.index],
        "class_drop": answers.worst_class.drop,
        "paid": [found.labels[one.index] for one in answers.classes if one.paid],
        "calibration_error": answers.calibration[1],
        "drift": None
        if moved is None
        else {
            "images": len(moved.places),
            "median": moved.median,
            "percentile_5": float(np.percentile(moved.correlation, 5)),
            "same_answers": moved.median_of(found.same[moved.places]),
            "peak_moved": moved.moved,
        },
        "spoilt": {row.kind: row.after for row in spoilt},
        "attacks": {row.kind: [row.before, row.after] for row in attacks},
        "notes": found.notes,
    }


def _class_folders(photos: Path, folder: Path) -> Path:
    """The photographs in a folder for each class, named by its index."""
    shutil.rmtree(folder, ignore_errors=True)
    places = {wordnet: index for index, wordnet in enumerate(ImageNetInfo().label_names())}
    for photo in sorted(photos.glob("n*_*")):
        own = folder / str(places[photo.name.split("_")[0]])
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, own)
    return folder


def markdown(networks: Mapping[str, Any]) -> str:
    """A table for each network."""
    lines = []
    for name, found in networks.items():
        rows = found["rows"]
        trained = f", pruned ones trained for {found['steps']} steps of 64 images" if found["steps"] else ""
        lines += [f"## {name}", "", f"{rows[0]['images']} images{trained}.", ""]
        lines += [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
        lines += [_line(row) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    moved = row["drift"]
    spoilt = [share for kind, share in row["spoilt"].items() if kind != PLAIN]
    evidence = "none" if moved is None else f"{moved['median']:.4f}, {moved['percentile_5']:.3f}"
    same = "" if moved is None or moved["same_answers"] is None else f"{moved['same_answers']:.4f}"
    attack = {kind: share for kind, (_, share) in row["attacks"].items()}
    cells = [
        row["variant"],
        row["seed"],
        f"{row['top1']:.1%} ({low:.1%} to {high:.1%})",
        f"{row['flips']:.1%}",
        f"{-100 * row['class_drop']:+.1f} {row['worst_class']}" if row["class_drop"] > 0 else "none",
        ", ".join(row["paid"]) or "none",
        f"{row['calibration_error']:.3f}",
        evidence,
        same,
        f"{np.mean(spoilt):.1%}" if spoilt else "",
        *(f"{attack[kind]:.0%}" if kind in attack else "" for kind in ATTACKS),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--name", help="of the network in the table (default: the arch)")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--untrained", metavar="ARCH", help="the same network without the weights that --arch brings")
    parser.add_argument("--train", type=Path, metavar="DIR")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--test", type=Path, metavar="DIR")
    images.add_argument("--photos", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=600, help="of training, 64 images each (default 600)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--spoilt", type=int, default=300, help="pictures that are spoilt in each way (default 300)")
    parser.add_argument("--mean")
    parser.add_argument("--std")
    parser.add_argument("--resize", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/audits"), metavar="DIR")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{FILE} and the table beside it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
