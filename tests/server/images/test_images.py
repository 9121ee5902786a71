"""Encoded images: right pixels or one line, within what was allowed, whatever the bytes are."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.images import images
from convoynet.server.images.images import ImageInput, image_input_from_json

MOST = 50_000_000


def image_input(size: int = 16, interpolation: str = "bilinear", color: str = "RGB", resize: int = 20) -> ImageInput:
    """The middle of a resized image."""
    stated = {"color": color, "resize": resize, "size": [size, size], "interpolation": interpolation}
    return image_input_from_json(json.dumps(stated), channels_last=True)


def written(image: Image.Image, form: str, **options: object) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """Soft colours."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG chunk by chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    extra = chunk(before[:4], before[4:]) if before else b""
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen(kind: int, *values: int) -> bytes:
    """A PNG of 4 x 4 equal pixels of 16 bits a channel."""
    return png(4, 4, 16, kind, (b"\0" + struct.pack(f">{len(values)}H", *values) * 4) * 4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (3, 200), (200, 3), (1, 90), (517, 2), (10, 10)])
def test_the_middle_alone_has_the_same_pixels(
    size: tuple[int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = image_input(interpolation=interpolation)
    whole = np.asarray(plan.fit(photo(*size)))
    monkeypatch.setattr(images, "_WHOLE_PIXELS", 0)
    assert np.abs(np.asarray(plan.fit(photo(*size))).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("size", [(1, 65500), (65500, 1), (2, 30000)])
def test_a_thin_image_is_not_resized_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def counted(image: Image.Image, to: tuple[int, int], *arguments: object) -> Image.Image:
        made.append(to[0] * to[1])
        return resize(image, to, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", counted)
    row = image_input(224, resize=256).decode(written(Image.new("RGB", size, (9, 8, 7)), "PNG"), MOST)
    assert (row == (9, 8, 7)).all()
    assert made
    assert max(made) < 1_000_000


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_header_that_promises_too_much_is_refused_before_anything_is_decoded(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(photo(), form)
    monkeypatch.setattr(Image.Image, "convert", None)
    monkeypatch.setattr("simplejpeg.decode_jpeg", None)
    with pytest.raises(Oversize, match="60x40 pixels is over the limit of 2399"):
        image_input().decode(data, 2399)


def test_what_decoding_takes_is_told_before_it_is_taken() -> None:
    told: list[int] = []

    @contextmanager
    def holding(size: int) -> Iterator[None]:
        told.append(size)
        yield
        told.append(-size)

    image_input().decode(written(photo(), "JPEG"), MOST, None, holding)
    assert told == [8 * 60 * 40, -8 * 60 * 40]


EXPECTED: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "16 bits of grey": (sixteen(0, 0x9C40), (0x9C,) * 3),
    "16 bits of colour": (sixteen(2, 0x1000, 0x80FF, 0xFFFF), (0x10, 0x80, 0xFF)),
    "16 bits of grey with alpha": (sixteen(4, 0x9C40, 0xFFFF), (0x9C,) * 3),
    "16 bits of colour with alpha": (sixteen(6, 0x1000, 0x80FF, 0xFFFF, 0xFFFF), (0x10, 0x80, 0xFF)),
    "1 bit": (written(Image.new("1", (9, 9), 1), "PNG"), (255,) * 3),
    "2 bits": (png(4, 4, 2, 0, (b"\0" + b"\xaa") * 4), (170,) * 3),
    "4 bits": (png(4, 4, 4, 0, (b"\0" + b"\x99\x99") * 4), (153,) * 3),
    "palette": (written(Image.new("RGB", (9, 9), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
                (1, 2, 3)),
    "grey with alpha": (written(Image.new("LA", (9, 9), (77, 255)), "PNG"), (77,) * 3),
    "CMYK": (written(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"), (0, 255, 255)),
    "grey JPEG": (written(Image.new("L", (16, 16), 99), "JPEG"), (99,) * 3),
    "progressive": (written(Image.new("RGB", (16, 16), (99, 99, 99)), "JPEG", progressive=True), (99,) * 3),
    "the first of an animation": (
        written(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        (1, 2, 3),
    ),
    "the first of an animated WEBP": (
        written(
            Image.new("RGB", (16, 16), (90, 90, 90)), "WEBP",
            save_all=True, append_images=[Image.new("RGB", (16, 16))], lossless=True,
        ),
        (90,) * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EXPECTED)
def test_unusual_images_have_the_right_pixels(what: str) -> None:
    data, pixel = EXPECTED[what]
    row: NDArray[np.uint8] = image_input(4, resize=4).decode(data, MOST)  # type: ignore[assignment]
    # JPEG rounds.
    assert np.abs(row.reshape(-1, 3).astype(int) - pixel).max() <= 2


def test_the_pixels_of_16_bits_are_grey_for_a_grey_network() -> None:
    assert (image_input(4, color="L", resize=4).decode(sixteen(0, 0x9C40), MOST) == 0x9C).all()


PHOTO = written(photo(), "JPEG")
BROKEN = {
    "nothing": b"",
    "a beginning": PHOTO[:4],
    "half": PHOTO[: len(PHOTO) // 2],
    "a size of 0": PHOTO[: (at := PHOTO.index(b"\xff\xc0")) + 5] + bytes(4) + PHOTO[at + 9 :],
    "no picture": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a PNG in name": b"\x89PNG\r\n\x1a\n<svg/>",
    "pixels that are not there": png(4, 4, 8, 2, b""),
    "another format": written(photo(), "GIF"),
}


def outcome(data: bytes, most: int = MOST) -> str | tuple[int, ...]:
    """The shape of the row, or what is refused."""
    try:
        return image_input().decode(data, most).shape
    except InvalidRequest as error:
        return str(error)


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_decoded_is_refused_in_one_line(what: str) -> None:
    assert outcome(BROKEN[what]) == f"{len(BROKEN[what])} bytes are not a readable image of a format in JPEG, PNG, WEBP"


def test_a_profile_or_a_text_of_200_mb_is_refused_in_one_line_or_passed_over() -> None:
    packed = zlib.compress(bytes(200_000_000), 9)
    for name in (b"iCCP", b"zTXt"):
        data = png(4, 4, 8, 2, bytes(52), name + b"a\0\0" + packed)
        refused = f"{len(data)} bytes are not a readable image of a format in JPEG, PNG, WEBP"
        assert outcome(data) in (refused, (16, 16, 3)), name


def test_scans_without_end_are_refused() -> None:
    data = written(photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    again = data[:last] + data[last:-2] * 100 + data[-2:]
    with pytest.raises(InvalidRequest, match="scans, 100 are allowed"):
        image_input().decode(again, MOST)


def test_two_headers_that_differ_are_judged_by_the_one_that_was_measured() -> None:
    """A frame header behind the first: libraries differ in which of them they take."""
    at = PHOTO.index(b"\xff\xc0")
    frame = PHOTO[at : at + 2 + int.from_bytes(PHOTO[at + 2 : at + 4], "big")]
    large = frame[:5] + struct.pack(">HH", 60000, 60000) + frame[9:]
    for first, second in ((large, frame), (frame, large)):
        with pytest.raises(InvalidRequest):
            image_input().decode(PHOTO[:at] + first + second + PHOTO[at + len(frame) :], 10_000)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_images_give_pixels_or_one_line(form: str, data: st.DataObject) -> None:
    damaged = bytearray(written(photo(16, 16), form))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    found = outcome(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]), 10**6)
    assert found == (16, 16, 3) or (isinstance(found, str) and "\n" not in found)
