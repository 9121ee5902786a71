from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open

from convoynet.exporter import archs, assets
from convoynet.exporter.archs.lenet import C3_CONNECTIONS, LeNet5, RadialBasis, digit_codes, squash
from convoynet.exporter.studies import train_lenet5
from tests.exporter.onnx_runs import session_of

# Layer: trainable parameters (section II.B), multiply-adds without biases
LAYERS = {
    "c1": (156, 117_600),
    "s2": (12, 1_176),
    "c3": (1_516, 150_000),
    "s4": (32, 400),
    "c5": (48_120, 48_000),
    "f6": (10_164, 10_080),
    "output": (0, 840),
}


@pytest.fixture
def lenet5() -> LeNet5:
    torch.manual_seed(0)
    model = archs.get("lenet5").build(10)
    assert isinstance(model, LeNet5)
    return model.eval()


def test_each_layer_has_the_papers_parameters(lenet5: LeNet5) -> None:
    parameters = {name: sum(p.numel() for p in layer.parameters()) for name, layer in lenet5.named_children()}
    assert parameters == {name: known for name, (known, _) in LAYERS.items()}
    assert sum(parameters.values()) == 60_000


def test_layers_have_the_papers_connections(lenet5: LeNet5) -> None:
    # Section II.B counts connections with the biases, one for each output unit.
    assert LAYERS["c1"][1] + 6 * 28 * 28 == 122_304
    assert LAYERS["c3"][1] + 16 * 10 * 10 == 151_600
    assert sum(macs for _, macs in LAYERS.values()) == archs.count(lenet5, (1, 32, 32)).macs


def test_layers_count_their_multiply_adds_for_a_batch(lenet5: LeNet5) -> None:
    assert lenet5.s2.multiply_adds(torch.empty(3, 6, 14, 14)) == 3 * LAYERS["s2"][1]
    assert lenet5.c3.multiply_adds(torch.empty(3, 16, 10, 10)) == 3 * LAYERS["c3"][1]
    assert lenet5.s4.multiply_adds(torch.empty(3, 16, 5, 5)) == 3 * LAYERS["s4"][1]
    assert isinstance(lenet5.output, RadialBasis)
    assert lenet5.output.multiply_adds(torch.empty(3, 10)) == 3 * LAYERS["output"][1]


def test_c3_sees_the_maps_of_table_1(lenet5: LeNet5) -> None:
    assert [len(sources) for sources in C3_CONNECTIONS] == [3] * 6 + [4] * 9 + [6]
    assert len(set(C3_CONNECTIONS)) == 16
    # Each map of S2 feeds ten maps of C3: a row of Table I has ten crosses.
    assert np.bincount(np.concatenate(C3_CONNECTIONS)).tolist() == [10] * 6
    x = torch.randn(1, 6, 14, 14)
    before = lenet5.c3(x)
    for source in range(6):
        changed = x.clone()
        changed[:, source] += 1
        moved = (lenet5.c3(changed) - before).abs().amax((0, 2, 3)) > 1e-6
        assert moved.tolist() == [source in sources for sources in C3_CONNECTIONS]


def test_subsampling_is_the_sum_of_four_times_a_coefficient_plus_a_bias(lenet5: LeNet5) -> None:
    x = torch.randn(2, 6, 28, 28)
    total = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
    torch.testing.assert_close(lenet5.s2(x), total * lenet5.s2.coefficient + lenet5.s2.bias)


def test_squash_maps_one_to_one() -> None:
    torch.testing.assert_close(
        squash(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-4, rtol=0
    )


def test_output_is_the_negated_squared_distance_to_a_code() -> None:
    codes = digit_codes()
    assert codes.shape == (10, 84)
    assert codes.abs().eq(1).all()
    scores = RadialBasis()(codes)
    assert scores.diagonal().eq(0).all()
    assert scores.argmax(1).tolist() == list(range(10))
    assert scores[0, 1] == -4 * (codes[0] != codes[1]).sum()
    # Distinct enough that no answer hangs on a few units.
    different = (codes[:, None] != codes).sum(2) + 84 * torch.eye(10)
    assert different.min() >= 8


def test_exports_with_c3_as_one_constant_kernel(lenet5: LeNet5) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        lenet5, (torch.randn(2, 1, 32, 32),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    proto = program.model_proto
    constants = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    kernels = [constants.get(node.input[1]) for node in proto.graph.node if node.op_type == "Conv"]
    assert kernels == [[6, 1, 5, 5], [16, 6, 5, 5], [120, 16, 5, 5]]
    onnx.checker.check_model(proto)
    session = session_of(proto)
    x = torch.randn(3, 1, 32, 32)
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(scores, lenet5(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_shipped_weights_reach_the_stored_accuracy_on_the_held_out_digits() -> None:
    arch = archs.get("lenet5")
    model = arch.build(10).eval()
    assert arch.published is not None
    model.load_state_dict(arch.published())
    digits = assets.digits()
    with safe_open(assets.LENET5_WEIGHTS, "pt") as stored:
        metadata = stored.metadata()
    assert len(digits.test) == int(metadata["held_out_images"]) >= 0.2 * 1797
    measured = train_lenet5.accuracy(model, digits.test, digits.test_labels)
    assert measured >= float(metadata["held_out_top1_percent"]) - 0.1
    assert measured >= 98


def test_assets_are_small_and_read_only() -> None:
    size = sum(path.stat().st_size for path in (assets.LENET5_WEIGHTS, assets.DIGITS))
    assert size < 500_000
    digits = assets.digits()
    assert digits.calibration.shape == (300, 32, 32, 1)
    assert digits.test.shape[1:] == (32, 32, 1)
    with pytest.raises(ValueError, match="read-only"):
        digits.test[0] = 0


def test_packaged_digits_are_the_documented_split() -> None:
    pytest.importorskip("sklearn")
    with safe_open(assets.LENET5_WEIGHTS, "pt") as stored:
        split = train_lenet5.split_digits(int(stored.metadata()["seed"]))
    digits = assets.digits()
    np.testing.assert_array_equal(split.test_labels, digits.test_labels)
    # Pillow may round a resized pixel differently in another version.
    assert np.abs(split.test.astype(int) - digits.test).max() <= 1
    trained_on = {image.tobytes() for image in split.train}
    assert {image.tobytes() for image in digits.calibration} <= trained_on
    assert not {image.tobytes() for image in digits.test} & trained_on
    assert np.bincount(split.test_labels).min() >= 0.25 * 170


def test_map_loss_is_equation_9() -> None:
    scores = torch.tensor([[-0.5, -3.0], [-4.0, -1.0]])
    first = 0.5 + np.log(np.exp(-train_lenet5.RUBBISH) + np.exp(-0.5) + np.exp(-3.0))
    second = 4.0 + np.log(np.exp(-train_lenet5.RUBBISH) + np.exp(-4.0) + np.exp(-1.0))
    loss = train_lenet5.map_loss(scores, torch.tensor([0, 0]))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_distort_keeps_shape_and_background() -> None:
    torch.manual_seed(0)
    images = torch.zeros(4, 1, 32, 32)
    images[:, :, 10:22, 14:18] = 1
    distorted = train_lenet5.distort(images)
    assert distorted.shape == images.shape
    assert distorted.min() >= 0
    assert distorted.max() <= 1
    assert not distorted[:, :, 0].any()
    assert not torch.allclose(distorted[0], distorted[1])


def test_training_writes_what_the_package_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    try:
        for folder in ("one", "two"):
            assert train_lenet5.main(["--epochs", "1", "--output", str(tmp_path / folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "held-out images" in capsys.readouterr().out
    weights = [tmp_path / folder / assets.LENET5_WEIGHTS.name for folder in ("one", "two")]
    tensors = []
    for path in weights:
        with safe_open(path, "pt") as stored:
            assert stored.metadata()["epochs"] == "1"
            tensors.append({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    with np.load(tmp_path / "one" / assets.DIGITS.name) as stored:
        assert stored["calibration"].dtype == np.uint8
