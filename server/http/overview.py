"""What the page shows of a running server, as one JSON object: made when somebody looks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from convoynet.server.models.core import Core
from convoynet.server.models.servable import Servable
from convoynet.server.observing.metrics import NO_MODEL, ROWS, SECONDS, Metrics
from convoynet.server.repository.specs import Found

Document = dict[str, Any]


def overview(core: Core, metrics: Metrics, version: str, has_report: Callable[[Found], bool]) -> Document:
    """Models with their states and totals since they were loaded: rates and quantiles are their reader's.

    Args:
        core: The models.
        metrics: Has the very counters and histograms that Prometheus reads.
        version: The server's.
        has_report: Whether the export of a version left its report.
    """
    requests, rejected = _by_model(metrics.requests.values(), 3), _by_model(metrics.rejected.values(), 2)
    models = []
    served = {(model.spec.name, model.spec.version): model for model in core}
    for line in core.lines():
        key = line.name, line.version
        shown: Document = {"name": line.name, "version": line.version, "state": line.state, "reason": line.reason}
        if (model := served.get(key)) is not None:
            found = core.found(*key)
            shown |= _of_model(model, found) | {"report": has_report(found)}
            shown["requests"], shown["rejected"] = requests[key], rejected[key]
            for name, family in (("latency", metrics.request_duration), ("batch_rows", metrics.batch_size)):
                series = family.find(*key)
                shown[name] = list(series.counts) if series is not None else []
        models.append(shown)
    return {
        "server": {"version": version, "ready": core.ready},
        "milliseconds": time.monotonic_ns() // 1_000_000,
        "latency_bounds": SECONDS,
        "batch_bounds": ROWS,
        "models": models,
        "others": {"requests": requests[NO_MODEL], "rejected": rejected[NO_MODEL]},
    }


def _of_model(model: Servable, found: Found) -> Document:
    spec, stated = model.spec, {} if found.config is None else found.config.parameters
    return {
        "platform": spec.platform,
        "engine": {name: model.info[name] for name in ("runtime", "device", "instances") if name in model.info},
        "task": stated["task"].string_value if "task" in stated else "",
        "precision": stated["precision"].string_value if "precision" in stated else "",
        "takes_images": spec.image is not None,
        "max_batch": spec.batch.max_rows,
        "queued": model.queued,
        "inflight": model.inflight,
        "rows": model.statistics.inferences,
        "batches": model.statistics.executions,
    }


def _by_model(series: list[tuple[tuple[str, ...], float]], name: int) -> dict[tuple[str, ...], dict[str, float]]:
    """What a counter has for each model and version, by the value of the label in that place, without zeros."""
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for labels, value in series:
        if value:
            of = found[labels[:2]]
            of[labels[name]] = of.get(labels[name], 0.0) + value
    return found
