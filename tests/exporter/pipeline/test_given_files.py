"""`convoy export --onnx`: files of other exporters, published like networks, with themselves as the reference."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from convoynet.exporter.commands import cli, sweep_command
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.given_files import CLASSES, SIZE, by_hand, from_torch
from tests.exporter.graph.test_onnx_given import Fixed, of_the_file, quantized_file
from tests.exporter.onnx_runs import session_of

GIVEN = "the given ONNX file"


def one_at_a_time(path: Path) -> Path:
    return from_torch(path, Fixed(1), example=torch.rand(1, 3, SIZE, SIZE), dynamo=False)


KINDS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str, int]] = {
    "hub": (lambda path: by_hand(path, opset=8, weights_are_inputs=True), (), "fp32", 32),
    "nhwc": (lambda path: by_hand(path, layout="NHWC", batch=1), ("--int8", "--input", "uint8"), "int8", 32),
    "one": (one_at_a_time, (), "fp32", 1),
    "quantized": (quantized_file, (), "int8", 32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_published_and_everything_says_what_it_was_compared_with(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, flags, precision, largest = KINDS[kind]
    path = make(tmp_path / f"{kind}.onnx")
    root = tmp_path / "models"
    code = cli.export(["--onnx", str(path), "--model-repository", str(root), "--target", "cpu", *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    folder = root / kind
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.max_batch_size, list(config.output[0].dims)) == (largest, [CLASSES])
    report = json.loads((folder / "report.json").read_text())
    assert (report["precision"], report["arch"]) == (precision, f"{kind}.onnx")
    assert report["parity"]["reference"].startswith(GIVEN)
    assert report["speed"]["reference"] == "the given file in ONNX Runtime"
    assert report["parameters"]["before"] > 100
    assert config.parameters["precision"].string_value == precision
    assert report["macs"]["before"] > 1000 or kind == "one"
    # Nothing that a person reads speaks of a network in PyTorch, which there was not.
    assert GIVEN in said.out
    for text in (said.out + said.err, (folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert "PyTorch" not in text
    if precision == "fp32":
        images = np.random.default_rng(1).random((2, 3, SIZE, SIZE), np.float32)
        (wanted,) = of_the_file(path, images, 1 if kind == "one" else 2)
        session = session_of(folder / "1" / "model.onnx")
        for row, image in zip(wanted, images, strict=True):
            (logits,) = session.run(["logits"], {"input": image[None]})
            np.testing.assert_allclose(logits[0], row, 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--prune", "0.5"], r"step 1 \(prune\) needs the network in PyTorch, and .*odd.onnx is an ONNX file"),
        (["--low-rank", "0.5"], r"step 1 \(low-rank\) needs the network in PyTorch"),
        (["--int8", "--qat"], "--qat needs the network in PyTorch"),
        (["--weights", "random"], "--weights random needs the network in PyTorch"),
        (["--num-classes", "3"], "--num-classes needs the network in PyTorch"),
        (["--fully-convolutional"], "--fully-convolutional needs the network in PyTorch"),
        (["--arch", "lenet5"], "argument --arch: not allowed with argument --onnx"),
        (["--batch", "1:4:8", "--format", "onnx"], "--format tensorrt"),
        ([], r"--onnx .*odd.onnx: no such file"),
    ],
)
def test_what_a_file_cannot_have_is_said_in_one_line(
    flags: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.export(["--onnx", str(tmp_path / "odd.onnx"), *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said)
    assert "Traceback" not in said


@pytest.mark.parametrize("command", [cli.export, sweep_command.sweep])
def test_another_suffix(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--onnx", "theirs.bin"]) == 2
    assert "'theirs.bin' does not end in .onnx" in capsys.readouterr().err
