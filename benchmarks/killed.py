"""Exports, replacements, sweeps and trainings that are killed (SIGKILL) at random moments, and run again.

    python benchmarks/killed.py                  200 of them
    python benchmarks/killed.py --kills 20       fewer
    python benchmarks/killed.py --only "a sweep" "a training"
                                                 of these kinds their share of them
    python benchmarks/killed.py --save           into benchmarks/results/killed.json

Each command first runs to its end and is timed. Then it is started again and again and killed: half of the times at any
moment, half of them in its last second, in which it publishes. After every kill the repository is compared with what it
held before: the same files, or the new version whole. Every tenth time the command is run to its end, in the folder
that the killed ones left: it has to publish, and to leave no trace of them. A sweep and a training go on where the
killed one stopped, and begin anew after one that ended. At the end the server loads every version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from convoy_server import convoy
from google.protobuf import text_format
from PIL import Image

from convoynet.exporter import assets
from convoynet.exporter.data.images import made_images
from convoynet.exporter.evidence import report
from convoynet.exporter.progress import Terminal
from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.client.client import Client

ROOT = Path(__file__).parents[1]
CONVOY = (sys.executable, "-m", "convoynet.server.cli")
LENET = ("--arch", "lenet5", "--weights", str(Path(assets.__file__).with_name("lenet5-digits.safetensors")))
# Seconds. A command is given so long to end; the last part of it publishes.
LIMIT, LAST = 900.0, 1.0
TRIES = 5
Files = dict[str, str]


@dataclass
class Kind:
    """A command, and what came of its runs.

    Attributes:
        name: what it shows.
        arguments: of `convoy`; {root} is a folder of its own.
        share: of all kills.
        adds: whether each run adds a version.
        models: that it makes.
        keeps: the folder from which it would take what an earlier run did that ended; {root} as above.
        seconds: that the last whole run took.
        kills: how many runs were killed.
        late: how many others had ended before.
        found: what was found after those that were killed.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    adds: bool = True
    models: int = 1
    keeps: str = ""
    seconds: float = 0.0
    kills: int = 0
    late: int = 0
    found: Counter[str] = field(default_factory=Counter)


KINDS = (
    Kind("another version", ("export", *LENET, "--int8", "--model-repository", "{root}/models"), 0.5),
    Kind(
        "the version replaced",
        ("export", *LENET, "--int8", "--version", "1", "--force", "--model-repository", "{root}/models"),
        0.3,
        adds=False,
    ),
    Kind(
        "a sweep",
        ("sweep", *LENET, "--calibration", "{root}/images", "--output", "{root}/sweep", "--model-repository",
         "{root}/models", "{root}/a.toml", "{root}/b.toml"),
        0.1,
        adds=False,
        models=2,
        keeps="{root}/sweep",
    ),
    Kind(
        "a training",
        ("export", *LENET, "--recipe", "{root}/trained.toml", "--finetune", "{root}/images", "--model-repository",
         "{root}/models"),
        0.1,
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, compare, print; the exit code is 1 where anything was lost or broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    names = [kind.name for kind in KINDS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="KIND", help=", ".join(names))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/killed.json")
    options = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if kind.name in options.only]
    chosen = random.Random(options.seed)
    served, progress = 0, Terminal()
    with tempfile.TemporaryDirectory(prefix="convoy-killed-") as name:
        for kind in kinds:
            root = Path(name) / kind.name.replace(" ", "-")
            _prepare(root)
            kind.seconds = _whole(kind, root)
            for number in progress.track(range(round(kind.share * options.kills)), kind.name):
                _kill(kind, root, chosen)
                if number % 10 == 9:
                    _whole(kind, root)
            _whole(kind, root)
            served += _served(root / "models")
    found = {
        "environment": report.environment(1),
        "seed": options.seed,
        "kinds": {
            kind.name: {
                "seconds": round(kind.seconds, 2),
                "killed": kind.kills,
                "ended_before": kind.late,
                **{what: kind.found[what] for what in ("as_before", "new_version", "broken", "lost", "left_behind")},
            }
            for kind in kinds
        },
        "models_served_at_the_end": served,
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if options.save:
        (ROOT / "benchmarks" / "results" / "killed.json").write_text(text, encoding="utf-8")
    if any(kind.found[what] for kind in kinds for what in ("broken", "lost", "left_behind")):
        raise SystemExit(1)


def _prepare(root: Path) -> None:
    (root / "models").mkdir(parents=True)
    for label in range(10):
        folder = root / "images" / str(label)
        folder.mkdir(parents=True)
        for number, image in enumerate(made_images(20, (32, 32), 1, label)):
            Image.fromarray(image.squeeze()).save(folder / f"{number}.png")
    (root / "a.toml").write_text('[[step]]\nstep = "int8"\n')
    # Of so small a network not much more can go.
    pruned = '[[step]]\nstep = "prune"\nratio = 0.1\n\n'
    (root / "b.toml").write_text(pruned + '[[step]]\nstep = "int8"\n')
    (root / "trained.toml").write_text(pruned + '[[step]]\nstep = "finetune"\nepochs = 3\n')


def _start(kind: Kind, root: Path) -> subprocess.Popen[bytes]:
    arguments = [argument.format(root=root) for argument in kind.arguments]
    with (root / "log").open("wb") as log:
        return subprocess.Popen([*CONVOY, *arguments], cwd=root, stdout=log, stderr=log, start_new_session=True)


def _forget(kind: Kind, root: Path) -> None:
    """Let the next run do its work again; what it published stays."""
    if kind.keeps:
        shutil.rmtree(kind.keeps.format(root=root))


def _whole(kind: Kind, root: Path) -> float:
    """Run to the end, which has to publish and to clear what others left; the seconds that it took."""
    before = _files(root / "models")
    began = time.monotonic()
    _require_success(kind, _start(kind, root).wait(LIMIT), root)
    seconds = time.monotonic() - began
    if (made := len({Path(name).parts[0] for name in _files(root / "models")})) != kind.models:
        raise SystemExit(f"{kind.name}: {made} models of {kind.models}: {(root / 'log').read_text()[-2000:]}")
    _judge(kind, before, _files(root / "models"), root)
    kind.found["left_behind"] += sum(path.name.startswith(".") for path in root.rglob("*"))
    _forget(kind, root)
    return seconds


def _require_success(kind: Kind, code: int, root: Path) -> None:
    if code:
        raise SystemExit(f"{kind.name}: exit code {code}: {(root / 'log').read_text()[-2000:]}")


def _kill(kind: Kind, root: Path, chosen: random.Random) -> None:
    """Start it and kill it; again where it had ended before, a few times."""
    for _ in range(TRIES):
        before = _files(root / "models")
        moment = chosen.uniform(0, kind.seconds) if chosen.random() < 0.5 else kind.seconds - chosen.uniform(0, LAST)
        process, began = _start(kind, root), time.monotonic()
        try:
            code = process.wait(max(moment, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT)
            kind.kills += 1
            kind.found[_judge(kind, before, _files(root / "models"), root)] += 1
            return
        # A machine is not always as fast: the moment is chosen by how long the last one took.
        kind.seconds = time.monotonic() - began
        kind.late += 1
        _require_success(kind, code, root)
        _judge(kind, before, _files(root / "models"), root)
        _forget(kind, root)


def _files(models: Path) -> Files:
    """What a server sees, and the SHA-256 of each file."""
    shown = [path for path in models.rglob("*") if path.is_file()]
    relative = {path.relative_to(models): path for path in shown}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(relative.items())
        if not name.parts[0].startswith(".")
    }


def _judge(kind: Kind, before: Files, after: Files, root: Path) -> str:
    """Compare two states of a repository, and count what is lost and broken."""
    if after == before:
        return "as_before"
    replaced = not kind.adds
    for name, digest in before.items():
        in_version = len(Path(name).parts) > 2
        if name not in after or (in_version and after[name] != digest and not replaced):
            kind.found["lost"] += 1
    for model in sorted({Path(name).parts[0] for name in after}):
        if not _is_whole(root / "models" / model):
            kind.found["broken"] += 1
    return "new_version"


def _is_whole(model: Path) -> bool:
    """Whether a model's files belong together, and are what the export meant to write."""
    try:
        text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())
        versions = sorted(int(path.name) for path in model.iterdir() if path.name.isdigit())
        for version in versions:
            folder = model / str(version)
            told = json.loads((folder / "report.json").read_text())
            content = (folder / "model.onnx").read_bytes()
            onnx.checker.check_model(onnx.load_model_from_string(content))
            if told["version"] != version or told["formats"][0]["sha256"] != hashlib.sha256(content).hexdigest():
                return False
        newest = (model / str(versions[-1]) / "report.json").read_bytes()
        return (model / "report.json").read_bytes() == newest
    except (OSError, ValueError, IndexError, KeyError, text_format.ParseError, onnx.checker.ValidationError) as error:
        print(f"{model}: {error}", file=sys.stderr)
        return False


def _served(models: Path) -> int:
    """Let the server load the newest version of every model, held against its report; how many those are."""
    with convoy(models, "--require-report") as address, Client(address.url) as client:
        return sum(client.model_ready(name) for name in client.models())


if __name__ == "__main__":
    main()
