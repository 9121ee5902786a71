"""One audit: the two models over the labelled images, and what each part of it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoynet.exporter.auditing import answers, temperature
from convoynet.exporter.auditing.answers import Answers, Classes, Logits, Said
from convoynet.exporter.auditing.drift import Drift, drift
from convoynet.exporter.auditing.robustness import MOST_ATTACKED, Robustness, Stress, attacks, robustness
from convoynet.exporter.auditing.subjects import BATCH, Subject, audited, reference
from convoynet.exporter.auditing.temperature import Temperature
from convoynet.exporter.data.folder import survey
from convoynet.exporter.data.images import Preprocess, labelled_images, load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_read import read_model
from convoynet.exporter.progress import Progress
from convoynet.exporter.publishing.parameters import parameter

MOST_IMAGES = 5000
DRIFT_IMAGES = 300
# Names of pictures that JSON has of each kind of flip.
_MOST_NAMES = 1000


@dataclass(frozen=True)
class Asked:
    """What is audited, and how much of it.

    Attributes:
        model: the folder of a published model.
        images: class folders.
        against: what it is compared with; None for the network that it was made from.
        threads: CPU threads of one call.
        most: images that are looked at; of more, as many evenly spread ones.
        drift_images: images, of those, whose evidence is looked at; 0 for none.
        drift_needed: whether it is an error where there is no evidence to look at.
        fit_temperature: whether the published graph gets a calibrated output.
        stress: how hard both are tried.
    """

    model: Path
    images: Path
    against: str | None = None
    threads: int = 1
    most: int = MOST_IMAGES
    drift_images: int = DRIFT_IMAGES
    drift_needed: bool = False
    fit_temperature: bool = False
    stress: Stress = field(default_factory=Stress)

    def __post_init__(self) -> None:
        if self.drift_needed and not self.drift_images:
            raise BadInput("--drift-images 0 looks at no evidence, and --max-drift judges it: leave one of them out")
        for flag, value, least in (
            ("--threads", self.threads, 1),
            ("--max-images", self.most, 1),
            ("--drift-images", self.drift_images, 0),
        ):
            if value < least:
                raise BadInput(f"{flag} {value} is not {least} or more")


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        model, reference: their names.
        source: which images.
        labels: the class names.
        preprocess: how a picture becomes pixels.
        pictures: the image files, in the order of all places.
        classes: the class of each.
        said: the answers of the reference and of the model.
        notes: what to know of it.
    """

    model: str
    reference: str
    source: str
    labels: Sequence[str]
    folder: Path
    preprocess: Preprocess
    pictures: Sequence[Path]
    classes: Classes
    said: tuple[Said, Said]
    answers: Answers
    temperature: Temperature | None = None
    drift: Drift | None = None
    robustness: Robustness | None = None
    notes: list[str] = field(default_factory=list)

    def name(self, place: int) -> str:
        """A picture's path in the folder of all."""
        return str(self.pictures[place].relative_to(self.folder))

    @property
    def same(self) -> NDArray[np.bool_]:
        """Which images got the same answer."""
        before, after = self.said
        alike: NDArray[np.bool_] = before.best == after.best
        return alike

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        names = [self.name(place) for place in range(len(self.pictures))]
        return {
            "model": self.model,
            "reference": self.reference,
            "source": self.source,
            **self.answers.to_json(self.labels, names, _MOST_NAMES),
            "temperature": None if self.temperature is None else self.temperature.to_json(),
            "drift": None if self.drift is None else self.drift.to_json(names, self.same),
            "robustness": None if self.robustness is None else self.robustness.to_json(),
            "notes": self.notes,
        }


def calibrate(found: Audit) -> None:
    """Put the temperature that was fitted into the published graph.

    Raises:
        BadInput: the repository cannot be written; nothing has changed.
    """
    assert found.temperature is not None
    _, published = audited(Path(found.model))
    temperature.put_into(published, read_model(published.graph), found.temperature)


@dataclass(frozen=True)
class _Images:
    """The labelled images of an audit."""

    paths: list[Path]
    classes: Classes
    source: str
    notes: list[str]


def audit(asked: Asked, progress: Progress) -> Audit:
    """Compare a published model with what it was made from; nothing is changed.

    Raises:
        BadInput: what is named is not there or does not fit, or the images say nothing.
    """
    model, published = audited(asked.model)
    images = _images(asked, model)
    with progress.step("load the reference"):
        before = reference(asked.against, model, published)
    logits = _logits((before, model), images, asked.threads, progress)
    said = answers.said(logits[0]), answers.said(logits[1])
    fitted = None
    notes = images.notes
    if asked.fit_temperature:
        temperature.require_graph_served(published)
        fitted = temperature.fit(logits[1], images.classes)
        notes += fitted.notes
    if parameter(published.config, "engine") == "openvino":
        notes.append("config.pbtxt has OpenVINO serve the model: here ONNX Runtime answered")
    return Audit(
        model=model.name,
        reference=before.name,
        source=images.source,
        labels=model.labels,
        folder=asked.images,
        preprocess=model.preprocess,
        pictures=images.paths,
        classes=images.classes,
        said=said,
        answers=answers.answers_of(*said, images.classes),
        temperature=fitted,
        drift=_drift((before, model), images, said[0], asked, progress) if asked.drift_images else None,
        robustness=_robustness((before, model), images, asked, progress) if asked.stress.images else None,
        notes=notes,
    )


def _images(asked: Asked, model: Subject) -> _Images:
    """The images, evenly spread where there are more than are looked at.

    Raises:
        BadInput: there are none, they have no labels, or all have the same.
    """
    try:
        left_out = survey(asked.images).line
        found = labelled_images(asked.images, model.labels)
    except BadInput as error:
        raise BadInput(f"--images {error}") from error
    total = len(found)
    if total > asked.most:
        found = [found[place] for place in spread(total, asked.most)]
    classes = np.array([label for _, label in found], np.int64)
    if len(set(classes.tolist())) < 2:
        raise BadInput(
            f"--images {asked.images}: all {len(found)} images are of one class, {model.labels[classes[0]]!r}: whom a "
            "model fails shows between classes; give images of two or more"
        )
    said = f"{len(found)} of the {total} images" if len(found) < total else f"the {total} images"
    return _Images([path for path, _ in found], classes, f"{said} in {asked.images}", [left_out] if left_out else [])


def _drift(
    subjects: tuple[Subject, Subject], images: _Images, before: Said, asked: Asked, progress: Progress
) -> Drift | None:
    """Where both look, of images that are evenly spread; None where that cannot be said, with a note.

    Raises:
        BadInput: it cannot be said, and is needed.
    """
    places = spread(len(images.paths), asked.drift_images)
    pixels = load_images([images.paths[place] for place in places], subjects[0].preprocess)
    try:
        return drift(subjects, pixels, places, before.best[places], progress)
    except BadInput as error:
        if asked.drift_needed:
            raise
        images.notes.append(f"no evidence was looked at: {error}")
        return None


def _robustness(subjects: tuple[Subject, Subject], images: _Images, asked: Asked, progress: Progress) -> Robustness:
    """What both can stand, on images that are evenly spread; where no attack is possible, a note says so."""
    places = spread(len(images.paths), asked.stress.images)
    pixels = load_images([images.paths[place] for place in places], subjects[0].preprocess)
    found = robustness(subjects, pixels, images.classes[places], (asked.stress, asked.threads), progress)
    if not asked.stress.size:
        return found
    few = spread(len(places), MOST_ATTACKED)
    try:
        rows = attacks(subjects, pixels[few], images.classes[places[few]], (asked.stress, asked.threads), progress)
    except BadInput as error:
        images.notes.append(f"nothing was attacked: {error}")
        return found
    return replace(found, attacks=rows)


def spread(total: int, most: int) -> Classes:
    """As many places as there are, or `most` evenly spread ones."""
    return np.linspace(0, total - 1, min(total, most)).astype(np.int64)


def _logits(subjects: Sequence[Subject], images: _Images, threads: int, progress: Progress) -> list[Logits]:
    """The logits of all images for each model; both see the same decoded pictures."""
    sessions = [subject.session(threads) for subject in subjects]
    parts: list[list[Logits]] = [[] for _ in subjects]
    starts = range(0, len(images.paths), BATCH)
    for at in progress.track(starts, f"answers for {len(images.paths)} images", len(starts)):
        pixels = load_images(images.paths[at : at + BATCH], subjects[0].preprocess)
        for subject, session, made in zip(subjects, sessions, parts, strict=True):
            made.append(subject.logits(session, pixels))
    return [np.concatenate(made) for made in parts]
