"""Images where --calibration names none: noise, or noise that a trained network takes for what it was trained on."""

from torch import nn

from convoynet.exporter.archs.weights import Weights
from convoynet.exporter.data.images import has_packaged_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.onnx_asked import is_onnx
from convoynet.exporter.pipeline.preflight import Task
from convoynet.exporter.running.matched_images import SECONDS, Wish, has_statistics, match_statistics
from convoynet.exporter.running.pictures import Pictures, divide


def made_pictures(task: Task, module: nn.Module, weights: Weights, pictures: Pictures) -> Pictures:
    """The images to work with where no folder of them was given, and a line to mind.

    Args:
        task: the export; gets the line.
        module: the network with its weights, as it is deployed.
        weights: where they are from.
        pictures: packaged images or noise, loaded already.

    Raises:
        BadInput: --made-images statistics, and the network has none.
    """
    config, preprocess = task.config, task.arch.preprocess
    if config.calibration is not None:
        return pictures
    found = has_statistics(module)
    if config.made_images == "statistics" and not found:
        raise BadInput(
            f"--made-images statistics: {task.arch.name} has no batch normalisation that remembers its training; give "
            "real images with --calibration DIR, or use noise"
        )
    # Without quantization the images only check, and noise does that.
    sensible = found and weights.trained and config.quantization is not None and not has_packaged_images(preprocess)
    if config.made_images == "noise" or not (sensible or config.made_images):
        why = (
            ""
            if found or is_onnx(config.arch) or config.quantization is None or has_packaged_images(preprocess)
            else _NO_STATISTICS
        )
        task.caveats.append(f"no --calibration folder was given: {pictures.calibration_source}{why}")
        return pictures
    numbers = task.arch.task != "classification" or config.task in ("regression", "embedding")
    classes = 0 if numbers else len(task.labels)
    wish = Wish(config.calibration_samples + len(pictures.check), config.seed)
    matched = match_statistics(module, preprocess, classes, wish, task.progress)
    source = (
        f"{len(matched.images)} images made for {task.arch.name} from its batch-norm statistics (seed {config.seed}, "
        f"{matched.steps} steps), not photographs: give real ones with --calibration DIR"
    )
    task.caveats.append(f"no --calibration folder was given: {source}")
    if not matched.finished:
        task.caveats.append(
            f"making images ended after {SECONDS:g} s, before all steps were done: another export may make others"
        )
    made = divide(matched.images, source, config.calibration_samples, len(pictures.check))
    if task.labelled:
        return Pictures(matched.images, pictures.check, source, pictures.check_source)
    return made


_NO_STATISTICS = " (it has no batch-norm statistics to make better ones from)"
