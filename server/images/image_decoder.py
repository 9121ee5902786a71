"""JPEG decoding on the GPU with nvJPEG, where the server is told to (`--image-decoder`)."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)

JpegDecoder = Callable[[bytes], NDArray[np.uint8]]
"""A whole colour JPEG to its pixels, uint8 [height, width, 3]; raises ValueError for one that it does not decode."""

# libjpeg interpolates the colour of subsampled images; nvJPEG does so on request, and is much nearer to it then.
_OPTIONS = ":fancy_upsampling=1"
_MISSING: Mapping[type[Exception], str] = {
    ImportError: "nvImageCodec",
    RuntimeError: "an NVIDIA GPU with its driver",
    ValueError: "nvJPEG",
}
"""What it means where nvImageCodec cannot be imported, makes no decoder, or does not decode."""


def gpu_jpeg_decoder(setting: str) -> JpegDecoder | None:
    """The decoder that `--image-decoder` asks for; None for the CPU's.

    Raises:
        ValueError: It is "gpu", and there is no GPU or no nvImageCodec: one line.
    """
    if setting == "cpu":
        return None
    try:
        decoder = NvJpegDecoder()
        written = io.BytesIO()
        Image.new("RGB", (16, 16)).save(written, "JPEG")
        decoder(written.getvalue())
    except (ImportError, RuntimeError, ValueError) as error:
        missing = next(words for kind, words in _MISSING.items() if isinstance(error, kind))
        if setting == "auto":
            log.info("JPEGs are decoded on the CPU: %s is not there", missing)
            return None
        raise ValueError(
            f"--image-decoder gpu needs {missing}, which is not there: pip install 'convoynet[gpu]' on a machine with "
            "a GPU, or use --image-decoder cpu"
        ) from error
    log.info("JPEGs are decoded on the GPU; their pixels differ a little from those of the CPU's decoder")
    return decoder


class NvJpegDecoder:
    """nvImageCodec's decoder, one for each thread that uses it. Pixels come back to the host, where they are resized.

    Args:
        on_cpu: Whether it is to decode with the libjpeg that it brings along, for which it needs no GPU.

    Raises:
        ImportError: nvImageCodec is not installed.
        RuntimeError: There is no GPU.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self._library: Any = import_module("nvidia.nvimgcodec")
        kinds = self._library.BackendKind
        # None but these: a decoder may otherwise be the CPU's, without a word.
        allowed = (kinds.CPU_ONLY,) if on_cpu else (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
        self._backends = [self._library.Backend(kind) for kind in allowed]
        self._device = self._library.NVIMGCODEC_DEVICE_CPU_ONLY if on_cpu else 0
        self._threads = threading.local()
        # As Pillow decodes: without EXIF's rotation, three colours of 8 bits.
        self._parameters = self._library.DecodeParams(
            apply_exif_orientation=False, color_spec=self._library.ColorSpec.SRGB, allow_any_depth=False
        )
        self._of_thread()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """See JpegDecoder."""
        image = self._of_thread().decode(self._library.CodeStream(data), params=self._parameters)
        host = None if image is None else image.cpu()
        if host is None:
            raise ValueError("nvJPEG does not decode this image")
        pixels: NDArray[np.uint8] = np.asarray(host)
        return pixels

    def _of_thread(self) -> Any:
        if not hasattr(self._threads, "decoder"):
            self._threads.decoder = self._library.Decoder(
                device_id=self._device, max_num_cpu_threads=1, backends=self._backends, options=_OPTIONS
            )
        return self._threads.decoder
