"""What two models can stand: pictures as the world spoils them, and as an adversary does.

The adversary is projected gradient descent (A. Madry and others 2018, "Towards deep learning models resistant to
adversarial attacks", ICLR) with the gradient of the attacked model itself, which in one that is quantized goes straight
through the rounding. Noise of the same size beside it says what of the loss is the size, and what the aim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from convoynet.exporter.auditing.corruptions import KINDS, SEVERITIES, constants_for, corrupted
from convoynet.exporter.auditing.gradients import of_pixels, whole
from convoynet.exporter.auditing.subjects import Subject
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence.accuracy import Interval, paired_interval
from convoynet.exporter.progress import Progress

STEPS = 10
MOST_ATTACKED = 100
_SEED = 0
# Steps of PGD go this much further together than the size of the attack (Madry and others).
_REACH = 2.5
_LEVELS = 255

Pixels = NDArray[np.uint8]
Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Stress:
    """How hard the models are tried.

    Attributes:
        images: how many pictures are spoilt; 0 for none.
        severity: of the corruptions, 1 to 5.
        size: of an attack, in levels of a pixel's 255; 0 for none.
    """

    images: int = 0
    severity: int = 3
    size: int = 1

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--robustness", self.images, range(10**6)),
            ("--severity", self.severity, SEVERITIES),
            ("--attack", self.size, range(_LEVELS + 1)),
        ):
            if value not in allowed:
                raise BadInput(f"{flag} {value} is not in {allowed[0]}..{allowed[-1]}")


@dataclass(frozen=True)
class Row:
    """Accuracy of both models on the same spoilt pictures, and how often they agree.

    Attributes:
        kind: what was done to the pictures.
        images: how many.
        before, after: shares of right answers of the reference and of the model.
        agreement: on how many both say the same.
        drop_interval: where before - after lies, 95 %.
    """

    kind: str
    images: int
    before: float
    after: float
    agreement: float
    drop_interval: Interval


@dataclass(frozen=True)
class Robustness:
    """What was found: the pictures as they are, each corruption, and the attacks where there was a gradient."""

    severity: int
    constants: str
    rows: list[Row]
    attacks: list[Row]
    size: int

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "severity": self.severity,
            "constants": self.constants,
            "corruptions": [asdict(row) for row in self.rows],
            "attack": {"size": self.size, "steps": STEPS, "rows": [asdict(row) for row in self.attacks]},
        }


def robustness(
    subjects: tuple[Subject, Subject], images: Pixels, labels: Classes, asked: tuple[Stress, int], progress: Progress
) -> Robustness:
    """Try both models.

    Args:
        subjects: the reference and the model.
        images: uint8 NHWC, in the order of channels that the models take.
        labels: the class of each.
        asked: how hard, and the CPU threads of one call.
        progress: shows it.

    Raises:
        BadInput: one of the models does not run.
    """
    stress, threads = asked
    trial = _Trial(subjects, tuple(subject.session(threads) for subject in subjects))
    backwards = subjects[0].preprocess.order == "bgr"
    plain = images[..., ::-1] if backwards else images
    rows = [trial.row("none", images, labels)]
    rng = np.random.default_rng(_SEED)
    for kind in progress.track(KINDS, f"corruptions of {len(images)} images", len(KINDS)):
        spoilt = corrupted(plain, kind, stress.severity, rng)
        rows.append(trial.row(kind, np.ascontiguousarray(spoilt[..., ::-1]) if backwards else spoilt, labels))
    return Robustness(stress.severity, constants_for(images.shape[1:3])[0], rows, [], stress.size)


def attacks(
    subjects: tuple[Subject, Subject], images: Pixels, labels: Classes, asked: tuple[Stress, int], progress: Progress
) -> list[Row]:
    """Noise of the size of an attack, an attack on each model by its own gradient, and that on the reference on both.

    Raises:
        BadInput: one of the models has no gradient here.
    """
    stress, threads = asked
    modules = [whole(subject) for subject in subjects]
    trial = _Trial(subjects, tuple(subject.session(threads) for subject in subjects))
    signs = np.random.default_rng(_SEED).choice(np.array([-1, 1], np.int16), images.shape)
    noisy = np.clip(images + stress.size * signs, 0, _LEVELS).astype(np.uint8)
    made = []
    for subject, module in progress.track(list(zip(subjects, modules, strict=True)), "attacks", 2):
        found = [
            attack(subject, module, images[at : at + subject.batch], labels[at : at + subject.batch], stress.size)
            for at in range(0, len(images), subject.batch)
        ]
        made.append(np.concatenate(found))
    return [
        trial.row("none", images, labels),
        trial.row("noise", noisy, labels),
        trial.row("own attack", made, labels),
        trial.row("attack on the reference", made[0], labels),
    ]


def attack(subject: Subject, module: Any, images: Pixels, labels: Classes, size: int, steps: int = STEPS) -> Pixels:
    """Change pixels by at most `size` levels so that a model is wrong, as far as its gradient knows how."""
    start = torch.from_numpy(images.astype(np.float32))
    low, high = (start - size).clamp(min=0), (start + size).clamp(max=_LEVELS)
    right = torch.tensor(labels)
    noise = torch.rand(start.shape, generator=torch.Generator().manual_seed(_SEED))
    pixels = torch.clamp(start + size * (2 * noise - 1), low, high)
    for _ in range(steps):
        pixels.requires_grad_()
        loss = functional.cross_entropy(of_pixels(subject, module, pixels), right, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
        pixels = torch.clamp(pixels.detach() + _REACH * size / steps * gradient.sign(), low, high)
    # Whole levels, which are what a camera or a file can have: rounded, it stays within the size.
    return pixels.round().byte().numpy()


@dataclass(frozen=True)
class _Trial:
    """Both models in ONNX Runtime, as they are served."""

    subjects: tuple[Subject, Subject]
    sessions: Sequence[Any]

    def row(self, kind: str, images: Pixels | Sequence[Pixels], labels: Classes) -> Row:
        """What both answer for the same pictures, or each for its own."""
        both = images if isinstance(images, list) else [images, images]
        before, after = (
            subject.logits(session, own).argmax(axis=1)
            for subject, session, own in zip(self.subjects, self.sessions, both, strict=True)
        )
        was, now, count = before == labels, after == labels, len(labels)
        lost, gained = int((was & ~now).sum()), int((now & ~was).sum())
        return Row(
            kind,
            count,
            float(was.mean()),
            float(now.mean()),
            float((before == after).mean()),
            paired_interval(lost, gained, count),
        )
