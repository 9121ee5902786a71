"""The process that tries a model before it is served: `python -m convoynet.server.engines.trial`, for trials.py.

It reads an EngineSpec from its input and writes findings to its output, a line of JSON each time it knows more. First
ONNX Runtime answers the probes, as the one whose answers are held to be right; then the other engine must answer alike.
What the engines print goes to the log. Whatever kills this process, what it had written counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from convoynet.server import engines
from convoynet.server.engines.base import Engine, EngineSpec
from convoynet.server.engines.child import settle
from convoynet.server.engines.comparison import Expected, Tolerance, difference, expected, tolerance_of
from convoynet.server.engines.onnx_file import OnnxFile, read_onnx
from convoynet.server.engines.probes import Probe, part, probe, rows_of, styles_of
from convoynet.server.errors import InvalidModel
from convoynet.server.types import Tensor

_SIZES = (8, 1, 32, 224, 64)
"""What free dimensions are tried with where nobody says; the first that the model takes is kept."""
_MOST_ELEMENTS = 1 << 24
"""No larger row is made up: several free dimensions of 224 are soon more than there is memory."""
_SLOW_SECONDS = 0.5
"""A network that takes longer for a row answers fewer probes."""
_SLOW_STYLES = ("usual", "wide")
_FEW_ROWS = 4
_TIES = 12
"""Rows that hold equal numbers of each size of a batch; some hold them where an engine takes the wrong one."""
_ALONE = 2
"""Probes whose rows are also run alone."""
_TELLING = 0.1
"""The part of an output that must be the same when nothing changes, for it to tell anything."""
_NARROWED_INPUTS = frozenset({"INT64", "UINT64", "UINT32", "FP64"})
_NARROWED_OUTPUTS = frozenset({"UINT64", "UINT32", "FP64"})
"""OpenVINO computes them in 32 bits on a CPU. Of an INT64 that a network makes itself (a class, a place) that is
enough, and the probes see to it; what a client sends may be any number."""


@dataclass
class _Asked:
    """A probe, what the reference answered to it, and to some of its rows alone."""

    probe: Probe
    want: Expected
    alone: dict[int, Expected]


@dataclass
class _Reference:
    """What the reference told: its answers, and what they say of the batch.

    Attributes:
        spec: The model, with the sizes of free dimensions that it took.
        asked: The probes that it took.
        refused: What it did not take: the kind of its numbers, and the batch.
        unstable: Outputs that are never the same, even where nothing changes.
        mixed: How rows are shown to depend on each other, in words.
        shown: Whether rows are shown to be answered alike alone and together.
        slow: Whether a row takes long.
    """

    spec: EngineSpec
    asked: list[_Asked] = field(default_factory=list)
    refused: list[tuple[str, Mapping[str, Tensor]]] = field(default_factory=list)
    unstable: set[str] = field(default_factory=set)
    mixed: str = ""
    shown: bool = False
    slow: bool = False


def main() -> None:
    """Tries the model that the input states."""
    findings = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settle("trial")
    for found in try_model(EngineSpec.from_json(sys.stdin.read())):
        findings.write(json.dumps(found) + "\n")
        findings.flush()
    sys.stderr.flush()
    # As in an engine process: the runtimes' threads make an orderly end slow.
    os._exit(0)


def try_model(spec: EngineSpec) -> Iterator[dict[str, Any]]:
    """Fields of trials.Verdict, a few more each time."""
    try:
        names, is_onnx = engines.choose(spec.options), spec.options.file.suffix == ".onnx"
    except InvalidModel:  # loading it will say so
        return
    spec = replace(spec, options=replace(spec.options, device="cpu", gpus=(), slots=1))
    read = read_onnx(spec.options.file) if is_onnx else OnnxFile()
    tolerance = tolerance_of(read, spec.options.precision)
    yield {"engine": names[0], "named": _named(spec, read)}
    uncompared = "" if is_onnx else f"ONNX Runtime does not read {spec.options.file.name}"
    if not uncompared and find_spec("onnxruntime") is None:
        uncompared = "ONNX Runtime is not installed"
    reference = None
    if not uncompared:
        try:
            reference = _ask("onnxruntime", spec, tolerance)
        except InvalidModel as error:
            uncompared = str(error)
    if reference is None:
        try:
            reference = _ask(names[0], spec, tolerance)
        except InvalidModel:  # loading it will say so
            return
    yield {
        "uncompared": uncompared,
        "shapes": {
            t.name: reference.spec.shapes.get(t.name, t.dims) for t in spec.inputs if min(t.dims, default=1) < 0
        },
        "blind": not reference.asked,
        "mixed": reference.mixed,
        "shown": reference.shown and not reference.mixed,
        "ranks": {name: v.ndim for one in reference.asked[:1] for name, v in one.want.answer.items()},
        "probes": len(reference.asked),
    }
    if names[0] != "onnxruntime" and not uncompared:
        yield {"differs": "the process in which it was compared with ONNX Runtime died"}
        yield _compare(names[0], reference, tolerance)


def _named(spec: EngineSpec, read: OnnxFile) -> str:
    """How the file's names deny that the first dimensions are the same everywhere; "" where they do not."""
    first = {t.name: read.rows[t.name] for t in (*spec.inputs, *spec.outputs) if t.name in read.rows}
    if len(set(first.values())) < 2:
        return ""
    return "the file calls the first dimension of " + ", of ".join(f"'{n}' {of!r}" for n, of in first.items())


def _ask(name: str, spec: EngineSpec, tolerance: Tolerance) -> _Reference:
    """Asks an engine for the answers that are held to be right."""
    quiet = {"quiet": True} if name == "onnxruntime" else {}
    with contextlib.closing(engines.make(name, spec, **quiet)) as engine:
        reference = _sized(engine, spec)
        if reference is not None:
            _ask_all(engine, reference, tolerance)
    return reference or _Reference(spec)


def _sized(engine: Engine, spec: EngineSpec) -> _Reference | None:
    """The sizes of free dimensions that an engine takes; None where there are none."""
    free = [t for t in spec.inputs if min(t.dims, default=1) < 0 and t.name not in spec.shapes]
    for size in _SIZES if free else (1,):
        chosen = {t.name: tuple(size if d < 0 else d for d in t.dims) for t in free}
        sized = replace(spec, shapes={**spec.shapes, **chosen})
        if sum(math.prod(sized.shape(t, 1)) for t in spec.inputs) > _MOST_ELEMENTS:
            continue
        for style in ("usual", "ties"):
            inputs = probe(sized, style, min(spec.warmup, default=1)).inputs
            with contextlib.suppress(Exception):  # what a model does not take says nothing about it
                seconds = min(_timed(engine, inputs), _timed(engine, inputs))
                return _Reference(sized, slow=seconds > _SLOW_SECONDS)
    return None


def _timed(engine: Engine, inputs: Any) -> float:
    begun = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - begun


def _ask_all(engine: Engine, reference: _Reference, tolerance: Tolerance) -> None:
    """Asks every probe, and looks whether rows are answered alike alone and together."""
    spec = reference.spec
    rows = min(rows_of(spec), 2) if reference.slow else rows_of(spec)
    reference.unstable = {t.name for t in spec.outputs}
    batches = [(style, rows, 0) for style in (_SLOW_STYLES if reference.slow else styles_of(spec))]
    if rows > _FEW_ROWS:  # of small inputs: an engine may choose another way for each size
        batches += [("ties", size, 1 + draw) for size in range(1, rows + 1) for draw in range(-(-_TIES // size))]
    for style, size, draw in batches:
        one = probe(spec, style, size, draw)
        try:
            answer = _run(engine, one.inputs)
            again = [_run(engine, one.nudged)] if one.nudged is not None else []
            # What changes when nothing does, changes all the more when its input is nudged.
            again += [_run(engine, one.inputs)] if not reference.asked and not again else []
        except Exception:  # an index beyond the table, say
            reference.refused.append((style, one.inputs))
            continue
        asked = _Asked(one, expected(answer, again, overflows=style in ("wide", "extreme")), {})
        reference.unstable -= {n for n in answer if not answer[n].size or asked.want.stable(n).mean() >= _TELLING}
        if size > 1 and len(reference.asked) < (1 if reference.slow else _ALONE):
            for row in sorted({0, size - 1}):
                alone = part(one.inputs, row)
                try:
                    asked.alone[row] = expected(_run(engine, alone), [])
                except Exception:  # some networks want a number of rows of their own
                    reference.refused.append((style, alone))
        reference.asked.append(asked)
        if spec.max_rows and not reference.mixed:
            reference.mixed = _mixed(asked, size, tolerance)
    if spec.max_rows and reference.asked:
        reference.shown = (rows == 1 or len(reference.asked[0].alone) == 2) and not reference.unstable


def _mixed(asked: _Asked, rows: int, tolerance: Tolerance) -> str:
    """How an answer shows that rows are not answered each for itself."""
    for count, answer in ((rows, asked.want.answer), *((1, one.answer) for one in asked.alone.values())):
        for name, values in answer.items():
            if not values.ndim or len(values) != count:
                return f"output '{name}' has the shape {list(values.shape)} for a batch of {count}"
    for row, alone in asked.alone.items():
        if told := difference(asked.want.row(row), alone.answer, tolerance, batched=True):
            return f"a row is answered otherwise alone than in a batch of {rows}: {told}"
    return ""


def _compare(name: str, reference: _Reference, tolerance: Tolerance) -> dict[str, Any]:
    """Whether an engine answers as the reference did."""
    spec = reference.spec
    if told := _incomparable(reference):
        return {"differs": told}
    free = any(d < 0 for t in spec.inputs for d in t.dims)
    rows = {len(next(iter(a.probe.inputs.values()), ())) for a in reference.asked}
    finite_only = reference.slow
    # As it is for any batch, and as it is compiled for each.
    for fixed in ((), sorted({1, *rows})) if spec.max_rows and not free else ((),):
        try:
            with contextlib.closing(engines.make(name, spec, fixed=fixed)) as engine:
                told, finite = _compare_all(engine, reference, tolerance)
        except InvalidModel as error:
            told, finite = str(error), True
        if told:
            return {"differs": told}
        finite_only = finite_only or not finite
    return {"differs": "", "finite_only": finite_only}


def _compare_all(engine: Engine, reference: _Reference, tolerance: Tolerance) -> tuple[str, bool]:
    """How an engine differs on some probe, and whether it does not where numbers are not finite."""
    finite = True
    for asked in reference.asked:
        told = _told(engine, asked, tolerance, reference.spec)
        if told and asked.probe.style != "special":
            return f"on {asked.probe.style} numbers {told}", finite
        finite = finite and not told
    for style, inputs in reference.refused:
        with contextlib.suppress(Exception):
            engine.run(inputs)
            return f"OpenVINO answers a batch of {style} numbers that ONNX Runtime refuses", finite
    return "", finite


def _incomparable(reference: _Reference) -> str:
    """Why answers need not be compared, or cannot be; "" where they can."""
    spec = reference.spec
    for kind, tensors, narrowed in (("in", spec.inputs, _NARROWED_INPUTS), ("out", spec.outputs, _NARROWED_OUTPUTS)):
        if found := next((t for t in tensors if t.datatype in narrowed), None):
            return f"{kind}put '{found.name}' is {found.datatype}, which OpenVINO computes in 32 bits"
    if not reference.asked:
        return "ONNX Runtime takes none of the inputs that it was tried with, so that nothing is compared"
    if reference.unstable:
        changing = sorted(reference.unstable)[0]
        return f"output '{changing}' changes in ONNX Runtime too when nothing does: nothing can be compared"
    return ""


def _told(engine: Engine, asked: _Asked, tolerance: Tolerance, spec: EngineSpec) -> str:
    """How an engine's answer to a probe, or to its rows alone, differs."""
    batches = [(asked.probe.inputs, asked.want)]
    batches += [
        (part(asked.probe.inputs, row), replace(w, moved=asked.want.row(row).moved)) for row, w in asked.alone.items()
    ]
    for inputs, want in batches:
        try:
            answers = [answer := _run(engine, inputs)]
            if spec.seldom:  # what is wanted without them may be another graph
                answers.append(answer | _run(engine, inputs, spec.usual))
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"OpenVINO fails, and ONNX Runtime does not: {lines[-1].strip()[:200]}"
        for answer in answers:
            if told := difference(want, answer, tolerance, batched=bool(spec.max_rows)):
                return f"OpenVINO's {told} as ONNX Runtime's"
    return ""


def _run(engine: Engine, inputs: Any, outputs: Collection[str] = ()) -> dict[str, Any]:
    """An answer that stays as it is when the engine runs again."""
    return {name: values.copy() for name, values in engine.run(inputs, outputs).items()}


if __name__ == "__main__":
    main()
