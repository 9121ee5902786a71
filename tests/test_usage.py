"""One style of usage error for all commands: one line, exit code 2, and what was probably meant."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version
from types import SimpleNamespace

import pytest

from convoynet.server import cli
from convoynet.usage import Parser, parser_of

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    entry.name: entry.load() for entry in entry_points(group="convoy.commands")
}
Texts = pytest.CaptureFixture[str]

WRONG = {
    "exprot": "unknown command 'exprot'; did you mean export? (see `convoy --help`)",
    "xyz": "unknown command 'xyz'; there are archs, audit, bench, build, compare, completion, explain, export, help",
    "--verison": "unknown flag '--verison'; did you mean --version?",
    "help serv": "unknown command 'serv'; did you mean serve?",
    "export --arhc lenet5": "unknown flag --arhc; did you mean --arch? (see `convoy export --help`)",
    "export --arch lenet5 --clibration=x": "unknown flag --clibration; did you mean --calibration?",
    "export --arch lenet5 --frmat onnx --int8": "unknown flag --frmat; did you mean --format?",
    "export --arch lenet5 --quantize": "unknown flag --quantize; did you mean --int8?",
    "export --model lenet5": "unknown flag --model; did you mean --arch?",
    "serve --port 8001": "unknown flag --port; did you mean --grpc-port?",
    "predict --model m --image cat.jpg": "unknown flag --image; IMAGE stands without a flag",
    "export --arch lenet5 --format onn": "'onn' (choose from",
    "export --arch lenet5 --seed one": "argument --seed: 'one' is not a whole number",
    "export --arch lenet5 more": "unexpected 'more'",
    "export lenet5 --int8": "--onnx is required; 'lenet5' stands without a flag before it",
    "bench lenet5": "the following arguments are required: --model; 'lenet5' stands without a flag before it",
    "predict --modle lenet5 cat.jpg": "unknown flag --modle; did you mean --model?",
    "predict cat.jpg": "the following arguments are required: --model",
    "predict --model m --top 0 cat.jpg": "argument --top: '0' is not a whole number from 1 on",
    "predict --model m --min-score 2 cat.jpg": "argument --min-score: '2' is not a number from 0 to 1",
    "predict --model m --timeout soon cat.jpg": "argument --timeout: 'soon' is not a number",
    "bench --model m --duration inf": "argument --duration: 'inf' is not a number of seconds above 0",
    "bench --model m --concurrency 1,,2": "argument --concurrency: '' is not a whole number from 1 on",
    "bench --model m --zzz": "unknown flag --zzz (see `convoy bench --help`)",
    "bench --model m -z": "unknown flag -z",
    "serve --model-repositry models": "unknown flag --model-repositry; did you mean --model-repository?",
    "serve --grpc-port x": "argument --grpc-port: 'x' is not a whole number",
    "serve --log-level inf": "did you mean info?",
    "token camera": "the following arguments are required: ROLES",
    "lint a b": "unexpected 'b'",
    "lint a --for tensorr": "did you mean tensorrt?",
    "inspect --json": "the following arguments are required: NAME|PATH",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_usage_error_is_one_line_that_says_what_was_meant(line: str, capsys: Texts) -> None:
    try:
        code = cli.main(line.split())
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    first = line.split(maxsplit=1)[0]
    assert err.startswith(f"convoy {first}: " if first in COMMANDS else "convoy: ")
    assert WRONG[line] in err


def test_every_command_has_the_one_parser() -> None:
    for name, command in COMMANDS.items():
        assert parser_of(command).prog == f"convoy {name}"


def test_help_of_a_command_is_the_same_in_both_ways(capsys: Texts) -> None:
    shown = []
    for line in ("help token", "token --help"):
        with pytest.raises(SystemExit):
            cli.main(line.split())
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""
    assert cli.main(["help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in [*COMMANDS, "completion"])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"convoy {version('convoynet')}\n"


def test_values_that_look_like_flags_are_values(capsys: Texts) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--number", type=float)
    parser.add_argument("--text")
    parser.add_argument("words", nargs="*")
    found = parser.parse_args(["--number", "-5", "--text=--strange", "--", "--word", "-w"])
    assert (found.number, found.text, found.words) == (-5, "--strange", ["--word", "-w"])
    assert parser.parse_args(["--num", "1"]).number == 1  # shortened


@pytest.mark.parametrize("loaded", [False, True])
def test_an_interrupt_is_one_line_while_a_command_is_imported_too(
    loaded: bool, capsys: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    entry = SimpleNamespace(name="predict", load=(lambda: interrupted) if loaded else interrupted)
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    assert cli.main(["predict", "--model", "m"]) == 130
    assert capsys.readouterr().err == "convoy predict: interrupted\n"


def test_what_grpc_logs_is_not_between_what_a_command_says() -> None:
    log_an_error = (
        "import socket, sys; from convoynet.server import cli; cli.main(['--version']); import grpc\n"
        "taken = socket.create_server(('127.0.0.1', 0))\n"
        "try: grpc.server(None).add_insecure_port(f'127.0.0.1:{taken.getsockname()[1]}')\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", log_an_error]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Failed to bind" in done.stdout
    assert done.stderr == ""
