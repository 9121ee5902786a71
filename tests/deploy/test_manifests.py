"""The manifests of deploy/: valid, the same from the chart and from kustomize, and true to the server that they run."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from convoynet.server import settings
from convoynet.server.config import ServeConfig
from tests.deploy import manifests, schemas
from tests.deploy.manifests import CHART, DEPLOY, OVERLAYS, ROOT, VALUES, Object

sys.path.insert(0, str(DEPLOY))
import kubernetes_rules

ZERO = manifests.values("zero")["autoscaling"]


@pytest.fixture(scope="session")
def charts() -> Mapping[str, list[Object]]:
    """The chart's objects, by the name of the file of values."""
    sets = {name: ("convoy", manifests.values(name)) for name in VALUES}
    scaled = {"kind": "keda", "minReplicas": 0, "keda": {"wakeQuery": ZERO["keda"]["wakeQuery"]}}
    rendered = manifests.render(sets | {"keda": ("convoy", {"autoscaling": scaled})})
    assert not [each for each in rendered.values() if isinstance(each, str)]
    return {name: each for name, each in rendered.items() if isinstance(each, list)}


@pytest.fixture(scope="session")
def overlays() -> Mapping[str, list[Object]]:
    """Kustomize's objects, by the name of the overlay."""
    return {name: manifests.kustomize(DEPLOY / "kustomize" / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="session")
def kserve() -> list[Object]:
    """What is there for KServe."""
    files = ("runtimes/clusterservingruntime.yaml", "inferenceservice.yaml")
    return [each for file in files for each in manifests.documents((DEPLOY / "kserve" / file).read_text())]


@pytest.fixture(scope="session")
def everything(
    charts: Mapping[str, list[Object]], kserve: list[Object], request: pytest.FixtureRequest
) -> list[Object]:
    """All of them, without repetitions; those of kustomize where kubectl is there."""
    objects = [*kserve, *(each for some in charts.values() for each in some)]
    if shutil.which("kubectl"):
        objects += [each for some in request.getfixturevalue("overlays").values() for each in some]
        objects += manifests.kustomize(DEPLOY / "kserve" / "gpu")
    return list({yaml.safe_dump(each): each for each in objects}.values())


@pytest.mark.parametrize("minor", schemas.minors())
def test_kubernetes_own_objects_pass_strict_validation(everything: list[Object], minor: str) -> None:
    own = [each for each in everything if not schemas.is_custom(each)]
    assert {"Deployment", "HorizontalPodAutoscaler", "NetworkPolicy"} <= {each["kind"] for each in own}
    assert [error for each in own for error in schemas.errors(each, minor)] == []


@pytest.mark.parametrize(
    "kind",
    [
        "ClusterServingRuntime",
        "GRPCRoute",
        "InferenceService",
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "ServiceMonitor",
    ],
)
def test_custom_objects_pass_strict_validation(everything: list[Object], kind: str) -> None:
    of_kind = [each for each in everything if each["kind"] == kind]
    assert of_kind
    assert [error for each in of_kind for error in schemas.custom_errors(each)] == []


def test_the_validation_sees_faults(charts: Mapping[str, list[Object]]) -> None:
    deployment = manifests.of_kind(charts["cpu"], "Deployment")
    unknown = {**deployment, "spec": {**deployment["spec"], "replicaz": 1}}
    assert "replicaz" in schemas.errors(unknown, schemas.minors()[-1])[0]
    route = manifests.of_kind(charts["production"], "GRPCRoute")
    unknown = {**route, "spec": {**route["spec"], "parentRef": []}}
    assert "parentRef" in schemas.custom_errors(unknown)[0]


@pytest.mark.parametrize("name", OVERLAYS)
def test_chart_and_kustomize_agree(
    charts: Mapping[str, list[Object]], overlays: Mapping[str, list[Object]], name: str
) -> None:
    chart, overlay = manifests.comparable(charts[name]), manifests.comparable(overlays[name])
    assert chart.keys() == overlay.keys()
    for key in chart:
        assert chart[key] == overlay[key], key


def test_they_agree_on_keda(charts: Mapping[str, list[Object]], tmp_path: Path) -> None:
    overlay = manifests.comparable(manifests.composed(tmp_path, "keda"))
    chart = manifests.comparable(charts["keda"])
    assert chart == overlay


def test_the_rules_are_those_of_deploy_prometheus() -> None:
    """`make deploy-rules` copies them."""
    sources = kubernetes_rules.sources()
    assert "autoscaling.yml" in sources
    assert {path.name: path.read_text() for path in (CHART / "rules").glob("*.yml")} == sources
    written = yaml.safe_load(kubernetes_rules.PROMETHEUS_RULE.read_text())
    assert written == kubernetes_rules.prometheus_rule(sources)


def test_the_version_is_that_of_the_package(everything: list[Object]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    labels = [each["metadata"].get("labels", {}) for each in everything]
    assert {each[name] for each in labels if (name := "app.kubernetes.io/version") in each} == {version}


def test_autoscalers_read_series_that_are_recorded(charts: Mapping[str, list[Object]]) -> None:
    rule = manifests.of_kind(charts["production"], "PrometheusRule")
    recorded = {each.get("record") for group in rule["spec"]["groups"] for each in group["rules"]}
    series = {"convoy:inflight:ratio": "inflightRatio", "convoy:queue_seconds:mean5m": "queueSeconds"}
    assert series.keys() <= recorded
    limits = yaml.safe_load((CHART / "values.yaml").read_text())["autoscaling"]

    adapter = yaml.safe_load((DEPLOY / "helm" / "prometheus-adapter-values.yaml").read_text())
    exposed = {each["name"]["as"]: each["seriesQuery"] for each in adapter["rules"]["custom"]}
    scaler = manifests.of_kind(charts["production"], "HorizontalPodAutoscaler")["spec"]
    for metric, (name, limit) in zip((m["object"] for m in scaler["metrics"]), series.items(), strict=True):
        assert f'"{name}"' in exposed[metric["metric"]["name"]]
        assert metric["describedObject"] == {"apiVersion": "v1", "kind": "Service", "name": "convoy"}
        assert metric["target"] == {"type": "Value", "value": f"{limits[limit] * 1000:.0f}m"}

    triggers = manifests.of_kind(charts["keda"], "ScaledObject")["spec"]["triggers"]
    for trigger, (name, limit) in zip(triggers, series.items(), strict=False):
        assert trigger["metricType"] == "Value"
        assert trigger["metadata"]["query"] == f'max({name}{{namespace="convoy",service="convoy"}})'
        assert float(trigger["metadata"]["threshold"]) == limits[limit]


def _config(objects: list[Object], tmp_path: Path) -> ServeConfig:
    """The settings of the server in the pod, as it would read them."""
    file = tmp_path / "server.toml"
    (text,) = manifests.of_kind(objects, "ConfigMap")["data"].values()
    file.write_text(text)
    return settings.effective({"model_repository": (str(tmp_path),)}, {}, file)


@pytest.mark.parametrize("name", VALUES)
def test_the_pod_is_what_the_server_is_told(charts: Mapping[str, list[Object]], tmp_path: Path, name: str) -> None:
    objects = charts[name]
    config, default = _config(objects, tmp_path), ServeConfig((str(tmp_path),))
    (pod,) = manifests.pods(objects)
    container = pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": config.grpc_port, "http": config.http_port, "metrics": config.metrics_port}
    assert not config.loopback
    notice = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = notice + ceil(config.drain_seconds) + ceil(config.drain_timeout_seconds) + 5
    assert pod["terminationGracePeriodSeconds"] == grace
    assert config.drain_timeout_seconds == default.drain_timeout_seconds
    flags = [argument.partition("=")[0] for argument in container["args"][1:]]
    assert flags == ["--config", "--model-repository"]


def test_tls_tokens_and_probes_go_together(charts: Mapping[str, list[Object]], tmp_path: Path) -> None:
    kinds = {"cpu": "grpc", "zero": "httpGet", "secure": "tcpSocket"}
    for name, kind in kinds.items():
        (pod,) = manifests.pods(charts[name])
        container = pod["containers"][0]
        assert all(kind in container[f"{probe}Probe"] for probe in ("startup", "readiness", "liveness"))
        config = _config(charts[name], tmp_path)
        assert (config.tls_cert is not None) == (kind != "grpc")
        assert (config.tls_client_ca is not None) == (kind == "tcpSocket")
        mounted = tuple(mount["mountPath"] for mount in container["volumeMounts"])
        for file in (config.tls_cert, config.tls_key, config.tls_client_ca, config.auth_tokens):
            assert file is None or str(file.parent) in mounted


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({"replicaz": 3}, "replicaz"),
        ({"modelRepository": {"from": "floppy"}}, "/modelRepository/from"),
        ({"modelRepository": {"from": "url"}}, "modelRepository.url must be given"),
        ({"autoscaling": {"kind": "keda", "minReplicas": 0}}, "wakeQuery"),
        ({"autoscaling": {"kind": "hpa", "minReplicas": 0}}, "/autoscaling/kind"),
        ({"config": {"drain_seconds": -1}}, "/config/drain_seconds"),
    ],
)
def test_values_that_make_no_sense_are_refused(given: Object, refusal: str) -> None:
    answer = manifests.render({"set": ("convoy", given)})["set"]
    assert isinstance(answer, str)
    assert refusal in answer


def test_a_second_release_is_apart_from_the_first() -> None:
    """A canary beside convoy, and a release with a name of its own."""
    rendered = manifests.render({name: (name, {}) for name in ("convoy", "convoy-canary", "pets")})
    selectors = []
    for name, full in (("convoy", "convoy"), ("convoy-canary", "convoy-canary"), ("pets", "pets-convoy")):
        objects = rendered[name]
        assert isinstance(objects, list)
        deployment = manifests.of_kind(objects, "Deployment")
        assert deployment["metadata"]["name"] == full
        selectors.append(deployment["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"])
    assert selectors == ["convoy", "convoy-canary", "pets-convoy"]


def test_pods_are_restricted(everything: list[Object]) -> None:
    """What the level `restricted` of Pod Security asks for, and a root file system that cannot be written to."""
    for pod in manifests.pods(everything):
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            security = container["securityContext"]
            both: dict[str, Any] = {**pod.get("securityContext", {}), **security}
            assert both["runAsNonRoot"] is True
            assert both["runAsUser"] == 10001
            assert both["seccompProfile"] == {"type": "RuntimeDefault"}
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def test_only_dev_reaches_into_the_node(
    charts: Mapping[str, list[Object]], overlays: Mapping[str, list[Object]]
) -> None:
    for name, objects in {**charts, **overlays}.items():
        volumes = [volume for pod in manifests.pods(objects) for volume in pod["volumes"]]
        assert any("hostPath" in volume for volume in volumes) == (name == "dev")
        for namespace in (each for each in objects if each["kind"] == "Namespace"):
            level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
            assert level == ("privileged" if name == "dev" else "restricted")


def test_no_pod_gets_a_token_of_the_cluster(everything: list[Object]) -> None:
    for each in everything:
        if each["kind"] == "ServiceAccount":
            assert each["automountServiceAccountToken"] is False
        if each["kind"] == "Deployment":
            assert each["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
