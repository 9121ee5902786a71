"""timm's networks as `Arch`: preprocessing, weights and number of classes come from timm's configuration of them.

timm is imported on first use: that takes over a second, and few networks are timm's.
"""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convoynet.exporter.archs.datasets import IMAGENET_CLASSES, imagenet_labels
from convoynet.exporter.archs.preprocessing import RESIZED, default, of_timm
from convoynet.exporter.archs.registry import Arch
from convoynet.exporter.errors import BadInput, reason

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_HUB_FILE = "model.safetensors"
_HUB = "hf-hub:"


def arch_from_timm(name: str, paper: str, weights: str) -> Arch:
    """Describe a network of timm's.

    Args:
        name: Its name in the registry.
        paper: Authors, year, title and where to find it.
        weights: timm's name of the network and its weights, such as "inception_v4.tf_in1k"; the classes are
            ImageNet's.
    """
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(weights)
    assert config is not None
    preprocess = of_timm(asdict(config))
    assert preprocess is not None
    return Arch(
        name=name,
        paper=paper,
        source="timm",
        num_classes=config.num_classes,
        preprocess=preprocess,
        preprocess_source=f"from timm's {weights}",
        build=partial(_build, weights),
        labels=imagenet_labels,
        published=partial(download, weights, config),
        published_name=f"timm {weights}",
    )


def named(name: str, size: tuple[int, int] | None) -> Arch:
    """The network that timm calls `name`, "hf-hub:OWNER/NAME" for a repository of Hugging Face's hub.

    Args:
        name: With or without the tag of its weights.
        size: (height, width) to build it for, where timm builds networks for one size; None: its own.

    Raises:
        BadInput: It has no such weights, or classifies nothing, or the hub cannot be asked.
    """
    from timm.models import get_pretrained_cfg

    config: PretrainedCfg | None
    if name.startswith(_HUB):
        config = _config_of_hub(name)
    else:
        try:
            config = get_pretrained_cfg(name)
        except RuntimeError as error:  # no such tag
            tags = [n for n in _with_tags(name.partition(".")[0]) if "." in n]
            raise BadInput(f"--arch timm:{name}: {reason(error)}; there are {', '.join(tags) or 'none'}") from error
    if config is None or not config.num_classes:
        raise BadInput(
            f"--arch {name}: timm's network has no classifier, it gives features; write a function that returns it "
            "with a head, and give --arch package.module:function"
        )
    channels, height, width = config.input_size
    other = config.fixed_input_size and size not in (None, (height, width))
    given: dict[str, Any] = {"img_size": size} if other else {}
    preprocess = of_timm(asdict(config))
    source = f"from timm's {name}"
    if preprocess is None:
        source = f"timm's {name} frames its images as nobody else does{RESIZED}"
        preprocess = replace(default((height, width), channels), mean=tuple(config.mean), std=tuple(config.std))
    has_weights = bool(config.hf_hub_id or config.url or config.file)
    return Arch(
        name=name,
        paper="As timm names it; timm's source says where it comes from.",
        source="timm",
        num_classes=config.num_classes,
        preprocess=preprocess,
        preprocess_source=source,
        build=partial(_build, name, **given),
        labels=partial(_labels, config),
        published=partial(download, name, config, **given) if has_weights else None,
        published_name=f"timm {name if '.' in name or not config.tag else f'{name}.{config.tag}'}"
        if has_weights
        else "",
    )


def _with_tags(network: str) -> list[str]:
    import timm

    return timm.list_models(f"{network}.*", pretrained=True)


def _config_of_hub(name: str) -> "PretrainedCfg":
    from timm.models import PretrainedCfg, load_model_config_from_hf

    repository = name.removeprefix(_HUB)
    try:
        config, _, _ = load_model_config_from_hf(repository)
        return PretrainedCfg(**config)
    # As in `file_from_hub`: which errors the client lets through depends on its version.
    except Exception as error:
        raise BadInput(
            f"--arch {name}: cannot read config.json of huggingface.co/{repository} ({reason(error)}); only timm's "
            "repositories have one that says enough"
        ) from error


def _labels(config: "PretrainedCfg") -> list[str]:
    """What the configuration calls the classes, or ImageNet in its several sizes; else their numbers."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    stated = config.label_names
    if stated and not isinstance(stated, str):
        described = config.label_descriptions or {}
        return [str(described.get(name, name)) for name in stated]
    if config.num_classes == IMAGENET_CLASSES:
        return imagenet_labels()
    subset = infer_imagenet_subset(asdict(config))
    if subset is None:
        return [str(index) for index in range(config.num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(config.num_classes)]


def _build(weights: str, num_classes: int, **given: Any) -> nn.Module:
    import timm

    return timm.create_model(weights, pretrained=False, num_classes=num_classes, **given)


def download(weights: str, config: "PretrainedCfg", **given: Any) -> dict[str, Tensor]:
    """The state dict of timm's `weights`, from where `config` says, with the hash of the file checked.

    Args:
        weights: timm's name of the network.
        config: timm's of it.
        given: What else the network is built with.

    Raises:
        OSError: The file cannot be had, or is not what Hugging Face's hub says.
        RuntimeError: It has not the hash that its name holds.
    """
    import timm

    timm.models.set_pretrained_check_hash(True)  # for files with a hash in their name; timm's default is not to
    overlay = {"file": str(file_from_hub(config.hf_hub_id))} if config.hf_hub_id else {"url": config.url}
    model = timm.create_model(weights, pretrained=True, pretrained_cfg_overlay=overlay, **given)
    return dict(model.state_dict())


def file_from_hub(repository: str) -> Path:
    """The weights of a Hugging Face repository, from the cache or downloaded and compared with their SHA-256.

    timm would load whatever arrives, and would try for most of a minute where there is no network.

    Raises:
        OSError: It cannot be downloaded, or is not what the hub says.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(hf_hub_download(repository, _HUB_FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # One request that is not repeated. The entity tag of a large file is its SHA-256.
        metadata = get_hf_file_metadata(hf_hub_url(repository, _HUB_FILE))
        file = Path(hf_hub_download(repository, _HUB_FILE))
    # The hub's client lets the errors of its HTTP library through, and which one that is depends on its version.
    except Exception as error:
        raise OSError(f"{_HUB_FILE} of huggingface.co/{repository}: {error}") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if metadata.etag != digest:
        file.resolve().unlink()  # a later run would take it from the cache
        file.unlink(missing_ok=True)
        raise OSError(
            f"{_HUB_FILE} of huggingface.co/{repository}: its SHA-256 starts with {digest[:16]}, the hub says"
            f" {metadata.etag}"
        )
    return file
