"""What was measured of a model in each engine that a server may take for it, and which of them it may take.

Engines do not compute alike: INT8 above all is rounded where each of them likes. So every one goes through the gates by
itself. One that does not pass is named with the reason, and excluded in config.pbtxt; one that passes is verified.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence.accuracy import Accuracy
from convoynet.exporter.evidence.parity import Comparison, Parity
from convoynet.exporter.evidence.speed import FP32, shown

_UNPUBLISHED = "; nothing was published"


@dataclass
class Engine:
    """One engine, and what the model is in it.

    Attributes:
        name: as a server's config names it: "onnxruntime", "openvino" or "tensorrt".
        title: the runtime and its version; the name alone before it has run.
        stand_in: whether it ran in the place of one that is not here, so that no server takes it so.
        excluded: why a server must not take it; "" where it may.
        compared: the graph that came last, with the PyTorch model that was named.
        to_compressed: the same with the module after its steps, where there were any: the gates look at this.
        parities: the graphs, in the order in which they were made: "fp32", "int8", ...
        accuracy, speed: of what is published; None where it was not measured.
        refused: by which gate, where it was one.
    """

    name: str
    title: str = ""
    stand_in: bool = False
    excluded: str = ""
    compared: Comparison | None = None
    to_compressed: Parity | None = None
    parities: dict[str, Parity] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    speed: dict[str, Any] | None = None
    refused: Refused | None = None

    def __post_init__(self) -> None:
        self.title = self.title or self.name

    @property
    def gated(self) -> Parity:
        """What the gates look at."""
        assert self.compared is not None
        return self.to_compressed or self.compared.parity

    @property
    def verified(self) -> bool:
        """Whether it passed every gate, and is the one that it stands for."""
        return not self.excluded and not self.stand_in and bool(self.parities)

    @property
    def last(self) -> Parity | None:
        """The parity of the graph that came last."""
        return next(reversed(self.parities.values()), None)

    def to_json(self) -> dict[str, Any]:
        """What report.json says of it."""
        last = self.last
        told = {
            "engine": self.name,
            "runtime": self.title,
            "stand_in": self.stand_in,
            "verified": self.verified,
            "excluded": self.excluded,
            "parity": None if last is None else asdict(last),
            "fp32_parity": asdict(self.parities[FP32]) if FP32 in self.parities else None,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "speed": self.speed,
        }
        return {key: _finite(value) for key, value in told.items()}


def _finite(value: Any) -> Any:
    """A value as JSON can carry it: an engine that is excluded may have answered NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def exclude(engine: Engine, refused: Refused) -> None:
    """Note that an engine did not pass a gate."""
    engine.excluded = str(refused).partition(_UNPUBLISHED)[0]
    engine.refused = refused


def passing(engines: Sequence[Engine]) -> list[Engine]:
    """Those that a server may take, in its order."""
    return [engine for engine in engines if not engine.excluded]


def require_one(engines: Sequence[Engine]) -> None:
    """See that an engine is left.

    Raises:
        Refused: none is; the message is what the gate said of the first, and what became of the others.
    """
    if passing(engines):
        return
    first = next((engine for engine in engines if engine.refused is not None), None)
    if first is None:
        reasons = "; ".join(f"{engine.title} {engine.excluded}" for engine in engines)
        raise Refused(f"no engine takes the graph: {reasons}{_UNPUBLISHED}")
    head, found, tail = str(first.refused).partition(_UNPUBLISHED)
    if others := [f"{engine.title}: {engine.excluded}" for engine in engines if engine is not first]:
        head += f" (in {first.title}; no other engine passes either: {'; '.join(others)})"
    raise Refused(head + found + tail) from first.refused


def parameters(engines: Sequence[Engine]) -> dict[str, str]:
    """The parameters of config.pbtxt by which a server knows which engines were verified, and which were not."""
    verified = {one.name: f"{one.title}: {figures(one)}" for one in engines if one.verified}
    excluded = {one.name: f"{one.title}: {one.excluded}" for one in engines if one.excluded and not one.stand_in}
    told = {"verified_engines": verified, "excluded_engines": excluded}
    return {name: json.dumps(engine) for name, engine in told.items() if engine}


def figures(engine: Engine) -> str:
    """How close it is to PyTorch, in a few words."""
    parity = engine.last
    if parity is None:
        return ""
    told = [f"{parity.agreement_name} {parity.agreement:.2%}"]
    if parity.sqnr_db is not None:
        told.append(f"{parity.sqnr_db:.1f} dB")
    if parity.min_cosine is not None:
        told.append(f"cosine >= {parity.min_cosine:.5f}")
    return f"{', '.join(told)} on {parity.samples} images"


def rows(engines: Sequence[Mapping[str, Any]], precision: str) -> list[dict[str, str]]:
    """A table for people: figures down, engines across.

    Args:
        engines: the report's `engines`.
        precision: of what is published.
    """
    table: list[tuple[str, list[str]]] = []
    for stage, key in ((FP32, "fp32_parity"), (precision, "parity")) if precision != FP32 else ((FP32, "parity"),):
        parities = [engine[key] for engine in engines]
        spreads = [(parity or {}).get("spread") for parity in parities]
        table += [
            (f"{stage}: largest error", [figure(parity, "max_rel_error", ".1e") for parity in parities]),
            (f"{stage}: signal to noise, dB", [figure(parity, "sqnr_db", ".1f") for parity in parities]),
            (
                f"{stage}: error of the spread",
                [figure(spread, "error", ".2g") for spread in spreads],
            ),
            (f"{stage}: smallest cosine", [figure(parity, "min_cosine", ".5f") for parity in parities]),
            (f"{stage}: top-1 agreement", [figure(parity, "top1_agreement", ".2%") for parity in parities]),
            (f"{stage}: matched detections", [figure(parity, "matched", ".2%") for parity in parities]),
        ]
    table.append(("top-1", [figure(engine["accuracy"], "top1", ".2%") for engine in engines]))
    table.append(("right answers lost, gained", [_changes(engine["accuracy"]) for engine in engines]))
    for place, batch in enumerate(_batches(engines)):
        table.append(
            (f"images/s at batch {batch}", [_rate(engine["speed"], place, "images_per_second") for engine in engines])
        )
        if precision != FP32:
            fp32 = [_rate(engine["speed"], place, "fp32_graph_images_per_second") for engine in engines]
            table.append((f"fp32 images/s at batch {batch}", fp32))
    table.append(("serves", [_serves(engine) for engine in engines]))
    titles = [engine["runtime"] for engine in engines]
    return [{"": name, **dict(zip(titles, cells, strict=True))} for name, cells in table if any(cells)]


def figure(found: Mapping[str, Any] | None, key: str, form: str) -> str:
    """A number of a part of report.json, for people; "" where there is none."""
    value = None if found is None else found.get(key)
    return "" if value is None else format(value, form)


def _changes(accuracy: Mapping[str, Any] | None) -> str:
    return "" if accuracy is None else f"{accuracy['lost']}, {accuracy['gained']}"


def _batches(engines: Sequence[Mapping[str, Any]]) -> list[int]:
    measured = [engine["speed"]["batches"] for engine in engines if engine["speed"]]
    return [batch["batch"] for batch in measured[0]] if measured else []


def _rate(speed: Mapping[str, Any] | None, place: int, key: str) -> str:
    if speed is None:
        return ""
    batch = speed["batches"][place]
    if batch["withheld"]:
        return "withheld"
    if batch[key] is None:
        return ""
    low, high = map(shown, batch["quartiles"])
    return shown(batch[key]) + (f" ({low} to {high})" if key == "images_per_second" else "")


def _serves(engine: Mapping[str, Any]) -> str:
    if engine["excluded"]:
        return f"no: {engine['excluded']}"
    return "no, it stands in for the target's" if engine["stand_in"] else "yes"
