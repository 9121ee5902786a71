"""What networks return, in every form in which people write it, becomes named tensors with the images first."""

import copy
import dataclasses
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convoynet.exporter.archs.returned import Outputs, outputs_of, parts_of
from convoynet.exporter.archs.wrapped import bare
from convoynet.exporter.compression import losses
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Finetune, Int8
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.onnx_runs import session_of

SIZE = (3, 8, 8)
PREPROCESS = Preprocess((8, 8), 8, (0.5,) * 3, (0.5,) * 3)
INPUTS = torch.from_numpy(PREPROCESS.normalize(made_images(4, (8, 8), 3, 0)))

Named = namedtuple("Named", "logits aux")


@dataclasses.dataclass
class Data:
    logits: Tensor
    loss: Tensor | None = None


class Net(nn.Module):
    """A body, a head, and a forward of one's own."""

    def __init__(self, forward: Callable[["Net", Tensor], Any], classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, classes)
        self._forward = forward

    def logits(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def exported(network: nn.Module, asked: tuple[str, ...] = ()) -> tuple[Outputs, list[np.ndarray]]:
    """What the graph gives for four images, and what was chosen."""
    outputs = outputs_of("nets:net", network, SIZE, asked)
    module = copy.deepcopy(outputs.of(network)).eval()
    graph = onnx_from_torch(module, PREPROCESS, uint8_input=False, others=outputs.others)
    session = session_of(graph)
    assert [each.name for each in session.get_outputs()] == ["logits", *outputs.others]
    one = session.run(None, {"input": INPUTS[:1].numpy()})
    found = session.run(None, {"input": INPUTS.numpy()})
    for alone, all_rows in zip(one, found, strict=True):
        np.testing.assert_allclose(alone, all_rows[:1], atol=1e-5)
    return outputs, found


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.logits(x),
        lambda net, x: (net.logits(x),),
        lambda net, x: [net.logits(x)],
        lambda net, x: {"out": net.logits(x)},
        lambda net, x: OrderedDict(logits=net.logits(x)),
        lambda net, x: Named(net.logits(x), None),
        lambda net, x: Data(net.logits(x)),
        lambda net, x: net.logits(x)[:, :, None, None],
        lambda net, x: net.logits(x).double(),
    ],
)
def test_one_tensor_is_taken_out_of_what_is_returned(forward: Callable[[Net, Tensor], Any]) -> None:
    network = Net(forward).eval()
    found = outputs_of("nets:net", network, SIZE).of(network)(INPUTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, network.logits(INPUTS))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: Data(net.logits(x)),
        lambda net, x: net.head(net.body(x).view(x.size(0), -1)),
        lambda net, x: net.head(checkpoint(net.body, x, use_reentrant=False)),
        lambda net, x: net.logits(x) if x.shape[0] > 1 else net.head(net.body(x)),
        lambda net, x: net.logits(x.contiguous(memory_format=torch.channels_last)),
        lambda net, x: net.logits(x.clone().mul_(1.0)),
    ],
)
def test_what_people_write_in_forward_is_exported(forward: Callable[[Net, Tensor], Any]) -> None:
    network = Net(forward).eval()
    _, (found,) = exported(network)
    np.testing.assert_allclose(found, network.logits(INPUTS).detach().numpy(), atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("squeeze", [lambda x: x.squeeze(), lambda x: x.squeeze(1), lambda x: x[:, 0]])
def test_one_value_for_each_image_is_a_row_of_one(squeeze: Callable[[Tensor], Tensor]) -> None:
    network = Net(lambda net, x: squeeze(net.logits(x)), classes=1).eval()
    outputs, (found,) = exported(network)
    assert outputs.classes == 1
    np.testing.assert_allclose(found, network.logits(INPUTS).detach().numpy(), atol=1e-5)


PAIR = Net(lambda net, x: (net.logits(x), net.body(x))).eval()
BY_NAME = Net(lambda net, x: {"scores": net.logits(x), "features": net.body(x)}).eval()


@pytest.mark.parametrize(
    ("network", "asked", "others"),
    [
        (PAIR, ("logits", "-"), ()),
        (PAIR, ("logits", "features", "first=body.0"), ("features", "first")),
        (BY_NAME, ("features", "logits=scores"), ("features",)),
        (BY_NAME, ("logits", "embedding"), ("embedding",)),
        (Net(Net.logits).eval(), ("features=body", "logits"), ("features",)),
    ],
)
def test_outputs_are_named_or_picked_inside(network: Net, asked: tuple[str, ...], others: tuple[str, ...]) -> None:
    outputs, found = exported(network, asked)
    assert outputs.others == others
    by_name = dict(zip(others, found[1:], strict=True))
    np.testing.assert_allclose(found[0], network.logits(INPUTS).detach().numpy(), atol=1e-5)
    for name in {"features", "embedding"} & set(others):
        np.testing.assert_allclose(by_name[name], network.body(INPUTS).detach().numpy(), atol=1e-5)


def test_what_a_layer_makes_is_not_what_comes_behind_makes_of_it_in_place() -> None:
    network = Net(Net.logits).eval()
    network.body[1] = nn.ReLU(inplace=True)
    _, (_, early) = exported(network, ("logits", "early=body.0"))
    assert early.min() < 0
    np.testing.assert_allclose(early, network.body[0](INPUTS).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("network", "asked", "words"),
    [
        (PAIR, (), r"returns 2 tensors .*\[2, 3\], \[2, 4\].*--outputs logits,output1.*--outputs logits,-"),
        (BY_NAME, (), r"scores \[2, 3\], features \[2, 4\].*--outputs logits=scores,features.*--outputs logits=scores"),
        (PAIR, ("logits",), r"names 1 of what nets:net returns, and it returns 2.*- for one to leave out"),
        (PAIR, ("logits", "-", "f=bdy"), "no layer and returns no part bdy; it has body"),
        (Net(lambda net, x: net.logits(x).argmax(1)), (), r"int64: return the logits, before the argmax"),
        (Net(lambda net, x: net.head(net.body(x).view(2, -1))), (), r"takes 2 images at a time and not 3.*flatten"),
        (Net(lambda net, x: net.logits(x).mean(0, keepdim=True)), (), r"returns \[1, 3\] for two images"),
        (Net(lambda net, x: net.logits(x.to("cuda"))), (), r"names a device.*x\.device"),
        (Net(lambda net, x, labels: net.logits(x)), (), "must take the images alone"),
        (Net(lambda net, x: None), (), "returns no tensor"),
        (Net(lambda net, x: net.logits(x).mean()), (), r"returns \[\] for two images"),
        (Net(lambda net, x: net.logits(x) @ net.logits(x).T), (), r"\[3, 3\]\] for 3 images.*y @ y\.T"),
    ],
)
def test_what_cannot_be_exported_is_told_with_the_way_out(network: Net, asked: tuple[str, ...], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        outputs_of("nets:net", network, SIZE, asked)


def test_batch_statistics_that_need_several_images_are_told() -> None:
    network = Net(lambda net, x: nn.functional.batch_norm(net.logits(x), None, None, training=True))
    with pytest.raises(BadInput, match=r"not one image alone.*batch statistics need several"):
        outputs_of("nets:net", network, SIZE)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda net, x: torch.stack([net.logits(each[None])[0] for each in x]), "number of images is a constant"),
        (lambda net, x: net.logits(x.bfloat16().float()).bfloat16().float(), "computes in bfloat16"),
    ],
)
def test_a_graph_that_no_runtime_could_serve_is_told(forward: Callable[[Net, Tensor], Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        onnx_from_torch(Net(forward), PREPROCESS, uint8_input=False)


def test_parts_of_torchscript_are_named_and_averages_unwrapped() -> None:
    network = Net(Net.logits)
    assert bare("nets:net", torch.optim.swa_utils.AveragedModel(network))[1] == [", without AveragedModel"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        network.body = torch.jit.script(network.body)
    with pytest.raises(BadInput, match=r"its part body is TorchScript.*without torch\.jit"):
        bare("nets:net", network)


def test_a_reason_is_told_whole() -> None:
    def fail(net: Net, x: Tensor) -> Tensor:
        raise RuntimeError("because " * 80 + "of the end")

    with pytest.raises(BadInput, match="of the end"):
        outputs_of("nets:net", Net(fail), SIZE)


def test_parts_without_a_value_do_not_count() -> None:
    assert list(parts_of(Data(INPUTS))) == list(parts_of(Named(INPUTS, None))) == ["logits"]
    assert list(parts_of({"a": INPUTS, "b": None})) == ["a"]
    assert list(parts_of(3)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outputs": ("features",)}, "one of them logits"),
        ({"outputs": ("logits", "logits")}, "each name once"),
        ({"outputs": ("logits", "classes")}, "are taken"),
        ({"outputs": ("logits", "a b")}, "is no name"),
        ({"outputs": ("logits", "features=f6"), "steps": (Finetune(),), "calibration": Path()}, "by themselves"),
        ({"outputs": ("logits", "features=f6"), "steps": (Int8(qat_epochs=1),)}, "by themselves"),
        ({"task": "guessing"}, "is not one of classification, labels, regression, embedding"),
        ({"task": "regression", "eval": Path("test")}, "class folders say nothing about regression"),
    ],
)
def test_flags_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        ExportConfig("lenet5", **options)


def test_every_output_is_quantized_compared_described_and_served(tmp_path: Path) -> None:
    config = ExportConfig(
        "lenet5", repository=tmp_path, steps=(Int8(),), outputs=("logits", "features=f6"), batch=(1, 4)
    )
    published = run(config, Quiet())
    spread = published.report.parity.others["features"].spread
    assert spread is not None
    assert spread.kind == "embedding"
    assert 0 < (spread.error or 0) < 0.1
    described = text_format.Parse((tmp_path / "lenet5" / "config.pbtxt").read_text(), pb.ModelConfig())
    assert [(output.name, list(output.dims)) for output in described.output] == [("logits", [10]), ("features", [84])]
    session = session_of(published.folder / "model.onnx")
    assert [output.shape for output in session.get_outputs()] == [["batch", 10], ["batch", 84]]


class Trained(nn.Module):
    """Logits, an embedding and an auxiliary classifier's logits, which are told apart by their first number."""

    def __init__(self, way: Callable[[bool, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.way = nn.Conv2d(3, 5, 1), way

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x).mean((2, 3))
        return self.way(self.training, y, y[:, :4] + 10, y + 20)


@pytest.mark.parametrize(
    ("way", "asked", "count"),
    [
        (lambda t, y, e, a: {"out": y, "aux": a} if t else {"out": y}, (), 2),
        (lambda t, y, e, a: {"aux": a, "out": y} if t else {"out": y}, (), 2),
        (lambda t, y, e, a: (y, a) if t else y.double(), (), 2),
        (lambda t, y, e, a: (y, [a, a]) if t else y, (), 3),
        (lambda t, y, e, a: (y, e), ("logits", "embedding"), 1),
        (lambda t, y, e, a: (y, e), ("logits", "_"), 1),
        (lambda t, y, e, a: (y, e, a) if t else (y, e), ("logits", "embedding"), 2),
        (lambda t, y, e, a: (e, y, a) if t else (e, y), ("embedding", "logits"), 2),
    ],
)
def test_what_is_returned_in_training_alone_is_auxiliary(
    way: Callable[[bool, Tensor, Tensor, Tensor], Any], asked: tuple[str, ...], count: int
) -> None:
    """And no other output is: an embedding has no classes, and no loss."""
    network = Trained(way).eval()
    made = outputs_of("it", network, (3, 4, 4), asked).of(network).train()
    logits, *auxiliary = losses.outputs_of(made(torch.zeros(2, 3, 4, 4)))
    assert logits.shape == (2, 5)
    assert logits.abs().max() < 5
    assert len(auxiliary) == count - 1
    assert all(tensor.min() > 15 for tensor in auxiliary)
