"""torchvision's networks as `Arch`: preprocessing, labels and weights come from its default weights enum.

torchvision is imported on first use: it takes as long as PyTorch itself, and our own networks need none of it.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from convoynet.exporter.archs import facts
from convoynet.exporter.archs.registry import Arch, get
from convoynet.exporter.data.images import Preprocess

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

DAMPING = 0.3
_EPSILON = 1e-5  # PyTorch's


def arch_from_torchvision(name: str, paper: str, *, damped: bool = False, **options: bool | float | None) -> Arch:
    """Describe torchvision's network `name` with its DEFAULT weights.

    Args:
        name: torchvision's name, such as "resnet50".
        paper: Authors, year, title and where to find it.
        damped: Whether random weights need `damp_residuals`.
        options: Passed to torchvision's builder.
    """
    from torchvision.models import get_model, get_model_weights

    # The enum's DEFAULT member is an alias that the stubs of Enum do not know.
    weights: WeightsEnum = get_model_weights(name).DEFAULT

    def build(num_classes: int) -> nn.Module:
        network: nn.Module = get_model(name, weights=None, num_classes=num_classes, **options)
        if damped:
            damp_residuals(network)
        return network

    return Arch(
        name=name,
        paper=paper,
        source="torchvision",
        num_classes=len(weights.meta["categories"]),
        preprocess=_preprocess(weights),
        preprocess_source=f"from torchvision's {weights}",
        build=build,
        labels=partial(list, weights.meta["categories"]),
        published=partial(state_dict, weights),
        published_name=f"torchvision {weights}",
    )


def named(name: str) -> Arch:
    """Describe torchvision's classifier `name`: as the zoo does where it has it, else with the defaults."""
    recorded = facts.recorded().get(name)
    if recorded is not None and recorded.source == "torchvision":
        return get(name)
    return arch_from_torchvision(name, "As torchvision names it; its documentation cites the paper.")


def _preprocess(weights: "WeightsEnum") -> Preprocess:
    transforms = weights.transforms()
    crop = transforms.crop_size[0]
    return Preprocess(
        size=(crop, crop),
        resize=transforms.resize_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )


def state_dict(weights: "WeightsEnum") -> dict[str, Tensor]:
    """Published weights, downloaded or from the cache; a hash in the address is checked."""
    return dict(weights.get_state_dict(progress=False, check_hash=True))


def damp_residuals(model: nn.Module) -> None:
    """Give the last batch norm of each residual branch a scale of DAMPING, which any loaded weights replace.

    Under random weights a deep residual network amplifies the rounding of its first layers a hundred or a thousand
    times, and so says little about an export. P. Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1, begin
    at 0 for the sake of training; here the branches have to matter.
    """
    from torchvision.models.efficientnet import MBConv
    from torchvision.models.resnet import Bottleneck

    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, DAMPING)
        elif isinstance(module, MBConv) and module.use_res_connect:
            nn.init.constant_(module.block[-1][1].weight, DAMPING)


def follow_frozen(network: nn.Module) -> None:
    """Let weights that are loaded decide the epsilon of batch normalisation.

    torchvision sets it to 0 where it loads some of its detectors, whose normalisation was frozen in training, and
    keeps PyTorch's where it is trained. Frozen normalisation has no counters in a state dict.
    """
    network.register_load_state_dict_pre_hook(_set_epsilon)  # type: ignore[no-untyped-call]


def _set_epsilon(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    counted = any(name.startswith(prefix) and name.endswith("num_batches_tracked") for name in tensors)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = _EPSILON if counted else 0.0
