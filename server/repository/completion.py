"""What config.pbtxt leaves out, from the model's file: backend, inputs, outputs and batch axis."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.engines.trials import Verdict
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.labels import LabelFiles, add_labels
from convoynet.server.repository.layout import CONFIG_FILE, model_file
from convoynet.server.repository.model_config import BACKENDS, ENSEMBLE, Stated
from convoynet.server.spec import TensorSpec

log = logging.getLogger(__name__)

Description = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
Describe = Callable[[Path, str], Awaitable[Description]]
"""The inputs and outputs of a file that a backend reads; `dims` are whole shapes here, a batch axis being a -1 first.

Raises InvalidModel where the engine is not installed or does not take the file.
"""


def complete_backend(config: pb.ModelConfig, folder: Path, version: str) -> None:
    """Finds out which engine reads the model: by the file that is in the version's folder.

    Raises:
        InvalidModel: There is no such file, or no engine for it yet.
    """
    files = folder / version
    if not config.backend:
        name = config.default_model_filename
        config.backend = next(
            (
                backend
                for backend, of in BACKENDS.items()
                if (Path(name).suffix == Path(of.file).suffix if name else model_file(files / of.file).is_file())
            ),
            "",
        )
    if not config.backend:
        known = ", ".join(of.file for backend, of in BACKENDS.items() if backend != "fake")
        raise InvalidModel(f"version {version} holds no model: none of {known}; `convoy export` writes one")
    of = BACKENDS[config.backend]
    config.platform = config.platform or of.platform
    if not config.default_model_filename:
        # OpenVINO reads ONNX as well as its own format.
        onnx = BACKENDS["onnxruntime"].file
        reads_onnx = config.backend == "openvino" and not (files / of.file).exists() and (files / onnx).exists()
        config.default_model_filename = onnx if reads_onnx else of.file


def is_complete(config: pb.ModelConfig) -> bool:
    """Whether the config states every input and output with its type, so that nobody has to read the file."""
    tensors: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    return bool(config.input and config.output) and all(t.name and t.data_type for t in tensors)


async def complete_from_file(
    stated: Stated,
    described: Description,
    default_batch: int,
    trial: Callable[[pb.ModelConfig], Awaitable[Verdict]] | None,
) -> None:
    """Adds what the config leaves out of inputs, outputs and batch size.

    Where the first dimension of every input and output is free and the config says nothing, it may be the batch axis.
    That is believed when a trial shows it: max_batch_size becomes `default_batch` then, and dims leave the axis out.

    Args:
        stated: The config, which is changed.
        described: What the file has.
        default_batch: The batch size where there is an axis.
        trial: What tries the model of a whole config; None where nothing can.

    Raises:
        InvalidModel: The config states a batch axis, or a name, that the file does not have.
    """
    batch = default_batch if _may_batch(stated, described) else 0
    if trial is not None and (batch or not all(t.ranked for t in described[1])):
        attempt = pb.ModelConfig()
        attempt.CopyFrom(stated.config)
        complete_tensors(replace(stated, config=attempt), described, batch)
        verdict = await trial(attempt)
        described = _with_ranks(described, verdict.ranks)
        if batch and (why := _denied(verdict)):
            log.warning(
                "model %s: its first dimension is not taken for a batch, and nothing is batched, since %s; where it is "
                "one all the same, state max_batch_size in %s",
                stated.config.name, why, CONFIG_FILE,
            )  # fmt: skip
            batch = 0
    complete_tensors(stated, described, batch)


def complete_tensors(stated: Stated, described: Description, batch: int) -> None:
    """Adds the inputs and outputs that the config leaves out, and the batch size where it states none.

    Outputs are a choice: where the config states some, no others are added.

    Args:
        stated: The config, which is changed.
        described: What the file has.
        batch: The batch size for a config that states none; 0 where there is no batch axis.

    Raises:
        InvalidModel: The config states a batch axis, or a name, that the file does not have.
    """
    config = stated.config
    inputs, outputs = described
    if config.max_batch_size and not all(t.dims[:1] == (-1,) for t in (*inputs, *outputs) if t.ranked):
        raise InvalidModel(
            f"max_batch_size is {config.max_batch_size}, but not every input and output of the file has a free batch "
            f"axis first: set max_batch_size 0 in {CONFIG_FILE}"
        )
    if not stated.batch:
        config.max_batch_size = batch
    skip = 1 if config.max_batch_size else 0
    for tensor in inputs:
        own = next((t for t in config.input if t.name == tensor.name), None)
        if not tensor.ranked and (own is None or not own.dims):
            raise InvalidModel(
                f"the file does not say how many dimensions input '{tensor.name}' has: state its dims in {CONFIG_FILE}"
            )
        _fill(own or config.input.add(), tensor, skip)
    stated_outputs = list(config.output)
    for tensor in outputs:
        have = next((t for t in stated_outputs if t.name == tensor.name), None)
        if have is not None or not stated_outputs:
            _fill(have or config.output.add(), tensor, skip)
    for kind, own_tensors in (("input", config.input), ("output", config.output)):
        if strange := next((t.name for t in own_tensors if not t.data_type), None):
            names = ", ".join(t.name for t in (inputs if kind == "input" else outputs))
            raise InvalidModel(f"{CONFIG_FILE} states the {kind} '{strange}', but the file has {names}")


def _with_ranks(described: Description, ranks: Mapping[str, int]) -> Description:
    """A description whose outputs of unknown rank have as many dimensions as they came with; 1 where none came."""
    inputs, outputs = described
    return inputs, tuple(t if t.ranked else replace(t, dims=(-1,) * ranks.get(t.name, 1)) for t in outputs)


def _may_batch(stated: Stated, described: Description) -> bool:
    """Whether the config leaves it open that the first dimensions are a batch axis, and the file's shapes allow it.

    Where it states a tensor with as many dims as the file has, batch axis included, it has none.
    """
    inputs, outputs = described
    free = all(t.dims[:1] == (-1,) for t in (*inputs, *outputs) if t.ranked)
    return bool(inputs) and free and not stated.batch and not _has_whole_shapes(stated.config, described)


def _denied(verdict: Verdict) -> str:
    """Why a trial does not show that there is a batch axis; "" where it does."""
    if verdict.named or verdict.mixed:
        return verdict.named or verdict.mixed
    return "" if verdict.shown else "no run has shown that rows are answered each for itself"


def _has_whole_shapes(config: pb.ModelConfig, described: Description) -> bool:
    """Whether the config states a tensor with as many dims as the file's, batch axis included: then it has none."""
    ranks = {tensor.name: len(tensor.dims) for side in described for tensor in side}
    stated: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    return any(t.dims and len(t.dims) == ranks.get(t.name) for t in stated)


def _fill(have: pb.ModelInput | pb.ModelOutput, tensor: TensorSpec, skip: int) -> None:
    if not have.data_type:
        name = tensor.datatype.replace("BYTES", "STRING")
        have.data_type = cast(pb.DataType, pb.DataType.Value(f"TYPE_{name}"))
        if not have.dims:
            have.dims.extend(tensor.dims[skip:] if tensor.ranked or tensor.dims else [-1])
    have.name = tensor.name


def fill_defaults(labels: LabelFiles, config: pb.ModelConfig) -> None:
    """What the server assumes where the config is silent."""
    if not config.instance_group and config.platform != ENSEMBLE:
        config.instance_group.add()
    add_labels(labels, config)
    if config.HasField("dynamic_batching") and not config.dynamic_batching.preferred_batch_size:
        config.dynamic_batching.preferred_batch_size.append(config.max_batch_size)
