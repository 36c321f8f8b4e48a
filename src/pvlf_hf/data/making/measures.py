"""Measures a set of triplets by its texts and ids: repetition, grammar, overlap of captions, false negatives."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import expm1
from pathlib import Path
from typing import Any

from ..tables import iterate_table
from .screening import Row
from .vocabulary import FUNCTION, Vocabulary

BATCHES = (64, 256, 1024)
"""Batch sizes for which the probability of a repetition is stated."""

COLUMNS = ("reference", "caption", "target")

OPTIONAL = ("target_id", "key", "kind", "source", "reference_caption", "target_caption", "score_text", "score_pair")

PUBLISHED = {
    # columns of published files: ours
    "Laion-CIR": {
        "ref_image_id": "reference",
        "relative_cap": "caption",
        "tgt_image_id": "target",
        "tgt_cap": "target_caption",
    },
    "LaSCo": {"query-image": "reference", "query-text": "caption", "target-image": "target"},
    "CIRR": {"reference": "reference", "caption": "caption", "target_hard": "target"},
}


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file of triplets, ours, a user's or a published one.

    Args:
        file: CSV, JSON Lines or Parquet with the columns `reference`, `caption` and `target`; or the JSON of
            Laion-CIR, LaSCo or CIRR as published.

    Raises:
        ValueError: if it is neither; names the columns that it has.
    """
    if file.suffix.lower() == ".json" and file.is_file():
        yield from _published_rows(file)
        return
    for columns in iterate_table(file, COLUMNS, OPTIONAL):
        for cells in zip(*columns.values(), strict=True):
            yield {name: cell for name, cell in zip(columns, cells, strict=True) if cell or name in COLUMNS}


def _published_rows(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: it is not JSON ({error})") from error
    if isinstance(content, dict):  # Laion-CIR of a language model: by reference
        content = [{"ref_image_id": key, **record} for key, record in content.items() if isinstance(record, dict)]
    first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
    if {*COLUMNS} <= first.keys():
        names = {name: name for name in (*COLUMNS, *OPTIONAL)}
    else:
        names = next((one for one in PUBLISHED.values() if {*list(one)[:3]} <= first.keys()), {})
    if not names:
        raise ValueError(
            f"{file}: the rows have the columns {list(first)}, but triplets have {list(COLUMNS)}, or those of "
            f"{', '.join(PUBLISHED)} as published: rename the columns"
        )
    for number, record in enumerate(content):
        try:
            row = {ours: _cell(record[theirs]) for theirs, ours in names.items() if theirs in record}
        except TypeError as error:
            raise ValueError(f"{file}: data row {number} (counted from 0) is {record!r:.80}, no object") from error
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"{file}: data row {number} (counted from 0) lacks {missing}")
        yield row


def _cell(value: Any) -> str:
    return str(value[-1] if isinstance(value, list) and value else value)  # LaSCo: [id, path]


def measure(rows: Iterable[Row], vocabulary: Vocabulary) -> dict[str, Any]:
    """Measure a set of triplets.

    Args:
        rows: with `reference`, `caption` and `target`, and what else is known.
        vocabulary: word list of the captions' language.

    Returns:
        `rows`; `kinds`, rows by kind; `sources`; `captions`, `references`, `targets`, `pairs`, each with `distinct`,
        and `most_used`; `length`, words of a caption; `repeated_in_batch`, the probability that a batch holds one
        caption, target or key twice; `faults`, shares of captions with a fault; `overlap`, the share of the target
        caption's content words that the relative caption names; `cycle`, precision and recall of the relative
        caption's words among those that only the target's caption has; `scores`, by kind.
    """
    tally = _Tally(vocabulary)
    for row in rows:
        tally.add(row)
    return tally.result()


class _Tally:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.content_words = lru_cache(2**16)(partial(content_words, vocabulary=vocabulary))
        names = ("kinds", "sources", "caption", "reference", "target", "key", "pairs", "faults", "words")
        self.counts: dict[str, Counter[Any]] = {name: Counter() for name in names}
        self.rows = 0
        self.sums: dict[str, float] = defaultdict(float)
        self.scores: dict[str, list[float]] = {}

    def add(self, row: Row) -> None:
        self.rows += 1
        caption = row["caption"]
        words = caption.split()
        self.counts["kinds"][row.get("kind") or "not stated"] += 1
        self.counts["sources"][row.get("source") or "not stated"] += 1
        self.counts["words"][len(words)] += 1
        self.counts["caption"][caption] += 1
        self.counts["reference"][row["reference"]] += 1
        self.counts["target"][row.get("target_id") or row["target"]] += 1
        self.counts["pairs"][row["reference"], row["target"]] += 1
        if row.get("key"):
            self.counts["key"][row["key"]] += 1
        for fault in faults_of(caption, self.vocabulary):
            self.counts["faults"][fault] += 1
        if row["reference"] == row["target"]:
            self.counts["faults"]["reference is the target"] += 1
        if row.get("target_caption"):
            self._compare(row)
        if row.get("score_text") not in (None, ""):
            self.scores.setdefault(row.get("kind") or "not stated", []).append(float(row["score_text"]))

    def _compare(self, row: Row) -> None:
        edit, target = (self.content_words(row[name]) for name in ("caption", "target_caption"))
        self.sums["compared"] += 1
        self.sums["overlap"] += len(edit & target) / max(len(target), 1)
        if row.get("reference_caption"):
            only = target - self.content_words(row["reference_caption"])
            self.sums["with new words"] += bool(only)
            if only:
                self.sums["precision"] += len(edit & only) / max(len(edit), 1)
                self.sums["recall"] += len(edit & only) / len(only)

    def result(self) -> dict[str, Any]:
        counts, rows = self.counts, self.rows
        lengths = counts["words"]
        result: dict[str, Any] = {
            "rows": rows,
            "kinds": _ordered(counts["kinds"]),
            "sources": _ordered(counts["sources"]),
        }
        if not rows:
            return result
        for name in ("caption", "reference", "target"):
            result[f"{name}s"] = {"distinct": len(counts[name]), "most_used": dict(counts[name].most_common(3))}
        result["pairs"] = {"distinct": len(counts["pairs"])}
        mean = sum(length * number for length, number in lengths.items()) / rows
        result["length"] = {"least": min(lengths), "mean": mean, "most": max(lengths)}
        repeated = [name for name in ("caption", "target", "key") if counts[name]]
        result["repeated_in_batch"] = {
            name: {str(size): repeated_in_batch(counts[name].values(), size) for size in BATCHES} for name in repeated
        }
        result["faults"] = {fault: number / rows for fault, number in _ordered(counts["faults"]).items()}
        if compared := self.sums["compared"]:
            result["overlap"] = self.sums["overlap"] / compared
        if number := self.sums["with new words"]:
            result["cycle"] = {name: self.sums[name] / number for name in ("precision", "recall")}
        result["scores"] = {kind: _summary(values) for kind, values in sorted(self.scores.items())}
        return result


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "rows": len(ordered),
        "mean": sum(ordered) / len(ordered),
        "median": ordered[len(ordered) // 2],
        "share_negative": sum(value <= 0 for value in ordered) / len(ordered),
    }


def repeated_in_batch(uses: Iterable[int], batch_size: int) -> float:
    """Return the probability that a batch of random rows holds a value twice (birthday approximation)."""
    uses = list(uses)
    rows = sum(uses)
    pairs = sum(number * (number - 1) for number in uses) / max(rows * (rows - 1), 1)
    return -expm1(-batch_size * (batch_size - 1) / 2 * pairs)


def content_words(text: str, vocabulary: Vocabulary) -> set[str]:
    """Return the words of a text that are no function words, as they are compared."""
    caption = vocabulary.read(text)
    return {word for word, letter in zip(caption.words, caption.classes, strict=True) if letter != FUNCTION}


_DOUBLED = re.compile(r"\b(\w+) \1\b", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the) (?:a|an|the)\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(an?) ([A-Za-z][\w'-]*)")
_ONE = re.compile(r"\bone ([a-z]+)\b")
_NOT_AFTER_ONE = {"less", "more", "plus", "minus", "does", "is", "was", "has"}


def faults_of(caption: str, vocabulary: Vocabulary) -> list[str]:
    """Return what is wrong with a relative caption: grammar (in English), leaked names of kinds, emptiness."""
    words = [word.strip(".,:;-").lower() for word in caption.split()]
    faults = [] if words else ["empty"]
    if vocabulary.leaks.intersection(words):
        faults.append("names its kind")
    if vocabulary.meta.intersection(words):
        faults.append("speaks of the image")
    if _DOUBLED.search(caption):
        faults.append("a word twice in a row")
    if vocabulary.language != "en":
        return faults
    grammar = vocabulary.grammar
    if _ARTICLES.search(caption):
        faults.append("two articles")
    if any(grammar.with_article(f"{noun} thing").split()[0] != article for article, noun in _ARTICLE.findall(caption)):
        faults.append("a for an, or an for a")
    if any(
        grammar.singular(noun) != noun or noun in ("men", "women", "people", "children")
        for noun in _ONE.findall(caption)
        if noun not in _NOT_AFTER_ONE
    ):
        faults.append("one with a plural")
    return faults


__all__ = ["COLUMNS", "content_words", "faults_of", "measure", "read_rows", "repeated_in_batch"]
