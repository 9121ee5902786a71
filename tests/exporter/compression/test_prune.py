import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet

from convoynet.exporter import archs
from convoynet.exporter.archs.alexnet import response_norm
from convoynet.exporter.archs.program import load_program
from convoynet.exporter.archs.resnet import PaddedShortcut
from convoynet.exporter.compression.prune import prune
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import PRUNE_METHODS, Prune
from tests.exporter.onnx_runs import run
from tests.exporter.small_nets import PREPROCESS, SmallNet, settled, small_net


def pruned(
    module: nn.Module,
    step: Prune,
    size: int = 32,
    *,
    batches: Iterable[Any] | None = None,
    latency: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    target: str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    channels = next(p for p in module.parameters() if p.ndim == 4).shape[1]
    example = torch.zeros(1, channels, size, size)
    return prune(module, example, step, target=target, batches=batches, seed=seed, latency=latency, progress=Quiet())


def network(name: str, size: int) -> nn.Module:
    arch = archs.get(name)
    torch.manual_seed(0)
    made = arch.deploy(arch.build(arch.num_classes))
    return settled(
        made, np.random.default_rng(0).standard_normal((4, arch.preprocess.channels, size, size), np.float32)
    )


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(x)
    return result


def tiny_densenet() -> nn.Module:
    torch.manual_seed(0)
    made = DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, bn_size=2, num_classes=10)
    return settled(made, np.random.default_rng(0).standard_normal((8, 3, 32, 32), np.float32))


class Grouped(nn.Module):
    """A convolution of many groups, as ResNeXt's, and one of two, as AlexNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.many = nn.Conv2d(64, 128, 3, padding=1, groups=16)
        self.join = nn.Conv2d(128, 64, 1)
        self.two = nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.many(F.relu(self.first(x))))
        x = F.relu(self.two(F.relu(self.join(x))))
        logits: Tensor = self.last(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("method", PRUNE_METHODS)
def test_removes_what_was_asked_for(method: str, scope: str) -> None:
    original = small_net()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    batches = [torch.randn(4, 3, 32, 32)]
    smaller, done = pruned(original, Prune(ratio=0.5, method=method, scope=scope), batches=batches)
    counted = archs.count(smaller, (3, 32, 32))
    assert done["macs"] == {"before": archs.count(original, (3, 32, 32)).macs, "after": counted.macs}
    assert done["parameters"]["after"] == counted.parameters < done["parameters"]["before"]
    assert done["reached"] == 1 - counted.macs / done["macs"]["before"]
    assert 0.5 <= done["reached"] < 0.55
    for row in done["channels"]:
        layer = smaller.get_submodule(row["layer"])
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert row["after"] == layer.weight.shape[0] <= row["before"]
    assert outputs(smaller, torch.randn(2, 3, 32, 32)).shape == (2, 20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def kill_odd_channels(module: nn.Module) -> None:
    """Let the odd channels of each batch normalisation be zero, whatever comes in."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                layer.weight[1::2] = 0
                layer.bias[1::2] = 0


@pytest.mark.parametrize(
    ("make", "size", "ratio"),
    [
        (small_net, 32, 0.5),
        (lambda: network("resnet20", 32), 32, 0.6),
        (lambda: network("shufflenet_v2_x0_5", 64), 64, 0.25),
        (lambda: network("mobilenet_v3_small", 64), 64, 0.3),
        (tiny_densenet, 32, 0.3),
    ],
    ids=["residual", "resnet20", "shufflenet", "mobilenet", "densenet"],
)
def test_channels_that_do_nothing_go_and_nothing_changes(
    make: Callable[[], nn.Module], size: int, ratio: float
) -> None:
    original = make()
    kill_odd_channels(original)
    smaller, done = pruned(original, Prune(ratio=ratio, method="bn", scope="global", round_to=1), size)
    assert done["reached"] >= ratio
    x = torch.randn(2, 3, size, size)
    wanted, got = outputs(original, x), outputs(smaller, x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("make", [small_net, lambda: network("resnet20", 32)], ids=["residual", "resnet20"])
def test_the_pruned_network_exports(make: Callable[[], nn.Module]) -> None:
    smaller, _ = pruned(make(), Prune(ratio=0.5))
    graph = onnx_from_torch(smaller, PREPROCESS, uint8_input=False)
    x = torch.randn(3, 3, 32, 32)
    wanted = outputs(smaller, x).numpy()
    np.testing.assert_allclose(run(graph, x.numpy()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_pruned_network_is_a_program_by_itself(tmp_path: Path) -> None:
    smaller, _ = pruned(network("resnet20", 32), Prune(ratio=0.5))
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(smaller, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "pruned.pt2")
    loaded = load_program(tmp_path / "pruned.pt2")
    assert loaded.size == (32, 32)
    torch.testing.assert_close(outputs(loaded.network, images), outputs(smaller, images))


def test_padded_shortcuts_are_pruned_with_what_they_pad() -> None:
    smaller, done = pruned(network("resnet20", 32), Prune(ratio=0.6))
    widths = {row["layer"]: row["after"] for row in done["channels"]}
    for stage, fewer in (("layer2", "layer1"), ("layer3", "layer2")):
        shortcut = smaller.get_submodule(f"{stage}.0.shortcut")
        assert isinstance(shortcut, PaddedShortcut)
        missing = widths[f"{stage}.0.conv2"] - widths[f"{fewer}.0.conv2"]
        assert shortcut.before + shortcut.after == missing > 0
    assert widths["layer1.0.conv2"] < 16


@pytest.mark.parametrize(("target", "multiple"), [("cpu", 16), ("gpu", 32)])
def test_a_target_likes_some_numbers_of_channels(target: str, multiple: int) -> None:
    wide = nn.Sequential(
        nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 192, 3), nn.ReLU(), nn.Conv2d(192, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    _, done = pruned(wide, Prune(ratio=0.6), target=target)
    after = [row["after"] for row in done["channels"]]
    assert after[0] % multiple == after[1] % multiple == 0
    assert after[2] % 4 == 0  # a quarter of a narrow layer
    assert after[3] == 10


def test_channels_left_are_multiples_of_round_to() -> None:
    _, done = pruned(small_net(), Prune(ratio=0.6, round_to=8))
    assert all(row["after"] % 8 == 0 for row in done["channels"][:-1])
    with pytest.raises(BadInput, match="none of its layers has more than round_to = 64 channels"):
        pruned(small_net(), Prune(ratio=0.6, round_to=64))


def test_groups_go_whole_where_there_are_many() -> None:
    smaller, _ = pruned(Grouped(), Prune(ratio=0.5))
    many, two = smaller.get_submodule("many"), smaller.get_submodule("two")
    assert isinstance(many, nn.Conv2d)
    assert isinstance(two, nn.Conv2d)
    assert many.groups < 16
    assert (many.in_channels, many.out_channels) == (4 * many.groups, 8 * many.groups)
    assert two.groups == 2
    assert two.in_channels < 64


class Normalized(nn.Module):
    """Channels see their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), response_norm(), nn.Conv2d(32, 32, 3), nn.ReLU())
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layers(x).mean((2, 3)))
        return logits


def test_local_response_normalisation() -> None:
    smaller, done = pruned(Normalized(), Prune(ratio=0.5))
    assert done["channels"][0]["after"] < 32
    assert outputs(smaller, torch.randn(2, 3, 32, 32)).shape == (2, 10)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("method", ["magnitude", "taylor", "ablation"])
@pytest.mark.parametrize("labelled", [False, True])
def test_what_no_layer_listens_to_goes_first(method: str, labelled: bool) -> None:
    torch.manual_seed(0)
    original = chain(nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
    first, second = original[0], original[2]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    unheard = torch.arange(0, 32, 2)
    with torch.no_grad():
        second.weight[:, unheard] = 0
        if method == "magnitude":
            first.weight[unheard] *= 0.1
    images = torch.randn(8, 3, 32, 32)
    batches = [(images, torch.arange(8))] if labelled else [images]
    smaller, done = pruned(original, Prune(ratio=0.7, method=method), batches=batches)
    assert done["channels"][0]["after"] == 16
    kept = smaller.get_submodule("0")
    assert isinstance(kept, nn.Conv2d)
    assert torch.equal(kept.weight, first.weight[1::2])


def test_global_ranking_takes_from_the_layer_that_matters_least() -> None:
    torch.manual_seed(0)
    original = chain(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    small, large = original[1], original[4]
    assert isinstance(small, nn.BatchNorm2d)
    assert isinstance(large, nn.BatchNorm2d)
    with torch.no_grad():
        small.weight.uniform_(0.1, 0.2)
        large.weight.uniform_(0.8, 0.9)
    _, done = pruned(original, Prune(ratio=0.49, method="bn", scope="global"))
    assert [row["after"] for row in done["channels"]] == [16, 32, 10]


@pytest.mark.parametrize("method", ["random", "taylor"])
def test_the_seed_decides(method: str) -> None:
    batches = [torch.randn(4, 3, 32, 32)]
    weights = [
        pruned(small_net(), Prune(ratio=0.5, method=method), batches=batches, seed=seed)[0].get_parameter(
            "wide.0.weight"
        )
        for seed in (3, 3, 4)
    ]
    assert torch.equal(weights[0], weights[1])
    if method == "random":
        assert not torch.equal(weights[0], weights[2])


def test_says_how_far_it_can_go() -> None:
    with pytest.raises(BadInput, match=r"ratio 0\.99 cannot be reached: at most 0\.\d+") as told:
        pruned(small_net(), Prune(ratio=0.99))
    reachable = float(str(told.value).split("at most ")[1].split()[0])
    _, done = pruned(small_net(), Prune(ratio=reachable))
    assert done["reached"] == pytest.approx(reachable, abs=0.002)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Prune(ratio=0.5, method="taylor"), "needs images: add --calibration"),
        (Prune(ratio=0.5, method="ablation"), "needs images: add --calibration"),
        (Prune(ratio=0.5, method="bn"), "needs batch normalisation, and the network has none"),
        (Prune(ratio=0.5, of="latency"), "needs a clock"),
    ],
)
def test_says_what_it_needs(step: Prune, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        pruned(chain(nn.ReLU()), step)
    for method in ("taylor", "ablation"):
        with pytest.raises(BadInput, match="there are none"):
            pruned(chain(nn.ReLU()), Prune(ratio=0.5, method=method), batches=[])


def test_to_a_latency() -> None:
    def latency(module: nn.Module) -> float:
        return 1e-3 + 1e-9 * archs.count(module, (3, 32, 32)).macs

    original = small_net()
    whole = latency(original)
    smaller, done = pruned(original, Prune(ratio=0.5, of="latency"), latency=latency)
    assert 0.5 * 0.85 * whole < latency(smaller) <= 0.5 * whole
    assert done["measured"][0]["seconds"] == whole
    assert done["measured"][-1]["seconds"] == latency(smaller)
    assert done["reached"] == pytest.approx(1 - latency(smaller) / whole)
    with pytest.raises(BadInput, match=r"ratio 0\.9 of the latency cannot be reached"):
        pruned(original, Prune(ratio=0.9, of="latency"), latency=lambda module: latency(module) + 1.0)


class CountsOn32(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.second = nn.Conv2d(32, 32, 3)
        self.last = nn.Linear(32, 10)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(torch.relu(self.first(x)))
        logits: Tensor = self.last(torch.relu(self.second(x)).mean((2, 3)))
        return logits


def shuffled(x: Tensor) -> Tensor:
    """Eight groups of four, told in the other order than the one in which channels are usually shuffled."""
    n, channels, height, width = x.shape
    return x.reshape(n, channels // 4, 4, height, width).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("read", [lambda x: x.view(len(x), 32, 30, 30), shuffled], ids=["view", "order"])
def test_code_that_counts_on_channels_is_told(read: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BadInput, match="its code counts on the number or the order of some channels"):
        pruned(CountsOn32(read), Prune(ratio=0.5))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.cumsum(1),
        lambda x: x[:, torch.arange(31, -1, -1)],
        lambda x: torch.cat((x[:, 16:], x[:, :16]), 1),
        lambda x: x * torch.linspace(0, 1, 32).reshape(1, 32, 1, 1),
        lambda x: F.pad(x[:, :16], (0, 0, 0, 0, 8, 8)),
        lambda x: x.softmax(1),
    ],
)
def test_what_is_not_known_stays_as_it_is(read: Callable[[Tensor], Tensor]) -> None:
    _, done = pruned(CountsOn32(read), Prune(ratio=0.4))
    assert [row["after"] for row in done["channels"]] == [32, 16, 10]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y


def test_refuses_what_returns_more_than_logits() -> None:
    with pytest.raises(BadInput, match="returns tuple, not one tensor of logits; detection networks are not pruned"):
        pruned(Two(), Prune(ratio=0.5))


def test_refuses_where_nothing_can_go() -> None:
    with pytest.raises(BadInput, match="cannot be pruned: none of its channels can be removed alone"):
        pruned(nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), Prune(ratio=0.5))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_told(value: float) -> None:
    network = chain(nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = value
    with pytest.raises(BadInput, match="outputs that are not finite"):
        pruned(network, Prune(0.3), 16)


def test_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 32, 3, padding=1)
            self.both = nn.Conv2d(32, 32, 3, padding=1)
            self.last = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.both(F.relu(self.both(F.relu(self.first(x))))))
            logits: Tensor = self.last(x.mean((2, 3)))
            return logits

    smaller, _ = pruned(Twice(), Prune(ratio=0.5))
    both = smaller.get_submodule("both")
    assert isinstance(both, nn.Conv2d)
    assert both.in_channels == both.out_channels < 32


def test_a_pruned_network_can_be_pruned_again_and_trained() -> None:
    once, _ = pruned(small_net(), Prune(ratio=0.3))
    twice, done = pruned(once, Prune(ratio=0.3))
    assert done["reached"] >= 0.3
    twice.train()
    loss = F.cross_entropy(twice(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in twice.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in archs.names() if archs.get(name).task != "detection"])
def test_every_network_of_the_zoo_can_lose_half(name: str) -> None:
    """On shapes alone, at its own image size; which channels go makes no difference to how many."""
    if name.startswith("lenet5"):
        pytest.skip("test_of_lenet5_only_the_end_can_be_pruned says why")
    arch = archs.get(name)
    with torch.device("meta"):
        made = arch.deploy(arch.build(arch.num_classes)).eval()
    example = torch.empty(1, *arch.input_size, device="meta")
    step = Prune(ratio=0.5, method="random")
    smaller, done = prune(made, example, step, target="cpu", batches=None, seed=0, latency=None, progress=Quiet())
    assert 0.5 <= done["reached"] < 0.53
    assert archs.count(smaller, arch.input_size).macs == done["macs"]["after"]


# Of every family, at an image size that is cheap. LeNet-5 is below.
FAMILIES = {
    "alexnet": 96, "alexnet-2012": 227, "bninception": 64, "deeplabv3_resnet50": 64, "densenet121": 64,
    "dilated_vgg16_context": 192, "drn_c_26": 64, "drn_d_22": 64, "efficientnet_b0": 64, "fcn_resnet50": 64,
    "googlenet": 64, "inception_resnet_v2": 96, "inception_v3": 96, "inception_v4": 96, "mnasnet0_5": 64,
    "mobilenet_v2": 64, "mobilenet_v3_small": 64, "mobilenetv1_100": 64, "nin": 224, "nin-cifar": 32, "resnet18": 64,
    "resnet20": 32, "resnet50": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64,
    "vgg11": 224, "vgg11-lrn": 224, "vgg16-cifar": 32, "wide_resnet50_2": 64, "xception": 96,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loses_half_and_exports(name: str) -> None:
    arch, size = archs.get(name), FAMILIES[name]
    original = network(name, size)
    smaller, done = pruned(original, Prune(ratio=0.5), size)
    assert 0.5 <= done["reached"] < 0.53
    preprocess = Preprocess(size=(size, size), resize=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    graph = onnx_from_torch(smaller, preprocess, uint8_input=False, task=arch.task)
    x = torch.randn(2, 3, size, size)
    wanted = outputs(smaller, x).numpy()
    assert wanted.shape == outputs(original, x).shape
    np.testing.assert_allclose(run(graph, x.numpy()), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["lenet5", "lenet5-softmax"])
def test_of_lenet5_only_the_end_can_be_pruned(name: str) -> None:
    """Its third layer is a table of connections between certain maps."""
    original = network(name, 32)
    with pytest.raises(BadInput, match=r"at most 0\.1\d+ of the multiply-adds"):
        pruned(original, Prune(ratio=0.5))
    _, done = pruned(original, Prune(ratio=0.12))
    widths = {row["layer"]: (row["before"], row["after"]) for row in done["channels"]}
    assert widths["c1"] == (6, 6)
    assert widths["c5"][1] < 120


def test_the_original_can_be_the_teacher() -> None:
    original = small_net()
    teacher = copy.deepcopy(original)
    pruned(original, Prune(ratio=0.5, method="taylor"), batches=[torch.randn(2, 3, 32, 32)])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(original, x), outputs(teacher, x))
    assert all(parameter.grad is None for parameter in original.parameters())
    assert isinstance(original, SmallNet)
