"""The zoo: one module a paper or family, found by name through `get` and `names`, and imported when it is asked for.

Nothing here imports PyTorch before a network is described: names, and what a name alone decides, are recorded
(`facts`).
"""

from typing import TYPE_CHECKING, Any

from convoynet.exporter.archs.registry import Arch, Task, get, names, register

if TYPE_CHECKING:
    from convoynet.exporter.archs.counting import Count, count

__all__ = ["Arch", "Count", "Task", "count", "get", "names", "register"]


def __getattr__(name: str) -> Any:
    if name not in ("Count", "count"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from convoynet.exporter.archs import counting

    return getattr(counting, name)
