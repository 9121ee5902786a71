"""Which images calibrate and which check: never the same ones, as far as there are enough."""

from dataclasses import dataclass

import numpy as np

from convoynet.exporter.running.runtime import Images


@dataclass(frozen=True)
class Pictures:
    """uint8 NHWC images: some that calibrate, others that check, and one line each on where they came from."""

    calibration: Images
    check: Images
    calibration_source: str
    check_source: str


def divide(images: Images, source: str, samples: int, checks: int) -> Pictures:
    """Hold out up to `checks` images and calibrate on up to `samples` others; a single image has to do both."""
    if len(images) == 1:
        return Pictures(images, images, source, source)
    # Evenly spread, so that both parts see every class of a sorted folder.
    spare = max(len(images) - samples, len(images) // 4, 1)
    held_out = np.linspace(0, len(images) - 1, min(checks, spare)).astype(np.intp)
    others = np.delete(np.arange(len(images)), held_out)[:samples]
    used, check = images[others], images[held_out]
    return Pictures(used, check, part_of(used, source), f"{len(check)} held out from {source}")


def part_of(used: Images, source: str) -> str:
    """Say that `used` are some of the images of `source`, unless it says so itself."""
    count, _, rest = source.partition(" of ")
    return f"{len(used)} of {rest}" if rest and count.isdecimal() else f"{len(used)} of {source}"
