"""What ships with the package: a trained LeNet-5, the digits that it was trained and tested on, the zoo's table.

The digits are the "Optical Recognition of Handwritten Digits" data set (E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0) as scikit-learn carries it: 1,797 images of 8x8
pixels, 17 grey levels. `convoynet.exporter.studies.train_lenet5` enlarged them to 32x32, split them, and wrote these
files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDER = Path(__file__).parent
LENET5_WEIGHTS = FOLDER / "lenet5-digits.safetensors"
DIGITS = FOLDER / "digits.npz"
ZOO = FOLDER / "zoo.json"  # written by convoynet.exporter.archs.table


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, white ink on black.

    Attributes:
        calibration: uint8 [n, 32, 32, 1], a part of the training images.
        test: uint8 [m, 32, 32, 1], all held-out images.
        test_labels: int64 [m], 0..9.
    """

    calibration: NDArray[np.uint8]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@cache
def digits() -> Digits:
    """The packaged digits; the arrays are shared and read-only."""
    import numpy as np

    with np.load(DIGITS) as stored:
        arrays = [stored[name] for name in ("calibration", "test", "test_labels")]
    for array in arrays:
        array.setflags(write=False)
    return Digits(*arrays)
