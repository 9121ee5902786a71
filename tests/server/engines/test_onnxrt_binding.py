"""ONNX Runtime's GPU providers, as far as they can be checked without a GPU: their options, and IO binding on a CPU."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convoynet.server import engines
from convoynet.server.engines import onnxrt_options
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.onnxrt_options import CPU, CUDA, TENSORRT, provider_options, providers
from convoynet.server.errors import InvalidModel
from convoynet.server.gpus import visible_gpus
from tests.server.engine_setup import rows, spec_of
from tests.server.onnx_models import LINEAR_WEIGHTS, write_linear, write_segmenter, write_texts

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
binding = pytest.importorskip("convoynet.server.engines.onnxrt_binding")
EVERY = [TENSORRT, CUDA, CPU]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    """A model of FP32 [4] -> FP32 [3], for GPU 1, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_linear(tmp_path / "models")
    found = EngineSpec.of(spec_of(tmp_path / "models"))
    return replace(found, options=replace(found.options, device="gpu", gpus=(1,)))


def _bound(spec: EngineSpec) -> binding.BoundSession:
    session = ort.InferenceSession(str(spec.options.file), providers=[CPU])
    return binding.BoundSession(session, spec, "cpu", 0)


def test_bound_runs_answer_as_the_session_does(spec: EngineSpec) -> None:
    bound = _bound(spec)
    for count in (1, 3, 8, 3, 1):
        inputs = rows(count, seed=count)
        np.testing.assert_allclose(bound.run(inputs, ["logits"])["logits"], inputs["input"] @ LINEAR_WEIGHTS, rtol=1e-5)


def test_buffers_are_made_once_for_a_shape(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    allocate = ort.OrtValue.ortvalue_from_shape_and_type

    def count(shape: list[int], *rest: object) -> object:
        made.append(shape)
        return allocate(shape, *rest)

    monkeypatch.setattr(binding.ort.OrtValue, "ortvalue_from_shape_and_type", count)
    bound = _bound(spec)
    for _ in range(5):
        for batch in (2, 4):
            bound.run(rows(batch), ["logits"])
    assert made == [[2, 4], [2, 3], [4, 4], [4, 3]]


def test_the_shape_that_was_used_least_lately_gives_way(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_MOST", 2)
    bound = _bound(spec)
    for batch in (1, 2, 1, 3):
        bound.run(rows(batch), ["logits"])
    assert list(bound._bound) == [(1, ("input",), ("logits",)), (3, ("input",), ("logits",))]


def test_only_the_outputs_that_are_wanted_are_bound(tmp_path: Path) -> None:
    write_segmenter(tmp_path)
    spec = EngineSpec.of(spec_of(tmp_path))
    names = [t.name for t in spec.outputs]
    inputs = {n: np.asarray(values) for n, values in spec.blank(2).items()}
    assert list(_bound(spec).run(inputs, names[1:])) == names[1:]


def test_texts_and_free_dimensions_are_not_bound(tmp_path: Path, spec: EngineSpec) -> None:
    assert binding.can_bind(spec)
    write_texts(tmp_path / "texts")
    assert not binding.can_bind(EngineSpec.of(spec_of(tmp_path / "texts")))
    free = replace(spec.outputs[0], dims=(-1,))
    assert not binding.can_bind(replace(spec, outputs=(free,)))


def test_each_provider_gets_its_options_and_the_gpu(spec: EngineSpec) -> None:
    stated = {"cudnn_conv_algo_search": "DEFAULT", "trt_fp16_enable": "1"}
    options = replace(spec.options, tensorrt=True, provider_options=stated)
    (tensorrt, cuda, cpu) = providers(replace(spec, options=options), EVERY)
    assert cuda == (CUDA, {"device_id": "1", "cudnn_conv_algo_search": "DEFAULT"})
    assert cpu == (CPU, {})
    name, given = tensorrt
    assert (name, given["device_id"], given["trt_fp16_enable"]) == (TENSORRT, "1", "1")
    assert given["trt_profile_min_shapes"] == "input:1x4"
    assert given["trt_profile_max_shapes"] == given["trt_profile_opt_shapes"] == "input:8x4"
    assert given["trt_engine_cache_enable"] == "1"
    assert Path(given["trt_engine_cache_path"]).is_dir()


def test_engines_of_other_weights_are_kept_elsewhere(spec: EngineSpec) -> None:
    def folder() -> str:
        return providers(replace(spec, options=replace(spec.options, tensorrt=True)), EVERY)[0][1][
            "trt_engine_cache_path"
        ]

    before = folder()
    assert folder() == before
    content = spec.options.file.read_bytes()
    weight = LINEAR_WEIGHTS.tobytes()
    assert weight in content
    spec.options.file.write_bytes(content.replace(weight, (2 * LINEAR_WEIGHTS).tobytes()))
    assert folder() != before


@pytest.mark.parametrize(("gpus", "wanted"), [(0, [CPU]), (2, [CUDA, CPU])])
def test_auto_is_a_gpu_where_there_is_one(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, gpus: int, wanted: list[str]
) -> None:
    monkeypatch.setattr(onnxrt_options, "visible_gpus", lambda: gpus)
    options = replace(spec.options, device="auto", gpus=())
    assert [name for name, _ in providers(replace(spec, options=options), EVERY)] == wanted


def test_a_gpu_that_the_package_cannot_use_is_one_line(spec: EngineSpec) -> None:
    with pytest.raises(InvalidModel, match=r"only CPUExecutionProvider: pip install 'convoynet\[gpu\]'"):
        providers(spec, [CPU])


@pytest.mark.parametrize(
    ("parameter", "text", "line"),
    [
        ("trt_engine_cache_path", "/etc", "none of the TensorRT provider's"),
        ("trt_fp16_enable", "yes", "must be 0 or 1, got 'yes'"),
        ("trt_builder_optimization_level", "6", "a number in 0 to 5, got '6'"),
        ("cudnn_conv_algo_search", "FAST", "must be DEFAULT or HEURISTIC or EXHAUSTIVE, got 'FAST'"),
        ("gpu_mem_limit", "-1", "a number in 1 to"),
    ],
)
def test_provider_parameters_are_checked(parameter: str, text: str, line: str) -> None:
    with pytest.raises(InvalidModel, match=line):
        provider_options({parameter: text})


def test_other_parameters_are_none_of_the_providers() -> None:
    assert provider_options({"task": "classification", "use_tf32": "0"}) == {"use_tf32": "0"}


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus(), reason="there is no NVIDIA GPU")
@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime-gpu is not installed")
@pytest.mark.parametrize("options", [{}, {"enable_cuda_graph": "1"}, {"tensorrt": "1"}], ids=["plain", "graph", "trt"])
def test_a_gpu_answers_as_the_cpu_does(spec: EngineSpec, options: dict[str, str]) -> None:
    if "tensorrt" in options and importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT 10 is not installed")
    stated = {"use_tf32": "0", **{n: v for n, v in options.items() if n != "tensorrt"}}
    chosen = replace(spec.options, gpus=(0,), tensorrt="tensorrt" in options, provider_options=stated)
    engine = engines.load(replace(spec, options=chosen, warmup=(1, 8))).engine
    assert engine.device == ("Tensorrt 0" if "tensorrt" in options else "CUDA 0")
    for count in (1, 3, 8, 3, 1):  # each shape twice: the second run of a CUDA graph is another one
        inputs = rows(count, seed=count)
        np.testing.assert_allclose(engine.run(inputs)["logits"], inputs["input"] @ LINEAR_WEIGHTS, rtol=1e-4, atol=1e-5)
    engine.close()
