"""What the steps of one export share: the task, the network as it was named, its outputs, the images."""

from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from convoynet.exporter.archs import weights
from convoynet.exporter.errors import Missing
from convoynet.exporter.evidence import verify
from convoynet.exporter.evidence.parity import Comparison, who
from convoynet.exporter.pipeline.preflight import Task
from convoynet.exporter.publishing import model_config
from convoynet.exporter.quantization.tensorrt_reading import as_tensorrt_reads
from convoynet.exporter.recipe import Bf16
from convoynet.exporter.running import openvino
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.pictures import Pictures
from convoynet.exporter.running.runtime import Eager, Predictor, Session


@dataclass(frozen=True)
class Workbench:
    """One export under way.

    Attributes:
        task: what is to be done.
        module: the PyTorch model that the user named, on the CPU, in evaluation mode, or the ONNX file as one.
        weights: where its weights are from.
        eager: runs it.
        reference: its outputs on the images that check.
        pictures: the images.
        checkpoints: folder in which trainings keep their state.
    """

    task: Task
    module: torch.nn.Module
    weights: weights.Weights
    eager: Eager
    reference: verify.Reference
    pictures: Pictures
    checkpoints: Path

    def session(self, graph: bytes | Path) -> Session | OpenVino:
        """Load a graph into the runtime that runs every stage: the target's ONNX Runtime, as far as it is here.

        A graph that is to become an engine is run as TensorRT reads it.

        Raises:
            Missing: bfloat16, and no OpenVINO: ONNX Runtime has no such operators on a CPU.
        """
        task, config = self.task, self.task.config
        if config.format == "tensorrt":
            content = graph if isinstance(graph, bytes) else graph.read_bytes()
            graph = as_tensorrt_reads(onnx.load_model_from_string(content)).SerializeToString()
        session: Session | OpenVino
        if isinstance(config.half, Bf16):
            if not openvino.installed():
                raise Missing("--bf16 is checked in OpenVINO, which is not installed: pip install openvino")
            session = OpenVino(graph, task.arch.preprocess, task=task.arch.task, threads=task.threads)
        else:
            session = Session(
                graph,
                task.arch.preprocess,
                task=task.arch.task,
                target=config.target,
                threads=task.threads,
                optimized=not model_config.needs_basic_optimizations(config),
            )
        if config.format == "tensorrt":
            session.name += ", the graph as TensorRT reads it"
        return session

    def compare(self, exported: Predictor, reference: verify.Reference | None = None) -> Comparison:
        """Compare a model with the named one, or another reference, at telling batch sizes on the images that check."""
        task = self.task
        batch = task.config.batch_range(task.arch.task)
        with task.progress.step(f"compare {exported.name} with {who(self.reference.name)}"):
            return verify.measure_parity(reference or self.reference, exported, self.pictures.check, batch)
