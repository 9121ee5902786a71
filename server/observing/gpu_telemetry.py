"""What NVIDIA's driver says of the GPUs, asked in a thread of its own: a driver that hangs holds up nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

log = logging.getLogger(__name__)

_EVERY_S = 2.0
_STALE_S = 10.0
"""A sample older than this is shown no more: it would pass for the state of now."""
REASONS: Mapping[str, int] = {
    "applications_clocks_setting": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
}
"""NVML's bits for why the clocks are lower than they could be; that the GPU is idle is none."""


class _Family(NamedTuple):
    """One series of a GPU: its name, Triton's name ("" for none), what it is, and how NVML is asked for it."""

    name: str
    alias: str
    text: str
    read: Callable[[Any, Any], float]


_FAMILIES = (
    _Family(
        "convoy_gpu_utilization_ratio",
        "nv_gpu_utilization",
        "Share of the driver's last sample period in which a kernel ran, 0 to 1",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    _Family(
        "convoy_gpu_memory_used_bytes",
        "nv_gpu_memory_used_bytes",
        "Device memory in use, by every process",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    _Family(
        "convoy_gpu_memory_total_bytes",
        "nv_gpu_memory_total_bytes",
        "Device memory",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    _Family(
        "convoy_gpu_power_watts",
        "nv_gpu_power_usage",
        "Power draw",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    _Family(
        "convoy_gpu_power_limit_watts",
        "nv_gpu_power_limit",
        "Power limit in force",
        lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    ),
    _Family(
        "convoy_gpu_temperature_celsius",
        "",
        "Temperature of the chip",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
)


@dataclass(frozen=True, eq=False)
class _Gpu:
    """What one GPU said: values by family, without those that it does not have; `reasons` is None likewise."""

    index: int
    uuid: str
    values: Mapping[str, float]
    reasons: int | None


class GpuTelemetry:
    """The series of the GPUs, as a collector of prometheus_client; none of them where there is no driver."""

    def __init__(
        self, registry: CollectorRegistry, *, aliases: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Registers itself; `start` begins to sample.

        Args:
            registry: Where the series go.
            aliases: Whether Triton's names are exposed as well.
            clock: Seconds.
        """
        self._aliases = aliases
        self._clock = clock
        self._sampled: tuple[float, list[_Gpu]] = (0.0, [])
        self._over = threading.Event()
        registry.register(self)

    def start(self) -> None:
        """Samples every 2 s from now on."""
        threading.Thread(target=self._run, name="gpu telemetry", daemon=True).start()

    def close(self) -> None:
        """Stops sampling, without waiting for a driver that hangs."""
        self._over.set()

    def sample(self, nvml: Any) -> None:
        """Asks every GPU once.

        Args:
            nvml: The module pynvml, initialised.

        Raises:
            nvml.NVMLError: The driver does not answer at all.
        """
        found = [_ask(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        self._sampled = self._clock(), [gpu for gpu in found if gpu is not None]

    def collect(self) -> Iterable[Metric]:
        """The families of the last sample (prometheus_client's collector protocol)."""
        when, gpus = self._sampled
        if not gpus or self._clock() - when > _STALE_S:
            return
        for each in _FAMILIES:
            values = {gpu: gpu.values[each.name] for gpu in gpus if each.name in gpu.values}
            yield _gauge(each.name, each.text, [(_labels(gpu), value) for gpu, value in values.items()])
            if self._aliases and each.alias:
                yield _gauge(each.alias, each.text, [({"gpu_uuid": g.uuid}, value) for g, value in values.items()])
        throttled = [
            ({**_labels(gpu), "reason": reason}, float(bool(gpu.reasons & bit)))
            for gpu in gpus
            if gpu.reasons is not None
            for reason, bit in REASONS.items()
        ]
        yield _gauge("convoy_gpu_throttled", "1 where the clocks are held down for this reason", throttled)

    def _run(self) -> None:
        try:
            nvml = import_module("pynvml")
        except ModuleNotFoundError:
            log.info("no GPU telemetry: nvidia-ml-py is not installed (pip install 'convoynet[gpu]')")
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            log.info("no GPU telemetry: %s", error)
            return
        warned = False
        while not self._over.is_set():
            try:
                self.sample(nvml)
            except nvml.NVMLError as error:
                if not warned:
                    log.warning("GPU telemetry: the driver does not answer: %s", error)
                warned = True
            self._over.wait(_EVERY_S)


def _gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    family = Metric(name, text, "gauge")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family


def _labels(gpu: _Gpu) -> dict[str, str]:
    return {"gpu": str(gpu.index), "uuid": gpu.uuid}


def _ask(nvml: Any, index: int) -> _Gpu | None:
    """What a GPU says; None where it is lost or hidden from this process."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
    except nvml.NVMLError:
        return None
    values = {}
    for family in _FAMILIES:
        try:
            values[family.name] = family.read(nvml, handle)
        except nvml.NVMLError:  # a GPU in parts (MIG) has no utilization, some have no power meter
            continue
    return _Gpu(index, uuid, values, _reasons(nvml, handle))


def _reasons(nvml: Any, handle: Any) -> int | None:
    """The bits of why the clocks are low, by the name of drivers from 535 on or by the one of those before."""
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        try:
            return int(getattr(nvml, name)(handle))
        except (AttributeError, nvml.NVMLError):
            continue
    return None
