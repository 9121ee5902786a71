"""Which concepts count for a class: TCAV, testing with concept activation vectors.

B. Kim and others 2018, "Interpretability Beyond Feature Attribution", arXiv:1711.11279. The score of a concept for a
class is the share of the class's images whose score for the class rises when the layer's map moves along the concept's
vector. Maps are taken by their means over the places, so that a vector is a direction of channels, the same everywhere:
it suits a few dozens of pictures, and a picture takes as many numbers as the layer has channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convoynet.exporter.data.folder import list_images
from convoynet.exporter.data.images import class_named, labelled_images, load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.concept_folders import Concept, spread
from convoynet.exporter.looking.opened import Layer, Opened
from convoynet.exporter.looking.tail import answers_of, are_probabilities
from convoynet.exporter.looking.vectors import Rows, Vectors, probability, vectors
from convoynet.exporter.progress import Progress

LEVEL = 0.05
"""Of all tests together."""
_FEW_IMAGES, _MOST_NAMED = 10, 8
_TELLS = 0.65


@dataclass(frozen=True)
class Verdict:
    """A concept for a class.

    Attributes:
        concept: its name.
        label: of the class.
        index: of the class.
        images: how many of the class.
        score: the share of them that the concept speaks for, the mean over the runs.
        deviation: over the runs.
        random: the same of random vectors.
        random_deviation: over the runs.
        p: how likely that is where the concept makes no difference.
        significant: whether p is below `LEVEL` by the number of tests.
    """

    concept: str
    label: str
    index: int
    images: int
    score: float
    deviation: float
    random: float
    random_deviation: float
    p: float
    significant: bool

    @property
    def said(self) -> str:
        """In a word or two."""
        if not self.significant:
            return "not told from random"
        return "for the class" if self.score > self.random else "against the class"

    def to_json(self) -> dict[str, Any]:
        """As docs/inspecting.md describes it."""
        return {
            "concept": self.concept,
            "class": self.label,
            "class_index": self.index,
            "images": self.images,
            "score": self.score,
            "deviation": self.deviation,
            "random_score": self.random,
            "random_deviation": self.random_deviation,
            "p": self.p,
            "significant": self.significant,
        }


@dataclass(frozen=True)
class Told:
    """How a layer tells a concept from other pictures.

    Attributes:
        concept: the pictures.
        drawn: how many of each side one vector was made of.
        accuracy: of the vectors, on pictures that they were not made of.
        along: of each image of the classes, how far its map lies along the vectors.
    """

    concept: Concept
    drawn: int
    accuracy: float
    along: Rows


@dataclass(frozen=True)
class Concepts:
    """What was found of concepts.

    Attributes:
        layer: the layer.
        source: which images of the classes, in words.
        images: these.
        runs: vectors of each concept.
        told: the concepts.
        tested: each of them for each class.
        notes: what to know of it.
    """

    layer: Layer
    source: str
    images: Sequence[Path]
    runs: int
    told: Sequence[Told]
    tested: Sequence[Verdict]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """As docs/inspecting.md describes it."""
        return {
            "layer": self.layer.name,
            "images": self.source,
            "runs": self.runs,
            "concepts": [
                {
                    "concept": one.concept.name,
                    "pictures": len(one.concept.pictures),
                    "held_against": one.concept.held_against,
                    "drawn": one.drawn,
                    "accuracy": one.accuracy,
                }
                for one in self.told
            ],
            "scores": [each.to_json() for each in self.tested],
            "notes": list(self.notes),
        }


def class_labels(opened: Opened) -> list[str]:
    """The names of a classifier's classes; their indices where it has none.

    Raises:
        BadInput: the network is no classifier.
    """
    blank = np.zeros((1, *opened.size, opened.preprocess.channels), np.uint8)
    with torch.no_grad():
        count = answers_of(opened, opened.run(opened.inputs(blank))).shape[1]
    return opened.labels if len(opened.labels) == count else [str(index) for index in range(count)]


def images_of_classes(
    folder: Path, named: str | None, labels: Sequence[str], most: int
) -> tuple[list[tuple[Path, int]], str]:
    """Images with the class of each, and which they are in words.

    Args:
        folder: theirs: of one class, or with a folder for each.
        named: that one class, by its label or index; None where there is a folder for each.
        labels: the classes.
        most: images that are looked at.

    Raises:
        BadInput: there is no such class, or an image lies in no folder of one.
    """
    if named is None:
        try:
            every = labelled_images(folder, labels)
        except BadInput as error:
            raise BadInput(f"--images {error}; or say with --class which class all of them are") from error
        told = f"of {len({index for _, index in every})} classes"
    else:
        try:
            index = class_named(named, labels, "a class")
        except BadInput as error:
            raise BadInput(f"--class {error}") from error
        every = [(file, index) for file in list_images(folder)]
        told = f"of {labels[index]}"
    some = spread(every, most)
    return some, f"{len(some)} of the {len(every)} images in {folder}, {told}"


def concepts_of(
    opened: Opened,
    layer: Layer,
    concepts: Sequence[Concept],
    of_classes: tuple[Sequence[tuple[Path, int]], str],
    runs: int,
    progress: Progress,
) -> Concepts:
    """See which concepts count for which classes.

    Args:
        opened: the network, a classifier.
        layer: of it.
        concepts: with their pictures.
        of_classes: images with the class of each, and which they are in words.
        runs: vectors of each concept.
        progress: shows how far it is.

    Raises:
        BadInput: a picture cannot be read, the network does not run, or no gradient arrives at the layer.
    """
    labels = class_labels(opened)
    pairs, source = of_classes
    classes = np.array([index for _, index in pairs])
    rises, means, probabilities = _derivatives(opened, layer, pairs, progress)
    for index in np.unique(classes):
        if not rises[classes == index].any():
            raise BadInput(
                f"no gradient of {labels[index]} arrives at {layer.name} on its images: what lies between has none, or "
                "is off there; choose another layer, or another class"
            )
    every = dict.fromkeys(file for one in concepts for file in (*one.pictures, *one.others))
    found = dict(zip(every, _means(opened, layer, list(every), progress), strict=True))
    told, tested = [], []
    tests = len(concepts) * len(np.unique(classes))
    for concept in progress.track(concepts, f"vectors of {len(concepts)} concepts", len(concepts)):
        mine, others = (np.stack([found[file] for file in files]) for files in (concept.pictures, concept.others))
        try:
            made = vectors(mine, others, runs)
        except BadInput as error:
            raise BadInput(f"{layer.name} does not tell {concept.name} from anything: {error}") from error
        told.append(Told(concept, made.drawn, made.accuracy, means @ made.concept.mean(axis=0)))
        for index in np.unique(classes):
            of_class = (labels[index], int(index))
            tested.append(_tested(concept.name, of_class, rises[classes == index], made, tests))
    notes = _notes(told, tested)
    if probabilities:
        notes.append(
            f"{opened.name} answers with probabilities, so the other classes have a part in what makes one rise; their "
            "scores before the softmax would not"
        )
    return Concepts(layer, source, [file for file, _ in pairs], runs, told, tested, notes)


def _tested(concept: str, of_class: tuple[str, int], rises: Rows, made: Vectors, tests: int) -> Verdict:
    # A random vector is taken both ways: either side may be called the concept.
    both_ways = np.concatenate((made.random, -made.random))
    scores, random = ((rises @ some.T > 0).mean(axis=0) for some in (made.concept, both_ways))
    p = probability(scores, random, made.overlap)
    return Verdict(
        concept,
        *of_class,
        len(rises),
        float(scores.mean()),
        float(scores.std(ddof=1)),
        float(random.mean()),
        float(random.std(ddof=1)),
        p,
        p * tests < LEVEL,
    )


def _derivatives(
    opened: Opened, layer: Layer, pairs: Sequence[tuple[Path, int]], progress: Progress
) -> tuple[Rows, Rows, bool]:
    """How much the score of each image's class rises with each channel, the channels' means, and whether it is a share.

    Raises:
        BadInput: a gradient is not finite.
    """
    rises, means = np.empty((2, len(pairs), layer.channels))
    probabilities = True
    starts = opened.starts(layer, len(pairs))
    for at in progress.track(starts, f"gradients of {len(pairs)} images", len(starts)):
        some = pairs[at : at + starts.step]
        maps, output = opened.behind(layer, opened.inputs(load_images([file for file, _ in some], opened.preprocess)))
        scores = answers_of(opened, output)
        mine = scores.gather(1, torch.tensor([index for _, index in some])[:, None])
        gradient = torch.autograd.grad(mine.sum(), maps, allow_unused=True)[0] if mine.requires_grad else None
        rises[at : at + len(some)] = 0 if gradient is None else gradient.double().sum(dim=(2, 3)).numpy()
        means[at : at + len(some)] = maps.detach().double().mean(dim=(2, 3)).numpy()
        probabilities = probabilities and are_probabilities(scores)
    if not (np.isfinite(rises).all() and np.isfinite(means).all()):
        raise BadInput(f"the maps of {layer.name}, or their gradients, are not finite: there is nothing to look at")
    return rises, means, probabilities


def _means(opened: Opened, layer: Layer, files: Sequence[Path], progress: Progress) -> Rows:
    """[files, channels], the mean of each channel over its map."""
    found = np.empty((len(files), layer.channels))
    starts = opened.starts(layer, len(files))
    for at in progress.track(starts, f"maps of {len(files)} pictures", len(starts)):
        some = files[at : at + starts.step]
        with torch.no_grad():
            maps = opened.maps(layer, opened.inputs(load_images(some, opened.preprocess)))
        found[at : at + len(some)] = maps.double().mean(dim=(2, 3)).numpy()
    if not np.isfinite(found).all():
        raise BadInput(f"the maps of {layer.name} are not finite: there is nothing to look at")
    return found


def _notes(told: Sequence[Told], tested: Sequence[Verdict]) -> list[str]:
    notes = []
    if blind := [one.concept.name for one in told if one.accuracy < _TELLS]:
        notes.append(
            f"the layer hardly tells {', '.join(blind)} from other pictures (fewer than {_TELLS:.0%} of those that the "
            "vectors were not made of), so a score says nothing of that; another layer may, or more pictures"
        )
    if any(not one.concept.apart for one in told):
        notes.append(
            "each concept was held against the others, so a score is for this one rather than those: of two, one's is "
            "the reverse of the other's; --random DIR holds them against anything"
        )
    if few := sorted({one.label for one in tested if one.images < _FEW_IMAGES}):
        notes.append(
            f"of {', '.join(few[:_MOST_NAMED])}{' and more' if len(few) > _MOST_NAMED else ''} there are fewer than "
            f"{_FEW_IMAGES} images: the share of them is a rough one"
        )
    if tested and all(one.score in (0, 1) and one.deviation == 0 for one in tested):
        notes.append(
            "all scores are 0 or 1: between this layer and the answers nearly everything is linear, so the images of a "
            "class agree; an earlier layer tells more"
        )
    return notes
