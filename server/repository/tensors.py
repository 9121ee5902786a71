"""Inputs and outputs as config.pbtxt states them, and images that become an input."""

from __future__ import annotations

import re
from collections.abc import Mapping

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.engines.trials import TRIED
from convoynet.server.errors import InvalidModel
from convoynet.server.images.images import ImageInput, image_input_from_json
from convoynet.server.repository.parameters import text
from convoynet.server.repository.warmup import datatype_of
from convoynet.server.spec import TensorSpec


def tensor_spec(tensor: pb.ModelInput | pb.ModelOutput) -> TensorSpec:
    """One input or output.

    Raises:
        InvalidModel: It has no name, or a type that there is not.
    """
    datatype = datatype_of(tensor.data_type)
    if datatype == "INVALID" or not tensor.name:
        raise InvalidModel(f"input or output {tensor.name!r} in config.pbtxt needs a name and a data_type")
    try:
        dtype = datatypes.numpy_dtype(datatype)
    except ValueError as error:
        raise InvalidModel(f"{tensor.name!r} has data_type {datatype}: {error}") from error
    return TensorSpec(tensor.name, datatype, dtype, tuple(tensor.dims))


def input_specs(config: pb.ModelConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs that a request has to have, and those that it may leave out.

    Raises:
        InvalidModel: As for one; or all may be left out, or the backend has no defaults for them.
    """
    required = tuple(tensor_spec(t) for t in config.input if not t.optional)
    optional = tuple(tensor_spec(t) for t in config.input if t.optional)
    if optional and config.backend not in TRIED:
        raise InvalidModel(
            f"input '{optional[0].name}' is optional, which those of an ONNX file alone can be: remove it from its "
            "config.pbtxt"
        )
    if optional and not required:
        raise InvalidModel(f"every input is optional: one at least must not be, such as '{optional[0].name}'")
    return required, optional


def allowed_values(config: pb.ModelConfig, optional: tuple[TensorSpec, ...]) -> Mapping[str, tuple[int, int]]:
    """The least and the most that an optional input may hold, of those for which parameter `values.NAME` says so.

    Raises:
        InvalidModel: The parameter is not two whole numbers, or the input is of another type.
    """
    found = {}
    for tensor in optional:
        stated = text(config, parameter := f"values.{tensor.name}")
        if not stated:
            continue
        match = re.fullmatch(r"(-?[0-9]{1,18}) to (-?[0-9]{1,18})", stated)
        if match is None or int(match[1]) > int(match[2]) or tensor.dtype.kind not in "iu":
            raise InvalidModel(
                f"parameter '{parameter}' must be two whole numbers as in '-1 to 9', of an input of integers, got "
                f"{stated[:100]!r}"
            )
        found[tensor.name] = int(match[1]), int(match[2])
    return found


def seldom_outputs(config: pb.ModelConfig) -> tuple[str, ...]:
    """The outputs that few requests ask for, as parameter `seldom_outputs` says.

    Raises:
        InvalidModel: One is no output, or there is no other.
    """
    stated = dict.fromkeys(name.strip() for name in text(config, "seldom_outputs").split(",") if name.strip())
    names = [output.name for output in config.output]
    for name in stated:
        if name not in names:
            raise InvalidModel(
                f"parameter 'seldom_outputs' names {name[:100]!r}, which is no output: they are {', '.join(names)}"
            )
    if stated and len(stated) == len(names):
        raise InvalidModel("parameter 'seldom_outputs' names every output: one at least must not be among them")
    return tuple(stated)


def image_input(config: pb.ModelConfig) -> ImageInput | None:
    """How encoded images become the input; None for a model that takes none.

    Raises:
        InvalidModel: The config says so of a model that cannot take them.
    """
    if "preprocess" not in config.parameters:
        return None
    required = [tensor for tensor in config.input if not tensor.optional]
    if len(required) != 1 or not config.max_batch_size:
        raise InvalidModel("parameter 'preprocess' needs a model with one input and max_batch_size of at least 1")
    (only,) = required
    channels_last = only.format == pb.ModelInput.FORMAT_NHWC
    image = image_input_from_json(config.parameters["preprocess"].string_value, channels_last)
    channels = 1 if image.color == "L" else 3
    dims = [*image.size, channels] if channels_last else [channels, *image.size]
    if list(only.dims) != dims:
        raise InvalidModel(
            f"parameter 'preprocess' makes rows of shape {dims}, but input '{only.name}' has dims {list(only.dims)}"
        )
    return image
