"""Look-ups over a graph, also of what the graphs within a node read by name."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node

from convoynet.exporter.graph.onnx_graph import CAPTURED, Edge, Graph, before, bodies_of, captured
from convoynet.exporter.quantization.layer_data import cut
from tests.exporter.onnx_runs import session_of

SHAPE = ["n", 2]


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)


def branching() -> onnx.ModelProto:
    """x -> hidden = x + one -> an If whose branches read `hidden`, and `one` and `two` an If further within."""
    inner = helper.make_node(
        "If",
        ["yes"],
        ["inner"],
        then_branch=helper.make_graph([make_node("Mul", ["hidden", "two"], ["a"])], "a", [], [value("a")]),
        else_branch=helper.make_graph([make_node("Mul", ["twice", "one"], ["b"])], "b", [], [value("b")]),
    )
    then = helper.make_graph([make_node("Add", ["hidden", "hidden"], ["twice"]), inner], "t", [], [value("inner")])
    otherwise = helper.make_graph([make_node("Neg", ["hidden"], ["c"])], "e", [], [value("c")])
    nodes = [
        make_node("Add", ["x", "one"], ["hidden"]),
        make_node("Add", ["x", "one"], ["same"]),
        make_node("If", ["yes"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    stored = {"one": np.ones(2, np.float32), "two": np.full(2, 2, np.float32), "yes": np.array(True)}
    kept = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_every_operator_of_onnx_with_a_body_is_looked_into() -> None:
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    body = helper.make_graph([], "body", [], [])
    for schema in onnx.defs.get_all_schemas():
        for name, told in schema.attributes.items():
            if told.type.value in kinds:
                node = make_node(schema.name, [], ["y"], domain=schema.domain, **{name: body})
                assert len(bodies_of(node)) == 1, schema.name


def test_what_a_body_reads_is_read() -> None:
    graph = Graph(branching())
    chosen = graph.producers["y"]
    assert sorted(captured(chosen)) == ["hidden", "one", "two", "yes"]
    assert graph.readings["hidden"] == [Edge("hidden", "y", CAPTURED)]
    assert graph.activations(chosen) == ["hidden"]
    assert [node.output[0] for node in before(graph, ["y"])] == ["hidden", "y"]


def test_a_part_of_a_graph_has_what_its_bodies_read() -> None:
    model = branching()
    x = np.array([[1.0, -3.0]], np.float32)
    part = cut(model, ["y"])
    np.testing.assert_array_equal(session_of(part).run(None, {"x": x})[0], session_of(model).run(None, {"x": x})[0])


def test_what_a_body_reads_stays_and_follows_a_new_name() -> None:
    model = branching()
    x = np.array([[1.0, -3.0]], np.float32)
    (before_it,) = session_of(model).run(None, {"x": x})
    graph = Graph(model)
    graph.rewire("hidden", "same")
    graph.refresh()
    graph.drop_unread()
    assert [node.output[0] for node in graph] == ["same", "y"]
    assert set(graph.initializers) == {"one", "two", "yes"}
    np.testing.assert_array_equal(session_of(model).run(None, {"x": x})[0], before_it)
