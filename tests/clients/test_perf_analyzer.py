"""Triton's own load generator against Convoy: it asks all that it asks of Triton, and shows what the server says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import onnx_models

BUILD = Path(__file__).parents[2] / "build"
ANALYZER = BUILD / "perf_analyzer" / "bin" / "perf_analyzer"
B64 = [*(BUILD / "triton" / "nvidia_pytriton.libs").glob("libb64-*")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ANALYZER.exists() or not B64, reason="not fetched: `make perf-analyzer` does"),
]
REQUESTS = 400


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("perf") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_linear(repository, "single", max_batch=0)
    with onnx_models.serve(repository, "--allow-client-shm", "--no-tune") as server:
        yield server


@pytest.mark.parametrize("model", ["linear", "single"])
@pytest.mark.parametrize(
    "mode",
    [
        [],
        ["-b", "4"],
        ["--async"],
        ["--async", "--streaming"],
        ["--shared-memory=system"],
        ["--shared-memory=system", "--output-shared-memory-size=4096"],
        ["--shared-memory=system", "--async", "--streaming"],
        ["--grpc-compression-algorithm=gzip"],
    ],
    ids=" ".join,
)
def test_perf_analyzer_runs_and_shows_server_statistics(
    live: onnx_models.LiveServer, tmp_path: Path, model: str, mode: list[str]
) -> None:
    if model == "single" and "-b" in mode:
        pytest.skip("the model has no batch axis")
    # Two libraries of its wheel that not every system has.
    (tmp_path / "libb64.so.0d").symlink_to(B64[0])
    libraries = f"{tmp_path}:{BUILD / 'perf_analyzer' / 'nvidia' / 'cuda_runtime' / 'lib'}"
    command = [str(ANALYZER), "-m", model, "-i", "grpc", "-u", live.url, "--concurrency-range=4", *mode]
    done = subprocess.run(
        [*command, f"--request-count={REQUESTS}"],
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Request count: {REQUESTS}" in done.stdout
    batch = 4 if "-b" in mode else 1
    rows = re.search(r"Inference count: (\d+)", done.stdout)
    executions = re.search(r"Execution count: (\d+)", done.stdout)
    parts = re.search(r"queue \d+ usec \+ compute input \d+ usec \+ compute infer (\d+) usec", done.stdout)
    assert rows, done.stdout
    assert executions
    assert parts
    # Its first and last look at the statistics are not quite at the first and last request.
    assert 0.9 * REQUESTS * batch <= int(rows[1]) <= 1.1 * REQUESTS * batch
    assert 0 < int(executions[1]) <= int(rows[1])
