"""Finds the keywords of captions and replaces them, for methods that train on captions with a word left out."""

import re
from collections.abc import Sequence

# Closed classes of English words, and the most frequent verbs: what is never part of a keyword.
_FUNCTION_WORDS = frozenset(
    """
    about above across after against along among and are around as at be because been before behind being below beneath
    beside between beyond but by can could did do does doing down during each every for from had has have having he her
    hers him his how i if in inside into is it its itself like made make makes many may me might must my near next no
    nor not of off on onto or our out outside over past per she should since so some such than that their them then
    there they this those through throughout to toward towards under until up upon us was we were what when where which
    while who whom whose will with within without would you your
    eating holding looking riding seen shown showing shows sits sitting standing stands walking wearing
    """.split()
)
_DETERMINERS = frozenset("a an the this that these those some any all both each every another two three".split())
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def find_keywords(caption: str) -> list[str]:
    """Find the keywords of an English caption: maximal runs of words that are no function words.

    A determiner before a run belongs to it, as in LinCIR; one that stands alone is no keyword (LinCIR takes it for
    one). LinCIR finds its runs by a part-of-speech tagger, spaCy's `en_core_web_sm`. Runs of your own tagger, or in
    another language, go into the column `keywords` of the training set.

    Args:
        caption: the caption.

    Returns:
        The runs as they stand in the caption, in order.

    Example:
        >>> find_keywords("a brown dog sleeps on the old sofa")
        ['a brown dog sleeps', 'the old sofa']
    """
    runs: list[tuple[int, int]] = []  # first and last character of each
    start, content = None, False
    for match in [*_TOKEN.finditer(caption), None]:
        word = match[0].casefold() if match else "."
        is_determiner = word in _DETERMINERS
        if match and (is_determiner and not content or _is_content(word)):
            start = match.start() if start is None or is_determiner else start
            content |= not is_determiner
            end = match.end()
            continue
        if content and start is not None:
            runs.append((start, end))
        start, content = (match.start(), False) if match and is_determiner else (None, False)
    return [caption[first:last] for first, last in runs]


def _is_content(word: str) -> bool:
    return word[0].isalnum() and word not in _FUNCTION_WORDS and word not in _DETERMINERS


def replace_keywords(caption: str, placeholder: str, keywords: Sequence[str] | None = None) -> str:
    """Replace the keywords of a caption by a placeholder.

    Whole words are replaced. LinCIR replaces substrings, so that its keyword "a" replaces every letter a.

    Args:
        caption: the caption; a placeholder in it is removed.
        placeholder: word that stands for each keyword.
        keywords: what to replace, from which it is removed, too; by default what [`find_keywords`] finds.

    Returns:
        The caption with blanks around each placeholder. Without any keyword in it, the caption as it is.

    Example:
        >>> replace_keywords("a brown dog sleeps on the old sofa", "$")
        '$ on $'
    """
    caption = " ".join(caption.replace(placeholder, " ").split())
    keywords = find_keywords(caption) if keywords is None else keywords
    keywords = [" ".join(keyword.replace(placeholder, " ").split()) for keyword in keywords]
    for keyword in sorted(filter(str.strip, keywords), key=len, reverse=True):  # "red car" before "car"
        caption = re.sub(rf"(?<!\w){re.escape(keyword)}(?!\w)", lambda _: f" {placeholder} ", caption)
    return " ".join(caption.split())


__all__ = ["find_keywords", "replace_keywords"]
