from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Edge
from convoynet.exporter.graph.onnx_operators import OPERATORS
from convoynet.exporter.graph.onnx_to_torch import TorchGraph
from tests.exporter.onnx_runs import operators, run, session_of
from tests.exporter.small_nets import PREPROCESS, SmallNet, logits_of, pixels, settled, small_net
from tests.exporter.task_nets import Segmenter, segmenter


class OddNet(nn.Module):
    """What the others lack: LRN, a batch norm that cannot be folded, uneven pads, splits, gates, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 16, (1, 3), padding=(0, 1), groups=4)
        self.gate = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.local_response_norm(F.relu(self.stem(x)), 5, 1e-2, 0.75, 2.0)
        x = F.avg_pool2d(F.pad(torch.relu(self.norm(x)), (0, 1, 0, 1)), 3, 2, ceil_mode=True, count_include_pad=False)
        x = F.max_pool2d(F.hardswish(self.wide(x)), 3, 2, 1, ceil_mode=True)
        left, right = torch.split(x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True))), 8, 1)
        x = torch.stack((torch.tanh(left), F.leaky_relu(right, 0.2)), 2).transpose(1, 2).flatten(1, 2)
        x = F.interpolate(x, scale_factor=2, mode="nearest")[:, :, ::2, 1:]
        return F.softmax(self.head(F.silu(x).clamp(-0.5, 4.0).mean((2, 3))), 1) - 0.25


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(graph: onnx.ModelProto, inputs: np.ndarray) -> float:
    with torch.no_grad():
        found = TorchGraph(graph)(torch.from_numpy(inputs)).numpy()
    return relative(found, run(graph, inputs))


@pytest.mark.parametrize("network", [SmallNet, OddNet])
def test_the_graph_computes_what_onnx_runtime_does(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = settled(network(), PREPROCESS.normalize(pixels(16)))
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=False)
    inputs = PREPROCESS.normalize(pixels(5))
    assert relative(logits_of(model, pixels(5)), run(graph, inputs)) < 1e-5
    assert compare(graph, inputs) < 1e-5


def test_a_segmentation_is_read_up_to_its_logits() -> None:
    """The map of classes, ArgMax and a cast, is no part of what is trained."""
    preprocess = segmenter().preprocess
    torch.manual_seed(0)
    images = made_images(3, preprocess.size, 3, 0)
    graph = onnx_from_torch(
        settled(Segmenter(5), preprocess.normalize(images)), preprocess, uint8_input=False, task="segmentation"
    )
    assert operators(graph)["ArgMax"]
    assert operators(graph)["Resize"]
    assert compare(graph, preprocess.normalize(images)) < 1e-5


def test_pixels_as_input() -> None:
    graph = onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)
    assert compare(graph, pixels(3)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["lenet5", "resnet20", "squeezenet1_1", "nin", "googlenet", "shufflenet_v2_x0_5", "mobilenet_v3_small",
     "efficientnet_b0", "densenet121", "mnasnet0_5", "alexnet", "inception_v3", "deeplabv3_resnet50"],
)  # fmt: skip
def test_networks_of_the_zoo(name: str) -> None:
    arch = archs.get(name)
    side = min(*arch.preprocess.size, 128)
    preprocess = replace(arch.preprocess, size=(side, side), resize=side)
    torch.manual_seed(0)
    model = arch.deploy(arch.build(arch.num_classes)).eval()
    graph = onnx_from_torch(model, preprocess, uint8_input=False, task=arch.task)
    assert compare(graph, preprocess.normalize(made_images(2, preprocess.size, preprocess.channels, 0))) < 1e-4


def test_weights_get_gradients_and_go_back_into_the_graph() -> None:
    graph = onnx_from_torch(small_net(), PREPROCESS, uint8_input=False)
    before = graph.SerializeToString()
    module = TorchGraph(graph)
    inputs = PREPROCESS.normalize(pixels(4))
    module(torch.from_numpy(inputs)).square().sum().backward()
    trained = module.trained()
    weighted = [node for node in graph.graph.node if node.op_type in {"Conv", "Gemm"}]
    assert set(trained) == {name for node in weighted for name in node.input[1:]}
    with torch.no_grad():
        for parameter in trained.values():
            assert parameter.grad is not None
            assert float(parameter.grad.abs().sum()) > 0
            parameter.sub_(0.001 * parameter.grad)
    changed = module.to(memory_format=torch.channels_last).write_into(graph)  # type: ignore[call-overload]
    onnx.checker.check_model(changed)
    assert graph.SerializeToString() == before
    with torch.no_grad():
        found = module(torch.from_numpy(inputs)).numpy()
    assert relative(run(changed, inputs), found) < 1e-5
    assert relative(run(changed, inputs), run(graph, inputs)) > 1e-3


def test_inner_tensors_and_what_nodes_read() -> None:
    graph = onnx_from_torch(small_net(), PREPROCESS, uint8_input=False)
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    wanted = [convolutions[2].output[0], convolutions[5].input[0], "input"]
    inputs = torch.from_numpy(PREPROCESS.normalize(pixels(2)))
    with torch.no_grad():
        inner = TorchGraph(graph, wanted)(inputs)
    assert torch.equal(inner[2], inputs)
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    probed.graph.output.insert(0, helper.make_tensor_value_info(wanted[0], TensorProto.FLOAT, None))
    assert relative(inner[0].numpy(), run(probed, inputs.numpy())) < 1e-5
    chosen = Edge(convolutions[5].input[0], convolutions[5].output[0], 0)
    seen = []

    def reading(edge: Edge, tensor: Tensor) -> Tensor:
        seen.append(edge)
        return torch.zeros_like(tensor) if edge == chosen else tensor

    with torch.no_grad():
        (found,) = TorchGraph(graph, [convolutions[5].output[0]], reading).run(inputs)
    bias = numpy_helper.to_array(next(t for t in graph.graph.initializer if t.name == convolutions[5].input[2]))
    assert torch.allclose(found, torch.from_numpy(bias.copy()).view(1, -1, 1, 1).expand_as(found))
    assert chosen in seen
    with pytest.raises(BadInput, match="computes no tensor 'nothing'"):
        TorchGraph(graph, ["nothing"])


def one_node(operator: str, **attributes: object) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", **attributes)
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("operator", "attributes", "message"),
    [
        ("Einsum", {"equation": "nchw->nc"}, "operator Einsum of node 'the_node' cannot be trained"),
        ("LRN", {"size": 4}, "LRN of node 'the_node' with an even size"),
        ("MaxPool", {"auto_pad": "SAME_UPPER"}, "other than two axes"),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}, r"with the pads \[0, 0, 1, 1\]"),
    ],
)
def test_what_cannot_be_trained_is_named(operator: str, attributes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TorchGraph(one_node(operator, **attributes))


OLD = [
    (6, "Clip", {"min": 0.0, "max": 1.0}),
    (10, "Clip", {"max": 0.5}),
    (11, "Split", {"axis": 1, "split": [1, 3]}),
    (11, "Squeeze", {"axes": [0]}),
    (11, "Unsqueeze", {"axes": [0, -1]}),
    (9, "Slice", {"starts": [1, -2], "ends": [3, 9], "axes": [1, 3]}),
    (9, "Slice", {"starts": [0, 1], "ends": [9, 2]}),
    (10, "Pad", {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 1.5}),
    (11, "Softmax", {}),
    (11, "Softmax", {"axis": 0}),
    (11, "Softmax", {"axis": -1}),
    (13, "Softmax", {}),
    (11, "MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    (11, "MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    (11, "MaxPool", {"kernel_shape": [2, 2], "auto_pad": "VALID"}),
    (11, "AveragePool", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}),
    (11, "Conv", {}),
    (11, "Conv", {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
]


@pytest.mark.parametrize(("opset", "operator", "attributes"), OLD)
def test_what_older_graphs_have_as_attributes_or_leave_open_counts(
    opset: int, operator: str, attributes: dict[str, object]
) -> None:
    """Graphs of any exporter, of which none here writes such."""
    shape, inputs, weights = (1, 4, 5, 6), ["x"], []
    if operator == "Conv":
        inputs, weights = (
            ["x", "w"],
            [numpy_helper.from_array(np.linspace(-1, 1, 72, dtype=np.float32).reshape(3, 4, 3, 2), "w")],
        )
    outputs = ["y", "z"] if operator == "Split" else ["y"]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node(operator, inputs, outputs, **attributes)], "g", [start], ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    x = np.random.default_rng(0).normal(0, 2, shape).astype(np.float32)
    wanted = session_of(model).run(["y"], {"x": x})[0]
    found = TorchGraph(model)(torch.from_numpy(x)).detach().numpy()
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_whole_numbers_are_divided_as_onnx_does() -> None:
    """7 by 2 is 3, and twice that 6, where PyTorch has 3.5 and 7."""
    values = {"a": np.array([7, -3]), "b": np.array([2, 2]), "two": np.array([2, 1])}
    nodes = [
        helper.make_node("Div", ["a", "b"], ["q"]),
        helper.make_node("Mul", ["q", "two"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    start, end = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    given = [numpy_helper.from_array(a, name) for name, a in values.items()]
    assert TorchGraph(helper.make_model(helper.make_graph(nodes, "g", [start], [end], given)))(
        torch.arange(12.0)
    ).shape == (6, 2)


def test_a_number_is_gathered_from_a_row() -> None:
    """As `x.shape[0]` is exported: the shape, and of it the element at a scalar index."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "axes"], ["row"]),
        helper.make_node("Concat", ["row", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    start, end = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    given = [numpy_helper.from_array(np.array(a), name) for name, a in (("first", 0), ("axes", [0]), ("rest", [-1]))]
    graph = helper.make_graph(nodes, "g", [start], [end], given)
    assert TorchGraph(helper.make_model(graph))(torch.ones(3, 2, 5)).shape == (3, 10)


def test_every_operator_of_the_table_is_onnxs() -> None:
    for operator in OPERATORS:
        assert onnx.defs.has(operator)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_that_quantize_round_as_onnx_does_and_let_the_gradient_through(kind: type, channels: int) -> None:
    shape = [channels] if channels > 1 else []
    scale = np.linspace(0.02, 0.05, channels, dtype=np.float32).reshape(shape)
    zero = np.full(shape, 3, kind)
    pair = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], axis=1),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3, 8, 8]) for name in "xy"]
    stored = [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(zero, "zero")]
    opset = [helper.make_opsetid("", 20)]
    graph = helper.make_model(
        helper.make_graph(pair, "pair", values[:1], values[1:], stored), opset_imports=opset, ir_version=10
    )
    x = np.random.default_rng(0).normal(0, 4, (2, 3, 8, 8)).astype(np.float32)
    given = torch.from_numpy(x).requires_grad_()
    found = TorchGraph(graph)(given)
    expected = run(graph, x)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)
    limits, sizes = np.iinfo(kind), scale.reshape(-1, 1, 1)
    inside = (np.rint(x / sizes) + 3 >= limits.min) & (np.rint(x / sizes) + 3 <= limits.max)
    assert 0.1 < inside.mean() < 0.9
    found.sum().backward()
    assert given.grad is not None
    np.testing.assert_allclose(given.grad.numpy(), inside.astype(np.float32), atol=1e-6)
