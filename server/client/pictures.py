"""Pictures of what a model saw: an image with its classes below or as a coloured mask, or with boxes of its objects."""

from __future__ import annotations

import colorsys
import io
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from convoynet.server.client.results import Detection, Prediction, Segmentation
from convoynet.server.images.images import FORMATS, converted

Color = tuple[int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_MASK_OPACITY = 0.5
# Of the colour of no evidence.
_FAINTEST = 0.2
# Written into each picture, so that a later run knows the files that it may replace.
_MADE_BY = ("Software", "convoy predict")
# Fractional part of the golden ratio: hues of any run of class indices lie far from each other.
_HUE_STEP = 0.618034


def classification_picture(data: bytes, found: Sequence[Prediction]) -> Image.Image:
    """The encoded image with its classes and their scores in a strip below it."""
    image = _opened(data)
    return _with_legend(image, [(f"{each.label} {each.score:.2f}", box_color(each.class_index)) for each in found])


def segmentation_picture(data: bytes, found: Segmentation) -> Image.Image:
    """The encoded image with a translucent mask in Pascal VOC's colours; the legend is a strip below it.

    The background, where there is a class of that name, and what the network did not see stay as they are.
    """
    image = _opened(data)
    drawn = [share for share in found.shares if share.label.strip("_").lower() != "background"]
    palette = np.zeros((max((share.class_index for share in found.shares), default=0) + 1, 3), np.uint8)
    marked = np.zeros(len(palette) + 1, np.uint8)  # the last one is for -1
    for share in drawn:
        palette[share.class_index] = voc_color(share.class_index)
        marked[share.class_index] = 255
    tinted = Image.blend(image, Image.fromarray(_looked_up(palette, found.classes)), _MASK_OPACITY)
    image = Image.composite(tinted, image, Image.fromarray(_looked_up(marked, found.classes)))
    return _with_legend(image, [(share.label, voc_color(share.class_index)) for share in drawn])


def detection_picture(data: bytes, found: Sequence[Detection]) -> Image.Image:
    """The encoded image with a box and a caption for each object, those with higher scores on top."""
    image = _opened(data)
    draw = ImageDraw.Draw(image)
    font, width = _font(image), max(2, min(image.size) // 200)
    for each in reversed(found):
        left, top, right, bottom = (round(edge) for edge in each.box)
        # Pillow draws the far edges too: a box ends before them.
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(corners, outline=box_color(each.class_index), width=width)
    for each in reversed(found):
        _caption(draw, each, font, image.width)
    return image


def explanation_picture(data: bytes, evidence: NDArray[np.int32]) -> Image.Image:
    """The encoded image under the colours of its evidence, from blue for little to red for most.

    Args:
        data: the image.
        evidence: [height, width] of the image, 0 to 255; -1 where the network did not see it, which stays as it is.
    """
    pixels = np.asarray(_opened(data), np.float32)
    share = evidence[..., None].clip(0) / np.float32(255)
    # Blue, cyan, green, yellow, red.
    color = 255 * (1.5 - np.abs(4 * share - np.array([3, 2, 1], np.float32))).clip(0, 1)
    opacity = np.where(evidence[..., None] < 0, 0, _FAINTEST + (_MASK_OPACITY - _FAINTEST) * share)
    return Image.fromarray(np.rint(pixels + opacity * (color - pixels)).astype(np.uint8))


def voc_color(index: int) -> Color:
    """The colour of a class in Pascal VOC: the bits of the index go to red, green and blue in turn, highest first."""
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (index >> bit & 1) << 7 - bit // 3
    return channels[0], channels[1], channels[2]


def box_color(index: int) -> Color:
    """A bright colour for a class, far from those of the classes next to it."""
    red, green, blue = colorsys.hsv_to_rgb(index * _HUE_STEP % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG; its folder is made where it is missing.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_picture(picture))


def encoded_picture(picture: Image.Image) -> bytes:
    """A PNG that says who made it."""
    marks, written = PngImagePlugin.PngInfo(), io.BytesIO()
    marks.add_text(*_MADE_BY)
    picture.save(written, "PNG", pnginfo=marks)
    return written.getvalue()


def picture_paths(images: Sequence[Path], folder: Path) -> list[Path]:
    """Where the picture of each image goes: <stem>.png in the folder, or <stem>-2.png and so on.

    No two images share a name, and only files that an earlier run made are replaced.
    """
    taken: set[str] = set()
    paths = []
    for image in images:
        for number in count(1):
            name = f"{image.stem}.png" if number == 1 else f"{image.stem}-{number}.png"
            if name.casefold() not in taken and is_free(folder / name):
                break
        taken.add(name.casefold())
        paths.append(folder / name)
    return paths


def is_free(path: Path) -> bool:
    """Whether nothing is there, as far as one can see, or an earlier picture."""
    if not os.path.lexists(path):
        return True
    try:
        with Image.open(path) as image:
            return image.info.get(_MADE_BY[0]) == _MADE_BY[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _opened(data: bytes) -> Image.Image:
    """The pixels as the server sees them: without EXIF's rotation, opaque."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return converted(image, "RGB")


def _looked_up(table: NDArray[np.uint8], classes: NDArray[np.int32]) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = table[classes]
    return found


def _font(image: Image.Image) -> _Font:
    return ImageFont.load_default(max(12, min(image.size) // 35))


def _caption(draw: ImageDraw.ImageDraw, each: Detection, font: _Font, image_width: int) -> None:
    """The label and score on a filled ground, above the box where there is room, within the picture."""
    text = f"{each.label} {each.score:.2f}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(round(each.box[0]), image_width - width))
    y = round(each.box[1]) - height
    y = y if y >= 0 else round(each.box[1])
    ground = box_color(each.class_index)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
    draw.text((x + 3 - left, y + 3 - top), text, fill=_readable_on(ground), font=font)


def _readable_on(ground: Color) -> Color:
    """Black or white, by the ground's luma (ITU-R BT.601)."""
    red, green, blue = ground
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, Color]]) -> Image.Image:
    """The image with a white strip below it that names the colours; no pixel of the image is covered."""
    if not entries:
        return image
    font = _font(image)
    _, top, _, bottom = font.getbbox("Ag")
    box = round(bottom - top)
    line, gap = round(1.6 * box), box // 2
    widths = [gap + box + gap + round(font.getlength(label)) + gap for label, _ in entries]
    width = max(image.width, *widths)
    places, x, y = [], 0, gap
    for each in widths:
        if x + each > width:
            x, y = 0, y + line
        places.append((x + gap, y + image.height))
        x += each
    picture = Image.new("RGB", (width, image.height + y + line), "white")
    picture.paste(image)
    draw = ImageDraw.Draw(picture)
    for (label, color), (left, upper) in zip(entries, places, strict=True):
        draw.rectangle((left, upper, left + box - 1, upper + box - 1), fill=color)
        draw.text((left + box + gap, upper - top), label, fill="black", font=font)
    return picture
