"""Screens triplets: no repetition, no near-duplicates, no leakage; and balances the kinds of edits.

Every row that is left out has a reason. Counters grow with the rows that are kept, not with those that are read.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Limits of a set of triplets (our choice). None switches one off.

    Args:
        target_uses: triplets with one target.
        reference_uses: triplets with one reference.
        caption_uses: triplets with one relative caption.
        kind_share: largest share of one kind of edit, of the triplets that are requested or else found.
        words: least and largest number of words of a relative caption.
    """

    target_uses: int | None = 5
    reference_uses: int | None = 5
    caption_uses: int | None = 3
    kind_share: float | None = 0.25
    words: tuple[int, int] = (2, 25)

    def __post_init__(self) -> None:
        for name in ("target_uses", "reference_uses", "caption_uses"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} would keep no triplet: set at least 1, or None for no limit")
        if self.kind_share is not None and not 0 < self.kind_share <= 1:
            raise ValueError(f"kind_share={self.kind_share} must be above 0 and at most 1, or None for no limit")


class Screen:
    """Decides row by row whether a triplet is kept.

    Args:
        limits: the limits.
        image_problem: says what is wrong with two images, see [`ImageChecks`]; None checks none.
        leaks: words that a relative caption must not hold, such as the names of kinds.
    """

    def __init__(
        self,
        limits: Limits,
        image_problem: Callable[[str, str], str | None] | None = None,
        leaks: Iterable[str] = (),
    ) -> None:
        self.limits, self.image_problem, self.leaks = limits, image_problem, frozenset(leaks)
        self._uses: dict[str, Counter[str]] = {"target": Counter(), "reference": Counter(), "caption": Counter()}
        self._most = {name: getattr(limits, f"{name}_uses") for name in self._uses}
        self._pairs: set[tuple[str, str]] = set()

    def used_up(self, reference: str, target: str) -> str | None:
        """Return why two images, by name, cannot make a further triplet, or None."""
        if (reference, "\0" + target) in self._pairs:
            return "reference and target are repeated"
        return self._overused({"reference": reference, "target": target})

    def _overused(self, names: Mapping[str, str]) -> str | None:
        for name, value in names.items():
            most = self._most[name]
            if most is not None and self._uses[name][value] >= most:
                return f"{name} used {most} times already"
        return None

    def reason(self, row: Row) -> str | None:
        """Return why a row is left out; None if it is kept, which counts its use of images and caption."""
        reason = self._cheap_reason(row)
        if reason is None and self.image_problem is not None:
            reason = self.image_problem(row["reference"], row["target"])
        if reason is not None:
            return reason
        self._pairs |= {(row["reference"], row["caption"]), (row["reference"], "\0" + row["target"])}
        for name, uses in self._uses.items():
            uses[row[name]] += 1
        return None

    def _cheap_reason(self, row: Row) -> str | None:
        caption = row["caption"]
        if row["reference"] == row["target"]:
            return "reference is the target"
        if row.get("reference_caption") and row["reference_caption"] == row.get("target_caption"):
            return "both captions are equal"
        words = caption.split()
        if not self.limits.words[0] <= len(words) <= self.limits.words[1]:
            return f"relative caption of fewer than {self.limits.words[0]} or more than {self.limits.words[1]} words"
        if self.leaks.intersection(word.strip(".,:-").lower() for word in words):
            return "relative caption names its kind"
        if (row["reference"], caption) in self._pairs:
            return "reference and caption are repeated"
        return self.used_up(row["reference"], row["target"]) or self._overused({"caption": caption})


def allowances(found: Mapping[str, int], count: int | None, limits: Limits) -> dict[str, int]:
    """Return how many rows of each kind are kept.

    No kind takes more than its share of the requested number (without one, of the number found), and where there are
    more rows than requested, kinds with fewer rows keep theirs.

    Args:
        found: rows by kind.
        count: requested number of rows; None for all.
        limits: the limits.
    """
    total = sum(found.values())
    wanted = total if count is None else min(count, total)
    share = limits.kind_share or 1.0
    most = max(1, round(wanted * max(share, 1 / max(len(found), 1))))
    kept = {kind: min(number, most) for kind, number in found.items()}
    left, room = sorted(kept, key=lambda kind: (kept[kind], kind)), wanted
    result = {}
    for at, kind in enumerate(left):
        result[kind] = min(kept[kind], max(0, round(room / (len(left) - at))))
        room -= result[kind]
    return result


def balanced(rows: Iterable[Row], allowed: Mapping[str, int]) -> Iterator[tuple[Row, str | None]]:
    """Yield the rows with None, or with the reason where their kind has its share already.

    Args:
        rows: screened rows.
        allowed: see [`allowances`].
    """
    left = dict(allowed)
    for row in rows:
        reason = None
        if left[row["kind"]] < 1:
            reason = f"kind {row['kind']} has its share"
        else:
            left[row["kind"]] -= 1
        yield row, reason


class TargetIds:
    """Joins targets that are the same thing: equal images, and images whose captions are equal.

    The smallest name of an image that was joined is the id of all, so that a training loss never takes one for a
    negative of the other.
    """

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def _root(self, name: str) -> str:
        path = []
        while (parent := self._parent.setdefault(name, name)) != name:
            path.append(name)
            name = parent
        for one in path:
            self._parent[one] = name
        return name

    def join(self, image: str, words: int) -> None:
        """Join an image with all images whose captions have the same words ([`Caption.words`]), given as a number."""
        a, b = self._root(image), self._root(f"\0{words}")
        if a != b:  # captions sort before names, and a name must become the root
            first, second = sorted((a, b), key=lambda name: (name.startswith("\0"), name))
            self._parent[second] = first

    def id_of(self, image: str) -> str:
        """Return the id of an image."""
        return self._root(image)


__all__ = ["Limits", "Screen", "TargetIds", "allowances", "balanced"]
