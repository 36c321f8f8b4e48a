"""Draws queries and their results as one image: each row has a reference, a caption and the best results.

Example:
    >>> red, blue = (Image.new("RGB", (72, 72), colour) for colour in ("red", "blue"))
    >>> row = SheetRow(reference=red, caption="make it blue", results=[blue, red], target=blue, rank=0)
    >>> retrieval_sheet([row], title="one query").size  # `sheet_rows` makes the rows of a benchmark
    (514, 226)
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import category, normalize

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.benchmark import CIRBenchmark
from ..embeddings.combined import CombinedQueries, top_k_of
from ..models.image_processing_pvlf import opened, to_rgb
from .ranking import target_ranks

# Sizes in pixels. A sheet of five results is about 900 pixels wide, the width of a README on GitHub.
MARGIN = 20
IMAGE_SIDE = 78
CELL = IMAGE_SIDE + 10
GAP = 6
GROUP_GAP = 18
CAPTION_WIDTH = 168
ROW_HEIGHT = CELL + 36  # leaves room for the rank below the target
CAPTION_LINES = 5
BADGE = 22

INK, GREY, LINE, GREEN = "#1f2328", "#6e7781", "#e4e7eb", "#1a9c4b"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class SheetRow:
    """One query and its results.

    Args:
        reference: the reference image.
        caption: the relative caption; if it is too long for the column, it ends in "...".
        results: retrieved images, best first, without the reference.
        target: the target image.
        rank: 0-based rank of the target; the sheet counts from 1.
        method: name of the retrieval method, for sheets that compare methods.
    """

    reference: Image.Image
    caption: str
    results: Sequence[Image.Image]
    target: Image.Image
    rank: int
    method: str = ""

    @property
    def hit(self) -> int | None:
        """Index of the target among the results, None if it is not among them."""
        return self.rank if self.rank < len(self.results) else None


def sheet_rows(
    benchmark: CIRBenchmark,
    query_embeds: Tensor | CombinedQueries,
    gallery_embeds: Tensor,
    query_rows: Sequence[int],
    k: int = 5,
    method: str = "",
) -> list[SheetRow]:
    """Rank the gallery, without the reference if it holds that, for some queries of a benchmark.

    Args:
        benchmark: queries and gallery.
        query_embeds: `(queries, d)` float, of all queries, from [`encode_queries`].
        gallery_embeds: `(gallery, d)` float, from [`encode_gallery`].
        query_rows: indices of the queries to show.
        k: number of results to show.
        method: label of these rows.

    Raises:
        ValueError: if the embeddings do not fit the benchmark, an index is out of range, or k is larger than the
            gallery without the reference, or queries have galleries of their own.
    """
    queries, gallery = benchmark.queries, benchmark.gallery
    if "group_id" in queries.column_names:
        raise ValueError(f"the queries of {benchmark.name} are ranked in groups, but a sheet ranks one gallery")
    for side, embeds, dataset in (("query", query_embeds, queries), ("gallery", gallery_embeds, gallery)):
        if len(embeds) != len(dataset):
            raise ValueError(
                f"{len(embeds)} {side} embeddings for {len(dataset)} rows of {benchmark.name}; encode all of them"
            )
    if outside := [row for row in query_rows if not 0 <= row < len(queries)]:
        raise ValueError(f"query_rows {outside[:3]} are outside the {len(queries)} queries of {benchmark.name}")
    if len(query_rows) == 0:
        raise ValueError("query_rows is empty: name at least one query to show")
    chosen = queries.select(query_rows)
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    is_outside = benchmark.protocol.reference == "outside"
    reference = None if is_outside else torch.tensor([row_of[i] for i in chosen["reference_id"]])
    target = torch.tensor([row_of[i] for i in chosen["target_id"]])
    rows = torch.as_tensor(query_rows)
    embeds = query_embeds[rows] if isinstance(query_embeds, Tensor) else query_embeds.select(rows)
    ranks = target_ranks(embeds, gallery_embeds, target, reference).tolist()
    _, best = top_k_of(embeds, gallery_embeds, k, reference)
    shown, images = opened(chosen.select_columns(["reference", "caption"])), opened(gallery.select_columns("image"))
    return [
        SheetRow(
            reference=query["reference"],
            caption=query["caption"],
            results=images.select(result_rows)[:]["image"],
            target=images[target_row]["image"],
            rank=rank,
            method=method,
        )
        for query, result_rows, target_row, rank in zip(shown, best.tolist(), target.tolist(), ranks, strict=True)
    ]


def retrieval_sheet(rows: Sequence[SheetRow], title: str = "", attribution: str = "") -> Image.Image:
    """Draw queries and their results.

    The target has a green frame. It is among the results, with a check mark, or in a column of its own, with its
    rank. Text is drawn in Pillow's default font without accents; letters other than Latin become boxes.

    Args:
        rows: the queries, top to bottom, from [`sheet_rows`].
        title: heading of the sheet.
        attribution: creator and licence of the images, in small print at the bottom.

    Returns:
        RGB, on white; about 900 pixels wide with five results and a missed target.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty: pass at least one SheetRow")
    lefts = _column_lefts(rows)
    width = max(lefts.values()) + CELL + MARGIN
    title_font, font, small = (ImageFont.load_default(size) for size in (20, 15, 12))
    title_lines = _wrap(title, title_font, width - 2 * MARGIN, max_lines=2)
    attribution_lines = _wrap(attribution, small, width - 2 * MARGIN, max_lines=4)
    headings_top = MARGIN + 28 * len(title_lines) + (8 if title_lines else 0)
    rows_top = headings_top + 26
    attribution_top = rows_top + ROW_HEIGHT * len(rows) + 6

    sheet = Image.new("RGB", (width, attribution_top + 16 * len(attribution_lines) + 14), "white")
    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, (MARGIN, MARGIN), title_lines, title_font, INK, 28)
    for heading, left in lefts.items():
        x, anchor = (left, "la") if heading == "caption" else (left + CELL // 2, "ma")
        draw.text((x, headings_top), heading, GREY, small, anchor=anchor)
    for number, row in enumerate(rows):
        top = rows_top + number * ROW_HEIGHT
        draw.line((MARGIN, top - 5, width - MARGIN, top - 5), LINE)
        _draw_row(sheet, row, lefts, top + 5, font, small)
    _draw_lines(draw, (MARGIN, attribution_top), attribution_lines, small, GREY, 16)
    return sheet


def _column_lefts(rows: Sequence[SheetRow]) -> dict[str, int]:
    """Return the left edge of each column by heading; the target has a column only if a row missed it."""
    lefts = {"reference": MARGIN, "caption": MARGIN + CELL + GROUP_GAP}
    left = lefts["caption"] + CAPTION_WIDTH + GROUP_GAP
    for index in range(max(len(row.results) for row in rows)):
        lefts[str(index + 1)] = left
        left += CELL + GAP
    if any(row.hit is None for row in rows):
        lefts["target"] = left + GROUP_GAP - GAP
    return lefts


def _draw_row(
    sheet: Image.Image,
    row: SheetRow,
    lefts: dict[str, int],
    top: int,
    font: Font,
    small: Font,
) -> None:
    draw = ImageDraw.Draw(sheet)
    _draw_image(sheet, row.reference, (lefts["reference"], top))
    lines = _wrap(row.caption, font, CAPTION_WIDTH, CAPTION_LINES - bool(row.method))
    label = _wrap(row.method, small, CAPTION_WIDTH, max_lines=1)
    caption_top = top + (CELL - 19 * (len(lines) + len(label))) // 2
    _draw_lines(draw, (lefts["caption"], caption_top), lines, font, INK, 19)
    _draw_lines(draw, (lefts["caption"], caption_top + 19 * len(lines) + 3), label, small, GREY, 19)
    for index, image in enumerate(row.results):
        _draw_image(sheet, image, (lefts[str(index + 1)], top), is_target=index == row.hit)
    if row.hit is None:
        _draw_image(sheet, row.target, (lefts["target"], top), is_target=True)
        draw.text((lefts["target"] + CELL // 2, top + CELL + 4), f"rank {row.rank + 1}", INK, small, anchor="ma")
    else:
        badge = _check_mark()
        corner = lefts[str(row.hit + 1)] + CELL - BADGE * 2 // 3, top - BADGE // 3
        sheet.paste(badge, corner, badge)


def _draw_image(sheet: Image.Image, image: Image.Image, corner: tuple[int, int], is_target: bool = False) -> None:
    """Fit an image into a framed cell."""
    rgb = to_rgb(image)
    scale = IMAGE_SIDE / max(rgb.size)
    width, height = (max(1, round(side * scale)) for side in rgb.size)
    left, top = corner
    outline, line_width = (GREEN, 3) if is_target else (LINE, 1)
    box = (left, top, left + CELL - 1, top + CELL - 1)
    ImageDraw.Draw(sheet).rounded_rectangle(box, 6, outline=outline, width=line_width)
    resized = rgb.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(resized, (left + (CELL - width) // 2, top + (CELL - height) // 2))


def _check_mark() -> Image.Image:
    """Draw a white check mark on a green disc, RGBA; large and then shrunk, because Pillow's lines are jagged."""
    size = 8 * BADGE
    badge = Image.new("RGBA", (size, size), "#ffffff00")
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, size - 1, size - 1), "white")
    draw.ellipse((size * 0.07, size * 0.07, size * 0.93, size * 0.93), GREEN)
    points = [(size * x, size * y) for x, y in ((0.29, 0.52), (0.44, 0.67), (0.71, 0.36))]
    draw.line(points, "white", round(size * 0.1), joint="curve")
    return badge.resize((BADGE, BADGE), Image.Resampling.LANCZOS)


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Break text into lines of at most `width` pixels; a text that does not fit ends in "..."."""
    # Pillow's default font has little more than ASCII: drop accents and control characters.
    text = "".join(c for c in normalize("NFKD", " ".join(text.split())) if category(c)[0] not in "CM")
    lines: list[str] = []
    for characters in range(width // 3, 3, -1):  # `textwrap` counts characters, so try until the pixels fit
        lines = textwrap.wrap(text[:1000], characters, max_lines=max_lines, placeholder=" ...")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: list[str],
    font: Font,
    colour: str,
    line_height: int,
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_height), line, colour, font)


__all__ = ["SheetRow", "retrieval_sheet", "sheet_rows"]
