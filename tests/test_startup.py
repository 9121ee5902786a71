"""What needs no PyTorch is said without it: many commands in one process that cannot import it, as a user sees them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.onnx_models import write_colors

HEAVY = ("torch", "torchvision", "timm", "matplotlib", "jinja2", "onnxruntime", "openvino", "onnxscript", "safetensors")

RUN = """
import contextlib, io, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
from convoynet.server import cli

answers = []
for line in {lines!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(line.split())
        except SystemExit as stop:
            code = stop.code
    answers.append((code, out.getvalue(), err.getvalue()))
loaded = sorted({{name.partition(".")[0] for name in sys.modules}} & {{*{blocked!r}}})
assert not loaded, loaded
print(json.dumps(answers))
"""

SHOWN = {
    "--help": "Say what a runtime will refuse, misread or run badly in an ONNX model.",
    "archs": "wide_resnet50_2",
    "archs --json": '"task": "detection"',
    "archs --help": "--json",
    "bench --help": "--concurrency",
    "build --help": "--timing-cache",
    "compare --help": "--plot",
    "export --help": "--fully-convolutional",
    "inspect --help": "--fully-convolutional",
    "lint --help": "--for",
    "predict --help": "--min-score",
    "serve --help": "--model-repository",
    "sweep --help": "RECIPE.toml",
    "token --help": "--file",
    "token camera infer": "convoy_",
}
"""Command -> what stdout holds; the exit code is 0."""

REFUSED = {
    # names
    "export --arch resnet-101": "did you mean resnet101",
    "inspect lenet6": "did you mean lenet5",
    "compare lenet6": "'lenet6' is neither a folder of an exported model nor a network",
    "sweep --arch resnet-101 --calibration photos": "did you mean resnet101",
    "export --arch lenet5 --calibration photos --prune 0.5 --distill resnett20": "unknown architecture 'resnett20'",
    "export --arch absent:factory": "there is no module absent",
    "export --arch nets.py:small": "name a module, not its file: --arch nets:small",
    "export --arch ../nets.py:small": "name a module, not its file: in .. --arch nets:small",
    "export --arch light:smal": "light has no smal; did you mean small?",
    "inspect light:smal": "light has no smal; did you mean small?",
    # files that are not there, or not what they have to be
    "export --arch lenet5 --weights absent.pt": "--weights absent.pt: no such file",
    "export --arch lenet5 --labels absent.txt": "--labels absent.txt cannot be read: No such file",
    "export --arch lenet5 --labels empty.txt": "--labels empty.txt must have one class name on every line",
    "export --arch lenet5 --calibration absent": "--calibration absent: no such folder of images",
    "export --arch lenet5 --calibration empty": "--calibration empty: holds no image",
    "export --arch lenet5 --finetune absent": "--finetune absent: no such folder of images",
    "export --arch lenet5 --eval absent": "--eval absent: no such folder of images",
    "export --arch lenet5 --recipe absent.toml": "--recipe absent.toml cannot be read",
    "export --arch light:small --calibration absent": "--calibration absent: no such folder of images",
    "export --arch absent.pt2": "absent.pt2: no such file",
    "export --arch resnet20 --calibration photos --prune 0.5 --distill resnet56:absent.pt": "absent.pt: no such file",
    "export --arch lenet5 --model-repository models --name colors --version 1": "version 1 of colors exists in models",
    "export --arch lenet5 --name light.py --model-repository .": "light.py is a file, where the folder of the model",
    "sweep --arch lenet5 --calibration absent": "--calibration absent: no such folder of images",
    "sweep --arch lenet5 --calibration photos absent.toml": "--recipe absent.toml cannot be read",
    "compare lenet5 --eval absent": "--eval absent: no such folder of images",
    "compare lenet5 --plot absent/front.png": "there is no folder absent",
    "inspect absent.onnx": "absent.onnx: no such file or folder",
    "inspect absent.pt2": "absent.pt2: no such file",
    "inspect lenet5 --erf --images absent": "--images absent: no such folder of images",
    "inspect lenet5 --erf --images empty": "--images empty: holds no image",
    "inspect lenet5 --erf --html absent/page.html": "--html absent/page.html: there is no folder absent",
    "lint absent.onnx": "absent.onnx: no such file or folder",
    "build absent": "absent: no model's folder in a repository",
    "build absent.onnx --output a.plan --batch 1": "absent.onnx: no such file or folder",
    "predict --model m photos --url 127.0.0.1:1": "no server at 127.0.0.1:1",
    "bench --model m --url 127.0.0.1:1": "no server at 127.0.0.1:1",
    "build models/colors --timing-cache absent/c": "--timing-cache absent/c: there is no folder",
    "export --arch lenet5 --format tensorrt --timing-cache absent/c": "--timing-cache absent/c: there is no folder",
    "compare lenet5 --threads 0": "--threads 0 is not 1 or more",
    "serve --model-repository absent": "the model repository 'absent' is not a folder",
    # flags that do not go together
    "export --arch lenet5 --max-drop 1": "--max-drop 1 needs --eval DIR",
    "export --arch lenet5 --calibration-method minmax": "does nothing without --int8 or --fp8",
    "export --arch lenet5 --int8 --opset 18": "--int8 needs --opset 19 or more",
    "export --arch lenet5 --fp16 --target cpu": "--fp16 needs --target gpu",
    "export --arch lenet5 --labels two.txt --num-classes 3": "has 2 names and --num-classes is 3",
    "inspect lenet5 --images photos": "--images does nothing without --erf, --units, --concepts or --masks",
    "inspect lenet5 --units c3 --layer c3": "--layer does nothing without --concepts or --masks",
    "inspect lenet5 --masks photos --class 3": "--class does nothing without --concepts; add it or drop this",
    "inspect lenet5 --concepts photos": "--concepts photos needs pictures: add --images DIR",
    "inspect lenet5 --concepts photos --images photos": "photos/0.png: lies in no folder that has a concept's name",
    "inspect lenet5 --concepts absent --images photos": "absent: no such folder of images",
    "inspect lenet5 --concepts photos --images photos --runs 9": "--runs 9 is not 10 or more",
    "inspect lenet5 --masks absent --images photos --max-images 0": "--max-images 0 is not 1 or more",
    "inspect lenet5 --erf --most 3": "--most does nothing without --units",
    "inspect lenet5 --units c3": "--units c3 needs pictures: add --images DIR",
    "inspect lenet5 --units c3 --images photos --ablate -1": "--ablate -1 is not 0 or more",
    "inspect lenet5 --erf --fully-convolutional": "--fully-convolutional goes with the table alone",
    "inspect models/colors --erf --weights random": "has its weights; leave the option out",
    "export --arch light.pt2 --weights random": "light.pt2 brings its weights",
    "token camera nothing": "nothing",
    # what a name alone decides
    "export --arch vgg16-c": "vgg16-c has no published weights",
    "export --arch resnet50 --num-classes 5": "published weights know 1000 classes, and 5 are asked for",
    "export --arch resnet50 --labels two.txt": "published weights know 1000 classes, and 2 are asked for",
    "export --arch lenet5 --num-classes 5": "lenet5 with 5 classes: its output codes are pictures of the ten digits",
    "inspect lenet5 --num-classes 5": "lenet5 with 5 classes",
    "inspect vgg16-c --erf": "vgg16-c has no published weights",
    "export --arch lenet5 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5": "--mean has 3 numbers, and lenet5 takes 1 channels",
    "export --arch fcn_resnet50 --eval photos": "class folders say nothing about segmentation; fcn",
    "export --arch vgg16 --fully-convolutional --eval photos": "class folders say nothing about segmentation",
    "export --arch fcn_resnet50 --fully-convolutional": "--fully-convolutional is for classification networks",
    "export --arch fasterrcnn_resnet101_fpn --weights random --prune 0.5": "step 1 (prune): detectors",
    "export --arch fasterrcnn_resnet101_fpn --weights random --int8 --qat": "--qat: detectors are not trained",
    "export --arch resnet20 --finetune photos --distill resnet50": "published weights know 1000 classes",
    "export --arch resnet20 --finetune photos --distill lenet5": "takes images of 1 channels, and the network of 3",
    "export --arch resnet20 --finetune photos --distill vgg16-cifar": "there are no published weights of it",
    "export --arch resnet20 --finetune photos --distill fasterrcnn_resnet101_fpn": "is a detector",
    "compare fcn_resnet50": "segmentation is not compared here",
    "sweep --arch vgg16-c --calibration photos": "vgg16-c has no published weights",
}
"""Command -> what its one line on stderr holds; the exit code is 2."""


def answers(lines: list[str], folder: Path, blocked: tuple[str, ...]) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, all run in one process that cannot import what is blocked."""
    code = RUN.format(blocked=blocked, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return {line: (answer[0], answer[1], answer[2]) for line, answer in zip(lines, found, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the commands run in."""
    root = tmp_path_factory.mktemp("startup")
    (root / "photos").mkdir()
    for index in range(2):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "photos" / f"{index}.png")
    (root / "empty").mkdir()
    (root / "empty.txt").write_text("")
    (root / "two.txt").write_text("a\nb\n")
    (root / "light.py").write_text("def small():\n    raise AssertionError\n")
    (root / "light.pt2").write_text("")
    write_colors(root / "models")
    return root


@pytest.fixture(scope="module")
def answered(folder: Path) -> dict[str, tuple[int, str, str]]:
    return answers([*SHOWN, *REFUSED], folder, (*HEAVY, "onnx"))


@pytest.mark.parametrize("line", SHOWN)
def test_what_is_only_shown_needs_no_heavy_library(line: str, answered: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = answered[line]
    assert code == 0, err
    assert SHOWN[line] in out


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_is_one_line_without_a_heavy_library(
    line: str, answered: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = answered[line]
    assert (code, out) == (2, "")
    assert err.startswith(f"convoy {line.split(maxsplit=1)[0]}: ")
    assert err.count("\n") == 1, err
    assert REFUSED[line] in err


def test_an_onnx_file_is_linted_and_inspected_without_pytorch(folder: Path) -> None:
    lines = ["lint models/colors", "inspect models/colors"]
    found = answers(lines, folder, HEAVY)
    assert [code for code, _, _ in found.values()] == [0, 0], found
    assert "model.onnx for ONNX Runtime" in found[lines[0]][1]
    assert "multiply-adds" in found[lines[1]][1]


def test_what_needs_pytorch_says_so_where_it_is_missing(folder: Path) -> None:
    lines = ["export --arch lenet5", "inspect lenet5", "compare lenet5", "sweep --arch lenet5 --calibration photos"]
    for line, (code, _, err) in answers(lines, folder, HEAVY).items():
        assert code == 4, err
        assert err.startswith(f"convoy {line.split()[0]}: "), err
        assert err.endswith("is missing or does not load; pip install 'convoynet[export,cpu]' brings it\n")


ONE_FAMILY = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "timm", "matplotlib", "openvino"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
from convoynet.exporter.archs import custom
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.pipeline import pipeline

for name in ("lenet5", "resnet20", "vgg16-cifar", "drn_d_22"):
    arch = custom.resolve(ExportConfig(name))
    arch.build(arch.num_classes)
own = custom.resolve(ExportConfig("nets:small", input_size=(16, 16)))
assert own.num_classes == 4
families = {name.rpartition(".")[2] for name in sys.modules if name.startswith("convoynet.exporter.archs.")}
assert not families & {"detection", "densenet", "inception", "segmentation", "program"}, families
"""
NETS = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_an_export_imports_the_family_of_its_network_alone(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    done = subprocess.run([sys.executable, "-c", ONE_FAMILY], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
