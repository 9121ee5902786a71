"""Networks and what was made of them, side by side: figures, which of them are worth having, and a plot."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convoynet.exporter.errors import BadInput
from convoynet.exporter.studies.changes import Changes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOMINATED, _FRONT = "0.65", "#2a6fbb"
# How far above its point (in 1/72 inch) a name may stand, and which side of it is at the point; best first.
_PLACES = tuple((up, side) for up in (0, 12, -12, 24, -24, 36, -36) for side in ("left", "right"))


@dataclass(frozen=True)
class Variant:
    """One network, or one model that was exported from it.

    Attributes:
        name: of the network or the model.
        precision: of its numbers: fp32, int8 and so on.
        parameters: their number.
        macs: multiply-adds of an image.
        bytes: of the file.
        milliseconds: of one image, at batch 1.
        images_per_second: at `batch`.
        batch: the larger one of those that were timed.
        top1: share (0 to 1) of images whose class is right; None where it was not measured.
        agreement: share of images on which it says what the network says that it was made of; None where that was
            not measured.
        interval: where `top1`, or without it `agreement`, lies on more such images in 95 of 100 cases; None where that
            is not known.
        doubt: why milliseconds and images_per_second are not to be believed, and withheld; "" where they are.
        group: the same number for those that answer the same, which alone can be better or worse.
        changes: what became of single answers, classes and the evidence; None where that was not measured.
    """

    name: str
    precision: str
    parameters: int
    macs: int
    bytes: int
    milliseconds: float
    images_per_second: float
    batch: int
    top1: float | None = None
    agreement: float | None = None
    doubt: str = ""
    group: int = 0
    interval: tuple[float, float] | None = None
    changes: Changes | None = None

    @property
    def drift(self) -> float | None:
        """How far the evidence moved; None where that is not known."""
        return None if self.changes is None else self.changes.drift

    def to_json(self) -> dict[str, Any]:
        """All of it for programs, without what is withheld."""
        return asdict(self) | (dict.fromkeys(("milliseconds", "images_per_second")) if self.doubt else {})


def _judged(variants: Sequence[Variant]) -> str:
    """By what they are judged beside speed and size: the field that all of them have, or ""."""
    found = (field for field in ("top1", "agreement") if all(getattr(one, field) is not None for one in variants))
    return next(found, "")


def _drifts(variants: Sequence[Variant]) -> bool:
    """Whether the drift of the evidence counts: all of them have one."""
    return all(variant.drift is not None for variant in variants)


def dominated(variants: Sequence[Variant]) -> dict[str, str]:
    """Name each variant that another of its group beats: no worse in what counts, and better in something.

    Bytes always count, milliseconds where all of theirs are to be believed, accuracy where all variants have one, else
    their agreement with the network, and the drift of the evidence where all of them have one.

    Returns:
        Name -> the first that beats it.
    """
    timed = not any(variant.doubt for variant in variants)
    judged, drifts = _judged(variants), _drifts(variants)

    def costs(variant: Variant) -> tuple[float, ...]:
        accuracy = (-getattr(variant, judged),) if judged else ()
        moved = (variant.drift,) if drifts and variant.drift is not None else ()
        return (*((variant.milliseconds,) if timed else ()), variant.bytes, *accuracy, *moved)

    beaten = {}
    for variant in variants:
        for other in variants:
            pairs = list(zip(costs(other), costs(variant), strict=True))
            if other.group != variant.group:
                continue
            if all(left <= right for left, right in pairs) and any(left < right for left, right in pairs):
                beaten[variant.name] = other.name
                break
    return beaten


def counted(variants: Sequence[Variant]) -> str:
    """In what a variant that beats another is no worse."""
    named = {"top1": ["accuracy"], "agreement": ["agreement"], "": []}[_judged(variants)]
    costs = [*([] if any(variant.doubt for variant in variants) else ["time"]), "size", *named]
    costs += ["evidence"] if _drifts(variants) else []
    listed = " and ".join(filter(None, (", ".join(costs[:-1]), costs[-1])))
    return listed if named else f"{listed} (accuracy is not compared)"


def require_kind(path: Path) -> None:
    """See that a plot can be drawn into a file of this name.

    Raises:
        BadInput: there is no such kind of image; the message names those that there are.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise BadInput(f"--plot {path}: end its name in one of .{', .'.join(sorted(kinds))}")


def plot(variants: Sequence[Variant], path: Path) -> None:
    """Draw accuracy, or agreement, or where there is none size over latency; the area of a point is the file's size."""
    from matplotlib.figure import Figure

    beaten = dominated(variants)
    judged = _judged(variants)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    largest = max(variant.bytes for variant in variants)

    def height(variant: Variant) -> float:
        return float(100 * getattr(variant, judged)) if judged else variant.bytes / 1e6

    for variant in variants:
        color = _DOMINATED if variant.name in beaten else _FRONT
        area = _area(variant, largest)
        axes.scatter(variant.milliseconds, height(variant), s=area, color=color, alpha=0.6, linewidths=0)
        if judged and variant.interval is not None:
            ends = [[abs(100 * end - height(variant))] for end in variant.interval]
            axes.errorbar(variant.milliseconds, height(variant), ends, ecolor=color, elinewidth=0.8, capsize=2)
    front = sorted((variant for variant in variants if variant.name not in beaten), key=lambda one: one.milliseconds)
    axes.plot([one.milliseconds for one in front], [height(one) for one in front], color=_FRONT, linewidth=1, alpha=0.4)
    axes.set_xlabel("milliseconds of one image")
    axes.set_ylabel({"top1": "top-1, %", "agreement": "agreement with the network, %", "": "MB of the file"}[judged])
    told = "Area: size of the file. Grey: another one is no worse in anything"
    if any(variant.doubt for variant in variants):
        told = "Measured beside other work: the milliseconds are not to be believed"
    axes.set_title(told, fontsize=10)
    axes.margins(0.15)
    points = [
        (
            one.name,
            one.milliseconds,
            height(one),
            math.sqrt(_area(one, largest)) / 2,
            "0.4" if one.name in beaten else "0",
        )
        for one in variants
    ]
    _name_points(figure, axes, points)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _area(variant: Variant, largest: int) -> float:
    """Of a point, in square points (1/72 inch)."""
    return 30 + 500 * variant.bytes / largest


def _name_points(figure: "Figure", axes: "Axes", points: Sequence[tuple[str, float, float, float, str]]) -> None:
    """Write names beside points, each in the first place where it covers no other name and no point.

    A point has its name, its place, its radius in 1/72 inch, and the colour of the name.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    room, pixels = axes.get_window_extent(), figure.dpi / 72
    covered = []
    for _, x, y, radius, _ in points:
        (left, low), reach = axes.transData.transform((x, y)), radius * pixels
        covered.append(Bbox.from_extents(left - reach, low - reach, left + reach, low + reach))
    for name, x, y, radius, color in points:
        for place in _PLACES:
            up, side = place
            across = radius + 3 if side == "left" else -radius - 3
            note = axes.annotate(
                name, (x, y), (across, up), textcoords="offset points", ha=side, va="center", fontsize=8, color=color
            )
            box = note.get_window_extent()
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if (inside and not any(box.overlaps(other) for other in covered)) or place == _PLACES[-1]:
                covered.append(box)
                break
            note.remove()


def columns(variant: Variant, first: Variant) -> dict[str, str]:
    """A row of the table for people, with ratios to the first variant."""
    accuracy = "" if variant.top1 is None else f"{variant.top1:.2%}"
    if variant.top1 is not None and first.top1 is not None and variant is not first:
        accuracy += f" ({100 * (variant.top1 - first.top1):+.2f})"
    times = {"ms": "withheld", "images/s": "withheld"}
    if not variant.doubt:
        times = {"ms": f"{variant.milliseconds:.2f}", "images/s": f"{variant.images_per_second:.0f}"}
    ratio = "" if variant.doubt or first.doubt else f"{variant.images_per_second / first.images_per_second:.2f}x"
    return {
        "name": variant.name,
        "precision": variant.precision,
        "M params": f"{variant.parameters / 1e6:.2f}",
        "G MACs": f"{variant.macs / 1e9:.{'3f' if variant.macs >= 1e6 else '2g'}}",
        "MB": f"{variant.bytes / 1e6:.2f}",
        **times,
        "speed": ratio,
        "top-1": accuracy,
        "agreement": "" if variant.agreement is None else f"{variant.agreement:.2%}",
        "95 % interval": interval(variant.interval),
        **_changed(variant.changes),
    }


def _changed(changes: Changes | None) -> dict[str, str]:
    if changes is None:
        return dict.fromkeys(("flips", "worst class", "ECE", "drift"), "")
    return {
        "flips": f"{changes.flips:.2%}",
        "worst class": f"{-100 * changes.class_drop:+.1f} {changes.worst_class}" if changes.class_drop > 0 else "none",
        "ECE": f"{changes.calibration_error:.3f}",
        "drift": "" if changes.drift is None else f"{changes.drift:.4f}",
    }


def interval(ends: Sequence[float] | None) -> str:
    """Where a share lies, for people."""
    return "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def doubts(variants: Sequence[Variant]) -> list[str]:
    """A line for each reason to withhold speeds."""
    names: dict[str, list[str]] = {}
    for variant in variants:
        if variant.doubt:
            names.setdefault(variant.doubt, []).append(variant.name)
    return [f"{', '.join(of)}: speed is withheld: {reason}" for reason, of in names.items()]
