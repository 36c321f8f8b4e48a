"""Search options: weighted and negative terms, filters, pages, boxes, near-duplicates, by every interface."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as DatasetImage
from error_bounds import MEAN_ERROR, embedding_error, rounding, squares_error
from PIL import ExifTags, Image
from squares import COLOURS, draw, save_squares
from test_gallery import counting, index_options
from tiny import make_model, make_processor
from torch.nn import functional as F
from typer.testing import CliRunner

from pvlf_hf import Gallery, TrainingFreeConfig, TrainingFreeModel
from pvlf_hf.embeddings.similarity import top_k
from pvlf_hf.search import demo_session
from pvlf_hf.search import metadata as metadata_module
from pvlf_hf.search.demo_session import MOST_UPLOADS, SHOWN, Searcher, SearchForm, Session
from pvlf_hf.search.filters import passing_rows
from pvlf_hf.search.indexing import as_dataset
from pvlf_hf.search.requests import answer
from pvlf_hf.search.results_page import search_page
from pvlf_hf.search.shard_sets import gallery_to_shards
from pvlf_hf.search.sharded_gallery import ShardedGallery
from pvlf_hf.search.terms import read_labelled
from pvlf_hf_cli import app
from pvlf_hf_cli_files import weighted

TEXT = "the same but green"

ROWS = {
    "file_name": [f"{colour}.png" for colour in COLOURS],
    "price": [10, 20, 30, 40, 50, 60, 70, None, 90],
    "brand": ["a", "b", "a", "b", None, "a", "b", "a", "b"],
    "sold": [True, False, None, True, False, True, False, True, False],
    "day": [f"2024-0{row + 1}-15" for row in range(9)],
    "unit price": [1.5 * row for row in range(9)],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_squares(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "table.csv"
    columns = list(ROWS)
    lines = [",".join("" if ROWS[c][row] is None else str(ROWS[c][row]) for c in columns) for row in range(9)]
    file.write_text("\n".join([",".join(columns), *lines]))
    return file


def make_training_free(**settings):
    torch.manual_seed(0)
    config = TrainingFreeConfig(vl_config=make_model().config.vl_config, **settings)
    return TrainingFreeModel(config).eval(), make_processor()


@pytest.fixture(scope="module")
def made():
    return make_model(), make_processor()


@pytest.fixture(scope="module")
def gallery(photos, table, made):
    return Gallery.from_folder(photos, *made, metadata=table, progress=False)


# --- filters --------------------------------------------------------------------------------------------------------

PASSING = {
    "price < 50": [0, 1, 2, 3],
    "20 <= price < 60": [1, 2, 3, 4],
    "not price < 50": [4, 5, 6, 8],
    "price == null or price is null": [7],
    "price is not null and sold": [0, 3, 5],
    "brand in ('a', 'c')": [0, 2, 5, 7],
    "brand not in ['a']": [1, 3, 6, 8],
    "not brand in ['a']": [1, 3, 6, 8],
    "not (brand in ['a'] or price < 50)": [6, 8],
    "brand == 'b' and (price > 60 or sold == false)": [1, 6, 8],
    "sold is null": [2],
    "not sold": [1, 4, 6, 8],
    "day >= '2024-05-01' and day < '2024-07-15'": [4, 5],
    "col('unit price') > 9": [7, 8],
    "100 > price > -1 and price != 10": [1, 2, 3, 4, 5, 6, 8],
    "price IS NULL or brand is null": [4, 7],
}


@pytest.mark.parametrize("condition", PASSING)
def test_filters_select_the_expected_rows(condition, gallery):
    rows = passing_rows(condition, gallery.metadata)
    named = sorted(COLOURS.index(gallery.ids[row].removesuffix(".png")) for row in rows)
    assert named == PASSING[condition]  # as in SQL, nothing equals null


@pytest.mark.parametrize("condition", ["price < 50", "brand == 'b'", "price > 60 or price is null", "price < 0"])
@pytest.mark.parametrize("index", ["exact", "faiss", "milvus"])
def test_filtered_search_returns_the_best_matching_images(index, condition, photos, table, made, tmp_path):
    gallery = Gallery.from_folder(photos, *made, metadata=table, progress=False, **index_options(index, tmp_path))
    query = gallery.query(draw(0), TEXT)
    everything = gallery.search(query=query, k=9)
    rows = passing_rows(condition, gallery.metadata)
    passing = {gallery.ids[row] for row in rows}
    expected = [image_id for image_id in everything.ids if image_id in passing]
    for k in (1, 3, 9):
        found = gallery.search(query=query, k=k, filter=condition)
        assert found.ids == expected[:k]
        assert found.scores == [everything.scores[everything.ids.index(one)] for one in found.ids]
    if expected:
        found = gallery.search(query=query, k=9, filter=condition, exclude=expected[:1])
        assert found.ids == expected[1:]
        again = gallery.search(query=query, k=9, filter=condition, offset=1).refine("more blue", k=9)
        assert {*again.ids} <= passing  # a refinement keeps the filter


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_filtered_exact_search_equals_brute_force(share):
    torch.manual_seed(1)
    from pvlf_hf.search.nearest import nearest
    from pvlf_hf.search.vector_index import make_index

    embeds, queries = (F.normalize(torch.randn(n, 24), dim=1) for n in (5000, 5))
    embeds[100:120] = embeds[0]
    index = make_index("exact", embeds)
    rows = (torch.rand(5000) < share).nonzero()[:, 0]
    for query in (*queries, embeds[0]):
        for k in (1, 10):
            scores, best = top_k(query[None], embeds[rows], min(k, len(rows)))
            found = nearest(index, embeds, query, k, rows)
            assert torch.equal(found[0], scores[0]) and torch.equal(found[1], rows[best[0]])


def test_pyarrow_expressions_are_filters(gallery):
    found = gallery.search(text="red", k=9, filter=pc.field("price") < 50)
    assert found.ids == gallery.search(text="red", k=9, filter="price < 50").ids


def test_inapplicable_filters_raise_with_the_reason(gallery, photos, made):
    wrong = {
        "prise < 3": r"names 'prise', which is not a column: the columns are \['price', 'brand'",
        "price <": "cannot be read .*: write it like 'price < 50 and",
        "price": "cannot be read at 'price'",
        "__import__('os')": "cannot be read at",
        "price < (lambda: 1)()": "cannot be read at",
        "price + 1 < 3": "cannot be read at 'price . 1'",
        "price in ('cheap', 'dear')": "not all of .'cheap', 'dear'. can be compared with 'price', which is int64",
        "price in (1, 'dear')": "not all of .1, 'dear'. can be compared with 'price'",
        "price < 'cheap'": "cannot be applied .*: its columns are price .int64",
        "day > 'soon'": "'soon' is no date; write 2024-06-01",
        "price in 3": "cannot be read at '3'",
        "(" * 400 + "price": "cannot be read",
        "price < 1 or " * 2000 + "sold": "characters, more than 10,000: make it shorter",
        3: "filter=3: pass a text such as",
    }
    for condition, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            gallery.search(text="red", filter=condition)
    with pytest.raises(ValueError, match=r"No match.*: the columns are \['price'"):
        gallery.search(text="red", filter=pc.field("prise") < 3)
    plain = Gallery.from_folder(photos, *made, progress=False)
    with pytest.raises(ValueError, match="this gallery has no metadata; index it with a table"):
        plain.search(text="red", filter="price < 3")


# --- metadata -------------------------------------------------------------------------------------------------------


def test_metadata_is_saved_beside_the_index(photos, table, made, tmp_path, caplog):
    path = tmp_path / "index"
    metadata_module.logger.propagate = True
    first = Gallery.from_folder(photos, *made, path=path, metadata=table, progress=False)
    kept = pq.read_table(path / "gallery.parquet")
    assert kept.column_names == ["id", "path", "digest", *(name for name in ROWS if name != "file_name")]
    assert dict(zip(kept["id"].to_pylist(), kept["price"].to_pylist(), strict=True)) == dict(
        zip(ROWS["file_name"], ROWS["price"], strict=True)
    )
    loaded = Gallery.load(path, *made)
    assert loaded.metadata.equals(first.metadata)
    assert loaded.search(text="red", filter="price > 60").ids == first.search(text="red", filter="price > 60").ids
    loaded.save(tmp_path / "copy")
    assert Gallery.load(tmp_path / "copy", *made).metadata.equals(first.metadata)
    assert not caplog.records
    again = tmp_path / "again"
    again.mkdir()
    for file in photos.iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    draw(3).rotate(90).save(again / "new.png")
    updated = Gallery.from_folder(again, *made, path=path, progress=False)
    assert "1 new images have no metadata" in caplog.text
    assert updated.metadata["price"].null_count == 2 and len(updated.metadata) == 10
    assert updated.metadata["price"][updated.row_of("red.png")].as_py() == 10


def test_metadata_rows_and_images_without_a_match_are_reported(photos, made, caplog):
    metadata_module.logger.propagate = True
    rows = pa.table({"file_name": ["red.png", "gone.png", "lost.png"], "price": [1, 2, 3]})
    gallery = Gallery.from_folder(photos, *made, metadata=rows, progress=False)
    assert "2 rows of the metadata have no image, first: ['gone.png', 'lost.png']" in caplog.text
    assert "8 images have no row in the metadata, first: ['black.png', 'blue.png'" in caplog.text
    assert gallery.search(text="red", filter="price is not null").ids == ["red.png"]


def test_mismatched_metadata_raises(photos, made, tmp_path):
    (tmp_path / "bad.csv").write_text("file_name,price\nred.png,1,2\n")
    wrong = {
        "metadata='nothing.csv': pass a file that ends in .csv, .parquet": "nothing.csv",
        "bad.csv cannot be read": tmp_path / "bad.csv",
        r"has columns \['name'\] and no 'file_name'": pa.table({"name": ["red.png"]}),
        r"has columns \['id'\], whose names the gallery uses itself": pa.table({"file_name": ["a"], "id": [1]}),
        r"names \['a'\] more than once": pa.table({"file_name": ["a", "a"]}),
        r"names none of the 9 images: its file_name are like \['a/red.png'\]": pa.table({"file_name": ["a/red.png"]}),
    }
    for message, metadata in wrong.items():
        with pytest.raises(ValueError, match=message):
            Gallery.from_folder(photos, *made, metadata=metadata, progress=False)


def test_data_set_columns_become_metadata(made, tmp_path):
    columns = {
        "image": [draw(row) for row in range(3)],
        "image_id": ["a", "b", "c"],
        "price": [1, 2, None],
        "kind": [0, 1, 1],
        "tags": [["x"], [], []],
    }
    dataset = Dataset.from_dict(columns).cast_column("image", DatasetImage())
    dataset = dataset.cast_column("kind", ClassLabel(names=["dress", "shirt"]))
    gallery = Gallery.from_dataset(dataset, *made, path=tmp_path / "index", progress=False)
    assert gallery.metadata.column_names == ["price", "kind"]
    assert sorted(gallery.search(text="red", filter="kind == 'shirt'").ids) == ["b", "c"]
    without = Gallery.from_dataset(dataset, *made, metadata=None, progress=False)
    assert without.metadata is None


def test_exif_gives_time_and_location(made, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2023:08:05 10:11:12"
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef] = (41.0, 30.0, 36.0), "S"
    gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef] = (2.0, 15.0, 0.0), "E"
    draw(0).resize((40, 20)).save(tmp_path / "there.jpg", exif=exif)
    draw(1).save(tmp_path / "plain.png")
    rows = pa.table({"file_name": ["plain.png", "there.jpg"], "price": [1, 2]})
    options = {"path": tmp_path / "index", "progress": False, "exif": True, "metadata": rows}
    gallery = Gallery.from_folder(tmp_path, *made, **options)
    found = gallery.metadata.take([gallery.row_of("there.jpg")]).to_pylist()[0]
    assert str(found["exif_date"]) == "2023-08-05 10:11:12"
    assert (found["exif_width"], found["exif_height"], found["price"]) == (20, 40, 2)
    place = found["exif_latitude"], found["exif_longitude"]
    assert place == pytest.approx((-41.51, 2.25), rel=MEAN_ERROR)  # of degrees, minutes and seconds
    near = "exif_latitude < -41 and 2 < exif_longitude < 3 and exif_date >= '2023-08-01'"
    assert gallery.search(text="red", filter=near).ids == ["there.jpg"]
    assert gallery.search(text="red", filter="exif_date is null").ids == ["plain.png"]
    monkeypatch.setattr(metadata_module, "exif_of", lambda cell: pytest.fail("a header is read once"))
    again = Gallery.from_folder(tmp_path, *made, path=tmp_path / "index", progress=False)
    assert again.metadata.select(gallery.metadata.column_names).equals(gallery.metadata)


# --- terms ----------------------------------------------------------------------------------------------------------


def test_weighted_terms_equal_the_formula(gallery, made):
    model, processor = made
    images, texts, weights = [draw(0), draw(4)], {"red": 2.0, TEXT: 1.0}, (3.0, 1.0)
    query = gallery.query([(images[0], 3.0), images[1]], texts=texts)
    negative = gallery.query([(images[0], 3.0), images[1]], texts={**texts, "dog": -0.5})
    inputs = {
        "images": [dict(processor.process_targets(image)) for image in images],
        "texts": [dict(processor(text=text)) for text in (*texts, "dog")],
        "pairs": [[dict(processor.process_queries(image, text)) for text in texts] for image in images],
        **targets_of(processor, "targets"),
    }

    def defined(model, inputs):
        total, of_images, of_texts = 0, 0, 0
        for pixels, pairs, a in zip(inputs["images"], inputs["pairs"], weights, strict=True):
            of_images = of_images + a * model.get_image_features(**pixels).pooler_output[0]
            for pair, b in zip(pairs, texts.values(), strict=True):
                total = total + a * b * model.get_query_features(**pair).pooler_output[0]
        *toward, away = (model.get_text_features(**ids).pooler_output[0] for ids in inputs["texts"])
        for text, b in zip(toward, texts.values(), strict=True):
            of_texts = of_texts + b * text
        found = {"fused": total, "image_embeds": of_images, "text_embeds": of_texts}
        found = {name: F.normalize(vector, dim=0) for name, vector in found.items()}
        found["embed"] = F.normalize(found["fused"] - 0.5 * away, dim=0)
        return {**found, "scores": model.get_image_features(inputs["targets"]).pooler_output @ found["embed"]}

    with torch.no_grad():
        expected, error = defined(model, inputs), rounding(defined, model, inputs)
    for name in ("fused", "image_embeds", "text_embeds"):
        torch.testing.assert_close(getattr(query, name), expected[name], rtol=0, atol=error[name])
    assert query.text == f"2:red, {TEXT}"
    torch.testing.assert_close(negative.fused, query.fused, rtol=0, atol=error["fused"])
    torch.testing.assert_close(negative.embed(), expected["embed"], rtol=0, atol=error["embed"])
    scores = gallery.search(query=negative, k=9).scores
    wanted = expected["scores"].sort(descending=True).values.tolist()
    assert scores == pytest.approx(wanted, rel=0, abs=error["scores"])


def targets_of(processor, name):
    """Return the pixels of the nine squares."""
    return {name: processor.process_targets([draw(row) for row in range(9)])["pixel_values"]}


def test_search_by_weighted_ids_equals_the_formula(gallery, photos, made):
    ids = {"red.png": 1.0, "orange.png": 2.0, "lime.png": -0.7}
    with counting(made[0]) as counts:
        found = gallery.search(ids=ids, k=9)
        assert counts == [0]  # nothing is opened or encoded
    rows = [gallery.row_of(one) for one in ids]
    near = F.normalize(gallery.embeds[rows[0]] + 2 * gallery.embeds[rows[1]], dim=0)
    direction = F.normalize(near - 0.7 * gallery.embeds[rows[2]], dim=0)
    order = (gallery.embeds @ direction).sort(descending=True, stable=True).indices
    assert found.ids == [gallery.ids[row] for row in order if gallery.ids[row] not in ids]
    assert found.query.ids == (*ids,) and found.sheet().mode == "RGB" and "data:image" in search_page(found)
    assert gallery.search(ids=["red.png"], k=9).ids == gallery.search(photos / "red.png", k=9, exclude=["red.png"]).ids
    # PVLF composes from the image's tokens, so its file is opened
    both = gallery.search(ids=["red.png"], text=TEXT, k=9)
    assert both.ids == gallery.search(photos / "red.png", TEXT, k=9, exclude=["red.png"]).ids


@pytest.mark.parametrize("composition", ["slerp", "product"])
def test_indexed_images_are_composed_without_their_files(composition, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    gallery = Gallery.from_folder(folder, *make_training_free(composition=composition), progress=False)
    opened = gallery.search(folder / "red.png", TEXT, k=9, exclude=["red.png"])
    (folder / "red.png").unlink()
    found = gallery.search(ids=["red.png"], text=TEXT, k=9)
    model, processor = gallery.model, gallery.processor
    inputs = {**processor(images=[draw(0)], text=[TEXT]), **targets_of(processor, "target_pixel_values")}
    error = embedding_error(model, inputs)["similarity"]
    assert found.ids == opened.ids and found.scores == pytest.approx(opened.scores, rel=0, abs=error)
    away = gallery.search(ids={"red.png": 1, "blue.png": -1}, texts={TEXT: 1, "dog": -1}, k=9)
    assert away.scores != found.scores and len(away.ids) == 7
    with pytest.raises(ValueError, match="formula and has none|returns no aggregation"):
        gallery.search(draw(0), TEXT, explain=True)


def test_box_crops_the_query_image(gallery):
    big = Image.new("RGB", (64, 96), "black")
    big.paste(draw(3), (20, 40))
    found = gallery.search(big, box=(20, 40, 52, 72), k=9)
    expected = gallery.search(draw(3), k=9)
    assert (found.ids, found.scores) == (expected.ids, expected.scores) and found.query.images[0].size == (32, 32)
    for box, message in {
        (20, 40, 65, 72): "not within the image, which is 64 x 96 pixels",
        (20, 40, 20, 72): "not within the image",
        (1, 2, 3): "pass left, top, right and bottom",
        (0, 0, float("nan"), 3): "pass left, top, right and bottom",
    }.items():
        with pytest.raises(ValueError, match=message):
            gallery.search(big, box=box)
    with pytest.raises(ValueError, match="is a part of one image, and the query has 2"):
        gallery.search([big, big], box=(0, 0, 9, 9))


# --- pages ----------------------------------------------------------------------------------------------------------


def test_offset_and_min_score_select_results(gallery):
    query = gallery.query(draw(0), TEXT)
    everything = gallery.search(query=query, k=9)
    pages = [gallery.search(query=query, k=4, offset=offset) for offset in (0, 4, 8, 12)]
    assert [one for page in pages for one in page.ids] == everything.ids and pages[3].ids == []
    least = everything.scores[4]
    assert gallery.search(query=query, k=9, min_score=least).ids == everything.ids[:5]
    assert gallery.search(query=query, k=2, offset=4, min_score=least).ids == everything.ids[4:5]
    nothing = gallery.search(query=query, min_score=2)
    assert nothing.ids == []
    with pytest.raises(ValueError, match="found nothing, so there is nothing to draw"):
        nothing.sheet()


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_near_duplicates_are_folded(index, photos, made, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for row, colour in enumerate(COLOURS):
        draw(row).save(folder / f"{colour}.png")
        for copy in range(row % 4):
            draw(row).save(folder / f"{colour}_{copy}.png")
    gallery = Gallery.from_folder(folder, *made, progress=False, index=index)
    query = gallery.query(draw(2), TEXT)
    everything = gallery.search(query=query, k=len(gallery)).ids
    by_colour = {}
    for image_id in everything:
        by_colour.setdefault(image_id.split("_")[0].removesuffix(".png"), []).append(image_id)
    firsts = [ids[0] for ids in by_colour.values()]
    found = gallery.search(query=query, k=4, fold=0.9999999)
    assert found.ids == firsts[:4]
    assert found.folded == {ids[0]: ids[1:] for ids in by_colour.values() if ids[0] in firsts[:4] and ids[1:]}
    second = gallery.search(query=query, k=4, offset=4, fold=0.9999999)
    assert second.ids == firsts[4:8]
    assert len(gallery.search(query=query, k=50, fold=0.9999999).ids) == 9
    assert gallery.search(query=query, k=50, fold=-1).ids == everything[:1]


# --- bad input, JSON, command line, page ----------------------------------------------------------------------------


def test_invalid_search_arguments_raise_with_a_remedy(gallery):
    wrong = [
        ({"texts": {str(n): 1 for n in range(10_000)}}, "the query has 10,000 images, texts and ids: pass at most 32"),
        ({"texts": ["red"]}, 'pass texts with their weights, such as {"red": 1, "stripes": -0.5}'),
        ({"texts": {"red": 0}}, "the weight of 'red' is 0: pass a number, below 0 to lead away"),
        ({"texts": {"red": "2"}}, "the weight of 'red' is '2'"),
        ({"texts": {"red": -1}}, "only says what to avoid: add a text, an image or an id"),
        ({"texts": {" ": 1}}, "text is empty"),
        ({"ids": "red.png"}, "ids='red.png': pass a list of ids"),
        ({"ids": ["nobody"]}, r"ids names \['nobody'\], which are not in the gallery"),
        ({"text": "red", "offset": -1}, "offset=-1: pass a whole number"),
        ({"text": "red", "min_score": "high"}, "min_score='high': pass a number"),
        ({"text": "red", "fold": float("nan")}, "fold=nan: pass a number"),
        (
            {"image": draw(0), "texts": {"red": 1, "blue": 1}, "explain": True},
            "only their composition can be explained",
        ),
        ({"query": gallery.query(text="red"), "ids": ["red.png"]}, "a query is encoded already"),
        ({"image": [(draw(0), "heavy")]}, "the image|pass files"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            gallery.search(**arguments)


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_json_request_equals_python_search(gallery, photos):
    request = {
        "texts": {TEXT: 1, "dog": -0.5},
        "images": [{"image": data_url(draw(0)), "weight": 2, "box": [0, 0, 30, 30]}, data_url(draw(1))],
        "filter": "price > 15 or price is null",
        "k": 3,
        "offset": 1,
        "fold": 0.9999,
        "exclude": ["lime.png"],
    }
    response = json.loads(json.dumps(answer(gallery, json.loads(json.dumps(request)))))
    images = [(draw(0).crop((0, 0, 30, 30)), 2.0), draw(1)]
    same = {"filter": request["filter"], "k": 3, "offset": 1, "fold": 0.9999, "exclude": ["lime.png"]}
    found = gallery.search(images, texts=request["texts"], **same)
    assert [(one["id"], one["score"]) for one in response["results"]] == list(
        zip(found.ids, found.scores, strict=True)
    )
    assert response["offset"] == 1 and response["results"][0]["metadata"]["price"] != 10
    assert isinstance(response["results"][0]["metadata"]["day"], str)
    assert answer(gallery, {}, [draw(0)])["results"][0]["id"] == "red.png"
    wrong = [
        ({"words": "red"}, r"has keys \['words'\], which are unknown: valid keys are"),
        ({"images": [str(photos / "red.png")]}, "pass its content as a data: URL, or search by ids"),
        ({"images": ["http://127.0.0.1/x.png"]}, "pass its content as a data: URL"),
        ({"images": [{"file": "x"}]}, "objects with image, weight and box"),
        ({"images": ["data:image/png;base64,AAAA"]}, "image"),
        ({"text": "red", "k": 10**6}, "k=1000000: pass at most 1000"),
        ({"text": ["red"]}, "text is .*: pass a text"),
        ([], "the request is a list: pass an object"),
    ]
    for refused, message in wrong:
        with pytest.raises(ValueError, match=message):
            answer(gallery, refused)


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in made:
        part.save_pretrained(folder)
    return folder


def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_command_line_search_equals_python_search(gallery, photos, table, checkpoint, tmp_path):
    index = tmp_path / "index"
    done = call("index", photos, "--model", checkpoint, "--path", index, "--metadata", table, "--exif")
    assert done.exit_code == 0, done.output
    search = ["search", index, "--model", checkpoint]
    flags = ["--image", f"2:{photos / 'red.png'}", "--text", TEXT, "--text", "-0.5:dog", "--text", "-hat"]
    flags += ["--filter", "price > 15 or price is null", "-k", 3, "--offset", 1, "--json"]
    done = call(*search, *flags)
    assert done.exit_code == 0, done.output
    expected = gallery.search(
        [(photos / "red.png", 2.0)],
        texts={TEXT: 1, "dog": -0.5, "hat": -1},
        filter="price > 15 or price is null",
        k=3,
        offset=1,
    )
    results = json.loads(done.stdout)["results"]
    assert [one["id"] for one in results] == expected.ids
    model, processor = gallery.model, gallery.processor
    inputs = {"query": dict(processor.process_queries(draw(0), TEXT)), "away": dict(processor(text=["dog", "hat"]))}
    inputs |= targets_of(processor, "targets")

    def scores(model, inputs):
        query = model.get_query_features(**inputs["query"]).pooler_output[0]
        dog, hat = model.get_text_features(**inputs["away"]).pooler_output
        direction = F.normalize(query - 0.5 * dog - hat, dim=0)
        return {"scores": model.get_image_features(inputs["targets"]).pooler_output @ direction}

    with torch.no_grad():
        error = rounding(scores, model, inputs)["scores"]
    assert [one["score"] for one in results] == pytest.approx(expected.scores, rel=0, abs=error)
    assert {"price", "exif_width"} <= results[0]["metadata"].keys() and results[0]["path"].endswith(results[0]["id"])
    done = call(*search, "--id", "red.png", "--id", "-blue.png", "--box", "0,0,9,9")
    assert done.exit_code == 1 and "is a part of one image, and the query has 0" in done.stderr
    done = call(*search, "--id", "red.png", "--id", "-blue.png", "--fold", -1)
    assert done.exit_code == 0 and "and 6 like it" in done.stdout
    done = call(*search, "--image", photos / "red.png", "--box", "0,0,16,16", "--sheet", tmp_path / "sheet.html")
    assert done.exit_code == 0 and (tmp_path / "sheet.html").exists()
    done = call(*search, "--text", "red", "--filter", "price < 0", "--sheet", tmp_path / "none.html")
    assert done.exit_code == 0 and "nothing found" in done.stderr and not (tmp_path / "none.html").exists()
    done = call(*search, "--text", "red", "--filter", "prise < 0")
    assert done.exit_code == 1 and "'prise', which is not a column: the columns are ['price'" in done.stderr
    for wrong in (["--text", "0:red"], ["--box", "1,2"]):
        assert call(*search, "--text", "red", *wrong).exit_code == 2


def test_web_page_supports_filters_and_negative_texts(gallery, tmp_path):
    pytest.importorskip("gradio")
    from pvlf_hf.search.demo_page import Page

    searcher = Searcher(gallery, tmp_path)
    session = searcher.search(Session(reference="red.png"), TEXT, 0, "dog", "price > 15")
    expected = gallery.search(
        gallery.image("red.png"), TEXT, 12, texts={"dog": -1}, exclude=["red.png"], filter="price > 15"
    )
    assert session.shown == tuple(expected.ids) and "black.png" not in session.shown
    assert searcher.weigh(session, 0.5).shown != () and session.steps[0].form.without == "dog"
    page = Page(searcher, [])
    shown = page.search(session, "red", 0, "", "price < 0")
    assert "No image passes" in shown[page.heading]
    assert page.filter.visible and "unit price" in page.filter.info
    with pytest.raises(Exception, match="not a column"):
        page.searcher.search(session, "red", 0, "", "prise < 0")


@pytest.fixture(params=["shards", "milvus"])
def stored(request, gallery, made, tmp_path):
    """Return the gallery in shards, or in a database."""
    gallery.save(tmp_path / "kept")
    if request.param == "milvus":
        pytest.importorskip("milvus_lite")
        return Gallery.load(tmp_path / "kept", *made, index="milvus", uri=str(tmp_path / "photos.db"))
    gallery_to_shards(tmp_path / "kept", tmp_path / "shards", rows=4)
    return ShardedGallery.open(tmp_path / "shards", *made)


def test_web_page_searches_shards_and_databases_as_galleries(gallery, stored, tmp_path):
    searchers = [Searcher(one, tmp_path / kind) for one, kind in ((gallery, "memory"), (stored, "stored"))]
    assert stored.metadata_names == gallery.metadata_names
    assert stored.known(["red.png", "none", "blue.png"]) == ["red.png", "blue.png"] and "none" not in stored
    assert sorted(stored.some_ids(20)) == sorted(gallery.ids) and len({*stored.some_ids(4)}) == 4
    starts = {tuple(sorted(stored.some_ids(2))) for _ in range(40)}
    assert len(starts) > 2
    shown = searchers[1].browse().shown
    assert sorted(shown) == sorted(gallery.ids)
    for searcher in searchers:
        searcher.folder.mkdir()
    files = [{image_id: Path(searcher.file(image_id)) for image_id in gallery.ids} for searcher in searchers]
    for image_id in gallery.ids:
        one, other = (of[image_id] for of in files)
        assert one.name == other.name and one.read_bytes() == other.read_bytes()

    def both(act):
        sessions = [act(searcher) for searcher in searchers]
        first, second = sessions
        assert first.shown == second.shown and first.scores == second.scores and first.folded == second.folded
        return second

    forms = [
        {},
        {"also": "2:red\n-0.5:dog"},
        {"like": "red.png\n0.5:black.png\n-blue.png"},
        {"filter": "price > 15 or price is null", "least": "-1"},
        {"filter": "brand in ['a', 'b'] and sold", "fold": "0.999"},
        {"fold": "-1"},
    ]
    for form in forms:
        session = both(lambda one, form=form: one.search(Session(), TEXT, 0, *SearchForm(**form)))
        assert session.shown
    session = both(lambda one: one.search(Session(reference="red.png"), TEXT, 0))
    assert "red.png" not in session.shown and len(session.shown) == 8
    both(lambda one: one.weigh(session, 0.5))
    picked = both(lambda one: one.search(one.pick(session, 2), "dark", 0))
    assert len(picked.steps) == 2 and picked.steps[1].reference == session.shown[2]
    both(lambda one: one.back(picked, 0, -0.5))
    with pytest.raises(ValueError, match="'none.png'"):
        searchers[1].search(Session(), "", 0, *SearchForm(like="none.png"))


def test_web_page_supports_every_option_of_search(gallery, tmp_path):
    searcher = Searcher(gallery, tmp_path)

    def shown(session, text="", **form):
        session = searcher.search(session, text, 0, *SearchForm(**form))
        scores = pytest.approx(session.scores, rel=0, abs=squares_error()["similarity"])
        return list(session.shown), scores, list(session.folded)

    def found(*args, **options):
        result = gallery.search(*args, k=SHOWN, **options)
        return result.ids, tuple(result.scores), [len(result.folded.get(one, [])) for one in result.ids]

    red = gallery.image("red.png")
    assert shown(Session(), also="2:red\n-0.5:dog\n") == found(texts={"red": 2, "dog": -0.5})
    like = "red.png\n\n0.5:black.png\n-blue.png"
    assert shown(Session(), like=like) == found(ids={"red.png": 1, "black.png": 0.5, "blue.png": -1})
    assert shown(Session(), TEXT, like="red.png") == found(text=TEXT, ids=["red.png"])
    width, height = red.size
    box = (width // 4, 0, width * 3 // 4, height // 2)
    part = shown(Session(reference="red.png"), TEXT, part="25, 0, 75 50")
    assert part == found(red, TEXT, box=box, exclude=["red.png"]) != shown(Session(reference="red.png"), TEXT)
    some = found(text=TEXT)[1][2] - 1e-6
    assert shown(Session(), TEXT, least=str(some)) == found(text=TEXT, min_score=some) and len(part[0]) > 3
    assert shown(Session(), TEXT, fold="-1")[2] == [len(gallery) - 1]
    session, like = searcher.like(Session(reference="red.png"), "-red.png\nblue.png", 1.0)
    assert (session.reference, like) == (None, "blue.png\nred.png")
    assert searcher.like(Session(reference="2:x.png"), "", -1.0)[1] == "-1:2:x.png"  # not twice x.png
    refusals = {
        "there is no image to search a part of": (Session(), "red", {"part": "0 0 50 50"}),
        "is not within the image: enter left": (Session(reference="red.png"), "", {"part": "0 0 50 150"}),
        "part 'left' is not": (Session(reference="red.png"), "", {"part": "left"}),
        "the least score is 'high': enter a number": (Session(), "red", {"least": "high"}),
        "near-duplicates is 'nan'": (Session(), "red", {"fold": "nan"}),
        "only says what to avoid": (Session(), "", {"like": "-red.png"}),
        "write a weight other than 0": (Session(), "", {"also": "0:red"}),
        "'none.png'": (Session(), "", {"like": "none.png"}),
    }
    for reason, (session, text, form) in refusals.items():
        with pytest.raises(ValueError, match=reason):
            shown(session, text, **form)
    with pytest.raises(ValueError, match="click one of the results"):
        searcher.like(Session(), "", 1.0)


def test_several_uploads_are_searched_by_with_weights(gallery, photos, tmp_path):
    searcher = Searcher(gallery, tmp_path)
    mine = [demo_session.open_upload(photos / name) for name in ("red.png", "blue.png", "black.png")]
    session, like = Session(), "lime.png"
    for image, weight in ((mine[0], 1.0), (mine[1], -1.0), (mine[1], 1.0)):  # the second one twice
        session, like = searcher.like(replace(session, reference=image), like, weight)
    assert like == "lime.png\nyour image 1\nyour image 2" and session.reference is None
    form = SearchForm(like="2:your image 1\n-your image 2\nlime.png", also="-dog")
    session = searcher.search(replace(session, reference=mine[2]), TEXT, 0, *form)
    expected = gallery.query([mine[2], (mine[0], 2.0), (mine[1], -1.0)], TEXT, texts={"dog": -1}, ids={"lime.png": 1})
    query = session.steps[-1].query
    for ours, theirs in zip((query.fused, *query.away), (expected.fused, *expected.away), strict=True):
        assert ours.equal(theirs)
    assert list(session.shown) == gallery.search(query=expected, k=SHOWN).ids
    alone = searcher.search(Session(reference=mine[2]), TEXT, 0).steps[-1].query
    assert not query.fused.equal(alone.fused) and query.away[0].norm() > 0
    went_on = searcher.search(searcher.pick(session, 0), "red", 0)
    again = searcher.search(searcher.back(went_on, 0, 0), TEXT, 0, *form)  # by uploads that only the step still names
    assert again.shown == session.shown != went_on.shown and again.scores == session.scores
    session = searcher.search(session, TEXT, 0, *SearchForm(like="your image 2"))
    assert list(session.uploads) == ["your image 2"]  # the others are no longer kept


def test_uploads_are_limited_and_named_apart_from_the_gallery(gallery, photos, tmp_path):
    pytest.importorskip("gradio")
    from pvlf_hf.search.demo_page import Page

    named = as_dataset([str(photos / "red.png")], ["your image 1"])
    searcher = Searcher(Gallery.from_dataset(named, gallery.model, gallery.processor, progress=False), tmp_path)
    session, like = Session(), ""
    colors = ("red", "green", "blue", "yellow", "black")
    mine = [Image.new("RGB", (8, 8), color) for color in colors]
    for image in mine[:MOST_UPLOADS]:
        session, like = searcher.like(replace(session, reference=image), like, 1.0)
    assert like.splitlines() == [f"your image {number}" for number in range(2, MOST_UPLOADS + 2)]
    full = replace(session, reference=mine[MOST_UPLOADS])
    with pytest.raises(ValueError, match="4 of your own images are searched by already: remove a line"):
        searcher.like(full, like, 1.0)
    freed, like = searcher.like(full, "\n".join(like.splitlines()[1:]), -1.0)
    assert like.splitlines()[-1] == "-your image 2" and freed.uploads["your image 2"] is full.reference
    page = Page(searcher, [])
    assert "up to 4, each at most 20 MB and 64 million pixels" in page.like.info
    shown = page.add(1.0, replace(session, reference="your image 1"), "your image 3")
    assert [one["caption"] for one in shown[page.uploads].value] == ["your image 3"]


def test_pages_of_the_web_page_follow_each_other(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_session, "SHOWN", 4)
    searcher = Searcher(gallery, tmp_path)
    first = searcher.search(Session(), TEXT, 0)
    second, third = searcher.turn(first, 0, 1), searcher.turn(searcher.turn(first, 0, 1), 0, 1)
    ranking = gallery.search(text=TEXT, k=len(gallery))
    assert [*first.shown, *second.shown, *third.shown] == ranking.ids and second.offset == 4
    assert searcher.turn(second, 0, -1) == first and searcher.weigh(third, 0) == first
    for session, pages, reason in (
        (third, 1, "no further"),
        (first, -1, "no earlier"),
        (Session(), 1, "search first"),
    ):
        with pytest.raises(ValueError, match=reason):
            searcher.turn(session, 0, pages)


@pytest.mark.parametrize(
    "given", ["red", "-red", "2:red", "-0.5:red", "1:-red", "-", "a:b", "2", ".5:x", "+2:x", "a\nb"]
)
def test_weights_are_written_alike_on_the_page_and_the_command_line(given):
    assert read_labelled(given) == weighted(given, "--text")


def test_all_search_options_together_equal_brute_force(gallery):
    """Combine all options and compare with a computation part by part."""
    generator = np.random.default_rng(0)
    for _ in range(10):
        chosen = generator.choice(9, 4, replace=False)
        ids = {gallery.ids[row]: float(w) for row, w in zip(chosen, [1, 0.5, -0.4, -1], strict=True)}
        found = gallery.search(ids=ids, k=2, offset=1, filter="brand != 'a'", min_score=-2)
        near = F.normalize(sum(w * gallery.embeds[gallery.row_of(i)] for i, w in ids.items() if w > 0), dim=0)
        near = near + sum(w * gallery.embeds[gallery.row_of(i)] for i, w in ids.items() if w < 0)
        order = (gallery.embeds @ F.normalize(near, dim=0)).sort(descending=True).indices.tolist()
        brands = gallery.metadata["brand"].to_pylist()
        expected = [gallery.ids[row] for row in order if brands[row] == "b" and gallery.ids[row] not in ids]
        assert found.ids == expected[1:3]
