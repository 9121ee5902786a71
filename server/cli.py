"""The command `convoy`: finds its subcommands and hands over to them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path

Command = Callable[[Sequence[str]], int]
_INTERRUPTED = 130
_OWN = {"completion": "Print a script that has bash or zsh complete commands and flags.", "help": ""}
"""The commands of this module, with what the help says of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `convoy COMMAND ...`. Commands are the entry points of the group `convoy.commands`."""
    # What fails is said by the commands. gRPC logs it on stderr too, in a form of its own, and now and then an error of
    # its poller while a channel is closed; read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {e.name: e for e in entry_points(group="convoy.commands")}
    if arguments[:1] == ["help"]:  # `convoy help export` is `convoy export --help`
        arguments = [*arguments[1:2], "--help"]
    if arguments and arguments[0] in commands:
        try:
            command: Command = commands[arguments[0]].load()
            return command(arguments[1:])
        except KeyboardInterrupt:  # before a command is there, or of one that has nothing more to say
            sys.stderr.write(f"convoy {arguments[0]}: interrupted\n")
            return _INTERRUPTED
    if arguments[:1] == ["completion"]:
        return _completion(commands, arguments[1:])
    if arguments in ([], ["-h"], ["--help"]):
        sys.stdout.write(_help(commands))
        return 0 if arguments else 2
    if arguments == ["--version"]:
        sys.stdout.write(f"convoy {version('convoynet')}\n")
        return 0
    from convoynet.usage import meant

    known = [*commands, *_OWN, "--help", "--version"]
    near = meant(arguments[0], known) or f"; there are {', '.join(sorted([*commands, *_OWN]))}"
    kind = "flag" if arguments[0].startswith("-") else "command"
    sys.stderr.write(f"convoy: unknown {kind} '{arguments[0]}'{near} (see `convoy --help`)\n")
    return 2


def _completion(commands: dict[str, EntryPoint], arguments: Sequence[str]) -> int:
    from convoynet.completion import completion, parser

    parser().parse_args(arguments)  # before the second that it takes to load all commands
    sys.stdout.write(completion({name: entry.load() for name, entry in commands.items()}, arguments))
    return 0


def _help(commands: dict[str, EntryPoint]) -> str:
    lines = [
        "usage: convoy COMMAND ...",
        "",
        "From a PyTorch ConvNet to a served, measured, compressed model.",
        "",
    ]
    told = _OWN | {name: _docstring(entry).strip().splitlines()[0] for name, entry in commands.items()}
    lines += [f"  {name:<12}{summary}" for name, summary in sorted(told.items()) if summary]
    last = "`convoy COMMAND --help` or `convoy help COMMAND` teaches each; `convoy --version` prints the version."
    return "\n".join([*lines, "", last, ""])


def _docstring(command: EntryPoint) -> str:
    """A command's docstring, read in its source where that has it: to import all commands takes a second."""
    spec = find_spec(command.module)
    file = Path(spec.origin or "") if spec is not None else Path()
    source = file.read_bytes() if file.suffix == ".py" and file.is_file() else b""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == command.attr and (found := ast.get_docstring(node)):
            return found
    return command.load().__doc__ or command.value


if __name__ == "__main__":
    sys.exit(main())
