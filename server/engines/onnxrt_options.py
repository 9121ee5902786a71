"""What config.pbtxt may tell ONNX Runtime's CUDA and TensorRT providers, and what each is given."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from convoynet.server.engines.base import EngineSpec
from convoynet.server.errors import InvalidModel
from convoynet.server.gpus import visible_gpus
from convoynet.server.host import cache_folder

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
_SWITCH = ("0", "1")
_NUMBER = range(1, 2**63)
OPTIONS: Mapping[str, tuple[str, ...] | range] = {
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv_algo_search": ("DEFAULT", "HEURISTIC", "EXHAUSTIVE"),
    "cudnn_conv_use_max_workspace": _SWITCH,
    "enable_cuda_graph": _SWITCH,
    "gpu_mem_limit": _NUMBER,
    "prefer_nhwc": _SWITCH,
    "use_tf32": _SWITCH,
    "trt_bf16_enable": _SWITCH,
    "trt_builder_optimization_level": range(6),
    "trt_context_memory_sharing_enable": _SWITCH,
    "trt_cuda_graph_enable": _SWITCH,
    "trt_engine_cache_enable": _SWITCH,
    "trt_fp16_enable": _SWITCH,
    "trt_int8_enable": _SWITCH,
    "trt_max_workspace_size": _NUMBER,
    "trt_sparsity_enable": _SWITCH,
    "trt_timing_cache_enable": _SWITCH,
}
"""The parameters, under the providers' own names, with what each may be. There is none for a path: the config of a
model, which clients may send, names no file to write."""
_CUDA_DEFAULTS = {
    # EXHAUSTIVE, the provider's own default, times every algorithm again for each new batch size.
    "cudnn_conv_algo_search": "HEURISTIC",
}
_TENSORRT_DEFAULTS = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}


def provider_options(parameters: Mapping[str, str]) -> dict[str, str]:
    """Those parameters of a config that are the providers'.

    Raises:
        InvalidModel: One that begins with trt_ is unknown, or a value is not one that is allowed.
    """
    found = {name: text for name, text in parameters.items() if name in OPTIONS or name.startswith("trt_")}
    for name, text in found.items():
        if name not in OPTIONS:
            known = ", ".join(option for option in OPTIONS if option.startswith("trt_"))
            raise InvalidModel(f"parameter '{name}' is none of the TensorRT provider's that are known: {known}")
        allowed = OPTIONS[name]
        if isinstance(allowed, range):
            good, words = (
                text.isdecimal() and len(text) < 20 and int(text) in allowed,
                f"a number in {allowed[0]} to {allowed[-1]}",
            )
        else:
            good, words = text in allowed, " or ".join(allowed)
        if not good:
            raise InvalidModel(f"parameter '{name}' must be {words}, got {text!r}")
    return found


def providers(spec: EngineSpec, available: Collection[str]) -> list[tuple[str, dict[str, str]]]:
    """The providers to ask for, the preferred one first, each with its options.

    Args:
        spec: Of the model.
        available: Those that this ONNX Runtime was built with.

    Raises:
        InvalidModel: The config asks for a GPU, and there is no provider for one.
    """
    options = spec.options
    maybe = options.device == "gpu" or (options.device == "auto" and visible_gpus() > 0)
    wanted = [*([TENSORRT] if options.tensorrt else []), CUDA] if maybe else []
    on_gpu = [name for name in wanted if name in available]
    if options.device == "gpu" and not on_gpu:
        raise InvalidModel(
            f"config.pbtxt asks for a GPU (KIND_GPU), but this ONNX Runtime has only {', '.join(available)}: "
            "pip install 'convoynet[gpu]' on a machine with an NVIDIA GPU, or export with --target cpu"
        )
    device = {"device_id": str(options.gpus[0] if options.gpus else 0)}
    stated = options.provider_options
    given = {
        CUDA: _CUDA_DEFAULTS | {n: v for n, v in stated.items() if not n.startswith("trt_")},
        TENSORRT: _TENSORRT_DEFAULTS | {n: v for n, v in stated.items() if n.startswith("trt_")},
    }
    if TENSORRT in on_gpu:
        folder = str(_engines_folder(options.file))
        given[TENSORRT] |= {"trt_engine_cache_path": folder, "trt_timing_cache_path": folder, **_profile(spec)}
    return [*((name, device | given[name]) for name in on_gpu), (CPU, {})]


def _profile(spec: EngineSpec) -> dict[str, str]:
    """One optimization profile for every batch size: without one the provider builds again, for minutes, in service.

    Empty where a dimension other than the batch is free: what it will be is not known.
    """
    if not spec.max_rows or any(d < 0 for t in spec.inputs for d in t.dims):
        return {}

    def shapes(rows: int) -> str:
        return ",".join(f"{t.name}:{'x'.join(map(str, (rows, *t.dims)))}" for t in spec.inputs)

    return {
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(spec.max_rows),
        "trt_profile_max_shapes": shapes(spec.max_rows),
    }


def _engines_folder(file: Path) -> Path:
    """Where the engines of a file are kept.

    By its content: the provider's own names tell versions of a model apart by their graph, and not by their weights.
    """
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:32]
    folder = cache_folder() / "onnxruntime-tensorrt" / digest
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
