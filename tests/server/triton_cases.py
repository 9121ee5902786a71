"""Good and bad calls of every RPC, in the order in which they are made: both servers get the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from tests.server.triton_requests import (
    REGION_BYTES,
    Case,
    empty_parameter,
    every_type,
    from_region,
    infer,
    log,
    no_raw,
    of_input,
    of_output,
    of_values,
    region,
    texts,
    to_region,
    trace,
    typed,
    typed_of_int8,
    with_parameters,
)


def facts() -> Iterator[Case]:
    for rpc in ("ServerLive", "ServerReady", "ServerMetadata"):
        yield Case(rpc, rpc, (getattr(pb, f"{rpc}Request")(),))
    known = {name: {"name": model} for name, model in {"known": "linear", "unknown": "zz", "no name": ""}.items()}
    for name, version in {"version": "1", "unknown version": "9", "version text": "abc"}.items():
        known[name] = {"name": "linear", "version": version}
    for rpc in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        for name, fields in known.items():
            yield Case(f"{rpc} {name}", rpc, (getattr(pb, f"{rpc}Request")(**fields),))
    yield Case("ModelMetadata unbatched", "ModelMetadata", (pb.ModelMetadataRequest(name="single"),))
    yield Case("ModelConfig unbatched", "ModelConfig", (pb.ModelConfigRequest(name="single"),))


def good() -> Iterator[Case]:
    unbatched = of_input(infer(model_name="single"), shape=[4])
    half = infer(model_name="half")
    half.inputs[0].datatype = "FP16"
    half.raw_input_contents[0] = np.array([[1, 3, np.nan, 3]], np.float16).tobytes()
    for name, message in {
        "one row": infer(),
        "three rows": infer(3),
        "largest batch": infer(8),
        "id": infer(id="r7"),
        "version 1": infer(model_version="1"),
        "one output by name": of_output(infer()),
        "unbatched": unbatched,
        "typed contents": typed(infer(), 1, 2, 3, 4),
        "every datatype": every_type(as_contents=False),
        "every typed datatype": every_type(as_contents=True),
        "custom parameters": with_parameters(infer(), note="n", flag=True, ratio=0.5, number=3),
        "priority int64": with_parameters(infer(), priority=1),
        "priority uint64": with_parameters(infer(), priority=("uint64_param", 1)),
        "timeout": with_parameters(infer(), timeout=60_000_000),
        "timeout uint64": with_parameters(infer(), timeout=("uint64_param", 60_000_000)),
        "empty final response": with_parameters(infer(), triton_enable_empty_final_response=True),
        "top class": of_output(infer(2), classification=1),
        "all classes": of_output(infer(2), classification=3),
        "more classes than there are": of_output(infer(2), classification=99),
        "classes unbatched": of_output(of_input(infer(model_name="single"), shape=[4]), classification=2),
        "classes of FP16": of_output(half, classification=3),
        "classes of integers": of_output(every_type(as_contents=False), "out_INT32", classification=2),
        "classes of FP64": of_output(every_type(as_contents=False), "out_FP64", classification=2),
        "classes with ties": of_output(of_values(0, 0, 0, 0), classification=3),
        "unknown output parameter": of_output(infer(), nothing=3),
        "binary_data of HTTP": of_output(infer(), binary_data=True),
    }.items():
        yield Case(name, "ModelInfer", (message,))


def bad() -> Iterator[Case]:
    twice = infer()
    twice.inputs.add(name="input", datatype="FP32", shape=[1, 4])
    twice.raw_input_contents.append(twice.raw_input_contents[0])
    surplus, both, extra = infer(), infer(), infer()
    surplus.raw_input_contents.append(b"")
    both.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    extra.inputs.add(name="zz", datatype="FP32", shape=[1, 4])
    extra.raw_input_contents.append(bytes(16))
    none = infer()
    del none.inputs[:], none.raw_input_contents[:]
    few = infer()
    few.inputs.add(name="zz", datatype="FP32", shape=[1, 4])
    for name, message in {
        "unknown model": infer(model_name="zz"),
        "no model": infer(model_name=""),
        "unknown version": infer(model_version="9"),
        "version text": infer(model_version="abc"),
        "version negative": infer(model_version="-1"),
        "wrong input name": of_input(infer(), name="zz"),
        "no input": none,
        "one input too many": extra,
        "input twice": twice,
        "wrong datatype": of_input(infer(), datatype="INT32"),
        "wrong datatype of another size": of_input(infer(), datatype="FP64"),
        "unknown datatype": of_input(infer(), datatype="FP99"),
        "wrong shape": of_input(infer(), shape=[1, 5]),
        "wrong rank": of_input(infer(), shape=[1, 2, 2]),
        "no batch axis": of_input(infer(), shape=[4]),
        "no shape": of_input(infer(), shape=[]),
        "negative shape": of_input(infer(), shape=[-1, 4]),
        "huge shape": of_input(infer(), shape=[2**40, 2**40]),
        "empty batch": infer(0),
        "batch too large": infer(9),
        "too few bytes": of_input(infer(), shape=[2, 4]),
        "too many bytes": of_input(infer(2), shape=[1, 4]),
        "surplus raw contents": surplus,
        "missing raw contents": few,
        "no data": no_raw(infer()),
        "typed and raw": both,
        "typed in the wrong field": typed(infer(), 1, 2, 3, 4, field="int_contents"),
        "too few typed": typed(infer(), 1, 2),
        "too many typed": typed(infer(), 1, 2, 3, 4, 5),
        "typed INT8 out of range": typed_of_int8(1000),
        "typed FP16": typed(of_input(infer(model_name="half"), datatype="FP16"), 1, 2, 3, 4),
        "unknown output": of_output(infer(), "zz"),
        "output twice": of_output(of_output(infer())),
        "reserved parameter": with_parameters(infer(), triton_foo=1),
        "priority as text": with_parameters(infer(), priority="1"),
        "priority negative": with_parameters(infer(), priority=-1),
        "timeout as text": with_parameters(infer(), timeout="1"),
        "timeout negative": with_parameters(infer(), timeout=-1),
        "timeout as a fraction": with_parameters(infer(), timeout=1.5),
        "no classes": of_output(infer(), classification=0),
        "classes negative": of_output(infer(), classification=-1),
        "classes as text": of_output(infer(), classification="3"),
        "classes of BOOL": of_output(every_type(as_contents=False), "out_BOOL", classification=1),
        "classes of BYTES": of_output(texts(b"\x01\x00\x00\x00a\x00\x00\x00\x00"), "out_BYTES", classification=1),
        "wrong with id": of_input(infer(id="r9"), shape=[1, 5]),
        "wrong bytes with id": of_input(infer(id="r9"), shape=[2, 4]),
        "broken BYTES": texts(b"\x09\x00\x00\x00ab\x00\x00\x00\x00"),
        "too few typed BYTES": typed(texts(b""), b"a", field="bytes_contents"),
        "sequence_id": with_parameters(infer(), sequence_id=3),
        "sequence_start as text": with_parameters(infer(), sequence_start="yes"),
        "headers": with_parameters(infer(), headers="x"),
        "empty parameter": empty_parameter(),
    }.items():
        yield Case(name, "ModelInfer", (message,))


def streams() -> Iterator[Case]:
    rpc = "ModelStreamInfer"
    wrong = of_input(infer(id="b"), shape=[1, 5])
    yield Case("stream of three", rpc, (infer(id="a"), infer(2, id="b"), infer(id="c")))
    yield Case("stream with an error", rpc, (infer(id="a"), wrong, infer(id="c")))
    yield Case("stream with an unknown model", rpc, (infer(id="a", model_name="zz"), infer(id="c")))
    yield Case("stream that ends with an error", rpc, (infer(id="a"), wrong), (("triton_grpc_error", "true"),))
    yield Case("stream without the flag", rpc, (infer(id="a"), wrong), (("triton_grpc_error", "false"),))
    final = with_parameters(infer(id="a"), triton_enable_empty_final_response=True)
    yield Case("stream with an empty final response", rpc, (final,))
    yield Case("empty stream", rpc, ())


def repository() -> Iterator[Case]:
    yield Case("index", "RepositoryIndex", (pb.RepositoryIndexRequest(),))
    yield Case("index of the ready", "RepositoryIndex", (pb.RepositoryIndexRequest(ready=True),))
    yield Case("index of a repository", "RepositoryIndex", (pb.RepositoryIndexRequest(repository_name="zz"),))
    load, unload = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest
    yield Case("load unknown", "RepositoryModelLoad", (load(model_name="zz"),))
    yield Case("unload unknown", "RepositoryModelUnload", (unload(model_name="zz"),))
    message = load(model_name="linear", repository_name="zz")
    yield Case("load of a repository", "RepositoryModelLoad", (message,))
    yield Case("unload of a repository", "RepositoryModelUnload", (unload(model_name="zz", repository_name="zz"),))
    for name, text in {"not JSON": "{", "a list": "[]", "an unknown field": '{"nothing": 1}'}.items():
        message = load(model_name="linear")
        message.parameters["config"].string_param = text
        yield Case(f"load with a config that is {name}", "RepositoryModelLoad", (message,))
    message = load(model_name="linear")
    message.parameters["config"].int64_param = 1
    yield Case("load with a config of the wrong type", "RepositoryModelLoad", (message,))
    message = load(model_name="linear")
    message.parameters["nothing"].string_param = "1"
    yield Case("load with an unknown parameter", "RepositoryModelLoad", (message,))
    message = load(model_name="linear")
    message.parameters["file:1/model.x"].string_param = "1"
    yield Case("load with a file of the wrong type", "RepositoryModelLoad", (message,))
    message = load(model_name="linear")
    message.parameters["file:1/model.x"].bytes_param = b"1"
    yield Case("load with files and no config", "RepositoryModelLoad", (message,))
    yield Case("load again", "RepositoryModelLoad", (load(model_name="other"),))
    message = unload(model_name="other")
    message.parameters["unload_dependents"].bool_param = True
    yield Case("unload", "RepositoryModelUnload", (message,))
    message = unload(model_name="other")
    message.parameters["unload_dependents"].int64_param = 1
    yield Case("unload with a parameter of the wrong type", "RepositoryModelUnload", (message,))
    message = unload(model_name="other")
    message.parameters["nothing"].int64_param = 1
    yield Case("unload with an unknown parameter", "RepositoryModelUnload", (message,))
    other = infer(model_name="other")
    yield Case("infer unloaded", "ModelInfer", (other,))
    yield Case("ready unloaded", "ModelReady", (pb.ModelReadyRequest(name="other"),))


def shared_memory() -> Iterator[Case]:
    register, status = "SystemSharedMemoryRegister", "SystemSharedMemoryStatus"
    unregister = "SystemSharedMemoryUnregister"
    ask = pb.SystemSharedMemoryStatusRequest
    yield Case("regions, none", status, (ask(),))
    yield Case("region unknown", status, (ask(name="r"),))
    for name, message in {
        "region": region(),
        "region again": region(),
        "region of no name": region(""),
        "region of no key": region("k", ""),
        "region whose key is missing": region("m", "/convoy_nothing"),
        "region of a private key": region("p", "/triton_python_backend_shm_region_1"),
        "region beyond the file": region("b", size=REGION_BYTES + 4096),
        "region of a huge size": region("h", size=2**63),
        "region with a huge offset": region("o", offset=2**63, size=16),
        "region whose sum overflows": region("s", offset=2**64 - 8, size=16),
        "region of no bytes": region("z", size=0),
        "region of a path": region("t", "/../etc/passwd"),
        "second region": region("r2", offset=64, size=64),
    }.items():
        yield Case(name, register, (message,))
    yield Case("regions", status, (ask(),))
    yield Case("one region", status, (ask(name="r2"),))
    with_raw = from_region()
    with_raw.raw_input_contents.append(bytes(16))
    with_contents = from_region()
    with_contents.inputs[0].contents.fp32_contents.append(1)
    for name, message in {
        "input from a region": from_region(),
        "input from a region with an offset": from_region(shared_memory_offset=32),
        "input from a second region": from_region("r2"),
        "input from an unknown region": from_region("zz"),
        "input beyond the region": from_region(shared_memory_offset=REGION_BYTES - 8),
        "input of the wrong size in a region": from_region(size=20),
        "input of no size in a region": from_region(size=0),
        "input with a negative size in a region": from_region(size=-1),
        "input with a negative offset": from_region(shared_memory_offset=-8),
        "input with a huge offset": from_region(shared_memory_offset=2**62),
        "input with the size as text": from_region(size="16"),
        "input from a region and raw": with_raw,
        "input from a region and typed": with_contents,
        "output to a region": to_region(),
        "output to a region with an offset": to_region(shared_memory_offset=64),
        "output to a region that is too small": to_region(size=8),
        "output beyond the region": to_region(shared_memory_offset=REGION_BYTES - 8),
        "output to an unknown region": to_region(name="zz"),
        "output to a region as classes": to_region(classification=1),
    }.items():
        yield Case(name, "ModelInfer", (message,))
    forget = pb.SystemSharedMemoryUnregisterRequest
    yield Case("unregister", unregister, (forget(name="r2"),))
    yield Case("unregister again", unregister, (forget(name="r2"),))
    yield Case("unregister unknown", unregister, (forget(name="zz"),))
    yield Case("unregister all", unregister, (forget(),))
    yield Case("regions, none left", status, (ask(),))
    yield Case("cuda regions", "CudaSharedMemoryStatus", (pb.CudaSharedMemoryStatusRequest(),))
    yield Case("cuda region unknown", "CudaSharedMemoryStatus", (pb.CudaSharedMemoryStatusRequest(name="c"),))
    message = pb.CudaSharedMemoryRegisterRequest(name="c", raw_handle=bytes(64), device_id=0, byte_size=64)
    yield Case("cuda register", "CudaSharedMemoryRegister", (message,))
    yield Case("cuda unregister", "CudaSharedMemoryUnregister", (pb.CudaSharedMemoryUnregisterRequest(name="c"),))
    yield Case("cuda unregister all", "CudaSharedMemoryUnregister", (pb.CudaSharedMemoryUnregisterRequest(),))


def settings() -> Iterator[Case]:
    for name, message in {
        "trace": trace(),
        "trace of a model": trace("linear"),
        "trace of an unknown model": trace("zz"),
        "trace rate": trace(trace_rate=["7"]),
        "trace level": trace(trace_level=["TIMESTAMPS", "TENSORS"]),
        "trace level off": trace(trace_level=["OFF"]),
        "trace count": trace(trace_count=["5"]),
        "trace count below -1": trace(trace_count=["-2"]),
        "trace log frequency": trace(log_frequency=["2"]),
        "trace rate of a model": trace("linear", trace_rate=["3"]),
        "trace after it": trace(),
        "trace of the model after it": trace("linear"),
        "trace rate of the model cleared": trace("linear", trace_rate=[]),
        "trace rate cleared": trace(trace_rate=[]),
        "trace rate as text": trace(trace_rate=["often"]),
        "trace rate negative": trace(trace_rate=["-1"]),
        "trace rate huge": trace(trace_rate=["99999999999999"]),
        "trace rate twice": trace(trace_rate=["1", "2"]),
        "trace level unknown": trace(trace_level=["ALL"]),
        "trace level off and more": trace(trace_level=["OFF", "TIMESTAMPS"]),
        "trace file": trace(trace_file=["/tmp/x"]),
        "trace mode": trace(trace_mode=["opentelemetry"]),
        "trace setting unknown": trace(nothing=["1"]),
    }.items():
        yield Case(name, "TraceSetting", (message,))
    for name, message in {
        "log": log(),
        "log verbose level": log(log_verbose_level=2),
        "log verbose level off": log(log_verbose_level=0),
        "log info off": log(log_info=False),
        "log info on": log(log_info=True),
        "log format": log(log_format="ISO8601"),
        "log format back": log(log_format="default"),
        "log format unknown": log(log_format="xml"),
        "log format of the wrong type": log(log_format=True),
        "log info of the wrong type": log(log_info=1),
        "log verbose level of the wrong type": log(log_verbose_level="1"),
        "log file": log(log_file="/tmp/x"),
        "log setting unknown": log(nothing=True),
    }.items():
        yield Case(name, "LogSettings", (message,))


def cases() -> list[Case]:
    """All of them, in the order in which both servers get them."""
    counted = Case("statistics of what was answered", "ModelStatistics", (pb.ModelStatisticsRequest(name="linear"),))
    parts = (facts(), good(), [counted], bad(), streams(), shared_memory(), settings(), repository())
    return [case for part in parts for case in part]
