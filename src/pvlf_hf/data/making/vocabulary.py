"""Reads captions by a word list: which words are colours, numbers, sizes, verbs or function words; the rest are nouns.

A word list is a JSON file such as `en.json` beside this module. It also holds the language's wordings of relative
captions. Another language needs another file, and no code.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import name as unicode_name

from .grammar import Grammar, grammar_of

_TOKEN = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")

FUNCTION, NUMBER, ATTRIBUTE, PERSON, VERB, NOUN = "FNAPVX"
"""Classes of words. A noun is every word that is not in the list."""

MAX_WORDS = 60
"""Longest caption that is read (our choice): the pairs of longer ones differ in more than a slot."""

LANGUAGES = ("de", "en")
"""Languages whose word lists are shipped."""


class Caption(NamedTuple):
    """A caption, word by word, without articles.

    Args:
        words: words as they are compared: lower case, adjectives without endings, counted nouns in the singular.
        spoken: the same words as they were written.
        classes: class of each word, a letter.
        articles: `"a"`, `"the"` or `""`: article before each word.
    """

    words: tuple[str, ...]
    spoken: tuple[str, ...]
    classes: str
    articles: tuple[str, ...]


class Vocabulary:
    """A word list, which reads captions.

    Args:
        content: content of its JSON file.

    Attributes:
        language: code of the language, `"en"`.
        grammar: articles and plurals of the language.
        wordings: templates of relative captions by kind of edit.
        joiners: texts between two edits.
        leaks: names of kinds of edits, which a relative caption must not contain.
        meta: words for an image as such.
        attribute_of: class of each attribute: `"colour"`, `"material"`, ..., or `"scale 0"`.
        scales: orders of sizes, ages and so on, each with the comparatives `less` and `more`.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.language: str = content["language"]
        self.script: str | None = content.get("script")
        self.grammar: Grammar = grammar_of(content.get("grammar"), frozenset(content.get("mass", "").split()))
        self.wordings: dict[str, list[str]] = content["wordings"]
        self.joiners: list[str] = content["joiners"]
        self.leaks = frozenset(content["leaks"].split())
        self.meta = frozenset(content["meta"].split())
        self.articles = dict.fromkeys(content["articles"].split(), "the")
        self.articles |= dict.fromkeys(content["one"].split(), "a")
        self.phrases: dict[str, str] = content["phrases"]
        self.digits: dict[str, str] = content["digits"]
        self.numbers = content["numbers"].split()
        self.scales: list[dict[str, Any]] = content["scales"]
        self.attribute_of: dict[str, str] = {}
        self.level_of: dict[str, int] = {}
        self._class_of: dict[str, tuple[str, str]] = {}
        self._not_verbs = frozenset(content["not_verbs"].split())
        self._verb_endings = tuple(content["verb_endings"])
        self._counts = content.get("grammar") is not None
        self._fill(content)

    def _fill(self, content: Mapping[str, Any]) -> None:
        """Enter all words, those of the earliest class first."""

        def enter(words: Iterable[str], letter: str) -> None:
            for word in words:
                self._class_of.setdefault(word, (letter, word))

        enter(content["function"].split(), FUNCTION)
        enter(self.numbers, NUMBER)
        enter(content["classes"]["person"].split(), PERSON)
        for number, scale in enumerate(self.scales):
            for level, words in enumerate(scale["order"]):
                for word in words.split():
                    self.attribute_of.setdefault(word, f"scale {number}")
                    self.level_of.setdefault(word, level)
        for kind, words in content["classes"].items():
            if kind != "person":
                self.attribute_of |= {word: kind for word in words.split() if word not in self.attribute_of}
        enter(self.attribute_of, ATTRIBUTE)
        enter(content["verbs"].split(), VERB)
        for word in self.attribute_of:
            for ending in content.get("endings", "").split():
                self._class_of.setdefault(word + ending, (ATTRIBUTE, word))
        for word, base in content.get("irregular", {}).items():
            self._class_of[word] = (ATTRIBUTE, base)
        for digit, word in self.digits.items():
            self._class_of[digit] = (NUMBER, word)

    def look_up(self, word: str) -> tuple[str, str]:
        """Return the class of a lower-case word, and the form in which it is compared."""
        known = self._class_of.get(word)
        if known is not None:
            return known
        if word.isdigit():
            return NUMBER, word
        if word.endswith(self._verb_endings) and len(word) > 4 and word not in self._not_verbs:
            return VERB, word
        return NOUN, word

    def read(self, caption: str) -> Caption:
        """Read a caption."""
        lower = caption.lower()
        for phrase, word in self.phrases.items():
            if phrase in lower:
                caption = re.sub(rf"\b{phrase}\b", word, caption, flags=re.IGNORECASE)
        words, spoken, classes, articles = [], [], [], []
        article, counted = "", False
        for token in _TOKEN.findall(caption):
            word = token.lower()
            if found := self.articles.get(word):
                article = found
                continue
            letter, base = self.look_up(word)
            if letter is NUMBER:
                counted = self._counts
            elif letter in "FV":
                counted = False
            elif counted and letter in "XP":
                base = self.grammar.singular(base)
            words.append(base)
            spoken.append(token)
            classes.append(letter)
            articles.append(article)
            article = ""
        if len(spoken) > 1 and spoken[0].istitle() and not any(word[0].isupper() for word in spoken[1:]):
            spoken[0] = spoken[0].lower()  # the start of a sentence, no name
        return Caption(tuple(words), tuple(spoken), "".join(classes), tuple(articles))

    def problem(self, caption: str) -> str | None:
        """Return why a caption cannot be used, or None."""
        if not caption.strip():
            return "empty caption"
        if len(caption) > 4000 or len(caption.split()) > MAX_WORDS:
            return f"caption of more than {MAX_WORDS} words"
        if self.script and not caption.isascii():
            letters = [letter for letter in caption if letter.isalpha()]
            foreign = sum(not unicode_name(letter, "").startswith(self.script) for letter in letters)
            if foreign > 0.2 * len(letters):
                return f"caption in another script than the word list's ({self.script.lower()})"
        return None if _TOKEN.search(caption) else "caption without a word"


def load_vocabulary(language: str | Path = "en") -> Vocabulary:
    """Load a word list.

    Args:
        language: one of `LANGUAGES`, or a JSON file of the same form as `en.json`.

    Raises:
        ImportError: if the library of the language's grammar is not installed.
        ValueError: if there is no such word list, or it lacks a part; names it.
    """
    file = Path(__file__).with_name(f"{language}.json") if language in LANGUAGES else Path(language)
    if not file.is_file():
        raise ValueError(
            f"no word list for language {str(language)!r}: choose from {list(LANGUAGES)}, or pass a JSON file with "
            "the parts of en.json, which is in the folder of pvlf_hf.data.making"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Vocabulary(content)
    except KeyError as error:
        raise ValueError(f"{file}: the word list lacks {error}; see en.json for its parts") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read as a word list ({error}); see en.json for its form") from error


__all__ = ["LANGUAGES", "Caption", "Vocabulary", "load_vocabulary"]
