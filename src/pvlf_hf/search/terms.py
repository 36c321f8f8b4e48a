"""Terms of a query: weighted images, texts and indexed images; those of negative weight lead away."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from PIL import Image as PILImage
from transformers import PreTrainedTokenizerBase

from ..models.image_processing_pvlf import ImageInput
from ..models.interface_pvlf import ComposedRetrievalProcessor

MOST_TERMS = 32
"""Most images, texts and ids of a query together (our choice): each text is composed with each image."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in pixels of the image as it is shown."""

WeightedImages = ImageInput | Sequence[ImageInput | tuple[ImageInput, float]]


class Terms(NamedTuple):
    """Parts of a query, each with its weight, which is not 0."""

    images: list[tuple[PILImage.Image, float]]
    ids: list[tuple[str, float]]
    texts: list[tuple[str, float]]

    @property
    def text(self) -> str | None:
        """All texts in a line, None without."""
        return ", ".join(labelled(text, weight) for text, weight in self.texts) or None


def collect_terms(
    processor: ComposedRetrievalProcessor,
    image: WeightedImages | None = None,
    text: str | None = None,
    texts: Mapping[str, float] | None = None,
    ids: Mapping[str, float] | Sequence[str] | None = None,
    box: Sequence[float] | None = None,
) -> Terms:
    """Check the parts of a query, and open its images; arguments and errors as [`Gallery.search`]."""
    if all(part is None for part in (image, text, texts, ids)):
        raise ValueError("nothing to search by: pass an image, a text or both")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text={text!r}: pass one string, or None to search by the image alone")
    if texts is not None and not isinstance(texts, Mapping):
        raise ValueError(f'texts={texts!r:.200}: pass texts with their weights, such as {{"red": 1, "stripes": -0.5}}')
    if isinstance(ids, str):
        raise ValueError(f"ids={ids!r}: pass a list of ids, or ids with their weights, such as {{{ids!r}: 1}}")
    given = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    if image is not None and not given:
        raise ValueError("image is an empty list: pass at least one image, or leave it out")
    worded = [*([] if text is None else [(text, 1.0)]), *(texts or {}).items()]
    named = [*ids.items()] if isinstance(ids, Mapping) else [(one, 1.0) for one in ids or ()]
    if (number := len(given) + len(worded) + len(named)) > MOST_TERMS:
        raise ValueError(f"the query has {number:,} images, texts and ids: pass at most {MOST_TERMS}")
    if any(not isinstance(one, str) or not one.strip() for one, _ in worded):
        raise ValueError("text is empty: say what to look for, or leave text out to search by the image alone")
    if box is not None and len(given) != 1:
        raise ValueError(f"box={tuple(box)!r} is a part of one image, and the query has {len(given)}: pass one image")
    images = [(open_reference(processor, one, box), weight) for one, weight in map(weighted, given)]
    terms = Terms(
        [(one, check_weight(weight, "an image")) for one, weight in images],
        [(str(one), check_weight(weight, one)) for one, weight in named],
        [(one, check_weight(weight, one)) for one, weight in worded],
    )
    if all(weight < 0 for part in terms for _, weight in part):
        raise ValueError("the query only says what to avoid: add a text, an image or an id to look for")
    return terms


def weighted(image: Any) -> tuple[ImageInput, Any]:
    """Return an image with its weight, 1 where it comes without."""
    is_pair = isinstance(image, tuple) and len(image) == 2 and not hasattr(image[1], "shape")
    return image if is_pair and not isinstance(image[1], str) else (image, 1.0)


def check_weight(weight: Any, what: str) -> float:
    """Return a weight as a float; raise a `ValueError` unless it is a finite number other than 0."""
    if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight) or weight == 0:
        raise ValueError(f"the weight of {what!r:.80} is {weight!r}: pass a number, below 0 to lead away from it")
    return float(weight)


def open_reference(
    processor: ComposedRetrievalProcessor, image: ImageInput, box: Sequence[float] | None = None
) -> PILImage.Image:
    """Open a reference image, RGB and upright, or the part of it in a box.

    Raises:
        ValueError: if it cannot be read, or the box is none or not within the image.
    """
    opened = PILImage.fromarray(processor.image_processor.process_image(image).transpose(1, 2, 0))
    if box is None:
        return opened
    numbers = [one for one in box if isinstance(one, Real) and math.isfinite(one)]
    if len(numbers) != 4 or len(box) != 4:
        raise ValueError(f"box={box!r:.80}: pass left, top, right and bottom in pixels")
    left, top, right, bottom = map(round, numbers)
    if not (0 <= left < right <= opened.width and 0 <= top < bottom <= opened.height):
        raise ValueError(
            f"box={tuple(box)!r} is not within the image, which is {opened.width} x {opened.height} pixels: pass "
            "left < right and top < bottom inside of it"
        )
    return opened.crop((left, top, right, bottom))


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the words that a tokenizer does not know.

    Raises:
        ValueError: if it knows none, as in another script.
    """
    readable = text.encode(errors="replace").decode()  # lone surrogates are reported by the processor
    words = {word: _tokens(tokenizer, word) for word in readable.split()}
    if words and all({*tokens} <= {tokenizer.unk_token} for tokens in words.values()):
        raise ValueError(f"the model's tokenizer knows no word of {text!r}: use the language it was trained on")
    return [word for word, tokens in words.items() if tokenizer.unk_token in tokens]


def _tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[str]:
    """Tokenize a word; `tokenize` would change the settings that other threads tokenize by."""
    if not tokenizer.is_fast:
        return tokenizer.tokenize(word)
    encoded = tokenizer.backend_tokenizer.encode(word, add_special_tokens=False)
    return [token for token, real in zip(encoded.tokens, encoded.attention_mask, strict=True) if real]


def labelled(text: str, weight: float) -> str:
    """Return a text with its weight as the command line takes it: `red`, `-stripes`, `0.5:red`."""
    if abs(weight) == 1:
        return text if weight > 0 else f"-{text}"
    return f"{weight:g}:{text}"


def read_labelled(given: str) -> tuple[str, float]:
    """Split a weight off a text or an id, as the command line does: `red`, `-red`, `2:red`, `-0.5:red`.

    Raises:
        ValueError: if the weight is 0 or nothing follows it.
    """
    number, text = re.fullmatch(r"(?:([+-]?(?:\d+\.?\d*|\.\d+)):)?(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if number is None:
        return (given[1:], -1.0) if given.startswith("-") and len(given) > 1 else (given, 1.0)
    if float(number) == 0 or not text.strip():
        raise ValueError(f"{given!r:.80}: write a weight other than 0 and what it weighs, such as 2:red")
    return text, float(number)


__all__ = ["Box", "Terms", "collect_terms", "open_reference", "read_labelled", "unknown_words"]
