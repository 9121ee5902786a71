"""The search for the layers that have to stay in higher precision, so that accuracy stays within a budget.

Layers are ranked by the noise that they cause for each multiply-add that INT8 saves in them (the ranking by single
layers of Z. Dong et al. 2019, HAWQ, section 3, with measured noise in the place of the Hessian's eigenvalues). The
smallest sufficient prefix of that order is found by bisection; then its layers are put back, the costliest first,
wherever accuracy allows it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from convoynet.exporter.errors import Refused
from convoynet.exporter.progress import Progress
from convoynet.exporter.quantization.sensitivity import LayerCost

# Layers that are tried one by one for going back; each costs a run over the images.
MOST_PUT_BACK = 32
# Mixes that failed on the second images before the search gives up: each look at them makes them less independent.
MOST_CONFIRMATIONS = 5
# The rounding of the divisions that make points, never an image.
_ROUNDING = 1e-9

# The share (0 to 1) of some images that a graph gets right.
Score = Callable[[onnx.ModelProto], float]
Build = Callable[[Collection[str]], onnx.ModelProto]


@dataclass(frozen=True)
class Budget:
    """How much accuracy may be lost, and on which images that is found out.

    The mix is chosen for one set of images and so suits them better than others: a second set, without an image of
    the first, says whether it holds.

    Attributes:
        max_drop: points of accuracy (0.5 is half a percent of the images) that may be lost on either set.
        search: accuracy on the images that choose the mix.
        confirm: accuracy on the images that confirm it; None where there are none, and the mix is then unconfirmed.
    """

    max_drop: float
    search: Score
    confirm: Score | None


@dataclass(frozen=True)
class Trial:
    """One graph that was tried.

    Attributes:
        purpose: "search" or "confirm", the images that it was tried on.
        kept: how many layers stayed in higher precision.
        kept_macs: their share of the multiply-adds of all layers that could be quantized, 0 to 1.
        drop: points of accuracy lost; negative where the graph is better than the float one.
        allowed: points that it was allowed to lose.
    """

    purpose: str
    kept: int
    kept_macs: float
    drop: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it stayed within what was allowed."""
        return self.drop <= self.allowed + _ROUNDING


@dataclass(frozen=True)
class Mix:
    """What the search found.

    Attributes:
        keep_float: the layers that stay in higher precision, in the order of the graph.
        kept_macs: their share of the multiply-adds of all layers that could be quantized, 0 to 1.
        confirmed: whether it held on the second images; None where there were none.
        trials: what was tried, in order.
    """

    keep_float: tuple[str, ...]
    kept_macs: float
    confirmed: bool | None
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as report.json has them."""
        return asdict(self) | {"trials": [asdict(trial) | {"passed": trial.passed} for trial in self.trials]}


def search(exact: onnx.ModelProto, build: Build, costs: Sequence[LayerCost], budget: Budget, progress: Progress) -> Mix:
    """Find the cheapest set of layers to keep in higher precision.

    Cheapest means the fewest multiply-adds outside of the quantized layers: unlike latency they are the same on every
    run and machine. The set is the least that bisection and putting back find, not the least of all: that would take
    a trial for every subset. Where a set that passed on the first images fails on the second, the search goes on
    with more layers kept and with what it lost too much taken off the budget.

    Args:
        exact: the float graph.
        build: makes the graph with these layers kept, such as `functools.partial(quantize, exact, ranges, target)`.
        costs: from `sensitivity`.
        budget: what may be lost.
        progress: shows the trials.

    Returns:
        The layers to keep. None are kept where the graph is good enough with all layers quantized.

    Raises:
        Refused: even with every layer kept too much is lost, or only with every layer kept it is not.
    """
    trials = _Trials(exact, build, {cost.layer: cost.macs for cost in costs}, budget, progress)
    order = [cost.layer for cost in sorted(costs, key=lambda cost: -cost.noise / max(cost.macs, 1))]
    if not trials.passes("search", (), budget.max_drop) and not trials.passes("search", order, budget.max_drop):
        raise Refused(
            f"--max-drop {budget.max_drop:g} cannot be met: with all {len(order)} layers kept in higher precision "
            f"top-1 still falls by {trials.drop('search', order):.2f} points; allow more, or keep float32"
        )
    allowed, least = budget.max_drop, 0
    failed: list[frozenset[str]] = []
    while len(failed) < MOST_CONFIRMATIONS:
        kept = _cheapest(trials, order, least, allowed, failed)
        if order and len(kept) == len(order):
            break
        confirmed = trials.passes("confirm", kept, budget.max_drop) if budget.confirm is not None else None
        if confirmed is not False:
            names = tuple(cost.layer for cost in costs if cost.layer in kept)
            return Mix(names, trials.share(kept), confirmed, tuple(trials.made))
        failed.append(frozenset(kept))
        # Never by more than half: the excess is noisy itself, and 0 would ask for the float graph's very answers.
        allowed -= min(trials.drop("confirm", kept) - budget.max_drop, allowed / 2)
        prefix = 1 + max((order.index(name) for name in kept), default=-1)
        least = min(prefix + 1 + prefix // 4, len(order))
    purpose = "confirm" if failed else "search"
    tried = [trial for trial in trials.made if trial.purpose == purpose and trial.kept < len(order)]
    closest = min(tried, key=lambda trial: trial.drop)
    where = " on the images that confirm" if failed else ""
    raise Refused(
        f"no mix of quantized layers and higher precision stays within --max-drop {budget.max_drop:g}: the closest "
        f"keeps {closest.kept} of {len(order)} layers and loses {closest.drop:.2f} points{where}; allow more, or do "
        "without quantization"
    )


class _Trials:
    """Graphs that were scored, each once."""

    def __init__(
        self, exact: onnx.ModelProto, build: Build, macs: dict[str, int], budget: Budget, progress: Progress
    ) -> None:
        self.made: list[Trial] = []
        self._exact = exact
        self._build = build
        self._macs = macs
        self._scores = {"search": budget.search, "confirm": budget.confirm}
        self._progress = progress
        self._reference: dict[str, float] = {}
        self._drops: dict[tuple[str, frozenset[str]], float] = {}

    def macs(self, layer: str) -> int:
        return self._macs[layer]

    def share(self, kept: Collection[str]) -> float:
        total = sum(self._macs.values())
        return sum(self._macs[name] for name in kept) / total if total else 0.0

    def drop(self, purpose: str, kept: Collection[str]) -> float:
        """Points of accuracy lost with these layers kept."""
        key = purpose, frozenset(kept)
        score = self._scores[purpose]
        assert score is not None
        if key not in self._drops:
            with self._progress.step(f"{purpose}: {len(kept)} of {len(self._macs)} layers in higher precision"):
                if purpose not in self._reference:
                    self._reference[purpose] = score(self._exact)
                self._drops[key] = 100 * (self._reference[purpose] - score(self._build(tuple(kept))))
        return self._drops[key]

    def passes(self, purpose: str, kept: Collection[str], allowed: float) -> bool:
        """Whether these layers kept are enough; the trial is noted."""
        trial = Trial(purpose, len(kept), self.share(kept), self.drop(purpose, kept), allowed)
        if trial not in self.made:
            self.made.append(trial)
        return trial.passed


def _cheapest(
    trials: _Trials, order: Sequence[str], least: int, allowed: float, failed: Sequence[frozenset[str]]
) -> list[str]:
    """Layers to keep, from a prefix of `order` with `least` layers or more; no part of those that `failed`."""
    few, enough = least, len(order)
    if trials.passes("search", order[:least], allowed):
        enough = least
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if trials.passes("search", order[:middle], allowed) else (middle, enough)
    kept = list(order[:enough])
    for name in sorted(kept, key=trials.macs, reverse=True)[:MOST_PUT_BACK]:
        fewer = [other for other in kept if other != name]
        if any(mix.issuperset(fewer) for mix in failed):
            continue
        if trials.passes("search", fewer, allowed):
            kept = fewer
    return kept
