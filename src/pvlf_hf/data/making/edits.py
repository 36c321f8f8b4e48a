"""Finds what changes between two captions, and writes it as a relative caption.

An [`Edit`] is one change or two. Its kind decides among the wordings of the word list; which of them is taken is drawn
by the ids of the triplet, so that it is the same on every machine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from ...digests import id_number
from .vocabulary import ATTRIBUTE, FUNCTION, NOUN, NUMBER, PERSON, VERB, Caption, Vocabulary

KINDS = (
    "attribute",
    "cardinality",
    "addition",
    "removal",
    "replacement",
    "action",
    "comparative",
    "conjunction",
    "direct",
)
"""Kinds of edits; direct addressing is the target's caption itself, and not made unless requested."""

ACCOMPANYING = frozenset({"with", "and", "mit", "und"})
"""Function words before what was added: "with a hat" is "add a hat"."""

SWAPPED = "_"
"""Stands for the word that is swapped; no word of a caption is equal to it."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Change:
    """One change: a span of the reference's caption in place of which the target's has another.

    Args:
        kind: one of `KINDS` but conjunction.
        wordings: set of wordings.
        old: span of words of the reference's caption; empty for an addition.
        new: span of words of the target's caption; empty for a removal.
        noun: span of the target's words that the changed word describes.
    """

    kind: str
    wordings: str
    old: Span
    new: Span
    noun: Span = (0, 0)


@dataclass(frozen=True)
class Edit:
    """Edit that leads from one caption to another.

    Args:
        reference: the reference's caption.
        target: the target's caption.
        changes: one change or two.
    """

    reference: Caption
    target: Caption
    changes: tuple[Change, ...]

    @property
    def kind(self) -> str:
        """Kind of the edit: that of its change, or `"conjunction"`."""
        return self.changes[0].kind if len(self.changes) == 1 else "conjunction"


def find_edit(reference: Caption, target: Caption, vocabulary: Vocabulary) -> Edit | None:
    """Return what changes between two captions; None if nothing does, or too much to say."""
    if reference.words == target.words:
        return None
    changes = [
        _change(reference, target, (a, b), (c, d), vocabulary)
        for a, b, c, d in _differences(reference.words, target.words)
    ]
    if len(changes) > 2:
        changes = _changed_phrases(reference, target)
    return Edit(reference, target, tuple(changes)) if 1 <= len(changes) <= 2 else None


def slots_of(caption: Caption, vocabulary: Vocabulary) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the places of the listed words that can be swapped, and what must agree between two captions for that.

    That is the other listed words in their order, the class of the swapped word, and the noun that it describes.
    """
    listed = [at for at, letter in enumerate(caption.classes) if letter in (NUMBER, ATTRIBUTE, PERSON, VERB)]
    for at in listed:
        letter = caption.classes[at]
        of_class = vocabulary.attribute_of.get(caption.words[at], letter) if letter == ATTRIBUTE else letter
        end = noun_after(caption, at + 1)[1] if letter in (NUMBER, ATTRIBUTE) else 0
        others = (SWAPPED if one == at else caption.words[one] for one in listed)
        yield at, (of_class, caption.words[end - 1] if end else "", *others)


def find_swap(reference: Caption, target: Caption, vocabulary: Vocabulary) -> Edit | None:
    """Return the swap of one listed word between two captions, whatever else they say; None if there is not one."""
    places = {agree: at for at, agree in slots_of(target, vocabulary)}
    for old, agree in slots_of(reference, vocabulary):
        new = places.get(agree)
        if new is not None and reference.words[old] != target.words[new]:
            change = _change(reference, target, (old, old + 1), (new, new + 1), vocabulary)
            return Edit(reference, target, (change,))
    return None


def _differences(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Return the spans that differ: start and end in `old`, start and end in `new`."""
    head = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    middle_old, middle_new = old[head : len(old) - tail], new[head : len(new) - tail]
    if len(middle_old) < 2 or len(middle_new) < 2:
        return [(head, len(old) - tail, head, len(new) - tail)]
    blocks = SequenceMatcher(None, middle_old, middle_new, autojunk=False).get_opcodes()
    return [(a + head, b + head, c + head, d + head) for tag, a, b, c, d in blocks if tag != "equal"]


def _change(reference: Caption, target: Caption, old: Span, new: Span, vocabulary: Vocabulary) -> Change:
    """Classify the change of one span."""
    before, after = reference.classes[slice(*old)], target.classes[slice(*new)]
    noun = noun_after(target, new[1]) if after else (0, 0)
    counts = (before == NUMBER or not before) and (after == NUMBER or not after)
    if counts and (before or after):
        own = noun or (0, 0)
        if not after:
            own = noun_after(target, new[0])
        return Change("cardinality", "cardinality", old, new, own)
    if before == after == ATTRIBUTE and noun != (0, 0):
        return Change(_attribute_kind(reference.words[old[0]], target.words[new[0]], vocabulary), "", old, new, noun)
    if not before:
        if after == ATTRIBUTE and noun != (0, 0):
            return Change("attribute", "attribute", old, new, noun)
        return Change("addition", *_phrase(target, new, "addition", "setting", old))
    if not after:
        kind, wordings, new_span, old_span = "removal", *_phrase(reference, old, "removal", "unsetting", new)
        return Change(kind, "unsetting" if before == ATTRIBUTE else wordings, old_span, new_span)
    if before == after == VERB:
        return Change("action", "action", old, new)
    if FUNCTION in (before[0], after[0]) or VERB in (before[0], after[0]):
        return Change("replacement", "action", old, new)
    return Change("replacement", "replacement", _whole(reference, old), _whole(target, new))


def _attribute_kind(old: str, new: str, vocabulary: Vocabulary) -> str:
    """Return whether a change of an attribute can be said by a comparative."""
    scale = vocabulary.attribute_of.get(old, "")
    ordered = scale.startswith("scale") and scale == vocabulary.attribute_of.get(new)
    differs = vocabulary.level_of.get(old) != vocabulary.level_of.get(new)
    return "comparative" if ordered and differs else "attribute"


def _phrase(caption: Caption, span: Span, noun_set: str, phrase_set: str, other: Span) -> tuple[str, Span, Span]:
    """Return the set of wordings for a phrase that was added or removed, the other span, and its own."""
    start, end = span
    if caption.classes[start] == FUNCTION:
        if caption.words[start] not in ACCOMPANYING or end - start < 2:
            return phrase_set, other, span
        return noun_set, other, (start + 1, end)
    return (phrase_set if caption.classes[start] in (VERB, ATTRIBUTE) else noun_set), other, span


def noun_after(caption: Caption, start: int) -> Span:
    """Return the span of the nouns that follow a word, behind further attributes; empty if none do."""
    while start < len(caption.words) and caption.classes[start] in (ATTRIBUTE, NUMBER):
        start += 1
    end = start
    while end < len(caption.words) and caption.classes[end] in (NOUN, PERSON):
        end += 1
    return (start, end) if end > start else (0, 0)


def _whole(caption: Caption, span: Span) -> Span:
    """Widen the span of a changed noun by the nouns that follow at once: "palm tree", not "palm"."""
    end = span[1]
    while end < len(caption.words) and caption.classes[end] in (NOUN, PERSON):
        end += 1
    return span[0], end


def _changed_phrases(reference: Caption, target: Caption) -> list[Change]:
    """Return the noun phrases that only one of two captions has, for captions that differ in more than two spans."""
    gone = [span for span in noun_phrases(reference) if not {*reference.words[slice(*span)]} & {*target.words}]
    come = [span for span in noun_phrases(target) if not {*target.words[slice(*span)]} & {*reference.words}]
    if not come or len(come) > 2 or len(gone) > 3:
        return []
    return [
        Change("replacement", "replacement", gone[at], span)
        if at < len(gone)
        else Change("addition", "addition", (0, 0), span)
        for at, span in enumerate(come)
    ]


def noun_phrases(caption: Caption) -> list[Span]:
    """Return the spans of the noun phrases: nouns with the attributes before them."""
    phrases, start = [], 0
    for at, letter in enumerate(caption.classes + " "):
        if letter not in (ATTRIBUTE, NOUN, PERSON):
            if any(one in (NOUN, PERSON) for one in caption.classes[start:at]):
                phrases.append((start, at))
            start = at + 1
    return phrases


# ---- relative captions ----


def write_caption(edit: Edit, vocabulary: Vocabulary, key: str) -> str:
    """Write an edit as a relative caption.

    Args:
        edit: the edit.
        vocabulary: has the wordings.
        key: decides among them by its hash, e.g. the ids of the images.
    """
    clauses = [_clause(edit, change, vocabulary, f"{key}/{at}") for at, change in enumerate(edit.changes)]
    return pick(vocabulary.joiners, f"{key}/joiner").join(clauses)


def pick(choices: Sequence[str], key: str) -> str:
    """Choose one by the hash of `key`."""
    return choices[id_number(key) % len(choices)]


def _clause(edit: Edit, change: Change, vocabulary: Vocabulary, key: str) -> str:
    wordings = change.wordings or change.kind
    if change.kind == "comparative" and id_number(f"{key}/kind") % 2:
        wordings = "attribute"
    fields = _fields(edit, change, vocabulary)
    usable = [one for one in vocabulary.wordings[wordings] if all(fields.get(name) for name in _names(one))]
    if not usable:  # an attribute that the reference does not name
        usable = ["{new}"] if fields.get("new") else ["{old}"]
    return pick(usable, f"{key}/wording").format(**fields)


def _names(template: str) -> list[str]:
    return [part.partition("}")[0] for part in template.split("{")[1:]]


def _fields(edit: Edit, change: Change, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the fields of wordings; those that do not apply are empty."""
    grammar = vocabulary.grammar
    old, new = " ".join(edit.reference.spoken[slice(*change.old)]), " ".join(edit.target.spoken[slice(*change.new)])
    noun = " ".join(edit.target.spoken[slice(*change.noun)])
    if change.kind == "cardinality":
        return _counts(edit, change, vocabulary, noun)
    if change.kind in ("attribute", "comparative"):
        old = edit.reference.words[change.old[0]] if old else ""
        new = edit.target.words[change.new[0]] if new else ""
        fields = {"old": old, "new": new, "noun": noun}
        if old:
            fields |= {"a_old": grammar.with_article(old)}
        fields |= {"a_new": grammar.with_article(new)} if noun and _takes_article(edit.target, change.new[0]) else {}
        if change.kind == "comparative":
            scale = vocabulary.scales[int(vocabulary.attribute_of[new].split()[1])]
            fields["more"] = scale["more" if vocabulary.level_of[new] > vocabulary.level_of[old] else "less"]
            if "a_new" in fields:
                fields["a_more"] = grammar.with_article(fields["more"])
        return fields
    fields = {"old": old, "new": new, "bare_old": old, "noun": noun, "the_old": old}
    if change.wordings in ("addition", "removal", "replacement"):
        if new and _takes_article(edit.target, change.new[0]):
            fields["new"] = grammar.with_article(new)
        if old and _takes_article(edit.reference, change.old[0]):
            fields |= {"old": grammar.with_article(old), "the_old": grammar.definite(old)}
    return fields


def _takes_article(caption: Caption, at: int) -> bool:
    """Return whether a noun phrase takes an article: it had one, or its caption has none anywhere; no name does."""
    return bool(caption.articles[at]) or not (any(caption.articles) or caption.spoken[at][0].isupper())


def _counts(edit: Edit, change: Change, vocabulary: Vocabulary, noun: str) -> dict[str, str]:
    """Return the fields of a changed number; a noun without one is one."""
    grammar = vocabulary.grammar
    one = vocabulary.numbers[0]
    old = edit.reference.words[change.old[0]] if change.old[1] > change.old[0] else one
    new = edit.target.words[change.new[0]] if change.new[1] > change.new[0] else one
    head, _, last = noun.rpartition(" ")
    plural = f"{head} {grammar.plural(last)}".strip()
    singular = f"{head} {grammar.singular(last)}".strip()
    return {"old": old, "new": new, "nouns": singular if new == one else plural, "plural": plural, "noun": noun}


__all__ = ["KINDS", "Change", "Edit", "find_edit", "find_swap", "noun_phrases", "pick", "slots_of", "write_caption"]
