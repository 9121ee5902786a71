"""The GPU that an engine is built on, as the plan's config states it."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        compute_capability: "9.0".
        driver_version: of the NVIDIA driver, "580.65.06"; "" where nvidia-ml-py, which knows it, is not installed.
    """

    compute_capability: str
    driver_version: str


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA shows this process, which is the one that builds; None without one, or cuda-bindings."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    attributes = driver.CUdevice_attribute
    kinds = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
    try:
        _result(driver.cuInit(0))
        device = _result(driver.cuDeviceGet(0))
        numbers = [
            _result(driver.cuDeviceGetAttribute(getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{kind}"), device))
            for kind in kinds
        ]
    except RuntimeError:  # no driver, or no device
        return None
    return Gpu(".".join(map(str, numbers)), _driver_version())


def _result(answer: tuple[Any, ...]) -> Any:
    """The value of a call's answer (status, value)."""
    status, *values = answer
    if status.value != 0:
        raise RuntimeError(status.name)
    return values[0] if values else None


def _driver_version() -> str:
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            try:
                return str(pynvml.nvmlSystemGetDriverVersion())
            finally:
                pynvml.nvmlShutdown()
    return ""
