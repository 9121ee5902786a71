"""Run by test_tensorrt_api.py in a process of its own, with libraries that stand in for TensorRT's.

python -m tests.exporter.tensorrt_api names              the API of the bindings, as JSON
python -m tests.exporter.tensorrt_api build ONNX CACHE   a build through them, as JSON
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

_ARGUMENT = re.compile(r"(\w+): ")


def names_of(module: Any) -> dict[str, dict[str, list[str]]]:
    """Classes of a TensorRT -> their members -> the ways to call it; "" for the module."""
    found = {"": {name: [] for name in dir(module) if not name.startswith("_")}}
    for name, kind in inspect.getmembers(module, inspect.isclass):
        members = {member: getattr(kind, member, None) for member in dir(kind)}
        found[name] = {
            member: _signature(member, value)
            for member, value in members.items()
            if not member.startswith("_") or member == "__init__"
        }
    return found


def _signature(name: str, value: Any) -> list[str]:
    """The arguments of a method, one text for each way to call it; of what is no method none."""
    lines = [] if isinstance(value, property) else (value.__doc__ or "").strip().splitlines()
    heads = [line for line in lines if re.match(rf"(\d+\. )?{name}\(", line.strip()) and "*args" not in line]
    return [", ".join(_ARGUMENT.findall(line.rpartition(" ->")[0])) for line in heads]


def main(argv: list[str]) -> None:
    import tensorrt_bindings

    if argv[0] == "names":
        print(json.dumps({"version": tensorrt_bindings.__version__, "names": names_of(tensorrt_bindings)}))
        return
    sys.modules["tensorrt"] = tensorrt_bindings

    from convoynet.exporter.engine_options import MIB, BuildOptions, Profile
    from convoynet.exporter.progress import Quiet
    from convoynet.exporter.tensorrt.build import build

    options = BuildOptions(
        (Profile(1, 2, 8), Profile(1, 1, 1)),
        optimization_level=1,
        workspace_bytes=1024 * MIB,
        timing_cache=Path(argv[2]),
        hardware_compatible=True,
        sparse_weights=True,
    )
    built = build(Path(argv[1]), options, Quiet())
    told = {"library": built.library, "version": built.version, "bytes": len(built.content), "notes": built.notes}
    print(json.dumps(told | {"compute_capability": built.compute_capability, "layers": len(built.layers)}))


if __name__ == "__main__":
    main(sys.argv[1:])
