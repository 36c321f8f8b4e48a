"""Past one machine: what smaller vectors change, and how time, disk and memory grow with the number of images.

    python train_scripts/scale_tables.py                               # all tables: 12 GB of disk, an hour, two cores
    python train_scripts/scale_tables.py --only vectors                # recall on EmojiCIR alone: minutes
    python train_scripts/scale_tables.py --numbers 100000 --stores shards --write

`vectors` compares what the stored sizes of vectors find with what float32 finds, for the queries of the shipped
checkpoint, and `indexes` does so for indexes that are not exact. `figures` makes sets of random embeddings, fills each
store with them and measures it in a process of its own. `paper` carries the measured figures on to 10^8 and 10^9
images. After an interruption the same command writes the parts that are missing. Numbers go to `--output_dir`;
`--write` replaces the tables of SCALE.md.

A random set has concepts of Zipf's frequencies, a hundred images each on average. A concept is normal, with variance
1/i in direction i, and an image is its concept plus half as much variation of its own. Then the nearest image of an
image has a cosine of about 0.9, as among EmojiCIR's drawings, whose variances fall alike. A query is an image with
further variation.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch
from datasets import disable_progress_bars
from measuring import described, machine, write_between
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from pvlf_hf import Gallery, load_emoji_cir, load_emoji_pictures, load_model
from pvlf_hf.atomic_files import whole
from pvlf_hf.data.emoji_cir.dataset import TRAINING_VENDORS
from pvlf_hf.embeddings.embedding_store import images_made_by
from pvlf_hf.embeddings.encoding import encode_gallery, encode_queries
from pvlf_hf.embeddings.similarity import TopK, top_k
from pvlf_hf.search.gallery_files import GalleryTable
from pvlf_hf.search.image_search import ImageSearch
from pvlf_hf.search.milvus.filling import from_shards
from pvlf_hf.search.milvus.gallery import MilvusGallery
from pvlf_hf.search.milvus.store import LITE_INDEXES, MilvusOptions, StoreAddress
from pvlf_hf.search.query import Query
from pvlf_hf.search.sharded_gallery import ShardedGallery
from pvlf_hf.search.shards import shard_table, write_part
from pvlf_hf.search.vectors import Vectors

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "model_cards" / "pvlf-emoji-tiny"
DOCUMENT = HERE / "SCALE.md"

WIDTH, QUERIES, MOST_FOUND = 256, 64, 50
"""Width of the random embeddings, queries of each measurement, and results that are compared."""

ROWS_PER_PART = 65_536
"""Images of a part."""

IMAGES_PER_CONCEPT, VARIATION, DISTANCE = 100, 0.5, 0.3
"""Images of a concept, their variation, and that of queries, whose cosine with their image is about 0.8."""

ROUNDS, BATCH = 20, 32
"""Timed searches of one query, and the queries of a search by several."""

Row = dict[str, Any]


# ---- vectors on EmojiCIR ----


def emoji_embeddings(file: Path) -> dict[str, Tensor]:
    """Embed EmojiCIR's plain queries, Google's images and those of the training artists, unless a file has them."""
    if not file.exists():
        model, processor = load_model(str(CHECKPOINT))
        benchmark = load_emoji_cir("test")
        sets = {"google": benchmark.gallery, "training": load_emoji_pictures(TRAINING_VENDORS)}
        embeds = {name: encode_gallery(model, processor, images) for name, images in sets.items()}
        embeds["queries"] = encode_queries(model, processor, benchmark.queries)
        with whole(file) as partial_file:
            save_file(embeds, partial_file)
    return load_file(file)


def emoji_recalls(folder: Path, found_by: Callable[..., Iterator[tuple[Row, ImageSearch]]]) -> list[Row]:
    """Compare what galleries find for EmojiCIR's queries with the exact ranking.

    Args:
        folder: of the embeddings.
        found_by: takes a place, the embeddings of a set of images, and model and processor; yields facts of galleries
            of them, and the galleries, whose ids are rows.
    """
    found, encoder = emoji_embeddings(folder / "emoji.safetensors"), load_model(str(CHECKPOINT))
    made_by = images_made_by(*encoder)
    queries = [Query((), "", query, None, query, made_by) for query in found["queries"]]
    rows = []
    for embeds in (found["google"], found["training"]):
        exact = top_k(found["queries"], embeds, MOST_FOUND)[1]
        for facts, gallery in found_by(folder / f"emoji-{len(embeds)}", embeds, *encoder):
            best = [list(map(int, result.ids)) for result in gallery.search_many(queries, MOST_FOUND)]
            rows.append({"images": len(embeds)} | facts | recalls(best, exact))
    return rows


def vectors_of(place: Path, embeds: Tensor, model: Any, processor: Any) -> Iterator[tuple[Row, ImageSearch]]:
    """Yield shards with each size of vectors."""
    names, made_by = list(map(str, range(len(embeds)))), images_made_by(model, processor)
    for vectors in get_args(Vectors):
        shards = place.with_name(f"{place.name}-{vectors}")
        write_part(shards, "part-0.parquet", shard_table(names, names, names, embeds, vectors), made_by)
        gallery = ShardedGallery.open(shards, model, processor)
        yield {"vectors": vectors, "bytes a vector": bytes_of(gallery)}, gallery


INDEXES: dict[str, dict[str, Any]] = {
    "in memory, float32": {"vectors": "float32"},
    "in memory, int8": {"vectors": "int8"},
    "in memory, FAISS": {"index": "faiss"},
    **{
        f"Milvus Lite, {kind}": {"index": "milvus", "name": kind, "options": MilvusOptions(index_type=kind)}
        for kind in LITE_INDEXES
        if kind != "AUTOINDEX"  # one of the others
    },
}
"""Options of `Gallery.load` by the name of the index; those that the index itself takes are its defaults."""


def indexes_of(place: Path, embeds: Tensor, model: Any, processor: Any) -> Iterator[tuple[Row, ImageSearch]]:
    """Yield a gallery of float32 vectors with each index."""
    names = list(map(str, range(len(embeds))))
    table, made_by = GalleryTable(names, [None] * len(embeds), names), images_made_by(model, processor)
    Gallery(table, embeds, made_by, model, processor).save(place)
    for name, options in tqdm(INDEXES.items(), f"{len(embeds):,} images", leave=False):
        is_milvus = options.get("index") == "milvus"
        uri = {"uri": str(place.with_name(f"{place.name}.db"))} if is_milvus else {}
        gallery = Gallery.load(place, model, processor, **options, **uri)
        yield {"index": name}, gallery
        if is_milvus:
            gallery.close()


def bytes_of(gallery: ShardedGallery) -> int:
    """Return the bytes of a vector in shards, before Parquet packs them."""
    columns = ("embedding", "scale", "embedding_float16")
    types = [field.type for field in gallery.shards.schema if field.name in columns]
    return sum(
        one.list_size * one.value_type.bit_width // 8 if pa.types.is_fixed_size_list(one) else one.bit_width // 8
        for one in types
    )


def recalls(found: list[list[int]], exact: Tensor) -> Row:
    """Return the share of the exact best 1, 10 and 50 that are among as many found, as means over the queries."""
    return {
        f"recall@{k}": float(
            np.mean([len({*one[:k]} & {*best[:k]}) / k for one, best in zip(found, exact.tolist(), strict=True)])
        )
        for k in (1, 10, MOST_FOUND)
    }


# ---- random sets ----


def variations(generator: torch.Generator, number: int) -> Tensor:
    """Draw vectors with variance 1/i in direction i: float32 `(number, WIDTH)`."""
    return torch.randn(number, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1).rsqrt()


def concepts_of(number: int) -> tuple[Tensor, np.ndarray]:
    """Return the concepts of a set, and the cumulated share of images that each has."""
    count = max(1, number // IMAGES_PER_CONCEPT)
    shares = 1 / np.arange(1, count + 1)
    return variations(torch.Generator().manual_seed(number), count), np.cumsum(shares) / shares.sum()


def blocks(number: int) -> Iterator[Tensor]:
    """Yield the embeddings of a set, float32 `(ROWS_PER_PART, WIDTH)` at a time, the same at each call."""
    concepts, shares = concepts_of(number)
    for block, first in enumerate(range(0, number, ROWS_PER_PART)):
        generator, rows = torch.Generator().manual_seed(block), min(ROWS_PER_PART, number - first)
        drawn = np.searchsorted(shares, np.random.default_rng(block).random(rows))
        yield F.normalize(concepts[drawn] + VARIATION * variations(generator, rows), dim=1)


def exact_results(number: int, file: Path) -> tuple[Tensor, Tensor]:
    """Return the queries of a set and the rows of their best, from a file if they were found before."""
    if not file.exists():
        first, generator = next(blocks(number)), torch.Generator().manual_seed(-1)
        chosen = first[torch.randperm(len(first), generator=generator)[:QUERIES]]
        queries = F.normalize(chosen + DISTANCE * variations(generator, len(chosen)), dim=1)
        best = TopK(queries, min(MOST_FOUND, number))
        at = 0
        for embeds in tqdm(blocks(number), f"exact results among {number:,}", -(-number // ROWS_PER_PART)):
            best.add(embeds, torch.arange(at, at + len(embeds)))
            at += len(embeds)
        with whole(file) as partial_file:
            torch.save((queries, best.positions), partial_file)
    return torch.load(file, weights_only=True)


def prices(first: int, number: int) -> pa.Table:
    """Return a column to filter by."""
    return pa.table({"price": pa.array(np.arange(first, first + number) * 7919 % 1000, pa.int32())})


def fill(vectors: Vectors, number: int, folder: Path) -> float:
    """Write the parts of a set that are missing; return the seconds that all of them took to write."""
    model, processor = load_model(str(CHECKPOINT))
    made_by, file = images_made_by(model, processor), folder / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    parts = tqdm(blocks(number), f"{number:,} as {vectors}", -(-number // ROWS_PER_PART))
    for block, embeds in enumerate(parts):
        name = f"part-{block:05d}.parquet"
        if name in seconds and (folder / name).exists():
            continue
        start = time.perf_counter()
        rows = range(block * ROWS_PER_PART, block * ROWS_PER_PART + len(embeds))
        names = list(map(str, rows))
        write_part(
            folder, name, shard_table(names, names, names, embeds, vectors, prices(rows[0], len(rows))), made_by
        )
        seconds[name] = time.perf_counter() - start
        with whole(file) as partial_file:
            partial_file.write_text(json.dumps(seconds))
    return sum(seconds.values())


# ---- measurement of a store ----


def resident(name: str = "VmRSS") -> int:
    """Return a figure of this process's memory in bytes (Linux only)."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


class Store(NamedTuple):
    """A way to keep embeddings.

    Args:
        build: fills a folder with a set of as many images; returns seconds.
        open: opens the folder with a model and its processor.
        most: images up to which it is measured, because of memory or of the time that building or a search takes.
    """

    build: Callable[[int, Path], float]
    open: Callable[[Path, Any, Any], ImageSearch]
    most: int = 10**7


def in_memory(index: str, most: int, vectors: Any = None) -> Store:
    """Return the store of a gallery in memory."""

    def build(number: int, place: Path) -> float:
        model, processor = load_model(str(CHECKPOINT))
        embeds, names = torch.cat(list(blocks(number))), list(map(str, range(number)))
        start = time.perf_counter()
        table, made_by = GalleryTable(names, [None] * number, names), images_made_by(model, processor)
        Gallery(table, embeds, made_by, model, processor, metadata=prices(0, number)).save(place)
        _ = opened(place, model, processor).index
        return time.perf_counter() - start

    def opened(place: Path, *encoder: Any) -> Gallery:
        return Gallery.load(place, *encoder, index, vectors=vectors)  # type: ignore[arg-type]

    return Store(build, opened, most)


def in_shards(vectors: Vectors, most: int = 10**7) -> Store:
    """Return the store of shards."""
    return Store(partial(fill, vectors), ShardedGallery.open, most)


def in_milvus(most: int) -> Store:
    """Return the store of a file of Milvus Lite."""

    def build(number: int, place: Path) -> float:
        shards = place / "shards"
        fill("float32", number, shards)
        start = time.perf_counter()
        address = StoreAddress(str(place / "store.db"), "images")
        MilvusGallery.of_embedded(from_shards(shards), address, *load_model(str(CHECKPOINT))).close()
        seconds = time.perf_counter() - start
        shutil.rmtree(shards)
        return seconds

    return Store(build, lambda place, *encoder: Gallery.from_milvus(str(place / "store.db"), "images", *encoder), most)


STORES = {
    "in memory, exact": in_memory("exact", 10**6),
    "in memory, int8": in_memory("exact", 10**6, "int8"),
    "in memory, FAISS": in_memory("faiss", 10**6),
    "Milvus Lite": in_milvus(10**5),
    "shards, float32": in_shards("float32", 10**6),
    "shards, float16": in_shards("float16", 10**6),
    "shards, int8": in_shards("int8"),
    "shards, int8+float16": in_shards("int8+float16"),
}


def build(name: str, number: int, place: Path) -> float:
    """Fill a store with a set, as far as it is not filled; return the seconds that this takes in all."""
    disable_progress_bars()
    return STORES[name].build(number, place)


def measure(name: str, number: int, place: Path, best: tuple[Tensor, Tensor]) -> Row:
    """Measure a store that is filled: seconds, bytes, and recalls."""
    disable_progress_bars()
    encoder = load_model(str(CHECKPOINT))  # embeds nothing here: queries are random, as wide as the images
    encoder[0].__class__ = type("Wide", (type(encoder[0]),), {"embedding_width": WIDTH})
    before, start = resident(), time.perf_counter()
    gallery = STORES[name].open(place, *encoder)
    queries = [Query((), "", query, None, query, gallery.made_by) for query in best[0]]
    gallery.search(query=queries[0], k=10)
    row: Row = {"store": name, "images": number, "first": time.perf_counter() - start}
    single = [partial(gallery.search, query=query, k=10) for query in queries[:ROUNDS]]
    row["one"] = timed(single)
    row["filtered"] = timed([partial(call, filter="price < 100") for call in single[: ROUNDS // 4]])
    row["several"] = timed([partial(gallery.search_many, queries[:BATCH], 10)] * 5)
    found = [list(map(int, gallery.search(query=query, k=MOST_FOUND).ids)) for query in queries[:ROUNDS]]
    row |= recalls(found, best[1][:ROUNDS])
    row["memory"] = resident("VmHWM") - before
    row["disk"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return row


def timed(calls: list[Callable[[], Any]]) -> list[float]:
    """Return the seconds of each call."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def figures_table(folder: Path, numbers: list[int], stores: list[str]) -> list[Row]:
    """Measure each store with each number of images, one process after another."""
    rows = []
    for number, name in product(numbers, stores):
        if number > STORES[name].most:
            continue
        file = folder / f"{number}-{name}.json"
        if not file.exists():
            best = exact_results(number, folder / f"{number}-exact.pt")
            place = folder / f"{number}-{name}"
            seconds = alone(build, name, number, place)
            file.write_text(json.dumps(alone(measure, name, number, place, best) | {"build": seconds}))
            shutil.rmtree(place)
        rows.append(json.loads(file.read_text()))
        print(figures_markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, whose memory is that of one store."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- tables ----


def vectors_markdown(rows: list[Row]) -> str:
    """Render the recalls of smaller vectors."""
    heads = ["images", "vectors", "bytes a vector", *(f"recall@{k}" for k in (1, 10, MOST_FOUND))]
    lines = [[f"{row['images']:,}", row["vectors"], str(row["bytes a vector"]), *recall_cells(row)] for row in rows]
    return as_table(heads, lines)


def indexes_markdown(rows: list[Row]) -> str:
    """Render the recalls of indexes."""
    lines = [[f"{row['images']:,}", row["index"], *recall_cells(row)] for row in rows]
    return as_table(["images", "index", *(f"recall@{k}" for k in (1, 10, MOST_FOUND))], lines)


def figures_markdown(rows: list[Row]) -> str:
    """Render what was measured of the stores."""
    heads = ["images", "store", "build", "disk", "memory", "opened and first", "one query: p50", "p95"]
    heads += ["filtered: p50", f"{BATCH} queries: p50", "p95", *(f"recall@{k}" for k in (1, 10, MOST_FOUND))]
    lines = []
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.0f} MB" for key in ("disk", "memory")]
        one, several = ([seconds(np.quantile(row[key], q)) for q in (0.5, 0.95)] for key in ("one", "several"))
        times = [seconds(row["first"]), *one, seconds(np.median(row["filtered"])), *several]
        lines.append([f"{row['images']:,}", row["store"], seconds(row["build"]), *sizes, *times, *recall_cells(row)])
    return as_table(heads, lines)


def recall_cells(row: Row) -> list[str]:
    """Render the recalls of a row."""
    return [f"{row[f'recall@{k}']:.4f}" for k in (1, 10, MOST_FOUND)]


def seconds(value: float) -> str:
    """Render seconds, or milliseconds below one, with two digits at least."""
    number, unit = (value, "s") if value >= 1 else (1000 * value, "ms")
    return f"{number:,.1f} {unit}" if number < 10 else f"{number:,.0f} {unit}"


def as_table(heads: list[str], lines: list[list[str]]) -> str:
    """Render a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


ENCODERS = {
    "ViT-B/32 on an RTX 3080": (1500, None),
    "ViT-H/14 on an L4": (75, 0.81),
}
"""Published images a second, and dollars an hour: clip-retrieval's README, and vecstore's article on a million images,
which says 50 to 100 images a second."""

STORAGE, MEMORY = 0.023, 0.126 / 16
"""List prices in dollars: of object storage, a GB and month (S3 Standard), and of a server's memory, a GB and hour
(r6i.large, on demand, 16 GB with two cores); both in us-east-1."""

HOURS = 730
"""Of a month."""

GRAPH_BYTES = 2 * 32 * 4
"""Of an image in an HNSW graph with M = 32: 2 M links of four bytes in the lowest layer, which has nearly all."""

LARGE = (10**8, 10**9)


def paper_markdown(rows: list[Row]) -> str:
    """Say how what was measured grows, and carry it on to 10^8 and 10^9 images."""
    return "\n\n".join([growth_markdown(rows), shards_markdown(rows), encoding_markdown(), servers_markdown()])


def growth_markdown(rows: list[Row]) -> str:
    """Render how many times as much ten times as many images cost, for each store from its smallest to its largest."""
    lines = []
    for store in dict.fromkeys(row["store"] for row in rows):
        some = sorted((row for row in rows if row["store"] == store), key=lambda row: row["images"])
        small, large = some[0], some[-1]
        if large["images"] > small["images"]:
            tens = np.log10(large["images"] / small["images"])
            costs = [(np.median(large[key]), np.median(small[key])) for key in ("build", "disk", "memory", "one")]
            times = [f"{(more / less) ** (1 / tens):.1f}" for more, less in costs]
            lines.append([store, f"{small['images']:,} to {large['images']:,}", *times])
    return as_table(["store", "measured from", "build", "disk", "memory", "one query"], lines)


def shards_markdown(rows: list[Row]) -> str:
    """Render the sizes of shards, from the largest that were measured."""
    lines = []
    for vectors in ("int8", "int8+float16"):
        name = f"shards, {vectors}"
        row = max((row for row in rows if row["store"] == name), key=lambda row: row["images"])
        for number in LARGE:
            factor = number / row["images"]
            disk = row["disk"] * factor / 1e9
            search = seconds(float(np.median(row["one"])) * factor)
            parts = f"{-(-number // ROWS_PER_PART):,}"
            lines.append([f"{number:,}", name, f"{disk:,.0f} GB", f"${disk * STORAGE:,.0f}", parts, search])
    return as_table(["images", "store", "disk", "storage a month", "parts", "one exact search"], lines)


def encoding_markdown() -> str:
    """Render what encoding takes at published rates."""
    lines = []
    for number in (10**6, *LARGE):
        for name, (rate, price) in ENCODERS.items():
            hours = number / rate / 3600
            several = [f"{hours / gpus:,.1f}" for gpus in (1, 8, 64)]
            lines.append(
                [f"{number:,}", f"{name}, {rate:,} images/s", *several, f"${hours * price:,.0f}" if price else "-"]
            )
    return as_table(["images", "encoded by", "hours on 1 GPU", "on 8", "on 64", "price"], lines)


def servers_markdown() -> str:
    """Render the memory of servers that hold all vectors, with an HNSW graph or without, and its price a month."""
    lines = []
    for number in LARGE:
        for vectors, size in (("float32", 4 * WIDTH), ("float16", 2 * WIDTH), ("int8", WIDTH + 4)):
            costs = [number * bytes_each / 1e9 for bytes_each in (size, size + GRAPH_BYTES)]
            cells = [f"{gigabytes:,.0f} GB, ${gigabytes * MEMORY * HOURS:,.0f}" for gigabytes in costs]
            lines.append([f"{number:,}", vectors, *cells])
    return as_table(["images", "vectors in memory", "compared all", "with an HNSW graph"], lines)


RECALLS = {"vectors": vectors_of, "indexes": indexes_of}
"""Galleries of the tables of recall."""

RENDERED = {
    "vectors": vectors_markdown,
    "indexes": indexes_markdown,
    "figures": figures_markdown,
    "paper": paper_markdown,
}


def main() -> None:
    """Measure the chosen tables, print them, and write them into SCALE.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RENDERED, default=list(RENDERED), help="tables (default: all)")
    parser.add_argument("--numbers", nargs="+", type=int, default=[10**5, 10**6, 10**7], help="images of the sets")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES), metavar="STORE", help="stores")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scale"), help="folder of sets and numbers")
    parser.add_argument("--write", action="store_true", help=f"replace the tables of {DOCUMENT.name}")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figures: list[Row] = []
    for name in args.only:
        if name in RECALLS:
            rows = emoji_recalls(args.output_dir, RECALLS[name])
        else:
            rows = figures = figures or figures_table(args.output_dir, args.numbers, args.stores)
        (args.output_dir / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        text = RENDERED[name](rows)
        print(f"## {name}\n\n{text}\n", flush=True)
        if args.write:
            facts = [described(machine("base"))] if name == "figures" else []  # recall depends on no machine
            marks = f"<!-- {name}: written by scale_tables.py -->", f"<!-- end of {name} -->"
            write_between(*marks, *facts, text, document=DOCUMENT)


if __name__ == "__main__":
    main()
