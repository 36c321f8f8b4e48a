"""Search in one's own pictures: by a picture, by words, or by a picture and what should be different.

A gallery embeds pictures once and knows them by the digest of their files: encoded again is only what is new. Kept in
a folder, `embeddings.safetensors` holds float32 `(pictures, d)`, and row i of `gallery.parquet` (`id`, `path`,
`digest`) says what row i embeds, so that others can read both without this package.

Example:
    ```python
    gallery = Gallery.from_folder("photos/", model, processor, path="photos.gallery")
    result = gallery.search(image="dress.jpg", text="without sleeves", k=5)
    result = result.refine(text="and now in blue", pick=0)  # from the best of them
    result.sheet().save("session.png")
    ```
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, Image
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from PIL import Image as PILImage
from torch import Tensor
from transformers.utils import logging

from ..atomic_files import locked, whole
from ..data.benchmark import check_columns
from ..data.image_files import files_below
from ..embeddings.embedding_store import EmbeddingStore, made_by, read_rows, write_rows
from ..embeddings.encoding import device_of
from ..embeddings.similarity import top_k
from ..evaluation.retrieval_sheet import SheetRow, retrieval_sheet
from ..models.image_processing_pvlf import Picture
from ..models.modeling_pvlf import PVLFModel
from ..models.processing_pvlf import PVLFProcessor
from .indexing import EMBEDDINGS, PART, Decoding, Encoding, as_dataset, digests_of, least_side, open_cell, report
from .query import FUSION, Explanation, Query, Weights, eval_mode, explanation, mean_embedding
from .vector_index import IndexName, VectorIndex, check_index, make_index

logger = logging.get_logger(__name__)

TABLE = "gallery.parquet"


@dataclass(frozen=True)
class SearchResult:
    """What a search found, best first, and the session that led to it.

    Args:
        ids: of the pictures.
        scores: cosines.
        paths: their files or addresses, None where the gallery knows none.
        query: what was searched; reuse it with other weights: `gallery.search(query=result.query, weights=...)`.
        gallery: what was searched in.
        previous: the result that this one refines.
        pick: which result of `previous` it started from.
    """

    ids: list[str]
    scores: list[float]
    paths: list[str | None] = field(repr=False)
    query: Query
    gallery: "Gallery" = field(repr=False)
    previous: "SearchResult | None" = field(default=None, repr=False)
    pick: int | None = None

    @property
    def why(self) -> tuple[Explanation, ...]:
        """One a reference picture, if the search was asked to `explain`."""
        return self.query.why

    @property
    def session(self) -> list["SearchResult"]:
        """The results of a chain of refinements, from the first search to this one."""
        return [*(self.previous.session if self.previous else []), self]

    def refine(
        self,
        text: str | None = None,
        pick: int = 0,
        k: int | None = None,
        weights: Weights = FUSION,
        explain: bool = False,
    ) -> "SearchResult":
        """Searches again from one of the results ("... and now in blue"), which is itself left out.

        Args:
            text: what should be different; None for more like it.
            pick: which result is the reference, counted from 0.
            k: how many results; as many as here by default.
            weights: see [`Query.embed`].
            explain: see [`Gallery.search`].

        Raises:
            ValueError: if there is no such result, its picture cannot be opened, and as [`Gallery.search`].
        """
        if not 0 <= pick < len(self.ids):
            raise ValueError(f"pick={pick}: there are {len(self.ids)} results, choose 0 to {len(self.ids) - 1}")
        picked = self.ids[pick]
        query = self.gallery.query(self.gallery.picture(picked), text, explain)
        found = self.gallery.search(
            query=query, k=len(self.ids) if k is None else k, weights=weights, exclude=[picked]
        )
        return replace(found, previous=self, pick=pick)

    def sheet(self, title: str = "", k: int = 5) -> PILImage.Image:
        """Draws the session, a row a search; framed is the result that the next row refines, at last the best.

        Args:
            title: heading.
            k: results in a row.

        Raises:
            ValueError: if a picture cannot be opened.
        """
        picks = [result.pick or 0 for result in self.session[1:]] + [0]
        rows = []
        for result, pick in zip(self.session, picks, strict=True):
            more = f" (and {len(result.query.images) - 1} more pictures)" if len(result.query.images) > 1 else ""
            rows.append(
                SheetRow(
                    reference=(*result.query.images, PILImage.new("RGB", (8, 8), "white"))[0],
                    caption=(result.query.text or "") + more,
                    results=[self.gallery.picture(image_id) for image_id in result.ids[:k]],
                    target=self.gallery.picture(result.ids[pick]),
                    rank=pick,
                )
            )
        return retrieval_sheet(rows, title)


class Gallery:
    """Embedded pictures, to be searched. Made by `from_folder`, `from_images`, `from_dataset`, `load` or `from_hub`.

    Under `accelerate launch` all processes share the encoding; search in the main one.

    Attributes:
        ids: names of the pictures.
        paths: their files or addresses, None where the data set holds them itself.
        digests: of the files; of an address itself, which is not fetched again to see whether it still holds the same.
        embeds: float32 `(pictures, d)`, L2-normalised, in the order of ids.
        skipped: id of every picture that could not be read, and why.
        made_by: `fingerprint` and `dtype` of model and processor, as [`EmbeddingStore`] states them.
    """

    def __init__(
        self,
        table: dict[str, list[Any]],
        embeds: Tensor,
        made_by: dict[str, str],
        model: PVLFModel,
        processor: PVLFProcessor,
        index: IndexName = "exact",
        uri: str | None = None,
        sources: Dataset | None = None,
        skipped: dict[str, str] | None = None,
    ) -> None:
        check_index(index, uri)
        self.ids, self.paths, self.digests = table["id"], table["path"], table["digest"]
        self.embeds, self.made_by, self.model, self.processor = embeds, made_by, model, processor
        self.index_name, self.uri, self.skipped = index, uri, skipped or {}
        self._sources = sources or as_dataset(self.paths)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        model: PVLFModel,
        processor: PVLFProcessor,
        path: str | Path | None = None,
        allow_links: bool = False,
        **options: Any,
    ) -> "Gallery":
        """Embeds the pictures of a folder and its subfolders: every file whose ending Pillow can open.

        Args:
            folder: where the pictures are; their ids are their names in it (`"2024/dress.jpg"`).
            model: embeds them.
            processor: of the model.
            path: folder to keep the work in. Run again, also after an interruption, only what is new or changed is
                encoded, and what is gone is dropped; another run at work in it is waited for. None keeps it in memory,
                see [`~Gallery.save`].
            allow_links: follow links that lead out of the folder, also to other folders.
            **options: `batch_size` (64); `progress` (True), show progress bars; `draft` (False), decode JPEGs that are
                much larger than the model sees at reduced size: faster, for nearly the same embeddings; `index`,
                `"exact"` (default), `"faiss"` (approximate, in memory) or `"milvus"` with its `uri` (a file ending in
                .db, or a cluster's address), see `pvlf_hf.search.vector_index`.

        Raises:
            ValueError: if there is no picture, or none that can be read; a link leads out of the folder; `path` holds
                embeddings of another model; or the index is unknown. A picture that cannot be read is skipped, counted
                in a warning and listed in `skipped`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; pass the one that holds the pictures")
        files = files_below(folder, allow_links)  # links to nothing too, which are reported
        PILImage.init()
        readable = {ending for ending, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
        pictures = [file for file in files if file.suffix.lower() in readable]
        if not pictures:
            endings = sorted({file.suffix for file in files})[:5]
            raise ValueError(f"{folder} holds no pictures, its files end in {endings}: pass the folder that does")
        ids = [file.relative_to(folder).as_posix() for file in pictures]
        return cls.from_dataset(
            as_dataset([str(f.absolute()) for f in pictures], ids), model, processor, path, **options
        )

    @classmethod
    def from_images(
        cls,
        images: Iterable[str | Path],
        model: PVLFModel,
        processor: PVLFProcessor,
        path: str | Path | None = None,
        **options: Any,
    ) -> "Gallery":
        """As [`~Gallery.from_folder`], of files and `http(s):` or `data:` addresses, which are their own ids."""
        names = [str(image) for image in images]
        return cls.from_dataset(as_dataset(names, names), model, processor, path, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        model: PVLFModel,
        processor: PVLFProcessor,
        path: str | Path | None = None,
        image_column: str = "image",
        id_column: str = "image_id",
        batch_size: int = 64,
        progress: bool = True,
        draft: bool = False,
        index: IndexName = "exact",
        uri: str | None = None,
    ) -> "Gallery":
        """Embeds a column of pictures (`datasets.Image`); other arguments and errors as [`~Gallery.from_folder`].

        Raises:
            ValueError: if there is no such column, or ids repeat.
        """
        check_columns(dataset, (image_column, id_column), "gallery")
        check_index(index, uri)
        ids = [str(image_id) for image_id in dataset[id_column][:]]
        if repeated := [image_id for image_id, count in Counter(ids).items() if count > 1]:
            raise ValueError(f"gallery: {id_column} must be unique, repeated: {repeated[:3]}; rename or drop them")
        mode = getattr(dataset.features[image_column], "mode", None)
        sources = dataset.select_columns(image_column).rename_columns({image_column: "image"})
        sources = sources.cast_column("image", Image(mode=mode, decode=False))
        # Another run that keeps its work in the same folder is waited for, and what it has encoded is found.
        with locked(Path(path)) if path and PartialState().is_main_process else nullcontext():
            PartialState().wait_for_everyone()
            its_model = EmbeddingStore(path).claim(model, processor) if path else made_by(model, processor)
            how = Decoding(mode, least_side(processor) if draft else None)
            digests, bad = digests_of(sources, how, progress)
            encoding = Encoding(sources, how, digests, Path(path) if path else None, its_model)
            bad = encoding.run(model, processor, bad, batch_size, progress)
            skipped = {ids[row]: bad[digests[row]] for row in range(len(ids)) if digests[row] in bad}
            kept = [row for row in range(len(ids)) if digests[row] not in bad]
            report(skipped, len(ids))
            sources = sources.select(kept)
            paths = [cell["path"] if cell["bytes"] is None else None for cell in sources["image"]]
            table: dict[str, list[Any]] = {
                "id": [ids[row] for row in kept],
                "path": paths,
                "digest": [digests[row] for row in kept],
            }
            embeds = encoding.take(table["digest"])
            gallery = cls(table, embeds, its_model, model, processor, index, uri, sources, skipped)
            if path:
                gallery.save(path)
        return gallery

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PVLFModel,
        processor: PVLFProcessor,
        index: IndexName = "exact",
        uri: str | None = None,
    ) -> "Gallery":
        """Loads what was saved; embeddings stay on disk until they are used.

        Raises:
            ValueError: if there is no gallery in the folder, its two files do not belong together, or another model
                made it.
        """
        path = Path(path)
        if missing := [name for name in (EMBEDDINGS, TABLE) if not (path / name).is_file()]:
            raise ValueError(f"{path} lacks {missing}: make it with Gallery.from_folder(..., path={str(path)!r})")
        its_model = EmbeddingStore(path).claim(model, processor)
        table = pq.read_table(path / TABLE).to_pydict()
        keys, embeds = read_rows(path / EMBEDDINGS)
        if [name for (name,) in keys] != table["digest"]:
            raise ValueError(
                f"{path}: {EMBEDDINGS} and {TABLE} are not of one time: make the gallery again with this path, which "
                "encodes nothing twice"
            )
        return cls(table, embeds, its_model, model, processor, index, uri)

    def save(self, path: str | Path) -> None:
        """Writes the two files of a gallery, and removes what an interruption left.

        Raises:
            ValueError: if the folder holds embeddings of another model.
        """
        path = Path(path)
        if EmbeddingStore(path).model not in (None, self.made_by):
            raise ValueError(f"{path} holds embeddings of another model or processor: choose another folder")
        state = PartialState()
        if state.is_main_process:
            self._write(path, self.paths)
            for part in path.glob(f"*{PART}*"):  # and of those that were being written
                part.unlink()
        state.wait_for_everyone()

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
        """Uploads embeddings, ids, digests and web addresses as a data set; pictures and paths of files stay here.

        Args:
            repo_id: `"user/name"`, created if need be.
            private: whether a new one is.
            token: of the Hub; by default the one logged in with.
        """
        with TemporaryDirectory() as folder:
            self._write(Path(folder), [p if p and p.startswith(("http://", "https://")) else None for p in self.paths])
            api = HfApi(token=token)
            api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
            message = f"Gallery of {len(self)} pictures"
            return api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset", commit_message=message)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        model: PVLFModel,
        processor: PVLFProcessor,
        index: IndexName = "exact",
        uri: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "Gallery":
        """Loads what [`~Gallery.push_to_hub`] uploaded; arguments and errors as [`~Gallery.load`].

        Raises:
            ValueError: if it names files, which another's gallery must not open here. Web addresses it may name are
                fetched when their pictures are asked for.
        """
        folder = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=[EMBEDDINGS, TABLE]
        )
        gallery = cls.load(folder, model, processor, index, uri)
        if files := [path for path in gallery.paths if path and not path.startswith(("http://", "https://"))]:
            raise ValueError(
                f"{repo_id} names {len(files)} files of this machine, first: {files[:3]}; a gallery on the Hub has "
                "web addresses or none, as push_to_hub leaves them"
            )
        return gallery

    def search(
        self,
        image: Picture | Sequence[Picture] | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        query: Query | None = None,
        weights: Weights = FUSION,
        exclude: Sequence[str] = (),
        explain: bool = False,
    ) -> SearchResult:
        """Finds the k nearest pictures by cosine; equal ones in the order of the gallery.

        Args:
            image: one reference picture or several, see [`~Gallery.query`].
            text: what should be different; without a picture, what to look for.
            k: how many results; a gallery that has fewer gives all.
            query: instead of both, one that was encoded before (`result.query`).
            weights: of picture, fusion and words: normalize(w_image image + w_fused fused + w_text text), without
                running an encoder again, see [`Query.embed`]; by default the model's composition.
            exclude: ids that are left out.
            explain: also say why, in `result.why`; needs a picture and a text.

        Raises:
            ValueError: if there is nothing to search by, a picture cannot be read, the text is empty, the query is of
                another model, k is below 1, an id is unknown or nothing is left, and as [`Query.embed`].
        """
        if query is None:
            query = self.query(image, text, explain)
        elif image is not None or text is not None or explain:
            raise ValueError("a query is encoded already: pass it without image, text and explain")
        if query.made_by != self.made_by:
            raise ValueError("the query is of another model than this gallery: make it with gallery.query(...)")
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one result")
        if unknown := [image_id for image_id in exclude if image_id not in self._row_of]:
            raise ValueError(f"exclude names {unknown[:3]}, which are not in the gallery; pass ids of its pictures")
        excluded = [self._row_of[image_id] for image_id in exclude]
        if len(set(excluded)) == len(self):
            raise ValueError(f"exclude leaves none of the gallery's {len(self)} pictures; exclude fewer")
        embeds = query.embed(weights)
        rows = self.index.candidates(embeds, min(k + len(excluded), len(self)))
        rows = rows[~torch.isin(rows, torch.tensor(excluded, dtype=torch.int64))].sort().values
        scores, best = top_k(embeds[None], self.embeds[rows], min(k, len(rows)))
        found = rows[best[0]].tolist()
        ids, paths = [self.ids[row] for row in found], [self.paths[row] for row in found]
        return SearchResult(ids, scores[0].tolist(), paths, query, self)

    def query(
        self,
        image: Picture | Sequence[Picture] | None = None,
        text: str | None = None,
        explain: bool = False,
    ) -> Query:
        """Encodes a query, for searches with several weights; arguments and errors as [`~Gallery.search`].

        Several pictures are each composed with the text; the query is the normalised mean of their embeddings.
        """
        if image is None and text is None:
            raise ValueError("nothing to search by: pass an image, a text or both")
        if text is not None and not text.strip():
            raise ValueError("text is empty: say what to look for, or leave text out to search by the picture alone")
        if explain and (image is None or text is None):
            raise ValueError("explain=True needs an image and a text: only their composition can be explained")
        given = [] if image is None else image if isinstance(image, list | tuple) else [image]
        arrays = [self.processor.image_processor.process_image(picture) for picture in given]
        images = tuple(PILImage.fromarray(array.transpose(1, 2, 0)) for array in arrays)
        if image is not None and not images:
            raise ValueError("image is an empty list: pass at least one picture, or leave it out")
        with eval_mode(self.model, eager=explain):
            return self._encode(images, text, explain)

    def _encode(self, images: tuple[PILImage.Image, ...], text: str | None, explain: bool) -> Query:
        model, device = self.model, device_of(self.model)
        image_embeds = text_embeds = None
        if images:
            pictures = model.get_image_features(**self.processor(images=list(images)).to(device))
            image_embeds = fused = mean_embedding(pictures.pooler_output)
        if text is not None:
            inputs = self.processor(text=text).to(device)
            tokens, position = model.backbone.text_tokens(inputs["input_ids"], inputs["attention_mask"])
            text_embeds = fused = mean_embedding(tokens[0, position])
        if not images or text is None:
            return Query(images, text, fused, image_embeds, text_embeds, self.made_by)
        n = len(images)
        output = model.compose(
            pictures.last_hidden_state,
            tokens.expand(n, -1, -1),
            position.expand(n),
            inputs["attention_mask"].expand(n, -1),
            output_attentions=explain,
        )
        words = self.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        why = [explanation(output, row, words, model.config.num_prompts) for row in range(n if explain else 0)]
        fused = mean_embedding(output.pooler_output)  # type: ignore[arg-type]  # composed, so it has one
        return Query(images, text, fused, image_embeds, text_embeds, self.made_by, tuple(why))

    def picture(self, image_id: str) -> PILImage.Image:
        """Opens a picture of the gallery, RGB.

        Raises:
            ValueError: if the gallery does not have it, or it is no longer where it was.
        """
        if image_id not in self._row_of:
            raise ValueError(f"{image_id!r} is not in the gallery; pass one of its ids")
        try:
            how = Decoding(self._sources.features["image"].mode)
            return open_cell(self._sources[self._row_of[image_id]]["image"], how)
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            raise ValueError(
                f"the picture {image_id!r} cannot be opened ({error}): make the gallery again where its pictures are, "
                "with the same path, which encodes nothing twice"
            ) from error

    @cached_property
    def index(self) -> VectorIndex:
        """Built at the first search."""
        return make_index(self.index_name, self.uri, self.embeds, self.digests, self.made_by["fingerprint"])

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.ids)}

    def _write(self, folder: Path, paths: list[str | None]) -> None:
        write_rows(folder / EMBEDDINGS, [(name,) for name in self.digests], self.embeds, self.made_by)
        columns = {"id": self.ids, "path": paths, "digest": self.digests}
        with whole(folder / TABLE) as partial:
            pq.write_table(pa.table({name: pa.array(its, pa.string()) for name, its in columns.items()}), partial)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Gallery({len(self)} pictures, {len(self.skipped)} skipped, index={self.index_name!r})"


__all__ = ["Gallery", "SearchResult"]
