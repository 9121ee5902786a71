import tarfile
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.data.images import labelled_images, load_images, made_images
from convoynet.exporter.errors import BadInput

DATA = Path(__file__).parents[4] / "shared" / "data"
RESNET20 = archs.get("resnet20")
Images = NDArray[np.uint8]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def images() -> Images:
    return made_images(40, (32, 32), 3, 0)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return RESNET20.build(10)


@pytest.fixture
def tensors() -> Tensors:
    torch.manual_seed(1)
    return RESNET20.build(10).state_dict()


def load(model: nn.Module, spec: object, images: Images) -> weights.Weights:
    return weights.load(model, RESNET20, str(spec), seed=0, images=images)


def wrap_nothing(tensors: Tensors) -> Tensors:
    return tensors


def wrap_like_data_parallel(tensors: Tensors) -> dict[str, object]:
    return {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}


def wrap_twice(tensors: Tensors) -> dict[str, object]:
    return {"model": {"state_dict": {f"_orig_mod.module.{name}": t for name, t in tensors.items()}}}


def wrap_without_counters(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "num_batches" not in name}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [wrap_nothing, wrap_like_data_parallel, wrap_twice, wrap_without_counters])
def test_loads_what_torch_saves(
    tmp_path: Path, model: nn.Module, tensors: Tensors, images: Images, wrap: Callable[[Tensors], object], zipped: bool
) -> None:
    torch.save(wrap(tensors), tmp_path / "net.th", _use_new_zipfile_serialization=zipped)
    loaded = load(model, tmp_path / "net.th", images)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert loaded.source == f"file {tmp_path / 'net.th'}"
    assert loaded.sha256 == weights.state_dict_sha256(tensors)
    assert not any(module.training for module in model.modules())


def test_loads_safetensors(tmp_path: Path, model: nn.Module, tensors: Tensors, images: Images) -> None:
    save_file(tensors, tmp_path / "net.safetensors")
    assert load(model, tmp_path / "net.safetensors", images).sha256 == weights.state_dict_sha256(tensors)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(
    tmp_path: Path, model: nn.Module, tensors: Tensors, images: Images, zipped: bool
) -> None:
    proof = tmp_path / "it-ran"
    file = tmp_path / "evil.pt"
    torch.save({"state_dict": tensors, "x": Payload(proof)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match=r"evil\.pt: holds pickled code \(.+\), which is never run") as caught:
        load(model, file, images)
    assert "\n" not in str(caught.value)
    assert not proof.exists()
    torch.load(file, weights_only=False)  # the payload does work where it is run
    assert proof.exists()


def test_whole_pickled_model_is_refused(tmp_path: Path, model: nn.Module, images: Images) -> None:
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(BadInput, match=r"holds pickled code \(convoynet\.exporter\.archs\.resnet\.CifarResNet\)"):
        load(model, tmp_path / "whole.pt", images)


@pytest.mark.parametrize("begins", [b"PK", b"\x80\x02", b"\x80\x04", b"\x1f\x8b", b"< "])
def test_safetensors_whose_length_looks_like_another_format(
    tmp_path: Path, model: nn.Module, tensors: Tensors, images: Images, begins: bytes
) -> None:
    """A file begins with the length of its header, whose bytes may be those of any other format."""
    file = tmp_path / "net.safetensors"
    save_file(tensors, file)
    written = file.read_bytes()
    length = int.from_bytes(written[:8], "little")
    wanted = int.from_bytes(begins + b"\1", "little")
    file.write_bytes(wanted.to_bytes(8, "little") + written[8 : 8 + length].ljust(wanted) + written[8 + length :])
    assert load(model, file, images).sha256 == weights.state_dict_sha256(tensors)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_damaged_file_is_refused(tmp_path: Path, model: nn.Module, tensors: Tensors, images: Images, name: str) -> None:
    save = torch.save if name.endswith(".pt") else save_file
    save(tensors, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for content in (b"", b"not a checkpoint at all", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}: is no .* or is damaged") as caught:
            load(model, tmp_path / name, images)
        assert "\n" not in str(caught.value)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("linear.bias"), r"lacks linear\.bias; are these weights of another --arch"),
        (with_tensor("extra", torch.zeros(1)), "has the unknown extra; are these"),
        (lambda tensors: {"a": torch.zeros(1)}, r"lacks conv1\.weight, bn1\.weight, bn1\.bias and 94 more and has"),
        (
            with_tensor("linear.weight", torch.zeros(100, 64)),
            r"linear\.weight has the shape \[100, 64\], the network \[10, 64\]; these weights need --num-classes 100",
        ),
        (
            with_tensor("linear.weight", torch.zeros(10, 32)),
            r"the network \[10, 64\]; these are weights of another --arch or --num-classes",
        ),
        (with_tensor("linear.bias", torch.full((10,), torch.nan)), r"linear\.bias holds NaN or infinite"),
        (lambda tensors: {"epoch": 3}, "'epoch' is a int, not a tensor, so this is no state dict"),
        (lambda tensors: [torch.zeros(1)], "holds no state dict; save one with torch.save"),
        (lambda tensors: {}, "holds no state dict"),
    ],
)
def test_unsuitable_content_is_refused(
    tmp_path: Path,
    model: nn.Module,
    tensors: Tensors,
    images: Images,
    change: Callable[[Tensors], object],
    message: str,
) -> None:
    torch.save(change(tensors), tmp_path / "net.pt")
    with pytest.raises(BadInput, match=message) as caught:
        load(model, tmp_path / "net.pt", images)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path, model: nn.Module, images: Images) -> None:
    with pytest.raises(BadInput, match=r"gone\.pt: no such file; give a file, or `default` or `random`"):
        load(model, tmp_path / "gone.pt", images)


def test_default_offline_names_the_way_out_and_changes_nothing(model: nn.Module, images: Images) -> None:
    def unreachable() -> Tensors:
        raise urllib.error.URLError("no route to host")

    before = weights.state_dict_sha256(model.state_dict())
    arch = replace(RESNET20, published=unreachable)
    with pytest.raises(BadInput, match=r"cannot get https.*no route to host.*--weights FILE, or --weights random"):
        weights.load(model, arch, "default", seed=0, images=images)
    assert weights.state_dict_sha256(model.state_dict()) == before


def test_default_without_published_weights_names_the_way_out(images: Images) -> None:
    arch = archs.get("lenet5-softmax")
    with pytest.raises(BadInput, match="lenet5-softmax has no published weights: give your own with --weights"):
        weights.load(arch.build(10), arch, "default", seed=0, images=images)


def test_default_of_lenet5_is_packaged(images: Images) -> None:
    arch = archs.get("lenet5")
    loaded = weights.load(arch.build(10), arch, "default", seed=0, images=images)
    assert loaded.source.startswith("packaged lenet5-digits.safetensors")


def test_random_estimates_batch_statistics(model: nn.Module, images: Images) -> None:
    built = weights.state_dict_sha256(dict(model.named_parameters()))
    loaded = load(model, "random", images)
    assert loaded.source == "random, seed 0"
    assert weights.state_dict_sha256(dict(model.named_parameters())) == built
    assert loaded.sha256 == weights.state_dict_sha256(model.state_dict())
    inputs = torch.from_numpy(RESNET20.preprocess.normalize(images[:32]))
    with torch.no_grad():
        first = model.get_submodule("conv1")(inputs)
    estimated = model.get_buffer("bn1.running_mean")
    torch.testing.assert_close(estimated, first.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.momentum == 0.1
            assert not layer.training
            assert layer.running_var is not None
            assert not torch.allclose(layer.running_var, torch.ones_like(layer.running_var))


def test_random_keeps_dropout_off_and_is_reproducible(images: Images) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    first, second = build(), build()
    torch.manual_seed(5)
    inputs = RESNET20.preprocess.normalize(images)
    weights.estimate_statistics(first, inputs)
    torch.manual_seed(6)
    weights.estimate_statistics(second, inputs)
    assert weights.state_dict_sha256(first.state_dict()) == weights.state_dict_sha256(second.state_dict())


def test_random_needs_two_images(model: nn.Module, images: Images) -> None:
    with pytest.raises(BadInput, match="1 image: random weights need 2 or more"):
        load(model, "random", images[:1])
    load(model, "random", images[:17])  # no batch of a single image


def test_sha256_depends_on_names_dtypes_shapes_and_values_alone() -> None:
    base = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1)}
    digest = weights.state_dict_sha256(base)
    assert digest == weights.state_dict_sha256(dict(reversed(base.items())))
    assert digest == weights.state_dict_sha256({**base, "b": base["b"].T.contiguous().T})
    changed = [base["b"] + 1, base["b"].reshape(3, 2), base["b"].double(), base["b"].bfloat16()]
    assert len({weights.state_dict_sha256({**base, "b": tensor}) for tensor in changed} | {digest}) == 5


@pytest.fixture(scope="module")
def cifar_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Images, NDArray[np.int64]]:
    archive = DATA / "cifar10_test.tar.gz"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in ../shared/data")
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        tar.extractall(folder, members[::10], filter="data")
    pairs = labelled_images(folder / "test", RESNET20.labels())
    images = load_images([path for path, _ in pairs], RESNET20.preprocess)
    return images, np.array([label for _, label in pairs])


@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet56-4bfd9763.th"])
def test_published_files_classify_photographs(cifar_images: tuple[Images, NDArray[np.int64]], file: str) -> None:
    path = DATA / "weights" / file
    if not path.exists():
        pytest.skip(f"needs weights/{file} in ../shared/data")
    arch = archs.get(file.split("-", maxsplit=1)[0])
    assert arch.published_name.endswith(f"/{file}")
    model = arch.build(10)
    images, labels = cifar_images
    weights.load(model, arch, str(path), seed=0, images=images)
    with torch.no_grad():
        answers = model(torch.from_numpy(arch.preprocess.normalize(images))).argmax(1).numpy()
    assert len(labels) == 500
    assert (answers == labels).mean() > 0.75  # 0.81 and 0.83 on all of these JPEG files
