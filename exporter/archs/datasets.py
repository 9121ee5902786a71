"""What our own networks share with the published ones of the same data set: class names and preprocessing."""

from convoynet.exporter.data.images import Preprocess

IMAGENET_PREPROCESS = Preprocess(size=(224, 224), resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
IMAGENET_CLASSES = 1000
CIFAR10_PREPROCESS = Preprocess(size=(32, 32), resize=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def imagenet_labels() -> list[str]:
    """The 1,000 classes of ILSVRC 2012, in the order of their WordNet ids."""
    from torchvision.models import AlexNet_Weights

    return list(AlexNet_Weights.DEFAULT.meta["categories"])


def cifar10_labels() -> list[str]:
    """The ten classes, in alphabetical order."""
    return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
