"""Who says how an image becomes an input, and what the flags change."""

from pathlib import Path
from typing import Any

import pytest
import timm
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import CenterCrop, Resize

from convoynet.exporter.archs import get, preprocessing
from convoynet.exporter.archs.custom import resolve
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput

SOURCE = """
import timm
from torch import nn
def tiny():
    return timm.create_model("resnet10t", num_classes=3)
def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture(scope="module", autouse=True)
def nets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "prepared_nets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield


def asked(name: str, **options: Any) -> tuple[Preprocess, str]:
    arch = resolve(ExportConfig(name, **options))
    return arch.preprocess, arch.preprocess_source


@pytest.mark.parametrize("name", ["resnet18", "convnext_large_mlp", "inception_v3", "efficientnet_b0"])
def test_timms_configuration_is_read_as_timm_reads_it(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    found = preprocessing.of_timm(config.to_dict())
    assert found is not None
    stated = resolve_data_config(pretrained_cfg=config.to_dict())
    resize, crop, *_ = create_transform(**stated).transforms
    assert isinstance(resize, Resize)
    assert isinstance(crop, CenterCrop)
    assert (found.resize if isinstance(found.resize, int) else list(found.resize)) == resize.size
    assert tuple(crop.size) == found.size
    assert (found.interpolation, found.mean, found.std) == (
        resize.interpolation.value, stated["mean"], stated["std"],
    )  # fmt: skip
    assert get("inception_v4").preprocess_source.startswith("from timm's inception_v4.")


def test_what_is_not_done_here_is_not_taken() -> None:
    config = timm.get_pretrained_cfg("resnet18").to_dict()
    assert preprocessing.of_timm(config | {"crop_mode": "border"}) is None
    assert preprocessing.of_timm(config | {"interpolation": "random"}) is None
    assert preprocessing.of_timm(config | {"input_size": (3, 160, 320)}) is None
    module = nn.Identity()
    assert preprocessing.of_module(module) is None
    module.pretrained_cfg = {"input_size": None}  # type: ignore[assignment]
    assert preprocessing.of_module(module) is None


def test_of_the_users_own_networks() -> None:
    found, source = asked("prepared_nets:tiny")
    assert (found.size, found.resize, found.interpolation) == ((176, 176), 201, "bicubic")  # 176 / 0.875
    assert source == "from timm's resnet10t.c3_in1k"
    found, source = asked("prepared_nets:tiny", input_size=(32, 32))
    assert (found.size, found.resize, found.interpolation) == ((32, 32), (32, 32), "bicubic")
    assert (
        source == "from timm's resnet10t.c3_in1k, which says nothing of 32, so the image is resized to the input size"
    )
    found, source = asked("prepared_nets:plain", input_size=(32, 32))
    assert found.line == (
        "resize to 32x32 (bilinear, antialias), no crop, RGB, /255, mean (0.485, 0.456, 0.406), "
        "std (0.229, 0.224, 0.225)"
    )
    assert (
        source
        == "by default: prepared_nets:plain comes with no configuration, so the image is resized to the input size"
    )


def test_another_size_than_the_networks() -> None:
    """In proportion for the weights that the configuration is of."""
    assert asked("resnet18", input_size=(384, 384))[0].resize == 439
    for weights in ("random", "mine.pt"):
        found, source = asked("resnet18", input_size=(32, 32), weights=weights)
        assert found.resize == (32, 32)
        assert source.endswith("which is for 224 and says nothing of 32, so the image is resized to the input size")
    assert asked("resnet18", weights="mine.pt")[0].resize == 256
    assert asked("fcn_resnet50", input_size=(96, 96), weights="mine.pt")[0].fit == "pad"


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"resize": 40}, {"resize": 40}),
        ({"resize": (40, 48)}, {"resize": (40, 48)}),
        ({"crop": 0.875}, {"resize": 36}),  # 36.57, as timm rounds
        ({"crop": 1.0}, {"resize": 32}),
        ({"interpolation": "lanczos"}, {"interpolation": "lanczos"}),
        ({"channel_order": "bgr"}, {"order": "bgr"}),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}),
    ],
)
def test_flags_say_otherwise(options: dict[str, Any], changed: dict[str, Any]) -> None:
    plain, source = asked("prepared_nets:plain", input_size=(32, 32))
    found, told = asked("prepared_nets:plain", input_size=(32, 32), **options)
    assert {key: getattr(found, key) for key in changed} == changed
    assert {key: value for key, value in vars(found).items() if key not in changed} == {
        key: value for key, value in vars(plain).items() if key not in changed
    }
    given = ", ".join(f"--{key.replace('_', '-')}" for key in options)
    # Who gives a size is not told that there is none.
    kept = source.removesuffix(preprocessing.RESIZED) if {"resize", "crop"} & set(options) else source
    assert told == f"{kept}; {given} as given"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fcn_resnet50", {"resize": 40}, "--resize: fcn_resnet50 takes the whole image and pads it"),
        ("fcn_resnet50", {"crop": 0.5}, "--crop: fcn_resnet50 takes"),
        ("prepared_nets:grey", {"channel_order": "bgr"}, "--channel-order bgr: prepared_nets:grey takes grey images"),
        ("resnet18", {"mean": (0.5,), "std": (0.5,)}, "--mean has 1 numbers, and resnet18 takes 3 channels"),
    ],
)
def test_flags_that_do_not_suit_the_network(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        asked(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "--resize 0 is not within 1"),
        ({"resize": (10, 70000)}, "--resize 10x70000 is not within 1"),
        ({"crop": 0.0}, "--crop 0 is no share"),
        ({"crop": float("nan")}, "--crop nan is no share"),
        ({"crop": 0.9, "resize": 40}, "--resize and --crop 0.9 both say"),
        ({"interpolation": "cubic"}, "--interpolation 'cubic' is not one of nearest"),
        ({"channel_order": "gbr"}, "--channel-order 'gbr' is not one of rgb, bgr"),
    ],
)
def test_values_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ExportConfig("resnet18", **options)


def test_the_files_of_a_check_are_there() -> None:
    from convoynet.exporter.pipeline import first_look

    with pytest.raises(BadInput, match=r"--check-preprocessing gone\.npy: no such file; give the \.npy file, then"):
        first_look.check(ExportConfig("lenet5", check_preprocessing=(Path("gone.npy"), Path("gone.png"))))
