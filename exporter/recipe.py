"""The steps of a compression and their parameters, checked; from flags, or from a TOML recipe. No heavy imports.

A recipe is a list of steps, done in its order:

    [[step]]
    step = "prune"
    ratio = 0.5

    [[step]]
    step = "finetune"
    epochs = 10

    [[step]]
    step = "int8"

It names no folders: what data there is depends on the machine, and is said on the command line. docs/compression.md
explains every step.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from convoynet.exporter.errors import BadInput

CALIBRATION_METHODS = ("minmax", "percentile", "entropy", "mse", "auto")
DEFAULT_METHOD = "mse"
PRUNE_METHODS = ("magnitude", "bn", "taylor", "ablation", "random")
SPARSE_PATTERN = "2:4"
LOW_RANK_LAYERS = ("linear", "pointwise", "spatial")
ORIGINAL = "original"


class Step:
    """One step; subclasses are frozen dataclasses whose fields are the keys of the recipe."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The step as a recipe has it: its kind, and the parameters that are set."""
        stated = asdict(self)  # type: ignore[call-overload]
        return {"step": self.kind} | {name: value for name, value in stated.items() if value is not None}


@dataclass(frozen=True)
class Separable(Step):
    """Replace standard convolutions by depthwise-separable ones (A. Howard et al. 2017, MobileNets, section 3.1).

    Attributes:
        ratio: share of the multiply-adds of those convolutions that are replaced, the costliest first; 1 is all.
    """

    kind: ClassVar[str] = "separable"
    ratio: float = 1.0

    def __post_init__(self) -> None:
        _within(self, "ratio", 0, 1, "least")


@dataclass(frozen=True)
class Prune(Step):
    """Remove whole channels, in groups that depend on each other (G. Fang et al. 2023, DepGraph).

    Attributes:
        ratio: share to remove of what `of` names.
        of: "macs" (multiply-adds) or "latency" (measured on this machine, batch 1, in the runtime that will serve).
        method: which channels go first: small weights ("magnitude"), small batch-norm scales ("bn", Z. Liu et al.
            2017, Network Slimming), little effect on the loss by a first-order Taylor expansion ("taylor", P. Molchanov
            et al. 2019), little effect on the answers when they are left out one at a time ("ablation", B. Zhou et al.
            2018), or any ("random", the control).
        scope: "uniform" removes the same share of each group; "global" compares channels across the network.
        round_to: channels left are a multiple of it; None means what the target likes.
        reconstruct: fit the weights that are left, so that each layer makes what it made before (Y. He et al. 2017,
            ThiNet): least squares on the images of --calibration.
    """

    kind: ClassVar[str] = "prune"
    ratio: float
    of: str = "macs"
    method: str = "magnitude"
    scope: str = "uniform"
    round_to: int | None = None
    reconstruct: bool = False

    def __post_init__(self) -> None:
        _within(self, "ratio", 0, 1, "both")
        _one_of(self, "of", self.of, ("macs", "latency"))
        _one_of(self, "method", self.method, PRUNE_METHODS)
        _one_of(self, "scope", self.scope, ("uniform", "global"))
        if self.round_to is not None:
            _within(self, "round_to", 1, 64)


@dataclass(frozen=True)
class Sparsify(Step):
    """Set single weights to zero, the smallest first; the shapes stay.

    Attributes:
        pattern: "2:4" (two of every four along the input channels; A. Mishra et al. 2021, "Accelerating Sparse Deep
            Neural Networks") or "unstructured" (S. Han et al. 2015).
        ratio: share of each layer's weights that becomes zero where the pattern is "unstructured".
    """

    kind: ClassVar[str] = "sparsify"
    pattern: str = SPARSE_PATTERN
    ratio: float | None = None

    def __post_init__(self) -> None:
        _one_of(self, "pattern", self.pattern, (SPARSE_PATTERN, "unstructured"))
        if (self.ratio is None) != (self.pattern == SPARSE_PATTERN):
            raise BadInput(f'step {self.kind}: "unstructured" needs a ratio, and "{SPARSE_PATTERN}" takes none')
        if self.ratio is not None:
            _within(self, "ratio", 0, 1, "both")


@dataclass(frozen=True)
class LowRank(Step):
    """Factorize layers: SVD of fully connected and 1x1 convolutions, Tucker-2 of others (Y. Kim et al. 2016).

    Attributes:
        ratio: share of the parameters of each factorized layer to remove; this or `energy`.
        energy: share of the squared singular values to keep.
        layers: which kinds: any of LOW_RANK_LAYERS.
        gate: keep a factorization only where it is measured to be faster.
    """

    kind: ClassVar[str] = "low-rank"
    ratio: float | None = None
    energy: float | None = None
    layers: tuple[str, ...] = LOW_RANK_LAYERS
    gate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if (self.ratio is None) == (self.energy is None):
            raise BadInput(f"step {self.kind}: give either ratio or energy")
        for name in ("ratio", "energy"):
            if getattr(self, name) is not None:
                _within(self, name, 0, 1, "both")
        if not self.layers:
            raise BadInput(f"step {self.kind}: layers is empty; use some of {', '.join(LOW_RANK_LAYERS)}")
        for layer in self.layers:
            _one_of(self, "layers", layer, LOW_RANK_LAYERS)


@dataclass(frozen=True)
class Finetune(Step):
    """Train, on --finetune's images or, where there are none, without labels on those of --calibration.

    Attributes:
        epochs: passes over the images.
        steps: optimizer steps instead of epochs.
        batch: images of one step.
        lr: the largest learning rate of SGD with momentum 0.9; it warms up, then falls along a half cosine.
        distill: match the teacher's outputs (G. Hinton et al. 2015); without labels this is all there is.
        temperature: that both softmaxes are softened by, where distill is on.
        label_weight: share of the labels in the loss where distill is on and there are labels.
        hints: also match the teacher's features before the classifier (A. Romero et al. 2015, FitNets).
        attention: also match where the teacher looks (S. Zagoruyko, N. Komodakis 2017), at each size of its maps.
        teacher: "original", the network as it was before any step, or "NAME" or "NAME:WEIGHTS" of `convoy archs`.
        augment: random flips and shifts.
    """

    kind: ClassVar[str] = "finetune"
    epochs: int = 10
    steps: int | None = None
    batch: int = 64
    lr: float = 0.01
    distill: bool = True
    temperature: float = 4.0
    label_weight: float = 0.1
    hints: bool = False
    attention: bool = False
    teacher: str = ORIGINAL
    augment: bool = True

    def __post_init__(self) -> None:
        _within(self, "epochs", 1, 10_000)
        if self.steps is not None:
            _within(self, "steps", 1, 10_000_000)
        _within(self, "batch", 2, 4096)
        _within(self, "lr", 0, 10, "least")
        _within(self, "temperature", 0.1, 100)
        _within(self, "label_weight", 0, 1)
        if self.hints and not self.distill:
            raise BadInput(f"step {self.kind}: hints are the teacher's, so they need distill = true")
        if self.attention and not self.distill:
            raise BadInput(f"step {self.kind}: attention is the teacher's, so it needs distill = true")


@dataclass(frozen=True)
class Int8(Step):
    """Quantize weights and activations to 8-bit integers; the last step.

    Attributes:
        method: how the range of each activation is chosen, one of CALIBRATION_METHODS.
        equalize: cross-layer equalization (M. Nagel et al. 2019, section 4.1), where measurement says that it helps.
        correct_means: bias correction (the same, section 4.2) of all layers at once, where it helps.
        correct_bias: the same layer by layer, where it helps: each makes up for those before it as well.
        adaround: learned rounding of the weights (M. Nagel et al. 2020, AdaRound), layer by layer where it helps.
        qat_epochs: passes of quantization-aware fine-tuning over --finetune's images; 0 means none.
        qat_lr: its largest learning rate.
    """

    kind: ClassVar[str] = "int8"
    method: str = DEFAULT_METHOD
    equalize: bool = False
    correct_means: bool = True
    correct_bias: bool = False
    adaround: bool = False
    qat_epochs: int = 0
    qat_lr: float = 3e-5

    @property
    def refines(self) -> bool:
        """Whether it does more to the numbers than calibration and one look at the means."""
        return self.equalize or self.correct_bias or self.adaround

    def __post_init__(self) -> None:
        _one_of(self, "method", self.method, CALIBRATION_METHODS)
        _within(self, "qat_epochs", 0, 10_000)
        _within(self, "qat_lr", 0, 1, "least")


@dataclass(frozen=True)
class Fp16(Step):
    """Store and compute in IEEE half precision, as types of the graph; with int8, what is not quantized."""

    kind: ClassVar[str] = "fp16"


@dataclass(frozen=True)
class Bf16(Step):
    """Store and compute in bfloat16, as types of the graph."""

    kind: ClassVar[str] = "bf16"


@dataclass(frozen=True)
class Fp8(Step):
    """Quantize weights and activations to FP8 (E4M3) for GPUs that have it; the last step."""

    kind: ClassVar[str] = "fp8"
    # Each value is rounded to a sixteenth of itself: there is nothing to gain by clipping.
    method: str = "minmax"

    def __post_init__(self) -> None:
        _one_of(self, "method", self.method, CALIBRATION_METHODS)


STEPS: dict[str, type[Step]] = {
    kind.kind: kind for kind in (Separable, Prune, Sparsify, LowRank, Finetune, Int8, Fp8, Fp16, Bf16)
}
# What changes the PyTorch module; the others are types and Q/DQ pairs of the graph, and come after these.
_OF_THE_MODULE = (Separable, Prune, Sparsify, LowRank, Finetune)


def trains(steps: Sequence[Step]) -> bool:
    """Whether one of the steps takes images to train on."""
    return any(isinstance(step, Finetune) or (isinstance(step, Int8) and bool(step.qat_epochs)) for step in steps)


def check_order(steps: Sequence[Step]) -> None:
    """See that the steps can follow one another.

    Raises:
        BadInput: naming the step that cannot stand where it does.
    """
    of_the_graph = [step.kind for step in steps if not isinstance(step, _OF_THE_MODULE)]
    if len(set(of_the_graph)) < len(of_the_graph):
        raise BadInput(f"step {of_the_graph[-1]}: once is enough")
    for one, other, way_out in (
        ("int8", "fp8", "drop one of them"),
        ("fp16", "bf16", "drop one of them"),
        # Nothing but a GPU runs such a graph, and what nothing ran is not published.
        ("int8", "bf16", "use fp16 beside int8"),
        ("fp8", "bf16", "use fp16 beside fp8"),
    ):
        if one in of_the_graph and other in of_the_graph:
            raise BadInput(f"steps {one} and {other} exclude each other; {way_out}")
    for index, step in enumerate(steps):
        earlier = steps[:index]
        if isinstance(step, _OF_THE_MODULE) and any(not isinstance(other, _OF_THE_MODULE) for other in earlier):
            raise BadInput(f"step {index + 1} ({step.kind}) comes after {earlier[-1].kind}; precision comes last")
        if isinstance(step, Prune | LowRank | Separable) and any(isinstance(other, Sparsify) for other in earlier):
            raise BadInput(f"step {index + 1} ({step.kind}) would undo the zeros of sparsify; put it before")


def load(path: Path) -> tuple[Step, ...]:
    """Read a recipe.

    Raises:
        BadInput: no such file, no TOML, an unknown step or key, or a value that is not allowed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"--recipe {path} cannot be read: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"--recipe {path} is no TOML: {error}") from error
    tables = content.pop("step", None)
    if content or not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadInput(f'--recipe {path} must be a list of [[step]] tables, each with step = "…", and nothing else')
    return from_dicts(tables, f"--recipe {path}")


def from_dicts(tables: Sequence[Mapping[str, Any]], source: str) -> tuple[Step, ...]:
    """Make the steps of a recipe's tables, which `source` names in messages.

    Raises:
        BadInput: an unknown step or key, a value that is not allowed, or an order that cannot be.
    """
    try:
        steps = tuple(_step(index, table) for index, table in enumerate(tables, 1))
        check_order(steps)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error
    return steps


def to_toml(steps: Sequence[Step]) -> str:
    """Write steps as a recipe that `load` reads back to equal ones."""
    # JSON's strings, numbers, booleans and lists are TOML's too.
    tables = [
        "[[step]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in step.to_dict().items())
        for step in steps
    ]
    return "\n".join(tables)


def _step(index: int, table: Mapping[str, Any]) -> Step:
    kind = table.get("step")
    if not isinstance(kind, str) or kind not in STEPS:
        raise BadInput(f"step {index}: {kind!r} is none of {', '.join(STEPS)}")
    made = STEPS[kind]
    keys = {field.name: field for field in fields(made)}  # type: ignore[arg-type]
    given = {name: value for name, value in table.items() if name != "step"}
    if unknown := [name for name in given if name not in keys]:
        raise BadInput(f"step {index} ({kind}): unknown {unknown[0]!r}; it takes {', '.join(keys) or 'nothing'}")
    needed = [name for name, field in keys.items() if field.default is MISSING and name not in given]
    if needed:
        raise BadInput(f"step {index} ({kind}): {needed[0]} is missing")
    types = get_type_hints(made)
    return made(**{name: _typed(index, kind, name, value, types[name]) for name, value in given.items()})


def _typed(index: int, kind: str, name: str, value: object, wanted: Any) -> object:
    """`value`, where it is what the field takes; TOML tells 1 from 1.0 and from true, and so do we but for 1 -> 1.0."""
    allowed = set(get_args(wanted)) - {type(None)} if type(None) in get_args(wanted) else {wanted}
    if tuple[str, ...] in allowed and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) in allowed:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    readable = " or ".join(names.get(item, "a list of texts") for item in allowed)
    raise BadInput(f"step {index} ({kind}): {name} = {value!r} is not {readable}")


def _within(step: Step, name: str, least: float, most: float, excluded: str = "none") -> None:
    """See that a field lies within bounds, of which "none", the "least" or "both" are themselves not allowed."""
    value = getattr(step, name)
    inside = least <= value <= most and (excluded == "none" or value > least) and (excluded != "both" or value < most)
    # Written so that NaN fails too.
    if not inside:
        without = {"none": "", "least": f" without {least:g}", "both": f" without {least:g} and {most:g}"}
        raise BadInput(f"step {step.kind}: {name} {value} is not in {least:g}..{most:g}{without[excluded]}")


def _one_of(step: Step, name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BadInput(f"step {step.kind}: {name} {value!r} is not one of {', '.join(allowed)}")
