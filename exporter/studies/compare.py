"""Measure networks and exported models side by side, in one run on one machine.

What is asked for is looked at before PyTorch and ONNX Runtime are imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.archs import facts, get, names
from convoynet.exporter.auditing import in_export
from convoynet.exporter.data.folder import require_images, survey
from convoynet.exporter.data.images import Preprocess, labelled_images, made_images
from convoynet.exporter.errors import BadInput, reason
from convoynet.exporter.evidence import accuracy, limits, speed
from convoynet.exporter.evidence.limits import Kind
from convoynet.exporter.progress import Progress
from convoynet.exporter.publishing.model_folder import GRAPH_FILE, PLAN_FILE
from convoynet.exporter.publishing.published import is_published, other_classes, read_published
from convoynet.exporter.publishing.repository import versions
from convoynet.exporter.studies import changes
from convoynet.exporter.studies.changes import Changes
from convoynet.exporter.studies.variants import Variant

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Images, Session

BATCH = 8
_SEED = 0
_IMAGES = 8
# What outputs may mean here; those that nothing is known of are taken for classes, as other commands do.
_KINDS: Mapping[str, Kind] = MappingProxyType(
    {"labels": "labels", "regression": "regression", "embedding": "embedding", "one value": "one value"}
)


@dataclass(frozen=True)
class Subject:
    """What is compared: a graph, what it takes, and what is known of it.

    `kind` is what its outputs mean, `pictures` how a picture becomes its input, and `arch` the network.
    """

    name: str
    precision: str
    graph: bytes
    preprocess: Preprocess
    labels: list[str]
    parameters: int
    macs: int
    trained: bool
    kind: Kind
    outputs: tuple[str, ...]
    pictures: str
    arch: str

    @property
    def answer(self) -> tuple[object, ...]:
        """What it answers: only models that answer the same can be better or worse."""
        return self.kind, self.outputs, tuple(self.labels)

    @property
    def answer_line(self) -> str:
        """The same for people."""
        return f"{self.name} ({limits.INT8[self.kind].name}: {len(self.labels)} {', '.join(self.outputs)})"


@dataclass(frozen=True)
class Compared:
    """What was measured, and what to know beside it, each in a line."""

    variants: list[Variant]
    remarks: list[str]


def compare(models: Sequence[str], evaluation: Path | None, threads: int, progress: Progress) -> Compared:
    """Measure size, speed and, with images in class folders, accuracy.

    Args:
        models: networks of the zoo, measured in float32 with random weights, and folders of exported models, of which
            the newest version counts.
        evaluation: class folders named as the models' labels.
        threads: CPU threads of one call.
        progress: shows the work.

    Raises:
        BadInput: a name that is neither, a model that returns maps or boxes, models whose outputs mean different
            things, or, with `evaluation`, outputs that are no classes or other classes.
    """
    exported = {name: _exported(Path(name)) for name in models if is_published(Path(name))}
    for name in models:
        if name not in exported:
            _require_network(name)
    _require_one_kind({name: exported[name].kind if name in exported else "classification" for name in models})
    if evaluation is not None:
        _require_eval(evaluation, list(exported.values()))

    subjects = [exported[name] if name in exported else _network(name, progress) for name in models]
    sessions = [_session(one, threads) for one in subjects]
    timings: dict[int, speed.Timing] = {}
    for batch in progress.track((1, BATCH), "speed"):
        images = [_made(one.preprocess) for one in subjects]
        sides = [
            (session, session.prepare(made[np.arange(batch) % len(made)]))
            for session, made in zip(sessions, images, strict=True)
        ]
        taken, load = speed.time_in_turn(sides, threads)
        rates = [
            speed.rate_of(one.name, one.precision, seconds, batch) for one, seconds in zip(subjects, taken, strict=True)
        ]
        timings[batch] = speed.Timing(batch, threads, load, tuple(rates))
    remarks = [*_differences(subjects), *_left_out(models, evaluation)]
    judged = [_Judged()] * len(subjects)
    if evaluation is not None:
        judged = _judge(subjects, sessions, evaluation, progress, remarks)
    answers = [one.answer for one in subjects]
    measured = [
        Variant(
            name=one.name,
            precision=one.precision,
            parameters=one.parameters,
            macs=one.macs,
            bytes=len(one.graph),
            milliseconds=round(1e3 / timings[1].rates[index].images_per_second, 4),
            images_per_second=round(timings[BATCH].rates[index].images_per_second, 2),
            batch=BATCH,
            top1=judged[index].top1,
            changes=judged[index].changes,
            doubt=timings[1].doubt(timings[1].rates[index]) or timings[BATCH].doubt(timings[BATCH].rates[index]),
            group=answers.index(one.answer),
        )
        for index, one in enumerate(subjects)
    ]
    return Compared(measured, remarks)


def _session(subject: Subject, threads: int) -> Session:
    """The model in ONNX Runtime, once it has answered for one image.

    Raises:
        BadInput: it does not.
    """
    from convoynet.exporter.graph.onnx_read import read_model
    from convoynet.exporter.running.runtime import Session

    read_model(subject.graph, name=f"{subject.name}: its {GRAPH_FILE}")
    try:
        session = Session(subject.graph, subject.preprocess, task="classification", target="cpu", threads=threads)
        session(session.prepare(_made(subject.preprocess)[:1]))
    except Exception as error:  # ONNX Runtime's own types, which have no common one
        raise BadInput(f"{subject.name}: ONNX Runtime does not run its {GRAPH_FILE}: {reason(error)}") from error
    return session


@dataclass(frozen=True)
class _Judged:
    """What images say of a model; nothing of one that is not trained."""

    top1: float | None = None
    changes: Changes | None = None


def _judge(
    subjects: Sequence[Subject],
    sessions: Sequence[Session],
    evaluation: Path,
    progress: Progress,
    remarks: list[str],
) -> list[_Judged]:
    """Accuracy, and what is other than in the first model that is trained; why something is not known, in `remarks`.

    Networks that differ look elsewhere anyway: the evidence of those alone is compared that are the same one.
    """
    from convoynet.exporter.graph.onnx_read import read_model
    from convoynet.exporter.graph.onnx_scores import PROBABILITIES, ending

    found = []
    before: tuple[Subject, in_export.Watched] | None = None
    for one, session in zip(subjects, sessions, strict=True):
        if not one.trained:
            found.append(_Judged())
            continue
        labelled = labelled_images(evaluation, one.labels)
        graph = read_model(one.graph)
        watched = in_export.Watched(session, shares=ending(graph, graph.graph.output[0].name).operator in PROBABILITIES)
        ((top1, _),) = accuracy.hit_rates((watched,), labelled, one.preprocess, progress)
        first, reference = before = before or (one, watched)
        made = changes.of_answers(in_export.told(reference, watched, [label for _, label in labelled], one.labels))
        if made is not None and one.arch == first.arch:
            moved, why = changes.drift(Path(first.name), Path(one.name), [image for image, _ in labelled], progress)
            remarks.extend([why] if why else [])
            made = replace(made, drift=moved)
        found.append(_Judged(top1, made))
    return found


def _require_network(name: str) -> None:
    if name not in names():
        raise BadInput(
            f"{name!r} is neither a folder of an exported model nor a network that `convoy archs` lists; give "
            f"models/NAME or a NAME of that list"
        )
    _require_classifier(name, (facts.recorded().get(name) or get(name)).task)


def _require_one_kind(kinds: Mapping[str, Kind]) -> None:
    """See that all outputs mean the same kind of thing."""
    (first, kind), *others = kinds.items()
    for name, other in others:
        if other != kind:
            raise BadInput(
                f"{first} gives {limits.INT8[kind].name} and {name} {limits.INT8[other].name}: nothing says which is "
                "better; compare models of one task"
            )


def _require_eval(folder: Path, exported: Sequence[Subject]) -> None:
    """See that class folders can judge all models that are trained."""
    try:
        require_images(folder)
    except BadInput as error:
        raise BadInput(f"--eval {error}") from error
    for one in exported:
        if one.kind != "classification":
            raise BadInput(f"--eval {folder}: class folders say nothing about {limits.INT8[one.kind].name}: {one.name}")
        first = exported[0]
        if one.labels != first.labels:
            told = other_classes(first.labels, one.labels)
            raise BadInput(f"--eval {folder}: {first.name} and {one.name} have {told}: compare them without --eval")


def _differences(subjects: Sequence[Subject]) -> list[str]:
    """What stands side by side and is not the same."""
    told = []
    if len({one.answer for one in subjects}) > 1:
        answers = dict.fromkeys(one.answer_line for one in subjects)
        told.append(f"other answers: {', '.join(answers)}: none of them is called better than one that answers else")
    seen: dict[str, list[str]] = {}
    for one in subjects:
        seen.setdefault(one.pictures, []).append(one.name)
    if len(seen) > 1:
        each = "; ".join(f"{', '.join(names)}: {pictures}" for pictures, names in seen.items())
        told.append(f"other preprocessing, each model has its own: {each}")
    return told


def _network(name: str, progress: Progress) -> Subject:
    """A network of the zoo, in float32 with random weights."""
    import torch

    from convoynet.exporter.archs import count, weights
    from convoynet.exporter.graph.onnx_from_torch import OUTPUTS, onnx_from_torch

    arch = get(name)
    with progress.step(f"export {name}"):
        torch.manual_seed(_SEED)
        module = arch.build(arch.num_classes)
        weights.load(module, arch, "random", seed=_SEED, images=_made(arch.preprocess))
        module = arch.deploy(module)
        graph = onnx_from_torch(module, arch.preprocess, uint8_input=False)
    size = count(module, arch.input_size)
    return Subject(
        name=name,
        precision="fp32",
        graph=graph.SerializeToString(),
        preprocess=arch.preprocess,
        labels=arch.labels(),
        parameters=size.parameters,
        macs=size.macs,
        trained=False,
        kind="classification",
        outputs=OUTPUTS["classification"],
        pictures=arch.preprocess.line,
        arch=name,
    )


def _exported(folder: Path) -> Subject:
    """An exported model, by the files that Convoy wrote beside it."""
    found = read_published(folder)
    _require_classifier(str(folder), found.task)
    return Subject(
        name=str(folder),
        precision=found.precision,
        graph=found.graph,
        preprocess=found.preprocess,
        labels=found.labels,
        parameters=int(found.report["parameters"]["after"]),
        macs=int(found.report["macs"]["after"]),
        trained=True,
        kind=_KINDS.get(found.kind, "classification"),
        outputs=tuple(output.name for output in found.config.output),
        pictures=found.pictures,
        arch=str(found.report["arch"]),
    )


def _left_out(models: Sequence[str], evaluation: Path | None) -> list[str]:
    """What was left out of the images, and each model whose figures are not those of the file that is served."""
    found = [line for line in [survey(evaluation).line if evaluation is not None else ""] if line]
    for name in models:
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
