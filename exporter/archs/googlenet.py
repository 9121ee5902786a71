"""GoogLeNet (Inception v1): C. Szegedy et al., "Going Deeper with Convolutions", 2014.

The network is torchvision's. Its two auxiliary classifiers (section 5) serve training alone: the network is built
without them, and their tensors in published weights are left out.
"""

from dataclasses import replace

from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Szegedy et al. 2014, Going Deeper with Convolutions, arXiv:1409.4842"


@register("googlenet")
def googlenet() -> Arch:
    """The network of torchvision without the auxiliary classifiers."""
    arch = arch_from_torchvision("googlenet", PAPER, aux_logits=False, init_weights=True)
    return replace(arch_with_inception_input(arch), training_only=("aux1.", "aux2."))


def arch_with_inception_input(arch: Arch) -> Arch:
    """Let the preprocessing do what torchvision's Inceptions do with `transform_input`.

    Their published weights came from TensorFlow and want (x - 0.5) / 0.5. torchvision normalises with the usual
    mean and deviation and makes the one from the other in the network, which then need not be exported.
    """
    return replace(arch, preprocess=replace(arch.preprocess, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
