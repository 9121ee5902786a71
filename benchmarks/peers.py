"""Convoy beside other inference servers, on one machine, in one run, with the same network and the same load.

    python benchmarks/peers.py --install          environments of the peers (gigabytes), then measure
    python benchmarks/peers.py --peers convoy triton echo --seconds 4 --rounds 3 --save

Every peer serves the networks that our exporter made, in ONNX Runtime with the same options (benchmarks/peers/). One
whose environment is not in --venvs is left out. h2load, nghttp2's C client, sends one image a request over at most
eight connections; its answers are checked by their length, one of them by its numbers. Rounds are interleaved: every
peer is measured once before one is measured again. `echo` is an empty grpcio handler: what a Python process can do at
all. `convoy-grpcio` is Convoy with `--grpc-stack grpcio`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from convoy_server import CONVOY
from measuring import Case, Row, Server, cases, measure, write_models
from serving import EXPORTS, machine

HERE = Path(__file__).parent / "peers"
REQUIREMENTS = {
    "kserve": ["kserve==0.21.0"],
    "mlserver": ["mlserver==1.7.1"],
    "litserve": ["litserve==0.2.19"],
    "pytriton": ["nvidia-pytriton==0.7.0"],
}
# Peers that share an environment.
ENVIRONMENTS = {"triton": "pytriton"}
QUIET_CORES = 0.15
PEERS = ("convoy", "convoy-grpcio", "echo", "triton", "pytriton", "kserve", "mlserver", "litserve")


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--cases", nargs="+", default=["tiny", "uint8", "jpeg"], choices=["tiny", "uint8", "jpeg"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--venvs", type=Path, default=Path(os.environ.get("PEERS_VENVS", "build/peers")))
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--repository", type=Path, help="lenet5 and resnet50, exported already (default: export them)")
    parser.add_argument("--convoy-flags", default="", help="further flags of `convoy serve`, in one text")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/peers-<machine>.json")
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.venvs)
    with tempfile.TemporaryDirectory(prefix="convoy-peers-") as made:
        repository = arguments.repository or export(Path(made) / "repository")
        write_models(repository, Path(made), threads=len(os.sched_getaffinity(0)))
        chosen = {
            name: command
            for name in arguments.peers
            if (command := launcher(name, arguments.venvs, Path(made), repository, arguments.convoy_flags))
        }
        bare: list[dict[str, float]] = []
        rows: list[Row] = []
        wanted = [case for case in cases(Path(made)) if case.name in arguments.cases]
        for number in range(arguments.rounds):
            bare.append(bare_engines(Path(made), repository, arguments.seconds))
            for name, command in chosen.items():
                rows += one_peer(name, command, wanted, arguments.concurrency, arguments.seconds, number)
        if not rows:
            raise SystemExit("no peer gave an answer")
        print(tables(rows, bare))
        if arguments.save:
            save(rows, bare)


def install(venvs: Path) -> None:
    """An environment for each peer, in which its own dependencies rule."""
    for name, requirements in REQUIREMENTS.items():
        if not (venvs / name).exists():
            subprocess.run([sys.executable, "-m", "venv", str(venvs / name)], check=True)
            python = str(venvs / name / "bin" / "python")
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *requirements, "onnxruntime", "pillow", "setuptools<81"],
                check=True,
            )


def export(repository: Path) -> Path:
    """Both networks, in INT8, by our exporter."""
    for name in ("lenet5", "resnet50"):
        flags = [*EXPORTS[name], "--int8", "--name", name, "--model-repository", str(repository), "--json"]
        subprocess.run([CONVOY, "export", *flags], check=True, stdout=subprocess.DEVNULL)
    return repository


def launcher(name: str, venvs: Path, models: Path, repository: Path, convoy_flags: str) -> list[str]:
    """The command that serves on the port that is put behind it; [] where the peer is not installed."""
    if name.startswith("convoy"):
        flags = [
            "--grpc-stack",
            "grpcio" if name == "convoy-grpcio" else "native",
            "--model-repository",
            str(repository),
            "--metrics-port",
            "0",
            "--http-port",
            "0",
            "--log-level",
            "error",
        ]
        return [CONVOY, "serve", *flags, *convoy_flags.split(), "--grpc-port"]
    python = Path(sys.executable) if name == "echo" else venvs / ENVIRONMENTS.get(name, name) / "bin" / "python"
    if not python.exists():
        print(f"{name} is left out: {python} does not exist; --install makes it", file=sys.stderr)
        return []
    return [str(python.absolute()), str(HERE / f"{name}_server.py"), "--models", str(models), "--port"]


def bare_engines(models: Path, repository: Path, seconds: float) -> dict[str, float]:
    """Images/s of the bare ONNX Runtime session, and of the engine that Convoy chooses, at their best batch size."""
    command = [sys.executable, str(HERE / "session.py"), "--models", str(models), "--bare", str(seconds)]
    found = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
    bare = {f"{name}, ONNX Runtime": rate for name, rate in found.items()}
    for name in found:
        loops = [sys.executable, str(HERE.parent / "serving.py"), "--bare", str(repository / name)]
        done = subprocess.run(
            [*loops, "--seconds", str(seconds)], check=True, text=True, stdout=subprocess.PIPE, env=os.environ
        )
        bare[f"{name}, Convoy's engine"] = max(json.loads(done.stdout).values())
    return bare


def one_peer(
    name: str, command: list[str], wanted: list[Case], levels: list[int], seconds: int, round_: int
) -> list[Row]:
    """One peer's share of one round; a peer that fails says so and is left out of it."""
    rows = []
    with Server(name, command) as server:
        for case in wanted:
            try:
                rows += measure(server, case, levels, seconds, round_)
            except RuntimeError as error:
                print(f"{name}, {case.name}: {error}", file=sys.stderr)
    for row in rows:
        print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    return rows


def tables(rows: list[Row], bare: list[dict[str, float]]) -> str:
    """Markdown: a table a case, medians over the rounds; a number with * had errors."""
    lines = [f"{machine()}; one image a request; medians of {len(bare)} rounds", ""]
    others = statistics.mean(row.other_cores for row in rows)
    if others > QUIET_CORES:
        lines += [f"Other programs took {others:.2f} cores meanwhile: none of these figures is to be trusted.", ""]
    lines += [f"- bare {name}: {statistics.median(one[name] for one in bare):,.0f} images/s" for name in bare[0]]
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        levels = sorted({row.concurrency for row in of_case if not row.paced})
        heads = [f"{level} in flight" for level in levels]
        lines += ["", f"### {case}: requests/s", ""]
        lines.append(f"| server | {' | '.join(heads)} | p99 ms at {levels[0]} | p99 ms at 70 % load | server CPU ms |")
        lines.append("|---" * (len(levels) + 4) + "|")
        for peer in dict.fromkeys(row.peer for row in of_case):
            mine = [row for row in of_case if row.peer == peer]

            def middle(field: str, level: int, paced: bool = False, mine: list[Row] = mine) -> str:
                chosen = [r for r in mine if r.paced == paced and (paced or r.concurrency == level)]
                value = statistics.median(getattr(r, field) for r in chosen)
                errors = "*" if any(r.errors for r in chosen) else ""
                return f"{value:,.{0 if field == 'requests_per_s' else 2}f}{errors}"

            cells = [middle("requests_per_s", level) for level in levels]
            cells += [middle("p99_ms", levels[0]), middle("p99_ms", 0, True), middle("server_cpu_ms", levels[-1])]
            lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(rows: list[Row], bare: list[dict[str, float]]) -> None:
    """Writes everything beside the other results, with the machine's name."""
    name = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    file = Path(__file__).parent / "results" / f"peers-{name}.json"
    stated = {"machine": machine(), "bare": bare, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(stated, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
