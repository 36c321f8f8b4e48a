"""Retrieval sheets: the position of every image, and robustness to any text and image."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageColor, ImageDraw, ImageFont

from pvlf_hf.data.benchmark import CIRBenchmark
from pvlf_hf.evaluation.retrieval_sheet import (
    CAPTION_WIDTH,
    CELL,
    GREEN,
    MARGIN,
    SheetRow,
    _wrap,
    retrieval_sheet,
    sheet_rows,
)

COLOURS = ["red", "yellow", "blue", "black", "purple"]
IMAGES = {colour: PILImage.new("RGB", (8, 8), colour) for colour in COLOURS}


def rows_of(images, **columns):
    strings = {column: Value("string") for column in columns}
    return Dataset.from_dict({images[0]: images[1], **columns}, Features({images[0]: Image(), **strings}))


@pytest.fixture
def benchmark():
    queries = rows_of(
        ("reference", [IMAGES["red"], IMAGES["yellow"]]),
        reference_id=["red", "yellow"],
        caption=["but blue", "but purple"],
        target_id=["blue", "purple"],
    )
    gallery = rows_of(("image", [IMAGES[colour] for colour in COLOURS]), image_id=COLOURS)
    return CIRBenchmark("colours", queries, gallery)


GALLERY_EMBEDS = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.0, 1.0]])  # red first, purple last
QUERY_EMBEDS = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def make_row(rank=0, results=("blue", "black"), target="blue", **changes):
    images = [IMAGES[colour] for colour in results]
    return SheetRow(IMAGES["red"], changes.pop("caption", "but blue"), images, IMAGES[target], rank, **changes)


def colour_of(image):
    return next(c for c in COLOURS if ImageColor.getrgb(c) == image.getpixel((4, 4)))


def green_cells(sheet):
    """Return the left edges of the green frames along the first row of cells."""
    green = ImageColor.getrgb(GREEN)
    left_sides = [x for x in range(2, sheet.width) if sheet.getpixel((x, first_row_middle(sheet))) == green]
    return [x for x in left_sides if x - 1 not in left_sides][::2]  # each frame has two sides


def first_row_middle(sheet):
    """Return a y coordinate inside the reference image of the first row."""
    column = [sheet.getpixel((MARGIN + CELL // 2, y)) for y in range(sheet.height)]
    return column.index(ImageColor.getrgb("red")) + 20


def test_rows_are_ranked_without_the_reference(benchmark):
    hit, miss = sheet_rows(benchmark, QUERY_EMBEDS, GALLERY_EMBEDS, [0, 1], k=3, method="PVLF")
    assert [colour_of(image) for image in hit.results] == ["yellow", "blue", "black"]
    assert (hit.rank, hit.hit, hit.caption, hit.method) == (1, 1, "but blue", "PVLF")
    assert (colour_of(hit.reference), colour_of(hit.target)) == ("red", "blue")
    assert [colour_of(image) for image in miss.results] == ["red", "blue", "black"]
    assert (miss.rank, miss.hit, colour_of(miss.target)) == (3, None, "purple")
    (again,) = sheet_rows(benchmark, QUERY_EMBEDS, GALLERY_EMBEDS, [1], k=4)
    assert (again.hit, colour_of(again.results[3])) == (3, "purple")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k is 5, but each query has 4 gallery images"),
        ({"k": 0}, "k is 0"),
        ({"query_rows": [0, 2, -1]}, r"query_rows \[2, -1\] are outside the 2 queries of colours"),
        ({"query_rows": []}, "query_rows is empty"),
        ({"query_embeds": QUERY_EMBEDS[:1]}, "1 query embeddings for 2 rows of colours; encode all of them"),
        ({"gallery_embeds": GALLERY_EMBEDS[:3]}, "3 gallery embeddings for 5 rows of colours"),
    ],
)
def test_invalid_row_arguments_raise(benchmark, change, message):
    fitting = {"query_embeds": QUERY_EMBEDS, "gallery_embeds": GALLERY_EMBEDS, "query_rows": [0], "k": 3}
    with pytest.raises(ValueError, match=message):
        sheet_rows(benchmark, **{**fitting, **change})


def test_sheet_without_rows_raises():
    with pytest.raises(ValueError, match="rows is empty"):
        retrieval_sheet([])


def test_hit_and_miss_are_framed():
    hit, miss = make_row(rank=1, results=("black", "blue")), make_row(rank=16, results=("black", "yellow"))
    sheet = retrieval_sheet([hit])
    (left,) = green_cells(sheet)
    assert sheet.mode == "RGB"
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.getpixel((left + CELL // 2, first_row_middle(sheet))) == ImageColor.getrgb("blue")
    with_target = retrieval_sheet([miss])
    (left,) = green_cells(with_target)
    assert with_target.width > sheet.width  # the target has its own column
    assert left == with_target.width - MARGIN - CELL
    assert with_target.getpixel((left + CELL // 2, first_row_middle(with_target))) == ImageColor.getrgb("blue")


def test_headings_captions_and_ranks_are_drawn(monkeypatch):
    drawn = []
    draw_text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: (drawn.append(a[2]), draw_text(*a, **k)))
    miss = make_row(rank=16, results=("black", "yellow"), method="PVLF")
    retrieval_sheet([miss], title="Colours", attribution="public domain")
    headings = ["reference", "caption", "1", "2", "target"]
    assert drawn == ["Colours", *headings, "but blue", "PVLF", "rank 17", "public domain"]  # ranks count from 1
    drawn.clear()
    retrieval_sheet([make_row()])
    assert drawn == [*headings[:-1], "but blue"]


def test_sheet_grows_with_rows_and_columns():
    one = retrieval_sheet([make_row()])
    two = retrieval_sheet([make_row(), make_row()])
    full = retrieval_sheet([make_row()], title="Colours", attribution="Images: public domain")
    five = retrieval_sheet([make_row(rank=9, results=["black"] * 5)])
    assert one.width == two.width == full.width
    assert one.height < full.height < two.height
    assert 850 <= five.width <= 950  # as wide as a README


@pytest.mark.parametrize(
    "caption",
    [
        "nul\x00 and \x1b[31m escape",
        "two\nlines\tand tab",
        "very " * 5000,
        "x" * 5000,
        "\ud800",
        "赤い 🐦 naïve",
        "\u200d",
    ],
)
def test_any_caption_can_be_drawn(caption):
    row = make_row(caption=caption, method=caption)
    assert retrieval_sheet([row], title=caption, attribution=caption).width == retrieval_sheet([make_row()]).width


def test_captions_are_wrapped_and_cut_off():
    font = ImageFont.load_default(15)
    assert _wrap("the same\n but\x00 blue", font, CAPTION_WIDTH, 5) == ["the same but blue"]
    assert _wrap("naïve façade", font, CAPTION_WIDTH, 5) == ["naive facade"]
    assert _wrap("", font, CAPTION_WIDTH, 5) == []
    for text in ("the dress is long and red " * 20, "W" * 300):
        lines = _wrap(text, font, CAPTION_WIDTH, 5)
        assert all(font.getlength(line) <= CAPTION_WIDTH for line in lines)
        assert len(lines) == 5
        assert lines[-1].endswith("...")


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (72, 72), (640, 480)])
@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_any_image_can_be_drawn(size, mode):
    image = PILImage.new(mode, size)
    row = make_row(rank=3)
    assert retrieval_sheet([replace(row, reference=image, results=[image] * 2, target=image)]).mode == "RGB"
