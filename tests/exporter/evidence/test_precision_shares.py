import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from convoynet.exporter.evidence.precision_shares import Shares, precision_shares
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_fp16
from convoynet.exporter.quantization.quantize import layers, quantize
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

CONV, HEAD = 3 * 16 * 9 * 16 * 16, 16 * 10


class OfTheImage(nn.Module):
    """A product of two activations in the place of a layer with weights."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.product = product
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).flatten(2)
        x = torch.einsum("bct,bdt->bcd", x, x) if self.product == "einsum" else x @ x.transpose(1, 2)
        logits: Tensor = self.head(x.mean(2))
        return logits


class Computed(nn.Module):
    """Weights that are computed, shared by two layers, and reached through Reshape, Transpose and Cast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = weight_norm(nn.Conv2d(3, 16, 3, stride=2, padding=1))
        self.twice = spectral_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.across = nn.Parameter(torch.randn(16, 5, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        weights = self.across.reshape(16, 10).transpose(0, 1).to(torch.float32) * 2
        return nn.functional.linear(x.mean((2, 3)), weights)


def int8(network: nn.Module, keep_float: tuple[str, ...] = ()) -> tuple[onnx.ModelProto, Shares]:
    model = onnx_from_torch(network.eval(), PREPROCESS, uint8_input=True)
    kept = [layers(model, "cpu")[int(index)] for index in keep_float]
    quantized = quantize(model, calibrate(model, [pixels(4)], "mse"), "cpu", kept)
    shares = precision_shares(quantized, "int8")
    assert shares is not None
    return model, shares


def test_all_of_a_network_of_convolutions_is_int8() -> None:
    _, shares = int8(small_net())
    assert list(shares.macs) == ["int8"]
    assert shares.line == "100.0% INT8"
    assert not shares.others("int8")
    assert not shares.warning("int8")


def test_computed_weights_are_folded() -> None:
    _, shares = int8(Computed())
    assert shares.line == "100.0% INT8"
    assert len(shares.parts) == 4


def test_layers_that_are_kept_in_float_are_named() -> None:
    _, shares = int8(small_net(), keep_float=("1", "3"))
    assert [part.why for part in shares.others("int8")] == ["kept in float", "kept in float"]
    assert "again.0" in shares.warning("int8") or "again" in shares.warning("int8")
    assert shares.to_json("int8")["others"][0]["macs"] == 32 * 32 * 9 * 16 * 16


@pytest.mark.parametrize("product", ["matmul", "einsum"])
def test_a_product_of_two_activations_is_counted_and_named(product: str) -> None:
    _, shares = int8(OfTheImage(product))
    product_macs = 16 * 16 * 256
    assert shares.macs == {"int8": CONV + HEAD, "fp32": product_macs}
    share = (CONV + HEAD) / (CONV + HEAD + product_macs)
    assert shares.warning("int8").startswith(f"only {share:.1%} of the multiply-adds are in INT8; not ")
    assert "a product of two activations" in shares.warning("int8")


def test_half_precision_is_told_beside() -> None:
    model = onnx_from_torch(OfTheImage("matmul").eval(), PREPROCESS, uint8_input=True)
    quantized = quantize(model, calibrate(model, [pixels(4)], "mse"), "gpu")
    shares = precision_shares(to_fp16(quantized), "int8")
    assert shares is not None
    assert set(shares.macs) == {"int8", "fp16"}


def test_what_has_no_known_shapes_is_not_counted() -> None:
    model = onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)
    model.graph.input.append(model.graph.input[0])
    model.graph.input[1].name = "another"
    assert precision_shares(model, "int8") is None


def test_a_share_below_all_is_never_told_as_all() -> None:
    model, _ = int8(small_net())
    exact = precision_shares(model, "int8")
    assert exact is not None
    assert exact.line == "100.0% FP32"
    some = Shares(
        (*exact.parts, *(type(exact.parts[0])("one", "Gemm", macs, "int8", "") for macs in (np.int64(1).item(),)))
    )
    assert some.line == "99.9% FP32, < 0.1% INT8"
