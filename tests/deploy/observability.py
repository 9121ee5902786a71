"""What deploy/ says about metrics: rules, alerts, the dashboard's queries, and the names that are in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULE_FILES = tuple(PROMETHEUS / name for name in ("rules.yml", "alerts.yml", "autoscaling.yml"))
DASHBOARD = DEPLOY / "grafana" / "convoy.json"


def rules() -> list[dict[str, Any]]:
    """Every rule, recording rules and alerts, in the order of their files."""
    groups = (group for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"])
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """The alerting rules."""
    return [rule for rule in rules() if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, without the headings."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def panel_queries(interval: str = "1m") -> list[tuple[str, str]]:
    """(title, PromQL) of every query of the dashboard, with everything chosen."""
    return [
        (panel["title"], re.sub(r"\$(?!__)\w+", ".*", target["expr"].replace("$__rate_interval", interval)))
        for panel in panels()
        for target in panel["targets"]
    ]


def page_queries() -> list[tuple[str, str]]:
    """(page, PromQL) of every `promtool query instant` in the runbooks and docs/operations.md."""
    docs = DEPLOY.parent / "docs"
    found = []
    for page in (docs / "operations.md", *sorted((docs / "runbooks").glob("*.md"))):
        text = page.read_text().replace("\\\n", "").replace('\\"', "\x00").replace("${stage}", "queue")
        for quoted, doubly, bare in re.findall(r"query instant http://\S+ +(?:'([^']*)'|\"([^\"]*)\"|([\w:]+))", text):
            found.append((page.stem, (quoted or doubly or bare).replace("\x00", '"')))
    return found


def names(expr: str) -> set[str]:
    """The series of Convoy's and the recorded ones that an expression reads, histograms by their family."""
    found = re.findall(r"\bconvoy[\w:]*", re.sub(r'"[^"]*"', "", expr))
    return {re.sub(r"(_duration_seconds|_batch_size)_(bucket|sum|count)$", r"\1", name) for name in found}
