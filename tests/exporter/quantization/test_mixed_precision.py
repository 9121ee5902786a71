from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import helper

from convoynet.exporter.errors import Refused
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.mixed_precision import Budget, Mix, search
from convoynet.exporter.quantization.quantize import layers, quantize
from convoynet.exporter.quantization.sensitivity import LayerCost, sensitivity
from tests.exporter.onnx_runs import run
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

NAMES = "abcdefgh"
EXACT = helper.make_model(helper.make_graph([], "exact", [], []))
MACS = dict(zip(NAMES, (1, 2, 4, 8, 16, 32, 64, 128), strict=True))


def costs_of(noise: Mapping[str, float]) -> list[LayerCost]:
    return [LayerCost(n, n, "Conv", -10 * np.log10(noise[n]), "logits", MACS[n], 1) for n in NAMES]


def build(kept: Collection[str]) -> onnx.ModelProto:
    """A graph that says in its name what is kept."""
    return helper.make_model(helper.make_graph([], "".join(sorted(kept)) or "none", [], []))


def scored(lost: Mapping[str, float]) -> Callable[[onnx.ModelProto], float]:
    """Accuracy that falls by so many points for each layer that is quantized."""

    def score(model: onnx.ModelProto) -> float:
        kept = NAMES if model.graph.name == "exact" else model.graph.name.replace("none", "")
        return 0.9 - sum(points for name, points in lost.items() if name not in kept) / 100

    return score


def found(max_drop: float, lost: Mapping[str, float], confirm: Mapping[str, float] | None = None) -> Mix:
    costs = costs_of({name: lost.get(name, 0.0) + 1e-6 for name in NAMES})
    second = None if confirm is None else scored(confirm)
    return search(EXACT, build, costs, Budget(max_drop, scored(lost), second), Quiet())


def test_a_graph_that_is_good_enough_keeps_nothing_and_is_tried_once() -> None:
    mix = found(0.5, {"a": 0.3, "h": 0.2})
    assert mix == Mix((), 0.0, None, mix.trials)
    assert len(mix.trials) == 1
    assert mix.trials[0].drop == pytest.approx(0.5)


def test_the_layers_that_cost_accuracy_are_kept_and_no_others() -> None:
    mix = found(0.5, {"b": 1.0, "g": 2.0, "c": 0.1})
    assert mix.keep_float == ("b", "g")
    assert mix.kept_macs == pytest.approx((2 + 64) / 255)


def test_what_the_order_puts_first_in_vain_is_put_back() -> None:
    """The noise of h per multiply-add is the largest, and it loses no accuracy."""
    costs = costs_of(dict.fromkeys(NAMES, 1e-06) | {"h": 500.0, "f": 1.0})
    mix = search(EXACT, build, costs, Budget(0.5, scored({"f": 3.0}), None), Quiet())
    assert mix.keep_float == ("f",)
    assert any(trial.kept == 2 and trial.passed for trial in mix.trials)


def test_a_mix_that_fails_on_the_second_images_is_not_returned() -> None:
    lost = {"b": 1.0, "g": 2.0}
    costs = costs_of(dict.fromkeys(NAMES, 1e-06) | {"b": 1.0, "g": 2.0, "e": 0.1})
    budget = Budget(0.5, scored(lost), scored(lost | {"e": 0.7}))
    mix = search(EXACT, build, costs, budget, Quiet())
    assert mix.confirmed is True
    assert mix.keep_float == ("b", "e", "g")
    confirmations = [trial.passed for trial in mix.trials if trial.purpose == "confirm"]
    assert confirmations == [*[False] * (len(confirmations) - 1), True]
    assert len(confirmations) > 1
    assert min(trial.allowed for trial in mix.trials if trial.purpose == "search") < 0.5  # the margin


def test_a_mix_that_holds_on_the_second_images_is_confirmed_once() -> None:
    mix = found(0.5, {"b": 1.0}, {"b": 2.0})
    assert (mix.keep_float, mix.confirmed) == (("b",), True)
    assert [trial.purpose for trial in mix.trials].count("confirm") == 1
    assert mix.to_json()["trials"][-1]["passed"] is True


def test_a_budget_that_cannot_be_met_is_refused_with_the_figures() -> None:
    with pytest.raises(Refused, match=r"--max-drop 0\.5: the closest keeps 7 of 8 layers and loses 1\.00 points"):
        found(0.5, dict.fromkeys(NAMES, 1.0))
    worse = partial(search, EXACT, lambda kept: helper.make_model(helper.make_graph([], "none", [], [])))
    with pytest.raises(Refused, match=r"with all 8 layers kept in higher precision top-1 still falls by 3\.00 points"):
        worse(costs_of(dict.fromkeys(NAMES, 1e-06)), Budget(0.5, scored({"a": 3.0}), None), Quiet())


def test_a_real_network_comes_back_to_what_float_says() -> None:
    exact = onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)
    ranges = calibrate(exact, [pixels(16)], "minmax")
    # Nine times too narrow for one tensor: nothing but keeping its reader can mend that.
    names = layers(exact, "gpu")
    read = next(node.input[0] for node in exact.graph.node if node.output[0] == names[4])
    ranges[read] = type(ranges[read])(ranges[read].low / 9, ranges[read].high / 9)
    images = pixels(64)

    def agreement(part: int) -> Callable[[onnx.ModelProto], float]:
        classes = run(exact, images[part::2]).argmax(axis=1)
        return lambda graph: float((run(graph, images[part::2]).argmax(axis=1) == classes).mean())

    first, second = agreement(0), agreement(1)
    ruined = quantize(exact, ranges, "gpu")
    assert first(ruined) < 0.8
    costs = sensitivity(exact, ranges, images[:8], "gpu", Quiet())
    mix = search(exact, partial(quantize, exact, ranges, "gpu"), costs, Budget(15.0, first, second), Quiet())
    assert mix.confirmed
    assert names[4] in mix.keep_float
    assert len(mix.keep_float) < len(names)
    assert second(quantize(exact, ranges, "gpu", mix.keep_float)) >= 0.85
