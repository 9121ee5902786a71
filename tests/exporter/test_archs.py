import pytest
import torch
from torch import nn

from exporter import archs
from exporter.archs.registry import register
from exporter.archs.resnet import BasicBlock, CifarResNet
from exporter.errors import BadInput

# name: parameters, multiply-adds of one image, from the papers' tables and torchvision's documentation
KNOWN_COUNTS = {
    "lenet5": (60_000, 328_096),
    "resnet20": (269_722, 40_551_040),
    "resnet32": (464_154, 68_862_592),
    "resnet44": (658_586, 97_174_144),
    "resnet56": (853_018, 125_485_696),
    "resnet110": (1_727_962, 252_887_680),
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
}


def build_resnet20() -> CifarResNet:
    model = archs.get("resnet20").build(10)
    assert isinstance(model, CifarResNet)
    return model


def build_on_meta(arch: archs.Arch, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return arch.build(num_classes).eval()


@pytest.mark.parametrize("name", archs.names())
class TestEveryArch:
    def test_describes_itself(self, name: str) -> None:
        arch = archs.get(name)
        assert arch.name == name
        assert arch.paper
        assert arch.source in ("own", "torchvision")
        assert len(arch.labels()) == arch.num_classes
        assert bool(arch.published_name) == (arch.published is not None)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_gives_a_score_for_each_class(self, name: str, batch: int) -> None:
        arch = archs.get(name)
        model = build_on_meta(arch, arch.num_classes)
        scores = model(torch.empty(batch, *arch.input_size, device="meta"))
        assert scores.shape == (batch, arch.num_classes)
        assert scores.dtype == torch.float32

    def test_takes_another_number_of_classes_or_says_why_not(self, name: str) -> None:
        arch = archs.get(name)
        if name == "lenet5":
            with pytest.raises(BadInput, match=r"7 classes: .* use 10, or --arch lenet5-softmax"):
                arch.build(7)
            return
        model = build_on_meta(arch, 7)
        assert model(torch.empty(2, *arch.input_size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", KNOWN_COUNTS)
def test_count_equals_the_known_numbers(name: str) -> None:
    arch = archs.get(name)
    counted = archs.count(build_on_meta(arch, arch.num_classes), arch.input_size)
    assert (counted.parameters, counted.macs) == KNOWN_COUNTS[name]


def test_count_leaves_the_model_as_it_was() -> None:
    model = build_resnet20()
    model.layer2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    archs.count(model, (3, 32, 32))
    assert model.training
    assert not model.layer2.training
    assert model.layer3.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_count_knows_groups_and_bias_free_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4, bias=False),  # 8 x 6 x 6 outputs of 9 products
        nn.Flatten(),
        nn.Linear(288, 5),
    )
    assert archs.count(model, (4, 8, 8)) == archs.Count(8 * 9 + 288 * 5 + 5, 8 * 36 * 9 + 288 * 5)


def test_build_follows_the_seed() -> None:
    torch.manual_seed(1)
    first = build_resnet20().conv1.weight
    torch.manual_seed(1)
    assert torch.equal(first, build_resnet20().conv1.weight)
    assert not torch.equal(first, build_resnet20().conv1.weight)


def test_names_are_sorted_and_lower_case() -> None:
    assert archs.names() == sorted(archs.names())
    assert all(name == name.lower() for name in archs.names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "unknown architecture 'resnet51': did you mean .*resnet50.*`convoy archs`"),
        ("ResNet101", "did you mean resnet101"),
        ("zzz", "unknown architecture 'zzz': `convoy archs` lists them all"),
    ],
)
def test_unknown_name_is_told_the_close_matches(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        archs.get(name)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'resnet50' is registered twice"):
        register("resnet50")(lambda: archs.get("resnet18"))


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = build_resnet20().layer2[0]
    assert isinstance(block, BasicBlock)
    x = torch.randn(1, 16, 8, 8)
    shortcut = block._shortcut(x)
    assert shortcut.shape == (1, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


def test_torchvision_preprocessing_comes_from_its_weights() -> None:
    assert archs.get("resnet50").preprocess.resize == 232  # IMAGENET1K_V2
    assert archs.get("resnet18").preprocess.resize == 256  # IMAGENET1K_V1
    assert archs.get("resnet18").preprocess.size == (224, 224)
    assert archs.get("resnet18").labels()[:2] == ["tench", "goldfish"]
