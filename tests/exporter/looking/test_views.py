"""Layers that return what others read too: a part of it, all of it, or what they have written over it."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.opened import Opened, open_graph
from convoynet.exporter.looking.tail import Tail
from tests.exporter.looking.conftest import SIZE, opened
from tests.exporter.onnx_runs import session_of

UNITS = 6


class Part(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :UNITS]


class Shared(nn.Module):
    """One branch reads what a layer returns, the other what that layer reads."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        width = UNITS if isinstance(between, Part) else 2 * UNITS
        self.stem = nn.Conv2d(3, 2 * UNITS, 3, 2, 1)
        self.between = between
        self.branch = nn.Conv2d(width, 2 * UNITS, 3, 1, 1)
        self.head = nn.Linear(4 * UNITS, 4)
        self.head.weight.data *= 12

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branch = F.relu(self.branch(self.between(x)))
        scores: Tensor = self.head(torch.cat([x, branch], 1).mean((2, 3)))
        return scores


BETWEEN: dict[str, nn.Module] = {
    "a part": Part(), "the same": nn.Identity(), "dropout": nn.Dropout(), "a ReLU": nn.ReLU(),
}  # fmt: skip


@pytest.fixture(params=sorted(BETWEEN))
def shared(request: pytest.FixtureRequest) -> Opened:
    torch.manual_seed(0)
    return opened(Shared(BETWEEN[request.param]))


def test_a_unit_is_left_out_for_those_alone_that_read_the_layer(shared: Opened, pixels: np.ndarray) -> None:
    inputs = shared.inputs(pixels)
    tail = Tail(shared, shared.layer("between"), inputs)
    for unit in range(UNITS):
        maps = tail.maps.clone()
        maps[:, unit] = 0
        found = tail.shares_with(maps, torch.arange(len(inputs)))
        weight = shared.network.get_submodule("branch").get_parameter("weight")
        kept = weight[:, unit].clone()
        weight[:, unit] = 0
        with torch.no_grad():
            wanted = shared.network(inputs).softmax(1)
        weight[:, unit] = kept
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert (found - tail.shares).abs().max() > 1e-3


def test_a_gradient_comes_from_those_alone(shared: Opened, pixels: np.ndarray) -> None:
    maps, output = shared.behind(shared.layer("between"), shared.inputs(pixels))
    assert isinstance(output, Tensor)
    (found,) = torch.autograd.grad(output[:, 1].sum(), maps)
    network = shared.network
    read = maps.detach().requires_grad_()
    branch = F.relu(network.get_submodule("branch")(read)).mean((2, 3))
    weights = network.get_submodule("head").get_parameter("weight")[1, 2 * UNITS :]
    (wanted,) = torch.autograd.grad((branch @ weights).sum(), read)
    torch.testing.assert_close(found, wanted)


def test_what_a_layer_writes_over_is_its_map_for_all(pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    network = opened(Shared(nn.Tanh()))

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh_()

    network.network.between = InPlace()
    network = opened(network.network)
    inputs = network.inputs(pixels)
    tail = Tail(network, network.layer("between"), inputs)
    maps = torch.zeros_like(tail.maps)
    head = network.network.get_submodule("head")
    with torch.no_grad():
        branch = F.relu(network.network.get_submodule("branch")(maps))
        wanted = head(torch.cat([maps, branch], 1).mean((2, 3))).softmax(1)
    torch.testing.assert_close(tail.shares_with(maps, torch.arange(len(inputs))), wanted)


def test_a_layer_that_runs_in_inference_mode_is_left_out_too(pixels: np.ndarray) -> None:
    class Inferring(nn.Module):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    torch.manual_seed(0)
    network = opened(Shared(Inferring()))
    inputs = network.inputs(pixels)
    tail = Tail(network, network.layer("between"), inputs)
    found = tail.shares_with(torch.zeros_like(tail.maps), torch.arange(len(inputs)))
    assert (found - tail.shares).abs().max() > 1e-3


@pytest.mark.parametrize("operator", ["Slice", "Split"])
def test_nodes_of_a_graph_likewise(operator: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    random = np.random.default_rng(0)

    def kept(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) / 3).astype(np.float32), name)

    constants = [kept("stem", 2 * UNITS, 3, 3, 3), kept("branch", 4, UNITS, 3, 3), kept("head", 2 * UNITS + 4, 4)]
    constants += [numpy_helper.from_array(np.array([value]), f"at_{value}") for value in (0, 1, UNITS)]
    take = {
        "Slice": helper.make_node("Slice", ["map", "at_0", f"at_{UNITS}", "at_1"], ["taken"], name="take"),
        "Split": helper.make_node("Split", ["map"], ["taken", "rest"], name="take", axis=1, num_outputs=2),
    }[operator]
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["raw"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["raw"], ["map"]),
        take,
        helper.make_node("Conv", ["taken", "branch"], ["other"], pads=[1] * 4),
        helper.make_node("Relu", ["other"], ["above"]),
        helper.make_node("Concat", ["map", "above"], ["both"], axis=1),
        helper.make_node("GlobalAveragePool", ["both"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["row"]),
        helper.make_node("Gemm", ["row", "head"], ["scores"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, *SIZE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "net", [image], [scores], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    file = tmp_path_factory.mktemp("graph") / "net.onnx"
    onnx.save(model, file)
    network = open_graph("net", file, None, None)
    inputs = torch.from_numpy(random.standard_normal((5, 3, *SIZE)).astype(np.float32))
    tail = Tail(network, network.layer("take"), inputs)
    for unit in range(UNITS):
        maps = tail.maps.clone()
        maps[:, unit] = 0
        without = numpy_helper.to_array(constants[1]).copy()
        without[:, unit] = 0
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(without, "branch"))
        (made,) = session_of(model).run(None, {"image": inputs.numpy()})
        wanted = torch.from_numpy(made).softmax(1)
        torch.testing.assert_close(tail.shares_with(maps, torch.arange(5)), wanted, rtol=0, atol=1e-5)
        assert (wanted - tail.shares).abs().max() > 1e-4


def test_answers_that_are_no_numbers_decide_nothing(pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    module = Shared(nn.ReLU())
    module.head.bias.data[1] = float("nan")
    network = opened(module)
    with pytest.raises(BadInput, match="net answers with numbers that are not finite"):
        Tail(network, network.layer("between"), network.inputs(pixels))


def test_an_operator_that_has_no_gradient_as_it_is_used_is_said_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Which shows when it runs; and nothing is trained."""
    kernel = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "kernel")
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["map"], name="stem"),
        helper.make_node(
            "AveragePool", ["map"], ["made"], name="pool", kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_UPPER"
        ),
        helper.make_node("GlobalAveragePool", ["made"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["scores"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, *SIZE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "net", [image], [scores], [kernel])
    file = tmp_path_factory.mktemp("graph") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), file)
    network = open_graph("net", file, None, None)
    with pytest.raises(BadInput, match=r"operator AveragePool of node 'pool' .* has no gradient here"):
        network.maps(network.layer("pool"), torch.zeros(1, 3, *SIZE))
