"""Runs `pvlf-hf index`, `search`, `serve` and `demo`: everything with an index of one's own images."""

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq
import typer
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

from pvlf_hf_client import print_found, warn_of

from ..checkpoints.loading import load_model
from ..embeddings.embedding_store import images_made_by
from ..embeddings.openvino_encoder import encode_by_openvino
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..search.gallery import Gallery
from ..search.gallery_files import TABLE, as_indexed, check_encoder, is_gallery, kept_provenance, store_name_of
from ..search.image_search import ImageSearch
from ..search.milvus.connection import SERVE
from ..search.milvus.filling import bring_in_line, from_shards
from ..search.milvus.gallery import MilvusGallery
from ..search.milvus.schema import MILVUS_NAME
from ..search.milvus.store import StoreAddress, check_maker, names_of_stores, open_store
from ..search.query import Explanation
from ..search.replacement import finish_replacement
from ..search.requests import as_plain
from ..search.result import SearchResult
from ..search.results_page import search_page
from ..search.sharded_gallery import ShardedGallery
from ..search.shards import EmbeddingShards
from ..search.terms import unknown_words
from ..search.vector_index import Copy, check_copy
from .output import print_json

logger = logging.get_logger(__name__)

LISTED = 20
"""Skipped images that `index` prints; `--json` has them all."""


def index(
    folder: Path,
    model: str,
    path: Path,
    dtype: str,
    openvino: bool,
    as_json: bool,
    composition: str | None,
    options: dict[str, Any],
) -> None:
    """Embed a folder of images, and print what was indexed and what was skipped."""
    if holds_shards(str(path)):
        raise ValueError(f"{path} holds shards: choose another folder, or go on with --engine ray")
    finish_replacement(path)
    dtype = index_dtype(path, dtype) if dtype in ("auto", "fastest") else dtype
    encoder, processor = load(model, dtype, composition)
    known = indexed_digests(path, encoder, processor)
    if openvino and dtype != "int8":  # which is OpenVINO's in any case
        encode_by_openvino(encoder)
    options |= {"replace": True, "int8": dtype == "int8"}
    gallery = Gallery.from_folder(folder, encoder, processor, path=path, **options)
    kept = indexed_digests(path, encoder, processor)
    new, removed = len(kept - known), len(known - kept)
    if as_json:
        facts = {"pictures": len(gallery), "new": new, "removed": removed}
        print_json(path=str(path), **facts, skipped=gallery.skipped, left_out=gallery.left_out)
        return
    gone = f", {removed} removed" if removed else ""
    typer.echo(f"{path}: {len(gallery)} images, {new} new{gone}, {len(gallery.skipped)} skipped")
    for image_id, reason in list(gallery.skipped.items())[:LISTED]:
        typer.echo(f"skipped {image_id}: {reason}")
    if len(gallery.skipped) > LISTED:
        typer.echo(f"and {len(gallery.skipped) - LISTED} more; --json lists them all")
    if gallery.left_out:
        folders = sorted({str(PurePosixPath(name).parent) for name in gallery.left_out})
        listed = ", ".join(folders[:LISTED]) + (", ..." if len(folders) > LISTED else "")
        count = f"{len(gallery.left_out)} images in hidden or system folders"
        typer.echo(f"left out {count} ({listed}); --include-hidden indexes them")


def index_on_cluster(
    source: str,
    location: str,
    model: str,
    as_json: bool,
    options: dict[str, Any],
    uri: str | None = None,
    name: str | None = None,
) -> None:
    """Embed images on the workers of Ray, fill a store from the shards if one is given, and print what was done."""
    from ..search.ray_job import index_by_ray  # Ray is an extra

    address = None if uri is None or name is None else StoreAddress(uri, name)
    if address is not None:
        store = open_store(address)  # a store that does not fit is named before images are encoded
        if store is not None:
            check_maker(store, images_made_by(*load_model(model, options["composition"], options["dtype"])))
            store.database.close()
    with redirect_stdout(sys.stderr):  # Ray says there when it has replaced a process
        job = index_by_ray(source, location, model, progress=not as_json, **options)
    shards, encoded, found, broken, repeated, left_out = job
    filled = None
    if address is not None:
        store, filled = bring_in_line(from_shards(location), address, progress=not as_json)
        store.database.close()
    if as_json:
        facts = job._asdict() | {"images": len(shards)}
        facts.pop("shards")
        print_json(path=location, **facts, **({"store": filled._asdict()} if filled else {}))
        return
    typer.echo(f"{location}: {len(shards)} images; {encoded} parts encoded, {found} found done")
    if broken:
        typer.echo(f"{broken} images cannot be read: broken-*.parquet in {location} lists them")
    if left_out:
        listed = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in left_out.items())
        typer.echo(f"left out {sum(left_out.values())} files that are hidden or no images ({listed})")
    if repeated:
        typer.echo(
            f"{repeated} images repeat id and content of another: pvlf_hf.search.shard_sets.merge_shards drops them"
        )
    if filled:
        typer.echo(f"{address}: {filled.written} images written, {filled.kept} as they were, {filled.removed} removed")


def search(
    path: str,
    model: str,
    terms: dict[str, Any],
    settings: dict[str, Any],
    k: int,
    weights: tuple[float, ...],
    sheet: Path | None,
    explain: bool,
    as_json: bool,
    composition: str | None = None,
    uri: str | None = None,
) -> None:
    """Search an index, or a store of a Milvus database, and print or draw the results."""
    gallery = open_index(path, model, composition, uri)
    warn_of([word for text in terms["texts"] for word in unknown_words(gallery.processor.tokenizer, text)])
    images, texts, ids = (terms[name] or None for name in ("images", "texts", "ids"))
    options: dict[str, Any] = {"weights": weights, "explain": explain} | settings
    result = gallery.search(images, k=k, texts=texts, ids=ids, **options)
    if as_json:
        draw(result, sheet if result.ids else None, k)
        results = as_plain(result)
        for one, file in zip(results, result.paths, strict=True):
            one["path"] = file
        why = {"why": list(map(explained, result.why))} if explain else {}
        print_json(results=results, sheet=str(sheet) if sheet else None, **why)
        return
    print_found(as_plain(result), settings["offset"])
    for explanation in map(explained, result.why):
        typer.echo("weights: " + ", ".join(f"{part} {weight:.2f}" for part, weight in explanation["weights"].items()))
        shares = sorted(zip(explanation["attention"], explanation["tokens"], strict=True), reverse=True)
        typer.echo("attention: " + ", ".join(f"{token} {share:.3f}" for share, token in shares))
    if sheet and result.ids:  # after the results, so that a full disk does not lose them
        draw(result, sheet, k)
        typer.echo(f"see {sheet}")


def serve(
    path: str,
    model: str,
    host: str,
    port: int,
    workers: int,
    per_minute: int,
    composition: str | None,
    settings: dict[str, Any],
) -> None:
    """Serve an index over HTTP until interrupted; `settings` are those of [`open_index`]."""
    from ..search import workers as processes  # FastAPI is an extra

    if workers > 1 and (uri := settings["uri"]) is not None and "://" not in uri:
        raise ValueError(
            f"{uri} is a file, which one process at a time can use, and --workers {workers} makes several: leave "
            f"--workers out, or serve the file to them by {SERVE}"
        )
    make = partial(make_server, path, model, per_minute, composition, settings)
    processes.serve(make, host, port, workers)


def make_server(
    path: str,
    model: str,
    per_minute: int,
    composition: str | None,
    settings: dict[str, Any],
    host: str,
    page: bool,
) -> Any:
    """Make the application that serves an index; each worker calls it."""
    from ..search import server

    gallery = open_index(path, model, composition, **settings)
    name = Path(model).resolve().name if Path(model).is_dir() else model  # no folders of this machine
    return server.create_app(gallery, name, host, per_minute, page)


def demo(
    images: str | None,
    model: str,
    host: str,
    port: int | None,
    browser: bool,
    composition: str | None = None,
    uri: str | None = None,
) -> None:
    """Serve the web demo until interrupted."""
    from ..search.web_demo import launch  # Gradio is an extra

    gallery = open_or_embed(images, model, composition, uri)
    launch(gallery, host=host, port=port, open_browser=browser)


def draw(result: SearchResult, sheet: Path | None, k: int) -> None:
    """Write a contact sheet, if requested, as an image or a page by its file extension."""
    if sheet and sheet.suffix == ".png":
        result.sheet(k=k).save(sheet)
    elif sheet:
        sheet.write_text(search_page(result), encoding="utf-8")


def open_or_embed(
    images: str | None, name: str, composition: str | None = None, uri: str | None = None
) -> ImageSearch:
    """Open an index ([`open_index`]), or embed a folder in memory, or Google's emoji, kept in Hugging Face's cache."""
    if images and (uri is not None or holds_shards(images) or is_index(Path(images))):
        return open_index(images, name, composition, uri)
    if uri is not None:
        raise ValueError("--milvus holds several stores: name one, or the folder that `pvlf-hf index` made")
    model, processor = load(name, "auto", composition)
    if not images:
        from ..data.emoji_cir.dataset import TEST_VENDOR, load_emoji_pictures

        cache = Path(HF_HOME) / "pvlf_hf" / f"emoji-{images_made_by(model, processor)['fingerprint'][:16]}"
        return Gallery.from_dataset(load_emoji_pictures([TEST_VENDOR]), model, processor, cache)
    return Gallery.from_folder(images, model, processor)


def holds_shards(path: str) -> bool:
    """Return whether an index is one in shards: a URL, or a folder that has parts."""
    return "://" in path or any(Path(path).glob("part-*.parquet"))


def is_index(folder: Path) -> bool:
    """Return whether a folder is an index, after finishing what a kill left of its replacement."""
    finish_replacement(folder)
    return is_gallery(folder)


def open_index(
    path: str,
    model: str,
    composition: str | None = None,
    uri: str | None = None,
    memory: str | None = None,
    vectors: Copy | None = None,
) -> ImageSearch:
    """Open the folder of a gallery, shards at a folder or URL, or a store in the Milvus database at `uri` if given.

    A store is opened as it is: what others have added to it stays, and nothing is written.

    Args:
        path: folder or URL; of a store the folder that it was filled from, or its name.
        model: searches it.
        composition: of a plain dual encoder.
        uri: of a Milvus database.
        memory: limit of shards, see [`ShardedGallery.open`]; by default its own.
        vectors: numbers that a gallery in memory compares, see [`Gallery.load`].

    Raises:
        ValueError: if there is neither, or another model made it, shards are to be searched by a database, or the
            limit or the numbers are for something else.
    """
    if holds_shards(path):
        if uri is not None:
            raise ValueError(
                f"{path} holds shards, which no --milvus searches: leave --milvus out, or give the name of the store "
                "that was filled from them"
            )
        if vectors is not None:
            raise ValueError(f"{path} holds shards, which have numbers of their own: leave --vectors out")
        shards = EmbeddingShards(path)
        encoder, processor = load(model, shards.made_by["dtype"], composition)
        limit: dict[str, Any] = {} if memory is None else {"memory": memory}
        return ShardedGallery(shards, encoder, processor, **limit)
    if memory is not None:
        raise ValueError(f"--memory limits what shards take, and {path} holds none: leave --memory out")
    if uri is not None:
        check_copy(vectors, "milvus")
        return open_store_of(uri, path, model, composition)
    finish_replacement(Path(path))
    return Gallery.load(path, *load(model, index_dtype(Path(path)), composition), vectors=vectors)


def open_store_of(uri: str, index: str, model: str, composition: str | None) -> MilvusGallery:
    """Open a store as it is, by its name or the folder that filled it, with a model in the dtype of its embeddings."""
    file = Path(uri)
    if "://" not in uri and file.parent.is_dir() and not file.exists():
        raise ValueError(
            f"there is no database {uri}: fill it with `pvlf-hf index PHOTOS --path INDEX --milvus {uri}`"
        )
    folder = Path(index) if is_index(Path(index)) else None
    address = StoreAddress(uri, (store_name_of(folder) if folder else None) or index)
    store = open_store(address) if MILVUS_NAME.fullmatch(address.name) else None
    if store is None:
        why = (
            "has filled no store under its own name"
            if folder
            else "is neither a folder of an index nor a store's name"
        )
        raise ValueError(
            f"{index} {why} in {uri}, which holds {names_of_stores(address)}: name one of these stores in its place, "
            f"or fill one with `pvlf-hf index PHOTOS --path FOLDER --milvus {uri}`"
        )
    dtype = store.made_by["dtype"]
    store.database.close()
    gallery = MilvusGallery.open(address, *load(model, dtype, composition))
    if folder and len(gallery) != (rows := pq.read_metadata(folder / TABLE).num_rows):
        logger.warning(
            f"{uri} holds {len(gallery)} images, and {index} {rows}: the search is among those of the database; "
            "`pvlf-hf index --milvus` makes them equal"
        )
    return gallery


def indexed_digests(path: Path, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> set[str]:
    """Return the digests of the images that an index holds embeddings of by this model's image encoder."""
    if not is_gallery(path):
        return set()
    try:
        check_encoder(path, model, *as_indexed(path, model, processor))
    except ValueError:
        return set()
    return set(pq.read_table(path / TABLE, columns=["digest"])["digest"].to_pylist())


def index_dtype(path: Path, otherwise: str = "auto") -> str:
    """Return the dtype that the embeddings of an index were computed in; `otherwise` where there is no index yet."""
    provenance = kept_provenance(path)
    return provenance["dtype"] if provenance else otherwise


def load(
    name: str, dtype: str, composition: str | None = None
) -> tuple[ComposedRetrievalModel, ComposedRetrievalProcessor]:
    """Load model and processor, on the accelerator if there is one; for images in int8 the model is in float32."""
    model, processor = load_model(name, composition, "float32" if dtype == "int8" else dtype)
    return model.to(PartialState().device), processor


def explained(why: Explanation) -> dict[str, Any]:
    """Return the weights of eq. 13, and the attention of the prompts to each token in the last layer."""
    weights = dict(zip(("image", "composition", "words"), why.weights, strict=True))
    return {"weights": weights, "tokens": why.tokens, "attention": why.words()}
