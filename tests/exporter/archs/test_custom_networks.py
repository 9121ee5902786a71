"""Networks that are not the zoo's: real modules in a folder, real program files, through the whole export."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from convoynet.exporter import archs
from convoynet.exporter.archs import custom
from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.commands import cli, inspect_command
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.onnx_runs import run as run_graph
from tests.exporter.onnx_runs import session_of
from tests.exporter.small_nets import small_net

ROOT = Path(__file__).parents[3]
SIZE = (32, 32)

NETS = '''
print("a greeting")

import torch
from torch import nn

from convoynet.exporter import archs

def small(num_classes: int = 7) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )

class OffTheMetaDevice(nn.Module):
    """Holds one tensor that is no buffer, and makes another."""

    def __init__(self):
        super().__init__()
        self.body, self.mean = small(), torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)

    def forward(self, x):
        return self.body(x - self.mean) + torch.arange(7, device="cpu") * 0.1

def needs_a_number(num_classes):
    return small(num_classes)

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))

def uneven():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(196, 5))

def no_module():
    return {"a": 1}

def nothing():
    pass

def explodes():
    raise RuntimeError("boom\\nand more")

def ends():
    raise SystemExit("no GPU here")

def maps():
    return nn.Conv2d(3, 4, 3)

def two_outputs():
    class Two(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x.amax((2, 3))
    return Two()

def lies(num_classes=3):
    return small(9)

def complete():
    from dataclasses import replace
    return replace(archs.get("resnet20"), name="complete", labels=lambda: list("abcdefghij"))

def _private():
    return small()

module = small()
value = 3

class Outer:
    @staticmethod
    def inner():
        return small(2)
'''


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder, which is the current one."""
    folder, before, path = tmp_path_factory.mktemp("project"), Path.cwd(), list(sys.path)
    (folder / "users_nets.py").write_text(NETS)
    (folder / "users_broken.py").write_text("import absent_library\n")
    (folder / "users_wrong.py").write_text("1 / 0\n")
    (folder / "users_script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n")
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path


def resolve(arch: str, **options: Any) -> archs.Arch:
    return custom.resolve(ExportConfig(f"users_nets:{arch}", **{"input_size": SIZE, **options}))


def save_program(path: Path, network: nn.Module, **options: Any) -> None:
    images = torch.zeros(2, 3, *SIZE)
    dynamic = options.get("dynamic_shapes", ({0: Dim.DYNAMIC},))
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic), path)


@pytest.fixture(scope="module")
def program(project: Path) -> Path:
    save_program(project / "net-1.pt2", small_net())
    return project / "net-1.pt2"


class TestFactory:
    def test_is_found_in_the_current_folder_and_described(self) -> None:
        arch = resolve("small")
        assert arch.num_classes == 7
        assert arch.input_size == (3, *SIZE)
        assert arch.preprocess.resize == SIZE  # all of the image
        assert "users_nets:small comes with no configuration" in arch.preprocessing
        assert arch.labels() == [str(index) for index in range(7)]
        assert ExportConfig("users_nets:small").model_name == "small"

    def test_has_imagenets_normalisation_and_all_of_the_image_unless_told(self) -> None:
        arch = custom.resolve(ExportConfig("users_nets:small"))
        assert arch.preprocess == replace(archs.get("resnet18").preprocess, resize=(224, 224))
        told = resolve("small", mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), input_size=(32, 64)).preprocess
        assert (told.mean, told.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
        assert told.size == (32, 64)
        assert told.resize == (32, 64)

    def test_is_called_with_the_number_of_classes(self) -> None:
        assert resolve("small", num_classes=4).num_classes == 4
        assert resolve("needs_a_number", num_classes=4).num_classes == 4
        arch = resolve("small")
        assert dry_run(arch.build(11), arch.input_size).shape == (1, 11)  # type: ignore[attr-defined]
        Path("three.txt").write_text("a\nb\nc\n")
        assert resolve("needs_a_number", labels=Path("three.txt")).num_classes == 3

    def test_is_what_it_returned(self) -> None:
        """The same weights for the same seed, and the published ones are those it was built with."""
        arch = resolve("small", seed=3)
        state = arch.build(7).state_dict()
        namespace: dict[str, Any] = {}
        exec(compile(NETS, "nets", "exec"), namespace)
        torch.manual_seed(3)
        for name, tensor in namespace["small"]().state_dict().items():
            assert torch.equal(state[name], tensor)
        assert arch.published is not None
        assert all(torch.equal(tensor, state[name]) for name, tensor in arch.published().items())
        with torch.device("meta"):
            assert not any(tensor.is_meta for tensor in arch.build(7).state_dict().values())

    def test_may_be_a_module_an_arch_or_within_a_class(self) -> None:
        assert resolve("module").num_classes == 7
        assert resolve("Outer.inner").num_classes == 2
        assert resolve("complete", input_size=None).labels()[0] == "a"
        assert ExportConfig("users_nets:Outer.inner").model_name == "inner"

    def test_takes_grey_images_where_the_network_does(self) -> None:
        arch = resolve("grey")
        assert arch.input_size == (1, *SIZE)
        assert len(arch.preprocess.mean) == 1
        assert resolve("grey", mean=(0.1,), std=(0.3,)).preprocess.mean == (0.1,)

    def test_may_hold_tensors_that_are_no_buffers(self) -> None:
        arch = resolve("OffTheMetaDevice")
        assert arch.num_classes == 7
        same = archs.count(resolve("small").build(7), arch.input_size)
        assert archs.count(arch.build(7), arch.input_size) == same

    @pytest.mark.parametrize(
        ("spec", "options", "words"),
        [
            ("users_nothing:x", {}, "there is no module users_nothing in .*PYTHONPATH"),
            ("users_nets.sub:x", {}, "no module users_nets.sub"),
            ("users_nets.py:small", {}, "--arch users_nets:small"),
            ("folder/users_nets.py:small", {}, "--arch folder.users_nets:small"),
            ("users_nets:", {}, "must be package.module:factory"),
            ("users_broken:x", {}, "importing users_broken raised ModuleNotFoundError: No module named 'absent_lib"),
            ("users_wrong:x", {}, "importing users_wrong raised ZeroDivisionError: division by zero"),
            ("users_script:x", {}, "importing users_script ends the program .SystemExit: 2.*__main__"),
            ("users_nets:ends", {}, "calling it raised SystemExit: no GPU here"),
            ("users_nets:smal", {}, "has no smal; did you mean small"),
            ("users_nets:value", {}, "type int; it must be a function"),
            ("users_nets:no_module", {}, "returns an object of type dict; it must return a torch.nn.Module"),
            ("users_nets:nothing", {}, "returns None"),
            ("users_nets:explodes", {}, "raised RuntimeError: boom and more .CONVOY_DEBUG=1"),
            ("users_nets:maps", {}, r"returns \[2, 4, 30, 30\] for two images; it must return logits"),
            ("users_nets:two_outputs", {}, r"returns 2 tensors for two images \(\[2, 3\], \[2, 3\]\).*--outputs"),
            ("users_nets:grey", {"input_size": None}, "does not take a float32 image of 3x224x224.*--input-size"),
            ("users_nets:grey", {"num_classes": 4}, "takes no parameter num_classes"),
            ("users_nets:needs_a_number", {}, "--num-classes N or --labels"),
            ("users_nets:lies", {"num_classes": 4}, "num_classes=4 and returns 9"),
            ("users_nets:complete", {"mean": (0.5,), "std": (0.5,)}, "--mean has 1 numbers"),
        ],
    )
    def test_says_what_is_wrong_in_a_line(self, spec: str, options: dict[str, Any], words: str) -> None:
        with pytest.raises(BadInput, match=words) as caught:
            custom.resolve(ExportConfig(spec, name="x", **{"input_size": SIZE, **options}))
        assert "\n" not in str(caught.value)

    def test_with_another_number_of_labels_than_classes(self) -> None:
        with pytest.raises(BadInput, match="has 5 classes, not 6"):
            resolve("grey").build(6)

    def test_whose_name_is_no_model_name_wants_one(self) -> None:
        with pytest.raises(BadInput, match="add --name"):
            ExportConfig("users_nets:_private")
        assert ExportConfig("users_nets:_private", name="mine").model_name == "mine"


class TestProgram:
    def test_is_described_by_its_file(self, program: Path) -> None:
        arch = custom.resolve(ExportConfig(str(program)))
        assert (arch.num_classes, arch.input_size) == (20, (3, *SIZE))
        assert ExportConfig(str(program)).model_name == "net-1"
        assert archs.count(arch.build(20), arch.input_size) == archs.count(small_net(), arch.input_size)

    def test_gives_the_graph_of_its_network(self, program: Path) -> None:
        """Also with batch normalisation folded, and at batch sizes that it was not traced at."""
        arch = custom.resolve(ExportConfig(str(program)))
        graph = onnx_from_torch(arch.build(20), arch.preprocess, uint8_input=False)
        direct = onnx_from_torch(small_net(), arch.preprocess, uint8_input=False)
        assert [node.op_type for node in graph.graph.node] == [node.op_type for node in direct.graph.node]
        images = made_images(5, SIZE, 3, 0)
        for count in (1, 5):
            inputs = arch.preprocess.normalize(images[:count])
            with torch.no_grad():
                wanted = small_net()(torch.from_numpy(inputs)).numpy()
            found = run_graph(graph, inputs)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))

    def test_that_takes_any_size_is_told_one(self, project: Path) -> None:
        free = Dim.DYNAMIC
        save_program(project / "free.pt2", small_net(), dynamic_shapes=({0: free, 2: free, 3: free},))
        assert custom.resolve(ExportConfig("free.pt2")).input_size == (3, 224, 224)
        assert custom.resolve(ExportConfig("free.pt2", input_size=(48, 40))).input_size == (3, 48, 40)

    def test_for_one_batch_size(self, project: Path) -> None:
        save_program(project / "fixed.pt2", small_net(), dynamic_shapes=None)
        with pytest.raises(BadInput, match=r"takes exactly 2 images at a time.*dynamic_shapes=.*Dim.DYNAMIC"):
            custom.resolve(ExportConfig("fixed.pt2"))

    @pytest.mark.parametrize(
        ("network", "found"),
        [
            (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "batch_norm"),
            (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), "dropout"),
        ],
        ids=["batch normalisation", "dropout"],
    )
    def test_in_training_mode(self, network: nn.Module, found: str, project: Path) -> None:
        save_program(project / "trains.pt2", nn.Sequential(network.train(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        with pytest.raises(BadInput, match=f"training mode .*({found}).*model.eval"):
            custom.resolve(ExportConfig("trains.pt2"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"input_size": (64, 64)}, "--input-size 64x64: .* takes images of 32x32"),
            ({"num_classes": 3}, "--num-classes 3: .* has 20 classes"),
            ({"weights": "random"}, "--weights random: .* brings its weights"),
            ({"fully_convolutional": True}, "no `features` and `classifier`"),
        ],
    )
    def test_cannot_be_changed(self, options: dict[str, Any], words: str, program: Path) -> None:
        with pytest.raises(BadInput, match=words):
            custom.resolve(ExportConfig(str(program), **options))

    def test_that_is_none(self, project: Path) -> None:
        (project / "noise.pt2").write_bytes(b"noise")
        with zipfile.ZipFile(project / "zip.pt2", "w") as archive:
            archive.writestr("a/b", "c")
        for name in ("noise.pt2", "zip.pt2"):
            with pytest.raises(BadInput, match=f"{name}: PyTorch .* cannot read it") as caught:
                custom.resolve(ExportConfig(name))
            assert "\n" not in str(caught.value)
        with pytest.raises(BadInput, match=r"absent.pt2: no such file"):
            custom.resolve(ExportConfig("absent.pt2"))

    def test_can_run_code_as_the_documentation_says(self, program: Path, project: Path) -> None:
        """Where a later PyTorch does not, docs/adding-a-network.md can say so."""
        changed = project / "bomb.pt2"
        with zipfile.ZipFile(program) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, pickle.dumps(_Bomb()) if name.endswith("sample_inputs/model.pt") else content)
        with pytest.raises(BadInput):
            custom.resolve(ExportConfig(str(changed)))
        assert (project / "it-ran").is_dir()


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("it-ran",)


class TestSizeOfTheImage:
    def test_of_a_network_of_the_zoo(self) -> None:
        arch = custom.resolve(ExportConfig("resnet18", input_size=(160, 320)))
        assert arch.input_size == (3, 160, 320)
        assert arch.preprocess.resize == 366
        own = archs.get("resnet18").preprocess
        assert arch.preprocess == replace(own, size=(160, 320), resize=366)
        assert custom.resolve(ExportConfig("resnet18", input_size=own.size)) == archs.get("resnet18")
        assert arch.preprocess_source.endswith("ResNet18_Weights.IMAGENET1K_V1, in proportion from 224")

    def test_that_the_head_does_not_allow(self) -> None:
        with pytest.raises(BadInput, match=r"--input-size 48x48: lenet5 is a network for 32x32 .*leave .* out$"):
            custom.resolve(ExportConfig("lenet5", input_size=(48, 48)))
        with pytest.raises(BadInput, match=r"alexnet-2012 is a network for 227x227 .* or add --fully-convolutional"):
            custom.resolve(ExportConfig("alexnet-2012", input_size=(384, 384)))
        with pytest.raises(BadInput, match=r"a network for 227x227 .*leave the option out$"):
            custom.resolve(ExportConfig("alexnet-2012", input_size=(128, 128)))

    def test_uneven_pooling_is_exported(self) -> None:
        """From 12x12 to 7x7, as in VGG at 384: the windows overlap."""
        arch = resolve("uneven", input_size=(36, 36))
        network = arch.build(5).eval()
        graph = onnx_from_torch(network, arch.preprocess, uint8_input=False)
        inputs = arch.preprocess.normalize(made_images(2, (36, 36), 3, 0))
        with torch.no_grad():
            wanted = network(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(run_graph(graph, inputs), wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))

    def test_mean_and_std_of_a_network_of_the_zoo(self) -> None:
        arch = custom.resolve(ExportConfig("resnet20", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
        assert (arch.preprocess.mean, arch.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)
        assert arch.preprocess.size == SIZE

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"mean": (0.5,)}, "belong together"),
            ({"mean": (0.5, 0.5, 0.5), "std": (0.5,)}, "belong together"),
            ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "--mean 0.5,0.5 needs three"),
            ({"mean": (float("nan"),), "std": (0.5,)}, "--mean nan"),
            ({"mean": (0.5,), "std": (0.0,)}, "from 0 to 1"),
            ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "divide those for 0 to 255 by 255"),
            ({"input_size": (0, 32)}, "--input-size 0x32"),
        ],
    )
    def test_that_make_no_sense(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(BadInput, match=words):
            ExportConfig("resnet20", **options)


def published(config: ExportConfig) -> tuple[dict[str, Any], Path, pb.ModelConfig]:
    folder = run(config, Quiet()).folder
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report, folder, text_format.Parse((folder.parent / "config.pbtxt").read_text(), pb.ModelConfig())


class TestExport:
    def test_own_network_to_int8(self, tmp_path: Path) -> None:
        report, folder, config = published(
            ExportConfig(
                "users_nets:OffTheMetaDevice", repository=tmp_path, input_size=SIZE, steps=(Int8(),), batch=(1, 5)
            )
        )
        assert folder == tmp_path / "OffTheMetaDevice" / "1"
        assert report["arch"] == "users_nets:OffTheMetaDevice"
        assert report["precision"] == "int8"
        assert report["weights"]["source"] == "as users_nets:OffTheMetaDevice builds it, seed 0"
        assert list(config.output[0].dims) == [7]
        session = session_of(folder / "model.onnx")
        assert session.run(None, {"input": np.zeros((3, 3, *SIZE), np.float32)})[0].shape == (3, 7)

    def test_checkpoint_and_labels_into_an_own_network(self, tmp_path: Path) -> None:
        torch.manual_seed(9)
        weights = {name: tensor + 1 for name, tensor in resolve("small", num_classes=3).build(3).state_dict().items()}
        save_file(weights, tmp_path / "w.safetensors")
        (tmp_path / "labels.txt").write_text("cat\ndog\nowl\n")
        report, folder, _ = published(
            ExportConfig(
                "users_nets:small",
                repository=tmp_path / "m",
                input_size=SIZE,
                weights=str(tmp_path / "w.safetensors"),
                labels=tmp_path / "labels.txt",
                batch=(1, 5),
            )
        )
        assert (folder.parent / "labels.txt").read_text() == "cat\ndog\nowl\n"
        assert report["classes"] == 3
        assert report["weights"]["source"].endswith("w.safetensors")
        assert report["parity"]["max_rel_error"] < 1e-5

    def test_random_weights_are_those_that_it_was_built_with(self, tmp_path: Path) -> None:
        report, _, _ = published(
            ExportConfig(
                "users_nets:small", repository=tmp_path, input_size=SIZE, weights="random", seed=5, batch=(1, 5)
            )
        )
        assert report["weights"]["source"] == "as users_nets:small builds it, seed 5, batch statistics estimated"

    def test_program_to_int8(self, tmp_path: Path, program: Path) -> None:
        report, folder, config = published(
            ExportConfig(str(program), repository=tmp_path, steps=(Int8(),), input="uint8", batch=(1, 5))
        )
        assert folder == tmp_path / "net-1" / "1"
        assert [stage["stage"] for stage in report["stages"]] == ["onnx", "fp32", "int8"]
        assert report["stages"][1]["parity"]["max_rel_error"] < 1e-5
        assert report["parity"]["min_cosine"] > 0.95
        assert report["macs"]["after"] == archs.count(small_net(), (3, *SIZE)).macs
        assert config.name == "net-1"

    def test_by_the_command(self, tmp_path: Path, project: Path) -> None:
        """In a fresh process that is started in the user's folder."""
        code = "import sys; sys.path.pop(0); from convoynet.exporter.commands.cli import main; main()"
        options = ["--input-size", "32", "--num-classes", "5", "--batch", "1:2", "--json"]
        options += ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
        done = subprocess.run(
            [sys.executable, "-c", code, "--arch", "users_nets:small", *options, "--model-repository", str(tmp_path)],
            capture_output=True, text=True, cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)  # the module prints while it is imported
        assert report["input"]["preprocess"]["mean"] == [0.5, 0.5, 0.5]
        assert report["input"]["shape"] == [3, 32, 32]
        assert report["classes"] == 5
        assert (tmp_path / "small" / "1" / "model.onnx").is_file()

    def test_that_fails_is_a_line_and_its_traceback_an_option(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = ["--arch", "users_nets:explodes", "--model-repository", str(tmp_path / "m")]
        assert cli.export(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        told = printed.err.removeprefix("a greeting\n")  # where this test is the first that imports the module
        assert told.startswith("convoy export: --arch users_nets:explodes: calling it raised RuntimeError: boom")
        assert told.count("\n") == 1
        assert not (tmp_path / "m").exists()
        monkeypatch.setenv("CONVOY_DEBUG", "1")
        assert cli.export(arguments) == 2
        assert 'raise RuntimeError("boom' in capsys.readouterr().err


def test_inspect_shows_own_networks(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {}
    for source in ("users_nets:small", str(program)):
        assert inspect_command.inspect([source, "--input-size", "32", "--json"]) == 0, capsys.readouterr().err
        layers[source] = json.loads(capsys.readouterr().out)
    count = archs.count(small_net(), (3, *SIZE))
    assert layers[str(program)]["totals"]["macs"] == count.macs
    assert layers[str(program)]["totals"]["parameters"] == count.parameters
    assert layers["users_nets:small"]["layers"][0]["type"] == "Conv2d"
    assert inspect_command.inspect(["users_nets:explodes"]) == 2
    assert "boom" in capsys.readouterr().err
