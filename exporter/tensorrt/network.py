"""ONNX to a TensorRT network: strongly typed, so that its precisions are those that the graph says."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format

from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.tensorrt import words
from convoynet.exporter.tensorrt.library import Library, recorder
from convoynet.protos.inference import model_config_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from convoynet.exporter.linting.lint import Rule

_CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True)
class Parsed:
    """A network as the parser made it, with what has to live as long as it does."""

    library: Library
    builder: Any
    network: Any
    parser: Any

    @property
    def inputs(self) -> list[Any]:
        """Its input tensors."""
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]


def parse(library: Library, model: bytes | Path) -> Parsed:
    """Let TensorRT's parser read a graph, once the linter has seen that it will read it right.

    Args:
        library: the TensorRT to read it with.
        model: an ONNX model, or the file that holds it; weights beside the file are found.

    Raises:
        BadInput: no ONNX model; quantization that TensorRT does not have (UINT8, INT32, or a zero point that is not
            0), some of which it would misread in silence; or a graph that its parser rejects: the message has the
            linter's words or the parser's, and the node.
        Missing: the graph is quantized, nobody has vouched for it, and onnx, which the linter needs, is not installed.
    """
    if isinstance(model, Path) and not model.is_file():
        raise BadInput(f"{model}: no such file")
    linted = _Linted.of(model)
    if linted is not None:
        linted.require_quantization_that_tensorrt_reads()
    logger = recorder(library)
    logger.errors.clear()
    builder = library.module.Builder(logger)
    network = builder.create_network(_strongly_typed(library))
    parser = library.module.OnnxParser(network, logger)
    read = parser.parse_from_file(str(model)) if isinstance(model, Path) else parser.parse(model)
    if not read:
        if parser.num_errors and parser.get_error(0).code().name == "MODEL_DESERIALIZE_FAILED":
            raise _no_model(model, "the parser finds none in it")
        raise BadInput((linted and linted.first_error()) or words.of_parser(parser))
    if network.num_outputs == 0:
        raise _no_model(model, "it has no outputs")
    if linted is None and _is_quantized(network) and not _is_vouched_for(model):
        raise Missing(
            "this graph is quantized, and TensorRT would misread UINT8 without a word: pip install onnx, for the "
            "linter to look first, or export it with convoy export --target gpu"
        )
    return Parsed(library, builder, network, parser)


def _strongly_typed(library: Library) -> int:
    # TensorRT 11 knows only strongly typed networks, and 10 needs to be told; what is always so may have no flag.
    flags = getattr(library.module, "NetworkDefinitionCreationFlag", None)
    flag = getattr(flags, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _no_model(model: bytes | Path, reason: object) -> BadInput:
    source = str(model) if isinstance(model, Path) else "these bytes"
    return BadInput(f"{source}: no ONNX model ({reason})")


def _is_quantized(network: Any) -> bool:
    types = (network.get_layer(index).type.name for index in range(network.num_layers))
    return any(name in {"QUANTIZE", "DEQUANTIZE"} for name in types)


def _is_vouched_for(model: bytes | Path) -> bool:
    """Whether the file lies in a model repository whose config says that it was exported, and linted, for a GPU."""
    if not isinstance(model, Path):
        return False
    try:
        text = (model.resolve().parent.parent / _CONFIG_FILE).read_text(encoding="utf-8")
        config = text_format.Parse(text, pb.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return False
    return "target" in config.parameters and config.parameters["target"].string_value == "gpu"


@dataclass(frozen=True)
class _Linted:
    """A model under the linter."""

    name: str
    model: "onnx.ModelProto"
    folder: Path | None

    @classmethod
    def of(cls, model: bytes | Path) -> "_Linted | None":
        """None where onnx is not installed, as in a serving image."""
        try:
            from convoynet.exporter.graph.onnx_read import read_model
        except ImportError:
            return None
        if isinstance(model, Path):
            return cls(str(model), read_model(model, weights=False), model.parent)
        return cls("this graph", read_model(model), None)

    def require_quantization_that_tensorrt_reads(self) -> None:
        from convoynet.exporter.linting.lint import TENSORRT_QUANTIZATION

        found = self._errors(TENSORRT_QUANTIZATION)
        if found:
            raise BadInput(found[0])

    def first_error(self) -> str | None:
        from convoynet.exporter.linting.lint import RULES

        lines = self._errors(RULES)
        return f"TensorRT cannot read this graph: {lines[0]}" if lines else None

    def _errors(self, rules: "Iterable[Rule]") -> list[str]:
        from convoynet.exporter.graph.onnx_read import reading
        from convoynet.exporter.linting.lint import lint
        from convoynet.exporter.linting.model import RUNTIMES

        with reading(self.name, self.model):
            found = lint(self.model, RUNTIMES["tensorrt"], folder=self.folder, rules=rules)
        return [finding.line for finding in found if finding.severity == "error"]
