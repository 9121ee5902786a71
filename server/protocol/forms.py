"""Requests that differ from earlier ones in their ids and raw tensors alone: what was found of those holds for them.

Most clients send the same request again and again with other pixels. To parse it, to look at each of its fields, to
check them and to build the answer's message took more than everything else that the core does for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.protocol.wire import RAW_OUTPUT, number
from convoynet.server.spec import ModelSpec
from convoynet.server.types import Call, InferRequest, InferResult

_ID = pb.ModelInferRequest.ID_FIELD_NUMBER << 3 | 2
_RAW_TAG = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_RAW_INPUT = bytes([_RAW_TAG])
_ANSWER_ID = bytes([pb.ModelInferResponse.ID_FIELD_NUMBER << 3 | 2])
_FORMS = 256
_SEEN = 4096
_LONGEST = 1024
"""The most bytes of a request beside its raw tensors, and of an id."""
_FIELDS = 64
_SHIFT = 35
"""Bits of a length that are looked at; what has more is longer than any message."""
_LAYOUTS = 64


class Found(NamedTuple):
    """A request of a form that is known: its id and its raw tensors."""

    form: Form
    id: str
    raw: list[memoryview]


class _Input(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    nbytes: int


class Forms:
    """The forms that came twice and were answered, the latest _FORMS of them."""

    def __init__(self) -> None:
        self._known: dict[bytes, Form] = {}
        self._latest: dict[int, Form] = {}
        """By the length of a whole request, the form of the last one that had no id and its tensors at the end."""
        self._seen: set[int] = set()

    def find(self, payload: bytes | memoryview, call: Call) -> Found | None:
        """What a request is, where its form is known; `call.form` is set where it is worth to be learned."""
        latest = self._latest.get(len(payload))
        if latest is not None and (cut := latest.cut(payload)) is not None:
            return Found(latest, "", cut)
        split = _split(payload)
        if split is None:
            return None
        key, given, raw = split
        form = self._known.get(key)
        if form is not None:
            if [len(each) for each in raw] == form.sizes and (text := _text(given)) is not None:
                if len(payload) == form.length:
                    self._latest[len(payload)] = form
                return Found(form, text, raw)
        elif hash(key) in self._seen:
            call.form = key, [len(each) for each in raw]
        else:
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen.add(hash(key))
        return None

    def learn(
        self, found: tuple[bytes, list[int]], request: InferRequest, result: InferResult, spec: ModelSpec
    ) -> None:
        """Keeps the form of a request (Call.form) that a model of that spec has answered, where it is a plain one."""
        key, sizes = found
        form = Form.of(key, sizes, request, result, spec)
        if form is not None:
            if len(self._known) >= _FORMS:
                self.forget(next(iter(self._known.values())))
            self._known[key] = form

    def forget(self, form: Form) -> None:
        """Drops a form, such as one whose model is another now."""
        self._known.pop(form.key, None)
        if self._latest.get(form.length) is form:
            del self._latest[form.length]


class Form:
    """What requests have in common whose bytes are the same but for their ids and raw tensors.

    Attributes:
        model, version: As they name it.
        spec: Of the model that answered one; of any other model nothing is known.
        key: What is the same in all of them.
        sizes: Bytes of each raw tensor.
        length: Of a whole request without an id.
    """

    def __init__(self, key: bytes, request: InferRequest, names: tuple[str, ...], spec: ModelSpec) -> None:
        self.key = key
        self.model, self.version = request.model, request.version
        self.spec = spec
        self._like = request
        self._inputs = [_Input(n, t.shape, t.dtype, t.nbytes) for n, t in request.inputs.items()]
        self.sizes = [each.nbytes for each in self._inputs]
        before = [_RAW_INPUT + number(size) for size in self.sizes]
        before[0] = key + before[0]
        self._pieces = list(zip(before, self.sizes, strict=True))
        self.length = sum(map(len, before)) + sum(self.sizes)
        self._fits = spec, spec.check(request)
        self._outputs = [(name, spec.output_types[name]) for name in names]
        self._layouts: dict[tuple[tuple[int, ...], ...], list[bytes]] = {}
        request.inputs = {}

    @classmethod
    def of(
        cls, key: bytes, sizes: list[int], request: InferRequest, result: InferResult, spec: ModelSpec
    ) -> Form | None:
        """The form of a request, which is not needed any more; None where more of it counts than its bytes."""
        names = tuple([output.name for output in request.outputs] or result.outputs)
        plain = (
            all(_is_plain(datatype) for datatype in request.datatypes.values())
            and all(sizes)
            # Else some lie in shared memory.
            and [tensor.nbytes for tensor in request.inputs.values()] == sizes
            and all(spec.output_types[name] not in ("BYTES", "BF16") for name in names)
            and not any(output.classes or output.place for output in request.outputs)
            # Whose values are looked at in each request.
            and spec.values.keys().isdisjoint(request.inputs)
            and not request.stage_times
        )
        return cls(key, request, names, spec) if plain else None

    def cut(self, payload: bytes | memoryview) -> list[memoryview] | None:
        """The raw tensors of a request of `length` bytes, where it has the form and they stand behind all else."""
        view, at = memoryview(payload), 0
        raw = []
        for before, size in self._pieces:
            begin = at + len(before)
            if payload[at:begin] != before:
                return None
            at = begin + size
            raw.append(view[begin:at])
        return raw

    def request(self, found: Found, call: Call) -> InferRequest:
        """The request, whose tensors are views of its payload."""
        like = self._like
        return InferRequest(
            like.model,
            like.version,
            found.id,
            {i.name: np.ndarray(i.shape, i.dtype, raw) for i, raw in zip(self._inputs, found.raw, strict=True)},
            like.datatypes,
            like.outputs,
            call.deadline,
            like.timeout_us,
            like.priority,
            fits=self._fits,
        )

    def answer(self, result: InferResult, given: str) -> bytes:
        """The bytes of a ModelInferResponse to a request with that id."""
        arrays = [result.outputs[name] for name, _ in self._outputs]
        shapes = tuple([array.shape for array in arrays])
        parts: list[bytes | memoryview] = [*(self._layouts.get(shapes) or self._lay_out(shapes))]
        for index, array in enumerate(arrays):
            parts[2 * index + 2] = datatypes.buffer(array, self._outputs[index][1])
        if given:
            text = given.encode()
            parts += (_ANSWER_ID, number(len(text)), text)
        return b"".join(parts)

    def _lay_out(self, shapes: tuple[tuple[int, ...], ...]) -> list[bytes]:
        """What stands before the bytes of the first output, room for these, what stands before the next, and so on."""
        response = pb.ModelInferResponse(model_name=self.spec.name, model_version=self.spec.version)
        for (name, datatype), shape in zip(self._outputs, shapes, strict=True):
            response.outputs.add(name=name, datatype=datatype, shape=shape)
        parts = [response.SerializeToString()]
        for (_, datatype), shape in zip(self._outputs, shapes, strict=True):
            parts += (RAW_OUTPUT + number(math.prod(shape) * datatypes.itemsize(datatype)), b"")
        if len(self._layouts) >= _LAYOUTS:
            self._layouts.clear()
        self._layouts[shapes] = parts
        return parts


def _is_plain(datatype: str) -> bool:
    return datatype not in ("BYTES", "BF16", "BOOL")


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _split(payload: bytes | memoryview) -> tuple[bytes, bytes, list[memoryview]] | None:
    """A ModelInferRequest without its id and raw tensors, the id, and these; None where it is not as most are.

    Whether that is protobuf nobody needs to know: bytes of a form that is known are.
    """
    view = memoryview(payload)
    size = len(view)
    raw: list[memoryview] = []
    rest: list[memoryview] = []
    given = b""
    at = begin = fields = 0
    try:
        while at < size:
            tag, length, start = view[at], view[at + 1], at + 2
            if length > 0x7F:
                length, shift = length & 0x7F, 7
                while (byte := view[start]) > 0x7F and shift < _SHIFT:
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    start += 1
                length |= byte << shift
                start += 1
            end = start + length
            fields += 1
            if tag & 0x87 != 2 or fields > _FIELDS:
                return None
            if tag == _RAW_TAG:
                if begin < at:
                    rest.append(view[begin:at])
                raw.append(view[start:end])
                begin = end
            elif tag == _ID:
                if given:  # of which the last one counts, and every one has to be text
                    return None
                rest.append(view[begin:at])
                given = bytes(view[start:end])
                begin = end
            at = end
    except IndexError:
        return None
    rest.append(view[begin:])
    if at != size or not raw or sum(map(len, rest)) > _LONGEST or len(given) > _LONGEST:
        return None
    return b"".join(rest), given, raw
