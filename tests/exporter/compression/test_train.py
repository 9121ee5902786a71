import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs.weights import estimate_statistics
from convoynet.exporter.compression import history as history_module
from convoynet.exporter.compression.history import History
from convoynet.exporter.compression.losses import Attention, Hints, distillation, relative_error
from convoynet.exporter.compression.teacher import teacher_from
from convoynet.exporter.compression.train import Settings, learning_rate, mask_of_zeros, train
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Finetune
from tests.exporter.training_nets import (
    PREPROCESS,
    TinyNet,
    largest_difference,
    striped,
    tiny_net,
    training_images,
)

T = TypeVar("T")
DATA = training_images(96)
HELD_OUT = training_images(64, seed=1)
LABELS_ALONE = Finetune(epochs=4, batch=16, lr=0.1, distill=False)


class StopsAfter(Quiet):
    """Interrupts before one of the steps, as a user does."""

    def __init__(self, steps: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._left = steps
        self._error = error

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for item in items:
            if label.startswith("fine-tune"):
                if not self._left:
                    raise self._error
                self._left -= 1
            yield item


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    network = tiny_net(1, width=12)
    train(network, None, training_images(192), replace(LABELS_ALONE, epochs=8), Settings(held_out=HELD_OUT), Quiet())
    return network


def test_labels_are_learnt() -> None:
    network = tiny_net(0)
    history = train(network, None, DATA, LABELS_ALONE, Settings(held_out=HELD_OUT), Quiet())
    assert len(history.losses) == 24
    assert np.mean(history.losses[-6:]) < 0.5 * np.mean(history.losses[:6])
    accuracies = [epoch.accuracy for epoch in history.epochs]
    assert accuracies[-1] is not None
    assert accuracies[-1] > 0.8
    assert history.epochs[0].agreement is None
    assert not network.training
    assert all(epoch.images_per_second > 0 for epoch in history.epochs)


def test_a_teacher_is_enough(teacher: nn.Module) -> None:
    images = training_images(96, labelled=False)
    network = tiny_net(5)
    step = Finetune(epochs=6, batch=16, lr=0.1)
    history = train(network, teacher, images, step, Settings(held_out=HELD_OUT), Quiet())
    agreements = [epoch.agreement for epoch in history.epochs]
    assert agreements[-1] is not None
    assert agreements[0] is not None
    assert agreements[-1] > max(0.8, agreements[0])
    assert np.mean(history.losses[-6:]) < 0.3 * np.mean(history.losses[:6])


def test_recovery_of_batch_norms_alone(teacher: nn.Module) -> None:
    """Re-estimated statistics and a few small steps without labels bring back what wrong statistics destroyed."""
    broken = tiny_net(1, width=12)
    broken.load_state_dict(teacher.state_dict())
    for module in broken.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 3.0)  # type: ignore[arg-type]
    step = Finetune(steps=2, batch=32, lr=1e-5, augment=False)
    images = training_images(64, labelled=False)
    without = train(tiny_copy(broken), teacher, images, step, Settings(held_out=HELD_OUT), Quiet())
    recovered = train(broken, teacher, images, step, Settings(held_out=HELD_OUT, reestimate=True), Quiet())
    assert recovered.epochs[-1].agreement == pytest.approx(1.0, abs=0.05)
    assert without.epochs[-1].agreement < 0.8  # type: ignore[operator]


def tiny_copy(network: TinyNet) -> TinyNet:
    copied = tiny_net(0, width=network.first[0].out_channels)
    copied.load_state_dict(network.state_dict())
    return copied


@pytest.mark.parametrize("stopped_at", [1, 6, 9])
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(
    teacher: nn.Module, tmp_path: Path, stopped_at: int
) -> None:
    step = Finetune(epochs=3, batch=16, lr=0.05, hints=True)
    settings = Settings(seed=7, held_out=HELD_OUT, checkpoint=tmp_path / "training.pt", reestimate=True)
    straight, resumed = tiny_net(3), tiny_net(3)
    expected = train(straight, teacher, DATA, step, replace(settings, checkpoint=None), Quiet())
    with pytest.raises(KeyboardInterrupt):
        train(resumed, teacher, DATA, step, settings, StopsAfter(stopped_at))
    assert largest_difference(resumed, tiny_net(3)) == 0, "an interrupted training leaves the network as it was"
    found = train(resumed, teacher, DATA, step, settings, Quiet())
    assert largest_difference(straight, resumed) == 0
    assert found.losses == expected.losses
    assert found.resumed_at == [stopped_at]
    assert [epoch.agreement for epoch in found.epochs] == [epoch.agreement for epoch in expected.epochs]


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    settings = Settings(checkpoint=tmp_path / "training.pt")
    first, second = tiny_net(0), tiny_net(0)
    done = train(first, None, DATA, LABELS_ALONE, settings, Quiet())
    again = train(second, None, DATA, LABELS_ALONE, settings, StopsAfter(0))
    assert largest_difference(first, second) == 0
    assert again.to_dict() == done.to_dict()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_signal_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    """Whenever it comes, the checkpoint is that of whole steps and the training can go on from it."""
    settings = Settings(checkpoint=tmp_path / "training.pt")
    network, straight = tiny_net(0), tiny_net(0)
    sent = []

    def strike(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        sent.append(len(sent))
        if len(sent) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    struck = tiny_net(0)
    struck.head.register_forward_pre_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        train(struck, None, DATA, LABELS_ALONE, settings, Quiet())
    assert len(sent) == 8
    found = train(network, None, DATA, LABELS_ALONE, settings, Quiet())
    assert found.resumed_at == [8]
    train(straight, None, DATA, LABELS_ALONE, Settings(), Quiet())
    assert largest_difference(network, straight) == 0


def test_checkpoints_are_written_by_time_too(tmp_path: Path) -> None:
    settings = Settings(checkpoint=tmp_path / "training.pt", checkpoint_seconds=0)
    network = tiny_net(0)
    # Not an interruption but a crash: nothing is written on the way out.
    with pytest.raises(MemoryError):
        train(network, None, DATA, LABELS_ALONE, settings, StopsAfter(4, MemoryError))
    assert train(network, None, DATA, LABELS_ALONE, settings, Quiet()).resumed_at == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"step": replace(LABELS_ALONE, lr=0.2)}, r"lr \(0\.1 there, 0\.2 here\)"),
        ({"seed": 9}, r"seed \(0 there, 9 here\)"),
        ({"data": training_images(96, seed=4)}, "the images"),
        ({"network": tiny_net(1)}, "the weights before"),
        ({"network": tiny_net(0, width=10)}, "the weights before"),
    ],
    ids=["recipe", "seed", "images", "weights", "shape"],
)
def test_the_checkpoint_of_another_training(tmp_path: Path, changed: dict[str, object], named: str) -> None:
    file = tmp_path / "training.pt"
    train(tiny_net(0), None, DATA, LABELS_ALONE, Settings(checkpoint=file), Quiet())
    before = file.read_bytes()
    given = {"network": tiny_net(0), "data": DATA, "step": LABELS_ALONE, "seed": 0} | changed
    settings = Settings(checkpoint=file, seed=given["seed"])
    with pytest.raises(BadInput, match=rf"another training's: it differs in {named}.*move it away"):
        train(given["network"], None, given["data"], given["step"], settings, Quiet())
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"text"])
def test_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "training.pt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match="damaged"):
        train(tiny_net(0), None, DATA, LABELS_ALONE, Settings(checkpoint=file), Quiet())


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "training.pt")
    with pytest.raises(BadInput, match="is no checkpoint of a training"):
        train(tiny_net(0), None, DATA, LABELS_ALONE, Settings(checkpoint=tmp_path / "training.pt"), Quiet())
    with pytest.raises(BadInput, match="cannot be written"):
        train(tiny_net(0), None, DATA, LABELS_ALONE, Settings(checkpoint=tmp_path / "none" / "x.pt"), Quiet())


def test_divergence_is_one_line_and_leaves_the_network_alone(tmp_path: Path) -> None:
    network = tiny_net(0)
    settings = Settings(checkpoint=tmp_path / "training.pt", checkpoint_seconds=0)
    calls = []

    def overflow(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        calls.append(1)
        return made * math.nan if len(calls) == 5 else made

    network.head.register_forward_hook(overflow)
    with pytest.raises(BadInput, match=r"diverged in step 5 of 24.*lower lr than 0\.1") as caught:
        train(network, None, DATA, LABELS_ALONE, settings, Quiet())
    assert "\n" not in str(caught.value)
    assert largest_difference(network, tiny_net(0)) == 0
    # The last good checkpoint, of step 4, is still there and good: the hook strikes only once.
    assert train(network, None, DATA, LABELS_ALONE, settings, Quiet()).resumed_at == [4]


def test_weights_that_are_masked_stay_zero() -> None:
    network = tiny_net(0)
    with torch.no_grad():
        weight = network.second[0].weight
        weight[weight.abs() < weight.abs().median()] = 0
    mask = mask_of_zeros(network)
    assert list(mask) == ["second.0.weight"]
    before = tiny_net(0).second[0].weight
    train(network, None, DATA, LABELS_ALONE, Settings(mask=mask), Quiet())
    zero = ~mask["second.0.weight"]
    assert int(zero.sum()) == weight.numel() // 2 - 1
    assert (network.second[0].weight[zero] == 0).all()
    assert (network.second[0].weight[~zero] != before[~zero]).all()


def test_hints_bring_the_features_nearer(teacher: nn.Module) -> None:
    """A student of another width learns the teacher's features, and is left without the translation and the hooks."""
    images = training_images(96, labelled=False)
    inputs = torch.from_numpy(PREPROCESS.normalize(striped(32, 3)[0]))
    nearness = {}
    for hints in (False, True):
        student = tiny_net(2)
        train(student, teacher, images, Finetune(epochs=6, batch=16, lr=0.1, hints=hints), Settings(), Quiet())
        assert not any(module._forward_hooks for module in student.modules())
        assert set(student.state_dict()) == set(tiny_net(2).state_dict())
        with torch.no_grad():
            ours, theirs = student.second(student.first(inputs)), teacher.second(teacher.first(inputs))  # type: ignore[operator]
        nearness[hints] = float(relative_error(ours, theirs))
    assert nearness[True] < 0.5 * nearness[False]


def test_features_of_networks_with_other_maps_are_averaged(teacher: nn.Module) -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Conv2d(3, 5, 5, stride=4)
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.trunk(x).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    student, inputs = Coarse(), torch.rand(6, 3, 16, 16)
    hints = Hints(student, teacher, inputs[:2])
    assert not hints.is_map
    assert hints.regressor.weight.shape == (16, 5, 1, 1)
    student(inputs)
    teacher(inputs)
    hints().backward()
    assert student.trunk.weight.grad is not None
    hints.close()
    history = train(student, teacher, DATA, Finetune(epochs=2, batch=32, hints=True), Settings(), Quiet())
    assert len(history.losses) == 6


def test_attention_brings_the_student_to_look_where_the_teacher_does(teacher: nn.Module) -> None:
    """Whatever number of channels it has; the hooks are out afterwards."""
    images = training_images(96, labelled=False)
    inputs = torch.from_numpy(PREPROCESS.normalize(striped(32, 3)[0]))
    apart = {}
    for attention in (False, True):
        student = tiny_net(2)
        step = Finetune(epochs=6, batch=16, lr=0.05, attention=attention)
        train(student, teacher, images, step, Settings(), Quiet())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
        looks = Attention(student, teacher, inputs[:2])
        with torch.no_grad():
            student(inputs)
            teacher(inputs)
            apart[attention] = float(looks())
        looks.close()
    assert apart[True] < 0.7 * apart[False]


def test_attention_is_the_squared_channels_at_each_size_of_maps() -> None:
    class Two(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.large = nn.Conv2d(3, channels, 3, padding=1)
            self.small = nn.Conv2d(channels, channels, 2, stride=2)
            self.head = nn.Linear(channels, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.small(self.large(x)).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    student, teacher, inputs = Two(2), Two(5), torch.randn(6, 3, 8, 8)
    looks = Attention(student, teacher, inputs[:2])
    student(inputs)
    teacher(inputs)
    wanted = 0.0
    for depth in (1, 2):
        maps = []
        for net in (student, teacher):
            made = net.large(inputs) if depth == 1 else net.small(net.large(inputs))
            energy = (made**2).sum(1).reshape(6, -1)
            maps.append(energy / energy.norm(dim=1, keepdim=True))
        wanted += 500 * float(((maps[0] - maps[1]) ** 2).mean().detach())
    found = looks()
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    found.backward()
    assert student.large.weight.grad is not None
    assert teacher.large.weight.grad is None
    looks.close()
    with pytest.raises(BadInput, match="attention = false"):
        Attention(student, nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(27, 4)), inputs)


def test_networks_without_layers_have_no_hints(teacher: nn.Module) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ self.weight

    with pytest.raises(BadInput, match="hints = false"):
        train(Flat(), teacher, DATA, Finetune(epochs=1, hints=True), Settings(), Quiet())
    with pytest.raises(BadInput, match="attention = false"):
        train(Flat(), teacher, DATA, Finetune(epochs=1, attention=True), Settings(), Quiet())


def test_auxiliary_classifiers_learn_too(teacher: nn.Module) -> None:
    network = tiny_net(0, auxiliary=True)
    before = tiny_net(0, auxiliary=True)
    train(network, teacher, DATA, Finetune(epochs=1, batch=16, lr=0.1), Settings(), Quiet())
    assert network.auxiliary is not None
    assert before.auxiliary is not None
    assert not torch.equal(network.auxiliary.weight, before.auxiliary.weight)
    assert not torch.equal(network.head.weight, before.head.weight)


class Dense(nn.Module):
    """Logits for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(x))
        return logits


class Odd(nn.Module):
    """Fails in training, or returns something else there than in evaluation."""

    def __init__(self, way: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.way = TinyNet(), way

    def forward(self, x: Tensor) -> Any:
        y = self.network(x)
        return self.way(y) if self.training else y


def fail(_: Tensor) -> Any:
    raise ValueError("targets are needed")


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (fail, "the network fails in training: ValueError: targets are needed; in training its forward must take"),
        (lambda y: {"loss": y.mean()}, r"in training the network returns \[\] for an image: it must return the logits"),
        (
            lambda y: (y, y[:, :1]),
            "it must return the logits, and behind them nothing but those of auxiliary classifiers",
        ),
        (lambda y: {}, "in training the network returns no tensor"),
    ],
)
def test_what_a_network_does_in_training_alone_is_told_in_a_line(way: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        train(Odd(way), None, DATA, LABELS_ALONE, Settings(), Quiet())
    assert "\n" not in str(refused.value)


def test_segmentation_is_distilled_place_by_place() -> None:
    torch.manual_seed(0)
    master, student = Dense(), Dense()
    estimate_statistics(master, PREPROCESS.normalize(striped(32)[0]))
    held_out = training_images(32, seed=2, labelled=False)
    step = Finetune(epochs=8, batch=16, lr=0.2, hints=True)
    history = train(student, master, training_images(96, labelled=False), step, Settings(held_out=held_out), Quiet())
    agreements = [epoch.agreement for epoch in history.epochs]
    assert agreements[-1] > agreements[0]  # type: ignore[operator]
    assert agreements[-1] > 0.65  # type: ignore[operator]
    assert np.mean(history.losses[-6:]) < 0.5 * np.mean(history.losses[:6])
    with pytest.raises(BadInput, match="class folders say nothing about a segmentation"):
        train(student, master, DATA, step, Settings(), Quiet())


def test_distillation_is_hintons() -> None:
    """At a high temperature the gradient is that of half the mean squared difference of centred logits (eq. 4)."""
    torch.manual_seed(0)
    student, wanted = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5)
    (gradient,) = torch.autograd.grad(distillation(student, wanted, 1000.0), student)
    centred = [logits - logits.mean(1, keepdim=True) for logits in (student, wanted)]
    expected = (centred[0] - centred[1]) / (5 * 7)
    assert torch.allclose(gradient, expected, atol=1e-3, rtol=0)
    assert float(distillation(wanted, wanted, 4.0)) == pytest.approx(0, abs=1e-6)


def test_nothing_to_learn_from(teacher: nn.Module) -> None:
    unlabelled = training_images(32, labelled=False)
    with pytest.raises(BadInput, match="have no labels, and distill is false"):
        train(tiny_net(0), teacher, unlabelled, LABELS_ALONE, Settings(), Quiet())
    with pytest.raises(BadInput, match="distill = true needs a teacher"):
        train(tiny_net(0), None, DATA, Finetune(), Settings(), Quiet())
    with pytest.raises(BadInput, match="no weights that can be trained"):
        train(nn.Flatten(), None, DATA, LABELS_ALONE, Settings(), Quiet())
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
    with pytest.raises(BadInput, match=r"teacher's outputs are \[7\] and the network's \[4\]"):
        train(tiny_net(0), other, DATA, Finetune(), Settings(), Quiet())


def test_the_callers_randomness_is_left_alone() -> None:
    network = tiny_net(0)
    before = torch.get_rng_state()
    train(network, None, DATA, replace(LABELS_ALONE, steps=2), Settings(seed=1), Quiet())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 100, 20, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.1)
    assert int(np.argmax(rates)) <= 5
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 1e-4
    assert learning_rate(0, 1, 1, 0.1) == 0.1


def test_steps_instead_of_epochs() -> None:
    history = train(tiny_net(0), None, DATA, replace(LABELS_ALONE, steps=8), Settings(), Quiet())
    assert len(history.losses) == 8
    assert len(history.epochs) == 2


def test_a_history_is_json_and_a_plot(teacher: nn.Module, tmp_path: Path) -> None:
    step = Finetune(epochs=2, batch=16)
    history = train(tiny_net(0), teacher, DATA, step, Settings(held_out=HELD_OUT), Quiet())
    stated = json.loads(json.dumps(history.to_dict()))
    assert History.from_dict(stated) == history
    history_module.plot(history, tmp_path / "curve.png")
    history_module.plot(History([1.0, 0.5]), tmp_path / "short.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_original_as_teacher_is_a_copy() -> None:
    network = tiny_net(0)
    teacher = teacher_from("original", network, PREPROCESS, 4)
    assert largest_difference(teacher, network) == 0
    with torch.no_grad():
        network.head.weight.zero_()
    assert not torch.equal(teacher.head.weight, network.head.weight)  # type: ignore[arg-type]


def test_a_teacher_of_the_zoo_with_weights_of_a_file(tmp_path: Path) -> None:
    arch = archs.get("resnet20")
    torch.manual_seed(0)
    network = arch.build(10).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    otherwise = replace(arch.preprocess, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    teacher = teacher_from(f"resnet20:{tmp_path / 'teacher.pt'}", network, otherwise, 10)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    with torch.no_grad():
        expected = network(torch.from_numpy(arch.preprocess.normalize(pixels)))
        found = teacher(torch.from_numpy(otherwise.normalize(pixels)))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "classes", "message"),
    [
        ("resnet50", 10, "published weights know 1000 classes and the network has 10"),
        ("lenet5", 10, "takes images of 1 channels"),
        ("resnet20:random", 10, "knows nothing"),
        ("resnet20:none.pt", 10, "no such file"),
        ("fasterrcnn_resnet101_fpn", 91, "is a detector"),
        ("resnett20", 10, "unknown architecture"),
    ],
)
def test_teachers_that_do_not_fit(spec: str, classes: int, message: str) -> None:
    small = Preprocess((32, 32), 32, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(BadInput, match=message):
        teacher_from(spec, tiny_net(0), small, classes)


def test_a_teacher_for_larger_images(tmp_path: Path) -> None:
    torch.save(archs.get("squeezenet1_1").build(4).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(BadInput, match="does not take images of 8x8 pixels"):
        teacher_from(
            f"squeezenet1_1:{tmp_path / 'teacher.pt'}", tiny_net(0), replace(PREPROCESS, size=(8, 8), resize=8), 4
        )
