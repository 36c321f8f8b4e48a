"""Shards of embeddings: what is written is read, within a row group of memory, and what does not fit is named."""

import json
from collections import Counter
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch.nn import functional as F

from pvlf_hf.search import shards as module
from pvlf_hf.search.locations import Unreadable, open_location
from pvlf_hf.search.parts import find_parts, read_cells
from pvlf_hf.search.shards import EmbeddingShards, read_broken, shard_table, write_broken, write_part
from pvlf_hf.search.vectors import decode_vectors, encode_vectors, storing_error

MADE_BY = {"fingerprint": "f" * 32, "dtype": "float32", "covers": "images"}
VECTORS = ["float32", "float16", "int8", "int8+float16"]


def unit_rows(rows, width=32, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def table_of(first, rows, vectors="float32", width=32, prices=True):
    numbers = range(first, first + rows)
    metadata = pa.table({"price": pa.array(numbers, pa.int64())}) if prices else None
    ids, paths = [f"{n}.jpg" for n in numbers], [f"/photos/{n}.jpg" if n % 3 else None for n in numbers]
    return shard_table(ids, paths, [f"{n:032x}" for n in numbers], unit_rows(rows, width, first), vectors, metadata)


@pytest.fixture(params=["folder", "store"])
def location(request, tmp_path):
    """Return a folder and an object store, both empty."""
    return tmp_path / "shards" if request.param == "folder" else f"memory://bucket-{uuid4().hex}/shards"


@pytest.mark.parametrize("vectors", VECTORS)
def test_what_is_written_is_read(location, vectors, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 64)
    for number, (first, rows) in enumerate([(0, 100), (100, 1), (101, 130)]):
        write_part(location, f"part-{number:05d}.parquet", table_of(first, rows, vectors), MADE_BY)
    shards = EmbeddingShards(location)
    assert len(shards) == 231 and shards.made_by == MADE_BY and shards.width == 32 and shards.vectors == vectors
    assert shards.element == vectors.partition("+")[0] and shards.metadata_names == ["price"]
    assert [(block.first, block.rows) for block in shards.blocks] == [
        (0, 64),
        (64, 36),
        (100, 1),
        (101, 64),
        (165, 64),
        (229, 2),
    ]
    batches = list(shards.batches(rows=50))
    assert max(map(len, batches)) == 50 and sum(map(len, batches)) == 231
    assert [price for batch in batches for price in batch["price"].to_pylist()] == list(range(231))
    assert batches[0].schema.names[:4] == ["id", "path", "digest", "embedding"]
    assert batches[0].to_pylist()[3]["path"] is None and batches[0].to_pylist()[4]["path"] == "/photos/4.jpg"
    written = torch.cat([unit_rows(100), unit_rows(1, seed=100), unit_rows(130, seed=101)])
    read = torch.cat([shards.embeddings(batch) for batch in shards.batches(shards.embedding_columns, rows=7)])
    assert torch.equal(read, decode_vectors(encode_vectors(written, vectors.rpartition("+")[2])))


def test_a_part_is_there_in_whole_or_not_at_all(tmp_path, monkeypatch):
    write_part(tmp_path, "part-0.parquet", table_of(0, 10), MADE_BY)

    def full(table, file, **_):
        file.write_bytes(b"PAR1 half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    for name in ("part-0.parquet", "part-1.parquet"):
        with pytest.raises(OSError, match=r"cannot write part-.*No space left.*free disk space"):
            write_part(tmp_path, name, table_of(0, 20), MADE_BY)
    assert [file.name for file in tmp_path.iterdir()] == ["part-0.parquet"] and len(EmbeddingShards(tmp_path)) == 10


def test_a_store_that_refuses_is_named(monkeypatch):
    class Refusing(fsspec.get_filesystem_class("memory")):
        protocol = "refusing"

        def ls(self, *args, **kwargs):
            raise PermissionError("AccessDenied")

        pipe_file = ls

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(
        ValueError, match="refusing://photos cannot be listed .AccessDenied.: check the URL, the login"
    ):
        EmbeddingShards("refusing://photos")
    with pytest.raises(OSError, match="cannot write part-0.parquet in refusing://photos .AccessDenied."):
        write_part("refusing://photos", "part-0.parquet", table_of(0, 2), MADE_BY)
    with pytest.raises(ValueError, match="nothing://photos cannot be opened"):
        EmbeddingShards("nothing://photos")


def other_schema(table, **metadata):
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})


def test_parts_that_do_not_fit_are_named(location):
    def refused(match, table=None, made_by=MADE_BY, name="part-1.parquet"):
        write_part(location, name, table, made_by)
        with pytest.raises(ValueError, match=f"part-1.parquet {match}|part-1.parquet: {match}"):
            EmbeddingShards(location)

    with pytest.raises(ValueError, match=r"holds no part-\*.parquet: pass the folder"):
        EmbeddingShards(location)
    write_part(location, "part-0.parquet", table_of(0, 10), MADE_BY)
    refused("holds embeddings of width 16, and part-0.parquet of 32", table_of(0, 5, width=16))
    refused("holds int8 vectors, and part-0.parquet float32", table_of(0, 5, "int8"))
    refused(
        "was made by another model, processor or dtype than part-0", table_of(0, 5), MADE_BY | {"fingerprint": "0"}
    )
    refused("has other columns than part-0.parquet, they differ in .*price", table_of(0, 5, prices=False))
    refused("starts with columns", table_of(0, 5).drop_columns(["digest"]))
    refused("int8 embeddings need a float column 'scale'", table_of(0, 5, "int8").drop_columns(["scale"]))
    kind = pa.list_(pa.float64(), 32)
    refused(
        "column 'embedding' is .*double",
        table_of(0, 5).set_column(3, "embedding", table_of(0, 5)["embedding"].cast(kind)),
    )
    with pytest.raises(ValueError, match="parts are named part"):
        write_part(location, "shard-1.parquet", table_of(0, 5), MADE_BY)
    with pytest.raises(ValueError, match="metadata has columns ..digest.., whose names"):
        shard_table(["a"], [None], ["b"], unit_rows(1), "int8", pa.table({"digest": [1]}))
    with pytest.raises(ValueError, match="vectors='int4': choose one of"):
        shard_table(["a"], [None], ["b"], unit_rows(1), "int4")


class StoreError(Exception):
    """An error of a store's own kind."""


@pytest.mark.parametrize("kind", [PermissionError, TimeoutError, ConnectionResetError, StoreError])
def test_a_store_that_cannot_be_reached_is_not_taken_for_damage(kind, monkeypatch):
    """Nobody is told to delete a file whose content may be good."""
    location, refusing = f"memory://refusing-{uuid4().hex}", []
    write_part(location, "part-0.parquet", table_of(0, 50), MADE_BY)
    opened = MemoryFileSystem._open

    def refuse(self, path, *arguments, **settings):
        if refusing:
            raise kind("refused")
        return opened(self, path, *arguments, **settings)

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    shards, files = EmbeddingShards(location), open_location(location)
    refusing.append(True)
    plan = {"kind": "parquet", "file": f"{location}/part-0.parquet"}
    for call in (
        lambda: EmbeddingShards(location),
        lambda: list(shards.batches()),
        lambda: list(read_cells(plan, Counter())),
        lambda: find_parts(location, 10, (), "embedding", "id"),
    ):
        with pytest.raises(
            ValueError, match=r"part-0.parquet.* cannot be read \(refused\): check that .* the login"
        ) as found:
            call()
        assert "delete" not in str(found.value) and "replace" not in str(found.value)
    assert files[0].exists(f"{files[1]}/part-0.parquet")


def test_a_part_that_is_cut_short_or_of_others_is_named(tmp_path):
    for number in range(2):
        write_part(tmp_path, f"part-{number}.parquet", table_of(0, 50), MADE_BY)
    file = tmp_path / "part-1.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"part-1.parquet was cut short or is no Parquet file .*delete it"):
        EmbeddingShards(tmp_path)
    file.write_bytes(content)
    file.write_bytes(content[:200] + b"\xff" * 800 + content[1000:])
    shards = EmbeddingShards(tmp_path)
    with pytest.raises(ValueError, match=r"part-1.parquet, rows 0 to 49 cannot be read .*delete the file"):
        list(shards.batches())
    pq.write_table(table_of(0, 5), file)
    with pytest.raises(ValueError, match=r"part-1.parquet does not say what made its embeddings"):
        EmbeddingShards(tmp_path)
    file.write_bytes(content)
    written = pq.read_table(file)
    pq.write_table(pa.concat_tables([written] * 400), file, row_group_size=20_000)
    with pytest.raises(ValueError, match=r"part-1.parquet: row group 0 has 20,000 rows, more than 16,384"):
        EmbeddingShards(tmp_path).blocks  # noqa: B018


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_part_that_was_replaced_or_removed_is_not_read(tmp_path, scheme):
    location = f"{scheme}{tmp_path}"
    for number in range(2):
        write_part(location, f"part-{number}.parquet", table_of(50 * number, 50), MADE_BY)
    shards = EmbeddingShards(location)
    write_part(location, "part-2.parquet", table_of(100, 50), MADE_BY)  # makes no difference
    assert sum(map(len, shards.batches())) == 100
    write_part(location, "part-1.parquet", table_of(60, 50), MADE_BY)  # of the same layout, which would be read
    with pytest.raises(Unreadable, match=r"part-1.parquet was replaced or removed since .* open them again"):
        shards.read(shards.blocks[1], ["id"])
    assert len(shards.read(shards.blocks[0])) == 50
    fsspec.filesystem(scheme.rstrip(":/") or "file").rm(f"{tmp_path}/part-0.parquet")
    with pytest.raises(ValueError, match=r"part-0.parquet was replaced or removed"):
        shards.read(shards.blocks[0])


@pytest.mark.parametrize(
    ("column", "value", "match"), [("digest", None, "no value"), ("embedding", [float("nan")] * 32, "NaN")]
)
def test_a_row_that_is_bad_is_named(tmp_path, column, value, match, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 16)
    table = table_of(0, 40)
    values = table[column].to_pylist()
    values[37] = value
    kind = table.schema.field(column).type
    table = table.set_column(table.schema.names.index(column), pa.field(column, kind), pa.array(values, kind))
    write_part(tmp_path, "part-0.parquet", table, MADE_BY)
    with pytest.raises(ValueError, match=f"part-0.parquet, row 37: {match}.* in column '{column}'"):
        list(EmbeddingShards(tmp_path).batches())


def test_broken_images_are_kept_with_their_reasons(location):
    assert read_broken(location).num_rows == 0
    write_broken(location, "broken-0.parquet", [("a.jpg", "/a.jpg", "it is empty")])
    write_broken(location, "broken-1.parquet", [])
    write_broken(location, "broken-2.parquet", [("b.jpg", None, "cut short")])
    assert read_broken(location).to_pylist() == [
        {"id": "a.jpg", "path": "/a.jpg", "reason": "it is empty"},
        {"id": "b.jpg", "path": None, "reason": "cut short"},
    ]


def test_others_read_the_files_without_this_package(tmp_path):
    write_part(tmp_path, "part-0.parquet", table_of(0, 20, "int8"), MADE_BY)
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert json.loads(table.schema.metadata[b"pvlf_hf.made_by"]) == MADE_BY
    row = table.to_pylist()[5]
    rebuilt = torch.tensor(row["embedding"]) * row["scale"]
    assert torch.allclose(rebuilt, unit_rows(20)[5], atol=row["scale"] * 0.5001)


@pytest.mark.parametrize("element", ["float32", "float16", "int8"])
def test_storing_changes_a_cosine_by_no_more_than_its_bound(element):
    spread = unit_rows(300, 64)
    peaked = F.normalize(unit_rows(100, 64, 1).pow(9), dim=1)
    one = torch.eye(64)[:3]
    embeds, queries = torch.cat([spread, peaked, one]), torch.cat([unit_rows(50, 64, 2), spread[:50], one])
    stored = encode_vectors(embeds, element)
    kept = F.normalize(decode_vectors(stored).double(), dim=1)
    queries, exact = F.normalize(queries.double(), dim=1), F.normalize(embeds.double(), dim=1)
    change, bound = (queries @ (kept - exact).T).abs().amax(dim=0), storing_error(stored).double()
    assert (change <= bound).all()
    if element != "float32":
        worst = (kept - exact).norm(dim=1)  # what the worst query would see
        assert (worst <= bound).all() and (worst > 0.2 * bound).any()


def test_storing_keeps_zeros_and_signs_and_refuses_what_it_cannot_hold():
    embeds = torch.tensor([[0.0, 0.0], [0.6, -0.8], [-0.6, 0.8]])
    for element in ("float32", "float16", "int8"):
        kept = decode_vectors(encode_vectors(embeds, element))
        assert torch.equal(kept[0], torch.zeros(2)) and torch.equal(kept[1], -kept[2])
    with pytest.raises(ValueError, match="first at image 1"):
        encode_vectors(torch.tensor([[0.0, 1.0], [0.0, float("inf")]]), "int8")
    with pytest.raises(ValueError, match="first at float16 image 0"):
        encode_vectors(torch.tensor([[1e6, 1.0]]), "float16")
