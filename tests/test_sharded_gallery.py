"""A gallery in shards finds what one in memory finds, wherever the shards lie and however little memory it has."""

import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from squares import draw
from test_search_options import make_training_free
from torch.nn import functional as F

import pvlf_hf
from pvlf_hf.embeddings.embedding_store import images_made_by
from pvlf_hf.embeddings.similarity import top_k
from pvlf_hf.search import indexed_images
from pvlf_hf.search import sharded_gallery as module
from pvlf_hf.search import shards as shards_module
from pvlf_hf.search.gallery import Gallery
from pvlf_hf.search.gallery_files import GalleryTable
from pvlf_hf.search.query import Query
from pvlf_hf.search.shard_sets import gallery_to_shards, merge_shards, repeated_rows, sample_shards, shards_to_gallery
from pvlf_hf.search.sharded_gallery import ShardedGallery, parse_memory
from pvlf_hf.search.shards import EmbeddingShards, shard_table, write_part
from pvlf_hf.search.vectors import decode_vectors, encode_vectors

ROWS = 700
VECTORS = ["float32", "float16", "int8", "int8+float16"]


@pytest.fixture
def small_groups(monkeypatch):
    """Make row groups small enough that there are many."""
    monkeypatch.setattr(shards_module, "MOST_ROWS", 64)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 40)
    monkeypatch.setattr(module, "LEAST_CANDIDATES", 8)


@pytest.fixture
def gallery(tiny_model, tiny_processor, small_groups):
    """Return a gallery in memory: random embeddings, some of them equal, with metadata."""
    width = tiny_model.embedding_width
    embeds = F.normalize(torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)), dim=1)
    embeds[[5, 300, 650]] = embeds[10].clone()
    numbers = range(ROWS)
    table = GalleryTable(
        [f"{n:04d}.jpg" for n in numbers], [f"/none/{n}.jpg" for n in numbers], [f"{n:032x}" for n in numbers]
    )
    prices = [None if n % 11 == 0 else n for n in numbers]
    metadata = pa.table({"price": pa.array(prices, pa.int64()), "brand": pa.array(["ab"[n % 2] for n in numbers])})
    made_by = images_made_by(tiny_model, tiny_processor)
    return Gallery(table, embeds, made_by, tiny_model, tiny_processor, metadata=metadata)


@pytest.fixture
def opened(gallery, tmp_path):
    """Return a function that writes the gallery as shards and opens them."""

    def open_as(vectors="float32", location=None, memory="200MB"):
        location = location or tmp_path / f"shards {vectors}"
        for number, start in enumerate(range(0, ROWS, 150)):
            part = slice(start, start + 150)
            table = GalleryTable(*(column[part] for column in gallery._table))
            one = shard_table(*table, gallery.embeds[part], vectors, gallery.metadata.slice(start, 150))
            write_part(location, f"part-{number}.parquet", one, gallery.made_by)
        return ShardedGallery.open(location, gallery.model, gallery.processor, memory)

    return open_as


def queries_of(gallery, number=6):
    """Return encoded queries in random directions, and one that equals images of the gallery."""
    width = gallery.embeds.shape[1]
    vectors = F.normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(1)), dim=1)
    vectors[0] = gallery.embeds[10]
    return [Query((), "a text", vector, None, vector, gallery.made_by) for vector in vectors]


def found(result):
    return result.ids, result.scores, result.paths, result.folded


ASKED = [
    {"k": 10},
    {"k": 5, "offset": 7, "min_score": 0.05},
    {"k": 9, "filter": "price < 300 and brand == 'b'"},
    {"k": 3, "filter": "price is null", "exclude": ["0000.jpg", "0011.jpg"]},
    {"k": 4, "filter": "price > 5000"},
    {"k": 2000},
    {"k": 4, "fold": 0.999},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_float32_shards_equal_the_gallery_bit_for_bit(gallery, opened, asked, monkeypatch):
    """One query or several, which the gallery in memory compares in one product where no filter narrows it."""
    products = []
    monkeypatch.setattr(indexed_images, "FEWEST_AT_ONCE", 2)
    monkeypatch.setattr(indexed_images, "top_k", lambda *given: products.append(1) or top_k(*given))
    sharded = opened()
    assert len(sharded.shards.blocks) == 14 and len(sharded) == ROWS
    for query in queries_of(gallery):
        assert found(sharded.search(query=query, **asked)) == found(gallery.search(query=query, **asked))
    if "fold" not in asked:
        each = [found(gallery.search(query=query, **asked)) for query in queries_of(gallery)]
        for images in (sharded, gallery):
            assert [*map(found, images.search_many(queries_of(gallery), **asked))] == each
        assert len(products) == ("filter" not in asked)


@pytest.mark.parametrize("vectors", ["float16", "int8", "int8+float16"])
def test_smaller_vectors_are_ranked_exactly(gallery, opened, vectors):
    """Ranking equals that of the stored vectors by the definition; float16 ranks what int8 proposes."""
    sharded = opened(vectors)
    first, _, second = vectors.partition("+")
    stored = decode_vectors(encode_vectors(gallery.embeds, second or first))
    int8 = decode_vectors(encode_vectors(gallery.embeds, "int8"))
    for query in queries_of(gallery):
        rows = torch.arange(ROWS)
        if second:
            rows = top_k(query.embed()[None], int8, module.CANDIDATES * 6)[1][0].sort().values
        scores, order = top_k(query.embed()[None], stored[rows], 6)
        result = sharded.search(query=query, k=6)
        assert result.ids == [gallery.ids[row] for row in rows[order[0]].tolist()]
        assert result.scores == scores[0].tolist()
        filtered = sharded.search(query=query, k=6, filter="price < 40")
        passing = torch.tensor([n for n in range(40) if n % 11])
        scores, order = top_k(query.embed()[None], stored[passing], 6)
        assert filtered.ids == [gallery.ids[row] for row in passing[order[0]].tolist()]


def test_queries_are_encoded_as_by_the_gallery(gallery, opened):
    sharded = opened()
    image = draw(1)
    asked = [
        {"image": image, "text": "the same but green", "k": 4},
        {"image": [(image, 1.0), (draw(3), -0.5)], "k": 4, "box": None},
        {"texts": {"red": 1, "stripes": -0.5}, "k": 4},
        {"ids": {"0010.jpg": 1, "0021.jpg": -0.5}, "k": 6},
        {"ids": ["0699.jpg"], "k": 3, "weights": (1, 0, 0)},
    ]
    for one in asked:
        assert found(sharded.search(**one)) == found(gallery.search(**one)), one
    result = sharded.search(text="red", k=3, filter="price < 400")
    assert sharded.values_of(result.ids) == gallery.values_of(result.ids)
    assert "0010.jpg" in sharded and "0010" not in sharded


def test_a_composition_of_two_similarities_is_exact_too(tmp_path, small_groups):
    model, processor = make_training_free(composition="product")
    width = model.embedding_width
    embeds = F.normalize(torch.randn(200, width, generator=torch.Generator().manual_seed(3)), dim=1)
    table = GalleryTable([f"{n}.jpg" for n in range(200)], [None] * 200, [f"{n:032x}" for n in range(200)])
    made_by = images_made_by(model, processor)
    gallery = Gallery(table, embeds, made_by, model, processor)
    gallery.save(tmp_path / "gallery")
    gallery_to_shards(tmp_path / "gallery", tmp_path / "shards", rows=90)
    sharded = ShardedGallery.open(tmp_path / "shards", model, processor, "100MB")
    query = gallery.query(draw(1), "but green")
    assert query.combine is not None
    for asked in ({"k": 8}, {"k": 8, "weights": (1, 0, 0)}):
        ours, theirs = sharded.search(query=query, **asked), gallery.search(query=query, **asked)
        assert ours.ids == theirs.ids and ours.scores == theirs.scores
        for images in (sharded, gallery):
            assert [*map(found, images.search_many([query] * 9, **asked))] == [found(ours)] * 9


def test_shards_in_a_store_are_searched_where_they_are(gallery, opened):
    sharded = opened("int8+float16", f"memory://bucket-{uuid4().hex}/shards")
    local = opened("int8+float16")
    for query in queries_of(gallery, 2):
        for asked in ({"k": 5}, {"k": 5, "filter": "brand == 'a'"}):
            assert found(sharded.search(query=query, **asked)) == found(local.search(query=query, **asked))


def test_images_are_opened_from_files_and_stores(tiny_model, tiny_processor, tmp_path):
    draw(0).save(tmp_path / "a.png")
    store = f"memory://images-{uuid4().hex}/b.png"
    with fsspec.open(store, "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    embeds = F.normalize(torch.randn(3, tiny_model.embedding_width), dim=1)
    table = shard_table(["a", "b", "c"], [str(tmp_path / "a.png"), store, None], ["0", "1", "2"], embeds)
    write_part(tmp_path / "s", "part-0.parquet", table, images_made_by(tiny_model, tiny_processor))
    sharded = ShardedGallery.open(tmp_path / "s", tiny_model, tiny_processor)
    assert np.array_equal(sharded.image("a"), draw(0)) and np.array_equal(sharded.image("b"), draw(0))
    with pytest.raises(ValueError, match="the image 'c' cannot be opened .the gallery has no file for it"):
        sharded.image("c")
    result = sharded.search(image=draw(0), k=2).refine("but green")
    assert len(result.ids) == 2 and result.sheet().size[0] > 100


def test_statistics_rule_out_row_groups(gallery, opened, monkeypatch):
    sharded = opened()
    read = []
    plain = EmbeddingShards.read
    monkeypatch.setattr(EmbeddingShards, "read", lambda *args: read.append(args[1].first) or plain(*args))
    query = queries_of(gallery)[1]
    sharded.search(query=query, k=3, filter="100 <= price < 120")
    assert {*read} == {64}  # prices ascend: one group holds vectors, ids and paths
    read.clear()
    sharded.search(query=query, k=3, filter="price < 30", exclude=["0500.jpg"])
    assert {*read} == {0, 450}


def test_embeddings_of_another_width_are_refused(gallery, tmp_path):
    table = shard_table(["a"], ["a"], ["a"], torch.ones(1, 33), "float16")
    write_part(tmp_path, "part-0.parquet", table, gallery.made_by)
    with pytest.raises(
        ValueError, match="part-0.parquet holds embeddings of 33 numbers, and those of the model .* 32"
    ):
        ShardedGallery.open(tmp_path, gallery.model, gallery.processor)


def test_vectors_stay_in_memory_as_far_as_the_limit_allows(gallery, opened, monkeypatch):
    query = queries_of(gallery)[1]
    read = []
    plain = EmbeddingShards.read
    monkeypatch.setattr(EmbeddingShards, "read", lambda *args: read.append(args[1].first) or plain(*args))
    roomy = opened(memory="200MB")
    expected = found(roomy.search(query=query))
    read.clear()
    assert found(roomy.search(query=query)) == expected and len({*read}) < 14
    groups = 4 * 64 * gallery.embeds.shape[1]
    tight = opened(memory=roomy._needed() + 3 * groups)
    assert found(tight.search(query=query)) == expected
    assert 128 < sum(len(stored.values) for stored in tight._kept.values()) <= 192
    least = opened(memory=roomy._needed())
    assert found(least.search(query=query)) == expected and not least._kept
    with pytest.raises(ValueError, match=r'need [\d,]+ bytes at work: pass memory="\d+MB" or more'):
        opened(memory=roomy._needed() - 1)


@pytest.mark.parametrize(("given", "expected"), [("1.5GB", 1.5e9), ("800 mb", 8e8), (5000, 5000), ("2GiB", 2**31)])
def test_memory_is_read(given, expected):
    assert parse_memory(given) == expected


@pytest.mark.parametrize("given", ["much", "5 apples", -3, True, "1.5.2GB", None])
def test_memory_that_is_none_raises(given):
    with pytest.raises(ValueError, match="memory=.*pass bytes, or a text such as"):
        parse_memory(given)


def test_wrong_arguments_raise(gallery, opened, tiny_model, tiny_processor):
    sharded, query = opened(), queries_of(gallery)[1]
    other = deepcopy(tiny_model)
    next(iter(other.image_side.values())).load_state_dict(
        {k: v + 1 for k, v in next(iter(other.image_side.values())).state_dict().items()}, strict=False
    )
    wrong = {
        "exclude names ..gone.jpg.., which are not": lambda: sharded.search(query=query, exclude=["gone.jpg"]),
        "exclude leaves none of": lambda: sharded.search(query=query, exclude=gallery.ids),
        "exclude='a': pass a list": lambda: sharded.search(query=query, exclude="a"),
        "ids names ..gone..": lambda: sharded.search(ids=["gone"]),
        "the columns are ..price., .brand..": lambda: sharded.search(query=query, filter="colour == 'red'"),
        "cannot be applied": lambda: sharded.search(query=query, filter="price == 'red'"),
        "encoded by another model": lambda: sharded.search(
            query=Query((), "", *[query.fused] * 3, {"fingerprint": "1"})
        ),
        "another image encoder, projection or": lambda: ShardedGallery(sharded.shards, other, tiny_processor),
        "k=0": lambda: sharded.search_many([query], k=0),
    }
    for match, call in wrong.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert sharded.search_many([]) == []


# ---- shards of shards ----


def test_galleries_become_shards_and_shards_galleries(gallery, tmp_path):
    gallery.save(tmp_path / "gallery")
    shards = gallery_to_shards(tmp_path / "gallery", tmp_path / "shards", rows=300)
    assert [part.footer.num_rows for part in shards.parts] == [300, 300, 100]
    shards_to_gallery(shards, tmp_path / "again")
    for folder in ("gallery", "again"):
        loaded = Gallery.load(tmp_path / folder, gallery.model, gallery.processor)
        assert torch.equal(loaded.embeds, gallery.embeds) and loaded._table == gallery._table
        assert loaded.metadata.equals(gallery.metadata) and loaded.made_by == gallery.made_by
    with pytest.raises(ValueError, match="again holds a gallery already"):
        shards_to_gallery(shards, tmp_path / "again")
    with pytest.raises(ValueError, match="shards holds parts already"):
        gallery_to_shards(tmp_path / "gallery", tmp_path / "shards")


def test_samples_are_random_rows(opened, gallery):
    shards = opened("int8").shards
    one, same, other = (sample_shards(shards, 50, seed) for seed in (0, 0, 1))
    assert one.equals(same) and not one.equals(other)
    numbers = one["price"].to_pylist()
    ids = one["id"].to_pylist()
    assert len({*ids}) == 50 and ids == sorted(ids) and one.column_names == shards.schema.names
    assert [n for n in numbers if n is not None] == [
        int(i[:4]) for i, n in zip(ids, numbers, strict=True) if n is not None
    ]
    assert len(sample_shards(shards, 5000)) == ROWS


def test_merging_keeps_each_image_once(gallery, opened, tmp_path):
    whole = opened().shards
    more = shard_table(
        ["0003.jpg", "new.jpg"],
        [None, None],
        [f"{3:032x}", "f"],
        gallery.embeds[:2],
        "float32",
        gallery.metadata.slice(0, 2),
    )
    write_part(tmp_path / "more", "part-0.parquet", more, gallery.made_by)
    merged = merge_shards([whole, EmbeddingShards(tmp_path / "more")], tmp_path / "merged", rows=400)
    assert [part.footer.num_rows for part in merged.parts] == [400, 301]
    ids = [one for batch in merged.batches(["id"]) for one in batch["id"].to_pylist()]
    assert ids == [*gallery.ids, "new.jpg"]
    embeds = torch.cat([merged.embeddings(batch) for batch in merged.batches()])
    assert torch.equal(embeds, torch.cat([gallery.embeds, gallery.embeds[1:2]]))
    small = merge_shards([whole], tmp_path / "small", "int8+float16", "price >= 650")
    assert small.vectors == "int8+float16" and len(small) == len([n for n in range(650, ROWS) if n % 11])
    kept = next(small.batches(small.embedding_columns))
    assert torch.equal(small.embeddings(kept)[0], gallery.embeds[650].half().float())


def test_what_cannot_be_merged_is_named(gallery, opened, tmp_path):
    whole = opened().shards

    def other(name, ids=("x",), digests=("0",), metadata=gallery.metadata, **made_by):
        table = shard_table(
            ids, [None] * len(ids), digests, gallery.embeds[: len(ids)], metadata=metadata.slice(0, len(ids))
        )
        write_part(tmp_path / name, "part-0.parquet", table, gallery.made_by | made_by)
        return EmbeddingShards(tmp_path / name)

    wrong = {
        "two was made by another model, processor or dtype than": other("two", fingerprint="1"),
        "columns has the metadata": other("columns", metadata=gallery.metadata.drop_columns(["brand"])),
        r"renamed/part-0.parquet, row 1 and .*float32/part-0.parquet, row 7 have the id '0007.jpg'": other(
            "renamed", ("y", "0007.jpg"), ("1", "2")
        ),
    }
    for match, source in wrong.items():
        with pytest.raises(ValueError, match=match):
            merge_shards([whole, source], tmp_path / "merged")
    with pytest.raises(ValueError, match="no image of the shards passes the filter price < 0"):
        merge_shards([whole], tmp_path / "merged", filter="price < 0")
    with pytest.raises(ValueError, match="sources is empty"):
        merge_shards([], tmp_path / "merged")
    twice = other("twice", ("z", "z"), ("3", "3"))
    assert repeated_rows([whole]).tolist() == [] and repeated_rows([whole, twice]).tolist() == [ROWS + 1]
    with pytest.raises(ValueError, match="twice/part-0.parquet, row 1 repeats an id: merge_shards drops"):
        shards_to_gallery(twice, tmp_path / "again")


# ---- memory ----

SEARCH_IN_LITTLE_MEMORY = """
import sys
from pathlib import Path

import torch

from pvlf_hf.search.query import Query
from pvlf_hf.search.sharded_gallery import ShardedGallery
from tiny import make_model, make_processor


def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


torch.set_num_threads(1)
model, processor = make_model(), make_processor()
model.__class__ = type("Wider", (type(model),), {"embedding_width": 64})  # than its tower, which embeds nothing here
vectors = torch.nn.functional.normalize(torch.randn(20, 64), dim=1)
warm = ShardedGallery.open(sys.argv[1], model, processor)
queries = [Query((), "", vector, None, vector, warm.made_by) for vector in vectors]
warm.search_many(queries[:2], filter="number < 5")  # imports, and what libraries set up once
warm = None
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = resident("VmRSS")
gallery = ShardedGallery.open(sys.argv[2], model, processor, sys.argv[3])
gallery.search(query=queries[0], k=50)
gallery.search_many(queries, k=10, filter="number > 1000")
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("vectors", "limit", "parts"), [("float32", "300MB", 40), ("int8+float16", "150MB", 26)])
def test_searches_stay_within_their_memory(vectors, limit, parts, tmp_path, tiny_model, tiny_processor):
    """Search shards larger than the limit, half of which keeps vectors, in a process of its own."""
    made_by, rows = images_made_by(tiny_model, tiny_processor), 32_768
    embeds = F.normalize(torch.randn(rows, 64), dim=1)
    names = [f"{row}.jpg" for row in range(rows)]
    table = shard_table(names, names, names, embeds, vectors, pa.table({"number": pa.array(range(rows), pa.int64())}))
    write_part(tmp_path / "small", "part-0.parquet", table.slice(0, 2000), made_by)
    write_part(tmp_path / "large", "part-00.parquet", table, made_by)
    for number in range(1, parts):
        shutil.copy(tmp_path / "large" / "part-00.parquet", tmp_path / "large" / f"part-{number:02d}.parquet")
    size = sum(file.stat().st_size for file in (tmp_path / "large").iterdir())
    assert size > 1.1 * parse_memory(limit)
    program = tmp_path / "search.py"
    program.write_text(SEARCH_IN_LITTLE_MEMORY)
    command = [sys.executable, str(program), str(tmp_path / "small"), str(tmp_path / "large"), limit]
    paths = [str(Path(__file__).parent), str(Path(pvlf_hf.__file__).parents[1])]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout)
    assert 0.5 * parse_memory(limit) < grown < parse_memory(limit), f"{grown:,}"
