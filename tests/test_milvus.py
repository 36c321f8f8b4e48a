"""A gallery in Milvus equals one in memory, is filled by what changed, and names what it cannot do."""

import datetime
import json
import random
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from error_bounds import dot_error, images_error
from milvus_tables import table_of
from PIL import Image
from squares import COLOURS, draw, save_squares
from test_gallery import counting
from test_search_options import ROWS, make_training_free
from tiny import make_model, make_processor
from torch.nn import functional as F

pytest.importorskip("milvus_lite")

from pvlf_hf import Gallery
from pvlf_hf.embeddings.similarity import exact_unit_rows, top_k
from pvlf_hf.search.filters import passing_rows
from pvlf_hf.search.milvus import indexing as milvus_indexing
from pvlf_hf.search.milvus import store as milvus_store
from pvlf_hf.search.milvus.connection import MilvusDatabase
from pvlf_hf.search.milvus.filling import fill_store, from_shards
from pvlf_hf.search.milvus.filters import milvus_filter
from pvlf_hf.search.milvus.gallery import MilvusGallery
from pvlf_hf.search.milvus.nearest import nearest_in_store, store_recall
from pvlf_hf.search.milvus.schema import embeddings_of
from pvlf_hf.search.milvus.store import MilvusOptions, StoreAddress, create_store, open_store
from pvlf_hf.search.shards import EmbeddingShards, shard_table, write_part

TEXT = "the same but green"
MADE_BY = {"fingerprint": "f" * 32, "dtype": "float32", "covers": "images"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return str(tmp_path_factory.mktemp("milvus") / "all.db")


@pytest.fixture(scope="module")
def made():
    return make_model(), make_processor()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_squares(tmp_path_factory.mktemp("photos"))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def values(count=120, seed=1):
    """Return columns of metadata of all kinds, a fifth of the values missing."""
    dice = random.Random(seed)
    day, noon = datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 12)

    def some(make):
        return [None if dice.random() < 0.2 else make() for _ in range(count)]

    return pa.table(
        {
            "price": pa.array(some(lambda: dice.randrange(10)), pa.int64()),
            "weight": pa.array(some(lambda: dice.randrange(8) / 2), pa.float64()),
            "brand": pa.array(some(lambda: dice.choice(BRANDS)), pa.string()),
            "sold": pa.array(some(lambda: dice.random() < 0.5), pa.bool_()),
            "day": pa.array(some(lambda: day + datetime.timedelta(dice.randrange(300))), pa.date32()),
            "at": pa.array(some(lambda: noon + datetime.timedelta(hours=dice.randrange(3000))), pa.timestamp("s")),
            "unit price": pa.array(some(lambda: dice.randrange(4)), pa.int32()),
            "empty": pa.nulls(count, pa.string()),
            "key": pa.array(range(count), pa.int64()),
        }
    )


BRANDS = ["a", 'b"', "c\\", "d'\n\u00e9"]


@pytest.fixture(scope="module")
def described(uri):
    """Return a store of 120 images with metadata, and its table."""
    columns = values()
    store = create_store(StoreAddress(uri, "described"), 8, columns.schema, MADE_BY)
    table = table_of(unit(120, 8), **{name: columns[name] for name in columns.column_names})
    store.write(table)
    return store, table


def test_store_returns_what_was_written(described, uri):
    store, table = described
    assert len(store) == 120
    assert store.read().select(table.column_names).equals(store.schema.fitted(table).select(table.column_names))
    opened = open_store(StoreAddress(uri, "described"))
    assert (
        opened.schema == store.schema
        and opened.made_by == MADE_BY
        and open_store(StoreAddress(uri, "nothing")) is None
    )
    some = store.look_up([table["id"][3].as_py(), "unknown"])
    assert some.to_pylist() == table.slice(3, 1).drop_columns("embedding").select(some.column_names).to_pylist()
    assert store.embeddings_by_digest(["7", "none"])["7"].tolist() == table["embedding"][7].as_py()
    mean = exact_unit_rows(unit(120, 8)).mean(dim=0)
    torch.testing.assert_close(store.mean(), mean, rtol=0, atol=dot_error(120, torch.float64))
    store.remove([table["id"][5].as_py()])
    assert len(store) == 119
    for _ in range(2):  # written again, it is there once
        store.write(table.slice(5, 1))
        assert len(store) == 120


def some_filter(dice, depth=3):
    if depth and dice.random() < 0.7:
        inner = [some_filter(dice, depth - 1) for _ in range(2)]
        word = dice.choice(["and", "or", "not"])
        return f"not ({inner[0]})" if word == "not" else f"({inner[0]}) {word} ({inner[1]})"
    sign, member = dice.choice(["==", "!=", "<", "<=", ">", ">="]), dice.choice(["in", "not in"])
    return dice.choice(
        [
            f"price {sign} {dice.choice([3, 3.5, -1, 5.0])}",
            f"{dice.choice([3, 3.5])} {sign} price",
            f"weight {sign} {dice.choice([1, 1.5])}",
            f"brand {sign} {dice.choice(BRANDS)!r}",
            "sold",
            f"sold {dice.choice(['==', '!='])} {dice.choice(['true', 'false'])}",
            f"day {sign} '2024-05-0{dice.randrange(1, 9)}'",
            f"at {sign} '2024-03-01 12:00:00'",
            f"col('unit price') {member} [1, 2]",
            f"price {member} (1, 2, null)",
            f"brand {member} {tuple(BRANDS[:3])!r}",
            f"{dice.choice(['price', 'brand', 'empty'])} is {dice.choice(['', 'not '])}null",
            f"price {sign} weight",
            f"price {sign} null",
            "1 < price <= 6",
            "brand in ()",
            "key < 60",
        ]
    )


def test_server_filters_as_pyarrow_does(described):
    store, table = described
    dice, ids, sizes = random.Random(7), table["id"].to_pylist(), set()
    columns = table.select(store.schema.columns.names)
    for _ in range(100):
        condition = some_filter(dice)
        expected = {ids[row] for row in passing_rows(condition, columns)}
        expression = milvus_filter(condition, store.schema)
        if isinstance(expression, bool):
            found = set(ids) if expression else set()
        else:
            found = {row["id"] for row in store.client.query(store.name, expression, output_fields=["id"])}
        assert found == expected, (condition, expression)
        sizes.add(len(expected))
    assert len(sizes) > 20


def test_filters_that_milvus_cannot_carry_out_are_named(described, made):
    store, _ = described
    gallery = MilvusGallery(store, *made)
    wrong = {
        "prise < 3": r"names 'prise', which is not a column: the columns are \['price', 'weight'",
        "price < 'cheap'": "compares 'price', which is int64, with 'cheap' by <; its columns are price .int64",
        "price < 1e999": "compares 'price', which is int64, with inf",
        "price < 123456789012345678901234567890": "0 is too large, whole numbers have at most 64 bits",
        "sold < true": "compares 'sold', which is bool, with True by <",
        "brand < price": "compares 'brand' with 'price', which Milvus does not, .*: compare each with a value",
        "day == at": "compares 'day' with 'at', which Milvus does not",
        "price in ('cheap', 'dear')": "not all of .'cheap', 'dear'. can be compared with 'price'",
        "price + 1 < 3": "cannot be read at 'price . 1'",
        f"price in ({', '.join(map(str, range(1500)))})": None,
    }
    for condition, message in wrong.items():
        if message is None:
            assert gallery._choice((), condition)
            continue
        with pytest.raises(ValueError, match=message):
            gallery.search(text="red", filter=condition)
    with pytest.raises(ValueError, match="a Milvus store takes a filter as text, such as 'price < 50"):
        gallery.search(text="red", filter=pc.field("price") < 3)
    with pytest.raises(ValueError, match="search with the filter 'nonsense <': it says"):
        store.nearest(torch.ones(8), 3, "nonsense <")


def test_search_is_exact_and_ties_are_in_the_order_of_ids(uri):
    embeds, queries = unit(600, 16), unit(20, 16, seed=1)
    embeds[300:400] = embeds[0]
    options = MilvusOptions(index_type="FLAT", timeout=20)
    store = create_store(StoreAddress(uri, "flat", options), 16, None, MADE_BY)
    assert fill_store(store, [("all", table_of(embeds))]) == (600, 0, 0)
    for query in (*queries[:3], embeds[0]):
        for number in (10, 70, 900):
            scores, best = top_k(query[None], embeds, min(number, 600))
            found = nearest_in_store(store, lambda _, query=query: query, number)
            assert [int(one[:6]) for one in found.ids] == best[0].tolist() and torch.equal(found.scores, scores[0])
    assert store_recall(store, queries, 10) == 1
    graph = create_store(StoreAddress(uri, "graph", MilvusOptions("HNSW", {"M": 32}, {"ef": 200})), 16, None, MADE_BY)
    fill_store(graph, [("all", table_of(embeds))])
    assert store_recall(graph, queries, 10) > 0.95
    kinds = [store.client.describe_index(name, "embedding")["index_type"] for name in ("flat", "graph")]
    assert kinds == ["FLAT", "HNSW"]
    with pytest.raises(ValueError, match="graph in .* has the index HNSW, not FLAT: leave index_type out, or choose"):
        open_store(StoreAddress(uri, "graph", options))


def test_more_results_than_milvus_returns_are_refused(uri, monkeypatch):
    monkeypatch.setattr(milvus_store, "MOST_RESULTS", 100)
    store = create_store(StoreAddress(uri, "many", MilvusOptions("FLAT")), 8, None, MADE_BY)
    store.write(table_of(unit(150, 8)))
    assert len(nearest_in_store(store, lambda _: unit(1, 8)[0], 100).ids) == 100
    with pytest.raises(ValueError, match="101 results .* returns at most 100: narrow the search by a filter"):
        nearest_in_store(store, lambda _: unit(1, 8)[0], 101)


def searches(gallery):
    """Return searches of all kinds as plain values."""
    first = gallery.search(text=TEXT, k=9)
    by_image = gallery.query(draw(2), TEXT)
    results = [
        first,
        gallery.search(query=by_image, k=4),
        gallery.search(query=by_image, k=3, offset=2, min_score=-0.5),
        gallery.search(query=by_image, k=9, exclude=["red.png", "blue.png"]),
        gallery.search(query=by_image, k=9, filter="price < 60 and brand in ('a', 'b')"),
        gallery.search(query=by_image, k=9, filter="price < 0"),
        gallery.search(query=by_image, k=9, fold=0.9),
        gallery.search(text="red", ids={"lime.png": 1.0, "black.png": -0.5}, k=5),
        first.refine("more blue", pick=2),
    ]
    return [(one.ids, one.scores, [path and path[-9:] for path in one.paths], one.folded) for one in results]


@pytest.fixture(scope="module")
def table():
    return pa.table(ROWS)


def test_every_search_equals_that_of_a_gallery_in_memory(uri, photos, table, made):
    local = Gallery.from_folder(photos, *made, metadata=table, progress=False)
    gallery = Gallery.from_folder(photos, *made, metadata=table, progress=False, index="milvus", uri=uri, name="equal")
    assert type(gallery) is MilvusGallery and searches(gallery) == searches(local)
    opened = Gallery.from_milvus(uri, "equal", *made)
    assert searches(opened) == searches(local)
    kept = opened.index.read()
    assert opened.ids == kept["id"].to_pylist() == local.ids
    assert (kept["path"].to_pylist(), kept["digest"].to_pylist()) == (local.paths, local.digests)
    assert torch.equal(embeddings_of(kept, 32), local.embeds) and opened.metadata.equals(local.metadata)
    assert opened.values_of(["red.png"]) == local.values_of(["red.png"]) and len(opened) == 9
    assert "red.png" in opened and "pink.png" not in opened
    assert opened.image("red.png").tobytes() == local.image("red.png").tobytes()
    kept = {name: value for name, value in vars(opened).items() if not callable(value)}
    assert not any(isinstance(value, list | dict | torch.Tensor) and len(value) > 3 for value in kept.values())
    for wrong in ({"exclude": ["pink.png"]}, {"ids": ["pink.png"]}):
        with pytest.raises(ValueError, match="names .'pink.png'., which are not in the gallery"):
            opened.search(text=TEXT, **wrong)
    with pytest.raises(ValueError, match="exclude leaves none of the gallery's 9 images"):
        opened.search(text=TEXT, exclude=opened.ids)


def test_combined_similarities_rank_as_in_memory(uri, photos):
    product = make_training_free(composition="product")
    local = Gallery.from_folder(photos, *product, progress=False)
    gallery = Gallery.from_folder(photos, *product, progress=False, index="milvus", uri=uri, name="product")
    for k in (1, 4, 9):
        expected, found = (one.search(draw(1), TEXT, k=k) for one in (local, gallery))
        assert (found.ids, found.scores) == (expected.ids, expected.scores)


def test_indexing_encodes_and_writes_only_what_changed(uri, photos, table, made, tmp_path, monkeypatch):
    folder = shutil.copytree(photos, tmp_path / "photos")
    draw(1).save(folder / "copy.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    written = []
    write = milvus_store.MilvusStore.write
    monkeypatch.setattr(
        milvus_store.MilvusStore, "write", lambda s, t: (written.extend(t["id"].to_pylist()), write(s, t))
    )
    monkeypatch.setattr(milvus_indexing, "SAVE_EVERY", 4)

    def index(**options):
        written.clear()
        with counting(made[0]) as counts:
            gallery = Gallery.from_folder(
                folder, *made, progress=False, index="milvus", uri=uri, name="changing", **options
            )
        return gallery, counts[0], sorted(written)

    gallery, encoded, _ = index(metadata=table)
    assert encoded == gallery.encoded == 9 and len(gallery) == 10  # equal files are encoded once
    assert list(gallery.skipped) == ["broken.png"]
    assert index()[1:] == (0, [])
    (folder / "red.png").rename(folder / "renamed.png")
    (folder / "lime.png").unlink()
    draw(0).rotate(90).save(folder / "blue.png")
    draw(1).rotate(90).save(folder / "added.png")
    gallery, encoded, changed = index()
    assert encoded == 2 and changed == ["added.png", "blue.png", "renamed.png"]
    local = Gallery.from_folder(folder, *made, progress=False)
    error = images_error(*made, [Image.open(folder / name) for name in local.ids])
    kept = gallery.index.read()
    assert kept["id"].to_pylist() == local.ids and kept["digest"].to_pylist() == local.digests
    torch.testing.assert_close(embeddings_of(kept, 32), local.embeds, rtol=0, atol=error)
    assert gallery.values_of(["white.png", "added.png"]) == [
        {name: column[8] for name, column in ROWS.items() if name != "file_name"},
        dict.fromkeys([name for name in ROWS if name != "file_name"]),
    ]
    cheaper = table.set_column(1, "price", pa.array([1] * 9))
    gallery, encoded, changed = index(metadata=cheaper)
    assert encoded == 0 and gallery.values_of(["cyan.png"])[0]["price"] == 1
    assert "cyan.png" in changed and "added.png" not in changed
    with pytest.raises(ValueError, match=r"the columns of metadata \['price', .* and these images \['colour'\]"):
        index(metadata=pa.table({"file_name": ["cyan.png"], "colour": ["c"]}))
    with pytest.raises(ValueError, match="has no columns of EXIF: choose another name"):
        index(exif=True)
    dear = table.set_column(1, "price", pa.array(["dear"] * 9))
    with pytest.raises(ValueError, match="column 'price' is string and the store's is int64"):
        index(metadata=dear)
    for file in folder.iterdir():
        file.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match="none of the 11 images can be read"):
        index()
    assert len(Gallery.from_milvus(uri, "changing", *made)) == 10  # and none is removed


def test_images_are_added_and_removed(uri, photos, made, tmp_path):
    draw(3).rotate(90).save(tmp_path / "new.png")
    gallery = Gallery.from_folder(photos, *made, progress=False, index="milvus", uri=uri, name="grows", exif=True)
    other = Gallery.from_milvus(uri, "grows", *made)
    assert gallery.add(
        [tmp_path / "new.png", tmp_path / "no.png"], ids=["new.png", "no.png"], progress=False
    ).keys() == {"no.png"}
    assert len(other) == 10 and "new.png" in other.search(tmp_path / "new.png", k=1).ids
    assert other.values_of(["new.png"])[0]["exif_width"] == 32
    gallery.remove(["new.png", "red.png"])
    assert len(other) == 8 and "red.png" not in other.search(draw(0), k=9).ids
    with pytest.raises(ValueError, match="ids names .'new.png'., which are not in the gallery"):
        gallery.remove(["new.png", "blue.png"])
    assert len(other) == 8


def test_interrupted_indexing_goes_on(uri, photos, made, monkeypatch):
    monkeypatch.setattr(milvus_indexing, "SAVE_EVERY", 3)
    options = {"progress": False, "batch_size": 1, "index": "milvus", "uri": uri, "name": "interrupted"}
    with counting(made[0], fail_at=5), pytest.raises(KeyboardInterrupt):
        Gallery.from_folder(photos, *made, **options)
    assert len(Gallery.from_milvus(uri, "interrupted", *made)) == 3
    with counting(made[0]) as counts:
        gallery = Gallery.from_folder(photos, *made, **options)
    assert counts == [6] and gallery.ids == sorted(f"{colour}.png" for colour in COLOURS)


@pytest.mark.slow
def test_names_and_models_are_kept_apart(uri, photos, made, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    draw(0).save(few / "red.png")
    options = {"progress": False, "index": "milvus", "uri": uri}
    both = [Gallery.from_folder(folder, *made, **options) for folder in (photos, few)]
    named = Gallery.from_folder(few, *made, name="photos_2", **options)
    assert [len(one) for one in (*both, named)] == [9, 1, 1] and named.index.name == "photos_2"
    assert {both[0].index.name, both[1].index.name, "photos_2"} <= {*named.index.client.list_collections()}
    with counting(made[0]) as counts:
        assert len(Gallery.from_folder(photos, *made, **options)) == 9
    assert counts == [0]  # the same folder has the same name
    other = make_model(seed=1), made[1]
    for wrong in (
        lambda: Gallery.from_milvus(uri, "photos_2", *other),
        lambda: Gallery.from_folder(few, *other, name="photos_2", **options),
    ):
        with pytest.raises(ValueError, match=r"all\.db holds an index of another model .* choose another file"):
            wrong()
    named.index.client.create_collection("foreign", dimension=4)
    with pytest.raises(ValueError, match="collection foreign in .* was not made by pvlf_hf: choose another name"):
        Gallery.from_milvus(uri, "foreign", *made)
    with pytest.raises(ValueError, match=r"no gallery missing in .*all.db, which holds \[.*'photos_2'.*\]: fill it"):
        Gallery.from_milvus(uri, "missing", *made)
    with pytest.raises(ValueError, match="name='my photos': a store's name has letters, digits and _"):
        Gallery.from_milvus(uri, "my photos", *made)
    with pytest.raises(ValueError, match="name and options are those of a store in Milvus"):
        Gallery.from_folder(few, *made, name="photos_2")
    with pytest.raises(ValueError, match="index under another name"):
        Gallery.from_folder(few, *made, replace=True, **options)


@pytest.mark.slow
def test_saved_gallery_and_shards_fill_a_store(uri, photos, table, made, tmp_path):
    local = Gallery.from_folder(photos, *made, path=tmp_path / "kept", metadata=table, progress=False)
    loaded = Gallery.load(tmp_path / "kept", *made, index="milvus", uri=uri, name="loaded")
    assert searches(loaded) == searches(local)
    columns = local.metadata
    for number, rows in enumerate((slice(0, 5), slice(5, 9))):
        part = columns.slice(rows.start, rows.stop - rows.start)
        made_table = shard_table(
            local.ids[rows], local.paths[rows], local.digests[rows], local.embeds[rows], "int8", part
        )
        write_part(tmp_path / "shards", f"part-{number}.parquet", made_table, local.made_by)
    again = shard_table(local.ids[1:2], [None], local.digests[1:2], local.embeds[1:2], "int8", columns.slice(1, 1))
    write_part(tmp_path / "shards", "part-3.parquet", again, local.made_by)  # the same image again is left out
    gallery = MilvusGallery.of_embedded(from_shards(tmp_path / "shards"), StoreAddress(uri, "shards"), *made)
    (tmp_path / "shards" / "part-3.parquet").unlink()
    stored = EmbeddingShards(tmp_path / "shards")
    assert gallery.ids == local.ids and gallery.metadata.equals(local.metadata)
    query = F.normalize(torch.randn(local.embeds.shape[1], generator=torch.Generator().manual_seed(0)), dim=0)
    vectors = torch.cat([stored.embeddings(batch) for batch in stored.batches()])
    scores, best = top_k(query[None], vectors, 9)
    found = nearest_in_store(gallery.index, lambda _: query, 9)
    assert found.ids == [local.ids[row] for row in best[0]] and torch.equal(found.scores, scores[0])
    assert gallery.fill(from_shards(tmp_path / "shards").batches()) == (0, 9, 0)
    first = shard_table(local.ids[:1], [None], ["other"], local.embeds[:1], "int8", columns.slice(0, 1))
    write_part(tmp_path / "shards", "part-2.parquet", first, local.made_by)
    message = r"part-2.parquet, row 0 and .*part-0.parquet, row 0 have the id 'black.png' and different digests"
    with pytest.raises(ValueError, match=message):
        from_shards(tmp_path / "shards")
    (tmp_path / "shards" / "part-2.parquet").unlink()
    with pytest.raises(ValueError, match="were made by another model or processor"):
        other = make_model(seed=1), made[1]
        MilvusGallery.of_embedded(from_shards(tmp_path / "shards"), StoreAddress(uri, "shards_2"), *other)


def test_bad_batches_are_named(uri):
    columns = pa.schema({"price": pa.int64(), "weight": pa.float64(), "text": pa.string()})
    store = create_store(StoreAddress(uri, "strict"), 4, columns, MADE_BY)

    def batch(**changed):
        good = {"price": [1, 2], "weight": [0.5, None], "text": ["a", None]}
        return table_of(unit(2, 4), **{**good, **changed})

    def with_embedding(embeds):
        other = table_of(embeds)["embedding"]
        return batch().set_column(batch().column_names.index("embedding"), "embedding", other)

    repeated = batch().set_column(0, "id", pa.array(["a", "a"]))
    wrong = {
        "the embeddings are fixed_size_list<.*>.5. and the store's 4 numbers wide": with_embedding(unit(2, 5)),
        r"row 1 \(000001.*\) has no finite embedding other than 0": with_embedding(
            torch.eye(2, 4) * torch.tensor([[1.0], [torch.nan]])
        ),
        r"row 0 \(000000.*\) has no finite embedding": with_embedding(torch.zeros(2, 4)),
        r"row 1 \(000001.*\) has 'weight' = 'inf': Milvus takes finite numbers": batch(weight=[0.5, float("inf")]),
        r"row 0 \(000000.*'text' = 'xx.*': Milvus takes texts of 65,535 bytes at most": batch(
            text=["x" * 70_000, "b"]
        ),
        "column 'price' is string and the store's is int64": batch(price=["cheap", "dear"]),
        r"the store has the columns of metadata .* and these images \['price'\]": batch().drop_columns(
            ["weight", "text"]
        ),
        r"row 1 \(000001.*\) has 'digest' = 'None': each image needs one": batch().set_column(
            2, "digest", pa.array(["a", None])
        ),
        "rows 0 and 1 have the id 'a' and different digests, 0 and 1": repeated,
    }
    for message, table in wrong.items():
        with pytest.raises(ValueError, match=f"part-7: {message}"):
            fill_store(store, [("part-7", table)])
    assert len(store) == 0
    batches = [
        (f"part-{n}", table_of(unit(2, 4), 2 * n, price=[1, 2], weight=[1.0, 2.0], text=["a", "b"])) for n in range(9)
    ]
    for twice in (
        [*batches, ("part-9", batches[3][1])],
        [
            *batches,
            (
                "part-9",
                batch().set_column(0, "id", pa.array(["a", "a"])).set_column(2, "digest", pa.array(["b", "b"])),
            ),
        ],
    ):
        repeated_id = twice[-1][1]["id"][0].as_py()
        with pytest.raises(
            ValueError, match=re.escape(f"part-9: the id {repeated_id!r} occurs twice in it, or in an")
        ):
            fill_store(store, twice)
        assert len(store) == 18
    with pytest.raises(
        ValueError, match="column 'tags' of the metadata is list.*, which a Milvus store does not hold"
    ):
        create_store(StoreAddress(uri, "lists"), 4, pa.schema({"tags": pa.list_(pa.string())}), MADE_BY)


@contextmanager
def serving(folder, port=0):
    """Serve a folder by Milvus Lite, one request at a time; yield its URL and the function that ends it."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(str(folder), port=port, max_workers=1)
    ended = []

    def end():
        if not ended:
            ended.append(server.stop(grace=0).wait())
            database.close()

    try:
        yield f"http://127.0.0.1:{port}", end
    finally:
        end()


@pytest.mark.parametrize("served", [False, True])
def test_two_clients_write_at_the_same_time(served, tmp_path):
    embeds = unit(900, 8)
    with serving(tmp_path / "served") as (url, _):
        uri = url if served else str(tmp_path / "file.db")
        create_store(StoreAddress(uri, "shared"), 8, None, MADE_BY)

        def write(first):
            store = open_store(StoreAddress(uri, "shared"))
            for start in range(first, first + 600, 50):
                store.write(table_of(embeds[start : start + 50], start))
                store.remove([f"{start:06d}'\".jpg"])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, (0, 300)))  # 300 to 600 are written by both
        store = open_store(StoreAddress(uri, "shared"))
        ids = store.read()["id"].to_pylist()
        assert len(store) == len(ids) == len(set(ids)) and 882 <= len(ids) <= 888
        rows = [int(image_id[:6]) for image_id in ids]
        assert np.array_equal(store.read()["embedding"].to_pylist(), embeds[rows].numpy())
        store.database.close()


@pytest.mark.slow
def test_server_that_is_gone_is_waited_for_and_then_named(tmp_path):
    embeds = unit(40, 8)
    with serving(tmp_path / "served") as (url, end):
        store = create_store(StoreAddress(url, "gone", MilvusOptions(timeout=2)), 8, None, MADE_BY)
        store.write(table_of(embeds[:20]))
        end()
        start = time.monotonic()
        message = (
            r"Milvus \(127.0.0.1\) cannot store 20 images: it has not answered within 2 s .*: check that it is running"
        )
        with pytest.raises(ConnectionError, match=message):
            store.write(table_of(embeds[20:], 20))
        assert time.monotonic() - start < 12
        for attempt in (lambda: store.nearest(embeds[0], 3), lambda: len(store)):
            with pytest.raises(ConnectionError, match="cannot (search|count the images): it has not answered"):
                attempt()
        store.database.timeout = 20
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(store.write, table_of(embeds[20:], 20))
            time.sleep(0.3)
            with serving(tmp_path / "served", int(url.rpartition(":")[2])):
                writing.result(20)
                assert (
                    len(store) == len(open_store(StoreAddress(url, "gone"))) == 40
                )  # a server that comes back is written to


def test_other_versions_of_the_server_are_named(tmp_path, monkeypatch):
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from pymilvus.grpc_gen import milvus_pb2

    with serving(tmp_path / "served") as (url, _):
        database = MilvusDatabase(url, 5)
        with pytest.raises(ValueError, match="does not know this request .*: use Milvus 2.5 or later"):
            with database.doing("list the users"):
                database.client.list_users()
        answer = milvus_pb2.GetVersionResponse(version="v2.3.4")
    monkeypatch.setattr(MilvusServicer, "GetVersion", lambda *_: answer)
    with serving(tmp_path / "served") as (url, _):  # the servicer binds its methods when it starts
        with pytest.raises(ValueError, match="the server 127.0.0.1 is Milvus v2.3.4, .*: use Milvus 2.5 or later"):
            MilvusDatabase(url, 5)


class Importer(BaseHTTPRequestHandler):
    """HTTP interface of a cluster for import jobs, which reads each file when its job is requested."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        jobs = self.server.jobs
        if self.path.endswith("/create"):
            jobs.append(pa.concat_tables([pq.read_table(file) for (file,) in request["files"]]))
            self.server.seen.append((request["collectionName"], self.headers["Authorization"]))
            answer = {"jobId": str(len(jobs) - 1)}
        elif self.path.endswith("/list"):
            answer = {"records": [{"jobId": job, "state": state} for job, state in self.server.left.items()]}
        else:
            looks = self.server.looks[request["jobId"]] = self.server.looks.get(request["jobId"], 0) + 1
            state = self.server.fail if self.server.fail and looks > 1 else "Completed" if looks > 1 else "Importing"
            if state == "Completed" and request["jobId"] in self.server.left:
                self.server.import_left()
            elif state == "Completed" and self.server.imported:
                self.server.imported(jobs[int(request["jobId"])])
            answer = {"state": state, "progress": 50 * looks, "reason": "no more memory"}
        content = json.dumps({"code": 0, "data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_bulk_import_writes_files_that_hold_all_rows(tmp_path, monkeypatch):
    pytest.importorskip("pymilvus.bulk_writer")
    from pvlf_hf.search.milvus import bulk as milvus_bulk

    monkeypatch.setattr(milvus_bulk, "POLL", 0.01)
    columns = values(90)
    table = table_of(unit(90, 8), **{name: columns[name] for name in columns.column_names})
    http = ThreadingHTTPServer(("127.0.0.1", 0), Importer)
    http.jobs, http.seen, http.looks, http.fail, http.left, http.imported = [], [], {}, None, {}, None
    threading.Thread(target=http.serve_forever, daemon=True).start()
    options = {
        "bucket": f"file://{tmp_path}/bucket",
        "url": f"http://127.0.0.1:{http.server_port}",
        "api_key": "root:x",
    }
    with serving(tmp_path / "served") as (url, _):
        store = create_store(StoreAddress(url, "bulk"), 8, columns.schema, MADE_BY)
        store.write(table.slice(0, 10))
        old = table.slice(10, 5).set_column(2, "digest", pa.array(["old"] * 5))
        store.write(old)
        batches = [("first", table.slice(0, 40)), ("second", table.slice(40, 30)), ("third", table.slice(70, 20))]
        http.left = {"9": "Completed", "7": "Importing"}  # of earlier runs
        left = tmp_path / "bucket" / "default.bulk" / "left.parquet"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"of a job that ran out of time")
        (tmp_path / "bucket" / "other.parquet").write_bytes(b"of somebody else")
        http.import_left = lambda: store.write(table.slice(80))  # what such a job adds is not imported again
        filled = milvus_bulk.import_into(store, batches, remove_others=True, file_bytes=4000, **options)
        assert filled == (70, 20, 0) and {*http.looks} == {"7", "0"}
        assert len(store) == 25 and store.read().slice(0, 15).select(table.column_names).equals(
            store.schema.fitted(table.slice(0, 15)).select(table.column_names)
        )  # an import replaces nothing: the five old rows are upserted, and none is removed
        assert [len(job) for job in http.jobs] == [65] and http.seen == [("bulk", "Bearer root:x")]
        assert not list(left.parent.iterdir()) and (tmp_path / "bucket" / "other.parquet").exists()
        rows = [row for job in http.jobs for row in job.to_pylist()]
        assert [row["id"] for row in rows] == table["id"].to_pylist()[15:80]
        store.client.upsert("bulk", rows)
        assert store.read().select(table.column_names).equals(store.schema.fitted(table).select(table.column_names))
        http.left, http.imported = {}, lambda rows: store.client.upsert("bulk", rows.to_pylist())
        new = table_of(unit(3, 8), 90, **{name: columns[name][:3] for name in columns.column_names})
        filled = milvus_bulk.import_into(
            store, [("kept", table.slice(3)), ("new", new)], remove_others=True, **options
        )
        assert filled == (3, 87, 3)  # though the store had as many images before as after
        assert {*store.read()["id"].to_pylist()} == {*table["id"].to_pylist()[3:], *new["id"].to_pylist()}
        store.remove(new["id"].to_pylist())
        store.write(table.slice(0, 3))
        http.fail = "Failed"
        with pytest.raises(
            ValueError, match="Milvus cannot import files of .*bucket .job 2: no more memory.: remove what it names"
        ):
            milvus_bulk.import_into(
                store,
                [
                    ("new", new),
                    ("old", table.slice(0, 3).set_column(2, "digest", pa.array(["changed"] * 3))),
                ],
                **options,
            )
        assert len(store) == 90  # a job that fails costs none of the images that the store had
        with pytest.raises(ValueError, match="is a file of Milvus Lite, which imports no files"):
            milvus_bulk.BulkImport(
                create_store(StoreAddress(str(tmp_path / "lite.db"), "bulk"), 8, None, MADE_BY), **options
            )
    http.shutdown()
