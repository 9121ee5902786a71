"""Networks of the user's own, as far as they are only named: what "package.module:factory" is, and a program's file.

Imports no PyTorch; the user's module may.
"""

import difflib
import importlib
import os
import re
import sys
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path

from convoynet.exporter.archs.registry import Arch
from convoynet.exporter.errors import BadInput, reason

DEBUG = "CONVOY_DEBUG=1 shows where"
# What an exception of a network's code means, and the way out.
_WAYS_OUT = (
    (
        r"NVIDIA|CUDA|cuda",
        "its code names a device, as in x.cuda() or device='cuda': name none, or take x.device",
    ),
    (
        r"positional argument|keyword argument|missing \d+ required",
        "its forward must take the images alone: give other arguments defaults, or return a module that fills them in",
    ),
    (
        r"same dtype|expected scalar type|should be the same",
        "networks are exported in float32, and its code names another type, as in x.half(): take that out of forward",
    ),
    (
        r"Calling (eval|train)\(\) is not supported",
        "it is a program of torch.export: write it with torch.export.save, and give the file with --arch FILE.pt2",
    ),
)


def attribute(spec: str) -> object:
    """What "package.module:name" names; the current directory is searched first, as `python -m` does.

    Raises:
        BadInput: there is no such thing, its module raises, or it is no function.
    """
    module_name, _, path = spec.partition(":")
    if module_name.endswith(".py") or os.sep in module_name:
        file = Path(os.path.relpath(module_name))
        where = f" in {file.parent}" if ".." in file.parts else ""
        dotted = (file.name if where else str(file)).removesuffix(".py").replace(os.sep, ".")
        raise BadInput(f"--arch {spec}: name a module, not its file:{where} --arch {dotted}:{path}")
    if not module_name or not path:
        raise BadInput(f"--arch {spec}: must be package.module:factory")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with nothing_on_stdout():
            found: object = importlib.import_module(module_name)
    except SystemExit as error:
        raise BadInput(
            f"--arch {spec}: importing {module_name} ends the program ({told(error)}): what it does as a script, such "
            'as reading the command line, belongs under if __name__ == "__main__"'
        ) from error
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise BadInput(
                f"--arch {spec}: there is no module {missing} in {folder} or where Python looks (PYTHONPATH)"
            ) from error
        raise BadInput(f"--arch {spec}: importing {module_name} raised {told(error)} ({DEBUG})") from error
    for name in path.split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, dir(found), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise BadInput(f"--arch {spec}: {module_name} has no {path}{hint}")
        found = getattr(found, name)
    if not callable(found) and not isinstance(found, Arch):
        raise BadInput(f"--arch {spec}: is {article(found)}; it must be a function that returns a torch.nn.Module")
    return found


def require_program(path: Path, weights: str) -> None:
    """See that a program's file is there, and that nothing asks for other weights than it brings.

    Raises:
        BadInput: it is not there, or `weights` are not its own.
    """
    if weights != "default":
        raise BadInput(
            f"--weights {weights}: {path} brings its weights; leave the option out, or export the network "
            "itself with --arch package.module:factory"
        )
    if not path.is_file():
        raise BadInput(f"{path}: no such file; torch.export.save(program, FILE) writes one")


def nothing_on_stdout() -> AbstractContextManager[object]:
    """What the user's code prints goes to stderr: stdout may be report.json and nothing else."""
    return redirect_stdout(sys.stderr)


def article(thing: object) -> str:
    """What a thing is, for a message."""
    return "None" if thing is None else f"an object of type {type(thing).__name__}"


def told(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {reason(error)}"


def failed(what: str, error: BaseException, otherwise: str) -> BadInput:
    """What to raise where a network's code fails: `what`, why, and the way out, `otherwise` where none is known."""
    text = told(error)
    return BadInput(f"{what}: {text}; {way_out(text) or otherwise} ({DEBUG})")


def way_out(told: str) -> str:
    """What to do about an exception of a network's code; empty where nobody knows."""
    return next((words for pattern, words in _WAYS_OUT if re.search(pattern, told)), "")
