"""Rules, alerts, dashboard, runbooks and metrics agree; what needs Prometheus is in test_prometheus.py."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import TOOLS
from tests.deploy.observability import DASHBOARD, DEPLOY, PROMETHEUS, alerts, names, page_queries, panel_queries, rules

ROOT = DEPLOY.parent
RUNBOOKS = ROOT / "docs" / "runbooks"
DOCUMENTED = set(re.findall(r"^\| `(convoy_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
GPU = {
    f"convoy_gpu_{what}"
    for what in (
        "utilization_ratio", "memory_used_bytes", "memory_total_bytes", "power_watts", "power_limit_watts",
        "temperature_celsius", "throttled",
    )
}  # fmt: skip
"""Where there are GPUs."""
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def test_the_dashboard_is_what_its_code_makes() -> None:
    made = runpy.run_path(str(DEPLOY / "grafana" / "dashboard.py"))["text"]()
    assert DASHBOARD.read_text() == made, "python deploy/grafana/dashboard.py"


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    everything = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in everything:
        assert 0 <= panel["gridPos"]["x"] <= 24 - panel["gridPos"]["w"]
    for a, b in itertools.combinations([panel["gridPos"] for panel in everything], 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@pytest.mark.deploy
def test_grafanas_own_schema_knows_every_field(tmp_path: Path) -> None:
    """Through Grafana's published types and back, where nothing may be lost; Grafana itself does not run here."""
    back = tmp_path / "back.json"
    script = (
        "import json, sys; from grafana_foundation_sdk.cog.encoder import JSONEncoder; "
        "from grafana_foundation_sdk.models.dashboard import Dashboard; "
        "print(JSONEncoder().encode(Dashboard.from_json(json.load(open(sys.argv[1])))))"
    )
    if not (TOOLS / "python").exists():
        pytest.skip("make deploy-tools fetches Grafana's types")
    with back.open("w") as out:
        subprocess.run([TOOLS / "python", "-c", script, DASHBOARD], stdout=out, check=True, timeout=60)
    before, after = (json.loads(file.read_text()) for file in (DASHBOARD, back))
    lost = {re.sub(r"\[\d+\]", "", path) for path in _lost(before, after)}
    # Fields of the Prometheus data source, and one for people: the types leave them to Grafana.
    assert lost == {".annotations.list.titleFormat", ".annotations.list.textFormat", ".templating.list.definition"}


def _lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """The places where something is not what it was."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            yield from _lost(value, after.get(name, ...), f"{path}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            yield from _lost(a, b, f"{path}[{index}]")
    elif before != after:
        yield path


def test_variables_are_defined() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", DASHBOARD.read_text()))
    assert used == defined == {"datasource", "namespace", "service", "model", "version", "instance"}


@pytest.mark.parametrize(("title", "expr"), panel_queries())
def test_a_panel_reads_what_there_is(title: str, expr: str) -> None:
    assert names(expr) <= DOCUMENTED | RECORDED | GPU, title
    assert names(expr) or "process_" in expr


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_reads_what_there_is(rule: dict[str, str]) -> None:
    read = names(rule["expr"])
    assert read <= DOCUMENTED | RECORDED | GPU
    assert read or "up{" in rule["expr"]


def test_every_documented_series_is_on_the_dashboard_or_in_a_rule() -> None:
    """So that a new one is not forgotten."""
    read = {name for _, expr in panel_queries() for name in names(expr)}
    read |= {name for rule in rules() for name in names(rule["expr"])}
    assert (DOCUMENTED | GPU) - read == {"convoy_response_cache_misses_total"}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do(alert: dict[str, dict[str, str]]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{alert['alert']}.md"
    text = (ROOT / alert["annotations"]["runbook_url"]).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert headings == [alert["alert"], "What it means", "How to see it", "What to do"]
    assert "```" in text


@pytest.mark.parametrize(("page", "expr"), page_queries())
def test_a_page_reads_what_there_is(page: str, expr: str) -> None:
    assert names(expr) <= DOCUMENTED | RECORDED | GPU
    assert names(expr) or "up{" in expr


def test_every_runbook_has_a_query() -> None:
    assert {page for page, _ in page_queries()} == {page.stem for page in RUNBOOKS.glob("*.md")} | {"operations"}


def test_operations_lists_every_alert_with_its_severities() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    listed = re.findall(r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| ([a-z, ]+) \|", text, re.MULTILINE)
    severities: dict[str, set[str]] = {}
    for alert in alerts():
        severities.setdefault(alert["alert"], set()).add(alert["labels"]["severity"])
    assert {name: set(stated.split(", ")) for name, _, stated in listed} == severities
    assert all(name == page for name, page, _ in listed)


def test_every_runbook_is_of_an_alert() -> None:
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == {alert["alert"] for alert in alerts()}


def test_alertmanager_knows_the_alerts_that_it_inhibits() -> None:
    config = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
    known = {alert["alert"] for alert in alerts()}
    for rule in config["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            if (found := re.fullmatch(r'alertname =~? "?(.*?)"?', matcher)) is not None:
                prefix, *rest = re.split(r"[()]", found[1])
                named = {prefix + each + "".join(rest[1:]) for each in (rest[0].split("|") if rest else [""])}
                assert named <= known, matcher


def test_both_ways_to_scrape_read_the_same_rules() -> None:
    files = [yaml.safe_load((PROMETHEUS / name).read_text()) for name in ("prometheus.yml", "kubernetes.yml")]
    assert files[0]["rule_files"] == files[1]["rule_files"] == ["rules.yml", "alerts.yml", "autoscaling.yml"]
    for config in files:
        (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "convoy")
        targets = {each.get("target_label") for each in job["relabel_configs"]}
        assert {"namespace", "service"} <= targets


def test_the_threat_model_names_tests_that_there_are() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        texts = [path.read_text() for path in (ROOT / "tests" / "server").rglob(file)]
        assert any(re.search(rf"^(async )?def {test}\(", text, re.MULTILINE) for text in texts), test
