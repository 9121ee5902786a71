"""JPEG decoding on the GPU: when it is used, and what it makes of an image."""

from __future__ import annotations

import io
import json
import logging
from importlib.util import find_spec

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from convoynet.server.gpus import visible_gpus
from convoynet.server.images import image_decoder
from convoynet.server.images.image_decoder import NvJpegDecoder, gpu_jpeg_decoder
from convoynet.server.images.images import ImageInput, image_input_from_json

PREPROCESS = {"color": "RGB", "resize": 16, "size": [16, 16], "interpolation": "bilinear"}
without_gpu = pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU, and nothing is missing")
with_library = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None,
    reason="nvImageCodec is part of the gpu extra",
)


def _photo(form: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    """Soft colours, as photographs have them: noise would show any decoder's rounding at its worst."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).resize((203, 155), Image.Resampling.BICUBIC).convert(mode).save(written, form, **options)
    return written.getvalue()


class Decoder:
    """Pixels of one colour, or a refusal; counts its calls."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.calls, self.refuses = 0, refuses

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        self.calls += 1
        if self.refuses:
            raise ValueError("not this one")
        return np.full((155, 203, 3), 77, np.uint8)


@pytest.fixture
def image() -> ImageInput:
    return image_input_from_json(json.dumps(PREPROCESS), channels_last=True)


def test_the_decoder_that_is_given_makes_the_pixels(image: ImageInput) -> None:
    decoder = Decoder()
    assert (image.decode(_photo(), 10**6, decoder) == 77).all()
    assert (image.decode(_photo(), 10**6) != 77).any()
    assert decoder.calls == 1


def test_what_it_refuses_the_cpu_decodes(image: ImageInput) -> None:
    decoder = Decoder(refuses=True)
    np.testing.assert_array_equal(image.decode(_photo(), 10**6, decoder), image.decode(_photo(), 10**6))
    assert decoder.calls == 1


@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
def test_other_images_never_reach_it(image: ImageInput, form: str, mode: str) -> None:
    decoder = Decoder()
    image.decode(_photo(form, mode), 10**6, decoder)
    assert decoder.calls == 0


def test_the_cpu_decodes_by_default() -> None:
    assert gpu_jpeg_decoder("cpu") is None


@without_gpu
def test_without_a_gpu_the_setting_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"--image-decoder gpu needs .* use --image-decoder cpu") as caught:
        gpu_jpeg_decoder("gpu")
    assert "\n" not in str(caught.value)


@without_gpu
def test_auto_says_that_the_cpu_decodes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, image_decoder.__name__)
    assert gpu_jpeg_decoder("auto") is None
    assert "JPEGs are decoded on the CPU" in caplog.messages[0]


def _differences(decoder: NvJpegDecoder, **options: object) -> NDArray[np.int_]:
    data = _photo(quality=90, **options)
    ours = decoder(data)
    assert (ours.dtype, ours.shape) == (np.uint8, (155, 203, 3))
    differences: NDArray[np.int_] = np.abs(ours.astype(int) - simplejpeg.decode_jpeg(data))
    return differences


@with_library
@pytest.mark.parametrize("progressive", [False, True])
def test_the_library_decodes_as_it_is_called(progressive: bool) -> None:
    decoder = NvJpegDecoder(on_cpu=True)
    for subsampling in (0, 2):
        assert _differences(decoder, subsampling=subsampling, progressive=progressive).max() <= 2
    for broken in (b"", b"hello", _photo("PNG")[:100]):
        with pytest.raises((ValueError, RuntimeError)):
            decoder(broken)


@pytest.mark.gpu
@with_library
@pytest.mark.skipif(not visible_gpus(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_gpu_decodes_nearly_the_same_pixels(subsampling: int) -> None:
    decoder = gpu_jpeg_decoder("gpu")
    assert isinstance(decoder, NvJpegDecoder)
    differences = _differences(decoder, subsampling=subsampling)
    assert differences.mean() < 1
    assert differences.max() <= 16
