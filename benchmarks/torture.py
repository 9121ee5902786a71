"""Faults at random moments, under load, until the time is over: whether a server stays alive, and right.

    python benchmarks/torture.py                            both stacks, one and two front ends, 30 minutes in all
    python benchmarks/torture.py --minutes 2 --stacks grpcio --frontends 2 --seed 7
    python benchmarks/torture.py --save                     writes benchmarks/results/torture-MACHINE.json as well

Each server serves three models (an ONNX graph, an engine of 2 ms, one of 50 ms) from a folder and a fourth from a web
server, to clients over gRPC, streams and HTTP whose answers are known. In each round faults are injected one after the
other; then the last of them is healed and within 10 s everything has to be as before. What must never be: a wrong
answer, one for another client, a request that does not end by its deadline or 30 s, an end that no fault explains, and
after each round and the server's end descriptors, memory, processes, files or shared memory that are left behind. Any
of it is a violation, which the report names, and the exit status is 1.

The random numbers are of the seed alone: the same faults come in the same order again, though not in the same moments.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import platform
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import torture_load as load
from torture_server import CONFIG_JSON, MEMORY, Server, state, write_fake, write_models

HEALTHY_SECONDS = 10.0
_ROUND_FAULTS = 12
_LOAD_TIMEOUT = 20
_MORE_DESCRIPTORS, _MORE_BYTES = 12, 48 * 2**20
_SERVED = ("convoy-model-",)
"""What is in the temporary folder while a server serves: files of load requests."""
_UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


class Torture:
    """One server with one stack and so many front ends, for so many seconds."""

    def __init__(self, stack: str, frontends: int, seed: int, without: frozenset[str]) -> None:
        self.name = f"{stack}, {frontends} front end{'s' if frontends > 1 else ''}"
        self._rng = random.Random(f"{seed} {self.name}")
        self._seed, self._frontends = seed, frontends if frontends > 1 else 0
        self._flags = ["--grpc-stack", stack, "--frontends", str(frontends), "--model-control-mode", "explicit"]
        self._flags += ["--load-model", "*", "--load-timeout-seconds", str(_LOAD_TIMEOUT), "--allow-client-shm"]
        self._faults = {name: fault for name, fault in self._all().items() if name not in without}
        self._held: list[socket.socket] = []
        self._heal: list[Callable[[], None]] = []
        self.injected: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self.violations: list[str] = []
        self.tally = load.Tally()
        self.growth: dict[str, int] = {}

    def _all(self) -> dict[str, Callable[[], Awaitable[None]]]:
        faults = {
            "engine killed": self._kill_engine,
            "engine stopped": self._stop_engine,
            "engine stopped for a while": self._pause_engine,
            "no descriptors": self._no_descriptors,
            "no memory for batches": self._no_memory,
            "no memory for an engine": self._no_engine_memory,
            "full disk": self._full_disk,
            "FIFO in the repository": self._fifo,
            "remote store stopped": self._stop_store,
            "shared memory truncated": self._truncate,
            "clients hang up": self._hang_up,
            "clients send halves": self._send_halves,
            "clients stop reading": self._stop_reading,
            "files of a load request": self._overlay,
        }
        if self._frontends:
            faults |= {"front end killed": self._kill_front, "front end stopped": self._stop_front}
        return faults

    async def run(self, seconds: float) -> None:
        """Torments a server for so long, then looks at what is left."""
        with tempfile.TemporaryDirectory(prefix="torture-") as name:
            folder = Path(name)
            self._models = folder / "models"
            write_models(self._models)
            write_fake(folder / "store", "remote", 0.001)
            self._store = _store(folder / "store")
            repositories = [str(self._models)]
            if find_spec("aiohttp") and find_spec("fsspec"):
                repositories.append(f"http://127.0.0.1:{self._store.port}/")
            try:
                self._server = Server(folder, repositories, *self._flags)
                await self._torment(time.monotonic() + seconds)
                self.violations += await asyncio.to_thread(self._server.end)
            finally:
                self._store.process.kill()
                self._store.process.wait()
                with suppress(OSError):
                    self._server.process.kill()
        self.violations += [f"wrong answer: {text}" for text in self.tally.wrong]
        self.violations += [f"no end in time: {text}" for text in self.tally.unended]
        self.violations += [f"strange end: {text}" for text in self.tally.strange]

    async def _torment(self, end: float) -> None:
        self._engines = len(self._server.engines())
        # The first round is for what grows once, and for measuring how long batches take.
        before: tuple[int, int] | None = None
        rounds = 0
        while rounds < 2 or time.monotonic() < end:
            asking = load.Load(self._server.grpc, self._server.http, self._seed + rounds)
            asking.tally = self.tally
            asking.start()
            await asyncio.sleep(2.0)
            for _ in range(_ROUND_FAULTS if rounds else 0):
                await self._inject()
                await asyncio.sleep(self._rng.uniform(0.1, 1.5))
                if self._server.process.poll() is not None:
                    log = "\n".join(list(self._server.log)[-20:])
                    self.violations.append(f"the server has ended: {self._server.process.returncode}\n{log}")
                    await asking.stop()
                    return
            self._heal_all()
            await self._healthy()
            _say(f"{self.name}: round {rounds}, healthy after {self.recoveries[-1]} s, {dict(self.tally.ended)}")
            await asking.stop()
            self.tally.short = False
            await asyncio.sleep(1.0)
            now = self._server.descriptors(), self._server.memory()
            if rounds <= 1:
                before = now
            elif before is not None:
                self._compare(before, now)
            rounds += 1

    def _compare(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        descriptors, memory = now[0] - before[0], now[1] - before[1]
        self.growth = {"descriptors": descriptors, "bytes": memory}
        if descriptors > _MORE_DESCRIPTORS:
            self.violations.append(f"{descriptors} more descriptors than after the first round")
        if memory > _MORE_BYTES:
            self.violations.append(f"{memory} more bytes than after the first round")
        if strange := [what for what in self._server.leftovers() if not what.startswith(_SERVED)]:
            self.violations.append(f"left behind while it serves: {', '.join(strange)}")

    async def _inject(self) -> None:
        name = self._rng.choice(sorted(self._faults))
        self.injected[name] += 1
        _say(f"{self.name}: {name}")
        await self._faults[name]()

    def _heal_all(self) -> None:
        while self._heal:
            with suppress(OSError):
                self._heal.pop()()
        for way in self._held:
            way.close()
        self._held.clear()

    async def _healthy(self) -> None:
        """Waits until all is as before; a violation where that takes longer than 10 s."""
        begun = time.monotonic()
        why = ""
        while time.monotonic() - begun < 6 * HEALTHY_SECONDS:
            why = await self._what_is_wrong()
            if why and time.monotonic() - begun > HEALTHY_SECONDS:
                _say(f"{self.name}: still {why}")
            if not why or self._server.process.poll() is not None:
                break
            await asyncio.sleep(0.2)
        took = time.monotonic() - begun
        self.recoveries.append(round(took, 2))
        if why or took > HEALTHY_SECONDS:
            _say("\n".join(list(self._server.log)[-30:]))
            self.violations.append(f"healthy again after {took:.1f} s, {HEALTHY_SECONDS:g} s are allowed; last: {why}")

    async def _what_is_wrong(self) -> str:
        engines, fronts = self._server.engines(), self._server.fronts()
        if len(engines) != self._engines or any(state(pid) == "T" for pid in engines):
            return f"{len(engines)} engines that run, {self._engines} are due"
        if self._frontends and (len(fronts) != self._frontends or any(state(pid) == "T" for pid in fronts)):
            return f"{len(fronts)} front ends"
        host, _, port = self._server.http.rpartition(":")
        for model in load.MODELS:
            for path, body in ((f"/v2/models/{model}/ready", None), (f"/v2/models/{model}/infer", _plain())):
                try:
                    async with asyncio.timeout(HEALTHY_SECONDS):
                        status, _ = await load.ask_http(host, int(port), path, body)
                except (OSError, ValueError, EOFError) as error:
                    return f"{path}: {error!r}"
                if status != 200:
                    return f"{path}: {status}"
        return await asyncio.to_thread(self._grpc_wrong)

    def _grpc_wrong(self) -> str:
        # A new connection each: any of the front ends.
        for model in load.MODELS:
            with grpc.insecure_channel(self._server.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                try:
                    call(load.message(model, [1]).SerializeToString(), timeout=HEALTHY_SECONDS)
                except grpc.RpcError as error:
                    return f"{model}: {error.code().name}"
        return ""

    # The faults.

    def _engine(self) -> int | None:
        """An engine, which may be loading."""
        engines = sorted(self._server.engines())
        return self._rng.choice(engines) if engines else None

    async def _kill_engine(self) -> None:
        _signal(self._engine(), signal.SIGKILL)

    async def _stop_engine(self) -> None:
        _signal(self._engine(), signal.SIGSTOP)

    async def _pause_engine(self) -> None:
        pid = self._engine()
        _signal(pid, signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.1, 3.0))
        _signal(pid, signal.SIGCONT)

    async def _kill_front(self) -> None:
        fronts = sorted(self._server.fronts())
        _signal(self._rng.choice(fronts) if fronts else None, signal.SIGKILL)

    async def _stop_front(self) -> None:
        fronts = sorted(self._server.fronts())
        _signal(self._rng.choice(fronts) if fronts else None, signal.SIGSTOP)

    async def _no_descriptors(self) -> None:
        pid = self._server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (self._server.descriptors() + 1, before[1]))
        if self._rng.random() < 0.7:
            await self._kill_engine()
        if self._frontends and self._rng.random() < 0.5:
            await self._kill_front()
        await asyncio.sleep(self._rng.uniform(0.5, 2.0))
        self._lift(resource.RLIMIT_NOFILE, before)

    async def _no_memory(self) -> None:
        """The memory that batches lie in is a file for the system: it cannot grow."""
        self.tally.short = True
        pid = self._server.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        await asyncio.sleep(self._rng.uniform(0.5, 2.0))
        self._lift(resource.RLIMIT_FSIZE, _UNLIMITED)

    async def _no_engine_memory(self) -> None:
        pid = self._engine()
        if pid is None:
            return
        self.tally.short = True
        with suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_AS, (2**20, resource.RLIM_INFINITY))
            await asyncio.sleep(self._rng.uniform(0.5, 2.0))
            resource.prlimit(pid, resource.RLIMIT_AS, _UNLIMITED)

    async def _full_disk(self) -> None:
        self.tally.short = True
        pid = self._server.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        status = await self._load("quick", {"file:1/pad": base64.b64encode(bytes(5000)).decode()})
        if status == 200:
            self.violations.append("files of a load request that have no room were taken")
        self._lift(resource.RLIMIT_FSIZE, _UNLIMITED)

    def _lift(self, which: int, limits: tuple[int, int]) -> None:
        """Lifts a limit of the server, and of what it has started meanwhile, which has inherited it."""
        for pid in self._server.processes():
            with suppress(OSError):
                resource.prlimit(pid, which, limits)

    async def _fifo(self) -> None:
        folder = self._models / f"fifo-{self._rng.randrange(10**6)}"
        write_fake(self._models, folder.name, 0)
        victim = folder / self._rng.choice(["config.pbtxt", "report.json", "1/model.json"])
        victim.unlink(missing_ok=True)
        os.mkfifo(victim)
        if await self._load(folder.name) == 200:
            self.violations.append("a model with a FIFO was loaded")
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()

    async def _stop_store(self) -> None:
        self._store.process.send_signal(signal.SIGSTOP)
        self._heal.append(lambda: self._store.process.send_signal(signal.SIGCONT))
        await self._load("quick", seconds=self._rng.uniform(0.5, 3.0))
        self._store.process.send_signal(signal.SIGCONT)

    async def _overlay(self) -> None:
        """A model is loaded with files of its own, and from the repository again."""
        content = base64.b64encode(b'{"seconds": 0.002}').decode()
        await self._load("quick", {"config": json.dumps(CONFIG_JSON), "file:1/model.json": content})
        await self._load("quick")

    async def _load(self, model: str, parameters: dict[str, str] | None = None, seconds: float = 8.0) -> int:
        host, _, port = self._server.http.rpartition(":")
        body = json.dumps({"parameters": parameters} if parameters else {}).encode()
        try:
            async with asyncio.timeout(seconds):
                return (await load.ask_http(host, int(port), f"/v2/repository/models/{model}/load", body))[0]
        except (OSError, ValueError, EOFError):
            return 0

    async def _truncate(self) -> None:
        """A client's region is made shorter than what it said, and asked for."""
        name = f"torture-{self._rng.randrange(10**9)}"
        file = MEMORY / name
        host, _, port = self._server.http.rpartition(":")
        file.write_bytes(bytes(2**16))
        told = {"key": f"/{name}", "offset": 0, "byte_size": 2**16}
        where = {"shared_memory_region": name, "shared_memory_byte_size": 64, "shared_memory_offset": 2**15}
        tensor = {"name": "x", "datatype": "FP32", "shape": [4, 4], "parameters": where}
        try:
            async with asyncio.timeout(HEALTHY_SECONDS):
                region = f"/v2/systemsharedmemory/region/{name}"
                await load.ask_http(host, int(port), f"{region}/register", json.dumps(told).encode())
                os.truncate(file, self._rng.choice([0, 100, 4096]))
                body = json.dumps({"inputs": [tensor]}).encode()
                await load.ask_http(host, int(port), "/v2/models/quick/infer", body)
                await load.ask_http(host, int(port), f"{region}/unregister", b"{}")
        except (OSError, ValueError, EOFError):
            pass
        finally:
            file.unlink()

    async def _hang_up(self) -> None:
        await self._misbehave(load.hang_up)

    async def _send_halves(self) -> None:
        await self._misbehave(load.send_half)

    async def _stop_reading(self) -> None:
        await self._misbehave(load.stop_reading)

    async def _misbehave(self, how: Callable[[str, int, random.Random], socket.socket | None]) -> None:
        host, _, port = self._server.http.rpartition(":")
        for _ in range(self._rng.randint(1, 5)):
            if (way := await asyncio.to_thread(how, host, int(port), self._rng)) is not None:
                self._held.append(way)


class _Store:
    """A web server over a folder, in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port


def _store(folder: Path) -> _Store:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return _Store(process, port)
        time.sleep(0.1)
    raise SystemExit("the web server of the remote repository does not start")


def _signal(pid: int | None, number: int) -> None:
    with suppress(OSError):
        if pid is not None:
            os.kill(pid, number)


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _plain() -> bytes:
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode()


def main() -> int:
    """Runs the campaign; 1 where anything was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all servers together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stacks", nargs="+", choices=("native", "grpcio"), default=["native", "grpcio"])
    parser.add_argument("--frontends", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--without", nargs="+", default=[], help="faults to leave out, by name")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    given = parser.parse_args()
    cells = [Torture(s, n, given.seed, frozenset(given.without)) for s in given.stacks for n in given.frontends]
    report: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "seed": given.seed}
    for cell in cells:
        begun = time.monotonic()
        asyncio.run(cell.run(60 * given.minutes / len(cells)))
        report[cell.name] = {
            "seconds": round(time.monotonic() - begun),
            "requests": dict(cell.tally.ended.most_common()),
            "faults": dict(sorted(cell.injected.items())),
            "slowest_request_s": round(cell.tally.slowest, 1),
            "slowest_recovery_s": max(cell.recoveries, default=0.0),
            "rounds": len(cell.recoveries),
            "growth": cell.growth,
            "violations": cell.violations,
        }
        sys.stdout.write(f"{cell.name}: {json.dumps(report[cell.name], indent=1)}\n")
        sys.stdout.flush()
    if given.save:
        file = Path(__file__).parent / "results" / f"torture-{os.cpu_count()}-cores.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
    violations = sum(len(cell.violations) for cell in cells)
    sys.stdout.write(f"{violations} violations\n")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
