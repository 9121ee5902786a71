"""How an image becomes an input of a network, and who says so: timm, torchvision, the flags, or nobody."""

from collections.abc import Mapping
from dataclasses import replace
from math import floor
from typing import Any

from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS
from convoynet.exporter.archs.registry import Arch
from convoynet.exporter.config import INTERPOLATIONS, ExportConfig
from convoynet.exporter.data.images import Preprocess, pixels_text
from convoynet.exporter.errors import BadInput

# How what says who chose the preprocessing ends, where nobody did.
RESIZED = ", so the image is resized to the input size"
# ImageNet's statistics averaged over the channels.
_GREY_MEAN, _GREY_STD = (0.449,), (0.226,)


def of_timm(config: Mapping[str, Any]) -> Preprocess | None:
    """What timm's own evaluation does with images, from its configuration of a network; None where it is none of ours.

    The sides before the crop are rounded down, as there.
    """
    height, width = config["input_size"][1:]
    share = config.get("crop_pct") or 0.875
    sides = (floor(height / share), floor(width / share))
    mode, interpolation = config.get("crop_mode") or "center", config.get("interpolation") or "bilinear"
    if mode == "squash":
        resize: int | tuple[int, int] = sides
    elif mode == "center" and height == width:
        resize = sides[0]
    else:  # the image framed; or cut to other proportions
        return None
    if interpolation not in INTERPOLATIONS:
        return None
    return Preprocess((height, width), resize, tuple(config["mean"]), tuple(config["std"]), interpolation)


def of_module(module: object) -> tuple[Preprocess, str] | None:
    """What a network that timm made says of its images, and who says it; None where it says nothing that we do."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    config = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    try:
        found = of_timm(config)
    except (KeyError, TypeError, ValueError, BadInput):
        return None
    tag = f".{config['tag']}" if config.get("tag") else ""
    name = config.get("architecture") or type(module).__name__
    return None if found is None else (found, f"from timm's {name}{tag}")


def default(size: tuple[int, int], channels: int) -> Preprocess:
    """That of a network that says nothing of it: all of the image, and ImageNet's mean and standard deviation."""
    whole = replace(IMAGENET_PREPROCESS, size=size, resize=size)
    return whole if channels == 3 else replace(whole, mean=_GREY_MEAN, std=_GREY_STD)


def asked(arch: Arch, config: ExportConfig) -> tuple[Preprocess, str]:
    """The preprocessing of `arch` with what the flags change, and who says so.

    Raises:
        BadInput: the flags do not suit the network.
    """
    found, source = arch.preprocess, arch.preprocess_source
    if config.input_size not in (None, found.size):
        found, how = _at(found, config.input_size or found.size, published=config.weights == "default")
        source += how
    if config.mean is not None and config.std is not None:
        if len(config.mean) != found.channels:
            raise BadInput(f"--mean has {len(config.mean)} numbers, and {arch.name} takes {found.channels} channels")
        found = replace(found, mean=config.mean, std=config.std)
    require_suitable(arch.name, config, found.channels, pads=found.fit == "pad")
    resize = floor(max(found.size) / config.crop) if config.crop is not None else config.resize
    if resize is not None:
        source = source.removesuffix(RESIZED)
    found = replace(
        found,
        resize=resize or found.resize,
        interpolation=config.interpolation or found.interpolation,
        order=config.channel_order or found.order,
    )
    given = [
        f"--{option.replace('_', '-')}"
        for option in ("resize", "crop", "interpolation", "channel_order", "mean", "std")
        if getattr(config, option) is not None
    ]
    return found, f"{source}; {', '.join(given)} as given" if given else source


def require_suitable(name: str, config: ExportConfig, channels: int, *, pads: bool) -> None:
    """See that the flags suit what a network takes.

    Raises:
        BadInput: naming the flag and the network.
    """
    if pads and (config.resize is not None or config.crop is not None):
        option = "--resize" if config.resize is not None else "--crop"
        raise BadInput(f"{option}: {name} takes the whole image and pads it; leave the option out")
    if config.channel_order == "bgr" and channels == 1:
        raise BadInput(f"--channel-order bgr: {name} takes grey images; leave the option out")


def _at(preprocess: Preprocess, size: tuple[int, int], *, published: bool) -> tuple[Preprocess, str]:
    """The preprocessing at another size, and why it is that.

    Published weights are used to their share of an image; along the axis that grows more where they differ. What other
    weights were trained on at another size, the network's configuration does not say.
    """
    native = pixels_text(preprocess.size)
    growths = [new / old for new, old in zip(size, preprocess.size, strict=True)]
    if preprocess.fit == "crop" and not published:
        how = f", which is for {native} and says nothing of {pixels_text(size)}{RESIZED}"
        return replace(preprocess, size=size, resize=size), how
    if isinstance(preprocess.resize, int):
        resize: int | tuple[int, int] = max(1, round(preprocess.resize * max(growths)))
    else:
        high, wide = (max(1, round(side * growth)) for side, growth in zip(preprocess.resize, growths, strict=True))
        resize = high, wide
    how = f", in proportion from {native}" if preprocess.fit == "crop" else ""
    return replace(preprocess, size=size, resize=resize), how
