"""A classifier as a fully convolutional network: J. Long, E. Shelhamer, T. Darrell, 2015, section 3.1.

The first fully connected layer sees the whole map of the network's own input size: as a convolution with a kernel of
that size it slides over a larger map, and the layers behind it become 1x1 convolutions. Where the classifier averages
the map before a fully connected layer, the average slides instead. On an image of the network's own size the result
is one logit a class, the classifier's; on a larger one, a map of them.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from convoynet.exporter.archs.dry_run import dry_run, evaluating
from convoynet.exporter.errors import BadInput

# Sums of many products in another order; a head that was misread is wrong by about its own size.
_MAX_REL_ERROR = 1e-4
# What gives the same on a map of vectors as on one vector.
_ELEMENTWISE = (
    nn.Dropout, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.Sigmoid, nn.SiLU,
    nn.Tanh,
)  # fmt: skip


def fully_convolutional(network: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """The network with its head as convolutions, sharing its tensors.

    It knows heads of torchvision's form: `features`, an average pooling or none, and fully connected layers called
    `classifier` (VGG, AlexNet, MobileNet, EfficientNet), or a ResNet's `avgpool` and `fc`. Except on the meta device,
    both networks run on a noise image to see that they agree.

    Args:
        network: from [N, C, H, W] to logits [N, classes]; stays as it is.
        input_size: (channels, height, width) that its head is made for.

    Returns:
        A module from [N, C, H', W'], at least as large, to logits [N, classes, h, w].

    Raises:
        BadInput: the head is of another form.
    """
    trunk, head = _parts(network)
    layers: list[nn.Module] = []
    # What a fully connected layer sees: the first one the whole map or its average, the others one position.
    kernel = (1, 1)
    first = next((layer for layer in head if isinstance(layer, nn.Linear)), None)
    if first is not None:
        channels, *size = _map_shape(trunk, input_size)
        if first.in_features == channels * size[0] * size[1]:
            kernel = (size[0], size[1])
        elif first.in_features == channels:
            layers.append(nn.AvgPool2d((size[0], size[1]), stride=1))
        else:
            raise _unknown_head(f"reads {first.in_features} numbers of a map of {channels}x{size[0]}x{size[1]}")
    for layer in head:
        if isinstance(layer, nn.Linear):
            layers.append(_convolution(layer, kernel if layer is first else (1, 1)))
        elif isinstance(layer, _ELEMENTWISE):
            layers.append(layer)
        else:
            raise _unknown_head(f"has a {type(layer).__name__}")
    result = nn.Sequential(OrderedDict(features=trunk, classifier=nn.Sequential(*layers)))
    result.train(network.training)
    if not any(tensor.is_meta for tensor in network.state_dict().values()):
        _require_equal(network, result, input_size)
    return result


def _parts(network: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """What makes the map, and the layers behind its pooling or flattening."""
    from torchvision.models import DenseNet, ResNet

    if isinstance(network, ResNet):
        children = OrderedDict(network.named_children())
        del children["avgpool"]
        head: nn.Module = children.pop("fc")
        return nn.Sequential(children), [head]
    trunk, found = getattr(network, "features", None), getattr(network, "classifier", None)
    if isinstance(network, DenseNet):
        trunk = nn.Sequential(network.features, nn.ReLU())
    if not isinstance(trunk, nn.Module) or not isinstance(found, nn.Sequential | nn.Linear):
        raise _unknown_head("has no `features` and `classifier`")
    return trunk, list(found) if isinstance(found, nn.Sequential) else [found]


def _map_shape(trunk: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, ...]:
    """(channels, height, width) of the features of one image."""
    maps = dry_run(trunk, input_size)
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise _unknown_head("gets no map of features")
    return tuple(maps.shape[1:])


def _convolution(layer: nn.Linear, kernel: tuple[int, int]) -> nn.Conv2d:
    """The same weights as a convolution; flattening a map had put its channels first."""
    inputs = layer.in_features // (kernel[0] * kernel[1])
    with torch.device("meta"):  # its own tensors would be made for nothing
        made = nn.Conv2d(inputs, layer.out_features, kernel, bias=layer.bias is not None)
    made.weight = nn.Parameter(layer.weight.detach().view(made.weight.shape))
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach())
    return made


def _require_equal(network: nn.Module, result: nn.Module, input_size: tuple[int, int, int]) -> None:
    noise = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
    with evaluating(network), evaluating(result), torch.no_grad():
        wanted, got = network(noise), result(noise).flatten(1)
    limit = _MAX_REL_ERROR * float(wanted.abs().max())
    if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=0, atol=limit, equal_nan=True):
        raise _unknown_head("does more than its layers say")


def _unknown_head(reason: str) -> BadInput:
    return BadInput(
        f"--fully-convolutional knows heads like those of VGG, AlexNet, ResNet and MobileNet, and this one {reason}; "
        "leave the option out, or let your own factory make the convolutions"
    )
