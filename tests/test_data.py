"""Benchmarks, a user's own triplets, and the collator, on real image files."""

import csv
import json

import datasets
import pytest
import torch
from datasets import Dataset
from PIL import Image

from pvlf_hf.data.benchmark import CIRBenchmark
from pvlf_hf.data.triplets import benchmark_from_triplets, load_triplets
from pvlf_hf.digests import id_number
from pvlf_hf.training.batches import PVLFCollator

ROWS = [
    {"reference": "red.png", "caption": "the same but blue", "target": "sub/blue.png"},
    {"reference": "sub/blue.png", "caption": "green, not blue", "target": "green.png"},
    {"reference": "red.png", "caption": 'more "green"', "target": "green.png"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("red.png", "sub/blue.png", "green.png"):
        colour = name.removeprefix("sub/").removesuffix(".png")
        Image.new("RGB", (20, 16), colour).save(tmp_path / "images" / name)
    return tmp_path / "images"


def write_csv(folder, rows):
    file = folder.parent / "triplets.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def queries(**columns):
    rows = {"reference": ["r"], "reference_id": ["a"], "caption": ["red"], "target_id": ["b"], **columns}
    return Dataset.from_dict({column: values for column, values in rows.items() if values is not None})


def gallery(*ids):
    return Dataset.from_dict({"image": ["image"] * len(ids), "image_id": list(ids)})


def test_benchmark_accepts_matching_queries_and_gallery():
    benchmark = CIRBenchmark("toy", queries(subset_ids=[["a", "b"]]), gallery("a", "b", "c"))
    assert (benchmark.name, len(benchmark.gallery), benchmark.protocol.name) == ("toy", 3, "own")


@pytest.mark.parametrize(
    ("queries", "gallery", "message"),
    [
        (
            queries(caption=None),
            gallery("a", "b"),
            r"queries of toy: missing column\(s\) \['caption'\].*rename_column",
        ),
        (queries(), gallery("a", "b").remove_columns("image"), r"gallery of toy: missing column\(s\) \['image'\]"),
        (queries(), gallery("a", "b", "a", "a"), r"image_id must be unique, repeated: \['a'\]"),
        (queries(), gallery("a", "c"), r"1 target_id not in the gallery, first: \['b'\]"),
        (queries(), gallery("b", "c"), r"1 reference_id not in the gallery, first: \['a'\]"),
        (queries(subset_ids=[["a", "b", "x"]]), gallery("a", "b"), r"1 subset_ids not in the gallery, first: \['x'\]"),
        (
            queries(subset_ids=[["a", "c"]]),
            gallery("a", "b", "c"),
            r"1 lack the target in subset_ids, first rows: \[0\]",
        ),
        (queries(caption=[" "]), gallery("a", "b"), r"1 have an empty caption, first rows: \[0\]"),
        (queries(target_id=["a"]), gallery("a", "b"), "1 have their reference as target"),
        (queries().select([]), gallery("a", "b"), "toy: 0 queries and 2 gallery images"),
    ],
)
def test_benchmark_raises_on_invalid_input(queries, gallery, message):
    with pytest.raises(ValueError, match=message):
        CIRBenchmark("toy", queries, gallery)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_triplets_load_from_each_file_type(folder, suffix):
    file = folder.parent / f"triplets{suffix}"
    if suffix == ".csv":
        write_csv(folder, ROWS)
    elif suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(file)
    else:
        file.write_text("\n".join(json.dumps(row) for row in ROWS))
    triplets = load_triplets(file, folder)
    assert triplets.column_names == [
        *("reference", "reference_id", "caption", "target", "target_id", "target_image_id")
    ]
    assert list(triplets["caption"]) == [row["caption"] for row in ROWS]
    assert list(triplets["reference_id"]) == [row["reference"] for row in ROWS]
    assert list(triplets["target_id"]) == [row["target"] for row in ROWS]
    assert triplets[0]["reference"].getpixel((0, 0)) == (255, 0, 0)
    assert triplets[0]["target"].getpixel((0, 0)) == (0, 0, 255)


def test_shared_target_ids_leave_every_image_in_the_gallery(folder):
    rows = [{**row, "target_id": number} for row, number in zip(ROWS, (7, 7, 8), strict=True)]
    triplets = load_triplets(write_csv(folder, rows), folder)
    assert list(triplets["target_id"]) == ["7", "7", "8"]
    benchmark = benchmark_from_triplets("own", triplets)
    assert set(benchmark.gallery["image_id"]) == {row[c] for row in ROWS for c in ("reference", "target")}
    assert list(benchmark.queries["target_id"]) == [row["target"] for row in ROWS]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", "reference,caption,target\nred.png,caf\u00e9,green.png\n".encode("latin-1")),
        (".csv", b"reference,caption,target\n"),
        (".csv", b""),
        (".jsonl", b'{"reference": "red.png", "caption"'),
    ],
)
def test_unreadable_tables_raise_with_their_path(folder, suffix, content):
    file = folder.parent / f"bad{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad{suffix}: "):
        load_triplets(file, folder)


def test_unquoted_commas_raise(folder):
    file = folder.parent / "bad.csv"
    file.write_text("reference,caption,target\nred.png,red, but blue,green.png\n")
    with pytest.raises(
        ValueError,
        match="bad.csv: the row in line 2 has 4 cells, but the header has 3: a caption that contains commas must be",
    ):
        load_triplets(file, folder)


def test_numeric_captions_and_names_stay_text(folder):
    Image.new("RGB", (9, 9)).save(folder / "007", format="PNG")
    rows = [{"reference": "007", "caption": caption, "target": "007"} for caption in ("2", "None", "NA")]
    triplets = load_triplets(write_csv(folder, rows), folder)
    assert list(triplets["caption"]) == ["2", "None", "NA"]
    assert list(triplets["reference_id"]) == ["007"] * 3


def test_missing_images_are_counted_and_three_named(folder):
    rows = [{**ROWS[0], "target": f"missing{number}.png"} for number in range(5)]
    with pytest.raises(
        ValueError, match=r"5 of 6 images are not in .*'missing0.png', 'missing1.png', 'missing2.png'\]"
    ):
        load_triplets(write_csv(folder, rows), folder, check_images=False)


def test_broken_images_raise_with_the_reason(folder):
    whole = (folder / "green.png").read_bytes()
    (folder / "green.png").write_bytes(whole[: len(whole) // 2])
    (folder / "sub/blue.png").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"2 images cannot be read.*green.png \(.+\).*blue.png \(cannot identify"):
        load_triplets(write_csv(folder, ROWS), folder)
    assert len(load_triplets(write_csv(folder, ROWS), folder, check_images=False)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": "  "}, r"caption is empty in 1 rows, first in data rows \[1\] \(counted from 0\)"),
        ({"caption": ""}, r"caption is empty in 1 rows"),
        ({"reference": ""}, r"reference is empty in 1 rows"),
        ({"target": ""}, r"target is empty in 1 rows"),
    ],
)
def test_empty_cells_raise(folder, change, message):
    with pytest.raises(ValueError, match=message):
        load_triplets(write_csv(folder, [ROWS[0], {**ROWS[1], **change}, ROWS[2]]), folder)


def test_invalid_tables_raise(folder):
    wrong = [{"image": row["reference"], "caption": row["caption"], "target": row["target"]} for row in ROWS]
    with pytest.raises(ValueError, match=r"triplets.csv: missing column\(s\) \['reference'\]; it has \['image'"):
        load_triplets(write_csv(folder, wrong), folder)
    with pytest.raises(ValueError, match=r"triplets.xlsx: cannot read .xlsx; use one of \['.csv'"):
        load_triplets(folder / "triplets.xlsx", folder)
    with pytest.raises(ValueError, match=r"nowhere.csv: no such file"):
        load_triplets(folder / "nowhere.csv", folder)


def test_benchmark_from_triplets_holds_each_image_once(folder):
    triplets = load_triplets(write_csv(folder, ROWS), folder)
    benchmark = benchmark_from_triplets("own", triplets)
    images = {row["image_id"]: row["image"].getpixel((0, 0)) for row in benchmark.gallery}
    assert images == {"red.png": (255, 0, 0), "sub/blue.png": (0, 0, 255), "green.png": (0, 128, 0)}
    assert len(benchmark.gallery) == 3  # red and green occur twice
    assert list(benchmark.queries["target_id"]) == ["sub/blue.png", "green.png", "green.png"]
    assert benchmark.protocol.reference == "removed"
    with pytest.raises(ValueError, match=r"own: missing column\(s\) \['reference_id'\]"):
        benchmark_from_triplets("own", triplets.remove_columns("reference_id"))


def test_collator_builds_a_batch(folder, tiny_processor):
    triplets = load_triplets(write_csv(folder, ROWS), folder)
    batch = PVLFCollator(tiny_processor)([triplets[row] for row in range(3)])
    length = batch["input_ids"].shape[1]
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "pixel_values": ((3, 3, 32, 32), torch.float32),
        "target_pixel_values": ((3, 3, 32, 32), torch.float32),
        "input_ids": ((3, length), torch.int64),
        "attention_mask": ((3, length), torch.int64),
        "target_ids": ((3,), torch.int64),
    }
    blue, green, again = batch["target_ids"].tolist()
    assert green == again != blue
    assert torch.equal(batch["target_pixel_values"][1], batch["target_pixel_values"][2])
    assert torch.equal(batch["pixel_values"][1], batch["target_pixel_values"][0])  # both are blue
    with pytest.raises(ValueError, match=r"triplets lack column\(s\) \['target_id'\]"):
        PVLFCollator(tiny_processor)([{"reference": None, "caption": "red", "target": None}])


def test_images_of_unusual_modes_and_shapes_pass_the_collator(folder, tiny_processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for upright display
    left_red = Image.new("RGB", (64, 64), "blue")
    left_red.paste("red", (0, 0, 32, 64))
    Image.new("L", (20, 16), 90).save(folder / "grey.png")
    Image.new("RGBA", (20, 16), (255, 0, 0, 0)).save(folder / "rgba.png")
    Image.new("CMYK", (20, 16), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    left_red.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 5000), "red").save(folder / "thin.png")
    names = ["grey.png", "rgba.png", "cmyk.jpg", "turned.jpg", "thin.png"]
    rows = [{"reference": name, "caption": "red", "target": name} for name in names]
    triplets = load_triplets(write_csv(folder, rows), folder)
    batch = PVLFCollator(tiny_processor)(list(triplets))
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    assert batch["pixel_values"].isfinite().all()
    assert torch.equal(batch["pixel_values"], batch["target_pixel_values"])
    _, white, _, turned, _ = batch["pixel_values"]
    assert white.min() > 1.9  # transparent is white, not the red below
    assert turned[0, 2].min() > turned[2, 2].max()  # red is on top now, blue at the bottom
    assert turned[0, -2].max() < turned[2, -2].min()


def test_numeric_ids_are_equal_in_every_process():
    # `printf red.png | b2sum --length 64`
    assert id_number("red.png") == int.from_bytes(bytes.fromhex("1ca0581bf9e54d8b"), "big", signed=True)
    assert id_number("rouge-gorge 🐦") != id_number("red.png")
