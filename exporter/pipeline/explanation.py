"""Outputs that explain: whether a network can have them, seen before the work; added, and held against PyTorch."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.explaining.embedding import features_size, last_layer_of, with_features
from convoynet.exporter.explaining.feature_map import head_of
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.explaining.reference import reference_maps
from convoynet.exporter.graph.onnx_from_torch import OUTPUT_NAME
from convoynet.exporter.outputs_asked import EXPLANATION, FEATURES
from convoynet.exporter.pipeline.graph_steps import Lowered, graph_of, inputs_of
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.publishing import model_config
from convoynet.exporter.running.runtime import inner_session
from convoynet.protos.inference import model_config_pb2 as pb

_IMAGES = 4
# Of the largest value of a map: the sums are PyTorch's in another order.
_MAX_REL_ERROR = 1e-3


@dataclass(frozen=True)
class Explanation:
    """The output as it was added.

    Attributes:
        features: the tensor that it is of.
        size: (height, width) of the map.
        classes: how many there are.
        max_rel_error: against PyTorch's gradient, of the float graph; None where that could not be had.
    """

    features: str
    size: tuple[int, int]
    classes: int
    max_rel_error: float | None

    def to_json(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self) | {"size": list(self.size)}


def require_addable(bench: Workbench) -> None:
    """See, before minutes or hours of compression, that the network can have the outputs that are asked for.

    Raises:
        BadInput: it cannot.
    """
    with bench.task.progress.step("look for the last map of features"):
        graph = graph_of(bench, bench.module)
        if bench.task.config.explain:
            explained(graph)
        if bench.task.config.features:
            with_features(graph)


def add_outputs(bench: Workbench, lowered: Lowered, described: pb.ModelConfig) -> dict[str, Any]:
    """Give the graph that is published the outputs that are asked for.

    Args:
        bench: the export.
        lowered: has the graph.
        described: its config, which gets them too.

    Returns:
        What the report says of each, by its name.

    Raises:
        BadInput: it cannot have one.
        Refused: in the float graph it is not what PyTorch makes of it.
    """
    found: dict[str, Any] = {}
    if bench.task.config.explain:
        explanation = _add_explanation(bench, lowered)
        model_config.add_explanation(described, explanation.size, explanation.classes)
        found[EXPLANATION] = explanation.to_json()
    if bench.task.config.features:
        head = last_layer_of(lowered.graph, OUTPUT_NAME)
        lowered.graph = with_features(lowered.graph)
        model_config.add_features(described, size := features_size(head))
        found[FEATURES] = {"tensor": head.features, "size": size}
    return found


def _add_explanation(bench: Workbench, lowered: Lowered) -> Explanation:
    """Give the graph that is published the output.

    Raises:
        BadInput: it cannot have it.
        Refused: in the float graph it is not what PyTorch makes of it.
    """
    with bench.task.progress.step("explain"):
        head = head_of(lowered.graph, OUTPUT_NAME)
        error = _error(bench, lowered.exact)
        lowered.graph = explained(lowered.graph)
    return Explanation(head.features, head.size, head.classes, error)


def _error(bench: Workbench, exact: onnx.ModelProto) -> float | None:
    """How far the explanations of the float graph are from PyTorch's."""
    inputs = inputs_of(bench, bench.pictures.check[: min(_IMAGES, bench.task.config.batch_range("classification")[1])])
    session = inner_session(explained(exact), [OUTPUT_NAME, EXPLANATION])
    scores, found = session.run(None, {session.get_inputs()[0].name: inputs})
    try:
        wanted = reference_maps(exact, inputs, np.argmax(scores, axis=1))
    except BadInput as error:  # a given graph may have operators that PyTorch's stand-in for it lacks
        bench.task.caveats.append(f"the explanation was not compared with PyTorch's: {error}")
        return None
    apart = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
    if not apart <= _MAX_REL_ERROR:
        raise Refused(
            f"the explanation is not PyTorch's: max relative error {apart:.2e} (allowed {_MAX_REL_ERROR:.0e}) on "
            f"{len(inputs)} images; nothing was published"
        )
    return apart
