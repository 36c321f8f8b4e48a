"""Keeps embeddings of gallery images and queries on disk, so that another protocol over them needs no model.

One safetensors file holds the gallery of a dataset, and one its queries for each method to embed them; rows are found
by what they embed: ids and captions, and digests of the images, so that an image that changed is embedded again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_files import locked, whole
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .fingerprints import fingerprint, image_fingerprint, image_settings, own_settings, text_settings

Key = tuple[Any, ...]
"""Key of a row: `(image_id,)` or `(reference_id, caption)`; what the method ignores is dropped."""

SAVE_EVERY = 20_000
"""Rows encoded between two writes (our choice): the most that an interruption loses."""


class EmbeddingStore:
    """Embeddings of one model, kept in a folder.

    Args:
        folder: made when first written to; every process must see the same one.

    Raises:
        ValueError: if a file cannot be read, or the folder holds embeddings of two models.

    Example:
        ```python
        store = EmbeddingStore("outputs/embeddings")
        evaluate(model, processor, load_fashioniq(root, "dress"), store=store)  # encodes, and keeps
        evaluate(None, None, load_fashioniq(root, "dress", reference="removed"), store=store)  # seconds
        ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        models = read_provenance(self.folder)
        self.model: dict[str, str] | None = next(iter(models.values()), None)
        """`fingerprint` and `dtype` of the model that made the embeddings; None in an empty folder."""
        if other := [file for file, model in models.items() if model != self.model]:
            raise ValueError(
                f"{self.folder} holds embeddings of two models: {other[0].name} is not of the model of "
                f"{next(iter(models)).name}. Delete those that you do not want."
            )

    def claim(self, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> dict[str, str]:
        """Check that embeddings of a model may be added, and return their provenance, see [`made_by`].

        Raises:
            ValueError: if the folder holds those of other weights, another processor or another precision.
        """
        claimed = made_by(model, processor)
        if self.model and self.model != claimed:
            kept, new = self.model["dtype"], claimed["dtype"]
            same = "" if kept == new else f" or of this one in {kept} (now {new}: try --dtype {kept}),"
            raise ValueError(
                f"{self.folder} holds embeddings of another model or processor,{same} which must not be mixed: choose "
                "another folder, or delete this one"
            )
        self.model = claimed
        return claimed

    def fetch(
        self,
        name: str,
        keys: Sequence[Key],
        encode: Callable[[list[int]], Tensor] | None = None,
        former_name: str | None = None,
        contents: Sequence[str] | None = None,
    ) -> Tensor:
        """Return embeddings in the order of the keys; what is missing is encoded and added.

        Under several processes all must call this with the same keys; the main one writes.

        Args:
            name: name of the file: the data set, and what is embedded.
            keys: keys of the rows to return; repeated ones are encoded once.
            encode: takes positions in `keys`, returns float32 `(positions, d)`; None to take only what is kept.
            contents: digest of what each key names, such as the image of an id: rows that were kept of other content
                are encoded again. None to take them as they are.
            former_name: name under which an earlier version kept these embeddings; read where there is none of `name`.

        Returns:
            float32 `(keys, d)`.

        Raises:
            ValueError: if something is missing and there is no `encode`, or processes see different folders.
        """
        file, former = (self.folder / f"{quote(n, safe='')}.safetensors" for n in (name, former_name or name))
        written = file if file.exists() else former
        kept, embeds = read_rows(written) if written.exists() else ([], torch.empty(0))
        content_of: dict[Key, str | None] = dict(_read_contents(written)) if written.exists() else {}
        if contents is not None:
            now = dict(zip(keys, contents, strict=True))
            rows = [row for row, key in enumerate(kept) if now.get(key, content_of.get(key)) == content_of.get(key)]
            kept, embeds = [kept[row] for row in rows], embeds[rows]
            content_of |= now
        row_of = {key: row for row, key in enumerate(kept)}
        first_position = {key: position for position, key in reversed(list(enumerate(keys))) if key not in row_of}
        missing = sorted(first_position.values())
        if missing and encode is None:
            names = [keys[position] for position in missing[:3]]
            raise ValueError(
                f"{file} lacks {len(missing)} of {len(set(keys))} embeddings, first: {names}; "
                "pass the model and processor that made the others, to have them added"
            )
        if len(set(gather_object([len(missing)]))) > 1:
            raise ValueError(f"processes see different files in {self.folder}; use a folder that they share")
        state = PartialState()
        for start in range(0, len(missing), SAVE_EVERY):
            positions = missing[start : start + SAVE_EVERY]
            embeds = torch.cat([embeds, encode(positions)])  # type: ignore[misc]  # not None
            row_of |= {keys[position]: row for row, position in enumerate(positions, len(row_of))}
            if state.is_main_process:
                self._write(file, list(row_of), embeds, [content_of.get(key) for key in row_of])
            state.wait_for_everyone()
        return embeds[[row_of[key] for key in keys]]

    def _write(self, file: Path, keys: list[Key], embeds: Tensor, contents: list[str | None]) -> None:
        if self.model is None:
            raise ValueError("the model of these embeddings is unknown: call claim(model, processor) first")
        with locked(self.folder):  # two runs over one dataset may write the same file
            write_rows(file, keys, embeds, {**self.model, "contents": json.dumps(contents)})


def write_rows(file: Path, keys: Sequence[Key], embeds: Tensor, model: dict[str, str]) -> None:
    """Write embeddings, their keys and their provenance ([`made_by`])."""
    with whole(file) as partial:
        save_file({"embeddings": embeds}, partial, {**model, "keys": json.dumps(keys)})


def read_rows(file: Path) -> tuple[list[Key], Tensor]:
    """Read the keys of all rows, and the rows float32 `(keys, d)`, a view of the file."""
    with safe_open(file, framework="pt") as opened:
        return list(map(tuple, json.loads(opened.metadata()["keys"]))), opened.get_tensor("embeddings")


def _read_contents(file: Path) -> Iterator[tuple[Key, str | None]]:
    """Yield the key of each row and the digest of what it named, None where an earlier version kept none."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    keys = list(map(tuple, json.loads(metadata["keys"])))
    return zip(keys, json.loads(metadata.get("contents", "null")) or [None] * len(keys), strict=True)


def made_by(model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> dict[str, str]:
    """Return the provenance of embeddings: `fingerprint` of weights, config and preprocessing, and `dtype`."""
    settings = image_settings(processor) + text_settings(processor) + own_settings(model)
    return {"fingerprint": fingerprint([model], model, settings), "dtype": dtype_of(model)}


def images_made_by(model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> dict[str, str]:
    """Return the provenance of embeddings of images alone, which any model on the same image encoder shares.

    Beside `fingerprint` ([`image_fingerprint`]) and `dtype`, `covers` tells it from that of a whole model.
    """
    return {"fingerprint": image_fingerprint(model, processor), "dtype": dtype_of(model), "covers": "images"}


def read_provenance(folder: Path) -> dict[Path, dict[str, str]]:
    """Read the provenance of every file of embeddings in a folder.

    Raises:
        ValueError: if a file cannot be read.
    """
    return {file: _read_header(file) for file in sorted(folder.glob("*.safetensors"))}


def dtype_of(model: ComposedRetrievalModel) -> str:
    """Return the dtype that the model computes in: `"float32"`, `"bfloat16"` (also under autocast), ..."""
    weight = next(model.parameters())
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return str(dtype).removeprefix("torch.")


def _read_header(file: Path) -> dict[str, str]:
    """Read the provenance of a file's embeddings."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            others = {name: metadata[name] for name in ("covers", "int8") if name in metadata}
            return {name: metadata[name] for name in ("fingerprint", "dtype")} | others
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged or was not written by pvlf_hf ({error}): delete it, its part is encoded again"
        ) from error


__all__ = ["EmbeddingStore", "images_made_by", "made_by", "read_provenance"]
