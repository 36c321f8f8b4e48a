"""Draws placeholders for images that cannot be opened."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

SIDE, FONT_SIZE, LINE_LETTERS, LINES = 256, 20, 22, 9
"""Pixels of a blank's side and of its letters; letters of a line and lines that fit."""


def blank(name: str) -> Image.Image:
    """Draw a gray square with a name on it; letters other than Latin turn up as boxes (Pillow's own font)."""
    image = Image.new("RGB", (SIDE, SIDE), "#e4e7eb")
    lines = textwrap.wrap(name, LINE_LETTERS, max_lines=LINES, placeholder=" ...")
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(image).multiline_text((10, 10), "\n".join(lines), "#6e7781", font)
    return image


__all__ = ["blank"]
