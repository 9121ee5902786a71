"""timm's networks as `Arch`: preprocessing, weights and number of classes come from timm's configuration of them.

timm is imported on first use: that takes over a second, and few networks are timm's.
"""

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from convoynet.exporter.archs.datasets import imagenet_labels
from convoynet.exporter.archs.preprocessing import of_timm
from convoynet.exporter.archs.registry import Arch

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_HUB_FILE = "model.safetensors"


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


def _build(weights: str, num_classes: int) -> nn.Module:
    import timm

    return timm.create_model(weights, pretrained=False, num_classes=num_classes)


def download(weights: str, config: "PretrainedCfg") -> dict[str, Tensor]:
    """The state dict of timm's `weights`, from where `config` says, with the hash of the file checked.

    Raises:
        OSError: The file cannot be had, or is not what Hugging Face's hub says.
        RuntimeError: It has not the hash that its name holds.
    """
    import timm

    timm.models.set_pretrained_check_hash(True)  # for files with a hash in their name; timm's default is not to
    overlay = {"file": str(file_from_hub(config.hf_hub_id))} if config.hf_hub_id else {"url": config.url}
    model = timm.create_model(weights, pretrained=True, pretrained_cfg_overlay=overlay)
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
