"""ONNX Runtime: CPU, CUDA and TensorRT execution providers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnxruntime as ort

from server.errors import InvalidModel
from server.spec import EngineOptions, ModelSpec, TensorSpec
from server.types import Tensor

_DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(double)": "FP64",
    "tensor(uint8)": "UINT8",
    "tensor(int8)": "INT8",
    "tensor(uint16)": "UINT16",
    "tensor(int16)": "INT16",
    "tensor(uint32)": "UINT32",
    "tensor(int32)": "INT32",
    "tensor(uint64)": "UINT64",
    "tensor(int64)": "INT64",
    "tensor(bool)": "BOOL",
    "tensor(string)": "BYTES",
}


class OnnxRuntimeEngine:
    """One InferenceSession."""

    def __init__(self, spec: ModelSpec) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = spec.engine.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning idle threads take the cores from the front end: measured, ResNet-50 INT8 falls to a third.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = _providers(spec.engine)
        try:
            self._session = ort.InferenceSession(str(spec.engine.file), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            reason = _first_line(error, spec.engine.file)
            raise InvalidModel(f"ONNX Runtime does not take {spec.engine.file.name}: {reason}") from error
        active = self._session.get_providers()
        if providers[0] != active[0]:
            raise InvalidModel(
                f"ONNX Runtime could not start its {providers[0]} (no such device or driver?): set KIND_CPU in "
                "config.pbtxt, or serve it where there is a GPU"
            )
        _check(self._session.get_inputs(), spec, spec.inputs, "input")
        _check(self._session.get_outputs(), spec, spec.outputs, "output")
        self._outputs = [t.name for t in spec.outputs]
        self.device = (
            f"CPU, {spec.engine.threads} threads"
            if active[0] == "CPUExecutionProvider"
            else active[0].removesuffix("ExecutionProvider")
        )

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        names = [name for name in self._outputs if name in outputs] if outputs else self._outputs
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """See Engine.close."""
        del self._session


def _providers(options: EngineOptions) -> list[str]:
    available = ort.get_available_providers()
    gpu = [
        p
        for p in ("TensorrtExecutionProvider", "CUDAExecutionProvider")
        if p in available and (options.tensorrt or not p.startswith("Tensorrt"))
    ]
    if options.device == "gpu" and not gpu:
        raise InvalidModel(
            f"config.pbtxt asks for a GPU (KIND_GPU), but this ONNX Runtime has only {', '.join(available)}: "
            "pip install 'convoy[gpu]' on a machine with an NVIDIA GPU, or export with --target cpu"
        )
    return ["CPUExecutionProvider"] if options.device == "cpu" or not gpu else [*gpu, "CPUExecutionProvider"]


def _check(actual: list[ort.NodeArg], spec: ModelSpec, stated: tuple[TensorSpec, ...], kind: str) -> None:
    """The file's tensors must be the ones that the config states."""
    by_name = {t.name: t for t in actual}
    for tensor in stated:
        found = by_name.get(tensor.name)
        if found is None:
            raise InvalidModel(
                f"config.pbtxt states the {kind} '{tensor.name}', but the file has {', '.join(sorted(by_name))}"
            )
        have, want = _DATATYPES.get(found.type, found.type), spec.shape(tensor)
        if have != tensor.datatype:
            raise InvalidModel(f"{kind} '{tensor.name}' is {have} in the file, {tensor.datatype} in config.pbtxt")
        fixed = [d if isinstance(d, int) else -1 for d in found.shape]
        if len(fixed) != len(want) or any(f not in (-1, w) and w != -1 for f, w in zip(fixed, want, strict=True)):
            raise InvalidModel(
                f"{kind} '{tensor.name}' has shape {list(found.shape)} in the file, but {want} in config.pbtxt"
            )
        if spec.batch.max_rows and fixed[0] != -1:
            raise InvalidModel(f"{kind} '{tensor.name}' has a fixed batch of {fixed[0]}: set max_batch_size 0")


def _first_line(error: Exception, file: Path) -> str:
    lines = str(error).replace(str(file), file.name).strip().splitlines()
    return lines[0] if lines else type(error).__name__
