"""Checkpoints as people have them, into one small network."""

import argparse
import collections
import json
import re
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput

Tensors = dict[str, Tensor]
IMAGES = made_images(2, (32, 32), 3, 0)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))


def load(network: nn.Module, file: Path, *, ema: bool = False) -> weights.Weights:
    arch = replace(archs.get("resnet20"), name="small", training_only=())
    return weights.load(network, arch, str(file), seed=0, images=IMAGES, ema=ema)


def same(network: nn.Module, tensors: Tensors) -> bool:
    found = network.state_dict()
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def under(prefix: str) -> Callable[[Tensors], Any]:
    return lambda tensors: {"state_dict": {prefix + name: tensor for name, tensor in tensors.items()}, "epoch": 3}


def with_others(tensors: Tensors) -> Any:
    return {"state_dict": {"criterion.weight": torch.ones(2), **under("model.")(tensors)["state_dict"]}}


def with_teacher(tensors: Tensors) -> Any:
    teacher = {f"teacher.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return teacher | under("student.")(tensors)["state_dict"]


def compiled_inside(tensors: Tensors) -> Any:
    return {f"net.{name.replace('.', '._orig_mod.', 1)}": tensor for name, tensor in tensors.items()}


def pruned(tensors: Tensors) -> Any:
    network = net()
    network.load_state_dict(tensors)
    prune.identity(network[0], "weight")
    return network.state_dict()


def counted(tensors: Tensors) -> Any:
    return {"n_averaged": torch.tensor(7), **{f"module.{name}": tensor for name, tensor in tensors.items()}}


def flat_ema(tensors: Tensors) -> Any:
    return {**tensors, **{f"model_ema.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}}


def with_extra_state(tensors: Tensors) -> Any:
    return {**tensors, "0._extra_state": {"scale": 2}}


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (under("module."), ""),
        (under("module.module."), ""),
        (under("_orig_mod.module."), ""),
        (under("model."), "'model.' was taken off"),
        (under("backbone.module."), "'backbone.' was taken off|'backbone.module.' was taken off"),
        (under("_fsdp_wrapped_module."), ""),
        (with_others, "'model.' was taken off.*1 tensor outside of it left out .criterion.weight."),
        (with_teacher, "'student.' was taken off.*left out|teacher.*--ema takes them"),
        (compiled_inside, "'net.' was taken off"),
        (pruned, "masks of torch.nn.utils.prune were applied to 1 tensor"),
        (counted, "n_averaged of the weights was left out"),
        (with_extra_state, "0._extra_state of the weights was left out"),
        (flat_ema, "those of the rest; the averaged ones .EMA. of model_ema. were left aside"),
        (lambda tensors: {"checkpoint": {"state_dict": tensors}}, "the weights are those of checkpoint"),
        (lambda tensors: {"generator": tensors, "optimizer": {"state": {}}}, "the weights are those of generator"),
    ],
)
def test_wrapped_weights_are_found_and_what_was_done_is_told(
    wrap: Callable[[Tensors], Any], note: str, tmp_path: Path
) -> None:
    tensors = net(1).state_dict()
    torch.save(wrap(tensors), tmp_path / "net.ckpt")
    network = net(2)
    loaded = load(network, tmp_path / "net.ckpt")
    assert same(network, dict(tensors))
    if note:
        assert re.search(note, " | ".join(loaded.notes))
    else:
        assert loaded.notes == ()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda raw, averaged: {"state_dict": raw, "state_dict_ema": averaged, "epoch": 1},
        lambda raw, averaged: {"model": raw, "model_ema": {f"module.{k}": v for k, v in averaged.items()}},
        lambda raw, averaged: under("net.")(raw)["state_dict"] | under("model_ema.")(averaged)["state_dict"],
        lambda raw, averaged: raw | under("ema.")(averaged)["state_dict"],
        lambda raw, averaged: {"student": raw, "teacher": averaged},
    ],
)
def test_averaged_weights_are_a_choice(wrapped: Callable[[Tensors, Tensors], Any], tmp_path: Path) -> None:
    raw, averaged = (dict(net(seed).state_dict()) for seed in (1, 2))
    torch.save(wrapped(raw, averaged), tmp_path / "net.pth")
    network = net(3)
    told = " ".join(load(network, tmp_path / "net.pth").notes)
    assert same(network, raw)
    assert "left aside, --ema takes them" in told
    told = " ".join(load(network, tmp_path / "net.pth", ema=True).notes)
    assert same(network, averaged)
    assert "by --ema" in told


def test_averaged_weights_alone(tmp_path: Path) -> None:
    averaged = dict(net(1).state_dict())
    torch.save({"model_ema": averaged}, tmp_path / "net.pth")
    network = net(3)
    assert "beside which there are no others" in load(network, tmp_path / "net.pth").notes[0]
    assert same(network, averaged)
    for plain in (averaged, {"checkpoint": averaged}, {"state_dict": averaged, "args": argparse.Namespace()}):
        torch.save(plain, tmp_path / "plain.pth")
        with pytest.raises(BadInput, match="--ema is given, and the file holds no averaged weights"):
            load(network, tmp_path / "plain.pth", ema=True)
    for spec in ("default", "random"):
        with pytest.raises(BadInput, match=f"--ema chooses among the weights of a file, and --weights is {spec}"):
            ExportConfig("resnet18", weights=spec, ema=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("metadata", [True, False])
def test_tied_tensors_of_safetensors(tmp_path: Path, metadata: bool) -> None:
    torch.manual_seed(1)
    saved, file = Tied(), tmp_path / "tied.safetensors"
    if metadata:
        save_model(saved, str(file))
    else:
        save_file({name: t.clone() for name, t in saved.state_dict().items() if name != "two.weight"}, file)
    network = Tied()
    assert "two.weight is one.weight, to which it is tied" in load(network, file).notes[0]
    assert same(network, dict(saved.state_dict()))


def test_what_load_state_dict_takes_is_taken(tmp_path: Path) -> None:
    """PyTorch's own hook reads weight_g and weight_v for the newer weight norm; also behind a prefix."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what old checkpoints were made with
        old = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)))
    for name, state in (("a.pt", old.state_dict()), ("b.pt", under("net.")(dict(old.state_dict())))):
        torch.save(state, tmp_path / name)
        network = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
        load(network, tmp_path / name)
        assert torch.equal(network[0].parametrizations.weight.original1, old[0].weight_v)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_numbers_become_float32_and_that_is_told(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {n: t.to(kind) if t.is_floating_point() else t for n, t in net(1).state_dict().items()}
    torch.save(tensors, tmp_path / "net.pt")
    network = net(2)
    loaded = load(network, tmp_path / "net.pt")
    assert torch.equal(network[0].weight, tensors["0.weight"].float())
    assert loaded.notes == (f"the weights' {str(kind).removeprefix('torch.')} numbers became float32",)


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to drop them; old files have them
        return torch.quantize_per_tensor(torch.zeros(2, 3600), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(2, 3600, device="meta"), "is on the meta device"),
        (torch.zeros(2, 3600).to_sparse(), "is sparse|holds pickled code"),
        (quantized(), "quantized"),
        (torch.zeros(2, 3600, dtype=torch.complex64), "is torch.complex64"),
        (torch.full((2, 3600), torch.inf), "holds NaN or infinite"),
    ],
)
def test_tensors_without_plain_numbers_end_in_one_line(tmp_path: Path, tensor: Tensor, words: str) -> None:
    torch.save({**net(1).state_dict(), "4.weight": tensor}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=words) as caught:
        load(net(2), tmp_path / "net.pt")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_mask_of_minus_infinity_is_a_constant(tmp_path: Path) -> None:
    network = net()
    network.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    load(network, tmp_path / "net.pt")
    network[1].running_var.fill_(torch.inf)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"1\.running_var holds NaN or infinite"):
        load(network, tmp_path / "net.pt")


def test_two_networks_that_fit_are_named(tmp_path: Path) -> None:
    tensors = dict(net(1).state_dict())
    torch.save(under("a.")(tensors)["state_dict"] | under("b.")(tensors)["state_dict"], tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"'a\.' and 'b\.' both hold weights that fit"):
        load(net(2), tmp_path / "net.pt")


def test_the_tensors_of_a_file_for_scripts(tmp_path: Path) -> None:
    network = net()
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}, tmp_path / "a.pt"
    )
    assert same(network, weights.state_dict_from_file(tmp_path / "a.pt"))


class Mapping(dict[str, int]):
    pass


class Kept:
    def __init__(self) -> None:
        self.value = 1


@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_keep_beside_the_weights_stays_unread(tmp_path: Path, zipped: bool) -> None:
    """timm's and torchvision's checkpoints hold argparse.Namespace, many others a number of NumPy's."""
    tensors = dict(net(1).state_dict())
    beside = {
        "args": argparse.Namespace(lr=0.1, output=tmp_path),
        "metric": np.float64(0.7),
        "history": np.arange(3.0),
        "scores": collections.defaultdict(list, a=[1]),
        "options": Mapping(a=1),
        "callback": Kept(),
        "more": types.SimpleNamespace(a=Kept()),
    }
    file = tmp_path / "net.pth.tar"
    torch.save({"state_dict": tensors, "epoch": 3, **beside}, file, _use_new_zipfile_serialization=zipped)
    network = net(2)
    (note,) = load(network, file).notes
    assert same(network, tensors)
    for name in ("argparse.Namespace", "numpy", "collections.defaultdict", "Mapping", "Kept", "SimpleNamespace"):
        assert name in note


class Around(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.backbone = net(seed)


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_a_network_that_wraps_the_one_that_was_saved(tmp_path: Path, prefix: str) -> None:
    torch.save(under(prefix)(dict(net(1).state_dict())), tmp_path / "net.pt")
    network = Around(2)
    assert "'backbone.', as the network has it, was put before" in load(network, tmp_path / "net.pt").notes[0]
    assert same(network.backbone, dict(net(1).state_dict()))


def test_files_are_told_by_their_content_and_parts_are_joined(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in net(1).state_dict().items()}
    save_file(tensors, tmp_path / "net.bin")
    torch.save(tensors, tmp_path / "net.safetensors")
    names = list(tensors)
    for number, some in enumerate((names[:3], names[3:])):
        save_file({name: tensors[name] for name in some}, tmp_path / f"{number}.safetensors")
    parts = {name: f"{int(name not in names[:3])}.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    for file in ("net.bin", "net.safetensors", "model.safetensors.index.json"):
        network = net(2)
        load(network, tmp_path / file)
        assert same(network, tensors), file


def write(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def numpy_archive(file: Path) -> None:
    np.savez(file.with_suffix(".npz"), a=np.zeros(2))
    file.with_suffix(".npz").rename(file)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (write(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS.*git lfs pull"),
        (write(b"\n<!DOCTYPE html>"), "is a web page"),
        (write(b"\x1f\x8b\x08"), "is compressed with gzip"),
        (Path.mkdir, "is a folder"),
        (numpy_archive, "holds NumPy arrays"),
        (lambda file: torch.save(net(), file), r"pickled code \(torch\.nn\.modules\.container\.Sequential\)"),
        (lambda file: torch.save({"ema": net(), "epoch": 1}, file), r"pickled code \(torch\.nn"),
        (lambda file: torch.save({"a": np.zeros(2)}, file), "pickled code .numpy"),
        (lambda file: torch.save(net().state_dict(), file, pickle_protocol=4), "pickle of another form"),
        (lambda file: torch.save(nn.Sequential(nn.LazyLinear(2)).state_dict(), file), "lazy layers"),
        (
            lambda file: torch.save({"a": net().state_dict(), "b": net().state_dict()}, file),
            r"several networks \(a, b\)",
        ),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "net.pt")
    with pytest.raises(BadInput, match=words) as caught:
        load(net(), tmp_path / "net.pt")
    assert "\n" not in str(caught.value)


def test_integers_in_the_place_of_weights_are_told(tmp_path: Path) -> None:
    torch.save({**net(1).state_dict(), "0.bias": torch.ones(4, dtype=torch.int8)}, tmp_path / "net.pt")
    assert load(net(), tmp_path / "net.pt").notes == ("the weights' int8 numbers became float32",)
