"""What config.pbtxt says to clients."""

import pytest
from onnx import TensorProto, helper

from convoynet.exporter.archs import Task
from convoynet.exporter.publishing import model_config
from convoynet.protos.inference import model_config_pb2 as pb


@pytest.mark.parametrize(
    ("operators", "classes", "task", "expected"),
    [
        (["Gemm"], 5, None, "softmax"),
        (["Gemm", "LogSoftmax"], 5, None, "softmax"),  # whose softmax is the same
        (["Gemm", "Softmax"], 5, None, "none"),
        (["Gemm", "Sigmoid", "Flatten"], 5, None, "none"),
        (["Sigmoid", "Gemm"], 5, None, "softmax"),
        (["Gemm"], 1, None, "none"),
        (["Gemm"], 1, "classification", "none"),
        (["Gemm"], 1, "labels", "sigmoid"),
        (["Gemm"], 5, "labels", "sigmoid"),
        (["Gemm", "Sigmoid"], 5, "labels", "none"),
        (["Gemm"], 5, "regression", "none"),
        (["Conv"], 5, "segmentation", "softmax"),
        (["Conv", "Softmax"], 5, "segmentation", "none"),
        (["Conv", "Sigmoid"], 5, "segmentation", "none"),
    ],
)
def test_probabilities_are_made_of_logits_alone(
    operators: list[str], classes: int, task: str | None, expected: str
) -> None:
    names = ["input", *(f"t{place}" for place in range(len(operators) - 1)), "logits"]
    nodes = [helper.make_node(operator, [names[place]], [names[place + 1]]) for place, operator in enumerate(operators)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", "logits")]
    graph = helper.make_model(helper.make_graph(nodes, "net", values[:1], values[1:]))
    kind: Task = "segmentation" if task == "segmentation" else "classification"
    described = pb.ModelConfig(
        output=model_config.outputs(kind, [[classes, 8, 8] if kind == "segmentation" else [classes]])
    )
    described.parameters["task"].string_value = kind
    described.parameters["activation"].string_value = "softmax"
    model_config.say_activation(described, task, graph)
    assert described.parameters["activation"].string_value == expected
