"""`convoy completion`: what a shell completes after `convoy`, as a script made from the parsers of the commands."""

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

from convoynet.usage import Parser, parser_of

Command = Callable[[Sequence[str]], int]
SHELLS = ("bash", "zsh")
_EXAMPLES = """\
examples:
  eval "$(convoy completion bash)"
      in ~/.bashrc; for zsh the same with zsh, in ~/.zshrc behind compinit
  convoy completion bash > ~/.local/share/bash-completion/completions/convoy
      once, and again after an update: shells start faster
"""
_SCRIPT = """\
_convoy() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "$command $before" in
{values}
        *)
            case "$command" in
{flags}
            esac
            ;;
        esac
    fi
    # Where nothing of the command's own fits, the shell completes names of files.
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o bashdefault -o default -F _convoy convoy
"""


def completion(commands: Mapping[str, Command], argv: Sequence[str]) -> str:
    """The script that `convoy completion` prints.

    Args:
        commands: all of them by name.
        argv: the shell.
    """
    shell = parser().parse_args(argv).shell
    networks = _networks(commands)
    # What may follow a word -> the words behind which it may: most flags take what is not known here.
    values: dict[str, list[str]] = {_words(SHELLS): ["completion completion"], _words(sorted(commands)): ["help help"]}
    flags = []
    for name, command in sorted(commands.items()):
        own = [action for action in parser_of(command)._actions if action.help != argparse.SUPPRESS]
        for action in own:
            if action.option_strings and action.nargs != 0:
                spelled = [f"{name} {flag}" for flag in action.option_strings]
                values.setdefault(_words(_known(action, networks)), []).extend(spelled)
        places = [word for action in own if not action.option_strings for word in _known(action, networks)]
        named = [flag for action in own for flag in action.option_strings]
        flags.append(f'{name}) case "$current" in -*) words={_words(named)} ;; *) words={_words(places)} ;; esac ;;')
    script = _SCRIPT.format(
        commands=_words([*sorted(commands), "completion", "help", "--help", "--version"]),
        values="\n".join(f"        {'|'.join(map(shlex.quote, k))}) words={words} ;;" for words, k in values.items()),
        flags="\n".join(f"            {line}" for line in flags),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def parser() -> Parser:
    """What `convoy completion` parses."""
    made = Parser(
        prog="convoy completion",
        description="Print a script for the shell that completes commands, flags, their values and names of networks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("shell", choices=SHELLS, help=" or ".join(SHELLS))
    return made


def _known(action: argparse.Action, networks: Sequence[str]) -> Sequence[str]:
    """What may stand there, as far as that is known without looking at files."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return networks if "NAME|" in str(action.metavar) else ()


def _networks(commands: Mapping[str, Command]) -> list[str]:
    """The names that `convoy archs` lists; none where the exporter is missing."""
    if "archs" not in commands:
        return []
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = commands["archs"](["--json"])
    return [network["name"] for network in json.loads(out.getvalue())] if code == 0 else []


def _words(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))
