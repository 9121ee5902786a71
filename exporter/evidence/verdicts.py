"""What a published model was judged by, for people: the figure of each output, its limit and the verdict."""

from __future__ import annotations

from dataclasses import dataclass

from convoynet.exporter.evidence import limits
from convoynet.exporter.evidence.parity import Parity
from convoynet.exporter.evidence.spread import Spread
from convoynet.exporter.evidence.verify import fp32_within, int8_reason, limit_of

_PASSES = "passes"


@dataclass(frozen=True)
class Verdict:
    """One output: its name, what it means, the figure that is judged, what is allowed, and what came of it."""

    output: str
    means: str
    figure: str
    limit: str
    verdict: str

    @property
    def row(self) -> dict[str, str]:
        """A row of a table."""
        return {
            "output": self.output,
            "means": self.means,
            "judged by": self.figure,
            "limit": self.limit,
            "verdict": self.verdict,
        }


def verdicts(parity: Parity, precision: str) -> list[Verdict]:
    """Judge every output again, as the gates of this precision did; none where nothing was told of the spread."""
    first = "detections" if parity.task == "detection" else "logits"
    return [
        _quantized(name, one) if {"int8", "fp8"} & set(precision.split("+")) else _plain(name, one, precision)
        for name, one in ((first, parity), *parity.others.items())
        if one.spread is not None or one.task == "detection"
    ]


def line(found: list[Verdict]) -> str:
    """All of them for a terminal."""
    return "; ".join(
        f"{one.output} ({one.means}): {one.figure}{f', {one.limit}' if one.limit else ''}: {one.verdict}"
        for one in found
    )


def _quantized(name: str, one: Parity) -> Verdict:
    reason = int8_reason(one)
    verdict = f"refused: {reason}" if reason else _PASSES
    if (spread := one.spread) is None:
        return Verdict(name, "boxes", _matched(one), f"at least {limits.INT8_MIN_MATCHED:.0%}", verdict)
    means = limits.INT8[spread.kind].name
    if spread.error is None:
        size = f"error at most {limits.ONE_IMAGE_ERROR} of their size" if spread.images < 2 else ""
        return Verdict(name, means, spread.line, size, verdict)
    figure, limit = share(spread), f"at most {limit_of(spread)}"
    if spread.worst is not None:
        each = limits.INT8[spread.kind].each
        figure += f"; output {spread.worst.output} alone {spread.worst.error:.2g}"
        limit += f"; each {f'at most {each}' if each is not None else 'alive and in its place'}"
    if not reason and spread.error > limits.DOUBTFUL:
        verdict += f", above {limits.DOUBTFUL}: measure the accuracy"
    return Verdict(name, means, figure, limit, verdict)


def _plain(name: str, one: Parity, precision: str) -> Verdict:
    means = limits.INT8[one.spread.kind].name if one.spread is not None else "boxes"
    if precision != "fp32":
        limit = f"at most {100 * limits.HALF_MAX_LOSS:.0f} points below the float32 graph's"
        return Verdict(name, means, f"{one.agreement_name} {one.agreement:.2%}", limit, _PASSES)
    least = limits.FP32_MIN_SHARES[one.task]
    if one.spread is None:
        return Verdict(name, means, _matched(one), f"at least {least:.0%}", _PASSES)
    figure = f"{share(one.spread)}; {one.max_rel_error:.1e} of the largest"
    limit = f"at most {limits.FP32_SPREAD_ERROR}; {limits.FP32_MAX_REL_ERROR:.0e}"
    # What passed all the same, passed by what PyTorch does itself.
    return Verdict(name, means, figure, limit, _PASSES if fp32_within(one) else f"{_PASSES} by PyTorch's own rounding")


def share(spread: Spread) -> str:
    """The error of all outputs together, as a share of their spread and in decibels."""
    if spread.error is None:
        return spread.line
    return f"error {spread.error:.2g} of the spread" + (f" ({spread.decibels:.1f} dB)" if spread.decibels else "")


def _matched(one: Parity) -> str:
    return f"{one.agreement_name} {one.agreement:.2%}"
