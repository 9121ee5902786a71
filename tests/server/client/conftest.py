"""What tests of the client share: a client of the server that each file calls `live`, and small pictures."""

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from convoynet.server.client.client import Client
from tests.server import onnx_models


@pytest.fixture
def client(live: onnx_models.LiveServer) -> Iterator[Client]:
    with Client(live.url) as client:
        yield client


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "PNG")
    return file.getvalue()
