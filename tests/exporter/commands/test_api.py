"""`convoynet.export`: the flags as keywords, and a network that is in memory."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convoynet
from convoynet.exporter.commands import api, cli
from convoynet.exporter.recipe import Int8, LowRank
from tests.exporter.given_files import SIZE, Small, by_hand
from tests.exporter.onnx_runs import session_of


def options(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"model_repository": tmp_path / "models", "target": "cpu", "input_size": SIZE, "batch": (1, 4), **more}


def test_a_network_in_memory_is_published_and_stays_as_it_is(tmp_path: Path) -> None:
    network = Small().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    published = convoynet.export(network, **options(tmp_path))
    assert isinstance(published, convoynet.Published)
    assert (published.name, published.version) == ("Small", 1)
    assert published.path == tmp_path / "models" / "Small" / "1"
    assert published.report.weights["source"] == "as they were in memory"
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    images = np.random.default_rng(0).random((3, 3, SIZE, SIZE), np.float32)
    with torch.no_grad():
        wanted = network.eval()(torch.from_numpy(images)).numpy()
    (found,) = session_of(published.path / "model.onnx").run(None, {"input": images})
    np.testing.assert_allclose(found, wanted, 1e-4, 1e-5)


def test_an_onnx_file_and_steps(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "theirs.onnx")
    published = convoynet.export(path, steps=[Int8("minmax")], name="small", **options(tmp_path))
    assert (published.name, published.report.precision) == ("small", "int8")
    assert published.report.parity.reference.startswith("the given ONNX file")


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"int8": True, "max_drop": 0.1 + 0.2, "eval": "test"}, "--int8 --max-drop 0.30000000000000004 --eval test"),
        ({"mean": (-0.5, 0.25, 0), "std": [1, 0.5, 0.1]}, "--mean=-0.5,0.25,0 --std 1,0.5,0.1"),
        ({"input_size": (256, 320), "crop": 0.875}, "--input-size 256x320 --crop 0.875"),
        ({"batch": (1, 64), "fp8": False, "name": None}, "--batch 1:64"),
        ({"batch": [(1, 1, 1), "1:8:64"], "format": "tensorrt"}, "--batch 1:1:1 --batch 1:8:64 --format tensorrt"),
        ({"prune": 0.5, "distill": True, "finetune": Path("a")}, "--prune 0.5 --distill --finetune a"),
        ({"distill": "resnet56", "calibration": "-a"}, "--distill=resnet56 --calibration=-a"),
        ({"outputs": ("logits", "features=avgpool")}, "--outputs logits,features=avgpool"),
        ({"check_preprocessing": ("a.npy", Path("b.png"))}, "--check-preprocessing a.npy b.png"),
    ],
)
def test_keywords_are_the_flags(given: dict[str, Any], flags: str) -> None:
    arguments = vars(cli._export_parser().parse_args(["--arch", "resnet50", *flags.split()]))
    del arguments["json"]
    assert api.config_of(api._arguments("resnet50", given)) == api.config_of(arguments)


@pytest.mark.parametrize(
    ("network", "given", "line"),
    [
        (3, {}, "network is of the type int: give a torch.nn.Module, a name or a file"),
        ("lenet5", {"int9": True}, "export() has no option int9; did you mean int8?"),
        ("lenet5", {"model_repositry": "a"}, "export() has no option model_repositry; did you mean model_repository?"),
        ("lenet5", {"target": "tpu"}, "argument --target: invalid choice: 'tpu'"),
        ("lenet6", {}, "did you mean lenet5"),
        ("lenet5", {"int8": "yes"}, "int8 is True or False, not 'yes'"),
        ("lenet5", {"calibration": np.zeros((2, 1, 32, 32))}, "calibration is of the type ndarray: give what the flag"),
        ("lenet5", {"int8": True, "calibration": "a" * 300}, "cannot be read: File name too long"),
        ("lenet5", {"int8": True, "steps": [Int8()]}, "steps say what is done; drop int8 or them"),
        ("absent.onnx", {}, "--onnx absent.onnx: no such file"),
        ("absent.onnx", {"steps": [LowRank(0.5)]}, "step 1 (low-rank) needs the network in PyTorch"),
    ],
)
def test_what_is_wrong_is_one_error_in_one_line(network: Any, given: dict[str, Any], line: str) -> None:
    with pytest.raises(convoynet.ConvoyError) as told:
        convoynet.export(network, **given)
    assert line in str(told.value)
    assert "\n" not in str(told.value)


def test_the_docstring_names_flags_that_there_are() -> None:
    said = (api.export.__doc__ or "").partition("options:")[2].partition("Returns:")[0]
    named = re.findall(r"`(\w+)=", said)
    assert len(named) > 6
    for name in named:
        assert f"--{name.replace('_', '-')}" in cli._export_parser().format_help()
