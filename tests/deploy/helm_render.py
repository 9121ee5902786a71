"""Renders the chart with Helm's engine, in a process of its own: it brings a Go runtime, whose signals are its own.

stdin: {"chart": path, "sets": {name: [release, values]}}; stdout: {"sets": {name: {template: text}, or why not},
"lint": errors}.
"""

from __future__ import annotations

import json
import sys

import helm_python


def main() -> None:
    """Renders every set of values into the namespace convoy, after the check against values.schema.json."""
    asked = json.load(sys.stdin)
    rendered: dict[str, dict[str, str] | str] = {}
    with helm_python.Chart.load(asked["chart"]) as chart:
        for name, (release, values) in asked["sets"].items():
            try:
                chart.validate_schema(values)
                rendered[name] = chart.render(values, name=release, namespace="convoy")
            except helm_python.HelmError as error:
                rendered[name] = str(error)
    json.dump({"sets": rendered, "lint": helm_python.lint(asked["chart"])["errors"]}, sys.stdout)


if __name__ == "__main__":
    main()
