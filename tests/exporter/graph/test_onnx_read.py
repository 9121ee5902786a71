"""Files that others made: read, or refused in one line."""

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.commands import inspect_command, lint_command
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_read import read_model, reading


def network() -> onnx.ModelProto:
    """A small quantized network with a batch normalisation and a matrix."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "b", "b", "b", "b"], ["n"]),
        helper.make_node("GlobalAveragePool", ["n"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["y"]),
    ]
    constants = {
        "s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "b": np.ones(4, np.float32),
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "m": np.ones((4, 5), np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def weights(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == "w")


def huge(model: onnx.ModelProto) -> None:
    weights(model).dims[:] = [2**20, 2**20]


def overflowing(model: onnx.ModelProto) -> None:
    weights(model).dims[:] = [2**62, 2**62, 2**62]


def negative(model: onnx.ModelProto) -> None:
    weights(model).dims[:] = [-4, -27]


def unknown_type(model: onnx.ModelProto) -> None:
    weights(model).data_type = 99


def too_few(model: onnx.ModelProto) -> None:
    weights(model).ClearField("raw_data")
    weights(model).float_data.extend([1.0, 2.0])


def within_a_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="k", data_type=TensorProto.INT4, dims=[2**40])
    model.graph.node.add(op_type="Constant", output=["k"]).attribute.append(helper.make_attribute("value", tensor))


def long_file(model: onnx.ModelProto) -> None:
    tensor = weights(model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("length", "99999999999999")):
        tensor.external_data.add(key=key, value=value)


def odd_offset(model: onnx.ModelProto) -> None:
    long_file(model)
    weights(model).external_data.add(key="offset", value="-1")


def no_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 2**60


def circle(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[0] = "f"


def circle_through_a_body(model: onnx.ModelProto) -> None:
    """The branch of an If reads what comes of it."""
    result = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Relu", ["y"], ["t"])], "b", [], [result])
    model.graph.node[4].CopyFrom(helper.make_node("If", ["x"], ["g"], then_branch=body, else_branch=body))


def circle_within_a_body(model: onnx.ModelProto) -> None:
    result = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Relu", ["t"], ["s"]), helper.make_node("Relu", ["s"], ["t"])]
    body = helper.make_graph(nodes, "b", [], [result])
    model.graph.node[4].CopyFrom(helper.make_node("If", ["x"], ["g"], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (circle, "lead in a circle, with GlobalAveragePool 'g' in it"),
        (circle_through_a_body, "lead in a circle, with If 'g' in it"),
        (circle_within_a_body, "lead in a circle, with Relu 's' in it"),
        (huge, r"'w' holds 432 bytes; FLOAT\[1048576, 1048576\] needs 1099511627776 numbers"),
        (overflowing, "holds 432 bytes"),
        (negative, r"has the shape \[-4, -27\]"),
        (unknown_type, "unknown type 99"),
        (too_few, r"'w' holds 2 numbers; FLOAT\[4, 3, 3, 3\] needs 108 numbers"),
        (within_a_constant, r"'k' holds 0 numbers; INT4"),
        (long_file, "has 99999999999999 bytes of its file"),
        (odd_offset, "lies at '99999999999999' and '-1'|lies at '-1'"),
        (no_opset, "states opset 1152921504606846976"),
    ],
)
def test_what_a_file_declares_and_does_not_hold_is_told(change: object, words: str, tmp_path: Path) -> None:
    model = network()
    change(model)  # type: ignore[operator]
    file = tmp_path / "m.onnx"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match=words):
        read_model(file)


def test_whatever_may_be_stored_is_read(tmp_path: Path) -> None:
    model = network()
    for number, kind in enumerate(sorted(set(TensorProto.DataType.values()) - {0, TensorProto.STRING})):
        for shape in ([], [0], [3], [2, 5]):
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            tensor = numpy_helper.from_array(np.zeros(shape, dtype), f"raw{number}{shape}")
            model.graph.initializer.append(tensor)
            listed = helper.make_tensor(f"list{number}{shape}", kind, shape, np.zeros(shape).reshape(-1).tolist())
            model.graph.initializer.append(listed)
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b"]))
    assert read_model(model.SerializeToString()) == model
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    assert len(read_model(tmp_path / "m.onnx").graph.initializer) == len(model.graph.initializer)


def test_nodes_in_another_order_are_no_circle() -> None:
    model = network()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    model.graph.node.extend(
        helper.make_node("Relu", [f"r{i}" if i else "y"], [f"r{i + 1}"]) for i in range(3000, -1, -1)
    )
    assert read_model(model.SerializeToString())


def broken(rng: random.Random) -> bytes:
    """The network with bytes changed, or with nodes, attributes and types that do not fit together."""
    model = network()
    if rng.random() < 0.4:
        content = bytearray(model.SerializeToString())
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content)
    for _ in range(rng.randint(1, 3)):
        node, tensor = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
        change = rng.randrange(9)
        if change == 0:
            node.output[:] = []
        elif change == 1:
            node.input[:] = node.input[: rng.randrange(3)]
        elif change == 2:
            node.op_type = rng.choice(["", "Loop", "If", "Conv", "QuantizeLinear", "MatMul", "Split", "\n<b>"])
        elif change == 3:
            tensor.data_type = rng.choice([0, 1, 2, 3, 7, 10, 16, 17, 21, 99])
        elif change == 4:
            tensor.dims[:] = [rng.choice([-1, 0, 2, 2**40])] * rng.randint(0, 5)
        elif change == 5:
            name = rng.choice(["kernel_shape", "axis", "group", "perm", "to", "pads"])
            value = rng.choice([[0, -1], 2**62, -5, "text", 1e38, [1.5]])
            node.attribute.append(helper.make_attribute(name, value))
        elif change == 6:
            model.graph.input[0].ClearField("type")
        elif change == 7:
            node.output[:] = [rng.choice([model.graph.node[0].op_type, "x", ""])]
        else:
            model.opset_import[0].version = rng.choice([-1, 0, 5, 7, 30, 2**40])
    return model.SerializeToString()


def test_a_model_that_is_valid_is_not_said_to_be_none() -> None:
    said = r"^net.onnx cannot be used: KeyError: .*nothing wrong with it"
    with pytest.raises(BadInput, match=said), reading("net.onnx", network()):
        raise KeyError("x")


def test_no_file_is_a_bug_of_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(3)
    file = tmp_path / "m.onnx"
    for _ in range(250):
        file.write_bytes(broken(rng))
        for command, codes in ((lint_command.lint, {0, 2, 3}), (inspect_command.inspect, {0, 2})):
            code = command([str(file)])
            told = capfd.readouterr().err
            assert code in codes, told
            assert "bug in Convoy" not in told
            assert told.count("\n") <= 1
