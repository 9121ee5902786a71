"""`make test-docs`: what the documents have a reader type, typed, page after page.

Blocks of a page share a folder, in which its INPUTS lie, and are run in their order; `convoy serve` runs on, in a
terminal of its own, until the page's end or the next one. Servers have the ports that the pages name: no other may run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs import inputs
from tests.docs.documents import PAGES, ROOT, blocks
from tests.docs.reader import Reader, parts

INPUTS: dict[str, tuple[inputs.Input, ...]] = {
    "README.md": (inputs.photos, inputs.published("resnet101")),
    "deploy/load-balancing/README.md": (inputs.deploy,),
    "docs/adding-a-network.md": (inputs.photos, inputs.nets),
    "docs/auditing.md": (inputs.classes, inputs.trained("resnet20")),
    "docs/clients.md": (inputs.photos, inputs.models),
    "docs/compression.md": (inputs.classes, inputs.trained("resnet20"), inputs.recipes),
    "docs/exporting.md": (
        *(inputs.photos, inputs.published("resnet18"), inputs.pets, inputs.classes, inputs.trained("resnet20")),
        *(inputs.onnx_files, inputs.nets),
    ),
    "docs/gpu.md": (inputs.photos, inputs.published("resnet18")),
    "docs/http.md": (inputs.photos, inputs.models),
    "docs/inspecting.md": (
        *(inputs.onnx_files, inputs.photos, inputs.concepts),
        *(inputs.exported("resnet50"), inputs.published("resnet18")),
    ),
    "docs/linting.md": (inputs.onnx_files, inputs.exported("resnet50")),
    "docs/model-repository.md": (inputs.onnx_files,),
    "docs/operations.md": (inputs.models, inputs.deploy),
    "docs/preprocessing.md": (inputs.photos, inputs.nets),
    "docs/security.md": (inputs.photos, inputs.models, inputs.certificates),
    "docs/tensorrt.md": (inputs.onnx_files, inputs.exported("resnet101", "--format", "tensorrt")),
}
SERVED = ("docs/clients.md", "docs/http.md")
"""Pages that take a server for granted."""
TRIED = [page for page in PAGES if any(block.runs for block in blocks(page))]


def test_every_page_is_one_with_something_to_run() -> None:
    assert {*INPUTS, *SERVED} <= {str(page.relative_to(ROOT)) for page in TRIED}


def test_a_server_is_a_part_of_its_own() -> None:
    script = "a\nconvoy serve --print-config > b\nconvoy serve x \\\n  --y\nc \\\n  d\n"
    assert list(parts(script)) == [
        ("a\nconvoy serve --print-config > b\n", False),
        ("convoy serve x \\\n  --y\n", True),
        ("c \\\n  d\n", False),
    ]


@pytest.mark.docs
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", TRIED, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_can_be_typed(page: Path, tmp_path: Path) -> None:
    name = str(page.relative_to(ROOT))
    if name in ("docs/gpu.md", "docs/tensorrt.md"):
        pytest.importorskip("tensorrt_rtx", reason="builds engines, which takes TensorRT or TensorRT-RTX")
    if shutil.which("curl") is None and any("\ncurl " in f"\n{block.text}" for block in blocks(page) if block.runs):
        pytest.skip("curl is not installed")
    for make in INPUTS.get(name, ()):
        make(tmp_path)
    for block in blocks(page):
        if block.kind == "file" and not (tmp_path / block.note).exists():
            (tmp_path / block.note).write_text(block.text)
    with Reader(tmp_path, TORCH_HOME=str(inputs.downloads(tmp_path))) as reader:
        if name in SERVED:
            reader.serve("convoy serve --model-repository models", name)
        for block in blocks(page):
            if block.runs:
                reader.run(block)
    shutil.rmtree(tmp_path)  # networks of some hundred megabytes, where all went well
