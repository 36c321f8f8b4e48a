"""Vectors of a Milvus store in fewer bytes: float16 on a server, int8 in an index.

Milvus Lite has no FLOAT16_VECTOR. [`HalfServicer`] stands for a server that has: it translates the messages of the
real client from and to those of Milvus Lite, whose float32 holds every float16. No other server was at hand.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from error_bounds import dot_error
from milvus_tables import table_of
from squares import draw, save_squares
from test_gallery import counting
from test_milvus import MADE_BY, TEXT, searches, unit
from test_search_options import ROWS, make_training_free
from tiny import make_model, make_processor
from torch.nn import functional as F

pytest.importorskip("milvus_lite")

import grpc
from milvus_lite import MilvusLite
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc, schema_pb2

from pvlf_hf import Gallery, ShardedGallery
from pvlf_hf.embeddings.similarity import exact_unit_rows, top_k
from pvlf_hf.search.milvus.filling import fill_store, from_shards
from pvlf_hf.search.milvus.gallery import MilvusGallery
from pvlf_hf.search.milvus.nearest import FEWEST, nearest_in_store, store_recall
from pvlf_hf.search.milvus.schema import StoreSchema, embeddings_of
from pvlf_hf.search.milvus.store import MilvusOptions, StoreAddress, create_store, open_store
from pvlf_hf.search.query import FUSION
from pvlf_hf.search.shards import shard_table, write_part

FLOAT, HALF = schema_pb2.FloatVector, schema_pb2.Float16Vector

pytestmark = pytest.mark.slow


class HalfServicer(MilvusServicer):
    """Milvus Lite as a server that stores FLOAT16_VECTOR, and as strict about it as Milvus's engine."""

    def __init__(self, database):
        super().__init__(database)
        self.halves = set()

    def GetVersion(self, request, context):
        return milvus_pb2.GetVersionResponse(version="v2.6.0")

    def CreateCollection(self, request, context):
        schema = schema_pb2.CollectionSchema.FromString(request.schema)
        for field in schema.fields:
            if field.data_type == HALF:
                self.halves.add(request.collection_name)
                field.data_type = FLOAT
        request.schema = schema.SerializeToString()
        return super().CreateCollection(request, context)

    def DescribeCollection(self, request, context):
        answer = super().DescribeCollection(request, context)
        for field in answer.schema.fields:
            if request.collection_name in self.halves and field.data_type == FLOAT:
                field.data_type = HALF
        return answer

    def Upsert(self, request, context):
        for field in request.fields_data:
            assert (field.type == HALF) == (request.collection_name in self.halves and field.field_name == "embedding")
            if field.type == HALF:
                numbers = np.frombuffer(field.vectors.float16_vector, "<f2").astype(np.float32)
                field.type = FLOAT
                field.vectors.float_vector.data.extend(numbers.tolist())
        return super().Upsert(request, context)

    def Search(self, request, context):
        group = common_pb2.PlaceholderGroup.FromString(request.placeholder_group)
        (asked,) = group.placeholders
        if (asked.type == HALF) != (request.collection_name in self.halves):
            status = common_pb2.Status(code=2000, error_code=1, reason="vector type must be the same")
            return milvus_pb2.SearchResults(status=status)
        if asked.type == HALF:
            values = [np.frombuffer(value, "<f2").astype(np.float32).tobytes() for value in asked.values]
            asked.type = FLOAT
            asked.values[:] = values
            request.placeholder_group = group.SerializeToString()
        answer = super().Search(request, context)
        self._halve(request, answer.results.fields_data)
        return answer

    def Query(self, request, context):
        answer = super().Query(request, context)
        self._halve(request, answer.fields_data)
        return answer

    def _halve(self, request, columns):
        for field in columns:
            if request.collection_name in self.halves and field.type == FLOAT:
                numbers = np.array(field.vectors.float_vector.data, np.float32)
                assert np.array_equal(numbers, numbers.astype(np.float16))
                field.type = HALF
                field.vectors.float16_vector = numbers.astype("<f2").tobytes()


@contextmanager
def serving_halves(folder):
    database = MilvusLite(str(folder))
    server = grpc.server(ThreadPoolExecutor(1))
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(HalfServicer(database), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(grace=0).wait()
        database.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving_halves(tmp_path_factory.mktemp("halves") / "served") as url:
        yield url


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_squares(tmp_path_factory.mktemp("photos"))


HALVES = MilvusOptions("FLAT", timeout=20, vectors="float16")


def bits(table):
    """Return the numbers of the embeddings of a table in the order of the ids, as they are stored."""
    column = table.sort_by("id")["embedding"].combine_chunks()
    assert column.type.value_type == pa.float16()
    return column.flatten().to_numpy(zero_copy_only=False).view(np.uint16).tolist()


@pytest.mark.parametrize("composition", ["embedding", "product"])
def test_float16_shards_fill_a_store_bit_for_bit_and_are_found_alike(composition, url, photos, tmp_path):
    made = make_training_free(composition="product") if composition == "product" else (make_model(), make_processor())
    local = Gallery.from_folder(photos, *made, metadata=pa.table(ROWS), progress=False)
    embeds = local.embeds.clone()
    embeds[2:5] = embeds[1]  # ties
    embeds[6] = embeds[6] * 2.0**-12  # numbers below float16's normal ones
    table = shard_table(local.ids, local.paths, local.digests, embeds, "float16", local.metadata)
    write_part(tmp_path, "part-0.parquet", table, local.made_by)
    address = StoreAddress(url, f"shards_{composition}", HALVES)
    gallery = MilvusGallery.of_embedded(from_shards(tmp_path), address, *made)
    assert gallery.index.schema.vectors == "float16"
    assert bits(gallery.index.read()) == bits(gallery.index.look_up(local.ids, embeddings=True)) == bits(table)
    assert gallery.fill(from_shards(tmp_path).batches()) == (0, 9, 0)
    shards = ShardedGallery.open(tmp_path, *made)
    assert shards.shards.vectors == "float16"
    if composition == "embedding":
        assert searches(Gallery.from_milvus(url, address.name, *made)) == searches(shards)
    for k in (1, 4, 9):
        expected, found = (one.search(draw(1), TEXT, k=k) for one in (shards, gallery))
        assert (found.ids, found.scores) == (expected.ids, expected.scores)


def level(queries, count=600):
    """Return images at about the same angle to queries in all directions: float16 decides between them."""
    width = queries.shape[1]
    basis = torch.linalg.qr(queries.double().T).Q
    aside = unit(count, width, seed=1).double()
    aside = F.normalize(aside - aside @ basis @ basis.T, dim=1)
    return F.normalize(F.normalize(queries.double().sum(dim=0), dim=0) + aside, dim=1).float()


def ids_of(rows):
    return [f"{row:06d}'\".jpg" for row in rows.tolist()]


def test_rounding_the_query_moves_no_image_out_of_the_results(url):
    """The server ranks by the query in float16, which is no guide to the best 40 of 600 images at the same angle."""
    query = unit(1, 16)[0]
    embeds = level(query[None])
    store = create_store(StoreAddress(url, "level", HALVES), 16, None, MADE_BY)
    assert fill_store(store, [("all", table_of(embeds))]) == (600, 0, 0)
    stored = embeds.half().float()
    scores, best = top_k(query[None], stored, 40)
    assert not {*ids_of(best[0])} <= {*store.nearest(query, FEWEST)["id"].to_pylist()}
    found = nearest_in_store(store, lambda _: query, 40)
    assert found.ids == ids_of(best[0]) and torch.equal(found.scores, scores[0])
    assert torch.equal(found.embeds, stored[best[0]]) and torch.equal(embeddings_of(store.read(), 16), stored)
    mean = exact_unit_rows(stored).mean(dim=0)
    torch.testing.assert_close(store.mean(), mean, rtol=0, atol=dot_error(600, torch.float64))
    assert store_recall(store, unit(5, 16, seed=3)) == 1


def test_rounding_moves_no_image_out_of_the_results_by_two_similarities(url, photos):
    made = make_training_free(composition="product")
    query = Gallery.from_folder(photos, *made, progress=False).query(draw(1), TEXT)
    width = made[0].embedding_width
    parts = query.scored_by(FUSION, torch.ones(1, width), torch.zeros(width).double()).parts(0)[0]
    embeds = level(torch.stack([F.normalize(part.float(), dim=0) for part in parts]))
    store = create_store(StoreAddress(url, "level_product", HALVES), width, None, MADE_BY)
    fill_store(store, [("all", table_of(embeds))])
    stored, mean = embeds.half().float(), store.mean()
    expected = query.scored_by(FUSION, stored, mean).of_images(0, torch.arange(600)).sort(descending=True, stable=True)
    found = nearest_in_store(store, lambda images: query.scored_by(FUSION, images, mean), 40)
    assert found.ids == ids_of(expected.indices[:40]) and torch.equal(found.scores, expected.values[:40])


def test_folder_is_indexed_as_float16(url, photos, tmp_path):
    made, folder = (make_model(), make_processor()), shutil.copytree(photos, tmp_path / "photos")

    def index(**options):
        with counting(made[0]) as counts:
            gallery = Gallery.from_folder(
                folder, *made, progress=False, index="milvus", uri=url, name="folder", **options
            )
        return gallery, counts[0]

    gallery, encoded = index(options=HALVES)
    assert encoded == 9 and torch.equal(
        embeddings_of(gallery.index.read(), 32),
        Gallery.from_folder(folder, *made, progress=False).embeds.half().float(),
    )
    before = bits(gallery.index.look_up(["red.png"], embeddings=True))
    (folder / "red.png").rename(folder / "renamed.png")
    gallery, encoded = index()  # a collection keeps its vectors
    assert encoded == 0 and bits(gallery.index.look_up(["renamed.png"], embeddings=True)) == before


def test_bulk_files_hold_float16_as_it_is(url, tmp_path):
    pytest.importorskip("pymilvus.bulk_writer")
    from pvlf_hf.search.milvus.bulk import write_import_file

    store = create_store(StoreAddress(url, "bulk", HALVES), 16, None, MADE_BY)
    embeds = unit(30, 16)
    table = table_of(embeds)
    file = write_import_file(store, store.schema.fitted(table), tmp_path)
    rows = pq.read_table(file)
    assert rows["embedding"].type == pa.list_(pa.uint8())  # as Milvus imports it
    halves = [np.array(row, np.uint8).view(np.float16) for row in rows["embedding"].to_pylist()]
    assert np.array_equal(halves, embeds.half().numpy()) and rows["id"].to_pylist() == table["id"].to_pylist()


def test_answers_of_float16_hold_twice_as_many_images():
    wide = [StoreSchema.of(4096, None, vectors) for vectors in ("float32", "float16")]
    assert [schema.vector_bytes for schema in wide] == [16_384, 8_192]


@pytest.mark.parametrize(("size", "row"), [(1e6, 3), (1e-9, 0)])
def test_embeddings_that_float16_cannot_hold_are_named(size, row, url):
    store = create_store(StoreAddress(url, f"size_{row}", HALVES), 8, None, MADE_BY)
    embeds = unit(5, 8)
    embeds[row] *= size
    message = f"row {row} .00000{row}.*jpg. is too large or too small for float16: divide embeddings by their norms"
    with pytest.raises(ValueError, match=message):
        store.write(table_of(embeds))
    assert len(store) == 0


def test_vectors_that_a_store_does_not_have_are_refused(url, tmp_path):
    instead = "For int8 in the index, and scores by the embeddings, pass index_type='HNSW_SQ' or 'IVF_SQ8'"
    for vectors in ("int8", "int8+float16", "float8"):
        with pytest.raises(ValueError, match=f"vectors='.*': a Milvus store holds 'float32' or 'float16'. {instead}"):
            MilvusOptions(vectors=vectors)
    file = str(tmp_path / "lite.db")
    message = "vectors='float16' cannot be stored by Milvus Lite .*Float16Vector.*: use a server of Milvus, or leave"
    with pytest.raises(ValueError, match=f"{message} vectors out. {instead}"):
        create_store(StoreAddress(file, "none", HALVES), 8, None, MADE_BY)
    assert open_store(StoreAddress(file, "none")) is None
    single = MilvusOptions("FLAT", vectors="float32")
    create_store(StoreAddress(file, "single", single), 8, None, MADE_BY)
    create_store(StoreAddress(url, "half", HALVES), 8, None, MADE_BY)
    for place, name, other in ((file, "single", HALVES), (url, "half", single)):
        kept = open_store(StoreAddress(place, name)).schema.vectors
        address = StoreAddress(place, name, other)
        message = f"stores {kept} vectors, not {other.vectors}: leave vectors out, or choose another name"
        with pytest.raises(ValueError, match=f"{name} in .* {message}"):
            open_store(address)
        with pytest.raises(ValueError, match=message):
            create_store(address, 8, None, MADE_BY)


@pytest.mark.parametrize("index_type", ["HNWS", "DISKANN"])
def test_an_index_that_milvus_lite_does_not_have_is_refused(index_type, tmp_path):
    address = StoreAddress(str(tmp_path / "lite.db"), "none", MilvusOptions(index_type))
    with pytest.raises(
        ValueError, match=f"index_type='{index_type}': Milvus Lite has FLAT, .*; choose one of them, or"
    ):
        create_store(address, 8, None, MADE_BY)
    assert open_store(address) is None


@pytest.mark.parametrize("index_type", ["HNSW_SQ", "IVF_SQ8"])
def test_index_of_int8_proposes_images_that_are_scored_exactly(index_type, tmp_path):
    params = {"HNSW_SQ": ({"M": 16}, {"ef": 200}), "IVF_SQ8": ({"nlist": 8}, {"nprobe": 8})}[index_type]
    embeds, queries = unit(3000, 32), unit(20, 32, seed=1)
    address = StoreAddress(str(tmp_path / "int8.db"), "int8", MilvusOptions(index_type, *params))
    store = create_store(address, 32, None, MADE_BY)
    fill_store(store, [("all", table_of(embeds))])
    assert store.client.describe_index("int8", "embedding")["index_type"] == index_type
    assert store_recall(store, queries) > 0.95
    for query in queries:
        found = nearest_in_store(store, lambda _, query=query: query, 10)
        rows = [int(one[:6]) for one in found.ids]
        scores, order = top_k(query[None], embeds[rows], 10)
        assert torch.equal(found.scores, scores[0]) and order[0].tolist() == list(range(10))
    store.database.close()
