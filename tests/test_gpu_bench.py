"""What benchmarks/gpu.py does around its measurements: cases, rows on disk, processes that fail or are late, tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "name_of", lambda device: f"a {device}")
    monkeypatch.setattr(gpu, "environment", lambda _: {"cores": 2, "tensorrt": None})
    yield gpu
    for name in ("gpu", "gpu_report"):
        sys.modules.pop(name, None)


def arguments(work: Path, **given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"seconds": 0.1, "device": "cpu", "work": work, "again": False, **given})


CHILD = """
import json, sys, time
case = json.loads(sys.argv[sys.argv.index("--case") + 1])
print("a library says something")
for row in case["rows"]:
    if row == "late":
        time.sleep(600)
    if row == "broken":
        sys.exit("Traceback\\nRuntimeError: no such engine")
    print("ROW " + json.dumps([row, {"resident_per_s": 123.456789, "p99_ms": float("nan")}]), flush=True)
"""


@pytest.fixture
def child(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in the place of the one that measures."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(gpu, "__file__", str(script))


def test_every_case_that_the_issue_names_is_there(gpu: ModuleType) -> None:
    cases = list(gpu.cases(gpu.NETWORKS, "cuda"))
    assert {case.network for case in cases if case.kind == "bare"} == set(gpu.NETWORKS)
    assert {case.kind for case in cases} == {"bare", "served", "latency", "frontends"}
    keys = [case.key(row) for case in cases for row in case.rows]
    assert len(keys) == len(set(keys))
    assert "bare | resnet50 | plan | int8 | 128" in keys
    assert "bare | vgg16 | pytorch eager | fp32 | 1" in keys
    assert "served | googlenet | tensorrt | fp16 | shm x32" in keys
    assert "latency | resnet101 | onnx | fp16 | 99%" in keys


@pytest.mark.usefixtures("child")
def test_rows_are_kept_as_they_come_and_the_reason_of_those_that_do_not(gpu: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "gpu-a.json"
    case = gpu.Case("bare", "tiny", "plan", "int8", ("1", "8", "broken", "128"))
    gpu.run([case], gpu.Store(file, "cpu"), arguments(tmp_path, minutes=1))
    rows = json.loads(file.read_text())["rows"]
    assert rows[case.key("8")] == {"resident_per_s": 123.5, "p99_ms": None}
    assert rows[case.key("broken")] == rows[case.key("128")] == {"error": "RuntimeError: no such engine"}


@pytest.mark.usefixtures("child")
def test_a_second_call_measures_what_is_missing_alone(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu-a.json"
    case = gpu.Case("bare", "tiny", "plan", "int8", ("1", "broken"))
    gpu.run([case], gpu.Store(file, "cpu"), arguments(tmp_path, minutes=1))
    more = gpu.Case("bare", "tiny", "plan", "int8", ("1", "2", "broken"))
    capsys.readouterr()
    gpu.run([more], gpu.Store(file, "cpu"), arguments(tmp_path, minutes=1))
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [more.key("2")]
    gpu.run([more], gpu.Store(file, "cpu"), arguments(tmp_path, minutes=1, again=True))
    assert capsys.readouterr().out.startswith(more.key("broken"))


@pytest.mark.usefixtures("child")
def test_what_does_not_come_in_time_is_left_for_the_next_call(gpu: ModuleType, tmp_path: Path) -> None:
    store = gpu.Store(tmp_path / "gpu-a.json", "cpu")
    case = gpu.Case("bare", "tiny", "plan", "int8", ("late",))
    gpu.run_case(case, store, arguments(tmp_path), time.monotonic() + 1)
    assert store.rows == {}


@pytest.mark.usefixtures("child")
def test_a_case_that_hangs_is_named(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_CASE_SECONDS", 1)
    store = gpu.Store(tmp_path / "gpu-a.json", "cpu")
    case = gpu.Case("bare", "tiny", "plan", "int8", ("late",))
    gpu.run_case(case, store, arguments(tmp_path), time.monotonic() + 600)
    assert store.rows == {case.key("late"): {"error": "took longer than 1 s"}}


ROWS = {
    "bare | resnet50 | pytorch eager | fp32 | 1": {"resident_per_s": 100.0},
    "bare | resnet50 | pytorch eager | fp32 | 128": {"resident_per_s": 1000.0},
    "bare | resnet50 | plan | int8 | 128": {"resident_per_s": 12345.0},
    "bare | resnet50 | plan | fp8 | 128": {"error": "too little memory"},
    "served | resnet50 | tensorrt | fp16 | shm x32": {"images_per_s": 900.0, "bare_per_s": 1000.0, "ratio": 0.9},
    "latency | resnet50 | tensorrt | fp16 | 50%": {"offered_images_per_s": 450.0, "p50_ms": 1.25, "p99_ms": None},
}


def test_the_page_shows_what_was_measured(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "gpu.md"
    page.write_text((ROOT / "benchmarks" / "gpu.md").read_text())
    monkeypatch.setattr(gpu.gpu_report, "PAGE", page)
    stated = {"device": "NVIDIA Paper", "environment": {"cores": 16}, "rows": ROWS}
    gpu.gpu_report.write(stated, tmp_path / "gpu-paper.png")
    first = page.read_text()
    assert "NVIDIA Paper; cores 16." in first
    assert "| plan int8 | - | 12,345 | 12.3 |" in first
    assert "| resnet50 | tensorrt fp16 | shm x32 | 900 | 1,000 | 0.9 | - | - | - |" in first
    assert "| resnet50 | tensorrt fp16 | 50% | 450 | 1.25 | - | - |" in first
    assert "- bare | resnet50 | plan | fp8 | 128: too little memory" in first
    assert gpu.gpu_report.NOTHING not in first
    assert (tmp_path / "gpu-paper.png").stat().st_size > 10_000
    gpu.gpu_report.write(stated, tmp_path / "gpu-paper.png")
    assert page.read_text() == first


def test_the_page_says_that_nothing_was_measured_as_long_as_nothing_was(gpu: ModuleType) -> None:
    measured = list((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    said = gpu.gpu_report.NOTHING in (ROOT / "benchmarks" / "gpu.md").read_text()
    assert said == (not measured)


def test_every_network_of_the_benchmark_has_parity_thresholds_for_each_precision(gpu: ModuleType) -> None:
    stored = json.loads((ROOT / "tests" / "gpu_parity.json").read_text())
    assert set(gpu.NETWORKS) <= stored["limits"].keys()
    precisions = {"fp32", "tf32", "fp16", "bf16", "int8", "int8+fp16", "fp8"}
    assert stored["basis"].keys() == precisions
    for name, limits in stored["limits"].items():
        assert limits.keys() == precisions, name
        assert limits["fp32"]["max_rel_error"] <= 1e-3
        assert all(limits[key]["sqnr_db"] > 0 for key in precisions - {"fp32"})
