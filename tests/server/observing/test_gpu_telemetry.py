"""GPU series: through the real pynvml over a stand-in for the driver's library, which no machine without a GPU has."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from convoynet.server.gpus import visible_gpus
from convoynet.server.observing import gpu_telemetry
from convoynet.server.observing.gpu_telemetry import REASONS, GpuTelemetry

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is part of the gpu extra")
DOCUMENT = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
UUIDS = ("GPU-aaaa", "GPU-bbbb")
FUNCTION_NOT_FOUND, NOT_SUPPORTED, UNKNOWN = 13, 3, 999


class Library:
    """libnvidia-ml.so of a machine with two GPUs: each function fills in what it is pointed to, and returns a code.

    Attributes:
        codes: What a function returns instead of 0, by its name.
        reasons: Bits of each GPU.
    """

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.reasons = [0x4 | 0x1, 0x0]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or self.codes.get(name) == FUNCTION_NOT_FOUND:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            if code := self.codes.get(name, 0):
                return code
            *given, last = arguments
            self._fill(name, given, getattr(last, "_obj", last))
            return 0

        return function

    def _fill(self, name: str, given: list[Any], to: Any) -> None:
        # Handles are pointers; the stand-in's point to the GPU's number plus one.
        gpu = (ctypes.cast(given[0], ctypes.c_void_p).value or 1) - 1 if given and hasattr(given[0], "contents") else 0
        match name.removeprefix("nvmlDeviceGet").removesuffix("_v2"):
            case "Count":
                to.value = 2
            case "HandleByIndex":
                ctypes.memmove(ctypes.addressof(to), ctypes.addressof(ctypes.c_void_p(given[0].value + 1)), 8)
            case "UUID":
                pass
            case "UtilizationRates":
                to.gpu, to.memory = 40 + gpu, 5
            case "MemoryInfo":
                to.total, to.used, to.free = 80 * 2**30, 2**30 * (1 + gpu), 0
            case "PowerUsage":
                to.value = 250_500
            case "EnforcedPowerLimit":
                to.value = 700_000
            case "Temperature":
                to.value = 55
            case "CurrentClocksEventReasons" | "CurrentClocksThrottleReasons":
                to.value = self.reasons[gpu]

    def nvmlInitWithFlags(self, flags: int) -> int:
        return self.codes.get("nvmlInitWithFlags", 0)

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, length: Any) -> int:
        text.value = UUIDS[(ctypes.cast(handle, ctypes.c_void_p).value or 1) - 1].encode()
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    fake = Library()
    monkeypatch.setattr(pynvml, "nvmlLib", fake)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return fake


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def _labels(gpu: int, **more: str) -> dict[str, str]:
    return {"gpu": str(gpu), "uuid": UUIDS[gpu], **more}


def test_what_a_gpu_says_is_exposed(library: Library, registry: CollectorRegistry) -> None:
    GpuTelemetry(registry).sample(pynvml)
    expected = {
        "utilization_ratio": 0.41,
        "memory_used_bytes": 2 * 2**30,
        "memory_total_bytes": 80 * 2**30,
        "power_watts": 250.5,
        "power_limit_watts": 700,
        "temperature_celsius": 55,
    }
    for name, value in expected.items():
        assert registry.get_sample_value(f"convoy_gpu_{name}", _labels(1)) == value, name
    throttled = {r: registry.get_sample_value("convoy_gpu_throttled", _labels(0, reason=r)) for r in REASONS}
    assert throttled == {reason: float(reason == "sw_power_cap") for reason in REASONS}


def test_the_document_names_every_series_and_alias(library: Library, registry: CollectorRegistry) -> None:
    GpuTelemetry(registry, aliases=True).sample(pynvml)
    names = {family.name for family in registry.collect()}
    assert len(names) == 7 + 5
    for name in names:
        assert f"`{name}`" in DOCUMENT, name
    assert registry.get_sample_value("nv_gpu_power_usage", {"gpu_uuid": UUIDS[0]}) == 250.5


def test_what_a_gpu_does_not_have_is_left_out(library: Library, registry: CollectorRegistry) -> None:
    library.codes = {"nvmlDeviceGetUtilizationRates": NOT_SUPPORTED, "nvmlDeviceGetPowerUsage": NOT_SUPPORTED}
    GpuTelemetry(registry, aliases=True).sample(pynvml)
    assert registry.get_sample_value("convoy_gpu_utilization_ratio", _labels(0)) is None
    assert registry.get_sample_value("convoy_gpu_temperature_celsius", _labels(0)) == 55


def test_drivers_before_535_know_the_older_name(library: Library, registry: CollectorRegistry) -> None:
    library.codes = {"nvmlDeviceGetCurrentClocksEventReasons": FUNCTION_NOT_FOUND}
    GpuTelemetry(registry).sample(pynvml)
    assert registry.get_sample_value("convoy_gpu_throttled", _labels(0, reason="sw_power_cap")) == 1


def test_the_bits_are_those_of_both_names() -> None:
    for reason, bit in REASONS.items():
        name = "".join(part.capitalize() for part in reason.split("_"))
        assert getattr(pynvml, f"nvmlClocksEventReason{name}") == bit
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") == bit


def test_an_old_sample_is_not_shown(library: Library, registry: CollectorRegistry) -> None:
    now = [100.0]
    telemetry = GpuTelemetry(registry, clock=lambda: now[0])
    telemetry.sample(pynvml)
    assert registry.get_sample_value("convoy_gpu_power_watts", _labels(0)) is not None
    now[0] += 11
    assert registry.get_sample_value("convoy_gpu_power_watts", _labels(0)) is None


def test_a_driver_that_hangs_holds_up_no_scrape(library: Library, registry: CollectorRegistry) -> None:
    asked, released = threading.Event(), threading.Event()

    def hang(count: Any) -> int:
        asked.set()
        released.wait(60)
        return UNKNOWN

    library.__dict__["nvmlDeviceGetCount_v2"] = hang
    telemetry, others = GpuTelemetry(registry), set(threading.enumerate())
    telemetry.start()
    assert asked.wait(60)
    assert not list(registry.collect())
    telemetry.close()
    assert not released.is_set(), "neither the scrape nor close() waited for the driver"
    released.set()
    for thread in set(threading.enumerate()) - others:  # it would have something to say in the next test
        thread.join(60)


@pytest.mark.parametrize("missing", ["driver", "package"])
def test_without_a_driver_there_is_one_line_and_no_series(
    missing: str,
    library: Library,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library.codes = {"nvmlInitWithFlags": 9}  # NVML_ERROR_DRIVER_NOT_LOADED
    if missing == "package":
        monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    caplog.set_level(logging.INFO, gpu_telemetry.__name__)
    GpuTelemetry(registry)._run()
    (line,) = caplog.messages
    assert re.match("no GPU telemetry: (Driver Not Loaded|nvidia-ml-py is not installed)", line)
    assert not list(registry.collect())


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus(), reason="there is no NVIDIA GPU")
def test_a_real_driver_says_how_its_gpus_are(registry: CollectorRegistry) -> None:
    pynvml.nvmlInit()
    GpuTelemetry(registry).sample(pynvml)
    found = {s.name: s.value for family in registry.collect() for s in family.samples if s.labels["gpu"] == "0"}
    assert 0 < found["convoy_gpu_memory_used_bytes"] < found["convoy_gpu_memory_total_bytes"]
    assert 10 < found["convoy_gpu_temperature_celsius"] < 110
    assert found["convoy_gpu_throttled"] in (0, 1)
