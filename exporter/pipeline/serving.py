"""The engines that may serve what is exported: which there are, and each through every gate by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence import verify
from convoynet.exporter.evidence.engines import Engine, exclude, passing, require_one
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.recipe import Bf16, Int8
from convoynet.exporter.running import openvino
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.runtime import Session
from convoynet.processor import adds_in_16_bits

ONNXRUNTIME, OPENVINO, TENSORRT = "onnxruntime", "openvino", "tensorrt"


def engines_of(bench: Workbench) -> list[Engine]:
    """The engines that a server on a machine like this one may take, in its order (server/engines/__init__.py)."""
    config = bench.task.config
    if isinstance(config.half, Bf16):  # ONNX Runtime has no such operators on a CPU
        return [Engine(OPENVINO)]
    if config.target != "cpu" or not openvino.may_serve():
        return [Engine(ONNXRUNTIME)]
    if isinstance(config.quantization, Int8) and adds_in_16_bits():
        return [Engine(ONNXRUNTIME), Engine(OPENVINO)]
    return [Engine(OPENVINO), Engine(ONNXRUNTIME)]


def load(bench: Workbench, engine: Engine, graph: bytes | Path) -> Session | OpenVino:
    """A graph in an engine, as the server runs it; the engine's title and whether it stands in are noted."""
    task = bench.task
    if engine.name == OPENVINO:
        session: Session | OpenVino = OpenVino(graph, task.arch.preprocess, task=task.arch.task, threads=task.threads)
    else:
        session = bench.session(graph)
    engine.title = session.title
    engine.stand_in = task.config.format == TENSORRT or (task.config.target == "gpu" and session.device == "cpu")
    if engine.stand_in:
        engine.title += " on the CPU, a stand-in" if session.device == "cpu" else ", a stand-in"
    return session


def judge(
    bench: Workbench,
    engines: Sequence[Engine],
    stage: str,
    graph: onnx.ModelProto,
    check: Callable[[Engine], None],
    reference: verify.Reference | None,
) -> Engine:
    """Run a graph in every engine that is left, and exclude those that it does not pass the gate in.

    Args:
        bench: the export.
        engines: all of them; what was measured is noted in them.
        stage: what the report calls the graph.
        graph: the graph.
        check: the gate: raises Refused.
        reference: what the gate compares with, where that is not the network that was named.

    Returns:
        The engine that speaks for the stage: ONNX Runtime, which runs every stage, where it is left; else the first.

    Raises:
        Refused: no engine is left.
    """
    content = graph.SerializeToString()
    for engine in passing(engines):
        try:
            session = load(bench, engine, content)
            engine.compared = bench.compare(session)
            engine.to_compressed = None if reference is None else bench.compare(session, reference).parity
            engine.parities[stage] = engine.compared.parity
            check(engine)
        except Refused as refused:
            exclude(engine, refused)
        except Exception as error:
            if not _is_a_runtimes(error):
                raise
            told = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            engine.excluded = f"does not run the {stage} graph: {told}"
    require_one(engines)
    left = passing(engines)
    return next((engine for engine in left if engine.name == ONNXRUNTIME), left[0])


def _is_a_runtimes(error: Exception) -> bool:
    """Whether an engine raised it: OpenVINO raises RuntimeError, ONNX Runtime types of its own without a common one."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
