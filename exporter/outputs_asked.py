"""What `--outputs` and `--task` ask for, checked before any work starts. Imports no heavy library."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Bf16, Fp8, Fp16, Int8, Step

# What outputs may mean, and what makes probabilities of them: of rows, and of what has places.
_ROWS = {"classification": "softmax", "labels": "sigmoid", "regression": "none", "embedding": "none"}
_PLACES = {"segmentation": "softmax", "detection": "none"}
TASKS: Mapping[str, str] = MappingProxyType(_ROWS | _PLACES)
WITHOUT_CLASSES = ("regression", "embedding")
# The name of the output that the task is about, and what stands for one that is not exported.
LOGITS, LEFT_OUT = "logits", "-"
# Where the evidence for a class lies in the last map of features, and the input that names another than the winner.
EXPLANATION, EXPLAIN_CLASS = "explanation", "explain_class"
WINNER = -1
# What the last layer with weights makes the scores of.
FEATURES = "features"
_OUTPUT = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})(=[A-Za-z0-9_.]+)?")
_TAKEN = ("input", "classes", EXPLANATION, EXPLAIN_CLASS)


def check(outputs: Sequence[str], task: str | None, evaluated: Path | None, steps: Sequence[Step]) -> None:
    """Look at the two options beside the others.

    Args:
        outputs: names, NAME=LAYER or LEFT_OUT, each; empty where nothing is asked.
        task: what the rows mean; None where nothing is said.
        evaluated: the folder of --eval.
        steps: of the compression.

    Raises:
        BadInput: naming the option, its value and what is allowed.
    """
    if task is not None and task not in TASKS:
        raise BadInput(f"--task {task!r} is not one of {', '.join(TASKS)}")
    if task not in (None, "classification") and evaluated is not None:
        raise BadInput(f"--eval {evaluated}: class folders say nothing about {task}; drop it or --task")
    if not outputs:
        return
    names = [one.partition("=")[0] for one in outputs if one != LEFT_OUT]
    for one in outputs:
        if one != LEFT_OUT and (not _OUTPUT.fullmatch(one) or one.partition("=")[0] in _TAKEN):
            raise BadInput(
                f"--outputs {one!r} is no name: letters, digits and _, or NAME=LAYER, or {LEFT_OUT}; "
                f"{', '.join(_TAKEN)} are taken"
            )
    asked = f"--outputs {','.join(outputs)}"
    if LOGITS not in names or len(set(names)) != len(names):
        raise BadInput(f"{asked}: each name once, and one of them {LOGITS}, the output that the task is about")
    # Training, pruning and what tries layers out look at the logits alone.
    plain = all(isinstance(step, Int8 | Fp8 | Fp16 | Bf16) for step in steps)
    if len(names) > 1 and not (
        plain and all(not isinstance(s, Int8) or not (s.qat_epochs or s.refines) for s in steps)
    ):
        raise BadInput(
            f"{asked}: steps that change or train the network look at the logits alone; with several outputs use "
            "--int8, --fp8, --fp16 or --bf16 by themselves"
        )


def require_suitable(name: str, its_task: str, outputs: Sequence[str], task: str | None) -> None:
    """See that the two options suit a network.

    Args:
        name: of the network.
        its_task: what its outputs mean: "classification", "segmentation" or "detection".
        outputs: as `check` has them.
        task: likewise.

    Raises:
        BadInput: naming the option and the network.
    """
    if its_task == "detection" and outputs:
        raise BadInput(f"--outputs {','.join(outputs)}: {name} is a detector, whose outputs are fixed")
    fits = task in _ROWS if its_task == "classification" else task == its_task
    if task is not None and not fits:
        raise BadInput(f"--task {task}: {name} is for {its_task}; drop it")


def check_added(task: str | None, outputs: Sequence[str], *, explain: bool, features: bool) -> None:
    """See that there are classes to explain, and that nothing else is called as what is added.

    Raises:
        BadInput: naming the flag and what it does not go with.
    """
    if features and FEATURES in {one.partition("=")[0] for one in outputs}:
        raise BadInput(f"--features adds an output {FEATURES!r}, and --outputs {','.join(outputs)} has one: drop one")
    if explain and task in WITHOUT_CLASSES:
        raise BadInput(f"--explain: an explanation is of a class, and --task {task} has none; drop one of the two")
