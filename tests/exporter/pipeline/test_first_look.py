"""What a network's name alone decides is said before PyTorch is imported and before any image is read."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from convoynet.exporter import archs

# Fields of an ExportConfig, with the steps of a recipe as they are written; and what is said.
REFUSED = [
    ({"arch": "unet"}, "unet has no published weights: give your own with --weights FILE"),
    ({"arch": "zfnet"}, "zfnet has no published weights"),
    ({"arch": "fcn_resnet50", "num_classes": 3}, "published weights know 21 classes, and 3 are asked for"),
    ({"arch": "lenet5", "num_classes": 3}, "lenet5 with 3 classes: its output codes are pictures"),
    ({"arch": "fasterrcnn_resnet101_fpn", "weights": "random", "num_classes": 1}, "1 class: .* needs 2 or more"),
    ({"arch": "mine:boxes", "task": "detection", "num_classes": 1}, "1 class: mine:boxes needs 2 or more"),
    ({"arch": "fcn_resnet50", "eval": "photos"}, "class folders say nothing about segmentation"),
    ({"arch": "fcn_resnet50", "task": "embedding"}, "--task embedding: fcn_resnet50 is for segmentation; drop"),
    ({"arch": "resnet18", "task": "segmentation"}, "--task segmentation: resnet18 is for classification; drop it"),
    ({"arch": "fasterrcnn_resnet101_fpn", "weights": "random", "task": "labels"}, "is for detection; drop it"),
    ({"arch": "fasterrcnn_resnet101_fpn", "weights": "random", "outputs": ["logits", "x=rpn"]}, "outputs are fixed"),
    ({"arch": "fcn8s_vgg16", "weights": "random", "resize": 300}, "--resize: fcn8s_vgg16 takes the whole image"),
    ({"arch": "unet", "weights": "random", "crop": 0.9}, "--crop: unet takes the whole image"),
    ({"arch": "unet", "weights": "random", "channel_order": "bgr"}, "--channel-order bgr: unet takes grey images"),
    ({"arch": "unet", "weights": "random", "mean": [0.5] * 3, "std": [0.5] * 3}, "unet takes 1 channels"),
    ({"arch": "fcn_resnet50", "fully_convolutional": True}, "is for classification networks"),
    (
        {"arch": "fcn_resnet50", "finetune": "photos", "steps": [{"step": "finetune", "distill": False}]},
        "step 1 .finetune. without distillation needs labels, and class folders say nothing about segmentation",
    ),
    (
        {"arch": "fasterrcnn_resnet101_fpn", "weights": "random", "steps": [{"step": "prune", "ratio": 0.5}]},
        "step 1 .prune.: detectors are not compressed so",
    ),
]  # fmt: skip
CODE = """
import json, sys
from pathlib import Path
sys.modules["torch"] = sys.modules["onnx"] = None
from convoynet.exporter import recipe
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data import images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline import first_look

def opened(*args, **kwargs):
    raise AssertionError("an image was opened")

images.Image.open = opened
said = []
for fields in json.load(sys.stdin):
    for key, value in fields.items():
        if isinstance(value, list):
            fields[key] = recipe.from_dicts(value, "test") if key == "steps" else tuple(value)
        if key in ("eval", "finetune"):
            fields[key] = Path(value)
    try:
        first_look.check(ExportConfig(**fields, repository=Path("models")))
        said.append("nothing")
    except BadInput as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("look")
    (folder / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "photos" / "cat" / "1.png")
    given = json.dumps([fields for fields, _ in REFUSED])
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=given, capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[f"{n} {f['arch']}" for n, (f, _) in enumerate(REFUSED)])
def test_a_name_decides_without_pytorch(index: int, said: list[str]) -> None:
    assert re.search(REFUSED[index][1], said[index]), said[index]


@pytest.mark.parametrize("name", archs.names())
def test_what_is_no_classifier_takes_the_whole_image(name: str) -> None:
    """As the first look supposes, which knows the task and not the preprocessing."""
    arch = archs.get(name)
    preprocess = arch.preprocess
    whole = preprocess.fit == "pad" or preprocess.resize == preprocess.size
    assert whole or arch.task == "classification"
    assert preprocess.fit == "crop" or arch.task != "classification"
