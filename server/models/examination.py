"""What a trial of a model means for how it is served: by which engine, in which batches, warmed up with what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.trials import TRIED, Trials, Verdict
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import EngineOptions, ModelSpec

log = logging.getLogger(__name__)

_ALIKE = "as ONNX Runtime"


@dataclass(frozen=True)
class Examined:
    """A model that was tried.

    Attributes:
        spec: What is to be served.
        together: Whether requests may share a batch.
        told: What was found out, by the name of the config parameter that shows it.
    """

    spec: ModelSpec
    together: bool = True
    told: Mapping[str, str] = field(default_factory=dict)


async def examine(spec: ModelSpec, trials: Trials) -> Examined:
    """Tries a model, or looks up what its trial gave, and says in the log what is not as one would expect.

    Raises:
        InvalidModel: Its file cannot be read.
    """
    if spec.engine.backend not in TRIED:
        return Examined(spec)
    try:
        verdict = await trials.verdict(EngineSpec.of(spec))
    except OSError as error:
        raise InvalidModel(f"its file cannot be read: {error.strerror}") from error
    told: dict[str, str] = {}
    if spec.batch.max_rows and verdict.mixed:
        told["batching"] = f"requests are run alone, since {verdict.mixed}"
    if verdict.blind and not spec.warmup_stated:
        told["warm_up"] = "none, since it took no input that it was tried with: state one in model_warmup"
        spec = replace(spec, warmup=())
    spec = replace(spec, shapes={**verdict.shapes, **spec.shapes})
    if verdict.engine == "openvino":
        options, about = _engine(spec, verdict)
        spec, told = replace(spec, engine=options), {**told, **about}
    for name, text in told.items():
        level = logging.INFO if text.startswith(_ALIKE) else logging.WARNING
        log.log(level, "model %s version %s: %s: %s", spec.name, spec.version, name.replace("_", " "), text)
    return Examined(spec, "batching" not in told, told)


def _engine(spec: ModelSpec, verdict: Verdict) -> tuple[EngineOptions, dict[str, str]]:
    """The engine that is to be asked for, and why."""
    options = spec.engine
    stated = options.engine or options.backend != "onnxruntime"
    if verdict.uncompared:
        return options, {"compared": f"not with ONNX Runtime: {verdict.uncompared}"}
    differs = verdict.differs or ("the process in which it was tried died" if verdict.died else "")
    if not differs:
        alike = f"{_ALIKE}, on {verdict.probes} batches of test numbers"
        return replace(options, finite_only=verdict.finite_only), {"compared": alike}
    if stated:
        return options, {"compared": f"otherwise than ONNX Runtime, but the config asks for it: {differs}"}
    return replace(options, engine="onnxruntime"), {"passed_over": differs}
