"""A plan that does not fit what is here is refused before anything heavy, in one line that says how to rebuild it."""

from __future__ import annotations

import importlib.machinery
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from convoynet.server import engines
from convoynet.server.engines import plan_checks
from convoynet.server.engines.base import EngineSpec
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import EngineOptions, PlanOptions
from tests.server.engines.test_tensorrt_engine import spec_of

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(tensorrt="11.0.0.1")`: the libraries that there are, and no others."""

    def do(**versions: str) -> None:
        def find(name: str) -> object:
            return importlib.machinery.ModuleSpec(name, None) if name in versions else None

        monkeypatch.setattr(plan_checks, "find_spec", find)
        monkeypatch.setattr(plan_checks, "import_module", lambda name: SimpleNamespace(__version__=versions[name]))

    return do


def refused(plan: PlanOptions) -> str:
    with pytest.raises(InvalidModel) as caught:
        plan_checks.library(plan, "net")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_library_of_the_plan_is_taken(install: Install) -> None:
    install(tensorrt="11.0.0.1", tensorrt_rtx="1.7.1.116")
    for library, told in (
        ("", "TensorRT 11.0.0.1"),
        ("tensorrt", "TensorRT 11.0.0.1"),
        ("tensorrt_rtx", "TensorRT-RTX 1.7.1.116"),
    ):
        assert plan_checks.library(PlanOptions(library), "net")[1] == told


def test_no_tensorrt(install: Install) -> None:
    install()
    assert refused(PlanOptions()) == "its plan needs TensorRT, which is not installed: pip install tensorrt"
    install(tensorrt_rtx="1.7.1.116")
    assert refused(PlanOptions("tensorrt")) == (
        "its plan needs TensorRT, which is not installed: pip install tensorrt, or rebuild it with TensorRT-RTX, which "
        "is: `convoy build models/net`"
    )


def test_a_library_that_cannot_be_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tensorrt="")

    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(plan_checks, "import_module", broken)
    assert refused(PlanOptions()) == (
        "TensorRT cannot be imported (libnvinfer.so.11: cannot open shared object file): "
        "pip install --force-reinstall tensorrt"
    )


@pytest.mark.parametrize(
    ("built", "here", "compatible", "fits"),
    [
        ("10.13.2.6", "10.13.2.6", False, True),
        ("10.13.2.6", "10.13.2.7", False, False),
        ("10.13.2.6", "10.14.0.1", True, True),
        ("10.13.2.6", "10.12.0.36", True, False),
        ("10.13.2.6", "11.0.0.1", True, False),
        ("", "11.0.0.1", False, True),
    ],
)
def test_versions(install: Install, built: str, here: str, compatible: bool, fits: bool) -> None:
    install(tensorrt=here)
    plan = PlanOptions("tensorrt", built, version_compatible=compatible)
    if fits:
        assert plan_checks.library(plan, "net")[1] == f"TensorRT {here}"
        return
    later = " or later of the same major version" if compatible else ""
    assert refused(plan) == (
        f"its plan was built with TensorRT {built} and runs with that version{later} alone; here is {here}: "
        f"`convoy build models/net`, or pip install tensorrt=={built}"
    )


def test_without_a_gpu_the_load_says_so(tmp_path: Path) -> None:
    """The whole way, with the real library: the version is looked at first, then the GPU, then the file."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra")
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is an extra")
    if cuda.cudaGetDeviceCount()[0] == cuda.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    spec = spec_of(tmp_path, library="tensorrt_rtx", version="1.0.0.1")
    with pytest.raises(InvalidModel, match=r"^its plan was built with TensorRT-RTX 1\.0\.0\.1 and runs with"):
        engines.load(spec)
    spec = spec_of(tmp_path, library="tensorrt_rtx", version=trt.__version__)
    with pytest.raises(InvalidModel, match=r"^a TensorRT plan runs on an NVIDIA GPU, and none can be used here: .* \("):
        engines.load(spec)


def test_the_spec_of_a_plan_travels_whole(tmp_path: Path) -> None:
    plan = PlanOptions("tensorrt", "10.1", "9.0", ((1, 2, 3), (4, 5, 6)), build=("--batch", "1:2:3"))
    spec = spec_of(tmp_path)
    spec = replace(spec, options=replace(spec.options, plan=plan, gpus=(1,)), buckets=(1, 3))
    assert EngineSpec.from_json(spec.to_json()) == spec
    assert isinstance(spec.options, EngineOptions)
