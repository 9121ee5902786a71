"""What tests of models share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other work takes its time to start what is busy beside engines."""
    monkeypatch.setattr("convoynet.server.models.service_load._START_SECONDS", 200.0)
