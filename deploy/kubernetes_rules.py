"""Copies the rules of deploy/prometheus to where the chart and kustomize can read them: `make deploy-rules`.

Neither reads files outside of its own folder. tests/deploy/test_manifests.py compares the copies with their source.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CHART_RULES = HERE / "helm" / "convoy" / "rules"
PROMETHEUS_RULE = HERE / "kustomize" / "components" / "monitoring" / "prometheusrule.yaml"


def sources() -> dict[str, str]:
    """The texts of the files of deploy/prometheus that hold rules, by name, in order."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted((HERE / "prometheus").glob("*.yml"))}
    return {name: text for name, text in texts.items() if "groups" in yaml.safe_load(text)}


def prometheus_rule(texts: Mapping[str, str]) -> dict[str, Any]:
    """All of them as one object of Prometheus' operator."""
    release = yaml.safe_load((HERE / "helm" / "convoy" / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"]
    facts = {"name": "convoy", "instance": "convoy", "version": release}
    labels = {f"app.kubernetes.io/{key}": value for key, value in facts.items()}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "convoy", "namespace": "convoy", "labels": labels},
        "spec": {"groups": [group for text in texts.values() for group in yaml.safe_load(text)["groups"]]},
    }


class _Plain(yaml.SafeDumper):
    """Without anchors: not everything that reads manifests knows them."""

    def ignore_aliases(self, data: Any) -> bool:
        """Every value is written out."""
        return True


def main() -> None:
    """Writes the copies."""
    texts = sources()
    CHART_RULES.mkdir(exist_ok=True)
    for stale in CHART_RULES.glob("*.yml"):
        stale.unlink()
    for name, text in texts.items():
        (CHART_RULES / name).write_text(text, encoding="utf-8")
    written = yaml.dump(prometheus_rule(texts), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
    PROMETHEUS_RULE.write_text(
        f"# Made of deploy/prometheus by `make deploy-rules`; do not edit.\n{written}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
