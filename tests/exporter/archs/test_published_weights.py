"""Published weights, through the libraries' own download code, from a server on this machine."""

import io
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import nn
from torchvision.models import get_model, get_model_weights

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.archs.from_timm import download
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from tests.exporter.file_server import file_with_hash, serve
from tests.exporter.onnx_runs import session_of

MOBILENET = "mobilenetv1_100.ra4_e3600_r224_in1k"
XCEPTION = "legacy_xception.tf_in1k"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty download caches, so that nothing of this machine's is used or left."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    return tmp_path / "served"


@pytest.fixture
def address(folder: Path, caches: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve(folder) as address:
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield address


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def load_default(arch: archs.Arch) -> tuple[nn.Module, weights.Weights]:
    torch.manual_seed(1)
    model = arch.build(arch.num_classes)
    images = made_images(2, arch.preprocess.size, arch.preprocess.channels, 0)
    return model, weights.load(model, arch, "default", seed=0, images=images)


def randomly_settled(model: nn.Module) -> nn.Module:
    """Statistics that a network which forgot to load them would not have."""
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model


def test_an_export_downloads_torchvisions_weights(
    address: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    theirs = randomly_settled(get_model("shufflenet_v2_x0_5", weights=None)).eval()
    file = file_with_hash(folder, "shufflenet", saved(theirs))
    published = get_model_weights("shufflenet_v2_x0_5").DEFAULT
    monkeypatch.setattr(published.value, "url", f"{address}/{file.name}")
    config = ExportConfig("shufflenet_v2_x0_5", repository=tmp_path / "models", batch=(1, 2), calibration_samples=2)
    found = run(config, Quiet())
    told = found.report.weights
    assert told["source"] == "torchvision ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"
    assert told["sha256"] == weights.state_dict_sha256(theirs.state_dict())
    arch = archs.get("shufflenet_v2_x0_5")
    inputs = arch.preprocess.normalize(made_images(2, arch.preprocess.size, 3, 5))
    (logits,) = session_of(found.folder / "model.onnx").run(None, {"input": inputs})
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_torchvision_weights_with_another_hash_are_refused(
    address: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "squeezenet-01234567.pth").write_bytes(saved(get_model("squeezenet1_1", weights=None)))
    published = get_model_weights("squeezenet1_1").DEFAULT
    monkeypatch.setattr(published.value, "url", f"{address}/squeezenet-01234567.pth")
    with pytest.raises(BadInput, match=r"cannot get torchvision SqueezeNet1_1.*invalid hash value.*01234567"):
        run(ExportConfig("squeezenet1_1", repository=tmp_path / "models"), Quiet())
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(("name", "heads"), [("googlenet", 2), ("inception_v3", 1)])
def test_weights_with_auxiliary_heads_load_without_them(
    name: str, heads: int, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    theirs = get_model(name, weights=None, init_weights=False, transform_input=True)
    randomly_settled(theirs).eval()
    file = file_with_hash(folder, name, saved(theirs))
    published = get_model_weights(name).DEFAULT
    monkeypatch.setattr(published.value, "url", f"{address}/{file.name}")
    arch = archs.get(name)
    model, _ = load_default(arch)
    missing = theirs.state_dict().keys() - model.state_dict().keys()
    assert len({tensor.partition(".")[0] for tensor in missing}) == heads
    # The same answers to the same picture: theirs is normalised as their own code says and transformed inside.
    picture = made_images(1, arch.preprocess.size, 3, 0)
    transforms = published.transforms()
    usual = replace(arch.preprocess, mean=tuple(transforms.mean), std=tuple(transforms.std))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(usual.normalize(picture)))
        torch.testing.assert_close(
            model(torch.from_numpy(arch.preprocess.normalize(picture))), expected, rtol=1e-4, atol=1e-4
        )


# The names that torchvision's files of 2020 and 2021 have for the layers of its code of today.
OLD_NAMES = (
    (r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2."),
    (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    *((rf"(classification_head|regression_head)\.conv\.{at}\.0\.", rf"\1.conv.{2 * at}.") for at in range(3, -1, -1)),
)
DETECTORS = {
    "ssdlite320_mobilenet_v3_large": "counted",
    "ssd300_vgg16": "counted",
    "retinanet_resnet50_fpn": "no epsilon",
    "retinanet_resnet50_fpn_v2": "counted",
    "fcos_resnet50_fpn": "frozen",
    "fasterrcnn_resnet50_fpn": "no epsilon",
    "fasterrcnn_resnet50_fpn_v2": "counted",
    "fasterrcnn_mobilenet_v3_large_fpn": "frozen",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "frozen",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("ssdlite") else pytest.mark.slow) for name in DETECTORS]
)
def test_a_detectors_weights_load_by_the_names_and_normalisation_of_their_file(
    name: str, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files from a frozen normalisation have no counters, and names from before torchvision's last change of them."""
    torch.manual_seed(0)
    theirs = randomly_settled(get_model(name, weights=None, weights_backbone=None)).state_dict()
    tensors = theirs
    if DETECTORS[name] != "counted":
        tensors = {old_name(each): tensor for each, tensor in theirs.items() if "num_batches" not in each}
        assert tensors.keys() != theirs.keys()
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    file = file_with_hash(folder, name, buffer.getvalue())
    published = get_model_weights(name).DEFAULT
    monkeypatch.setattr(published.value, "url", f"{address}/{file.name}")
    arch = archs.get(name)
    model = arch.build(arch.num_classes)
    loaded = weights.load(model, arch, "default", seed=0, images=np.zeros((0, 8, 8, 3), np.uint8))
    assert loaded.source == f"torchvision {published}"
    own = model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[each], tensor) for each, tensor in theirs.items() if "num_batches" not in each)
    if DETECTORS[name] != "counted":
        layers = [layer for layer in model.backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert {layer.eps == 0 for layer in layers} == {DETECTORS[name] == "no epsilon"}


def old_name(name: str) -> str:
    for new, old in OLD_NAMES:
        name = re.sub(new, old, name)
    return name


def test_a_tensor_beside_the_auxiliary_heads_is_still_refused(tmp_path: Path) -> None:
    arch = archs.get("googlenet")
    model = arch.build(10)
    tensors = {**model.state_dict(), "aux1.fc1.bias": torch.zeros(1024), "aux3.fc1.bias": torch.zeros(1024)}
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(BadInput, match=r"has the unknown aux3\.fc1\.bias; are these"):
        weights.load(model, arch, str(tmp_path / "net.safetensors"), seed=0, images=made_images(2, (224, 224), 3, 0))


def publish_on_hub(folder: Path, repository: str, model: nn.Module) -> Path:
    file = folder / repository / "resolve" / "main" / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(model.state_dict(), file)
    return file


def test_timm_weights_are_downloaded_from_the_hub_once(address: str, folder: Path) -> None:
    arch = archs.get("mobilenetv1_100")
    torch.manual_seed(0)
    theirs = randomly_settled(arch.build(1000))
    file = publish_on_hub(folder, f"timm/{MOBILENET}", theirs)
    _, loaded = load_default(arch)
    assert loaded.source == f"timm {MOBILENET}"
    assert loaded.sha256 == weights.state_dict_sha256(theirs.state_dict())
    file.unlink()  # from the cache now
    assert load_default(arch)[1] == loaded


def test_timm_weights_that_are_not_what_the_hub_says_are_refused_and_not_kept(
    address: str, folder: Path, tmp_path: Path
) -> None:
    arch = archs.get("mobilenetv1_100")
    file = publish_on_hub(folder, f"timm/{MOBILENET}", arch.build(1000))
    file.with_name(f"{file.name}.etag").write_text("0" * 64)
    for _ in range(2):  # also not from the cache
        with pytest.raises(
            BadInput, match=r"cannot get timm mobilenetv1_100\S+ .*its SHA-256 starts with \w{16}, the hub says 0{64}"
        ):
            load_default(arch)
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size > 10_000]


def test_timm_weights_offline_name_the_way_out_at_once(
    caches: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"cannot get timm inception_v4\.tf_in1k .*--weights FILE, or --weights random"):
        load_default(archs.get("inception_v4"))
    assert time.monotonic() - began < 120
    assert capfd.readouterr().err == ""


def test_timm_weights_with_another_hash_are_refused(address: str, folder: Path) -> None:
    (folder / "xception-01234567.pth").write_bytes(b"something else")
    config = get_pretrained_cfg(XCEPTION)
    assert config is not None
    assert isinstance(config.url, str)
    assert config.url.endswith("/xception-43020ad28.pth")
    with pytest.raises(RuntimeError, match=r'invalid hash value .expected "01234567"'):
        download(XCEPTION, replace(config, url=f"{address}/xception-01234567.pth"))


@pytest.mark.slow
def test_timm_weights_from_an_address_load(address: str, folder: Path) -> None:
    theirs = randomly_settled(archs.get("xception").build(1000))
    file = file_with_hash(folder, "xception", saved(theirs))
    config = get_pretrained_cfg(XCEPTION)
    assert config is not None
    tensors = download(XCEPTION, replace(config, url=f"{address}/{file.name}"))
    assert weights.state_dict_sha256(tensors) == weights.state_dict_sha256(theirs.state_dict())


def test_mnasnet_loads_from_a_file_without_a_format_version(tmp_path: Path) -> None:
    arch = archs.get("mnasnet0_5")
    theirs = arch.build(1000).state_dict()
    save_file(theirs, tmp_path / "net.safetensors")
    model = arch.build(1000)
    images = made_images(2, (224, 224), 3, 0)
    loaded = weights.load(model, arch, str(tmp_path / "net.safetensors"), seed=0, images=images)
    assert loaded.sha256 == weights.state_dict_sha256(theirs)
