"""Relative captions of EmojiCIR: writes the caption that turns one emoji's attributes into another's.

There are four styles: `"train"` for training and validation, and the three tiers of the test split, whose templates
are never used in training. `"plain"` states the change in a clear sentence; `"paraphrased"` uses other sentences and,
where the language has them, other terms; `"brief"` is as short and careless as many captions of CIRR: one to three
words, no verb, a typo, or a vague "darker" that does not say by how much. Templates and terms are in `captions.json`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ...digests import sha1_digest
from .names import ACTIVITIES, OCCUPATIONS, SKIN_TONES

TIERS = ("plain", "paraphrased", "brief")

T = TypeVar("T")

_TEMPLATES_OF = {
    **dict.fromkeys(("species", "object", "shape", "part", "mark", "character"), "swap"),
    **dict.fromkeys(("left skin", "right skin"), "skin of one"),
}
"""Set of templates of an attribute that shares one with others."""

_TERMS_OF = dict.fromkeys(("left skin", "right skin"), "skin")
"""Attribute whose terms another one shares."""

_SLOT_NAMES = {"who": "pair", "lid": "lid of the box"}

_ORDERED = {
    # attribute: (values from low to high, comparative for less, comparative for more)
    **dict.fromkeys(("skin", "left skin", "right skin"), (SKIN_TONES, "lighter", "darker")),
    "age": (("baby", "child", "adult", "older"), "younger", "older"),
}

_ALTERNATIVES = re.compile(r"<(?P<name>[^<>]+)>|\[(?P<choices>[^\[\]<>]*)\]")

_NOUN_SLOTS = ("species", "object", "expression", "part", "mark")


@cache
def phrasings() -> Mapping[str, Any]:
    """Return the content of `captions.json`.

    Returns:
        `"alternatives"`: name -> texts that a template's `<name>` stands for. `"templates"`: set -> style -> templates
        with `{old}`, `{new}`, `{slot}`, `{side}` and, for ordered attributes, `{more}`; in training also with `<name>`
        and `[this|that]`. `"terms"`: attribute -> value -> terms in training; the first is also the one of the plain
        and brief tiers, and a value that is absent is its own term. `"paraphrases"`: attribute -> value -> the
        paraphrased tier's term. `"joiners"`: style -> text between two changes. `"mass_nouns"`: values without an
        article.
    """
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def templates_of(attribute: str) -> Mapping[str, Sequence[str]]:
    """Return the templates of an attribute by style."""
    sets = phrasings()["templates"]
    return sets.get(_TEMPLATES_OF.get(attribute, attribute), sets["anything"])


def pick(choices: Sequence[T], key: str) -> T:
    """Choose one by the hash of `key`: the same on every machine and Python, independent of earlier choices."""
    return choices[int(sha1_digest(key.encode()), 16) % len(choices)]


def attribute_of(slot: str, new: str) -> str:
    """Return the attribute's name in results and templates: a role that is an action is an `"activity"`."""
    return "activity" if slot == "role" and new not in OCCUPATIONS and new != "ninja" else slot


def write_caption(old: Mapping[str, str], new: Mapping[str, str], style: str, key: str) -> str:
    """Write the relative caption that leads from one emoji to another.

    Args:
        old: attributes of the reference, from `parse_name`.
        new: attributes of the target: the same keys, other values in one or two of them.
        style: `"train"`, or a tier from `TIERS`.
        key: selects among the templates by its hash, e.g. the ids of the triplet.

    Returns:
        The caption, lower case except for names.
    """
    changed = [slot for slot in new if old[slot] != new[slot]]
    parts = [_write_change(slot, old[slot], new[slot], style, f"{key}/{slot}") for slot in changed]
    caption = pick(phrasings()["joiners"][style], f"{key}/joiner").join(parts)
    if style == "brief" and pick((False, False, True), f"{key}/typo"):
        caption = _swap_two_letters(caption)
    if style == "train":
        careless = pick((_misspell, _without_articles, *[None] * 6), f"{key}/careless")
        caption = careless(caption, key) if careless else caption
    return caption


def _write_change(slot: str, old: str, new: str, style: str, key: str) -> str:
    """Write the caption of one changed attribute."""
    templates = templates_of(attribute_of(slot, new))[style]
    more = _comparison(slot, old, new)
    template = pick([t for t in templates if more or "{more}" not in t], f"{key}/template")
    template = _with_alternatives_chosen(template, key)
    terms = {"old": _term(slot, old, style, f"{key}/old"), "new": _term(slot, new, style, f"{key}/new")}
    return template.format(slot=_SLOT_NAMES.get(slot, slot), side=slot.partition(" ")[0], more=more, **terms)


def _with_alternatives_chosen(template: str, key: str) -> str:
    """Return the template with one choice for each `<name>` and each `[this|that]`, the innermost first."""
    number = 0
    while match := _ALTERNATIVES.search(template):
        choice = pick(_choices(match), f"{key}/{number}")
        template = template[: match.start()] + choice + template[match.end() :]
        number += 1
    return template


def wordings(template: str) -> Iterator[str]:
    """Yield each wording of a template, with its slots."""
    match = _ALTERNATIVES.search(template)
    if match is None:
        yield template
        return
    for choice in dict.fromkeys(_choices(match)):
        yield from wordings(template[: match.start()] + choice + template[match.end() :])


def _choices(match: re.Match[str]) -> Sequence[str]:
    """Return the texts that a match of `_ALTERNATIVES` stands for."""
    return phrasings()["alternatives"][match["name"]] if match["name"] else match["choices"].split("|")


def _term(slot: str, value: str, style: str, key: str) -> str:
    """Return the term for a value in a style."""
    attribute = _TERMS_OF.get(slot, slot)
    paraphrases = phrasings()["paraphrases"].get(attribute, {})
    if style == "paraphrased" and value in paraphrases:
        return paraphrases[value]
    terms = phrasings()["terms"].get(attribute, {}).get(value) or [_with_article(slot, value)]
    return pick(terms, key) if style == "train" else terms[0]


def _with_article(slot: str, value: str) -> str:
    """Add an article (`"an apple"`) except to predicates ("running"), plurals and mass nouns."""
    is_noun = slot in _NOUN_SLOTS or (slot == "role" and value not in ACTIVITIES and value in (*OCCUPATIONS, "ninja"))
    head = value.split(" with ")[0]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "hourglass"))
    if not is_noun or plural or value in phrasings()["mass_nouns"]:
        return value
    vowel = value[0].lower() in "aeio" or value.startswith(("um", "un", "up")) and not value.startswith("uni")
    return f"an {value}" if vowel else f"a {value}"


def _comparison(slot: str, old: str, new: str) -> str | None:
    """Return the comparative of a change along an ordered attribute (`"darker"`); None where there is no order."""
    if slot not in _ORDERED:
        return None
    order, less, more = _ORDERED[slot]
    if old not in order or new not in order:
        return None
    return more if order.index(new) > order.index(old) else less


def _swap_two_letters(caption: str) -> str:
    """Swap the second and third letter of the longest word, a typical typo."""
    longest = max(caption.split(), key=len)
    return caption.replace(longest, longest[0] + longest[2:3] + longest[1:2] + longest[3:], 1)


def _misspell(caption: str, key: str) -> str:
    """Drop, double or swap a letter inside a word of at least four letters."""
    words = caption.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return caption
    i = pick(long, f"{key}/word")
    word, at = words[i], 1 + pick(range(len(words[i]) - 2), f"{key}/letter")
    edits = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )
    words[i] = pick(edits, f"{key}/edit")
    return " ".join(words)


def _without_articles(caption: str, key: str) -> str:
    """Leave out all articles."""
    return re.sub(r"\b(an?|the) ", "", caption)
