"""Messages of the protocol to and from numpy, as a client sees them; codec.py is the server's side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.client import given
from convoynet.server.client.errors import ClientError
from convoynet.server.datatypes import Array

Parameter = bool | int | float | str
Inputs = Mapping[str, "Array | Sequence[bytes]"]


class InferOptions(TypedDict, total=False):
    """Rarely needed arguments of `Client.infer`.

    Attributes:
        version: the model's version; the newest one that is served if left out.
        request_id: comes back in the answer and stands in the server's logs.
        priority: 1 is the most urgent; 0, the default, takes the model's own default.
        parameters: further request parameters, by name.
        datatypes: by input, for what numpy cannot say: {"input": "BF16"} rounds a float array to bfloat16.
    """

    version: str
    request_id: str
    priority: int
    parameters: Mapping[str, Parameter]
    datatypes: Mapping[str, str]


def infer_request(
    model: str,
    inputs: Inputs,
    *,
    outputs: Sequence[str] | None = None,
    class_count: int | None = None,
    options: InferOptions | None = None,
) -> pb.ModelInferRequest:
    """The message that `Client.infer` sends; the arguments are the same.

    Raises:
        ClientError: an argument, an input or a parameter is of a type that the protocol cannot carry.
    """
    options = options or {}
    given.options(options, InferOptions)
    request = pb.ModelInferRequest(
        model_name=given.text("model", model, empty=False),
        model_version=given.text("version", options.get("version")),
        id=given.text("request_id", options.get("request_id")),
    )
    wanted = given.mapping("datatypes", options.get("datatypes") or {}, "names of datatypes by input")
    inputs = given.mapping("inputs", inputs, "arrays by input name")
    if unused := sorted(set(wanted) - set(inputs)):
        raise ClientError(f"datatypes names '{unused[0]}', which is no input", grpc.StatusCode.INVALID_ARGUMENT)
    for name, value in inputs.items():
        array = given.array(f"input '{name}'", value)
        try:
            raw = datatypes.encode(array, wanted.get(name))
        except ValueError as error:
            raise ClientError(f"input '{name}': {error}", grpc.StatusCode.INVALID_ARGUMENT) from error
        datatype = wanted.get(name) or datatypes.datatype(array.dtype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(raw)
    for name in given.texts("outputs", outputs or ()):
        requested = request.outputs.add(name=name)
        if class_count is not None:
            requested.parameters["classification"].int64_param = given.whole("class_count", class_count, 1)
    if priority := given.whole("priority", options.get("priority") or 0, 0, bits=64):
        request.parameters["priority"].uint64_param = priority
    for name, parameter in given.mapping("parameters", options.get("parameters") or {}, "values by name").items():
        _set_parameter(request.parameters[name], given.parameter(f"parameter '{name}'", parameter))
    return request


def _set_parameter(message: pb.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):  # before int: True is one
        message.bool_param = value
    elif isinstance(value, int):
        message.int64_param = value
    elif isinstance(value, float):
        message.double_param = value
    else:
        message.string_param = value


def arrays_from_response(answer: pb.ModelInferResponse) -> dict[str, Array]:
    """The outputs of an answer by name, as read-only views of it.

    Raises:
        ClientError: its values are not what it declares.
    """
    if len(answer.raw_output_contents) != len(answer.outputs):
        raise ClientError(
            f"the answer has {len(answer.outputs)} outputs, {len(answer.raw_output_contents)} raw contents",
            grpc.StatusCode.INTERNAL,
        )
    try:
        return {
            output.name: datatypes.decode(output.datatype, output.shape, raw)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
    except ValueError as error:
        raise ClientError(f"the answer cannot be read: {error}", grpc.StatusCode.INTERNAL) from error
