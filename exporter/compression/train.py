"""Fine-tuning with labels, with a teacher or with both: on a CPU or GPU, resumable, the same bits on every CPU run.

SGD with Nesterov's momentum of 0.9, and a weight decay of 5e-4 on everything but biases, batch norms and other vectors.
The learning rate warms up and then falls along half a cosine (I. Loshchilov, F. Hutter 2017, SGDR), step by step.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convoynet.exporter.archs import own
from convoynet.exporter.archs.weights import estimate_statistics, state_dict_sha256
from convoynet.exporter.compression.checkpoint import Checkpoint
from convoynet.exporter.compression.data import Batch, Order, Pixels, TrainingImages, batches, network_inputs
from convoynet.exporter.compression.history import Epoch, History
from convoynet.exporter.compression.losses import (
    AUXILIARY_WEIGHT,
    Features,
    Loss,
    labels_tensor,
    of_step,
    outputs_of,
    with_auxiliaries,
)
from convoynet.exporter.compression.teacher import Teacher
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.interrupts import interrupts_wait
from convoynet.exporter.progress import Progress, duration
from convoynet.exporter.recipe import Finetune

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
_WARM_UP = 0.05  # of all steps, and an epoch at most
# A network that was just pruned has gradients that would throw it far off; usual ones are not touched.
_LARGEST_GRADIENT = 10.0
# Axes of logits: of an image's classes, and of a map of them.
_OF_CLASSES = (2, 4)
_EVALUATION_BATCH = 128
# For batch statistics: more images change little.
_STATISTICS_IMAGES, _STATISTICS_BYTES = 1024, 2**28


@dataclass(frozen=True)
class Settings:
    """How a training is run; only `seed`, `mask`, `reestimate`, `loss` and `auxiliary_weight` change what comes out.

    Attributes:
        seed: of the order, the augmentation and dropout.
        device: "cpu" or "cuda".
        checkpoint: the file to resume from, where there is one, and to write; None for none.
        checkpoint_seconds: between two writings within an epoch; at its end and at an interruption there is one anyway.
        mask: parameter name -> bool or 0/1 of the same shape; where it is 0 the weights are and stay 0.
        reestimate: estimate batch norms' statistics on the training images first, which a changed structure needs.
        held_out: images that are never trained on, to measure agreement and accuracy on after each epoch.
        loss: instead of the one that the step asks for.
        inputs: uint8 NHWC images -> what student and teacher take.
        auxiliary_weight: of the loss of each auxiliary classifier that the student has in training.
    """

    seed: int = 0
    device: str = "cpu"
    checkpoint: Path | None = None
    checkpoint_seconds: float = 60.0
    mask: Mapping[str, Tensor] | None = None
    reestimate: bool = False
    held_out: TrainingImages | None = None
    loss: Loss | None = None
    inputs: Callable[[Pixels, Preprocess, torch.device], Tensor] = network_inputs
    auxiliary_weight: float = AUXILIARY_WEIGHT


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    data: TrainingImages,
    step: Finetune,
    settings: Settings,
    progress: Progress,
) -> History:
    """Fine-tune `student` in place; where that fails or is interrupted it stays as it was.

    Args:
        student: float32 [n, C, H, W] -> logits [n, classes] or [n, classes, h, w]; in training mode it may return those
            of auxiliary classifiers after them. It is left in evaluation mode, on its own device.
        teacher: of the same classes; needed where the step distils.
        data: labelled, or without labels for distillation alone.
        step: what to do.
        settings: how to run it.
        progress: shows each epoch, and may interrupt between steps.

    Returns:
        What happened, that of earlier runs of the same checkpoint included.

    Raises:
        BadInput: there is nothing to learn from, the loss became infinite or not a number, teacher and student do not
            fit, or the checkpoint is another training's.
        Missing: there is no such device.
        KeyboardInterrupt: from `progress` or a signal; the checkpoint is written before.
    """
    _check(student, teacher, data, step)
    device = _device(settings.device)
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        training = _Training(student, teacher, data, step, settings)
        try:
            training.begin(progress)
            training.run(progress)
        finally:
            training.close()
    _fill(student, training.student.state_dict())
    student.eval()
    return training.history


def mask_of_zeros(network: nn.Module) -> dict[str, Tensor]:
    """What keeps the zeros of a sparsified network: a mask for each weight of two or more axes that has exact zeros."""
    parameters = {name: tensor.detach() for name, tensor in network.named_parameters() if tensor.ndim > 1}
    return {name: tensor != 0 for name, tensor in parameters.items() if bool((tensor == 0).any())}


def learning_rate(step: int, total: int, per_epoch: int, largest: float) -> float:
    """The learning rate of one step, counted from 0."""
    warm = max(1, min(math.ceil(_WARM_UP * total), per_epoch))
    if step < warm:
        return largest * (step + 1) / warm
    return largest * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors by their names. Not load_state_dict: MNASNet's refuses those without the version of their format."""
    own = network.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _check(student: nn.Module, teacher: nn.Module | None, data: TrainingImages, step: Finetune) -> None:
    if step.distill and teacher is None:
        raise BadInput(
            "distill = true needs a teacher, and there is none here: use distill = false and labelled images"
        )
    if not step.distill and data.labels is None:
        raise BadInput(
            f"{data.source}: have no labels, and distill is false: use distill = true, or folders named by classes"
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise BadInput("the network has no weights that can be trained: leave the fine-tuning out")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise Missing("training on cuda needs an NVIDIA GPU that PyTorch can use: train on the cpu instead")
    return torch.device(name)


class _Training:
    """One training: copies of both networks, the optimizer, and how far it is."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: TrainingImages, step: Finetune, settings: Settings
    ) -> None:
        self.data, self.step, self.settings = data, step, settings
        self.device = torch.device(settings.device)
        self.student = copy.deepcopy(student)
        self.teacher: Teacher | None = None
        if step.distill and teacher is not None:
            self.teacher = Teacher(self._placed(copy.deepcopy(teacher).eval().requires_grad_(False)))
        self.loss = settings.loss or of_step(step)
        self.order = Order(settings.seed, step.batch, step.augment)
        self.per_epoch = self.order.steps(len(data))
        self.total = step.steps or step.epochs * self.per_epoch
        self.epochs = -(-self.total // self.per_epoch)
        self.history = History()
        self.at = 0  # steps done
        self._seconds = 0.0  # of the epoch that is under way
        self._is_whole = True  # whether no step is half done
        self._held_out_classes: Tensor | None = None
        self._features: Features | None = None
        self._checkpoint = None
        if settings.checkpoint is not None:
            self._checkpoint = Checkpoint(settings.checkpoint, self._identity())
        self._written = time.monotonic()

    def _placed(self, network: nn.Module) -> nn.Module:
        # Channels last: 1.4 times as fast for ResNet-56 on a CPU, and what tensor cores want.
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def _identity(self) -> dict[str, str]:
        settings = self.settings
        mask = {name: tensor.to(torch.uint8) for name, tensor in (settings.mask or {}).items()}
        return {
            **{name: str(value) for name, value in self.step.to_dict().items()},
            "seed": str(settings.seed),
            "the images": self.data.sha256(),
            "the weights before": state_dict_sha256(self.student.state_dict()),
            "the teacher": state_dict_sha256(self.teacher.network.state_dict()) if self.teacher else "none",
            "the mask": hashlib.sha256(repr(state_dict_sha256(mask)).encode()).hexdigest() if mask else "none",
            "re-estimation of batch norms": str(settings.reestimate),
        }

    def begin(self, progress: Progress) -> None:
        """Make everything that steps need, from the checkpoint where there is one."""
        state = self._checkpoint.read() if self._checkpoint is not None else None
        if state is None and self.settings.reestimate:
            with progress.step("re-estimate batch norms"):
                self._reestimate()
        self.student = self._placed(self.student)
        self._masks = [
            (self.student.get_parameter(name), mask.to(self.device))
            for name, mask in (self.settings.mask or {}).items()
        ]
        self._apply_masks()
        if (self.step.hints or self.step.attention) and self.teacher is not None:
            some = self._inputs(self.data.batch(np.arange(2), None))
            self._features = Features(self.step, self.student, self.teacher.network, some).to(self.device)
        self._parameters = [
            parameter
            for module in (self.student, self._features or nn.Identity())
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        groups = [
            {
                "params": [parameter for parameter in self._parameters if (parameter.ndim > 1) == decays],
                "weight_decay": by,
            }
            for decays, by in ((True, WEIGHT_DECAY), (False, 0.0))
        ]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]], self.step.lr, momentum=MOMENTUM, nesterov=True
        )
        if state is not None:
            self._restore(state)
        changes = self.order.randomness(0, 0, self.data.preprocess) is not None
        if self.teacher is not None and not changes and self._features is None and self.epochs > 1:
            self.teacher.remember(self.data, self._inputs, self.step.batch, progress)

    def run(self, progress: Progress) -> None:
        """Do what is left of the steps."""
        try:
            while len(self.history.epochs) < self.epochs:
                self._run_epoch(len(self.history.epochs), progress)
                self._finish_epoch()
                self._write()
        except KeyboardInterrupt:
            if self._is_whole:
                self._write()
            raise

    def close(self) -> None:
        """Take the hooks out."""
        if self._features is not None:
            self._features.close()

    def _run_epoch(self, epoch: int, progress: Progress) -> None:
        first = self.at - epoch * self.per_epoch
        count = min(self.per_epoch, self.total - epoch * self.per_epoch) - first
        if count <= 0:
            return
        latest = ""
        if self.history.epochs:
            last = self.history.epochs[-1]
            left = duration(last.seconds * (self.total / self.per_epoch - epoch))
            latest = f", loss {last.loss:.4g}, about {left} left for all"
        label = f"fine-tune, epoch {epoch + 1} of {self.epochs}{latest}"
        self.student.train()
        with closing(batches(self.data, self.order, epoch, first)) as made:
            began = time.perf_counter()
            for batch in progress.track(islice(made, count), label, count):
                with interrupts_wait():
                    self._is_whole = False
                    self._take_step(batch)
                    self._seconds += time.perf_counter() - began
                    self._is_whole = True
                if time.monotonic() - self._written > self.settings.checkpoint_seconds:
                    self._write()
                began = time.perf_counter()

    def _take_step(self, batch: Batch) -> None:
        rate = learning_rate(self.at, self.total, self.per_epoch, self.step.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs = self._inputs(batch.pixels)
        labels = labels_tensor(batch.labels, self.device)
        wanted = self.teacher.logits(batch.indices, inputs) if self.teacher is not None else None
        outputs = self._outputs(inputs)
        self._require_fit(outputs, wanted, labels)
        loss = with_auxiliaries(self.loss, outputs, wanted, labels, self.settings.auxiliary_weight)
        if self._features is not None:
            loss = loss + self._features()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, mask in self._masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        norm = nn.utils.clip_grad_norm_(self._parameters, _LARGEST_GRADIENT)
        value = float(loss.detach())
        if not math.isfinite(value) or not bool(torch.isfinite(norm)):
            raise BadInput(
                f"training diverged in step {self.at + 1} of {self.total}: the loss or its gradient is not finite; "
                f"use a lower lr than {self.step.lr:g}, a tenth for example (the network stays as it was before)"
            )
        self.optimizer.step()
        self._apply_masks()
        self.history.losses.append(value)
        self.at += 1

    def _outputs(self, inputs: Tensor) -> list[Tensor]:
        try:
            return outputs_of(self.student(inputs))
        except Exception as error:  # whatever the network raises
            otherwise = "in training its forward must take the images alone, and return the logits"
            raise own.failed("the network fails in training", error, otherwise) from error

    def _require_fit(self, outputs: list[Tensor], wanted: Tensor | None, labels: Tensor | None) -> None:
        shapes = [list(output.shape[1:]) for output in outputs]
        if not outputs or outputs[0].ndim not in _OF_CLASSES or any(shape != shapes[0] for shape in shapes):
            raise BadInput(
                f"in training the network returns {', '.join(map(str, shapes)) or 'no tensor'} for an image: it must "
                "return the logits, and behind them nothing but those of auxiliary classifiers, of the same shape "
                "(F.interpolate a coarser map)"
            )
        if wanted is not None and list(wanted.shape[1:]) != shapes[0]:
            raise BadInput(
                f"the teacher's outputs are {list(wanted.shape[1:])} and the network's {shapes[0]}: "
                "they must be equal; choose another teacher"
            )
        if labels is not None and outputs[0].ndim != _OF_CLASSES[0]:
            raise BadInput("class folders say nothing about a segmentation: give the images without labels")

    def _apply_masks(self) -> None:
        with torch.no_grad():
            for parameter, mask in self._masks:
                parameter.mul_(mask)

    def _finish_epoch(self) -> None:
        done = len(self.history.epochs)
        losses = self.history.losses[done * self.per_epoch :]
        rate = learning_rate(self.at - 1, self.total, self.per_epoch, self.step.lr)
        images = len(losses) * min(self.step.batch, len(self.data))
        epoch = Epoch(rate, sum(losses) / len(losses), self._seconds, images / max(self._seconds, 1e-9))
        if self.settings.held_out is not None:
            self._validate(self.settings.held_out, epoch)
        self.history.epochs.append(epoch)
        self._seconds = 0.0

    def _validate(self, held_out: TrainingImages, epoch: Epoch) -> None:
        """Measure agreement with the teacher and accuracy."""
        found = self._classes(self.student.eval(), held_out)
        if self.teacher is not None:
            if self._held_out_classes is None:
                self._held_out_classes = self._classes(self.teacher.network, held_out)
            epoch.agreement = float((found == self._held_out_classes).double().mean())
        if held_out.labels is not None:
            epoch.accuracy = float((found == torch.from_numpy(held_out.labels)).double().mean())

    def _classes(self, network: nn.Module, images: TrainingImages) -> Tensor:
        parts = []
        for start in range(0, len(images), _EVALUATION_BATCH):
            chosen = np.arange(start, min(start + _EVALUATION_BATCH, len(images)))
            with torch.no_grad():
                made = network(self._inputs(images.batch(chosen, None)))
            parts.append(outputs_of(made)[0].argmax(dim=1).cpu())
        return torch.cat(parts)

    def _inputs(self, pixels: Pixels) -> Tensor:
        return self.settings.inputs(pixels, self.data.preprocess, self.device)

    def _reestimate(self) -> None:
        height, width = self.data.preprocess.size
        fitting = _STATISTICS_BYTES // (4 * height * width * self.data.preprocess.channels)
        pixels = self.data.batch(self.data.evenly(max(2, min(_STATISTICS_IMAGES, fitting))), None)
        estimate_statistics(self.student, self.data.preprocess.normalize(pixels), self.step.batch)

    def _write(self) -> None:
        if self._checkpoint is None:
            return
        self._checkpoint.write(
            {
                "student": self.student.state_dict(),
                "features": self._features.state_dict() if self._features is not None else {},
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                "history": self.history.to_dict(),
                "seconds": self._seconds,
                "at": self.at,
            }
        )
        self._written = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        _fill(self.student, state["student"])
        if self._features is not None:
            self._features.load_state_dict(state["features"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.history = History.from_dict(state["history"])
        self._seconds, self.at = state["seconds"], state["at"]
        if self.at < self.total:
            self.history.resumed_at.append(self.at)
