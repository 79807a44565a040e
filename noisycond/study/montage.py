"""Samples of several runs in one picture, as a small PNG."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from noisycond.pictures import caption_font


MOST_BYTES = 200_000  # of a picture: a report holds all of them


def montage(pictures: Sequence[tuple[str, Image.Image]]) -> tuple[Image.Image, int]:
    """Pictures in rows of two, or up to three small ones in one, each with its title above. Small ones are enlarged by
    a whole number (nearest neighbour), large ones reduced by one, and colours made fewer, until the whole takes no
    more bytes than a figure may.

    Returns:
        The picture, and by what number it is enlarged, or, negative, reduced.
    """
    pictures = [(title, _plain(picture)) for title, picture in pictures]
    longest = max(max(picture.size) for _, picture in pictures)
    enlarged = max(1, 400 // longest)
    tries = [1] if enlarged > 1 else range(-(-longest // 700), max(1, longest // 64) + 1)
    for reduced in tries:
        columns = len(pictures) if len(pictures) <= 3 and longest * enlarged <= 450 * reduced else 2
        placed = _placed([(title, _sized(picture, enlarged, reduced)) for title, picture in pictures], columns)
        # A few grey levels are told apart as little as many; of colours it takes more.
        for colours in (None, 256, 128, 64) if placed.mode == "RGB" else (None, 64, 48, 32, 24):
            whole = placed if colours is None else placed.quantize(colours, dither=Image.Dither.NONE)
            if len(png(whole)) <= MOST_BYTES:
                return whole, enlarged if enlarged > 1 else -reduced
    return whole, enlarged if enlarged > 1 else -reduced


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def write_picture(content: bytes, path: Path) -> None:
    """Writes beside the final name and renames, so that the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def _plain(picture: Image.Image) -> Image.Image:
    """In shades of grey where it has no colours: a third of the bytes."""
    picture = picture.convert("RGB")
    red, *others = picture.split()
    return red if all(band.tobytes() == red.tobytes() for band in others) else picture


def _sized(picture: Image.Image, enlarged: int, reduced: int) -> Image.Image:
    if enlarged > 1:
        return picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST)
    return picture.reduce(reduced)


def _placed(pictures: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Pictures in rows on white, titles above them in letters that stay readable where the whole is shown small."""
    mode = "RGB" if any(picture.mode == "RGB" for _, picture in pictures) else "L"
    width, height = (max(sides) for sides in zip(*(picture.size for _, picture in pictures), strict=True))
    columns, gap = min(columns, len(pictures)), 12
    font = caption_font(max(14, columns * (width + gap) // 45))
    top, width = round(1.7 * font.size), max(width, *(math.ceil(font.getlength(title)) for title, _ in pictures))
    rows = -(-len(pictures) // columns)
    canvas = Image.new(mode, (columns * (width + gap) - gap, rows * (height + top + gap) - gap), "white")
    for number, (title, picture) in enumerate(pictures):
        row, column = divmod(number, columns)
        left, upper = column * (width + gap), row * (height + top + gap)
        middle = (left + width // 2, upper + top // 2)
        ImageDraw.Draw(canvas).text(middle, title, fill="black", font=font, anchor="mm")
        canvas.paste(picture.convert(mode), (left + (width - picture.width) // 2, upper + top))
    return canvas
