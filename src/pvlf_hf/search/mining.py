"""Mines triplets with a dual encoder: pairs of near images or captions, targets of edited captions, and verification.

This is level 1 of `make_triplets`. All images and captions are embedded once and kept; neighbours come from the
gallery's own index. A model that is to be trained on the triplets should not be the only one that finds them, because
it then learns what it knows: captions alone find pairs, too.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..data.image_files import escapes_folder, unreadable
from ..data.making.edits import pick
from ..data.making.pairs import CaptionIndex, Pair
from ..data.making.pipeline import Judged
from ..data.making.screening import Row
from ..data.making.vocabulary import ATTRIBUTE, NUMBER, Vocabulary
from ..digests import id_number
from ..embeddings.embedding_store import EmbeddingStore
from ..embeddings.encoding import encode_gallery, encode_queries
from ..embeddings.fingerprints import image_digests
from ..evaluation.ranking import target_ranks
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .nearest import nearest
from .vector_index import LocalIndex, VectorIndex, check_index, make_index

NEIGHBOURS, FIRST_RANK = 50, 2
"""Neighbours of an image that are looked at, and the first ranks that are passed over: too alike (our choice)."""

CANDIDATES = 200
"""Rows of each index among which the target of an edited caption is looked for (our choice)."""

ALIKE = 0.999
"""Quantile of the neighbours' cosines above which two images are near-duplicates (our choice)."""

PAIRS_OF_IMAGE = 2
"""Pairs of an image that each miner gives (our choice)."""

EXEMPT = ("removal",)
"""Kinds that verification does not judge: text encoders barely see negation."""

RANDOM_PAIRS = 2000
"""Random pairs of images whose median cosine says that two images have nothing in common (our choice)."""


class TripletMiner:
    """Mines and verifies triplets with a dual encoder, for `make_triplets(miner=...)`.

    Args:
        model: the dual encoder, such as a [`TrainingFreeModel`].
        processor: the model's processor.
        image_folder: folder of the images.
        store: folder that keeps the embeddings, so that an interrupted run resumes; None keeps none.
        batch_size: images or captions encoded at once.
        index: of the gallery, `"exact"` or `"faiss"`.
        progress: show progress bars.

    Attributes:
        settings: what identifies the miner in the report.
    """

    def __init__(
        self,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        image_folder: str | Path,
        store: str | Path | None = None,
        batch_size: int = 64,
        index: LocalIndex = "exact",
        progress: bool = True,
    ) -> None:
        check_index(index)
        self.model, self.processor, self.folder = model, processor, Path(image_folder)
        self.batch_size, self.index, self.progress = batch_size, index, progress
        self.store = None if store is None else EmbeddingStore(store)
        provenance = None if self.store is None else self.store.claim(model, processor)
        self.settings: dict[str, Any] = {"model": type(model).__name__, "index": index}
        if provenance is not None:
            self.settings["fingerprint"] = provenance["fingerprint"]
        self._known: dict[tuple[str, str], Tensor] = {}

    # ---- embeddings ----

    def images(self, names: list[str]) -> Tensor:
        """Embed images, by file name, each once: float32 `(names, d)`, L2-normalised."""
        files = {"image": [str(self.folder / name) for name in names]}
        data = Dataset.from_dict(files).cast_column("image", Image())

        def encode(rows: list[int]) -> Tensor:
            return encode_gallery(self.model, self.processor, data.select(rows), self.batch_size, self.progress)

        return self._fetch("images", names, encode, image_digests(data, "image") if self.store else None)

    def texts(self, texts: list[str]) -> Tensor:
        """Embed captions, each once: float32 `(texts, d)`, L2-normalised."""

        def encode(rows: list[int]) -> Tensor:
            data = Dataset.from_dict({"caption": [texts[row] for row in rows], "reference": [None] * len(rows)})
            return encode_queries(self.model, self.processor, data, "text", self.batch_size, self.progress)

        return self._fetch("captions", texts, encode)

    def _fetch(self, what: str, names: list[str], encode: Any, contents: list[str] | None = None) -> Tensor:
        if self.store is not None:
            return self.store.fetch(what, [(name,) for name in names], encode, contents=contents)
        first = {name: at for at, name in reversed(list(enumerate(names))) if (what, name) not in self._known}
        if rows := sorted(first.values()):
            self._known |= {(what, names[row]): one for row, one in zip(rows, encode(rows), strict=True)}
        return torch.stack([self._known[what, name] for name in names])

    # ---- pairs ----

    def pairs(self, index: CaptionIndex, vocabulary: Vocabulary, seed: int) -> Iterator[Pair]:
        """Yield pairs of near images, of near captions, and of captions edited to find another image.

        Args:
            index: the table.
            vocabulary: reads the captions.
            seed: decides which neighbours are taken.
        """
        rows = self._rows(index, vocabulary)
        if len(rows) < 2:
            return
        cells = [index[row] for row in rows]
        names, captions = [cell["image"] for cell in cells], [cell["caption"] for cell in cells]
        embeds = {"image": self.images(names), "text": self.texts(captions)}
        indexes = {source: (make_index(self.index, own), own) for source, own in embeds.items()}
        for source in indexes:
            for at, chosen, others in self._near(*indexes[source], names, source, seed):
                yield Pair(rows[at], rows[chosen], None, tuple(rows[other] for other in others), source)
        yield from self._retrieved(rows, captions, indexes, vocabulary, seed)

    def _rows(self, index: CaptionIndex, vocabulary: Vocabulary) -> list[int]:
        """Return the first usable row of each image that exists."""
        first: dict[str, int] = {}
        for row in range(len(index)):
            cells = index[row]
            if vocabulary.problem(cells["caption"]) is None and cells["image"].strip():
                first.setdefault(cells["image"], row)
        return [row for name, row in first.items() if self._is_readable(name)]

    def _is_readable(self, name: str) -> bool:
        return not escapes_folder(self.folder, name) and unreadable(self.folder / name) is None

    def _near(
        self, index: VectorIndex, embeds: Tensor, names: list[str], source: str, seed: int
    ) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield row, neighbour, and next neighbours, of those that are neither too near nor too far."""
        found = [
            nearest(index, embeds, embed, NEIGHBOURS + 1)
            for embed in tqdm(embeds, f"neighbours by {source}", disable=not self.progress)
        ]
        cosines = torch.cat([scores[1:] for scores, _ in found])
        bound = torch.quantile(cosines[:1_000_000], ALIKE) if len(cosines) > 1000 else cosines.max() + 1
        for at, (scores, rows) in enumerate(found):
            near = [
                row for row, score in zip(rows.tolist(), scores.tolist(), strict=True) if row != at and score < bound
            ]
            usable = near[FIRST_RANK:] or near
            order = sorted(usable, key=lambda row: id_number(f"{seed}/{source}/{names[at]}/{names[row]}"))
            for chosen in order[:PAIRS_OF_IMAGE]:
                yield at, chosen, tuple(row for row in near if row != chosen)[:3]

    def _retrieved(
        self,
        rows: list[int],
        captions: list[str],
        indexes: dict[str, tuple[VectorIndex, Tensor]],
        vocabulary: Vocabulary,
        seed: int,
    ) -> Iterator[Pair]:
        """Yield pairs of a caption and the image that its edited caption finds, by captions and images together."""
        edited = list(edited_captions(captions, vocabulary, seed))
        if not edited:
            return
        texts = indexes["text"][1]
        queries = self.texts([text for _, text, _, _ in edited])
        retrieved = tqdm(queries, "targets of edited captions", disable=not self.progress)
        for (at, _, old, new), query in zip(edited, retrieved, strict=True):
            best = best_of_both(list(indexes.values()), query, without=at)
            words = vocabulary.read(captions[best]).words
            if new in words and old not in words and texts[best] @ query > texts[at] @ query:
                yield Pair(rows[at], rows[best], None, (), "edited")

    # ---- verification ----

    def verify(self, rows: Iterable[Row]) -> Judged:
        """Yield rows with their scores, and why a row is left out.

        `score_text` is how much nearer the target caption is to the target than to the reference, as cosine;
        `score_pair` is the cosine of both images. A row is left out if the first is not above 0, except for removals,
        or the second is not above the median of random pairs: then the reference says nothing of the target.
        """
        rows = list(rows)
        if not rows:
            return
        references, targets = (self.images([row[name] for row in rows]) for name in ("reference", "target"))
        captions = self.texts([row["target_caption"] for row in rows])
        score_text = ((targets - references) * captions).sum(dim=1).tolist()
        score_pair = (references * targets).sum(dim=1).tolist()
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randint(len(rows), (2, RANDOM_PAIRS), generator=generator)
        median = float((references[a] * targets[b]).sum(dim=1).median())
        for row, text, pair in zip(rows, score_text, score_pair, strict=True):
            reason = None
            if text <= 0 and row["kind"] not in EXEMPT:
                reason = "the target's caption is no truer of the target than of the reference"
            elif pair <= median:
                reason = "the images are no more alike than random ones"
            yield {**row, "score_text": round(text, 4), "score_pair": round(pair, 4)}, reason

    def modality(self, rows: Iterable[Row]) -> dict[str, dict[str, float]]:
        """Return the audit of LaSCo: R@10 of the target by the image alone, the text alone, and their sum.

        The gallery is every image of the rows, without the reference. A set for which one of the two finds the target
        nearly as often as both teaches to ignore the other.

        Returns:
            By kind, and for `"all"`: `rows`, `image`, `text` and `sum`.
        """
        rows = list(rows)
        names = list(dict.fromkeys(row[side] for row in rows for side in ("reference", "target")))
        row_of = {name: at for at, name in enumerate(names)}
        gallery = self.images(names)
        references, targets = (torch.tensor([row_of[row[s]] for row in rows]) for s in ("reference", "target"))
        captions = self.texts([row["caption"] for row in rows])
        queries = {"image": gallery[references], "text": captions}
        queries["sum"] = F.normalize(queries["image"] + queries["text"], dim=1)
        hits = {arm: target_ranks(one, gallery, targets, references) < 10 for arm, one in queries.items()}
        kinds = {"all": list(range(len(rows)))}
        for at, row in enumerate(rows):
            kinds.setdefault(row.get("kind") or "not stated", []).append(at)
        return {
            kind: {"rows": len(of), **{arm: float(hit[of].float().mean()) for arm, hit in hits.items()}}
            for kind, of in kinds.items()
        }


def best_of_both(indexes: list[tuple[VectorIndex, Tensor]], query: Tensor, without: int) -> int:
    """Return the row whose ranks in several indexes of the same rows have the least sum; the lower row of equal ones.

    A row that is not among the `CANDIDATES` of an index counts as the next one there.

    Args:
        indexes: each with its embeddings, float32 `(rows, d)`.
        query: embedding, float32 `(d,)`.
        without: row that is not to be returned.
    """
    ranks: defaultdict[int, int] = defaultdict(int)
    for index, embeds in indexes:
        found = nearest(index, embeds, query, CANDIDATES)[1].tolist()
        for rank, row in enumerate(found):
            ranks[row] += rank - len(found)
    ranks.pop(without, None)
    return min(ranks, key=lambda row: (ranks[row], row))


def edited_captions(captions: list[str], vocabulary: Vocabulary, seed: int) -> Iterator[tuple[int, str, str, str]]:
    """Yield captions in which one attribute or number is swapped for another of its class in the table.

    Yields:
        Position of the caption, the edited caption, and what was swapped for what.
    """
    read = [vocabulary.read(caption) for caption in captions]
    fillers: dict[str, Counter[str]] = defaultdict(Counter)

    def class_of(word: str, letter: str) -> str | None:
        return "number" if letter == NUMBER else vocabulary.attribute_of.get(word) if letter == ATTRIBUTE else None

    for caption in read:
        for word, letter in zip(caption.words, caption.classes, strict=True):
            if (kind := class_of(word, letter)) is not None:
                fillers[kind][word] += 1
    for at, caption in enumerate(read):
        slots = [i for i, letter in enumerate(caption.classes) if class_of(caption.words[i], letter) is not None]
        if not slots:
            continue
        slot = slots[id_number(f"{seed}/slot/{captions[at]}") % len(slots)]
        old = caption.words[slot]
        others = sorted(fillers[class_of(old, caption.classes[slot]) or ""].keys() - {old})
        if others:
            new = pick(others, f"{seed}/filler/{captions[at]}")
            spoken = [*caption.spoken[:slot], new, *caption.spoken[slot + 1 :]]
            yield at, " ".join(spoken), old, new


__all__ = ["TripletMiner", "best_of_both", "edited_captions"]
