"""What a trial of a model means for how it is served: by which engine, in which batches, warmed up with what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.trials import TRIED, Trials, Verdict, release
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import EngineOptions, ModelSpec

log = logging.getLogger(__name__)

_ALIKE, _AS_MEASURED = "as ONNX Runtime", "by the export,"
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}


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
        InvalidModel: Its file cannot be read, or the export excluded every engine that is here.
    """
    if spec.engine.backend not in TRIED:
        return Examined(spec)
    told = _verified(spec.engine)
    try:
        verdict = await trials.verdict(EngineSpec.of(spec))
    except OSError as error:
        raise InvalidModel(f"its file cannot be read: {error.strerror}") from error
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
        level = logging.INFO if text.startswith((_ALIKE, _AS_MEASURED)) else logging.WARNING
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
        finite_only = verdict.finite_only and "onnxruntime" not in options.excluded
        return replace(options, finite_only=finite_only), {"compared": alike}
    if stated:
        return options, {"compared": f"otherwise than ONNX Runtime, but the config asks for it: {differs}"}
    if "onnxruntime" not in engines.choose(options):
        return options, {"compared": f"otherwise than ONNX Runtime, which the export did not verify: {differs}"}
    return replace(options, engine="onnxruntime"), {"passed_over": differs}


def _verified(options: EngineOptions) -> dict[str, str]:
    """What the export found out that bears on the choice of the engine.

    Raises:
        InvalidModel: It excluded every engine that is here.
    """
    if not options.verified and not options.excluded:
        return {}
    first = engines.choose(options)[0]
    told = {}
    if first in options.excluded:
        told["verified"] = f"not {first}, but the config asks for it: {options.excluded[first]}"
    elif first not in options.verified:
        names = ", ".join(options.verified) or "none"
        told["verified"] = f"not {first}: the export verified {names}"
    else:
        measured = options.verified[first]
        here = [release(package) for package in _PACKAGES[first]]
        then = measured.partition(":")[0].rpartition(" ")[2]
        known = any(package.endswith(f" {then}") for package in here)
        told["verified"] = f"{_AS_MEASURED} {measured}" if known else f"in another version than is here: {measured}"
    if passed := [name for name in engines.usual_engines(options) if name in options.excluded and name != first]:
        told["excluded"] = "; ".join(f"{name}: {options.excluded[name]}" for name in passed)
    return told
