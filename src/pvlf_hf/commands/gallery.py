"""Runs `pvlf-hf index`, `search` and `demo`: everything with an index of one's own images."""

from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq
import typer
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from ..checkpoints.loading import load_model
from ..embeddings.embedding_store import images_made_by
from ..embeddings.openvino_encoder import encode_by_openvino
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..search.gallery import Gallery
from ..search.gallery_files import TABLE, check_encoder, is_gallery, kept_provenance
from ..search.query import Explanation
from ..search.replacement import finish_replacement
from ..search.requests import as_plain
from ..search.result import SearchResult
from ..search.results_page import search_page
from .output import print_json

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
    finish_replacement(path)
    encoder, processor = load(model, index_dtype(path) if dtype == "auto" else dtype, composition)
    known = indexed_digests(path, encoder, processor)
    if openvino:
        encode_by_openvino(encoder)
    gallery = Gallery.from_folder(folder, encoder, processor, path=path, replace=True, **options)
    new = len({*gallery.digests} - known)
    if as_json:
        facts = {"pictures": len(gallery), "new": new, "skipped": gallery.skipped, "left_out": gallery.left_out}
        print_json(path=str(path), **facts)
        return
    typer.echo(f"{path}: {len(gallery)} images, {new} new, {len(gallery.skipped)} skipped")
    for image_id, reason in list(gallery.skipped.items())[:LISTED]:
        typer.echo(f"skipped {image_id}: {reason}")
    if len(gallery.skipped) > LISTED:
        typer.echo(f"and {len(gallery.skipped) - LISTED} more; --json lists them all")
    if gallery.left_out:
        folders = sorted({str(PurePosixPath(name).parent) for name in gallery.left_out})
        listed = ", ".join(folders[:LISTED]) + (", ..." if len(folders) > LISTED else "")
        count = f"{len(gallery.left_out)} images in hidden or system folders"
        typer.echo(f"left out {count} ({listed}); --include-hidden indexes them")


def search(
    path: Path,
    model: str,
    asked: dict[str, Any],
    settings: dict[str, Any],
    k: int,
    weights: tuple[float, ...],
    sheet: Path | None,
    explain: bool,
    as_json: bool,
    composition: str | None = None,
) -> None:
    """Search an index, and print or draw the results."""
    gallery = Gallery.load(path, *load(model, index_dtype(path), composition))
    for one in asked["texts"]:
        check_vocabulary(gallery.processor.tokenizer, one)
    images, texts, ids = (asked[name] or None for name in ("images", "texts", "ids"))
    options: dict[str, Any] = {"weights": weights, "explain": explain} | settings
    result = gallery.search(images, k=k, texts=texts, ids=ids, **options)
    if as_json:
        draw(result, sheet if result.ids else None, k)
        results = as_plain(result)["results"]
        for one, file in zip(results, result.paths, strict=True):
            one["path"] = file
        why = {"why": list(map(explained, result.why))} if explain else {}
        print_json(results=results, sheet=str(sheet) if sheet else None, **why)
        return
    for rank, (image_id, score) in enumerate(zip(result.ids, result.scores, strict=True), 1 + settings["offset"]):
        folded = f"  and {len(result.folded[image_id])} like it" if image_id in result.folded else ""
        typer.echo(f"{rank:>3}  {score:.4f}  {image_id}{folded}")
    if not result.ids:
        typer.echo("nothing found: no image passes the filter and the least score from this offset on", err=True)
    for explanation in map(explained, result.why):
        typer.echo("weights: " + ", ".join(f"{part} {weight:.2f}" for part, weight in explanation["weights"].items()))
        shares = sorted(zip(explanation["attention"], explanation["tokens"], strict=True), reverse=True)
        typer.echo("attention: " + ", ".join(f"{token} {share:.3f}" for share, token in shares))
    if sheet and result.ids:  # after the results, so that a full disk does not lose them
        draw(result, sheet, k)
        typer.echo(f"see {sheet}")


def demo(
    images: Path | None, model: str, host: str, port: int | None, browser: bool, composition: str | None = None
) -> None:
    """Serve the web demo until interrupted."""
    from ..search.web_demo import launch  # Gradio is an extra

    dtype = index_dtype(images) if images and is_gallery(images) else "auto"
    launch(open_gallery(images, *load(model, dtype, composition)), host=host, port=port, open_browser=browser)


def draw(result: SearchResult, sheet: Path | None, k: int) -> None:
    """Write a contact sheet, if requested, as an image or a page by its file extension."""
    if sheet and sheet.suffix == ".png":
        result.sheet(k=k).save(sheet)
    elif sheet:
        sheet.write_text(search_page(result), encoding="utf-8")


def open_gallery(images: Path | None, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> Gallery:
    """Open an index, a folder (embedded in memory), or Google's emoji, indexed in Hugging Face's cache."""
    if images is None:
        from ..data.emoji_cir.dataset import TEST_VENDOR, load_emoji_pictures

        cache = Path(HF_HOME) / "pvlf_hf" / f"emoji-{images_made_by(model, processor)['fingerprint'][:16]}"
        return Gallery.from_dataset(load_emoji_pictures([TEST_VENDOR]), model, processor, cache)
    finish_replacement(images)
    if is_gallery(images):
        return Gallery.load(images, model, processor)
    return Gallery.from_folder(images, model, processor)


def indexed_digests(path: Path, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> set[str]:
    """Return the digests of the images that an index holds embeddings of by this model's image encoder."""
    if not is_gallery(path):
        return set()
    try:
        check_encoder(path, model, processor)
    except ValueError:
        return set()
    return set(pq.read_table(path / TABLE, columns=["digest"])["digest"].to_pylist())


def index_dtype(path: Path) -> str:
    """Return the dtype that the embeddings of an index were computed in, `"auto"` where there is no index yet."""
    provenance = kept_provenance(path)
    return provenance["dtype"] if provenance else "auto"


def load(
    name: str, dtype: str, composition: str | None = None
) -> tuple[ComposedRetrievalModel, ComposedRetrievalProcessor]:
    """Load model and processor, on the accelerator if there is one."""
    model, processor = load_model(name, composition, dtype)
    return model.to(PartialState().device), processor


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Report words that the tokenizer does not know; raise a `ValueError` if it knows none, as in another script."""
    words = {word: tokenizer.tokenize(word) for word in text.split()}
    unknown = [word for word, tokens in words.items() if tokenizer.unk_token in tokens]
    if words and all({*tokens} <= {tokenizer.unk_token} for tokens in words.values()):
        raise ValueError(f"the model's tokenizer knows no word of {text!r}: use the language it was trained on")
    if unknown:
        typer.echo(f"the model's tokenizer does not know {', '.join(unknown)}; the search uses the rest", err=True)


def explained(why: Explanation) -> dict[str, Any]:
    """Return the weights of eq. 13, and the attention of the prompts to each token in the last layer."""
    weights = dict(zip(("image", "composition", "words"), why.weights, strict=True))
    return {"weights": weights, "tokens": why.tokens, "attention": why.words()}
