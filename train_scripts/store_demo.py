"""Fill a store with synthetic images' embeddings, and search it with a filter while images are added and removed.

    python train_scripts/store_demo.py                     # 1,000,000 images
    python train_scripts/store_demo.py --images 2000       # to check that it runs

Embeddings are points around 1,000 centres, L2-normalised, with two columns of metadata: `price`, 0 to 99, and `brand`,
one of seven. They are written as shards, which a sharded gallery searches where they lie, and which fill a store: a
new file of Milvus Lite, or the server of `--uri`. One thread then searches with a filter, while another adds and
removes images, again and again. Every result is compared with the exact one: an image that stays must be found in its
order, by its score; one that comes and goes may be found or not. In the end the store is as at the start.

With `--searches 20` that took six and a half minutes, 3.2 GB of memory and 1.6 GB of disk on two cores that did other
work, too. Milvus Lite compares a query with every image, as the shards do: 2.6 s a search, and 1.7 s with the filter,
where the shards took 0.14 and 0.19.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from pvlf_hf import EmbeddingShards, Gallery, Query, SearchResult, ShardedGallery
from pvlf_hf.embeddings.embedding_store import images_made_by
from pvlf_hf.embeddings.similarity import TopK
from pvlf_hf.search.milvus.filling import from_shards
from pvlf_hf.search.milvus.gallery import MilvusGallery
from pvlf_hf.search.milvus.store import StoreAddress
from pvlf_hf.search.shards import shard_table, write_part

TINY = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"
PART, CENTRES, BRANDS, K = 16_384, 1000, 7, 10

FILTER = "price < 10 and brand == 'brand 3'"
"""Condition that 1 image in 70 meets."""

MOVED = 700
"""Images that are removed, and as many that are added, at a time: 10 of them meet the filter."""


def points(rows: int, width: int, seed: int) -> Tensor:
    """Return points around the same centres, whatever the seed: float32 `(rows, width)`, L2-normalised."""
    centres = torch.randn(CENTRES, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(CENTRES, (rows,), generator=generator)
    return F.normalize(centres[chosen] + 0.7 * torch.randn(rows, width, generator=generator), dim=1)


def part_of(numbers: range, width: int) -> pa.Table:
    """Return images as a part of shards holds them."""
    price = pa.array([number // BRANDS % 100 for number in numbers], pa.int64())
    metadata = pa.table({"price": price, "brand": [f"brand {number % BRANDS}" for number in numbers]})
    embeds, digests = points(len(numbers), width, numbers.start + 1), [f"{number:032x}" for number in numbers]
    return shard_table(names(numbers), [None] * len(numbers), digests, embeds, "float32", metadata)


def names(numbers: range) -> list[str]:
    """Return the ids of images."""
    return [f"{number:09d}.jpg" for number in numbers]


def write_shards(folder: Path, parts: list[range], model: AutoModel, made_by: dict[str, str]) -> None:
    """Write the images as shards."""
    for numbers in tqdm(parts, desc="writing shards", unit="part"):
        write_part(folder, f"part-{numbers.start:09d}.parquet", part_of(numbers, model.embedding_width), made_by)


def ranked(queries: list[Query], parts: list[range], width: int) -> list[list[tuple[str, float]]]:
    """Return ids and scores of the best images that meet the filter, of each query: exactly."""
    best = TopK(torch.stack([query.embed() for query in queries]), K)
    for part in tqdm(parts, desc="ranking exactly", unit="part"):
        numbers = torch.tensor(part)
        passes = (numbers // BRANDS % 100 < 10) & (numbers % BRANDS == 3)
        if passes.any():
            best.add(points(len(part), width, part.start + 1)[passes], numbers[passes])
    pairs = zip(best.positions.tolist(), best.scores.tolist(), strict=True)
    return [list(zip([f"{row:09d}.jpg" for row in rows], scores, strict=True)) for rows, scores in pairs]


def check(result: SearchResult, expected: list[tuple[str, float]], staying: range) -> None:
    """Raise an error unless a result is exact as far as images that stay go."""
    found = list(zip(result.ids, result.scores, strict=True))
    stable = [one for one in found if int(one[0][:9]) in staying]
    assert len(found) == K and result.scores == sorted(result.scores, reverse=True), found
    assert stable == expected[: len(stable)], (found, expected)


def timed(what: str, search: Callable[[Query], SearchResult], queries: list[Query]) -> list[SearchResult]:
    """Search by each query, and print what half and 95 % of the searches took at most."""
    results, seconds = [], []
    for query in tqdm(queries, desc=what, unit="search"):
        start = time.perf_counter()
        results.append(search(query))
        seconds.append(time.perf_counter() - start)
    half, slow = (1000 * sorted(seconds)[int(share * (len(seconds) - 1))] for share in (0.5, 0.95))
    print(f"{what}: p50 {half:,.1f} ms, p95 {slow:,.1f} ms of {len(seconds)} searches", flush=True)
    return results


def move(gallery: MilvusGallery, leaving: range, coming: range, stop: Event, moved: list[int]) -> None:
    """Remove images and add others, and the other way round, until the event is set."""
    tables = [part_of(numbers, gallery.index.schema.width) for numbers in (coming, leaving)]
    while not stop.is_set():
        for gone, table in zip((leaving, coming), tables, strict=True):
            gallery.remove(names(gone))
            moved.append(len(gone) + gallery.fill([("moved", table)]).written)


def fill(address: StoreAddress, shards: Path, count: int, model: AutoModel, processor: AutoProcessor) -> MilvusGallery:
    """Fill the store from the shards, and print the rate."""
    start = time.perf_counter()
    gallery = MilvusGallery.of_embedded(from_shards(shards), address, model, processor)
    seconds = time.perf_counter() - start
    print(f"filled {address} with {count:,} images in {seconds:,.0f} s: {count / seconds:,.0f} a second", flush=True)
    return gallery


def run(count: int, searches: int, folder: Path, uri: str) -> None:
    """Make the images, fill the store, and search it."""
    model, processor = AutoModel.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)
    staying, leaving, coming = range(count - MOVED), range(count - MOVED, count), range(count, count + MOVED)
    stable = [staying[start : start + PART] for start in range(0, len(staying), PART)]
    made_by, shards = images_made_by(model, processor), folder / "shards"
    embeds = points(searches, model.embedding_width, seed=0)
    queries = [Query((), None, embed, embed, None, made_by) for embed in embeds]
    write_shards(shards, [*stable, leaving], model, made_by)
    expected = ranked(queries, stable, model.embedding_width)
    address = StoreAddress(uri, f"demo_{count}")
    gallery = fill(address, shards, count, model, processor)
    sharded = ShardedGallery(EmbeddingShards(shards), model, processor)
    timed("the store, all images", lambda query: gallery.search(query=query, k=K), queries)
    timed("the shards, all images", lambda query: sharded.search(query=query, k=K), queries)
    other, stop, moved = Gallery.from_milvus(uri, address.name, model, processor), Event(), []
    mover = Thread(target=move, args=(other, leaving, coming, stop, moved))
    mover.start()
    start = time.perf_counter()
    found = timed(
        "the store, filtered, while images move", lambda query: gallery.search(query=query, filter=FILTER), queries
    )
    stop.set()
    mover.join()
    seconds = time.perf_counter() - start
    print(f"{sum(moved):,} images were removed or added meanwhile, {sum(moved) / seconds:,.0f} a second")
    after = timed("the store, filtered", lambda query: gallery.search(query=query, filter=FILTER), queries)
    exact = timed("the shards, filtered", lambda query: sharded.search(query=query, filter=FILTER), queries)
    for results in (found, after, exact):
        for result, best in zip(results, expected, strict=True):
            check(result, best, staying)
    assert [(one.ids, one.scores) for one in after] == [(one.ids, one.scores) for one in exact]
    assert len(gallery) == count and moved
    print(f"all {3 * searches} filtered results equal the exact ranking; the store holds {len(gallery):,} images")


def main() -> None:
    """Read the arguments, and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--searches", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="for shards and store (default: a temporary one)")
    parser.add_argument("--uri", help="of a server of Milvus (default: a file of Milvus Lite)")
    arguments = parser.parse_args()
    if arguments.images < 2 * MOVED:
        parser.error(f"--images: pass at least {2 * MOVED:,}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(arguments.images, arguments.searches, folder, arguments.uri or str(folder / "demo.db"))


if __name__ == "__main__":
    main()
