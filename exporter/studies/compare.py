"""Measure networks and exported models side by side, in one run on one machine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf import text_format

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.data.images import Preprocess, labelled_images, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence import verify
from convoynet.exporter.evidence.report import JSON_FILE
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Progress
from convoynet.exporter.publishing import model_config
from convoynet.exporter.publishing.model_folder import GRAPH_FILE, PLAN_FILE
from convoynet.exporter.publishing.repository import versions
from convoynet.exporter.running.runtime import Images, Session
from convoynet.exporter.studies.variants import Variant
from convoynet.protos.inference import model_config_pb2 as pb

BATCH = 8
_SEED = 0
_IMAGES = 8


@dataclass(frozen=True)
class Subject:
    """What is compared: a graph, what it takes, and what is known of it."""

    name: str
    precision: str
    graph: bytes
    preprocess: Preprocess
    labels: list[str]
    parameters: int
    macs: int
    trained: bool


def compare(names: Sequence[str], evaluation: Path | None, threads: int, progress: Progress) -> list[Variant]:
    """Measure size, speed and, with images in class folders, accuracy.

    Args:
        names: networks of the zoo, measured in float32 with random weights, and folders of exported models, of which
            the newest version counts.
        evaluation: class folders named as the models' labels.
        threads: CPU threads of one call.
        progress: shows the work.

    Raises:
        BadInput: a name that is neither, a model that is no classifier, or labels that do not fit.
    """
    subjects = [_subject(name, progress) for name in names]
    sessions = [
        Session(one.graph, one.preprocess, task="classification", target="cpu", threads=threads) for one in subjects
    ]
    seconds: dict[int, list[float]] = {}
    for batch in progress.track((1, BATCH), "speed"):
        images = [_made(one.preprocess) for one in subjects]
        sides = [
            (session, session.prepare(made[np.arange(batch) % len(made)]))
            for session, made in zip(sessions, images, strict=True)
        ]
        seconds[batch] = verify.seconds_of_call(sides)
    rates = [_top1(one, session, evaluation, progress) for one, session in zip(subjects, sessions, strict=True)]
    return [
        Variant(
            name=one.name,
            precision=one.precision,
            parameters=one.parameters,
            macs=one.macs,
            bytes=len(one.graph),
            milliseconds=round(1e3 * seconds[1][index], 4),
            images_per_second=round(BATCH / seconds[BATCH][index], 2),
            batch=BATCH,
            top1=rates[index],
        )
        for index, one in enumerate(subjects)
    ]


def _top1(subject: Subject, session: Session, evaluation: Path | None, progress: Progress) -> float | None:
    if evaluation is None or not subject.trained:
        return None
    labelled = labelled_images(evaluation, subject.labels)
    return verify.hit_rates((session,), labelled, subject.preprocess, progress)[0][0]


def _subject(name: str, progress: Progress) -> Subject:
    if (Path(name) / model_config.CONFIG_FILE).is_file():
        return _exported(Path(name))
    if name not in archs.names():
        raise BadInput(
            f"{name!r} is neither a folder of an exported model nor a network that `convoy archs` lists; give "
            f"models/NAME or a NAME of that list"
        )
    arch = archs.get(name)
    _require_classifier(name, arch.task)
    with progress.step(f"export {name}"):
        torch.manual_seed(_SEED)
        module = arch.build(arch.num_classes)
        weights.load(module, arch, "random", seed=_SEED, images=_made(arch.preprocess))
        module = arch.deploy(module)
        graph = onnx_from_torch(module, arch.preprocess, uint8_input=False)
    count = archs.count(module, arch.input_size)
    return Subject(
        name, "fp32", graph.SerializeToString(), arch.preprocess, arch.labels(), count.parameters, count.macs, False
    )


def _exported(folder: Path) -> Subject:
    """An exported model, by the files that Convoy wrote beside it."""
    try:
        config = text_format.Parse((folder / model_config.CONFIG_FILE).read_text(), pb.ModelConfig())
        report = json.loads((folder / JSON_FILE).read_text())
        described = json.loads(config.parameters["preprocess"].string_value)
        content = (folder / str(max(versions(folder))) / GRAPH_FILE).read_bytes()
        labels = (folder / model_config.LABELS_FILE).read_text().splitlines()
        preprocess = Preprocess(
            tuple(described["size"]), described["resize"], tuple(described["mean"]), tuple(described["std"]),
            described["interpolation"], described.get("fit", "crop"),
        )  # fmt: skip
        parameters, macs = report["parameters"]["after"], report["macs"]["after"]
    except (OSError, ValueError, KeyError, text_format.ParseError) as error:
        raise BadInput(f"{folder} is no model that `convoy export` published: {error}") from error
    _require_classifier(str(folder), config.parameters["task"].string_value or "classification")
    return Subject(
        str(folder), report["precision"], content, preprocess, labels, int(parameters), int(macs), trained=True
    )


def remarks(names: Sequence[str]) -> list[str]:
    """A line for each model whose figures are not those of the file that is served."""
    found = []
    for name in names:
        newest = str(max(versions(Path(name)), default=0))
        if (Path(name) / newest / PLAN_FILE).is_file():
            found.append(
                f"{name} is served from {PLAN_FILE}, a TensorRT engine; the figures are those of the "
                f"{GRAPH_FILE} beside it, in ONNX Runtime on the CPU"
            )
    return found


def _made(preprocess: Preprocess) -> Images:
    return made_images(_IMAGES, preprocess.size, preprocess.channels, _SEED)


def _require_classifier(name: str, task: str) -> None:
    if task != "classification":
        raise BadInput(f"{name}: {task} is not compared here; give classifiers")
