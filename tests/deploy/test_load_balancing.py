"""deploy/load-balancing/README.md: nothing is lost when a replica goes, with the real Envoy and the real nginx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc as rpc
from convoynet.server.client.client import Client
from convoynet.server.client.load import make_load
from tests.deploy.balancing import Proxy, Replica, Traffic, free_ports, ready, until
from tests.server.certificates import Authority

pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def replicas(lenet5: Path) -> Iterator[tuple[Replica, Replica]]:
    """Two servers of LeNet-5."""
    first, second = (Replica(lenet5, port) for port in free_ports(2))
    yield first, second
    for replica in (first, second):
        replica.terminate()


@pytest.mark.parametrize("kind", ["envoy", "nginx"])
def test_no_call_fails_while_a_replica_is_killed_and_another_rolled(
    kind: str, tool: Callable[[str], str], replicas: tuple[Replica, Replica], tmp_path: Path
) -> None:
    first, second = replicas
    with Proxy(kind, tool(kind), tmp_path, (first.port, second.port)) as proxy:
        url = f"127.0.0.1:{proxy.port}"
        until(lambda: ready(url))
        with Client(url) as client:
            load = make_load(client, "lenet5")
        before = [first.answered(), second.answered()]
        with Traffic(load) as traffic:
            traffic.more(2000)
            shares = [first.answered() - before[0], second.answered() - before[1]]
            first.kill()
            traffic.more()
            if kind == "nginx":
                proxy.mark(first, down=True)
            first.start()
            if kind == "nginx":
                proxy.mark(first, down=False)
            until(lambda: first.answered() > 100)
            if kind == "nginx":
                proxy.mark(second, down=True)
            status = second.terminate()
            traffic.more()
            second.start()
            if kind == "nginx":
                proxy.mark(second, down=False)
            until(lambda: second.answered() > 100)
    print(f"{kind}: {traffic.answered} calls, of the first {sum(shares)} one replica had {shares[0]}")
    assert min(shares) > 0.25 * sum(shares)
    assert status == 0
    assert traffic.failures == []


@pytest.mark.parametrize("kind", ["envoy", "nginx"])
def test_tls_as_the_readme_turns_it_on(
    kind: str, tool: Callable[[str], str], replicas: tuple[Replica, Replica], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("proxy")
    folder = tmp_path / "proxy"
    folder.mkdir()
    (folder / "tls.crt").write_bytes(pair.certificate.read_bytes())
    (folder / "tls.key").write_bytes(pair.key.read_bytes())
    ports = (replicas[0].port, replicas[1].port)
    with Proxy(kind, tool(kind), folder, ports, tls=True) as proxy:
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{proxy.port}", credentials) as channel:
            grpc.channel_ready_future(channel).result(30)
            stub = rpc.GRPCInferenceServiceStub(channel)
            assert stub.ModelReady(pb.ModelReadyRequest(name="lenet5"), timeout=30, wait_for_ready=True).ready
