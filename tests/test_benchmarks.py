"""Loaders of Laion-CIR, CIRR, FashionIQ and CIRCO, on miniatures of the released files."""

import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from miniatures import FASHION_CATEGORIES, make_all, write_json
from PIL import Image

from pvlf_hf.data import circo, cirr, fashioniq, laion_cir
from pvlf_hf.data.benchmark import Protocol
from pvlf_hf.data.circo import load_circo
from pvlf_hf.data.cirr import load_cirr, load_cirr_train
from pvlf_hf.data.fashioniq import CAPTION_STYLES, compose_captions, load_fashioniq, load_fashioniq_train
from pvlf_hf.data.laion_cir import load_laion_cir

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "metrics.json").read_text())

# By name: the folder of `make_all` that the loader reads, and the call of the loader.
LOADERS = {
    "laion-cir/template": ("laion-cir", partial(load_laion_cir, subset="template")),
    "laion-cir/llm": ("laion-cir", partial(load_laion_cir, subset="llm")),
    "laion-cir/combined": ("laion-cir", load_laion_cir),
    "cirr/train": ("cirr", load_cirr_train),
    "cirr/val": ("cirr", load_cirr),
    "cirr/test1": ("cirr", partial(load_cirr, split="test1")),
    "fashioniq/train": ("fashioniq", load_fashioniq_train),
    "fashioniq/val/shirt": ("fashioniq", partial(load_fashioniq, category="shirt")),
    "fashioniq/test/dress": ("fashioniq", partial(load_fashioniq, category="dress", split="test")),
    "circo/val": ("circo", load_circo),
    "circo/test": ("circo", partial(load_circo, split="test")),
}

CAPTION_FILES = {
    "laion-cir/template": "laion-cir/laion_template_info.json",
    "laion-cir/llm": "laion-cir/laion_llm_info.json",
    "cirr/train": "cirr/cirr/captions/cap.rc2.train.json",
    "cirr/val": "cirr/cirr/captions/cap.rc2.val.json",
    "cirr/test1": "cirr/cirr/captions/cap.rc2.test1.json",
    "fashioniq/val/shirt": "fashioniq/captions/cap.shirt.val.json",
    "circo/val": "circo/annotations/val.json",
    "circo/test": "circo/annotations/test.json",
}
COCO = "circo/COCO2017_unlabeled"
GALLERY_FILES = {
    "cirr/train": "cirr/cirr/image_splits/split.rc2.train.json",
    "cirr/val": "cirr/cirr/image_splits/split.rc2.val.json",
    "fashioniq/val/shirt": "fashioniq/image_splits/split.shirt.val.json",
    "circo/val": f"{COCO}/annotations/image_info_unlabeled2017.json",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def data(originals, tmp_path):
    """Return a copy that a test may change: it may move and remove images, and rewrite annotations."""

    def copy(source, target):
        (shutil.copy if source.endswith(".json") else os.link)(source, target)

    return shutil.copytree(originals, tmp_path / "data", copy_function=copy)


@pytest.fixture
def annotations(originals, tmp_path):
    """Return a copy without images, for errors that must be detected before images are opened."""
    return shutil.copytree(originals, tmp_path / "data", ignore=shutil.ignore_patterns("*.png", "*.jpg"))


def load(name, data_root, **options):
    folder, loader = LOADERS[name]
    return loader(data_root / folder, check_counts=False, **options)


def read(file):
    return json.loads(file.read_text())


def plain(dataset):
    """Return the rows without the images."""
    return dataset.remove_columns({"reference", "target", "image"} & set(dataset.column_names)).to_list()


def rows_of(loaded):
    return plain(getattr(loaded, "queries", loaded)), plain(getattr(loaded, "gallery", loaded))


def shows(image, file):
    with Image.open(file) as expected:
        return image.size == expected.size and image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("subset", ["template", "llm", "combined"])
def test_laion_cir_loads_every_triplet(originals, subset):
    root = originals / "laion-cir"
    content = read(root / f"laion_{subset}_info.json")
    records = [{"ref_image_id": i, **r} for i, r in content.items()] if isinstance(content, dict) else content
    triplets = load(f"laion-cir/{subset}", originals)
    assert plain(triplets) == [
        {
            "reference_id": f"{int(r['ref_image_id']):07d}",
            "caption": r["relative_cap"],
            "target_id": f"{int(r['tgt_image_id']):07d}",
        }
        for r in records
    ]
    for row in triplets:
        assert shows(row["reference"], root / f"{row['reference_id']}.png")
        assert shows(row["target"], root / f"{row['target_id']}.png")


def test_combined_laion_cir_without_its_file_is_assembled_from_its_parts(data):
    published = rows_of(load("laion-cir/combined", data))
    (data / "laion-cir/laion_combined_info.json").unlink()
    assert rows_of(load("laion-cir/combined", data)) == published
    with pytest.raises(ValueError, match="laion-cir/template: 8 triplets, but .* 16000"):
        load_laion_cir(data / "laion-cir")


def test_laion_cir_ids_may_be_numbers(data):
    expected = rows_of(load("laion-cir/template", data))
    file = data / "laion-cir/laion_template_info.json"
    write_json(file, [{k: int(v) if "id" in k else v for k, v in row.items()} for row in read(file)])
    assert rows_of(load("laion-cir/template", data)) == expected


@pytest.mark.parametrize("split", ["val", "test1", "train"])
def test_cirr_loads_every_query_and_image(originals, split):
    records = read(originals / f"cirr/cirr/captions/cap.rc2.{split}.json")
    gallery = read(originals / f"cirr/cirr/image_splits/split.rc2.{split}.json")
    benchmark = load_cirr(originals / "cirr", split, check_counts=False)
    target = {} if split == "test1" else {"target_id": "target_hard"}
    columns = {"reference_id": "reference", "caption": "caption", **target}
    assert plain(benchmark.queries) == [
        {
            "query_id": str(record["pairid"]),
            **{column: record[key] for column, key in columns.items()},
            "subset_ids": record["img_set"]["members"],
        }
        for record in records
    ]
    assert benchmark.has_targets == (split != "test1")
    assert list(benchmark.gallery["image_id"]) == list(gallery)
    for row in benchmark.gallery:
        assert shows(row["image"], originals / "cirr" / gallery[row["image_id"]])
    for row in benchmark.queries:
        assert shows(row["reference"], originals / "cirr" / gallery[row["reference_id"]])
    if split == "train":
        triplets = load("cirr/train", originals)
        assert plain(triplets) == [{c: r[c] for c in columns} for r in plain(benchmark.queries)]
        assert all(shows(row["target"], originals / "cirr" / gallery[row["target_id"]]) for row in triplets)


@pytest.mark.parametrize("category", FASHION_CATEGORIES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_fashioniq_loads_every_query_and_image(originals, category, split):
    root = originals / "fashioniq"
    records = read(root / f"captions/cap.{category}.{split}.json")
    benchmark = load_fashioniq(root, category, split, check_counts=False)
    for row, record in zip(benchmark.queries, records, strict=True):
        assert row["reference_id"] == record["candidate"]
        assert row.get("target_id") == record.get("target")
        assert row["caption"].lower() == " and ".join(c.strip(" .?,") for c in record["captions"]).lower()
        assert shows(row["reference"], root / f"images/{record['candidate']}.png")
    assert list(benchmark.gallery["image_id"]) == read(root / f"image_splits/split.{category}.{split}.json")
    assert all(shows(row["image"], root / f"images/{row['image_id']}.png") for row in benchmark.gallery)


def test_fashioniq_union_has_only_images_that_queries_name(originals):
    original, union = (load("fashioniq/val/shirt", originals, gallery=gallery) for gallery in ("original", "union"))
    records = read(originals / CAPTION_FILES["fashioniq/val/shirt"])
    named = {record[key] for record in records for key in ("candidate", "target")}
    assert set(union.gallery["image_id"]) == named < set(original.gallery["image_id"])
    assert rows_of(union)[0] == rows_of(original)[0]
    with pytest.raises(ValueError, match="test has no targets; use 'original'"):
        load("fashioniq/test/dress", originals, gallery="union")


def test_fashioniq_training_split_loads_every_triplet(originals):
    root = originals / "fashioniq"
    records = [r for c in FASHION_CATEGORIES for r in read(root / f"captions/cap.{c}.train.json")]
    triplets = load("fashioniq/train", originals)
    assert list(triplets["target_id"]) == [record["target"] for record in records]
    assert list(triplets["caption"]) == [compose_captions(record["captions"]) for record in records]
    assert all(shows(row["target"], root / f"images/{row['target_id']}.png") for row in triplets)
    assert len(load("fashioniq/train", originals, categories=["dress"])) == 6
    with pytest.raises(ValueError, match="unknown captions of training 'both-mean'; choose from .'and', 'and-rev"):
        load("fashioniq/train", originals, captions="both-mean")


@pytest.mark.parametrize("case", FIXTURE["fiq_val_caption_composition"])
def test_captions_are_joined_as_the_reference_does(case):
    assert compose_captions(case["captions"]) == case["composed"]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("and", "Is red and has A Hat"),
        ("and-reversed", "Has a hat and is RED"),
        ("and-reversed-as-written", " has A Hat?, and is RED."),
        ("both-mean", ["Is red and has A Hat", "Has a hat and is RED"]),
        ("first", "is RED."),
        ("separate", ["is RED.", " has A Hat?,"]),
    ],
)
def test_caption_styles_give_the_expected_captions(data, style, expected):
    captions = ["is RED.", " has A Hat?,"]
    assert compose_captions(captions, style) == expected
    file = data / CAPTION_FILES["fashioniq/val/shirt"]
    write_json(file, [{**row, "captions": captions} for row in read(file)])
    benchmark = load("fashioniq/val/shirt", data, captions=style)
    assert benchmark.queries[0]["caption"] == expected
    assert benchmark.protocol.captions == f"{style}: {CAPTION_STYLES[style]}"


@pytest.mark.parametrize("split", ["val", "test"])
def test_circo_loads_every_query_and_image(originals, split):
    records = read(originals / f"circo/annotations/{split}.json")
    images = read(originals / GALLERY_FILES["circo/val"])["images"]
    benchmark = load(f"circo/{split}", originals)
    expected = [
        {
            "query_id": str(record["id"]),
            "reference_id": str(record["reference_img_id"]),
            "caption": record["relative_caption"],
        }
        for record in records
    ]
    if split == "val":
        for row, record in zip(expected, records, strict=True):
            row["target_id"] = str(record["target_img_id"])
            row["target_ids"] = [str(i) for i in record["gt_img_ids"]]
            row["semantic_aspects"] = record["semantic_aspects"]
    assert plain(benchmark.queries) == expected
    assert plain(benchmark.gallery) == [{"image_id": str(image["id"])} for image in images]
    for row, image in zip(benchmark.gallery, images, strict=True):
        assert shows(row["image"], originals / COCO / "unlabeled2017" / image["file_name"])
    assert shows(benchmark.queries[2]["reference"], originals / COCO / "unlabeled2017" / images[2]["file_name"])


def test_circo_loads_without_semantic_aspects(data):
    file = data / "circo/annotations/val.json"
    write_json(file, [{k: v for k, v in row.items() if k != "semantic_aspects"} for row in read(file)])
    assert "semantic_aspects" not in load("circo/val", data).queries.column_names


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("laion-cir/llm", {"laion_llm_info.json": "files/laion_llm_info.json"}),
        ("laion-cir/combined", {"laion_combined_info.json": "data/files/laion_combined_info.json"}),
        ("laion-cir/combined", {"*.png": "images"}),
        ("laion-cir/llm", {"*.png": "laion_cir_llm"}),
        ("cirr/val", {"cirr/captions": "captions", "cirr/image_splits": "image_splits"}),
        ("cirr/val", {"dev": "img_raw/dev"}),
        ("cirr/train", {"train": "images/train"}),
        ("cirr/test1", {"test1": "NLVR2/images/test1", "cirr/image_splits": "image_splits"}),
        ("fashioniq/val/shirt", {"captions": "json"}),
        ("fashioniq/train", {"images/*.png": "."}),
        ("fashioniq/val/shirt", {"images/B00S*.png": "images/shirt"}),
        ("fashioniq/val/shirt", {"images/B00S*.png": "shirt"}),
        ("circo/val", {"annotations/val.json": "val.json"}),
        ("circo/val", {"COCO2017_unlabeled/annotations/*.json": "annotations"}),
        ("circo/test", {"COCO2017_unlabeled/annotations/*.json": "COCO2017_unlabeled"}),
        ("circo/test", {"COCO2017_unlabeled/unlabeled2017": "unlabeled2017"}),
        ("circo/test", {"COCO2017_unlabeled/unlabeled2017/*.jpg": "COCO2017_unlabeled"}),
    ],
)
def test_usual_layouts_load_the_same(data, name, moves):
    expected = rows_of(load(name, data))
    root = data / LOADERS[name][0]
    for source, destination in moves.items():
        into_folder = "*" in source
        target = root / destination
        (target if into_folder else target.parent).mkdir(parents=True, exist_ok=True)
        for path in sorted(root.glob(source)):
            path.rename(target / path.name if into_folder else target)
    loaded = load(name, data)
    assert rows_of(loaded) == expected
    assert getattr(loaded, "queries", loaded)[0]["reference"].size == (72, 72)


def test_fashioniq_images_may_have_different_formats(data):
    expected = rows_of(load("fashioniq/val/shirt", data))
    for number, asin in enumerate(read(data / GALLERY_FILES["fashioniq/val/shirt"])):
        file = data / f"fashioniq/images/{asin}.png"
        file.rename(file.with_suffix((".png", ".jpg", ".jpeg")[number % 3]))
    assert rows_of(load("fashioniq/val/shirt", data)) == expected


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        (
            "laion-cir/llm",
            "laion_llm_info.json",
            r"laion_llm_info.json is not under .*data/files/laion_llm_info.json'\]",
        ),
        ("laion-cir/combined", "*.json", r"laion_template_info.json is not under"),
        ("cirr/val", "cirr/captions", r"cap.rc2.val.json is not under .*cirr/cirr/captions/cap.*data/cirr/captions/"),
        ("cirr/val", "cirr/image_splits", r"split.rc2.val.json is not under"),
        ("fashioniq/val/shirt", "captions", r"cap.shirt.val.json is not under .*/captions/cap.*/json/cap.shirt.val"),
        ("circo/test", "annotations", r"test.json is not under .*annotations/test.json', '.*circo/test.json'\]"),
        ("circo/val", "COCO2017_unlabeled/annotations", r"image_info_unlabeled2017.json is not under"),
        ("laion-cir/llm", "*.png", r"laion-cir/llm: no row has its images; looked for 0\d+.png and .*/images', '"),
        ("cirr/val", "dev", r"looked for dev/dev-0-0-img0.png and others in \[.*cirr/img_raw', .*NLVR2/images'\]"),
        ("fashioniq/val/shirt", "images", r"looked for B00S1Y8X00.png or B00S1Y8X00.jpg or .*shirt/B00S1Y8X00.jpg"),
        ("circo/val", "COCO2017_unlabeled/unlabeled2017", r"looked for 000000000042.jpg and .*/unlabeled2017'"),
    ],
)
def test_missing_files_are_named_with_the_paths_tried(data, name, gone, message):
    for path in (data / LOADERS[name][0]).glob(gone):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for allow_missing in (False, True):
        with pytest.raises(ValueError, match=message):
            load(name, data, allow_missing=allow_missing)


def edit(row, **changes):
    """Change one row; None removes a key."""

    def change(rows):
        rows[row] = {k: v for k, v in {**rows[row], **changes}.items() if v is not None}
        return rows

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "laion-cir/template",
            edit(3, tgt_image_id=None),
            r"row 3 has no 'tgt_image_id'; it has \['ref_image_id', 'rel",
        ),
        ("laion-cir/template", edit(3, relative_cap=" "), r"row 3: relative_cap is ' ', expected text that is not bl"),
        ("laion-cir/template", lambda rows: ["1", *rows], r"row 0 is '1', expected an object with \['ref_image_id'"),
        ("laion-cir/template", lambda rows: [], r"has no rows"),
        ("laion-cir/template", lambda rows: 7, r"holds a int, expected list \| dict"),
        ("laion-cir/llm", edit("499497", tgt_image_id=None), r"reference 499497 has no 'tgt_image_id'; it has \['r"),
        ("laion-cir/llm", lambda rows: {**rows, "7": None}, r"reference 7 is None, expected an object"),
        ("cirr/val", edit(2, caption=None), r"row 2 has no 'caption'; it has \['pairid'"),
        ("cirr/val", edit(2, caption=""), r"row 2: caption is '', expected text that is not blank"),
        ("cirr/val", edit(2, target_hard=None), r"row 2 has no 'target_hard'"),
        ("cirr/val", edit(2, pairid="12"), r"row 2: pairid is '12', expected int"),
        ("cirr/val", edit(2, pairid=True), r"row 2: pairid is True, expected int"),
        ("cirr/val", edit(2, caption=["is red"]), r"row 2: caption is \['is red'\], expected text that is not blank"),
        ("cirr/val", edit(2, caption=float("nan")), r"row 2: caption is nan, expected text that is not blank"),
        ("cirr/val", edit(2, pairid=12060), r"1 pairid are given more than once, first: \[12060\]"),
        ("cirr/val", edit(2, img_set={"id": 3}), r"img_set of row 2 has no 'members'; it has \['id'\]"),
        ("cirr/val", edit(2, img_set={"members": [5]}), r"img_set of row 2: members is \[5\], expected list\[str\]"),
        ("fashioniq/val/shirt", edit(1, target=None), r"row 1 has no 'target'"),
        ("fashioniq/val/shirt", edit(1, captions=["red"]), r"row 1: captions must be two, .* with text, not \['red'"),
        ("fashioniq/val/shirt", edit(1, captions=["red", 3]), r"row 1: captions must be two"),
        ("fashioniq/val/shirt", edit(1, captions=[" ", ".?"]), r"row 1: captions must be two"),
        ("circo/val", edit(4, gt_img_ids=None), r"row 4 has no 'gt_img_ids'"),
        ("circo/val", edit(4, gt_img_ids=["5"]), r"row 4: gt_img_ids is \['5'\], expected list\[int\]"),
        ("circo/val", edit(4, semantic_aspects=None), r"row 4 has no 'semantic_aspects'"),
        ("circo/test", edit(4, id=0), r"1 id are given more than once, first: \[0\]"),
    ],
)
def test_unpublished_caption_structure_raises(annotations, name, change, message):
    file = annotations / CAPTION_FILES[name]
    write_json(file, change(read(file)))
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        load(name, annotations)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cirr/val", lambda files: {**files, "dev-0-0-img0": 3}, r"the object: dev-0-0-img0 is 3, expected text"),
        ("cirr/val", lambda files: list(files), r"holds a list, expected dict"),
        ("fashioniq/val/shirt", lambda asins: [*asins, asins[4]], r"1 images are given more .*\['B00S1Y8X04'\]"),
        ("fashioniq/val/shirt", lambda asins: [*asins, {}], r"holds a list, expected list\[str\]"),
        ("circo/val", lambda info: {"info": 1}, r"the object has no 'images'; it has \['info'\]"),
        ("circo/val", lambda info: {"images": [{"id": 1}]}, r"image 0 has no 'file_name'"),
        ("circo/val", lambda info: {"images": info["images"][:1] * 2}, r"1 images are given more than once.*\[42\]"),
    ],
)
def test_unpublished_gallery_structure_raises(annotations, name, change, message):
    file = annotations / GALLERY_FILES[name]
    write_json(file, change(read(file)))
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        load(name, annotations)


@pytest.mark.parametrize(
    ("name", "change", "count"),
    [
        ("cirr/val", lambda files: dict(list(files.items())[2:]), 2),
        ("cirr/train", lambda files: dict(list(files.items())[1:]), 1),
        ("fashioniq/val/shirt", lambda asins: asins[:5], 5),
        ("circo/val", lambda info: {"images": info["images"][3:]}, 3),
    ],
)
def test_captions_of_images_outside_the_gallery_raise(annotations, name, change, count):
    file = annotations / GALLERY_FILES[name]
    write_json(file, change(read(file)))
    message = rf"^{name}: {count} images that the captions name are not in the gallery, first: \['"
    with pytest.raises(ValueError, match=message):
        load(name, annotations)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ["dev-0-0-img0", "dev-97-1-img1"] * 3,
            r"^cirr/val: 1 queries whose img_set is not six .* pairid: \['12060'\]",
        ),
        ([f"dev-{97 * n}-{n % 2}-img{n % 3}" for n in range(1, 7)], r"^cirr/val: 1 queries whose img_set"),
        ([f"dev-{97 * n}-{n % 2}-img{n % 3}" for n in (0, *range(2, 7))], r"1 lack the target in subset_ids"),
    ],
)
def test_subsets_with_foreign_images_raise(data, members, message):
    file = data / CAPTION_FILES["cirr/val"]
    write_json(file, edit(0, img_set={"members": members})(read(file)))
    with pytest.raises(ValueError, match=message):
        load("cirr/val", data)


@pytest.mark.parametrize("file", [*CAPTION_FILES.values(), *GALLERY_FILES.values()])
def test_truncated_files_raise_with_the_position(annotations, file):
    name = next(n for files in (CAPTION_FILES, GALLERY_FILES) for n, f in files.items() if f == file)
    text = (annotations / file).read_text()
    (annotations / file).write_text(text[: len(text) // 2])
    with pytest.raises(
        ValueError, match=rf"{annotations / file}: not JSON, or cut off: .*line 1 column \d+ .* near '.*download"
    ):
        load(name, annotations)
    (annotations / file).write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{annotations / file}: not UTF-8 text"):
        load(name, annotations)


def test_repeated_keys_raise(annotations):
    file = annotations / GALLERY_FILES["cirr/val"]
    file.write_text(file.read_text().replace("dev-97-1-img1", "dev-0-0-img0"))
    with pytest.raises(ValueError, match=rf"{file}: 1 keys are given more than once, first: \['dev-0-0-img0'\]"):
        load("cirr/val", annotations)


@pytest.mark.parametrize("name", LOADERS)
def test_missing_images_are_listed_or_left_out(data, name, caplog):
    whole = load(name, data)
    rows = plain(getattr(whole, "queries", whole))
    lists = [column for column in ("subset_ids", "target_ids") if column in rows[0]]
    gone = {rows[0]["reference_id"], rows[0].get("target_id"), *(rows[3][column][-1] for column in lists)} - {None}
    kept = [
        row
        for row in rows
        if not gone & {row["reference_id"], row.get("target_id"), *(i for c in lists for i in row[c])}
    ]
    assert 0 < len(kept) < len(rows)
    for image_id in gone:
        names = [f"{image_id}.png", f"{image_id:0>12}.jpg"]
        next(file for file in data.rglob("*.*g") if file.name in names).unlink()

    message = (
        rf"^{name}.*: \d of \d+ images have no file in {data}.*, first: \['.*Pass allow_missing=True to leave them"
    )
    with pytest.raises(ValueError, match=message):
        load(name, data)
    with caplog.at_level(logging.WARNING, logger="pvlf_hf"):
        loaded = load(name, data, allow_missing=True)
    if hasattr(whole, "gallery"):
        missing = f"{len(gone)} gallery images, {len(rows) - len(kept)} queries"
        assert rows_of(loaded) == (kept, [row for row in plain(whole.gallery) if row["image_id"] not in gone])
        assert loaded.protocol.missing == missing
        assert [r.getMessage() for r in caplog.records] == [f"{name}: left out because files are missing: {missing}"]
    else:
        assert plain(loaded) == kept
        assert sum(r.args[1] for r in caplog.records) == len(rows) - len(kept)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("laion-cir/llm", "laion-cir/llm: 8 triplets, but the published annotations have 16000. Pass check_counts=F"),
        ("cirr/train", "cirr/train: 12 queries, but the published annotations have 28225"),
        ("cirr/test1", "cirr/test1: 8 queries, but the published annotations have 4148"),
        ("fashioniq/train", "fashioniq/train/dress: 6 queries, but the published annotations have 5985"),
        ("fashioniq/val/shirt", "fashioniq/val/shirt: 6 queries, but the published annotations have 2038"),
        ("circo/test", "circo/test: 8 queries, but the published annotations have 800"),
    ],
)
def test_unpublished_counts_raise(originals, name, message):
    folder, loader = LOADERS[name]
    with pytest.raises(ValueError, match=message):
        loader(originals / folder)


def test_published_counts_pass_and_one_image_less_raises(originals, monkeypatch):
    monkeypatch.setitem(laion_cir.EXPECTED_COUNTS, "template", 8)
    monkeypatch.setitem(cirr.EXPECTED_COUNTS, "val", (10, 14))
    monkeypatch.setitem(fashioniq.EXPECTED_COUNTS["val"], "shirt", (6, 12))
    monkeypatch.setitem(fashioniq.EXPECTED_UNION, "shirt", 10)
    monkeypatch.setitem(circo.EXPECTED_COUNTS, "val", 6)
    monkeypatch.setattr(circo, "EXPECTED_IMAGES", 18)
    load_laion_cir(originals / "laion-cir", "template")
    load_cirr(originals / "cirr")
    for gallery in ("original", "union"):
        load_fashioniq(originals / "fashioniq", "shirt", gallery=gallery)
    load_circo(originals / "circo")

    monkeypatch.setitem(cirr.EXPECTED_COUNTS, "val", (10, 15))
    monkeypatch.setitem(fashioniq.EXPECTED_UNION, "shirt", 11)
    monkeypatch.setitem(fashioniq.EXPECTED_COUNTS["test"], "dress", (6, 13))
    monkeypatch.setattr(circo, "EXPECTED_IMAGES", 19)
    for loader, message in (
        (partial(load_fashioniq, originals / "fashioniq", "dress", "test"), "^fashioniq/test/dress: 12 images, .* 13"),
        (partial(load_cirr, originals / "cirr"), "cirr/val: 14 images, .* 15"),
        (partial(load_fashioniq, originals / "fashioniq", "shirt", gallery="union"), "union of .*: 10 images, .* 11"),
        (partial(load_circo, originals / "circo"), "circo/val: 18 images, .* 19"),
    ):
        with pytest.raises(ValueError, match=message):
            loader()


def test_expected_counts_equal_the_published_totals():
    assert sum(queries for queries, _ in cirr.EXPECTED_COUNTS.values()) == 36554
    assert sum(images for _, images in cirr.EXPECTED_COUNTS.values()) == 21551
    sums = {split: sum(q for q, _ in its.values()) for split, its in fashioniq.EXPECTED_COUNTS.items()}
    assert sums == {"train": 18000, "val": 6016, "test": 6118}
    assert sum(images for its in fashioniq.EXPECTED_COUNTS.values() for _, images in its.values()) == 77683


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cirr/val", {}, ("cirr-val", "every image of the val split", "removed", "cirr")),
        ("cirr/test1", {}, ("cirr-test1", "every image of the test1 split", "removed", "cirr")),
        ("fashioniq/val/shirt", {}, ("fashioniq", "the category's images that val lists", "kept", "fashioniq")),
        (
            "fashioniq/val/shirt",
            {"gallery": "union", "captions": "both-mean", "reference": "removed"},
            (
                "fashioniq-union-both-mean-removed",
                "the category's images that val names in queries",
                "removed",
                "fashioniq",
            ),
        ),
        (
            "fashioniq/test/dress",
            {},
            ("fashioniq-test", "the category's images that test lists", "kept", "fashioniq"),
        ),
        ("circo/val", {}, ("circo-val", "COCO unlabeled2017", "kept", "circo")),
        ("circo/test", {"reference": "removed"}, ("circo-test-removed", "COCO unlabeled2017", "removed", "circo")),
    ],
)
def test_benchmarks_state_their_protocol(originals, name, options, expected):
    benchmark = load(name, originals, **options)
    protocol = benchmark.protocol
    assert benchmark.name == name
    assert (protocol.name, protocol.gallery, protocol.reference, protocol.metrics) == expected
    assert protocol.missing == "none"
    assert protocol.ties == Protocol("own", "").ties


@pytest.mark.parametrize("name", ["cirr/val", "fashioniq/val/shirt", "circo/val"])
def test_revision_depends_on_both_annotation_files(data, name):
    revisions = [load(name, data).protocol.revision]
    for files in (CAPTION_FILES, GALLERY_FILES):
        file = data / files[name]
        file.write_text(file.read_text() + "\n")
        revisions.append(load(name, data).protocol.revision)
    assert len(set(revisions)) == 3
    assert all(len(r) == len("sha256:") + 12 for r in revisions)


@pytest.mark.parametrize(
    ("name", "choice", "message"),
    [
        (
            "laion-cir/combined",
            {"subset": "both"},
            r"unknown subset 'both'; choose from \['template', 'llm', 'combined'\]",
        ),
        ("cirr/val", {"split": "test"}, r"unknown split 'test'; choose from \['train', 'val', 'test1'\]"),
        (
            "fashioniq/val/shirt",
            {"category": "hat"},
            r"unknown category 'hat'; choose from \['dress', 'shirt', 'toptee'\]",
        ),
        ("fashioniq/val/shirt", {"split": "dev"}, r"unknown split 'dev'; choose from \['train', 'val', 'test'\]"),
        ("fashioniq/val/shirt", {"gallery": "all"}, r"unknown gallery 'all'; choose from \['original', 'union'\]"),
        (
            "fashioniq/val/shirt",
            {"captions": "or"},
            r"unknown captions 'or'; choose from \['and', 'and-reversed', 'both",
        ),
        ("fashioniq/val/shirt", {"reference": True}, r"unknown reference True; choose from \['kept', 'removed'\]"),
        ("circo/val", {"split": "train"}, r"unknown split 'train'; choose from \['val', 'test'\]"),
        ("circo/val", {"reference": "drop"}, r"unknown reference 'drop'; choose from \['kept', 'removed'\]"),
    ],
)
def test_unknown_choices_raise(originals, name, choice, message):
    with pytest.raises(ValueError, match=message):
        load(name, originals, **choice)
