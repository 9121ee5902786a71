"""JSON to protobuf messages and back: tensors as JSON, and the binary tensor extension behind it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.types import Tensor

Document = dict[str, Any]

JSON_BYTES = 32 * 2**20
"""The largest JSON of an inference request: parsing holds up every other request. Larger tensors travel as binary."""
_MOST = 256
"""The most inputs, outputs or parameters of one request."""
_INT64 = 2**63
_REGION = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
_BOM = b"\xef\xbb\xbf"
_IMAGES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the client wants the outputs.

    Attributes:
        every: Whether as binary, unless `by_name` says otherwise.
        by_name: The same for some.
        regions: Those that go to its shared memory, with the parameters that say where.
    """

    every: bool = False
    by_name: Mapping[str, bool] = field(default_factory=dict)
    regions: Mapping[str, Document] = field(default_factory=dict)

    def binary(self, name: str) -> bool:
        """Whether this output goes behind the JSON."""
        return self.by_name.get(name, self.every)


def _instead(data: bytes | bytearray | memoryview) -> str:
    """What a body that is no JSON is, and how it is sent: curl says of itself that it sends a form."""
    start = bytes(data[:4])
    if kind := next((kind for magic, kind in _IMAGES.items() if start.startswith(magic)), ""):
        return f"it is an image, which is sent with the header Content-Type: {kind}"
    if start.startswith(b"--"):
        return "it is a form; send the file itself as the body, with the header Content-Type: image/jpeg (or png, webp)"
    return ""


def parse(data: bytes | bytearray | memoryview) -> Document:
    """A JSON object; nothing at all is an empty one, and a byte order mark before it is passed over.

    Raises:
        InvalidRequest: It is not JSON, or not an object.
    """
    if data[:3] == _BOM:
        data = data[3:]
    if not len(data):
        return {}
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"failed to parse the request JSON: {_instead(data) or error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"the request JSON must be an object, got {_kind(document)}")
    return document


def request_from_body(body: memoryview, json_bytes: int | None, message: pb.ModelInferRequest) -> Wanted:
    """Fills `message` with the inference request in a body.

    Args:
        body: JSON, and behind it the tensors that have `binary_data_size`, in the order of the inputs.
        json_bytes: How much of it is JSON (Inference-Header-Content-Length); None for all of it.
        message: Has the model's name and version already.

    Raises:
        InvalidRequest: It is not what the protocol says.
    """
    head = len(body) if json_bytes is None else json_bytes
    if head > len(body):
        raise InvalidRequest(f"Inference-Header-Content-Length is {head}, but the body has {len(body)} bytes")
    if head > JSON_BYTES:
        raise Oversize(f"the request JSON has {head} bytes, {JSON_BYTES} are allowed; send tensors as binary data")
    document = parse(body[:head])
    identity = document.get("id")
    message.id = str(identity) if type(identity) is int else text(document, "id", "")
    parameters = members(document, "parameters")
    every = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    set_parameters(message.parameters, parameters)
    tail = body[head:]
    for entry in _objects(document, "inputs"):
        tail = _add_input(message, entry, tail)
    if len(tail):
        raise InvalidRequest(f"{len(tail)} bytes of binary data follow what the inputs account for")
    by_name, regions = {}, {}
    for entry in _objects(document, "outputs"):
        output = message.outputs.add(name=text(entry, "name"))
        own = members(entry, "parameters")
        if "binary_data" in own:
            by_name[output.name] = _flag(own.pop("binary_data"), "binary_data")
        if "shared_memory_region" in own:
            regions[output.name] = {name: own[name] for name in _REGION if name in own}
        set_parameters(output.parameters, own)
    return Wanted(every, by_name, regions)


def _add_input(message: pb.ModelInferRequest, entry: Document, tail: memoryview) -> memoryview:
    """Adds one input; returns what is left of the binary data."""
    name, datatype = text(entry, "name"), text(entry, "datatype")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and -_INT64 <= n < _INT64 for n in shape):
        raise InvalidRequest(f"'shape' of input '{name}' must be a list of integers")
    if len(shape) > datatypes.MAX_RANK:
        raise InvalidRequest(f"input '{name}' has {len(shape)} dimensions, {datatypes.MAX_RANK} are allowed")
    parameters = members(entry, "parameters")
    size = parameters.pop("binary_data_size", None)
    tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
    set_parameters(tensor.parameters, parameters)
    if "shared_memory_region" in parameters:
        if size is not None or entry.get("data") is not None:
            raise InvalidRequest(f"input '{name}' has both shared memory and data of its own; give one of them")
        return tail
    if size is None:
        if entry.get("data") is None:
            raise InvalidRequest(f"input '{name}' has neither 'data' nor the parameter 'binary_data_size'")
        message.raw_input_contents.append(_raw_from_json(entry["data"], datatype, shape, name))
        return tail
    if entry.get("data") is not None:
        raise InvalidRequest(f"input '{name}' has both 'data' and the parameter 'binary_data_size'; give one of them")
    if type(size) is not int or not 0 <= size <= len(tail):
        raise InvalidRequest(
            f"'binary_data_size' of input '{name}' must be an integer of 0 to {len(tail)}, the bytes that are left, "
            f"got {_shown(size)}"
        )
    message.raw_input_contents.append(tail[:size].tobytes())
    return tail[size:]


def _raw_from_json(data: object, datatype: str, shape: list[int], name: str) -> bytes:
    try:
        return datatypes.encode(tensor_from_json(data, datatype, shape), datatype)
    except ValueError as error:
        raise InvalidRequest(f"input '{name}': {error}") from None


def tensor_from_json(data: object, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor from nested or flat JSON, row-major.

    Numbers that are not finite are the texts "NaN", "Infinity" and "-Infinity".

    Raises:
        ValueError: An element does not fit the datatype, or their number does not fit the shape.
    """
    dtype = datatypes.numpy_dtype(datatype)
    if not isinstance(data, list):
        raise ValueError(f"'data' must be a list, got {_kind(data)}")
    # Objects first: numpy's own guess would make every text as long as the longest.
    flat = np.array(data, dtype=np.object_).ravel().tolist()
    if min(shape, default=0) < 0 or len(flat) != math.prod(shape):
        raise ValueError(f"shape {list(shape)} needs {math.prod(shape)} elements, got {len(flat)}")
    kinds = set(map(type, flat))
    if list in kinds:
        raise ValueError("the lists in 'data' are of different lengths")
    if datatype == "BYTES":
        if not kinds <= {str}:
            raise ValueError("BYTES elements are JSON texts")
        array: Tensor = np.empty(len(flat), np.object_)
        array[:] = [element.encode() for element in flat]
    elif dtype.kind == "b":
        if not kinds <= {bool, int} or not set(flat) <= {0, 1}:
            raise ValueError("BOOL elements are true or false")
        array = np.array(flat, dtype)
    elif dtype.kind in "iu":
        if not kinds <= {int}:
            raise ValueError(f"{datatype} elements are integers")
        array = _checked(flat, datatype, dtype)
    else:
        if str in kinds:
            flat = [_NOT_FINITE.get(element, element) if type(element) is str else element for element in flat]
            kinds = set(map(type, flat))
        if not kinds <= {int, float}:
            raise ValueError(f'{datatype} elements are numbers, or the texts "NaN", "Infinity" and "-Infinity"')
        array = _checked(flat, datatype, dtype)
    return datatypes.shaped(array, shape)


def _checked(flat: list[Any], datatype: str, dtype: np.dtype[np.generic]) -> Tensor:
    try:
        if dtype.kind in "iu":
            return np.array(flat, dtype)
        with np.errstate(over="raise"):
            return np.array(flat, np.float64).astype(dtype)
    except (OverflowError, FloatingPointError):
        raise ValueError(f"'data' holds values that {datatype} cannot") from None


def body_from_response(response: pb.ModelInferResponse, wanted: Wanted) -> tuple[bytes, list[bytes]]:
    """The JSON of an answer, and the tensors that follow it.

    Raises:
        InvalidRequest: A BYTES output that is wanted as JSON is not text.
    """
    document: Document = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = _parameters(response.parameters)
    document["outputs"] = []
    tail: list[bytes] = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        shown: Document = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        parameters = _parameters(output.parameters)
        if (region := wanted.regions.get(output.name)) is not None:
            parameters |= region
        elif wanted.binary(output.name):
            parameters["binary_data_size"] = len(raw)
            tail.append(raw)
        else:
            array = datatypes.decode(output.datatype, list(output.shape), raw)
            shown["data"] = json_from_tensor(array, output.name)
        if parameters:
            shown["parameters"] = parameters
        document["outputs"].append(shown)
    return dumps(document), tail


def json_from_tensor(array: Tensor, name: str) -> object:
    """The elements of an output in row-major order, as `dumps` takes them.

    Raises:
        InvalidRequest: An element of a BYTES tensor is not UTF-8.
    """
    flat = array.ravel()
    if flat.dtype.kind == "O":
        try:
            return [element.decode() for element in flat.tolist()]
        except UnicodeDecodeError:
            raise InvalidRequest(f"output '{name}' holds bytes that are not text; ask for it as binary_data") from None
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        texts = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
        return [n if math.isfinite(n) else texts[str(n)] for n in flat.tolist()]
    return np.ascontiguousarray(flat)


def dumps(document: object) -> bytes:
    """JSON text; numpy arrays are lists of numbers."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def document_from_message(message: Message) -> Document:
    """A message as JSON, every field under its own name, also where it has its default; messages only where set."""
    shown: Document = {}
    for each in message.DESCRIPTOR.fields:
        if each.has_presence and not message.HasField(each.name):
            continue
        value = getattr(message, each.name)
        entry = each.message_type
        if entry is not None and entry.GetOptions().map_entry:
            of = entry.fields_by_name["value"]
            shown[each.name] = {str(key): _json_value(of, value[key]) for key in value}
        elif each.is_repeated:
            shown[each.name] = [_json_value(each, one) for one in value]
        else:
            shown[each.name] = _json_value(each, value)
    return shown


def _json_value(field: Any, value: Any) -> object:
    if field.message_type is not None:
        return document_from_message(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def set_parameters(parameters: MutableMapping[str, Any], values: Document) -> None:
    """Sets protobuf parameters to JSON values by their type.

    Raises:
        InvalidRequest: A value is neither a text, a number nor a boolean.
    """
    for name, value in values.items():
        if isinstance(value, bool):
            parameters[name].bool_param = value
        elif isinstance(value, str):
            parameters[name].string_param = value
        elif isinstance(value, float):
            parameters[name].double_param = value
        elif isinstance(value, int) and value < _INT64:
            parameters[name].int64_param = value
        elif isinstance(value, int):
            parameters[name].uint64_param = value
        else:
            raise InvalidRequest(f"parameter '{name}' must be a text, a number or a boolean, got {_kind(value)}")


def _parameters(parameters: MutableMapping[str, Any]) -> Document:
    return {name: getattr(p, p.WhichOneof("parameter_choice") or "", None) for name, p in parameters.items()}


def text(document: Document, name: str, default: str | None = None) -> str:
    """A member that must be a text; null is as if it were missing.

    Raises:
        InvalidRequest: It is something else, or it is missing and there is no default.
    """
    value = document.get(name)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise InvalidRequest(f"'{name}' must be a text, got {_kind(value)}")
    return value


def whole(document: Document, name: str, default: int | None = None) -> int:
    """A member that must be an integer of 0 to 2^63-1; null is as if it were missing.

    Raises:
        InvalidRequest: It is something else, or it is missing and there is no default.
    """
    value = document.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 0 <= value < _INT64:
        raise InvalidRequest(f"'{name}' must be an integer of 0 to 2^63-1, got {_shown(value)}")
    return value


def members(document: Document, name: str) -> Document:
    """A member that must be an object, or is missing; in it and for it, null is as if it were missing.

    Raises:
        InvalidRequest: It is something else, or has too many members.
    """
    value = document.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MOST:
        raise InvalidRequest(f"'{name}' must be an object of at most {_MOST} members, got {_kind(value)}")
    return {key: one for key, one in value.items() if one is not None}


def _objects(document: Document, name: str) -> list[Document]:
    value = document.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MOST or not all(isinstance(one, dict) for one in value):
        raise InvalidRequest(f"'{name}' must be a list of at most {_MOST} objects, got {_kind(value)}")
    return value


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter '{name}' must be true or false, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "nothing")


def _shown(value: object) -> str:
    return str(value) if isinstance(value, int | float) else _kind(value)
