"""Inputs and outputs as config.pbtxt states them, and images that become an input."""

from __future__ import annotations

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.errors import InvalidModel
from convoynet.server.images.images import ImageInput, image_input_from_json
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


def image_input(config: pb.ModelConfig) -> ImageInput | None:
    """How encoded images become the input; None for a model that takes none.

    Raises:
        InvalidModel: The config says so of a model that cannot take them.
    """
    if "preprocess" not in config.parameters:
        return None
    if len(config.input) != 1 or not config.max_batch_size:
        raise InvalidModel("parameter 'preprocess' needs a model with one input and max_batch_size of at least 1")
    channels_last = config.input[0].format == pb.ModelInput.FORMAT_NHWC
    image = image_input_from_json(config.parameters["preprocess"].string_value, channels_last)
    channels = 1 if image.color == "L" else 3
    dims = [*image.size, channels] if channels_last else [channels, *image.size]
    if list(config.input[0].dims) != dims:
        raise InvalidModel(
            f"parameter 'preprocess' makes rows of shape {dims}, but input '{config.input[0].name}' has dims "
            f"{list(config.input[0].dims)}"
        )
    return image
