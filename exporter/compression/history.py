"""What a training went through, for the report: numbers, and a plot of the curve."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_INCHES, _DPI = (6.4, 4.0), 120
# The curve is drawn through averages of so many steps that about this many points are left.
_POINTS = 200


@dataclass
class Epoch:
    """One pass over the images.

    Attributes:
        lr: the learning rate of its last step.
        loss: the average over its steps.
        seconds: that its steps took; validation is not in it.
        images_per_second: of training.
        agreement: share (0 to 1) of the held-out images of which the teacher says the same class, where measured.
        accuracy: share of the held-out images whose class is right, where they have labels.
    """

    lr: float
    loss: float
    seconds: float
    images_per_second: float
    agreement: float | None = None
    accuracy: float | None = None


@dataclass
class History:
    """The loss of every step, and a summary of every epoch; `resumed_at` are the steps before which it was resumed."""

    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_dict(stated: dict[str, Any]) -> "History":
        """The inverse of `to_dict`."""
        epochs = [Epoch(**epoch) for epoch in stated["epochs"]]
        return History(list(stated["losses"]), epochs, list(stated["resumed_at"]))


def plot(history: History, path: Path) -> None:
    """Draw the loss over the steps and, where it was measured, the agreement or accuracy over the epochs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    width = max(1, len(history.losses) // _POINTS)
    count = len(history.losses) // width
    losses = np.array(history.losses[: count * width]).reshape(count, width).mean(axis=1)
    axes.plot((np.arange(count) + 1) * width, losses, color="C0", linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color="C0")
    axes.grid(alpha=0.3)
    steps = len(history.losses) / max(1, len(history.epochs))
    measured = [
        ("accuracy on held-out images", [epoch.accuracy for epoch in history.epochs], "C1"),
        ("agreement with the teacher", [epoch.agreement for epoch in history.epochs], "C2"),
    ]
    if any(value is not None for _, values, _ in measured for value in values):
        beside = axes.twinx()
        for name, values, color in measured:
            points = [((index + 1) * steps, 100 * value) for index, value in enumerate(values) if value is not None]
            if points:
                beside.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=1.2, label=name)
        beside.set_ylabel("held-out images, %")
        figure.legend(loc="outside upper center", ncols=2, fontsize="small")  # it covers no point there
    figure.savefig(path)
