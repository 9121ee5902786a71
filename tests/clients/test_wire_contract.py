"""Our stubs against those of tritonclient: every message, field, number, type, enum and RPC."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.clients.conftest import Script


def test_stubs_are_the_public_clients(client_script: Script) -> None:
    script = Path(__file__).with_name("dump_descriptors.py")
    modules = ["convoynet.protos.inference.grpc_service_pb2", "convoynet.protos.inference.model_config_pb2"]
    done = subprocess.run(
        [sys.executable, str(script), *modules], capture_output=True, text=True, check=True, timeout=60
    )
    ours = json.loads(done.stdout)
    modules = ["tritonclient.grpc.service_pb2", "tritonclient.grpc.model_config_pb2"]
    public = json.loads(client_script(script.name, *modules))
    assert len(public["messages"]) > 100
    assert public["services"].keys() == {"inference.GRPCInferenceService"}
    for kind in ("services", "enums", "messages"):
        assert ours[kind].keys() == public[kind].keys()
        for name, facts in public[kind].items():
            assert ours[kind][name] == facts, name
