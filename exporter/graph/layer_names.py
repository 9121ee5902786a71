"""What a layer makes, by the layer's own name: `layer1.0.conv1`, where the exporter writes `getitem_30`."""

import onnx

from convoynet.exporter.graph.onnx_graph import Graph, bodies_of

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
_WEIGHT = ".weight"
# Names that later steps give to tensors of their own, whole or as endings.
_RESERVED = frozenset(
    {"input", "logits", "classes", "boxes", "scores", "labels", "count", "pixels", "channels_first", "scaled"}
    | {"normalized", "pixel_scale", "pixel_shift"}
)
_ENDINGS = frozenset({"q", "dq", "scale", "zero_point", "fp16", "bf16", "pooled", "flatten", "folded", "int64"})


def name_layers(model: onnx.ModelProto) -> None:
    """Rename the results of layers whose weights have the name of a module; others, and outputs, keep theirs."""
    graph = Graph(model)
    if any(map(bodies_of, graph)):
        return  # what a body within reads goes by its name
    taken = {*graph.initializers, *graph.inputs, *graph.outputs, *graph.producers, *_RESERVED}
    renamed = {}
    for node in graph:
        old = node.output[0]
        weights = node.input[1] if node.op_type in _LAYERS and len(node.input) > 1 else ""
        name = weights.removesuffix(_WEIGHT)
        if name == weights or name in taken or old in graph.outputs or name.rpartition(".")[2] in _ENDINGS:
            continue
        taken.add(name)
        renamed[old] = node.output[0] = name
        graph.rewire(old, name)
    for value in model.graph.value_info:
        value.name = renamed.get(value.name, value.name)
