"""Grammar of relative captions: articles and the number of nouns. English is the library inflect's."""

from functools import lru_cache
from typing import Any

_SINGULAR_ENDINGS = ("ss", "us", "is", "lens")
"""Endings of singular nouns that inflect takes for plurals ("bus", "axis")."""


class Grammar:
    """Grammar of a language without rules of its own: every phrase stays as it was written."""

    def singular(self, noun: str) -> str:
        """Return the singular of a noun, or the noun itself where it is none."""
        return noun

    def plural(self, noun: str) -> str:
        """Return the plural of a noun."""
        return noun

    def with_article(self, phrase: str) -> str:
        """Return a noun phrase with its indefinite article, where it takes one."""
        return phrase

    def definite(self, phrase: str) -> str:
        """Return a noun phrase with its definite article."""
        return phrase


class EnglishGrammar(Grammar):
    """English articles and plurals.

    Args:
        mass: nouns without a plural, such as "water", which take no article.

    Raises:
        ImportError: if inflect is not installed.
    """

    def __init__(self, mass: frozenset[str]) -> None:
        try:
            import inflect
        except ImportError as error:
            raise ImportError('English captions need inflect: `pip install "pvlf-hf[triplets]"`') from error
        self.engine: Any = inflect.engine()
        self.mass = mass
        self.singular = lru_cache(2**16)(self._singular)  # type: ignore[method-assign]  # inflect takes 0.1 ms
        self._article_before = lru_cache(2**16)(self._article)

    def _singular(self, noun: str) -> str:
        if noun.endswith(_SINGULAR_ENDINGS) or not noun.isalpha():
            return noun
        return self.engine.singular_noun(noun) or noun

    def plural(self, noun: str) -> str:
        """Return the plural of a noun; of a mass noun or a plural, itself."""
        if noun in self.mass or self.singular(noun) != noun:
            return noun
        return self.engine.plural_noun(noun) if noun else noun

    def definite(self, phrase: str) -> str:
        """Return a noun phrase with "the"."""
        return f"the {phrase}"

    def with_article(self, phrase: str) -> str:
        """Return a phrase with "a" or "an"; plurals and mass nouns take none."""
        words = phrase.split()
        if not words or words[-1] in self.mass or self.singular(words[-1]) != words[-1]:
            return phrase
        return f"{self._article_before(words[0])} {phrase}"

    def _article(self, word: str) -> str:
        if word.isupper() and len(word) < 4:  # spelled out: an SUV, which inflect does not know
            return "an" if word[0] in "AEFHILMNORSX" else "a"
        return self.engine.a(word).split()[0]


def grammar_of(name: str | None, mass: frozenset[str]) -> Grammar:
    """Return a grammar by its name in a word list: `"inflect"`, or None for a language without one.

    Raises:
        ImportError: if its library is not installed.
        ValueError: for an unknown name.
    """
    if name is None:
        return Grammar()
    if name != "inflect":
        raise ValueError(f"grammar {name!r}: a word list names 'inflect' (English) or null")
    return EnglishGrammar(mass)


__all__ = ["EnglishGrammar", "Grammar", "grammar_of"]
