"""Pairs captions that no key joins: they differ in one listed word, and their other words are much alike by TF-IDF.

A key joins captions that are equal but for a slot, so that "a red car on a street" meets no "blue car in the street
near trees". Here a listed word of a caption (a colour, a number, a person, a verb ...) is swapped for any other of its
class that the table has, and the captions that are closest to the edited one are looked for. They must have the same
other listed words in the same order, so that the swap is all that the relative caption has to say, and the new word in
place of the old one. How alike the remaining words are is the cosine of their TF-IDF by scikit-learn; no model.

Captions meet within their block of `ROWS_OF_BLOCK` rows, so that time grows with the table and memory does not. All
words and fillers of a block are tried at once, by one product of sparse matrices.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ...digests import id_number
from .edits import slots_of
from .pairs import BLANK, NEGATIVES, CaptionIndex, Pair
from .vocabulary import NOUN, Caption, Vocabulary

LEAST_COSINE = 0.6
"""Cosine of the words but the swapped ones from which two captions are taken for alike (our choice)."""

NEAR_OF_SLOT = 3
"""Pairs of a caption's slot: those of the closest captions (our choice)."""

MOST_CAPTIONS_OF_WORD = 500
"""Slots of one key beyond which a word that they share is not counted as shared (our choice): it says too little."""

SLOTS_AT_ONCE = 1000
"""Slots that are compared at once with all of their block (our choice): at most some tens of MB."""

SOURCE = "near captions"

TfIdf = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sparse matrix: values, columns, and where each row starts."""


def near_pairs(index: CaptionIndex, block: int, vocabulary: Vocabulary, group: str | None = None) -> Iterator[Pair]:
    """Pair the captions of a block of the table.

    Args:
        index: from [`index_captions`].
        block: one of `range(len(index.starts) - 1)`.
        vocabulary: reads the captions.
        group: column of which only rows of one value make pairs.

    Yields:
        Pairs, row by row, at most `NEAR_OF_SLOT` of a slot, the closest first. The negatives of a pair are further
        close captions with another filler than the target's.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if there is no such block.
    """
    blocks = len(index.starts) - 1
    if not 0 <= block < blocks:
        raise ValueError(f"block={block}: the table has {blocks} blocks of captions, counted from 0")
    rows, captions, salts = [], [], []
    for row in range(int(index.starts[block]), int(index.starts[block + 1])):
        cells = index[row]
        if vocabulary.problem(cells["caption"]) is None and cells["image"].strip():
            rows.append(row)
            captions.append(vocabulary.read(cells["caption"]))
            salts.append(cells.get(group, "") if group else "")
    for at, near in _near(captions, salts, vocabulary):
        for other, filler in near[:NEAR_OF_SLOT]:
            others = [rows[one] for one, its in near if its != filler][:NEGATIVES]
            yield Pair(rows[at], rows[other], None, tuple(others), SOURCE)


def _near(
    captions: Sequence[Caption], salts: Sequence[str], vocabulary: Vocabulary
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield a caption, and for one of its slots the close captions with their fillers, the closest first."""
    words = _words(captions)
    if words is None:
        return
    caption_of, keys, fillers, rests = [], [], [], []
    for at, (caption, salt) in enumerate(zip(captions, salts, strict=True)):
        for place, agree in slots_of(caption, vocabulary):
            caption_of.append(at)
            keys.append(id_number("\0".join((salt, *agree))))
            fillers.append(id_number(caption.words[place]))
            rests.append(id_number(" ".join((*caption.words[:place], BLANK, *caption.words[place + 1 :]))))
    of, filler, rest = np.array(caption_of, int), np.array(fillers, "<i8"), np.array(rests, "<i8")
    for slot, found, cosines in _products(words, of, np.unique(np.array(keys, "<i8"), return_inverse=True)[1]):
        # Of equal rests a key of a single slot makes the pair already.
        usable = (cosines >= LEAST_COSINE) & (filler[found] != filler[slot]) & (rest[found] != rest[slot])
        slot, found, cosines = slot[usable], found[usable], cosines[usable]
        order = np.lexsort((found, -cosines, slot))  # of equally close ones the first in the table
        slot, found = slot[order], found[order]
        starts = np.flatnonzero(np.r_[len(slot) > 0, slot[1:] != slot[:-1]])
        for start, end in zip(starts, np.r_[starts[1:], len(slot)], strict=False):  # the end alone, if there is none
            own = found[start:end]
            yield int(of[slot[start]]), list(zip(of[own].tolist(), filler[own].tolist(), strict=True))


def _words(captions: Sequence[Caption]) -> TfIdf | None:
    """Return the TF-IDF of the words that are not listed, L2-normalised; None if there are none."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError('pairs of near captions need scikit-learn: `pip install "pvlf-hf[triplets]"`') from error
    texts = [[word for word, letter in zip(one.words, one.classes, strict=True) if letter == NOUN] for one in captions]
    if not any(texts):
        return None
    matrix = TfidfVectorizer(analyzer=list).fit_transform(texts)
    return matrix.data, matrix.indices.astype(np.int64), matrix.indptr


def _products(words: TfIdf, of: np.ndarray, key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield slots, slots of the same key that share words with them, and their cosines, `(pairs,)` each.

    Args:
        words: of each caption.
        of: caption of each slot, `(slots,)`.
        key: number of each slot's key, `(slots,)`; only slots of equal keys are compared.
    """
    from scipy.sparse import csr_matrix

    data, columns, starts = words
    lengths = starts[of + 1] - starts[of]
    ends = np.cumsum(lengths)
    entries = np.arange(lengths.sum()) + np.repeat(starts[of] - (ends - lengths), lengths)
    # A word counts as another in each key, so that one product compares within all keys.
    pairs = np.repeat(key, lengths) * (columns.max() + 1) + columns[entries]
    features, number, shared = np.unique(pairs, return_inverse=True, return_counts=True)
    counted = (shared[number] > 1) & (shared[number] <= MOST_CAPTIONS_OF_WORD)
    matrix = csr_matrix(
        (data[entries][counted], (np.repeat(np.arange(len(of)), lengths)[counted], number[counted])),
        (len(of), len(features)),
    )
    other = matrix.T.tocsr()
    for start in range(0, len(of), SLOTS_AT_ONCE):
        product = (matrix[start : start + SLOTS_AT_ONCE] @ other).tocsr()
        slot = np.repeat(np.arange(start, start + product.shape[0]), np.diff(product.indptr))
        yield slot, product.indices, np.round(product.data, 9)  # whatever the order of the sum


__all__ = ["LEAST_COSINE", "MOST_CAPTIONS_OF_WORD", "NEAR_OF_SLOT", "SOURCE", "near_pairs"]
