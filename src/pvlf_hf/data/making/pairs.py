"""Pairs captions that differ in one slot, or in two: CoVR's rule, in two passes over the disk.

The first pass keys every caption by itself with a slot blanked: a word, a noun of several words, the last phrase, or
two words. The second pass sorts the keys, part by part; captions with equal keys and different fillers are pairs. All
that is kept of a caption is on the disk, so that memory does not grow with the table.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ...atomic_files import whole
from ...digests import id_number
from ..tables import iterate_table
from .vocabulary import ATTRIBUTE, FUNCTION, NOUN, VERB, Caption, Vocabulary

ROWS_OF_BLOCK = 50_000
"""Captions that are keyed at once (our choice); an interrupted run resumes behind the last full block."""

RECORDS_OF_PART = 4_000_000
"""Keys that are sorted at once (our choice): 64 MB."""

SLOTS, TWO_SLOTS = 8, 4
"""Words of a caption that are blanked, and of these the ones that are blanked two at a time (our choice)."""

MOST_CAPTIONS_OF_KEY, PAIRS_OF_KEY, NEGATIVES = 500, 20, 3
"""Captions beyond which a key is dropped, pairs that one gives, and further negatives of a pair (our choice)."""

RECORD = np.dtype([("key", "<i8"), ("row", "<u4"), ("filler", "<u4")])

BLANK, END = "_", "_end"


class Pair(NamedTuple):
    """Rows of the table that make a triplet.

    Args:
        reference: row of the reference.
        target: row of the target.
        key: number of what both captions share, the filler blanked; None where that is not known.
        negatives: rows that share the key, but not the target's filler.
        source: what found the pair: `"caption"`, or a miner.
    """

    reference: int
    target: int
    key: int | None
    negatives: tuple[int, ...] = ()
    source: str = "caption"


class CaptionIndex:
    """Captions and keys of a table, in a folder on the disk.

    Args:
        folder: the folder that [`index_captions`] filled.

    Attributes:
        rejected: number of captions that cannot be used, by reason.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = [json.loads(file.read_text()) for file in sorted(folder.glob("block-*.json"))]
        self.starts = np.cumsum([0, *(fact["rows"] for fact in facts)])
        self.rejected = sum((Counter(fact["rejected"]) for fact in facts), Counter())
        self._offsets = [np.load(folder / f"offsets-{n:05}.npy", mmap_mode="r") for n in range(len(facts))]
        self._files = [(folder / f"rows-{n:05}.jsonl").open("rb") for n in range(len(facts))]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> dict[str, str]:
        """Return a row: `image`, `caption` and the kept columns."""
        block = int(np.searchsorted(self.starts, row, "right")) - 1
        self._files[block].seek(self._offsets[block][row - self.starts[block]])
        return json.loads(self._files[block].readline())

    def parts(self) -> int:
        """Return into how many parts the keys are divided."""
        size = sum(file.stat().st_size for file in self.folder.glob("keys-*.npy"))
        return 1 + size // (RECORDS_OF_PART * RECORD.itemsize)

    def records(self, part: int) -> np.ndarray:
        """Return the records of a part, sorted by key, then by row."""
        step = 2**64 // self.parts()
        low, high = -(2**63) + part * step, -(2**63) + (part + 1) * step
        found = []
        for file in sorted(self.folder.glob("keys-*.npy")):
            block = np.load(file, mmap_mode="r")
            start = int(np.searchsorted(block["key"], np.int64(low)))
            end = len(block) if part == self.parts() - 1 else int(np.searchsorted(block["key"], np.int64(high)))
            found.append(block[start:end])
        records = np.concatenate(found) if found else np.empty(0, RECORD)
        return records[np.argsort(records["key"], kind="stable")]

    def close(self) -> None:
        """Close the files of the rows."""
        for file in self._files:
            file.close()


def index_captions(
    table: Path,
    folder: Path,
    vocabulary: Vocabulary,
    seed: int = 0,
    kept_columns: Sequence[str] = (),
    group: str | None = None,
    progress: bool = True,
) -> CaptionIndex:
    """Key the captions of a table: the first pass. A repeated call resumes.

    Args:
        table: CSV, JSON Lines or Parquet with the columns `image` and `caption`.
        folder: the folder to fill; it belongs to this table, vocabulary and seed.
        vocabulary: reads the captions.
        seed: decides the order of the keys, and so which pairs are taken where there are too many.
        kept_columns: columns that are kept where the table has them.
        group: column of which only rows of one value make pairs; kept, too.
        progress: show a progress bar.

    Raises:
        ValueError: if the table cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    needed = ("image", "caption") if group is None else ("image", "caption", group)
    blocks = iterate_table(table, needed, [name for name in kept_columns if name != group], ROWS_OF_BLOCK)
    with tqdm(desc="reading captions", unit="caption", disable=not progress) as bar:
        for number, columns in enumerate(blocks):
            rows = len(columns["image"])
            if not (folder / f"block-{number:05}.json").is_file():
                _write_block(folder, number, columns, start, vocabulary, seed, group)
            start += rows
            bar.update(rows)
    return CaptionIndex(folder)


def _write_block(
    folder: Path,
    number: int,
    columns: dict[str, list[str]],
    start: int,
    vocabulary: Vocabulary,
    seed: int,
    group: str | None,
) -> None:
    """Write the rows, their offsets and their keys; last the facts, which mark a whole block."""
    rejected: Counter[str] = Counter()
    records: list[tuple[int, int, int]] = []
    offsets, lines, position = [], [], 0
    names = list(columns)
    for at, cells in enumerate(zip(*columns.values(), strict=True)):
        row = {name: cell for name, cell in zip(names, cells, strict=True) if cell or name in ("image", "caption")}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        offsets.append(position)
        lines.append(line)
        position += len(line)
        problem = vocabulary.problem(row["caption"])
        if not row["image"].strip():
            problem = "no image named"
        if problem:
            rejected[problem] += 1
            continue
        salt = f"{seed} {row.get(group, '')}" if group else str(seed)
        records += [(key, start + at, filler) for key, filler in keys_of(vocabulary.read(row["caption"]), salt)]
    table = np.array(records, RECORD)
    with whole(folder / f"rows-{number:05}.jsonl") as file:
        file.write_bytes(b"".join(lines))
    for name, array in (("offsets", np.array(offsets, "<u8")), ("keys", table[np.argsort(table["key"])])):
        with whole(folder / f"{name}-{number:05}.npy") as file, file.open("wb") as stream:
            np.save(stream, array)
    with whole(folder / f"block-{number:05}.json") as file:
        file.write_text(json.dumps({"rows": len(offsets), "rejected": rejected}))


def keys_of(caption: Caption, salt: str = "0") -> Iterator[tuple[int, int]]:
    """Yield the keys of a caption and the numbers of their fillers.

    A filler's number has two halves. They differ for different fillers; those of two blanked words are one word's
    each, so that two captions pair up only if both words differ.
    """
    words, classes = caption.words, caption.classes
    content = [at for at, letter in enumerate(classes) if letter != FUNCTION]
    slots = content[:SLOTS]
    if len(content) > 1:
        for at in slots:
            yield _key(salt, (*words[:at], BLANK, *words[at + 1 :])), _number(words[at])
        for start, end in noun_runs(classes):
            if end - start > 1 and end - start < len(content):
                yield _key(salt, (*words[:start], BLANK, *words[end:])), _number(" ".join(words[start:end]))
    yield _key(salt, (*words, END)), 0
    start = last_phrase(classes)
    if start and any(at < start for at in content):
        yield _key(salt, (*words[:start], END)), _number(" ".join(words[start:]))
    if len(content) > 2:
        for a, b in combinations(slots[:TWO_SLOTS], 2):
            if all(classes[at] == ATTRIBUTE for at in content if at not in (a, b)):
                continue  # nothing that both images show
            rest = (*words[:a], BLANK, *words[a + 1 : b], BLANK, *words[b + 1 :])
            yield _key(salt, rest, two=True), (_number(words[a]) & 0xFFFF) | (_number(words[b]) & 0xFFFF0000)
    if caption.articles[0] == "a" and classes[0] not in (FUNCTION, VERB):  # "a dog" beside "two dogs"
        yield _key(salt, (BLANK, *words)), _number("a")


def noun_runs(classes: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of runs of nouns."""
    start = 0
    for at, letter in enumerate(classes + " "):
        if letter != NOUN:
            if at > start:
                yield start, at
            start = at + 1


def last_phrase(classes: str) -> int:
    """Return where the last phrase of a caption starts: its function word, or the word after a verb."""
    at = len(classes) - 1
    if at < 0 or classes[at] in (FUNCTION, VERB):
        return 0
    while at > 0 and classes[at - 1] not in (FUNCTION, VERB):
        at -= 1
    return at - 1 if at > 0 and classes[at - 1] == FUNCTION else at


def _key(salt: str, words: tuple[str, ...], two: bool = False) -> int:
    """Return the number of a key: negative for one slot, so that these come first, positive for two."""
    number = id_number(f"{salt} {' '.join(words)}") & (2**63 - 1)
    return number if two else number - 2**63


@lru_cache(2**16)
def _number(filler: str) -> int:
    """Return 32 bits of a filler; its halves are independent."""
    return id_number(filler) & 0xFFFFFFFF


def find_pairs(index: CaptionIndex, part: int | None = None) -> Iterator[Pair]:
    """Pair the captions of a table: the second pass.

    Args:
        index: from [`index_captions`].
        part: one of `index.parts()`; None for all.

    Yields:
        Pairs in both directions, key by key, at most `PAIRS_OF_KEY` of a key. Keys that more than
        `MOST_CAPTIONS_OF_KEY` captions share are dropped: they say too little.
    """
    for number in range(index.parts()) if part is None else (part,):
        records = index.records(number)
        changes = records["key"][1:] != records["key"][:-1]
        starts = np.flatnonzero(np.r_[len(records) > 0, changes])
        sizes = np.diff(np.r_[starts, len(records)])
        for at in np.flatnonzero((sizes > 1) & (sizes <= MOST_CAPTIONS_OF_KEY)):
            yield from _pairs_of_key(records[starts[at] : starts[at] + sizes[at]])


def _pairs_of_key(group: np.ndarray) -> Iterator[Pair]:
    fillers = group["filler"].tolist()
    if len(set(fillers)) < 2:
        return
    key = int(group["key"][0])
    mixed = (group["row"].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15 ^ (key & 0xFFFFFFFF))
    order = np.argsort(mixed ^ (mixed >> np.uint64(29)), kind="stable").tolist()
    rows = group["row"].tolist()
    members = [(rows[at], fillers[at]) for at in order]
    for number, (a, b) in enumerate(_different(members)):
        if number == PAIRS_OF_KEY:
            return
        for reference, target in ((a, b), (b, a)):
            others = (row for row, filler in members if filler != target[1] and row != reference[0])
            yield Pair(
                reference[0], target[0], key, tuple(row for row, _ in zip(others, range(NEGATIVES), strict=False))
            )


def _different(members: list[tuple[int, int]]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of members whose fillers differ in both halves, near ones in the list first."""
    for step in range(1, len(members)):
        for a, b in zip(members, members[step:], strict=False):
            changed = a[1] ^ b[1]
            if changed & 0xFFFF and changed >> 16:
                yield a, b


__all__ = ["CaptionIndex", "Pair", "find_pairs", "index_captions", "keys_of", "last_phrase", "noun_runs"]
