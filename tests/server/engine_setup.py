"""Which engines are installed, the spec of a model that one of them is to run, and rows for it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np

from convoynet.server.repository import repository
from convoynet.server.spec import ModelSpec
from convoynet.server.types import Tensor


def installed(engine: str) -> bool:
    return engine == "fake" or importlib.util.find_spec(engine) is not None


def spec_of(root: Path, engine: str = "onnxruntime") -> ModelSpec:
    """The spec of the one model in a repository, to be run by this engine ("": the server's choice)."""
    (found,) = repository.scan(root, repository.Defaults(4, 1))
    assert found.spec is not None, found.reason
    return replace(found.spec, engine=replace(found.spec.engine, engine="" if engine == "fake" else engine))


def rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    """The inputs of one request, as the wire has them: not to be written to."""
    x = np.random.default_rng(seed + count).standard_normal((count, 4), dtype=np.float32)
    x.setflags(write=False)
    return {"input": x}
