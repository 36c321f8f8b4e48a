"""In-memory benchmark of nine coloured squares and five queries; neither number is divisible by two processes."""

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from pvlf_hf.data.benchmark import CIRBenchmark, Protocol

COLOURS = ["red", "orange", "yellow", "lime", "cyan", "blue", "purple", "black", "white"]
QUERIES = [(0, "blue", 5), (5, "more red", 6), (8, "dark", 7), (2, "the same but green", 3), (7, "not dark", 8)]


def draw(row):
    """Return a square that differs from the others in colour, size and position."""
    square = PILImage.new("RGB", (32, 32), COLOURS[-row - 1])
    ImageDraw.Draw(square).rectangle((2 + row, 4, 14 + row, 8 + 2 * row), COLOURS[row])
    return square


def save_squares(folder):
    """Save the nine squares as `{colour}.png`; return the folder."""
    for row, colour in enumerate(COLOURS):
        draw(row).save(folder / f"{colour}.png")
    return folder


def make_benchmark(subsets=True, several_captions=False, **protocol):
    """Return the benchmark; with `several_captions` every caption is a list: one caption, then two, then one, ..."""
    queries = {
        "reference": [draw(reference) for reference, _, _ in QUERIES],
        "reference_id": [COLOURS[reference] for reference, _, _ in QUERIES],
        "caption": [caption for _, caption, _ in QUERIES],
        "target_id": [COLOURS[target] for _, _, target in QUERIES],
    }
    if several_captions:
        queries["caption"] = [[c, "with one dog"][: 1 + row % 2] for row, c in enumerate(queries["caption"])]
    if subsets:
        pairs = [{reference, target} for reference, _, target in QUERIES]
        queries["subset_ids"] = [[COLOURS[i] for i in sorted(pair | {1, 4})] for pair in pairs]
    return CIRBenchmark(
        name="squares",
        queries=with_images(queries, "reference"),
        gallery=with_images({"image": [draw(row) for row in range(9)], "image_id": COLOURS}, "image"),
        protocol=Protocol(**{"name": "squares", "gallery": "nine squares", **protocol}),
    )


def square_triplets(folder, colours, caption):
    """Return triplets of plain squares in files, from every colour to every other, captioned by `caption`."""
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


def with_images(columns, column):
    kinds = {c: List(Value("string")) if isinstance(v[0], list) else Value("string") for c, v in columns.items()}
    return Dataset.from_dict(columns, features=Features(kinds | {column: Image()}))
