"""Loaders of i-CIR, PinPoint, CIRCLED, GeneCIS, Refined-CIRR and -FashionIQ, L-CIRR and EDIR, on miniatures."""

import json
import os
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from error_bounds import MEAN_ERROR
from miniatures import make_all, make_icir, write_json
from PIL import Image
from tiny import make_model, make_processor

from pvlf_hf import Gallery
from pvlf_hf.data import pinpoint
from pvlf_hf.data.benchmark import CIRBenchmark, Protocol, groups_of
from pvlf_hf.data.circled import load_circled
from pvlf_hf.data.cirr import load_cirr
from pvlf_hf.data.doctor import examine
from pvlf_hf.data.edir import load_edir
from pvlf_hf.data.fashioniq import compose_captions
from pvlf_hf.data.genecis import load_genecis
from pvlf_hf.data.icir import load_icir
from pvlf_hf.data.l_cirr import load_l_cirr
from pvlf_hf.data.pinpoint import download_images, load_pinpoint
from pvlf_hf.data.refined_cirr import load_refined_cirr
from pvlf_hf.data.refined_fashioniq import load_refined_fashioniq
from pvlf_hf.embeddings.embedding_store import EmbeddingStore
from pvlf_hf.evaluation.definitions import gain_at_k, trapezoid_precision
from pvlf_hf.evaluation.retrieval_sheet import sheet_rows
from pvlf_hf.evaluation.scoring import average, evaluate, score

# By name: the folder of `make_all`, and the loader.
LOADERS = {
    "icir": ("icir", load_icir),
    "pinpoint": ("pinpoint", load_pinpoint),
    "circled/cirr_val": ("circled", partial(load_circled, subset="cirr_val")),
    "circled/circo_val": ("circled", partial(load_circled, subset="circo_val")),
    "genecis/focus_object": ("genecis", partial(load_genecis, task="focus_object")),
    "genecis/change_attribute": ("genecis", partial(load_genecis, task="change_attribute")),
    "refined-cirr": ("refined-cirr", load_refined_cirr),
    "refined-fashioniq/dress": ("refined-fashioniq", partial(load_refined_fashioniq, category="dress")),
    "refined-fashioniq/shirt": ("refined-fashioniq", partial(load_refined_fashioniq, category="shirt")),
    "l-cirr": ("l-cirr", load_l_cirr),
    "edir": ("edir", load_edir),
    "cirr": ("cirr", partial(load_cirr, labels="graded")),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("originals"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


# By folder: the others that its loader reads.
BESIDE = {
    "circled": ["cirr", "circo"],
    "refined-cirr": ["cirr"],
    "refined-fashioniq": ["fashioniq"],
    "l-cirr": ["cirr"],
}


@pytest.fixture
def data(originals, tmp_path, request):
    """Return a copy that a test may change, of what the loader reads that the test names, or else of `pinpoint`."""

    def copy(source, target):
        (os.link if source.endswith((".png", ".jpg")) else shutil.copy)(source, target)

    params = getattr(request.node, "callspec", None) and request.node.callspec.params
    folder = LOADERS[params["name"]][0] if params else "pinpoint"
    for name in [folder, *BESIDE.get(folder, [])]:
        shutil.copytree(originals / name, tmp_path / "data" / name, copy_function=copy)
    return tmp_path / "data"


def load(name, data_root, **options):
    folder, loader = LOADERS[name]
    return loader(data_root / folder, check_counts=False, **options)


def read(file):
    return json.loads(file.read_text())


def plain(dataset):
    """Return the rows without the images."""
    return dataset.remove_columns({"reference", "reference_2", "image"} & set(dataset.column_names)).to_list()


def shows(image, file):
    with Image.open(file) as expected:
        return image.size == expected.size and image.tobytes() == expected.tobytes()


def test_icir_ranks_the_images_of_the_instance(originals):
    benchmark = load("icir", originals)
    rows = [line.split(",") for line in (originals / "icir/query_files.csv").read_text().splitlines()]
    database = [line.split(",") for line in (originals / "icir/database_files.csv").read_text().splitlines()]
    for row, (path, text, instance) in zip(benchmark.queries, rows, strict=True):
        assert (row["reference_id"], row["caption"], row["group_id"]) == (path, text, instance)
        assert row["target_ids"] == [p for p, t, i in database if (t, i) == (text, instance)]
        assert row["target_id"] == row["target_ids"][0]
        assert shows(row["reference"], originals / path)
    assert plain(benchmark.gallery) == [{"image_id": path, "group_ids": [i]} for path, _, i in database]
    assert all(shows(row["image"], originals / row["image_id"]) for row in benchmark.gallery)
    assert max(len(row["target_ids"]) for row in benchmark.queries) == 2
    groups = [(len(queries), len(images)) for queries, images in groups_of(benchmark)]
    assert sum(q for q, _ in groups) == len(rows) and sum(n for _, n in groups) == len(database)


def test_icir_shards_are_unpacked_once(originals, tmp_path):
    root = make_icir(tmp_path / "icir", packed=True)
    assert not (root / "database").exists()
    benchmark = load_icir(root, check_counts=False)
    expected = load("icir", originals)
    assert plain(benchmark.queries) == plain(expected.queries)
    assert plain(benchmark.gallery) == plain(expected.gallery)
    for row, other in zip(benchmark.gallery, expected.gallery, strict=True):
        assert row["image"].tobytes() == other["image"].tobytes()
    shutil.rmtree(root / "webdataset")  # no longer needed
    assert plain(load_icir(root, check_counts=False).queries) == plain(expected.queries)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:2000], ".*"),
        (lambda content: content.replace(b'"icir/query/', b'"../../quer/'), "leaves the folder"),
        (lambda content: content.replace(b'{"img_path"', b'{"imgXpath"'), "expected an object with its 'img_path'"),
        (lambda content: content.replace(b"000000000.json", b"000000009.json"), "1 samples lack|2 samples lack"),
    ],
)
def test_damaged_shards_raise(tmp_path, damage, message):
    root = make_icir(tmp_path / "icir", packed=True)
    shard = next(root.glob("webdataset/query/*000000.tar"))
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=f"{shard}: .*({message}).*; download it again"):
        load_icir(root, check_counts=False)
    assert not list(tmp_path.glob("query*"))


def test_pinpoint_loads_positives_negatives_and_pairs(originals):
    benchmark = load("pinpoint", originals)
    records = pq.read_table(originals / "pinpoint/pinpoint_licensed.parquet").to_pylist()
    for row, record in zip(benchmark.queries, records, strict=True):
        second = record["query_image_signature2"]
        assert row["query_id"] == record["query_id"].removeprefix("query_")
        assert (row["reference_id"], row["reference_2_id"]) == (record["query_image_signature"], second)
        assert (row["target_ids"], row["negative_ids"]) == tuple(
            record[f"{kind}_candidates"] for kind in ("positive", "negative")
        )
        assert shows(row["reference"], originals / f"pinpoint/images/{row['reference_id']}.jpg")
        assert (row["reference_2"] is None) == (second is None)
        assert second is None or shows(row["reference_2"], originals / f"pinpoint/images/{second}.jpg")
    assert list(benchmark.gallery["image_id"]) == (originals / "pinpoint/index_signatures.txt").read_text().split()
    groups = list(benchmark.queries["paraphrase_group"])
    assert groups[0] == groups[1] and len(set(groups)) == 5


def test_pinpoint_images_are_downloaded_and_resumed(originals, tmp_path, monkeypatch):
    root, served = tmp_path / "pinpoint", tmp_path / "served"
    shutil.copytree(originals / "pinpoint", root, ignore=shutil.ignore_patterns("images"))
    files = sorted((originals / "pinpoint/images").iterdir())
    for file in files[1:]:
        folder = served / file.name[:2] / file.name[2:4] / file.name[4:6]
        folder.mkdir(parents=True)
        shutil.copy(file, folder)
    handler = partial(SimpleHTTPRequestHandler, directory=served)
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(pinpoint, "IMAGE_URL", f"http://127.0.0.1:{server.server_address[1]}/{{}}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert download_images(root, threads=2) == [files[0].stem]
        shutil.rmtree(served)
        assert download_images(root, threads=2) == [files[0].stem]  # nothing else is asked for again
        server.shutdown()
    assert sorted(file.name for file in (root / "images").iterdir()) == [file.name for file in files[1:]]
    assert all((root / f"images/{file.name}").read_bytes() == file.read_bytes() for file in files[1:])


@pytest.mark.parametrize(("subset", "base"), [("cirr_val", "cirr/val"), ("circo_val", "circo/val")])
def test_circled_loads_every_turn(originals, subset, base):
    benchmark = load(f"circled/{subset}", originals)
    records = read(originals / f"circled/data/{subset}.json")
    expected = [(record, turn) for record in records for turn in record["turns"]]
    for row, (record, turn) in zip(benchmark.queries, expected, strict=True):
        assert (row["session_id"], row["turn"]) == (record["session_id"], turn["turn"])
        assert (row["reference_id"], row["caption"]) == (str(turn["reference_image_id"]), turn["relative_caption"])
        assert row["target_ids"] == list(map(str, record["ground_truth_ids"]))
    assert len(benchmark.gallery) == {"cirr/val": 14, "circo/val": 18}[base]
    assert {len(ids) for ids in benchmark.queries["target_ids"]} == {1, 2}


def test_sessions_equal_refine(originals, tmp_path):
    """A session by `Gallery.search` and `refine`, picking the annotated images, has the ranks of `evaluate`."""
    model, processor = make_model(), make_processor()
    benchmark = load("circled/cirr_val", originals)
    measured = evaluate(model, processor, benchmark, progress=False)
    gallery = Gallery.from_dataset(benchmark.gallery, model, processor)
    expected, result = [], None
    for row in benchmark.queries:
        if row["turn"] == 1:
            result = gallery.search(row["reference"], row["caption"], k=13, exclude=[row["reference_id"]])
        else:
            result = result.refine(row["caption"], pick=result.ids.index(row["reference_id"]))
        expected.append(tuple(result.ids.index(i) for i in row["target_ids"]))
    assert measured.per_query["target_ranks"] == tuple(expected)
    assert len({min(ranks) for ranks in expected}) > 2


@pytest.mark.parametrize("task", ["focus_object", "change_attribute"])
def test_genecis_ranks_the_candidates_of_a_query(originals, task):
    records = read(originals / f"genecis/genecis/{task}.json")
    benchmark = load_genecis(originals / "genecis", task, check_counts=False)
    assert list(benchmark.queries["caption"]) == [record["condition"] for record in records]
    ids = list(benchmark.gallery["image_id"])
    for (rows, images), record in zip(groups_of(benchmark), records, strict=True):
        assert len(rows) == 1 and len(images) == 1 + len(record["gallery"])
        own = [ids[row].removesuffix(" again") for row in images.tolist()]
        assert sorted(own) == sorted(name_of(image) for image in [record["target"], *record["gallery"]])
        row = benchmark.queries[int(rows[0])]
        assert row["target_id"] == name_of(record["target"]) and row["reference_id"] == name_of(record["reference"])
    assert sum(name.endswith(" again") for name in ids) == 1
    if task == "focus_object":
        assert all(shows(row["image"], coco_file(originals, row["image_id"])) for row in benchmark.gallery)


def name_of(image):
    if "val_image_id" in image:
        return str(image["val_image_id"])
    return f"{image['image_id']} {' '.join(map(str, image['instance_bbox']))}"


def coco_file(root, name):
    return root / f"genecis/val2017/{int(name.removesuffix(' again')):012d}.jpg"


def test_genecis_crops_as_the_official_code(originals):
    """Widened by 0.7 to the left and above, to 1.7 of its size from there, cut at the border, padded in black."""
    benchmark = load("genecis/change_attribute", originals)
    for row in benchmark.gallery:
        number, left, top, width, height = map(int, row["image_id"].removesuffix(" again").split())
        file = next((originals / "genecis").glob(f"VG_100K*/{number}.jpg"))
        with Image.open(file) as image:
            box = (max(0, left - 0.7 * width), max(0, top - 0.7 * height))
            end = (min(image.width, box[0] + 1.7 * width), min(image.height, box[1] + 1.7 * height))
            part = image.crop((*box, *end))
        side = max(part.size)
        square = Image.new("RGB", (side, side))
        square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
        assert row["image"].size == (side, side) and row["image"].tobytes() == square.tobytes()


def test_genecis_crops_once(originals, monkeypatch):
    first = load("genecis/change_attribute", originals)
    crops = [row["image"].tobytes() for row in first.gallery]

    def crop_again(*args, **kwargs):
        raise RuntimeError("cropped again")

    monkeypatch.setattr("pvlf_hf.data.genecis._crop_row", crop_again)
    again = load("genecis/change_attribute", originals)
    assert [row["image"].tobytes() for row in again.gallery] == crops
    file = next((originals / "genecis").glob("VG_100K*/502.jpg"))
    os.utime(file, ns=(0, 1))  # another file of the same name
    with pytest.raises(RuntimeError, match="cropped again"):
        load("genecis/change_attribute", originals)


def test_rewritten_captions_take_the_place_of_the_originals(originals):
    cirr = {row["query_id"]: row for row in plain(load_cirr(originals / "cirr", check_counts=False).queries)}
    records = read(originals / "refined-cirr/refined_cirr.val.json")
    for only_refined in (False, True):
        kept = [r for r in records if r["is_refined"] or not only_refined]
        rows = plain(load("refined-cirr", originals, only_refined=only_refined).queries)
        assert rows == [{**cirr[str(r["pairid"])], "caption": r["caption"]} for r in kept]
    long = read(originals / "l-cirr/cap.rc2.val.json")
    rows = plain(load("l-cirr", originals).queries)
    assert rows == [{**cirr[str(r["pairid"])], "caption": r["caption"]} for r in long]


@pytest.mark.parametrize(("category", "file"), [("dress", "refined_fiq.dress.val"), ("shirt", "refined_fiq.val")])
def test_refined_fashioniq_takes_the_pairs_of_the_category(originals, category, file):
    own = read(originals / f"fashioniq/captions/cap.{category}.val.json")
    rows = plain(load(f"refined-fashioniq/{category}", originals).queries)
    assert [(row["reference_id"], row["target_id"]) for row in rows] == [(r["candidate"], r["target"]) for r in own]
    assert [row["caption"] for row in rows] == [compose_captions(own[0]["captions"]), *["now in red"] * 5]
    assert len(read(originals / f"refined-fashioniq/{file}.json")) == (6 if category == "dress" else 12)
    assert len(load(f"refined-fashioniq/{category}", originals, only_refined=True).queries) == 5


@pytest.mark.parametrize("name", ["refined-fashioniq/shirt"])
def test_rows_that_are_no_pair_raise_or_are_left_out(data, name, caplog):
    """In the file for all categories, a row of another category is no error; one of none is."""
    file = data / "refined-fashioniq/refined_fiq.val.json"
    records = read(file)
    for number in (2, 9):  # one of shirt's six, and one of toptee's
        records[number]["target"] = f"B00000000{number}"
    write_json(file, records)
    with pytest.raises(
        ValueError, match=r"2 rows of .* are no pair of .*: row 2 \(.*B000000002\), row 9 .*allow_miss"
    ):
        load(name, data)
    part = load(name, data, allow_missing=True)
    assert len(part.queries) == 5 and part.protocol.missing == "none; 2 rows that are no pair of FashionIQ"
    assert "B000000009" in caplog.text
    shutil.move(file, file.with_name("refined_fiq.shirt.val.json"))  # the category's own file has no other pairs
    with pytest.raises(ValueError, match="7 rows of .* are no pair"):
        load(name, data)


@pytest.mark.parametrize("name", ["refined-cirr", "l-cirr", "refined-fashioniq/dress"])
def test_files_that_have_a_part_of_the_split_are_said_to(data, name, caplog, monkeypatch):
    """Counts of the original data set are as published here, and the file is short."""
    monkeypatch.setattr("pvlf_hf.data.cirr.EXPECTED_COUNTS", {"val": (10, 14)})
    monkeypatch.setattr("pvlf_hf.data.fashioniq.EXPECTED_COUNTS", {"val": {"dress": (6, 12)}})
    folder, loader = LOADERS[name]
    if name.endswith("dress"):
        file = data / folder / "refined_fiq.dress.val.json"
        assert len(loader(data / folder).queries) == 6 and not caplog.text  # whole
        write_json(file, read(file)[:4])
    loader(data / folder)
    assert re.search(r"\d of the \d+ queries of .*see that it was downloaded whole", caplog.text)


@pytest.mark.parametrize("name", ["l-cirr"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"1": "a long text"}, "holds a dict, expected list"),
        ([{"pair_id": 1, "text": "long"}], "row 0 has no 'pairid'; it has"),
        (None, "is not under"),
    ],
)
def test_another_layout_of_l_cirr_is_said(data, name, content, problem):
    file = data / "l-cirr/cap.rc2.val.json"
    file.unlink() if content is None else write_json(file, content)
    expected = "not verified; expected is a JSON list of objects with CIRR's 'pairid' and the long 'caption'"
    with pytest.raises(ValueError, match=f"{problem}.*{expected}.*cap.rc2.val.json"):
        load(name, data)
    (finding,) = examine(name, data / name).findings
    assert finding.kind == "annotations" and expected in finding.message
    (data / "cirr/cirr/captions/cap.rc2.val.json").unlink()
    with pytest.raises(ValueError, match=r"cap.rc2.val.json is not under .*/cirr; looked") as raised:
        load(name, data)
    assert "not verified" not in str(raised.value)  # the fault is in CIRR's own files


def test_edir_joins_its_three_files(originals):
    benchmark, root = load("edir", originals), originals / "edir"
    queries, corpus, instances = (
        list(map(json.loads, (root / f"{name}.jsonl").read_text().splitlines()))
        for name in ("queries", "corpus", "instances")
    )
    assert [row["image_id"] for row in plain(benchmark.gallery)] == [row["id"] for row in corpus]
    for row, query, instance in zip(benchmark.queries, queries, instances, strict=True):
        assert (row["query_id"], row["caption"]) == (query["id"], query["text"])
        assert (row["target_id"], row["category"]) == (instance["pos"][0], query["metadata"]["subcategory"])
        assert shows(row["reference"], root / f"imgs_mc/{query['image']}")


@pytest.mark.parametrize("name", ["cirr"])
def test_graded_labels_of_cirr(data, name):
    file = data / "cirr/cirr/captions/cap.rc2.val.json"
    records = read(file)
    names = records[0]["img_set"]["members"]
    soft = {names[2]: 0.5, names[3]: -1.0, names[4]: 0.2, records[0]["reference"]: 1.0}
    write_json(file, [{**records[0], "target_soft": soft}, *records[1:]])
    row, other = load(name, data).queries.select(range(2))
    assert dict(zip(row["target_ids"], row["target_grades"], strict=True)) == {
        names[2]: 0.5,
        names[4]: 0.2,
        records[0]["target_hard"]: 1.0,
    }
    assert row["negative_ids"] == [names[3]] and other["negative_ids"] == []
    assert other["target_ids"] == [records[1]["target_hard"]]


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("icir", {"*.csv": "annotations"}),
        ("pinpoint", {"images/*.jpg": "."}),
        ("circled/cirr_val", {"data/*.json": "."}),
        ("genecis/focus_object", {"genecis/*.json": ".", "val2017": "coco2017/val2017"}),
        ("genecis/change_attribute", {"VG_100K*/*.jpg": "Visual_Genome/VG_All", "genecis": "annotations"}),
        ("refined-cirr", {"refined_cirr.val.json": "data/refined_cirr.val.json"}),
        ("l-cirr", {"cap.rc2.val.json": "captions/cap.rc2.val.json"}),
        ("edir", {"imgs_mc": "media"}),
        ("edir", {"imgs_mc/*": "."}),
    ],
)
def test_usual_layouts_load_the_same(data, name, moves):
    expected = plain(load(name, data).queries)
    root = data / LOADERS[name][0]
    for source, destination in moves.items():
        into_folder, target = "*" in source, root / destination
        (target if into_folder else target.parent).mkdir(parents=True, exist_ok=True)
        for path in sorted(root.glob(source)):
            path.rename(target / path.name if into_folder else target)
    loaded = load(name, data)
    assert plain(loaded.queries) == expected and loaded.queries[0]["reference"].size[0] > 8


@pytest.mark.parametrize("name", LOADERS)
def test_other_counts_than_published_raise(originals, name):
    folder, loader = LOADERS[name]
    with pytest.raises(ValueError, match="but the published annotations have"):
        loader(originals / folder)


# By name: an image that one query at least needs, and how many queries are left without it.
NEEDED = {
    "icir": ("database/big_ben/big_ben_2.jpg", 3),
    "pinpoint": ("images/04a4*.jpg", 3),
    "circled/cirr_val": ("../cirr/dev/dev-0-0-img0.png", 9),
    "genecis/focus_object": ("val2017/000000000139.jpg", 3),
    "refined-cirr": ("../cirr/dev/dev-0-0-img0.png", 5),
    "refined-fashioniq/dress": ("../fashioniq/images/B00D1Y8X00.png", 5),
    "l-cirr": ("../cirr/dev/dev-0-0-img0.png", 4),
    "edir": ("imgs_mc/502_007464817_3.png", 4),
}


@pytest.mark.parametrize("name", NEEDED)
def test_missing_images_raise_or_are_left_out(data, name):
    whole = load(name, data)
    pattern, left = NEEDED[name]
    next((data / LOADERS[name][0]).glob(pattern)).unlink()
    with pytest.raises(ValueError, match=r"1 of \d+ images have no file in .*allow_missing=True"):
        load(name, data)
    partial_ = load(name, data, allow_missing=True)
    assert len(partial_.queries) == left
    gone = len(whole.gallery) - len(partial_.gallery)
    lost = len(whole.queries) - left
    assert partial_.protocol.missing == f"{gone} gallery images, {lost} queries"


def test_negatives_without_a_file_are_taken_off_their_lists(data):
    whole = load("pinpoint", data)
    gone = whole.queries[0]["negative_ids"][-1]
    assert gone not in {i for ids in whole.queries["target_ids"] for i in ids}
    (data / f"pinpoint/images/{gone}.jpg").unlink()
    part = load("pinpoint", data, allow_missing=True)
    expected = [[i for i in ids if i != gone] for ids in whole.queries["negative_ids"]]
    assert list(part.queries["negative_ids"]) == expected and len(part.gallery) == len(whole.gallery) - 1


def test_labels_outside_of_the_index_raise_or_are_left_out(data):
    listing = data / "pinpoint/index_signatures.txt"
    signatures = listing.read_text().split()
    listing.write_text("\n".join(signatures[:7]))
    with pytest.raises(ValueError, match="images that the captions name are not in the gallery"):
        load("pinpoint", data)
    part = load("pinpoint", data, allow_missing=True)
    assert len(part.queries) == 5 and all(set(ids) <= set(signatures[:7]) for ids in part.queries["negative_ids"])
    assert part.protocol.missing == "none; 1 queries with positives outside of the index"


def table(change):
    def write(file):
        rows = pq.read_table(file).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows), file)

    return write


def lines(change):
    return lambda file: file.write_text("\n".join(change(file.read_text().splitlines())))


def rows(change):
    def write(file):
        content = read(file)
        change(content)
        write_json(file, content)

    return write


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        (
            "icir",
            "query_files.csv",
            lines(lambda r: ["a.jpg,red", *r]),
            r"row 0 is \['a.jpg', 'red'\], expec",
        ),
        (
            "icir",
            "query_files.csv",
            lines(lambda r: ["icir/a.jpg,in red,white_cat", *r]),
            "no database image of 'white",
        ),
        ("icir", "query_files.csv", lines(lambda r: ["icir/a.jpg, ,white_cat"]), "row 0: the text is empty"),
        ("icir", "database_files.csv", lines(lambda r: [*r, r[0]]), "is given more than once"),
        ("icir", "database_files.csv", lines(lambda r: []), "has no rows"),
        ("pinpoint", "pinpoint_licensed.parquet", lambda f: f.write_bytes(b"PAR1"), "cannot be read, or lacks one of"),
        (
            "pinpoint",
            "pinpoint_licensed.parquet",
            table(lambda r: r[2].update(instruction=" ")),
            "row 2: instruction is ' ', expected text",
        ),
        (
            "pinpoint",
            "pinpoint_licensed.parquet",
            table(lambda r: r[1].update(query_id=r[0]["query_id"])),
            "1 query_id are given more than once",
        ),
        (
            "pinpoint",
            "pinpoint_licensed.parquet",
            table(lambda r: r[1].update(positive_candidates=[])),
            "row 1: positive_candidates is empty",
        ),
        ("pinpoint", "index_signatures.txt", lines(lambda r: [*r, r[0]]), "1 signatures are given more than once"),
        (
            "circled/cirr_val",
            "data/cirr_val.json",
            rows(lambda r: r[1]["turns"][1].pop("relative_caption")),
            "turn of cirr_val_0001 1 has no 'relative_caption'",
        ),
        (
            "circled/cirr_val",
            "data/cirr_val.json",
            rows(lambda r: r[1].update(ground_truth_ids=[])),
            "cirr_val_0001: ground_truth_ids is empty",
        ),
        (
            "genecis/focus_object",
            "genecis/focus_object.json",
            rows(lambda r: r[3]["gallery"].pop()),
            r"galleries of \[2, 3\] images, but those of a task have one size",
        ),
        (
            "genecis/focus_object",
            "genecis/focus_object.json",
            rows(lambda r: r[3]["target"].update(val_image_id="7")),
            "row 3, image 1: val_image_id is '7', expected int",
        ),
        (
            "genecis/change_attribute",
            "genecis/change_attribute.json",
            rows(lambda r: r[3]["target"].update(instance_bbox=[1, 2, 0, 4])),
            r"instance_bbox of image \d+ is \[1, 2, 0, 4\], expected left, top, width, height",
        ),
        (
            "refined-cirr",
            "refined_cirr.val.json",
            rows(lambda r: r[0].update(pairid=7)),
            r"1 pairid are not of CIRR's val split, first: \[7\]",
        ),
        ("l-cirr", "cap.rc2.val.json", rows(lambda r: r[0].update(caption="")), "row 0: caption is '', expected text"),
        (
            "refined-fashioniq/dress",
            "refined_fiq.dress.val.json",
            rows(lambda r: r[0].update(captions=["red"])),
            "row 0: captions must be one rewritten, or two",
        ),
        (
            "refined-fashioniq/dress",
            "refined_fiq.dress.val.json",
            rows(lambda r: [row.update(target="B") for row in r]),
            "no row is a pair of FashionIQ's dress",
        ),
        ("edir", "queries.jsonl", lambda f: f.write_text('{"id": 1'), "a line is not JSON, or cut off"),
        (
            "edir",
            "instances.jsonl",
            lines(lambda r: r[1:]),
            "instances.jsonl: query q0 has 0 positives, expected one",
        ),
        ("edir", "queries.jsonl", lines(lambda r: r[1:]), r"1 qid are not in queries.jsonl, first: \['q0'\]"),
        ("edir", "corpus.jsonl", lines(lambda r: [*r, r[0]]), "1 id are given more than once"),
    ],
)
def test_unpublished_structure_raises(data, name, file, change, message):
    change(data / LOADERS[name][0] / file)
    with pytest.raises(ValueError, match=message):
        load(name, data)


# ---- the columns that they need ----


def toy(protocol=None, gallery=None, **columns):
    base = {"reference": ["r"] * 2, "reference_id": ["a", "a"], "caption": ["x", "y"], "target_id": ["b", "c"]}
    images = gallery or {"image": ["i"] * 4, "image_id": ["a", "b", "c", "d"]}
    settings = {"name": "toy", "gallery": "four", "reference": "kept", **(protocol or {})}
    return CIRBenchmark("toy", Dataset.from_dict({**base, **columns}), Dataset.from_dict(images), Protocol(**settings))


GROUPED = {"image": ["i"] * 4, "image_id": ["a", "b", "c", "d"], "group_ids": [["1"], ["1"], ["2"], ["1", "2"]]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_id": ["1", "2"]}, "queries need a group_id and gallery images group_ids, one lacks them"),
        ({"gallery": GROUPED}, "queries need a group_id and gallery images group_ids"),
        ({"gallery": GROUPED, "group_id": ["1", "1"]}, r"1 name target_id outside of their group, rows \[1\]"),
        ({"gallery": GROUPED, "group_id": ["1", "7"]}, r"1 groups have no gallery image, first: \['7'\]"),
        (
            {"gallery": GROUPED, "group_id": ["1", "2"], "protocol": {"reference": "removed"}},
            "groups rank their own images",
        ),
        (
            {"target_ids": [["b"], ["c", "a"]], "protocol": {"reference": "removed"}},
            "1 have their reference as target",
        ),
        ({"negative_ids": [["d"], ["c"]]}, r"1 name an image as positive and as negative, first rows: \[1\]"),
        ({"negative_ids": [["d"], ["x"]]}, r"1 negative_ids not in the gallery, first: \['x'\]"),
        ({"target_ids": [["b"], ["c"]], "target_grades": [[1.0], [0.0]]}, "1 have target_grades that are not one num"),
        ({"target_ids": [["b"], ["c"]], "target_grades": [[1.0, 0.5], [1.0]]}, "1 have target_grades that are not"),
        ({"reference_2_id": ["d", None]}, r"missing column\(s\) \['reference_2'\]"),
        (
            {"reference_2_id": ["d", None], "reference_2": ["r", None], "protocol": {"reference": "removed"}},
            "1 have two references, and one can be removed",
        ),
    ],
)
def test_inconsistent_columns_raise(options, message):
    with pytest.raises(ValueError, match=message):
        toy(**options)


def test_references_may_be_outside_of_the_gallery():
    outside = {"reference_id": ["x", "y"], "reference_2_id": ["z", None], "reference_2": ["r", None]}
    assert toy(protocol={"reference": "outside"}, **outside).queries["reference_2_id"][:] == ["z", None]
    with pytest.raises(ValueError, match="2 reference_id not in the gallery"):
        toy(**outside)


def test_groups_rank_their_own_images():
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.2]])
    gallery = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0], [1.0, 0.1]])  # d is the best of both groups
    grouped = score(toy(gallery=GROUPED, group_id=["1", "2"]), queries, gallery)
    assert grouped.per_query["rank"] == (2, 1)
    assert score(toy(), queries, gallery).per_query["rank"] == (2, 3)


def test_trapezoid_precision_equals_the_scorer_by_hand():
    """Compare with i-CIR's `compute_ap`: (1 + 1)/2 at rank 0, and (1/3 + 2/4)/2 at rank 3, over 2 + 1e-5."""
    ranks = torch.tensor([[3, 0], [1, -1]])
    expected = [(1 + (1 / 3 + 2 / 4) / 2) / (2 + 1e-5), (0 / 1 + 1 / 2) / 2 / (1 + 1e-5)]
    assert trapezoid_precision(ranks).tolist() == pytest.approx(expected, rel=MEAN_ERROR)


def test_gain_by_hand():
    ranks, grades = torch.tensor([[2, 0], [4, -1]]), torch.tensor([[1.0, 0.5], [1.0, -1.0]])
    log3 = torch.log2(torch.tensor(3.0, dtype=torch.float64)).item()
    gain = gain_at_k(ranks, grades, [1, 3])
    assert gain[1].tolist() == [0.5, 0.0]
    assert gain[3].tolist() == pytest.approx([(0.5 + 1 / 2) / (1 + 0.5 / log3), 0.0], rel=MEAN_ERROR)


def test_tasks_of_genecis_are_averaged(originals):
    parts = [
        load_genecis(originals / "genecis", task, check_counts=False) for task in ("focus_object", "change_object")
    ]
    generator = torch.Generator().manual_seed(0)
    measured = [score(p, torch.randn(5, 4, generator=generator), torch.randn(len(p.gallery), 4)) for p in parts]
    whole = average(measured)
    assert whole.benchmark == "genecis/average" and whole.counts["queries"] == 10


def test_two_references_are_kept_in_a_store(originals, tmp_path):
    model, processor, benchmark = make_model(), make_processor(), load("pinpoint", originals)
    direct = evaluate(model, processor, benchmark, progress=False)
    stored = [evaluate(model, processor, benchmark, progress=False, store=EmbeddingStore(tmp_path)) for _ in range(2)]
    rescored = evaluate(None, None, benchmark, progress=False, store=EmbeddingStore(tmp_path))
    assert direct == stored[0] == stored[1] == rescored


def test_sheets_show_benchmarks_whose_references_are_outside(originals):
    benchmark = load("pinpoint", originals)
    generator = torch.Generator().manual_seed(0)
    embeds = [torch.randn(len(d), 4, generator=generator) for d in (benchmark.queries, benchmark.gallery)]
    ranks = score(benchmark, *embeds).per_query["rank"]
    assert [row.rank for row in sheet_rows(benchmark, *embeds, [0, 3], k=2)] == [ranks[0], ranks[3]]
    icir = load("icir", originals)
    with pytest.raises(ValueError, match="the queries of icir/test are ranked in groups"):
        sheet_rows(icir, torch.eye(5), torch.eye(11)[:, :5], [0])
