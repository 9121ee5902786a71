"""Prometheus itself, with promtool and Alertmanager: the rules on recorded series, then on two Convoys under load.

On those, each alert's condition is caused for real and then removed. So that this takes minutes and not days, every
window and every `for` of a copy of the rules is shorter (live_stack.FASTER), and nothing else is changed. There is no
GPU: what one would say comes from a small HTTP server of the test's own.
"""

from __future__ import annotations

import io
import math
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from convoynet.server.client.client import Client
from tests.deploy.live_stack import Stack, Tool, Traffic, get, until
from tests.deploy.observability import DEPLOY, PROMETHEUS, RULE_FILES, alerts, page_queries, panel_queries, rules

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]


def check(*command: str, stdin: str = "") -> str:
    """What a command says; the test fails with it where the command does."""
    done = subprocess.run(command, check=False, input=stdin, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_and_configs_are_valid(tool: Tool, tmp_path: Path) -> None:
    check(tool("promtool"), "check", "rules", "--lint-fatal", *map(str, RULE_FILES))
    check(tool("promtool"), "check", "config", str(PROMETHEUS / "prometheus.yml"))
    # Debian builds Prometheus without the discovery of Kubernetes: its file is checked with static targets instead.
    text = (PROMETHEUS / "kubernetes.yml").read_text()
    text, count = re.subn(
        r"kubernetes_sd_configs:\n( +)- role: pod\n", r"static_configs:\n\1- targets: [pod:1]\n", text
    )
    assert count == 2
    for file in RULE_FILES:
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "kubernetes.yml").write_text(text)
    check(tool("promtool"), "check", "config", str(tmp_path / "kubernetes.yml"))
    alertmanager = str(DEPLOY / "alertmanager" / "alertmanager.yml")
    check(tool("amtool"), "check-config", alertmanager)
    for severity, receiver in (("critical", "now"), ("warning", "morning")):
        routed = check(
            tool("amtool"), "config", "routes", "test", f"--config.file={alertmanager}", f"severity={severity}"
        )
        assert routed.strip() == receiver


@pytest.mark.parametrize("page", ["metrics.md", "tutorial.md"])
def test_what_a_page_has_prometheus_scrape_is_valid(tool: Tool, page: str, tmp_path: Path) -> None:
    text = (DEPLOY.parent / "docs" / page).read_text()
    configs = [block for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S) if "scrape_configs" in block]
    assert configs
    for name in ("ca.crt", "prometheus.token"):
        (tmp_path / name).write_text("looked for, not read")
    for config in configs:
        (tmp_path / "prometheus.yml").write_text(config)
        check(tool("promtool"), "check", "config", str(tmp_path / "prometheus.yml"))
        # What rules and alerts read of a target.
        assert re.search(r"job_name: \S*convoy", config)
        assert "labels: {namespace: default, service: convoy}" in config


@pytest.mark.parametrize("name", ["alerts", "autoscaling", "days"])
def test_rules_on_recorded_series(tool: Tool, name: str) -> None:
    check(tool("promtool"), "test", "rules", str(PROMETHEUS / "tests" / f"{name}.yml"))


def test_every_alert_has_a_rule_test() -> None:
    text = "".join(file.read_text() for file in (PROMETHEUS / "tests").glob("*.yml"))
    assert {rule["alert"] for rule in alerts()} <= set(re.findall(r'alertname="(\w+)"', text))


CAUSED = {
    *(("ConvoyErrorBudgetBurn", window, "failing") for window in ("1h", "6h", "1d", "3d")),
    *(("ConvoyLatencyBudgetBurn", window, "slow") for window in ("1h", "6h", "1d", "3d")),
    ("ConvoyQueueSaturated", "", "full"),
    ("ConvoyModelNotServed", "", "mended"),
    ("ConvoyModelNotLoaded", "", "mended"),
    ("ConvoyModelLoading", "", "late"),
    ("ConvoyEngineRestarting", "", "lone"),
    ("ConvoyEngineDown", "", "lone"),
    ("ConvoyGPUThrottled", "", "gpus"),
}
LATER = {("ConvoyNoTraffic", "", "second"), ("ConvoyTargetDown", "", "second"), ("ConvoyServiceDown", "", "second")}


@pytest.fixture(scope="module")
def stack(tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything runs, and what alerts are for is going wrong."""
    with ExitStack() as opened:
        stack = Stack(tmp_path_factory.mktemp("stack"), tool, opened)
        try:
            yield stack
        finally:
            for traffic in stack.traffic.values():
                traffic.stop()


def test_the_causes_are_of_every_alert() -> None:
    assert {name for name, *_ in CAUSED | LATER} == {rule["alert"] for rule in alerts()}


def test_each_alert_fires(stack: Stack) -> None:
    fired: set[tuple[str, str, str]] = set()

    def all_fired() -> bool:
        stack.kill_engines(("ConvoyEngineRestarting", "", "lone") in fired)
        fired.update(stack.firing())
        return fired >= CAUSED

    def missing() -> object:
        return CAUSED - fired, get(f"{stack.prometheus}/api/v1/targets")["data"]["activeTargets"]

    until(all_fired, missing)
    # Only what was caused: a queue that is full refuses, and a model that nobody serves loads or does not.
    # How fast the others answer depends on what else this machine does.
    also = {("ConvoyErrorBudgetBurn", "full"), ("ConvoyErrorBudgetBurn", "lone"), ("ConvoyModelNotServed", "late")}
    assert {(name, of) for name, _, of in fired - CAUSED if name != "ConvoyLatencyBudgetBurn"} <= also


def test_what_alerts_say_is_filled_in(stack: Stack) -> None:
    for alert in get(f"{stack.prometheus}/api/v1/alerts")["data"]["alerts"]:
        for text in (alert["annotations"]["summary"], alert["annotations"]["description"]):
            assert not re.search(r"\{\{|<no value>|<error|%!|  ", text), text


def test_alertmanager_is_told(stack: Stack, tool: Tool) -> None:
    def received() -> set[str]:
        return {alert["labels"]["alertname"] for alert in get(f"{stack.alertmanager}/api/v2/alerts")}

    until(lambda: {"ConvoyErrorBudgetBurn", "ConvoyGPUThrottled", "ConvoyModelNotServed"} <= received(), received)
    told = {
        alert["labels"]["model"]: alert["status"]["state"]
        for alert in get(f"{stack.alertmanager}/api/v2/alerts")
        if alert["labels"]["alertname"] == "ConvoyModelNotLoaded"
    }
    assert told == {"mended": "suppressed"}  # that nobody serves it is the news
    # As docs/operations.md has it, to try receivers.
    by_hand = ("alert", "add", "ConvoyTest", "severity=critical", "namespace=test", "service=test")
    check(tool("amtool"), "--alertmanager.url", stack.alertmanager, *by_hand)
    until(lambda: "ConvoyTest" in received(), received)


def test_every_query_of_the_dashboard_returns_data(stack: Stack) -> None:
    red = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(red, "PNG")
    with Client(stack.main.url) as client:

        def empty() -> list[tuple[str, str]]:
            client.classify("colors", [red.getvalue()])
            return [
                (title, expr)
                for title, expr in panel_queries("12s")
                if not any(math.isfinite(value) for _, value in stack.query(expr))
            ]

        until(lambda: not empty(), empty)


def test_every_rule_returns_data(stack: Stack) -> None:
    groups = get(f"{stack.prometheus}/api/v1/rules")["data"]["groups"]
    unhealthy = [
        (rule["name"], rule.get("lastError")) for group in groups for rule in group["rules"] if rule["health"] != "ok"
    ]
    assert not unhealthy
    recorded = {rule["record"] for rule in rules() if "record" in rule}

    def empty() -> list[str]:
        return [name for name in recorded if not any(math.isfinite(value) for _, value in stack.query(name))]

    until(lambda: not empty(), empty)
    # Two rows in flight at the most of a model that is not busy, and one that has more than it can do.
    ratios = {of["model"]: value for of, value in stack.query('convoy_model:inflight:ratio{bound="engines"}')}
    assert ratios["good"] < 1 < ratios["full"]
    (busiest,) = (value for _, value in stack.query('convoy:inflight:ratio{service="main"}'))
    assert busiest > 1
    (waits,) = (value for _, value in stack.query('convoy:queue_seconds:mean5m{service="main"}'))
    assert waits > 0.5  # behind up to four others that take half a second each


def test_the_queries_of_the_runbooks_run_as_written(stack: Stack, tool: Tool) -> None:
    for _, expr in page_queries():
        check(tool("promtool"), "query", "instant", stack.prometheus, expr.replace("MODEL", "slow"))


def test_the_live_exposition_is_clean(stack: Stack, tool: Tool) -> None:
    with urllib.request.urlopen(f"http://{stack.main.metrics}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert check(tool("promtool"), "check", "metrics", stdin=text) == ""


def test_each_alert_clears_and_the_others_fire_and_clear(stack: Stack) -> None:
    """Without traffic, then gone, then back: the second service; the causes of the first are removed meanwhile."""
    for name in ("failing", "slow", "full", "lone"):
        stack.traffic.pop(name).stop()
    stack.traffic["failing"] = Traffic(stack.main.url, "failing")
    stack.gpu.throttled = 0
    stack.lone.write_text("{}")
    (stack.root / "mended" / "1" / "model.json").write_text("{}")
    stack.load("mended")
    until(lambda: stack.firing() == {("ConvoyNoTraffic", "", "second")}, stack.firing)
    stack.second.process.kill()
    down = {("ConvoyTargetDown", "", "second"), ("ConvoyServiceDown", "", "second")}
    until(lambda: stack.firing() == down, stack.firing)
    stack.start_second()
    stack.traffic["lone"] = Traffic(stack.second.url, "lone")
    until(lambda: not stack.firing(), stack.firing)
    until(lambda: stack.query('convoy:requests:rate5m{service="second"} > 0'))
