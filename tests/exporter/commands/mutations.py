"""Breaks ONNX files in the ways that rules can be broken, and tells what the commands say of them.

    python -m tests.exporter.commands.mutations FOLDER SEED COUNT

prints a line of JSON for each file and command. A process of its own, since a library may take it down with it.
"""

import contextlib
import io
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.commands import build_command, compare_command, inspect_command, lint_command

Change = Callable[[onnx.ModelProto, random.Random], None]

_NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**40, -(2**40), 2**62)
_NAMES = ("", "x", "y", "nope", "\n<b>", "\0", "é" * 300, "kernel_shape", "axis", "scale", "../../../etc/passwd")
_OPERATORS = (
    *(
        "",
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "Relu",
        "Clip",
        "Concat",
        "Reshape",
        "Resize",
        "Loop",
        "If",
        "Scan",
    ),
    *(
        "QuantizeLinear",
        "DequantizeLinear",
        "BatchNormalization",
        "Constant",
        "Identity",
        "Cast",
        "Pad",
        "Split",
        "Foo",
    ),
)
_ATTRIBUTES = (
    *("kernel_shape", "strides", "pads", "dilations", "group", "axis", "perm", "to", "epsilon", "auto_pad", "mode"),
    *("value", "transB", "alpha", "axes", "keepdims", "block_size"),
)
_VALUES = (
    [],
    [0],
    [1, 1],
    [0, -1],
    [2**40, 2**40],
    [1.5],
    0,
    -5,
    2**62,
    1e38,
    float("nan"),
    "SAME_UPPER",
    "text",
    b"\xff",
)
_TYPES = (*range(28), 99, -1)


def convolutional() -> bytes:
    """Two convolutions, one of them in INT8, a normalisation, a branch, pooling, and a classifier."""
    numbers = np.random.default_rng(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["w8", "scales", "zeros"], ["w"], name="weights", axis=0),
        helper.make_node("Conv", ["d", "w", "b"], ["c"], name="first", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "b", "b", "b", "v"], ["n"], name="norm"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["c2"], name="depthwise", group=4, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r"], ["a"], name="add"),
        helper.make_node("Concat", ["a", "r"], ["k"], name="concat", axis=1),
        helper.make_node("GlobalAveragePool", ["k"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "fc"], ["logits"], name="classifier"),
    ]
    stored = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "w8": numbers.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8),
        "scales": np.full(4, 0.01, np.float32),
        "zeros": np.zeros(4, np.int8),
        "b": np.ones(4, np.float32),
        "v": np.ones(4, np.float32),
        "w2": numbers.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "fc": numbers.normal(size=(8, 5)).astype(np.float32),
    }
    return _model(nodes, stored, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])])


def with_bodies() -> bytes:
    """Constants that are nodes, a reshape by a computed shape, a resize, and a graph within a graph."""
    body = helper.make_graph(
        [helper.make_node("Relu", ["s"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["s"], ["t"])],
        "else",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    kernel = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32))
    nodes = [
        helper.make_node("Constant", [], ["k"], value=kernel),
        helper.make_node("Conv", ["input", "k"], ["s"], name="conv", strides=[2, 2]),
        helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("", TensorProto.BOOL, [], [True])),
        helper.make_node("If", ["yes"], ["i"], name="choose", then_branch=body, else_branch=other),
        helper.make_node("Resize", ["i", "", "sizes"], ["z"], name="resize", mode="nearest"),
        helper.make_node("Shape", ["z"], ["shape"], start=0, end=1),
        helper.make_node("Concat", ["shape", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["z", "target"], ["logits"], name="reshape"),
    ]
    stored = {"sizes": np.array([1, 1, 2, 2], np.float32), "rest": np.array([-1], np.int64)}
    return _model(nodes, stored, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "values"])])


def _model(nodes: list[onnx.NodeProto], stored: dict[str, object], outputs: list[onnx.ValueInfoProto]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "mutated",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    whole: bytes = model.SerializeToString()
    return whole


def mutated(data: bytes, random: random.Random) -> bytes:
    """Break a model: three times in five by its parts, else by its bytes."""
    if random.random() < 0.6:
        model = onnx.load_model_from_string(data)
        for _ in range(random.randint(1, 3)):
            with contextlib.suppress(ValueError, TypeError, IndexError):  # it was broken too much for this change
                random.choice(_CHANGES)(model, random)
        broken: bytes = model.SerializeToString()
        return broken
    content = bytearray(data[: random.randrange(len(data))] if random.random() < 0.2 else data)
    for _ in range(random.randint(1, 10)):
        if content:
            content[random.randrange(len(content))] = random.randrange(256)
    return bytes(content)


def _node(model: onnx.ModelProto, random: random.Random) -> onnx.NodeProto:
    return random.choice(model.graph.node)


def _tensor(model: onnx.ModelProto, random: random.Random) -> onnx.TensorProto:
    return random.choice(model.graph.initializer)


def _value(model: onnx.ModelProto, random: random.Random) -> onnx.ValueInfoProto:
    return random.choice([*model.graph.input, *model.graph.output])


def _rename_input(model: onnx.ModelProto, random: random.Random) -> None:
    node = _node(model, random)
    node.input[random.randrange(len(node.input))] = random.choice([*_NAMES, *node.output])


def _rename_output(model: onnx.ModelProto, random: random.Random) -> None:
    node = _node(model, random)
    node.output[random.randrange(len(node.output))] = random.choice([*_NAMES, _node(model, random).output[0]])


def _more_inputs(model: onnx.ModelProto, random: random.Random) -> None:
    _node(model, random).input.extend(random.choices(_NAMES, k=random.randint(1, 4)))


def _reshape_tensor(model: onnx.ModelProto, random: random.Random) -> None:
    _tensor(model, random).dims[:] = random.choices(_NUMBERS, k=random.randint(0, 5))


def _retype_tensor(model: onnx.ModelProto, random: random.Random) -> None:
    _tensor(model, random).data_type = random.choice(_TYPES)


def _refill_tensor(model: onnx.ModelProto, random: random.Random) -> None:
    tensor = _tensor(model, random)
    tensor.raw_data = random.choice([b"", random.randbytes(7), random.randbytes(len(tensor.raw_data))])


def _special_numbers(model: onnx.ModelProto, random: random.Random) -> None:
    tensor = _tensor(model, random)
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = random.choice([tuple(tensor.dims), (1,), (), (0,), (3,), (2, 2)])
    special = (
        np.full(shape, random.choice([0, 1, -1, np.nan, np.inf, 1e-45, 3e38])) if kind.kind == "f" else np.zeros(shape)
    )
    tensor.CopyFrom(numpy_helper.from_array(special.astype(kind), tensor.name))


def _outside(model: onnx.ModelProto, random: random.Random) -> None:
    tensor = _tensor(model, random)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(
        key="location", value=random.choice(["../../../etc/passwd", "/etc/passwd", "", ".", "a\0b"])
    )
    tensor.external_data.add(key="length", value=random.choice(["-1", "abc", "99999999999999", "12"]))


def _drop_tensor(model: onnx.ModelProto, random: random.Random) -> None:
    del model.graph.initializer[random.randrange(len(model.graph.initializer))]


def _twice(model: onnx.ModelProto, random: random.Random) -> None:
    model.graph.initializer.append(_tensor(model, random))


def _operator(model: onnx.ModelProto, random: random.Random) -> None:
    _node(model, random).op_type = random.choice(_OPERATORS)


def _domain(model: onnx.ModelProto, random: random.Random) -> None:
    _node(model, random).domain = random.choice(["com.microsoft", "ai.onnx.ml", "x", "\0"])


def _drop_attributes(model: onnx.ModelProto, random: random.Random) -> None:
    del _node(model, random).attribute[:]


def _attribute(model: onnx.ModelProto, random: random.Random) -> None:
    node = _node(model, random)
    node.attribute.append(
        helper.make_attribute(random.choice(_ATTRIBUTES), random.choice([v for v in _VALUES if v != []]))
    )


def _wrong_kind(model: onnx.ModelProto, random: random.Random) -> None:
    attribute = random.choice([a for node in model.graph.node for a in node.attribute])
    attribute.type = random.randrange(15)  # type: ignore[assignment]


def _drop_node(model: onnx.ModelProto, random: random.Random) -> None:
    del model.graph.node[random.randrange(len(model.graph.node))]


def _other_order(model: onnx.ModelProto, random: random.Random) -> None:
    node = model.graph.node.pop(random.randrange(len(model.graph.node)))
    model.graph.node.insert(random.randrange(len(model.graph.node) + 1), node)


def _dimension(model: onnx.ModelProto, random: random.Random) -> None:
    dimension = random.choice(_value(model, random).type.tensor_type.shape.dim)
    dimension.dim_value = random.choice(_NUMBERS)


def _dimensions(model: onnx.ModelProto, random: random.Random) -> None:
    _value(model, random).type.tensor_type.ClearField("shape")


def _value_type(model: onnx.ModelProto, random: random.Random) -> None:
    _value(model, random).type.tensor_type.elem_type = random.choice(_TYPES)


def _no_type(model: onnx.ModelProto, random: random.Random) -> None:
    random.choice([lambda v: v.ClearField("type"), lambda v: v.type.sequence_type.elem_type.tensor_type.SetInParent()])(
        _value(model, random)
    )


def _value_name(model: onnx.ModelProto, random: random.Random) -> None:
    _value(model, random).name = random.choice(_NAMES)


def _no_values(model: onnx.ModelProto, random: random.Random) -> None:
    del random.choice([model.graph.input, model.graph.output])[:]


def _opset(model: onnx.ModelProto, random: random.Random) -> None:
    random.choice(
        [
            lambda: setattr(model.opset_import[0], "version", random.choice([-1, 0, 1, 7, 13, 26, 99, 2**60])),
            lambda: model.ClearField("opset_import"),
            lambda: setattr(model, "ir_version", random.choice([0, 1, 3, 99, 2**60])),
        ]
    )()


_CHANGES: tuple[Change, ...] = (
    *(_rename_input, _rename_output, _more_inputs, _reshape_tensor, _retype_tensor, _refill_tensor, _special_numbers),
    *(_outside, _drop_tensor, _twice, _operator, _domain, _drop_attributes, _attribute, _wrong_kind, _drop_node),
    *(_other_order, _dimension, _dimensions, _value_type, _no_type, _value_name, _no_values, _opset),
)


def _describe(model: Path) -> None:
    """Write what `convoy compare` reads of an exported model."""
    preprocess = {"size": [8, 8], "resize": 8, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    text = json.dumps(json.dumps(preprocess))
    (model / "config.pbtxt").write_text(f'parameters {{ key: "preprocess" value {{ string_value: {text} }} }}')
    (model / "report.json").write_text('{"precision": "fp32", "parameters": {"after": 1}, "macs": {"after": 1}}')
    (model / "labels.txt").write_text("a\nb\nc\nd\ne\n")


def main(folder: Path, seed: int, count: int) -> None:
    """Break `count` files and give each to the commands; a line tells seed, command, exit code, words and seconds."""
    model = folder / "model"
    version = model / "1"
    version.mkdir(parents=True, exist_ok=True)
    file, plan = version / "model.onnx", folder / "a.plan"
    _describe(model)
    sources = convolutional(), with_bodies()
    commands: dict[str, Callable[[], int]] = {
        "lint": lambda: lint_command.lint([str(file)]),
        "inspect": lambda: inspect_command.inspect([str(file)]),
        "compare": lambda: compare_command.compare([str(model)]),
        "build": lambda: build_command.build([str(file), "--output", str(plan), "--batch", "1", "--progress", "none"]),
    }
    for number in range(seed, seed + count):
        chosen = random.Random(number)
        file.write_bytes(mutated(chosen.choice(sources), chosen))
        for name, command in commands.items():
            print(
                json.dumps({"seed": number, "command": name}), flush=True
            )  # if this is the last line, that took all down
            said, began = io.StringIO(), time.monotonic()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = command()
            told = {"seed": number, "command": name, "code": code, "said": said.getvalue()[-2000:]}
            print(json.dumps(told | {"seconds": round(time.monotonic() - began, 3)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
