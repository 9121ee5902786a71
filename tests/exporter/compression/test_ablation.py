import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.counting import count
from convoynet.exporter.compression import ablation as ablating
from convoynet.exporter.compression.ablation import ablation
from convoynet.exporter.compression.channels import Channels
from convoynet.exporter.compression.labels import FIXED
from convoynet.exporter.compression.trace_channels import trace_channels
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet


class Net(nn.Module):
    """A residual, a layer that runs twice, and a linear layer over places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inside = nn.Conv2d(6, 5, 3, padding=1)
        self.outside = nn.Conv2d(5, 6, 1)
        self.again = nn.Conv2d(6, 6, 1)
        self.places = nn.Linear(6, 4)
        self.head = nn.Linear(4, 7)
        with torch.no_grad():
            self.head.weight *= 30  # answers that differ

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.outside(F.relu(self.inside(x)))
        x = F.relu(self.again(F.relu(self.again(x))))
        x = F.relu(self.places(x.permute(0, 2, 3, 1))).mean((1, 2))
        logits: Tensor = self.head(x)
        return logits


class InPlace(Net):
    """What layers make is changed in place by what comes behind, and one has a shortcut to what is changed."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(self.stem(x), 0.2)
        y = self.outside(F.silu(self.inside(x), inplace=True))
        y += x
        x = F.relu_(self.again(F.relu_(self.again(y))))
        x = F.relu_(self.places(x.permute(0, 2, 3, 1))).mean((1, 2))
        logits: Tensor = self.head(x)
        return logits


class Drifting(Net):
    """Adds more to the features in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        logits: Tensor = super().forward(x) + self.runs * torch.arange(7.0)
        return logits


class Aside(Net):
    """The weights of a layer are read without it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).mean((2, 3))
        logits: Tensor = self.head(F.linear(x, self.places.weight, self.places.bias))
        return logits


class Named(Net):
    """Calls its layers by the names of what they read."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(input=x))
        x = x + self.outside(input=F.relu(self.inside(input=x)))
        x = F.relu(self.again(input=F.relu(self.again(x))))
        x = F.relu(self.places(input=x.permute(0, 2, 3, 1))).mean((1, 2))
        logits: Tensor = self.head(input=x)
        return logits


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def naive(module: nn.Module, channels: Channels, x: Tensor) -> Tensor:
    """Every channel by a run of the whole network, in which its readers see means."""
    scores = torch.zeros(channels.size, dtype=torch.float64)
    with torch.no_grad():
        wanted = (module(x).double() / 4).log_softmax(1)
        for label in {int(label) for _, labels in channels.readers() for label in labels} - {FIXED}:
            made = copy.deepcopy(module)
            for layer in {layer.name: layer for layer in channels.layers}.values():
                owner = made.get_submodule(layer.name)
                axis = -1 if isinstance(owner, nn.Linear) else 1
                seen: list[Tensor] = []

                def look(_: nn.Module, given: tuple[Tensor], seen: list[Tensor] = seen) -> None:
                    seen.append(given[0])

                handle = module.get_submodule(layer.name).register_forward_pre_hook(look)
                module(x)
                handle.remove()
                mean = torch.cat([one.movedim(axis, 0).flatten(1) for one in seen], 1).mean(1)
                gone = (channels.slots[layer.weight, 1] == label) & (channels.slots[layer.weight, 1] != FIXED)

                def fill(
                    _: nn.Module, given: tuple[Tensor], axis: int = axis, gone: Tensor = gone, mean: Tensor = mean
                ) -> tuple[Tensor]:
                    return (torch.where(gone, mean, given[0].movedim(axis, -1)).movedim(-1, axis),)

                owner.register_forward_pre_hook(fill)
            found = (made(x).double() / 4).log_softmax(1)
            scores[label] = float((wanted.exp() * (wanted - found)).sum(1).mean() * 16)
    return scores


@pytest.mark.parametrize("make", [Net, InPlace])
def test_it_is_what_each_run_without_a_channel_says(make: Callable[[], Net]) -> None:
    module = make().eval()
    before = copy.deepcopy(module.state_dict())
    channels = trace_channels(module, (3, 8, 8))
    found = ablation(module, channels, [images()[:3], images()[3:]], Quiet())
    wanted = (naive(module, channels, images()[:3]) + naive(module, channels, images()[3:])) / 2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-9)
    assert (found > 1e-6).sum() >= 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_what_a_layer_reads_may_be_named() -> None:
    modules = Net().eval(), Named().eval()
    assert count(modules[0], (3, 8, 8)) == count(modules[1], (3, 8, 8))
    scores = [ablation(module, trace_channels(module, (3, 8, 8)), [images()], Quiet()) for module in modules]
    torch.testing.assert_close(scores[0], scores[1])


def test_of_several_names_it_is_the_inputs() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.up(output_size=[18, 18], input=x)
            return made

    assert count(Sized(), (3, 8, 8)).macs == 8 * 8 * 3 * 4 * 9


def test_a_channel_that_is_always_the_same_says_nothing() -> None:
    module = Net().eval()
    with torch.no_grad():
        module.inside.weight[2] = 0
        assert module.inside.bias is not None
        module.inside.bias[2] = 50
    channels = trace_channels(module, (3, 8, 8))
    scores = ablation(module, channels, [images()], Quiet())[channels.slots["inside.weight", 0]]
    assert scores[2] == pytest.approx(0, abs=1e-9)
    assert scores.argmin() == 2


def test_what_cannot_be_done_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net().eval()
    channels = trace_channels(module, (3, 8, 8))
    with pytest.raises(BadInput, match='"ablation" found answers that are not finite'):
        ablation(module, channels, [images() * 3e38], Quiet())
    aside = Aside().eval()
    with pytest.raises(
        BadInput, match=r'"ablation" needs networks whose layers are modules, and here places\.weight is'
    ):
        ablation(aside, trace_channels(aside, (3, 8, 8)), [images()], Quiet())
    drifting = Drifting().eval()
    with pytest.raises(BadInput, match="needs a network that answers the same when a part of it is not run again"):
        ablation(drifting, channels, [images()], Quiet())
    seen = []
    monkeypatch.setattr(ablating, "_MOST_MACS", 3_300_000)  # a dozen images of fifteen channels
    monkeypatch.setattr(ablating._Without, "scores", lambda self, *_: seen.append(len(self._images)) or {})
    ablation(module, channels, [images(8), images(8), images(8)], Quiet())
    assert seen == [8, 4]
    monkeypatch.setattr(ablating, "_MOST_MACS", 1000)
    with pytest.raises(BadInput, match=r'run this network \d+ times and more, which takes hours; use "taylor"'):
        ablation(module, channels, [images()], Quiet())
