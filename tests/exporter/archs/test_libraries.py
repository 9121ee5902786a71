"""Networks by the names of timm and torchvision: which there are, a slip, what their configuration gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from convoynet.exporter.archs import custom, from_timm, libraries
from convoynet.exporter.archs.datasets import imagenet_labels
from convoynet.exporter.commands import cli
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput


def test_the_names_are_those_that_the_libraries_register() -> None:
    assert set(libraries.known("timm")) == set(timm.list_models())
    assert set(libraries.known("torchvision")) == set(torchvision.models.list_models(module=torchvision.models))


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("timm:resnet5", "did you mean timm:resnet50"),
        ("timm:mobilenetv4_conv_smal.e1", "did you mean timm:mobilenetv4_conv_small"),
        ("torchvision:convnext_tinny", "did you mean torchvision:convnext_tiny"),
        ("torchvision:maskrcnn_resnet50_fpn", "torchvision has no network 'maskrcnn_resnet50_fpn'"),
        ("torchvision:fcn_resnet50", "torchvision:NAME is for classifiers; use --arch fcn_resnet50"),
        ("timm:", "timm has no network ''"),
        ("hf-hub:resnet50", "must be hf-hub:OWNER/NAME"),
        ("hf-hub:../etc/passwd", "must be hf-hub:OWNER/NAME"),
    ],
)
def test_a_slip_is_told_with_the_close_names(arch: str, said: str) -> None:
    with pytest.raises(BadInput) as raised:
        libraries.require_known(arch)
    assert said in str(raised.value)


def test_a_tag_that_is_none_is_told_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"Invalid pretrained tag .*there are .*resnet18\.a1_in1k"):
        libraries.get("timm:resnet18.nope", None)


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(BadInput, match="has no classifier"):
        libraries.get("timm:vit_small_patch14_dinov2", None)


def test_what_timm_says_of_a_network_is_taken() -> None:
    arch = libraries.get("timm:mobilenetv3_small_050.lamb_in1k", None)
    assert arch.preprocess_source == "from timm's mobilenetv3_small_050.lamb_in1k"
    assert (arch.preprocess.size, arch.preprocess.resize, arch.preprocess.interpolation) == ((224, 224), 256, "bicubic")
    assert arch.preprocess.mean == (0.485, 0.456, 0.406)
    assert arch.labels() == imagenet_labels()
    assert arch.published_name == "timm mobilenetv3_small_050.lamb_in1k"
    assert libraries.get("timm:mobilenetv3_small_050", None).published_name == arch.published_name


def test_classes_of_the_larger_imagenets_have_their_names() -> None:
    arch = libraries.get("timm:tf_efficientnetv2_s.in21k", None)
    labels = arch.labels()
    assert len(labels) == arch.num_classes == 21843
    assert any("dog" in label for label in labels)


def test_a_network_that_is_built_for_one_size_is_built_for_the_one_asked_for() -> None:
    arch = custom.resolve(ExportConfig("timm:vit_tiny_patch16_224", weights="random", input_size=(64, 96)))
    assert arch.preprocess.size == (64, 96)
    with torch.no_grad():
        assert arch.build(7).eval()(torch.zeros(2, 3, 64, 96)).shape == (2, 7)


def test_a_network_whose_constructor_computes_is_built_for_the_size_asked_for() -> None:
    arch = custom.resolve(ExportConfig("torchvision:regnet_y_400mf", weights="random", input_size=(96, 96)))
    assert arch.preprocess.size == (96, 96)
    with pytest.raises(BadInput, match="--outputs seen=nowhere: regnet_y_400mf has no layer"):
        custom.resolve(ExportConfig("torchvision:regnet_y_400mf", weights="random", outputs=("logits", "seen=nowhere")))


def test_torchvisions_names_give_the_zoos_networks_where_it_has_them() -> None:
    assert libraries.get("torchvision:resnet18", None).paper.startswith("He")
    other = libraries.get("torchvision:regnet_y_400mf", None)
    assert (other.name, other.num_classes, other.preprocess.resize) == ("regnet_y_400mf", 1000, 232)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("timm:resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("torchvision:swin_t", "swin_t"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_the_models_name_is_the_networks(arch: str, name: str) -> None:
    assert ExportConfig(arch).model_name == name


def test_a_repository_of_the_hub_brings_weights_labels_and_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as a machine has it that downloaded the repository before."""
    network = timm.create_model("resnet18", num_classes=3)
    commit = "0" * 40
    snapshot = tmp_path / "models--somebody--pets" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--somebody--pets" / "refs").mkdir()
    (tmp_path / "models--somebody--pets" / "refs" / "main").write_text(commit)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    stated = {"num_classes": 3, "input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    stated |= {"crop_pct": 1.0, "interpolation": "bilinear", "label_names": ["cat", "dog", "newt"]}
    (snapshot / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": stated})
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arch = libraries.get("hf-hub:somebody/pets", None)
    assert (arch.num_classes, arch.labels()) == (3, ["cat", "dog", "newt"])
    assert (arch.preprocess.size, arch.preprocess.resize, arch.preprocess.mean) == ((64, 64), 64, (0.5, 0.5, 0.5))
    assert arch.published is not None
    weights = arch.published()
    built = arch.build(3)
    built.load_state_dict(weights)
    torch.testing.assert_close(built.state_dict()["fc.weight"], network.state_dict()["fc.weight"], rtol=0, atol=0)


def test_a_repository_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"cannot read config\.json of huggingface\.co/nobody/nothing"):
        libraries.get("hf-hub:nobody/nothing", None)


def test_preprocessing_that_is_not_ours_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = timm.models.get_pretrained_cfg("resnet18")
    assert config is not None
    monkeypatch.setattr("timm.models.get_pretrained_cfg", lambda name: replace(config, crop_mode="border"))
    arch = from_timm.named("resnet18", None)
    assert "frames its images" in arch.preprocess_source
    assert arch.preprocess.resize == (224, 224)


def test_all_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.archs(["--all", "mobilenetv4_conv_s"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "timm:mobilenetv4_conv_small",
        "timm:mobilenetv4_conv_small_035",
        "timm:mobilenetv4_conv_small_050",
    ]
    assert cli.archs(["--all", "torchvision:swin_t", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["torchvision:swin_t"]
    assert cli.archs(["--all", "nonesuch"]) == 2
    assert "--all nonesuch: none of" in capsys.readouterr().err


def test_all_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.archs(["--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(timm.list_models()) + len(libraries.known("torchvision"))
