"""The order in which files are given to the processes of a run, patience on slow machines, and garbage."""

import gc
import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# An example takes as long as it takes: a busy machine stands still for a second in any of them.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Tests hold what PyTorch has traced, and to look through all of it takes a second each time: a twentieth of the run.
gc.set_threshold(50_000, 20, 100)

# Networks of tests are tiny: on a busy machine a second thread is mostly waited for, up to twenty times as long as the
# first computes. It is read when torch is first imported, which the reading of some test does: so here, before any.
os.environ["OMP_NUM_THREADS"] = "1"

# Servers are ready when all of their models are, however long one of them takes.
os.environ["CONVOY_START_PATIENCE_SECONDS"] = "3600"

# The longest first: a file goes to one process as a whole, and what begins last should end soon.
LONGEST = (
    "test_zoo.py",
    "test_tasks.py",
    "test_detection.py",
    "test_one_stage.py",
    "test_custom_networks.py",
    "test_archs.py",
    "test_segmentation.py",
    "test_compressed_export.py",
    "test_pipeline.py",
    "test_calibrate.py",
    "test_quantize.py",
    "test_onnx_clean.py",
    "test_tensorrt_zoo.py",
    "test_engines.py",
    "test_triton_parity.py",
    "test_sweep.py",
    "test_counting.py",
    "test_published_weights.py",
    "test_stress.py",
    "test_release.py",
    "test_api.py",
    "test_access.py",
    "test_given_files.py",
    "test_walk_through.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files, and leaves the order within each.

    Behind the longest, files that compute and files that mostly wait, for servers, alternate: while one process of a
    run waits, others have the cores.
    """
    longest = {name: place for place, name in enumerate(LONGEST)}
    counted = Counter(_computes(item.path) for item in items)
    seen: Counter[bool] = Counter()
    places: dict[Path, float] = {}
    for item in items:
        kind = _computes(item.path)
        seen[kind] += 1
        places.setdefault(item.path, longest.get(item.path.name, len(LONGEST) + seen[kind] / counted[kind]))
    items.sort(key=lambda item: (places[item.path], item.path))


@cache
def _computes(file: Path) -> bool:
    return Path(__file__).with_name("exporter") in file.parents
