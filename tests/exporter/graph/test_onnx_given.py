"""ONNX files of other exporters: what is read of them, and that the graph made of each computes what the file does."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from convoynet.exporter.archs import custom
from convoynet.exporter.archs.onnx_network import OnnxNetwork, float_outputs
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph import onnx_given
from convoynet.exporter.graph.onnx_from_given import onnx_from_given
from convoynet.exporter.graph.onnx_read import reading
from convoynet.exporter.graph.onnx_to_torch import TorchGraph
from convoynet.exporter.pipeline import given
from convoynet.exporter.recipe import Fp16, Int8
from tests.exporter.commands.mutations import convolutional, mutated, with_bodies
from tests.exporter.given_files import SIZE, Small, any_batch, by_hand, from_torch
from tests.exporter.onnx_runs import operators, run, session_of

Made = tuple[onnx.ModelProto, OnnxNetwork, ExportConfig]


def made_of(path: Path, **options: Any) -> Made:
    """What becomes of a file, as far as an export looks at it before it has images."""
    config = ExportConfig(str(path), **options)
    given.lint_file(path)
    arch = custom.resolve(config)
    config, _ = given.as_given(config, arch)
    network = arch.build(arch.num_classes)
    assert isinstance(network, OnnxNetwork)
    arch.deploy(network)
    with reading(str(path), network.given.model):
        graph = onnx_from_given(
            network.given,
            float_outputs(network),
            arch.preprocess,
            uint8_input=config.input == "uint8",
            opset=config.onnx_opset,
            task=arch.task,
        )
    return graph, network, config


def of_the_file(path: Path, inputs: np.ndarray, batch: int) -> list[np.ndarray]:
    session = session_of(path)
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: inputs[at : at + batch]}) for at in range(0, len(inputs), batch)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


class Fixed(nn.Module):
    """Says how many images there are in a way that no other number can stand for."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.small = count, Small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x H x W -> N x classes."""
        made: torch.Tensor = self.small(x)
        return made.reshape(self.count * 5).reshape(-1, 5, 1).sum(-1) / made.reshape(-1, self.count * 5).abs().max()


def hub(path: Path, **options: Any) -> Path:
    return by_hand(path, weights_are_inputs=True, **options)


KINDS: dict[str, tuple[Callable[[Path], Path], str, int]] = {
    "hub, opset 7": (lambda path: hub(path, opset=7), "NCHW", 4),
    "hub, opset 9, one image": (lambda path: hub(path, opset=9, batch=1), "NCHW", 1),
    "opset 11, eight images": (lambda path: by_hand(path, opset=11, batch=8), "NCHW", 8),
    "channels last": (lambda path: by_hand(path, layout="NHWC", batch="unk__6"), "NHWC", 4),
    "no shapes of outputs": (lambda path: by_hand(path, output_shape=False), "NCHW", 4),
    "names that no server takes": (lambda path: by_hand(path, names=("input:0", "a b/ü:0")), "NCHW", 4),
    "our own names elsewhere": (lambda path: by_hand(path, names=("logits", "input")), "NCHW", 4),
    "TorchScript": (lambda path: from_torch(path, dynamo=False, opset_version=11), "NCHW", 2),
    "torch.export, one image": (lambda path: from_torch(path, example=torch.rand(1, 3, SIZE, SIZE)), "NCHW", 1),
    "torch.export, any number": (any_batch, "NCHW", 4),
}


@pytest.mark.parametrize("pixels", [False, True], ids=["float", "pixels"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_of_a_file_takes_any_batch_and_computes_what_the_file_does(
    kind: str, pixels: bool, tmp_path: Path
) -> None:
    make, layout, batch = KINDS[kind]
    path = make(tmp_path / "theirs.onnx")
    options = {"input": "uint8", "mean": (0.0,) * 3, "std": (1.0,) * 3} if pixels else {}
    graph, network, _ = made_of(path, **options)
    images = np.random.default_rng(1).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
    floats = (images / np.float32(255)).astype(np.float32)
    firsts = floats.transpose(0, 3, 1, 2).copy()
    (wanted,) = of_the_file(path, floats if layout == "NHWC" else firsts, batch)
    (value,), (logits,) = graph.graph.input, graph.graph.output
    assert (value.name, logits.name) == ("input", "logits")
    for size in (1, 3, 8):
        np.testing.assert_allclose(run(graph, (images if pixels else firsts)[:size]), wanted[:size], 1e-4, 1e-5)
    found = network(torch.from_numpy(firsts))
    np.testing.assert_allclose(found.numpy(), wanted, 1e-4, 1e-5)
    # It is cleaned as our own are.
    left = operators(graph)
    assert not left.keys() & {"Dropout", "BatchNormalization", "Identity", "Constant"}
    assert left["Transpose"] == int(pixels)


def test_a_file_that_takes_pixels_keeps_its_own_normalisation(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "pixels.onnx", layout="NHWC", kind=TensorProto.UINT8)
    images = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    (wanted,) = of_the_file(path, images, 4)
    for form in ("uint8", "float32"):
        graph, network, _ = made_of(path, input=form)
        floats = (images / np.float32(255)).transpose(0, 3, 1, 2).copy()
        np.testing.assert_allclose(run(graph, images if form == "uint8" else floats), wanted, 1e-4, 1e-5)
        np.testing.assert_allclose(network(torch.from_numpy(floats)).numpy(), wanted, 1e-4, 1e-5)
    with pytest.raises(BadInput, match=r"--mean: .* takes uint8 pixels, and normalises them itself"):
        made_of(path, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_kernel_that_only_the_weights_state_is_trained_as_well(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "net.onnx")
    assert all(each.name != "kernel_shape" for node in onnx.load(path).graph.node for each in node.attribute)
    graph, network, _ = made_of(path)
    images = np.random.default_rng(1).random((2, 3, SIZE, SIZE), np.float32)
    with torch.no_grad():
        made = TorchGraph(graph)(torch.from_numpy(images))
    np.testing.assert_allclose(made.numpy(), network(torch.from_numpy(images)).numpy(), 1e-4, 1e-5)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)
    images = np.random.default_rng(1).random((4, 3, SIZE, SIZE), np.float32)
    (wanted,) = of_the_file(path, images.astype(np.float16), 4)
    graph, network, _ = made_of(path)
    assert {tensor.data_type for tensor in graph.graph.initializer} == {TensorProto.FLOAT}
    np.testing.assert_allclose(run(graph, images), wanted.astype(np.float32), 3e-2, 1e-2)
    assert "its float" in network.title
    assert "numbers were made float32" in network.notes[0]


def test_an_open_size_is_set_by_the_flag_or_by_default(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "open.onnx", size=("height", "width"))
    for options, size in (({"input_size": (24, 20)}, (24, 20)), ({}, (224, 224))):
        graph, _, _ = made_of(path, **options)
        dims = graph.graph.input[0].type.tensor_type.shape.dim
        assert tuple(dim.dim_value for dim in dims[2:]) == size
    with pytest.raises(BadInput, match="takes images of 16x16 pixels; leave the option out"):
        made_of(by_hand(tmp_path / "fixed.onnx"), input_size=(24, 24))


def test_a_file_that_takes_one_image_stays_so_where_others_give_something_else(tmp_path: Path) -> None:
    path = from_torch(tmp_path / "one.onnx", Fixed(1), example=torch.rand(1, 3, SIZE, SIZE), dynamo=False)
    graph, network, config = made_of(path)
    assert config.batch_range("classification") == (1, 1)
    assert "one image at a time" in network.notes[-1]
    images = np.random.default_rng(1).random((2, 3, SIZE, SIZE), np.float32)
    (wanted,) = of_the_file(path, images, 1)
    np.testing.assert_allclose(run(graph, images[1:]), wanted[1:], 1e-4, 1e-5)
    with pytest.raises(BadInput, match=r"--batch 1:4: .*one.onnx takes one image at a time"):
        made_of(path, batch=(1, 4))
    path = from_torch(tmp_path / "two.onnx", Fixed(2), example=torch.rand(2, 3, SIZE, SIZE), dynamo=False)
    with pytest.raises(BadInput, match="takes exactly 2 images at a time"):
        made_of(path)


class Several(nn.Module):
    """Returns logits, features and a mask for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """N x 3 x H x W -> logits, features [N, 16, 1, 1]."""
        features = self.small.features(x).mean((2, 3), keepdim=True)
        return self.small.head(features.flatten(1)), features


def test_several_outputs_are_named_as_those_of_a_network(tmp_path: Path) -> None:
    axes = {0: torch.export.Dim("batch", min=1)}
    path = from_torch(
        tmp_path / "several.onnx", Several(), dynamic=(axes,), output_names=["scores", "deep"], external_data=False
    )
    with pytest.raises(BadInput, match=r"returns 2 tensors .*--outputs logits=scores,deep"):
        made_of(path)
    graph, network, _ = made_of(path, outputs=("embedding=deep", "logits=scores"))
    assert [value.name for value in graph.graph.output] == ["logits", "embedding"]
    images = np.random.default_rng(1).random((3, 3, SIZE, SIZE), np.float32)
    scores, deep = of_the_file(path, images, 3)
    session = session_of(graph)
    for found in (session.run(None, {"input": images}), [one.numpy() for one in network(torch.from_numpy(images))]):
        np.testing.assert_allclose(found[0], scores, 1e-4, 1e-5)
        np.testing.assert_allclose(found[1], deep.reshape(3, -1), 1e-4, 1e-5)


def test_a_map_gets_its_classes(tmp_path: Path) -> None:
    axes = {0: torch.export.Dim("batch", min=1)}
    path = from_torch(tmp_path / "map.onnx", nn.Conv2d(3, 4, 3), dynamic=(axes,), external_data=False)
    graph, _, _ = made_of(path)
    assert [value.name for value in graph.graph.output] == ["logits", "classes"]


def test_weights_in_files_beside_it_are_read_and_no_others(tmp_path: Path) -> None:
    path = any_batch(tmp_path / "theirs.onnx")
    model = onnx.load(path)
    folder = tmp_path / "apart"
    folder.mkdir()
    outside = folder / "theirs.onnx"
    onnx.save(model, outside, save_as_external_data=True, location="weights.bin", size_threshold=256)
    graph, network, _ = made_of(outside)
    images = np.random.default_rng(1).random((3, 3, SIZE, SIZE), np.float32)
    np.testing.assert_allclose(run(graph, images), of_the_file(path, images, 3)[0], 1e-4, 1e-5)
    assert not any(tensor.external_data for tensor in graph.graph.initializer)
    assert sum(tensor.numel() for tensor in network.parameters()) > 1000
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    with pytest.raises(BadInput, match=r"theirs\.onnx: .*weights\.bin"):
        made_of(outside)
    for where in ("../weights.bin", str(tmp_path / "weights.bin")):
        light = onnx.load(outside, load_external_data=False)
        for tensor in light.graph.initializer:
            for entry in tensor.external_data:
                entry.value = where if entry.key == "location" else entry.value
        outside.write_bytes(light.SerializeToString())
        with pytest.raises(BadInput, match=r"theirs\.onnx: .*weights\.bin"):
            made_of(outside)


def quantized_file(path: Path) -> Path:
    """As ONNX Runtime's own tools quantize: pairs of QuantizeLinear and DequantizeLinear."""
    source = by_hand(path.with_name("float.onnx"), opset=17)
    model = onnx.load(source)
    for name, value in (("s", np.float32(0.02)), ("z", np.uint8(128))):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["data", "s", "z"], ["q"]))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]))
    next(node for node in model.graph.node if node.op_type == "Conv").input[0] = "dq"
    onnx.save(model, path)
    return path


def test_a_quantized_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = quantized_file(tmp_path / "small.onnx")
    graph, _, config = made_of(path)
    assert config.precision == "int8"
    assert operators(graph)["BatchNormalization"] == 1
    with pytest.raises(BadInput, match=r"--int8: .*small.onnx is quantized already \(it has QuantizeLinear\)"):
        made_of(path, steps=(Int8(),))
    with pytest.raises(BadInput, match="--fp16: "):
        made_of(path, steps=(Fp16(),), target="gpu")


def a_second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("times", TensorProto.FLOAT, [1]))
    model.graph.node.append(helper.make_node("Mul", ["prob", "times"], ["scaled"]))
    model.graph.output[0].name = "scaled"


def too_new(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def of_a_later_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 90


def with_rows(model: onnx.ModelProto) -> None:
    del model.graph.node[:-1]
    model.graph.node[0].input[0] = "data"
    del model.graph.input[0].type.tensor_type.shape.dim[2:]
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8


def for_four_channels(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


def returning_indices(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ArgMax", ["prob"], ["best"], axis=1, keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["N"]))


def returning_boxes(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 5, 1], np.int64), "boxes"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 3], np.int64), "times"))
    model.graph.node.append(helper.make_node("Reshape", ["prob", "boxes"], ["b"]))
    model.graph.node.append(helper.make_node("Tile", ["b", "times"], ["bb"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("bb", TensorProto.FLOAT, ["N", 5, 3]))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (a_second_input, r"has 2 inputs \(data \[\?, 3, 16, 16\], times \[1\]\).*`convoy serve .*` serves it as it is"),
        (too_new, "the model has IR version 99: ONNX Runtime reads 13 and older"),
        (of_a_later_opset, "the model has opset 90: ONNX Runtime reads 7 to 26"),
        (with_rows, r"is no batch of images, \[N, C, H, W\] or \[N, H, W, C\]"),
        (for_four_channels, "has no axis of 3 channels, or 1 in grey"),
        (returning_indices, r"returns int64 \[2\] for two images"),
        (returning_boxes, r"returns float32 \[2, 5, 3\] for two images.*`convoy serve"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    change: Callable[[onnx.ModelProto], None], line: str, tmp_path: Path
) -> None:
    path = by_hand(tmp_path / "odd.onnx", change=change)
    with pytest.raises(BadInput, match=line) as told:
        made_of(path)
    assert "\n" not in str(told.value)
    assert "odd.onnx" in str(told.value)


def test_what_is_no_onnx_and_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.onnx"
    for content in (b"", b"not a model", by_hand(tmp_path / "whole.onnx").read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"broken\.onnx"):
            made_of(path)
    monkeypatch.setattr(onnx_given, "_MAX_BYTES", 100)
    with pytest.raises(BadInput, match="one ONNX file holds less than 2; `convoy serve"):
        made_of(tmp_path / "whole.onnx")


def test_no_broken_file_makes_an_export_speak_of_a_bug(tmp_path: Path) -> None:
    hub_like = hub(tmp_path / "hub.onnx", opset=8, layout="NHWC", batch=1).read_bytes()
    whole = [by_hand(tmp_path / "plain.onnx").read_bytes(), hub_like, convolutional(), with_bodies()]
    path, taken, said = tmp_path / "broken.onnx", 0, ""
    for index in range(160):
        path.write_bytes(mutated(whole[index % len(whole)], random.Random(index)))
        try:
            made_of(path, opset=20 if index % 2 else None)
            taken += 1
        except BadInput as error:
            said += str(error)
    assert "\n" not in said
    assert 0 < taken < 80
