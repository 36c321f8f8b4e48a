"""A benchmark in memory of nine coloured squares and five queries: neither can be shared evenly by two processes."""

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from pvlf_hf.data.benchmark import CIRBenchmark, Protocol

COLOURS = ["red", "orange", "yellow", "lime", "cyan", "blue", "purple", "black", "white"]
QUERIES = [(0, "blue", 5), (5, "more red", 6), (8, "dark", 7), (2, "the same but green", 3), (7, "not dark", 8)]


def draw(row):
    """A square that differs from the others in colour, size and place."""
    picture = PILImage.new("RGB", (32, 32), COLOURS[-row - 1])
    ImageDraw.Draw(picture).rectangle((2 + row, 4, 14 + row, 8 + 2 * row), COLOURS[row])
    return picture


def save_squares(folder):
    """Saves the nine squares by their names; returns the folder."""
    for row, colour in enumerate(COLOURS):
        draw(row).save(folder / f"{colour}.png")
    return folder


def make_benchmark(subsets=True, wordings=False, **protocol):
    """With `wordings` every caption is a list: one wording, then two, then one ..."""
    queries = {
        "reference": [draw(reference) for reference, _, _ in QUERIES],
        "reference_id": [COLOURS[reference] for reference, _, _ in QUERIES],
        "caption": [caption for _, caption, _ in QUERIES],
        "target_id": [COLOURS[target] for _, _, target in QUERIES],
    }
    if wordings:
        queries["caption"] = [[c, "with one dog"][: 1 + row % 2] for row, c in enumerate(queries["caption"])]
    if subsets:
        pairs = [{reference, target} for reference, _, target in QUERIES]
        queries["subset_ids"] = [[COLOURS[i] for i in sorted(pair | {1, 4})] for pair in pairs]
    return CIRBenchmark(
        name="squares",
        queries=with_pictures(queries, "reference"),
        gallery=with_pictures({"image": [draw(row) for row in range(9)], "image_id": COLOURS}, "image"),
        protocol=Protocol(**{"name": "squares", "gallery": "nine squares", **protocol}),
    )


def each_with_each(folder, colours, caption):
    """Triplets of plain squares, kept as files: from every colour to every other, `caption(reference, target)`."""
    for colour in colours:
        PILImage.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
    pairs = [(a, b) for a in colours for b in colours if a != b]
    triplets = {
        "reference": [str(folder / f"{a}.png") for a, _ in pairs],
        "caption": [caption(a, b) for a, b in pairs],
        "target": [str(folder / f"{b}.png") for _, b in pairs],
        "target_id": [b for _, b in pairs],
    }
    return Dataset.from_dict(triplets).cast_column("reference", Image()).cast_column("target", Image())


def with_pictures(columns, pictures):
    kinds = {c: List(Value("string")) if isinstance(v[0], list) else Value("string") for c, v in columns.items()}
    return Dataset.from_dict(columns, features=Features(kinds | {pictures: Image()}))
