"""Writes convoy.json, the Grafana dashboard: `python deploy/grafana/dashboard.py`. Change this, never the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("convoy.json")

_COLUMNS = 24
_CHOSEN = 'namespace=~"$namespace", service=~"$service"'
_SERVICE = f'{_CHOSEN}, instance=~"$instance"'
_MODEL = f'{_SERVICE}, model=~"$model", version=~"$version"'
_RECORDED = f'{_CHOSEN}, model=~"$model"'
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """A PromQL expression and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title, text: What it is called, and what its tooltip says.
        queries: What it shows.
        unit: Grafana's name of the unit.
        kind: Grafana's type of panel.
        width, height: In Grafana's grid of 24 columns.
        stack: Whether the series are stacked.
        most: The end of the axis, where that is known.
    """

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    text: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stack: bool = False
    most: float | None = None


@dataclass(frozen=True)
class Row:
    """A heading, and the panels below it from left to right."""

    title: str
    panels: Sequence[Panel] = field(default_factory=tuple)


def _rate(metric: str, labels: str = _MODEL) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def _quantile(quantile: float, metric: str, by: str = "") -> str:
    return f"histogram_quantile({quantile}, sum by (le{by}) ({_rate(metric + '_bucket')}))"


def _stage(name: str) -> Panel:
    metric = f"convoy_{name}_duration_seconds"
    percentiles = [Query(_quantile(q, metric), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)]
    return Panel(f"{name.capitalize()}: percentiles", [*percentiles, Query(_mean(metric), "mean")], "s")


def _mean(metric: str) -> str:
    return f"sum({_rate(metric + '_sum')}) / (sum({_rate(metric + '_count')}) > 0)"


def _heatmap(metric: str, title: str, unit: str) -> Panel:
    query = Query(f"sum by (le) (increase({metric}_bucket{{{_MODEL}}}[$__rate_interval]))", "{{le}}")
    return Panel(title, [query], unit, kind="heatmap", width=12)


def _by_version(expr: str, operation: str = "sum") -> list[Query]:
    return [Query(f"{operation} by (model, version) ({expr})", "{{model}} {{version}}")]


def _share(part: str, whole: str) -> list[Query]:
    """Of two counters, by model and version."""
    expr = f"sum by (model, version) ({_rate(part)}) / (sum by (model, version) ({_rate(whole)}) > 0)"
    return [Query(expr, "{{model}} {{version}}")]


def _replica(expr: str) -> list[Query]:
    return [Query(expr, "{{instance}}")]


def _gpu(expr: str) -> Query:
    return Query(expr, "{{instance}} GPU {{gpu}}")


def _stat(title: str, expr: str, unit: str = "short", text: str = "") -> Panel:
    return Panel(title, [Query(expr)], unit, text, "stat", 4, 4)


_OVERVIEW = Row(
    "Overview",
    [
        _stat("Images/s", f"sum({_rate('convoy_inferences_total')})"),
        _stat("Requests/s", f"sum({_rate('convoy_requests_total')})", "reqps"),
        _stat(
            "Errors", f"max(convoy_model:errors:ratio_rate5m{{{_RECORDED}}})", "percentunit",
            "Of the model with the most, over 5 minutes, as the alerts count them",
        ),
        _stat(
            "p99", _quantile(0.99, "convoy_request_duration_seconds"), "s",
            "From arrival to answer, of requests that succeeded",
        ),
        _stat(
            "In flight / capacity", f"max(convoy:inflight:ratio{{{_CHOSEN}}})", "percentunit",
            "What autoscalers read: of the busiest model, rows in flight over what its engines take at once",
        ),
        _stat("Replicas", f"count(convoy_build_info{{{_SERVICE}}})", text="That answer Prometheus"),
    ],
)  # fmt: skip

_TRAFFIC = Row(
    "Throughput",
    [
        Panel("Images/s by model and version", _by_version(_rate("convoy_inferences_total")), stack=True),
        Panel(
            "Requests/s by outcome",
            [Query(f"sum by (code, protocol) ({_rate('convoy_requests_total')}) > 0", "{{code}} {{protocol}}")],
            "reqps", stack=True,
        ),
        Panel(
            "Refused or given up, by reason",
            [Query(f"sum by (model, reason) ({_rate('convoy_rejected_total')})", "{{model}} {{reason}}")], "reqps",
            "queue_full and deadline: more load than the replicas can serve. cancelled: the client went away",
        ),
    ],
)  # fmt: skip

_LATENCY = Row(
    "Latency, of requests that succeeded",
    [
        _heatmap("convoy_request_duration_seconds", "Arrival to answer", "s"),
        Panel(
            "p99 by model and version",
            [
                Query(_quantile(0.99, "convoy_request_duration_seconds", ", model, version"), "{{model}} {{version}}"),
                Query(f"max by (model) (convoy_latency_objective_seconds{{{_MODEL}}}) > 0", "{{model}}: objective"),
            ],
            "s", width=12,
        ),
        _stage("request"),
        _stage("queue"),
        _stage("compute"),
        _stage("decode"),
        Panel(
            "p99 by replica", _replica(_quantile(0.99, "convoy_request_duration_seconds", ", instance")), "s",
            "One that is slower than the others: its machine, or how calls are balanced",
        ),
        Panel(
            "Mean time in each stage",
            [Query(_mean(f"convoy_{stage}_duration_seconds"), stage) for stage in ("decode", "queue", "compute")], "s",
            "The rest of a request's time: reading it, building the batch, writing the answer", stack=True,
        ),
    ],
)  # fmt: skip

_QUEUE = Row(
    "Queue and batches",
    [
        Panel("Waiting requests", _by_version(f"convoy_queue_depth{{{_MODEL}}}")),
        Panel(
            "Fullest queue", [Query(f"convoy_model:queue:ratio{{{_RECORDED}}}", "{{model}}")], "percentunit",
            "Of the replica whose queue is fullest", most=1,
        ),
        Panel(
            "In flight / capacity",
            [Query(
                f'convoy_model:inflight:ratio{{{_RECORDED}, version=~"$version"}}', "{{model}} {{version}} {{bound}}"
            )],
            "percentunit", "Above 1 work waits for engines; near 1 of the objective, requests are refused to keep it",
        ),
        _heatmap("convoy_batch_size", "Rows in a batch", "short"),
        Panel("Mean rows in a batch", _share("convoy_inferences_total", "convoy_executions_total"), width=6),
        Panel(
            "Rows that only fill batches up", _share("convoy_batch_padding_rows_total", "convoy_inferences_total"),
            "percentunit", "Padding over rows of requests", width=6,
        ),
        Panel("Waiting bytes", _by_version(f"convoy_queue_bytes{{{_MODEL}}}"), "bytes"),
        Panel(
            "Let in at once to keep the objective", _by_version(f"convoy_concurrency_limit{{{_MODEL}}}"),
            text="0 where a model has no latency objective",
        ),
        Panel(
            "Answers from the cache/s", _by_version(_rate("convoy_response_cache_hits_total")), "reqps",
            "0 where a model has no cache",
        ),
    ],
)  # fmt: skip

_MODELS = Row(
    "Models and engines",
    [
        Panel(
            "Replicas by state of the model",
            [Query(
                f"sum by (model, version, state) (convoy_model_state{{{_MODEL}}}) > 0",
                "{{model}} {{version}} {{state}}",
            )],
        ),
        Panel(
            "Cannot be loaded", _by_version(f"convoy_model_load_failed{{{_MODEL}}}"),
            text="Replicas on which it fails; a version that was served before still is. Empty is good",
        ),
        Panel(
            "Engines that crashed or hung",
            [
                *_by_version(f"increase(convoy_engine_restarts_total{{{_MODEL}}}[$__rate_interval])"),
                Query(
                    f"sum by (model, version) (increase(convoy_engine_hangs_total{{{_MODEL}}}[$__rate_interval]))",
                    "{{model}} {{version}}, hung",
                ),
            ],
        ),
        Panel("Loading and warm-up", _by_version(f"convoy_model_load_duration_seconds{{{_MODEL}}}", "max"), "s"),
        Panel(
            "Releases", [Query(f"count by (version) (convoy_build_info{{{_SERVICE}}})", "{{version}}")], stack=True,
            text="Replicas by version of the server",
        ),
        Panel("Front ends", _replica(f"convoy_frontends{{{_SERVICE}}}"), text="Processes that take calls"),
    ],
)  # fmt: skip

_BUSY = _rate("convoy_host_cpu_seconds_total", f'{_SERVICE}, mode="busy"')
_AVAILABLE = f'convoy_host_memory_bytes{{{_SERVICE}, kind="available"}}'
_MEMORY = f'convoy_host_memory_bytes{{{_SERVICE}, kind="total"}}'

_MACHINES = Row(
    "Machines",
    [
        Panel(
            "CPU of the machine",
            _replica(
                f"sum by (instance) ({_BUSY}) / sum by (instance) ({_rate('convoy_host_cpu_seconds_total', _SERVICE)})"
            ),
            "percentunit", "All that runs there", most=1,
        ),
        Panel(
            "Memory of the machine in use", _replica(f"1 - {_AVAILABLE} / ignoring (kind) {_MEMORY}"), "percentunit",
            most=1,
        ),
        Panel("Memory of the core process", _replica(f"process_resident_memory_bytes{{{_SERVICE}}}"), "bytes"),
        Panel("GPU in use", [_gpu(f"convoy_gpu_utilization_ratio{{{_SERVICE}}}")], "percentunit", most=1),
        Panel(
            "GPU memory in use",
            [_gpu(f"convoy_gpu_memory_used_bytes{{{_SERVICE}}} / convoy_gpu_memory_total_bytes{{{_SERVICE}}}")],
            "percentunit", most=1,
        ),
        Panel(
            "GPU power",
            [
                _gpu(f"convoy_gpu_power_watts{{{_SERVICE}}}"),
                Query(f"convoy_gpu_power_limit_watts{{{_SERVICE}}}", "{{instance}} GPU {{gpu}}: limit"),
            ],
            "watt",
        ),
        Panel("GPU temperature", [_gpu(f"convoy_gpu_temperature_celsius{{{_SERVICE}}}")], "celsius", width=12),
        Panel(
            "GPU slowed down, by reason",
            [Query(f"convoy_gpu_throttled{{{_SERVICE}}}", "{{instance}} GPU {{gpu}} {{reason}}")], width=12, most=1,
        ),
    ],
)  # fmt: skip

ROWS = (_OVERVIEW, _TRAFFIC, _LATENCY, _QUEUE, _MODELS, _MACHINES)


def _panel(panel: Panel, number: int, at: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    options: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stack else "none"}
        defaults["custom"] = {"fillOpacity": 20 if panel.stack else 0, "showPoints": "never", "stacking": stacking}
    elif panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"}
    else:
        options = {"calculate": False, "cellGap": 0, "color": {"mode": "scheme", "scheme": "Oranges"}}
        options |= {"yAxis": {"unit": panel.unit}, "tooltip": {"mode": "single"}}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            "instant": False,
            "range": True,
        }
        for index, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _panels() -> Iterator[dict[str, Any]]:
    """Every panel, placed from left to right and from top to bottom."""
    number = top = 0
    for row in ROWS:
        number += 1
        at = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": at, "panels": []}
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            yield _panel(panel, number, {"x": left, "y": top, "w": panel.width, "h": panel.height})
            left, height = left + panel.width, max(height, panel.height)
        top += height


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana's JSON."""
    variables = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        _variable("namespace", "label_values(convoy_build_info, namespace)"),
        _variable("service", 'label_values(convoy_build_info{namespace=~"$namespace"}, service)'),
        _variable("model", f"label_values(convoy_model_state{{{_CHOSEN}}}, model)"),
        _variable("version", f'label_values(convoy_model_state{{{_CHOSEN}, model=~"$model"}}, version)'),
        _variable("instance", f"label_values(convoy_build_info{{{_CHOSEN}}}, instance)"),
    ]
    firing = f'ALERTS{{alertname=~"Convoy.*", alertstate="firing", {_CHOSEN}}}'
    annotation = {
        "name": "Alerts",
        "datasource": _DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": firing,
        "titleFormat": "{{alertname}}",
        "textFormat": "{{model}} {{severity}}",
    }
    return {
        "uid": "convoy",
        "title": "Convoy",
        "description": "Made by deploy/grafana/dashboard.py",
        "tags": ["convoy"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [annotation]},
        "templating": {"list": variables},
        "links": [],
        "panels": list(_panels()),
    }


def text() -> str:
    """What belongs into convoy.json."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text())
