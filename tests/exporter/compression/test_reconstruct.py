import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.compression.prune import prune
from convoynet.exporter.compression.reconstruct import _inputs, _ridge
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Prune
from tests.exporter.small_nets import SmallNet, settled


def images(count: int = 24, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def pruned(module: nn.Module, batches: list[Tensor] | None, *, fit: bool = True) -> tuple[nn.Module, list[dict]]:
    step = Prune(0.4, round_to=1, reconstruct=fit)
    made, done = prune(
        module,
        torch.zeros(1, 3, 16, 16),
        step,
        target="cpu",
        batches=batches,
        seed=0,
        latency=None,
        progress=Quiet(),
    )
    return made, done.get("reconstructed", [])


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = module(x)
    return made


class Doubled(nn.Module):
    """Every channel of the first layer is there twice, so that half of them say all: the rest can be made up for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias):
                tensor[8:] = tensor[:8]
            self.second.weight[:, :8] *= 0.1  # the twins that are read least go first

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Conv2d(4, 3, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(4, 3, 1, stride=2),
        nn.Conv2d(4, 3, (4, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(4, 3, 3, padding="valid"),
        nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="reflect", stride=2),
        nn.Conv2d(4, 3, 3, padding="same", padding_mode="circular"),
    ],
)
def test_what_a_convolution_reads_is_what_its_outputs_are_made_of(layer: nn.Conv2d) -> None:
    given = torch.randn(2, 4, 12, 12)
    wanted = outputs(layer, given).flatten(2)
    places = torch.arange(wanted.shape[2]).expand(2, -1)
    read = _inputs(layer, given, places)
    assert layer.bias is not None
    got = read @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    torch.testing.assert_close(got.transpose(1, 2), wanted)


@pytest.mark.parametrize("rows", [8, 40])
def test_both_systems_have_one_solution(rows: int) -> None:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.standard_normal((rows, 16))), torch.from_numpy(rng.standard_normal((rows, 3)))
    found = _ridge(x, y)
    # The gradient of what is least there is zero.
    hold = 0.1 * float(x.square().sum()) / 16
    torch.testing.assert_close(x.T @ (x @ found - y) + hold * found, torch.zeros(16, 3, dtype=torch.float64))


def test_what_the_rest_can_say_is_made_up_for() -> None:
    whole = Doubled().eval()
    before = copy.deepcopy(whole.state_dict())
    data = images()
    wanted = outputs(whole, images(40))
    far, _ = pruned(whole, [data], fit=False)
    near, rows = pruned(whole, [data[:10], data[10:]])
    errors = [float((outputs(made, images(40)) - wanted).norm() / wanted.norm()) for made in (far, near)]
    assert errors[1] < errors[0]
    assert [row["layer"] for row in rows] == ["second"]
    assert rows[0]["after"] < 0.1 * rows[0]["before"]
    # The network that was given is as it was, and nothing hangs in either.
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for made in (whole, near) for module in made.modules()
    )


def test_it_is_the_same_again() -> None:
    first, second = (pruned(Doubled().eval(), [images()])[0] for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_layers_that_cannot_be_fitted_stay() -> None:
    torch.manual_seed(0)
    whole = settled(SmallNet(), images(8).numpy())
    rows = {row["layer"]: row for row in pruned(whole, [images()])[1]}
    names = {name for name, module in whole.named_modules() if isinstance(module, nn.Conv2d)}
    depthwise = next(name for name in names if name.startswith("depthwise"))
    stem = next(name for name in names if name.startswith("stem"))
    assert rows.keys() == names - {depthwise, stem}
    assert sum(row["after"] for row in rows.values()) < sum(row["before"] for row in rows.values())


class Twice(Doubled):
    """A layer that runs twice, and one whose weight is read without it."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(12, 12, 3, padding=1)
        self.aside = nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        x = F.relu(self.again(F.relu(self.again(x))))
        x = F.relu(self.last(F.relu(F.conv2d(x, self.aside.weight, self.aside.bias))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_layer_that_runs_twice_or_not_as_a_module_stays() -> None:
    _, rows = pruned(Twice().eval(), [images()])
    assert [row["layer"] for row in rows] == ["second", "last"]
    assert all(row["after"] <= row["before"] for row in rows)


@pytest.mark.parametrize("batches", [None, []])
def test_without_images_it_says_so(batches: list[Tensor] | None) -> None:
    with pytest.raises(BadInput, match="reconstruct needs images: add --calibration DIR"):
        pruned(Doubled(), batches)


def test_few_images_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BadInput, match="reconstruct needs 8 images or more, and there are 7"):
        pruned(Doubled(), [images(4), images(3)])
    with pytest.raises(BadInput, match="reconstruct met values that are not finite"):
        pruned(Doubled(), [images() * 3e38])
