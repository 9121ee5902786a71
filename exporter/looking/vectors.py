"""Concept activation vectors: where a layer's answers to a concept lie, seen from those to other pictures.

One vector says little: any two heaps of pictures are told apart by some. So many are made, each of half of the
pictures, and as many that tell random pictures from random ones.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from convoynet.exporter.errors import BadInput, Missing

Rows = NDArray[np.float64]
_MOST_STEPS = 1000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Vectors:
    """Those of one concept.

    Attributes:
        concept: [runs, channels], of length 1.
        random: [runs, channels], between random pictures.
        drawn: pictures of each side that one was made of.
        overlap: how much alike the runs are, having drawn from the same pictures: those drawn, by those left.
        accuracy: of the pictures that were not drawn, how many a vector tells right; the mean over both sides and runs.
    """

    concept: Rows
    random: Rows
    drawn: int
    overlap: float
    accuracy: float


def require_library() -> None:
    """See that there is what makes them.

    Raises:
        Missing: there is not.
    """
    try:
        importlib.import_module("scipy.stats")
        importlib.import_module("sklearn.linear_model")
    except ImportError as error:
        raise Missing(
            "--concepts needs scikit-learn, which is not installed: pip install 'convoynet[concepts]' brings it"
        ) from error


def vectors(concept: Rows, others: Rows, runs: int, seed: int = 0) -> Vectors:
    """Make them.

    Args:
        concept: [n, channels], what the layer says of pictures of the concept.
        others: the same of other pictures.
        runs: how many vectors.
        seed: of what is drawn.

    Raises:
        BadInput: the layer says the same of all of them.
    """
    from sklearn.linear_model import LogisticRegression

    # By one number for all channels: the directions stay, and the strength of the fit is the same for every network.
    scale = sqrt(np.concatenate((concept, others)).var(axis=0).mean())
    if not scale > 0:
        raise BadInput("its units have the same mean on all of these pictures")
    drawn = min(len(concept), len(others)) // 2
    random = np.random.default_rng(seed)

    def fitted(one: Rows, other: Rows) -> LogisticRegression:
        sides = np.repeat((1, 0), (len(one), len(other)))
        return LogisticRegression(max_iter=_MOST_STEPS).fit(np.concatenate((one, other)) / scale, sides)

    made: tuple[list[Rows], list[Rows]] = ([], [])
    told = []
    for _ in range(runs):
        mine, theirs, both = (random.permutation(len(rows)) for rows in (concept, others, others))
        found = fitted(concept[mine[:drawn]], others[theirs[:drawn]])
        made[0].append(_unit(found.coef_[0]))
        told.append(found.predict(concept[mine[drawn:]] / scale).mean())
        told.append(1 - found.predict(others[theirs[drawn:]] / scale).mean())
        by_chance = fitted(others[both[:drawn]], others[both[drawn : 2 * drawn]])
        made[1].append(_unit(by_chance.coef_[0]))
    overlap = drawn / (min(len(concept), len(others)) - drawn)
    return Vectors(np.stack(made[0]), np.stack(made[1]), drawn, overlap, float(np.mean(told)))


def _unit(vector: Rows) -> Rows:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def probability(scores: Rows, random: Rows, overlap: float) -> float:
    """How likely scores lie as far from those of random vectors where the concept makes no difference.

    Welch's test of two means, two-sided. The runs of a concept draw from the same pictures and so agree more than fresh
    pictures would: their variance is the larger by the overlap (C. Nadeau and Y. Bengio 2003, "Inference for the
    Generalization Error"). What random ones tell apart is by chance in each run.

    Args:
        scores: of each run.
        random: those of random vectors, of as many runs.
        overlap: of the runs.
    """
    from scipy import stats

    runs = len(scores)
    gap = abs(float(scores.mean() - random.mean()))
    spread = float(scores.var(ddof=1)) * (1 / runs + overlap) + float(random.var(ddof=1)) / runs
    if gap < _ROUNDING or spread < _ROUNDING**2:
        return 1.0 if gap < _ROUNDING else 0.0
    return float(2 * stats.t.sf(gap / sqrt(spread), runs - 1))
