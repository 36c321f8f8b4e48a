"""Searches by plain values: what a server or a script gets as JSON and answers as JSON.

Example:
    ```python
    answer(gallery, {"text": "in blue", "images": [{"image": "data:image/png;base64,..."}], "filter": "price < 50"})
    ```
"""

import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any, NamedTuple

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..models.image_processing_pvlf import FORMATS, describe, open_image
from ..models.interface_pvlf import ComposedRetrievalProcessor
from .image_search import ImageSearch
from .query import FUSION, Query
from .result import SearchResult
from .terms import MOST_TERMS, check_weight, open_reference, unknown_words

REQUEST = {
    "text": "string, what should be different or what to look for",
    "texts": "object of texts and weights, a negative one leads away",
    "images": "list of data: URLs, or of objects with image, weight and box (left, top, right, bottom)",
    "ids": "list of indexed images, or object of ids and weights",
    "k": "number of results, 10 by default",
    "offset": "results to pass over",
    "filter": "condition on columns, such as price < 50",
    "min_score": "least score of a result",
    "fold": "cosine from which near-duplicates are folded, such as 0.98",
    "weights": "three numbers, of image, composition and text",
    "exclude": "list of ids that are left out",
}
"""Keys of a request and what they hold, all of them optional; one of the first four is needed."""

MOST_RESULTS = 1000
"""Most results of one request (our choice); `offset` reaches the others."""

MOST_PIXELS = 64 * 10**6
"""Most pixels of the images of a request together (our choice): 192 MB once they are decoded."""


class ParsedRequest(NamedTuple):
    """A request that was checked; its images are opened, but not decoded.

    Args:
        images: each with its weight and its box or None.
        terms: texts and ids, as [`Gallery.query`] takes them.
        settings: what the ranking needs, as [`Gallery.search`] takes it.
        unknown_words: words of the texts that the model's tokenizer does not know.
    """

    images: list[tuple[PILImage.Image, Any, Any]]
    terms: dict[str, Any]
    settings: dict[str, Any]
    unknown_words: list[str]

    @property
    def pixels(self) -> int:
        """Pixels of all images together."""
        return sum(image.width * image.height for image, _, _ in self.images)


def answer(gallery: ImageSearch, request: Mapping[str, Any], uploads: Sequence[PILImage.Image] = ()) -> dict[str, Any]:
    """Search a gallery by a request of plain values.

    No file of this machine and no web address is opened for it: images come in `data:` URLs, as ids, or as `uploads`.

    Args:
        gallery: what is searched.
        request: see `REQUEST`.
        uploads: further reference images, such as the parts of a multipart form.

    Returns:
        `results`, each with `id`, `score`, `metadata` where there is some, and `folded` ids of near-duplicates where
        there are some; `offset`; and `unknown_words`, where the model's tokenizer does not know all of the texts.

    Raises:
        ValueError: as [`Gallery.search`], and if the request has other keys or values, or its images are too large.
    """
    parsed = read(gallery.processor, request, uploads)
    return answer_of(parsed, gallery.search(query=query_of(gallery, parsed), **parsed.settings))


def read(
    processor: ComposedRetrievalProcessor, request: Mapping[str, Any], uploads: Sequence[PILImage.Image] = ()
) -> ParsedRequest:
    """Check a request and open its images, see [`answer`]."""
    if not isinstance(request, Mapping):
        raise ValueError(f"the request is a {type(request).__name__}: pass an object with keys such as {[*REQUEST]}")
    if others := sorted({*request} - {*REQUEST}):
        raise ValueError(f"the request has keys {others}, which are unknown: valid keys are {[*REQUEST]}")
    given: dict[str, Any] = {key: value for key, value in request.items() if value is not None}
    if isinstance(k := given.get("k"), int) and k > MOST_RESULTS:
        raise ValueError(f"k={k}: pass at most {MOST_RESULTS}, and an offset for those after them")
    listed = given.pop("images", [])
    if not isinstance(listed, list) or len(listed) + len(uploads) > MOST_TERMS:
        raise ValueError(f"images: pass a list of at most {MOST_TERMS} images")
    for name in ("filter", "text"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name} is {given[name]!r:.80}: pass a text")
    for name, kinds in (("ids", list | Mapping), ("exclude", list)):
        named = given.get(name, [])
        if not isinstance(named, kinds) or not all(isinstance(one, str) for one in named):
            raise ValueError(f"{name} is {named!r:.80}: pass a list of ids")
    terms: dict[str, Any] = {name: given.pop(name) for name in ("text", "texts", "ids") if name in given}
    images = [*((upload, 1.0, None) for upload in uploads), *map(_image, listed)]
    unknown = [word for text in _texts(terms) for word in unknown_words(processor.tokenizer, text)]
    parsed = ParsedRequest(images, terms, {"weights": FUSION, **given}, unknown)
    if parsed.pixels > MOST_PIXELS:
        raise ValueError(
            f"the images have {parsed.pixels:,} pixels, more than {MOST_PIXELS:,}: make them smaller first"
        )
    return parsed


def query_of(gallery: ImageSearch, parsed: ParsedRequest) -> Query:
    """Decode the images of a request and encode its query."""
    images = [(open_reference(gallery.processor, image, box), weight) for image, weight, box in parsed.images]
    return gallery.query(images or None, **parsed.terms)


def answer_of(parsed: ParsedRequest, result: SearchResult) -> dict[str, Any]:
    """Return what [`answer`] does, of a search that was made."""
    found = {"results": as_plain(result), "offset": parsed.settings.get("offset", 0)}
    return found | ({"unknown_words": parsed.unknown_words} if parsed.unknown_words else {})


def as_plain(result: SearchResult) -> list[dict[str, Any]]:
    """Return the images of a result in plain values, see [`answer`]."""
    rows: list[dict[str, Any]] = [
        {"id": image_id, "score": score} for image_id, score in zip(result.ids, result.scores, strict=True)
    ]
    if (metadata := result.gallery.values_of(result.ids)) is not None:
        for row, values in zip(rows, metadata, strict=True):
            row["metadata"] = {name: _plain(value) for name, value in values.items()}
    for row in rows:
        if row["id"] in result.folded:
            row["folded"] = result.folded[row["id"]]
    return rows


def _texts(terms: dict[str, Any]) -> list[str]:
    """Return the texts of a request, none where they are not what they should be: that is reported later."""
    texts = [terms.get("text"), *(terms["texts"] if isinstance(terms.get("texts"), Mapping) else ())]
    return [text for text in texts if isinstance(text, str)] if len(texts) <= MOST_TERMS else []


def _image(one: Any) -> tuple[PILImage.Image, Any, Any]:
    """Open an image of a request, which stays undecoded."""
    described: Any = {"image": one} if isinstance(one, str) else one
    if not isinstance(described, Mapping) or not {"image"} <= {*described} <= {"image", "weight", "box"}:
        raise ValueError(f"images holds {one!r:.80}: pass data: URLs, or objects with image, weight and box")
    url = described["image"]
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"images holds {url!r:.80}: pass its content as a data: URL, or search by ids")
    if not isinstance(box := described.get("box"), list | None):
        raise ValueError(f"box={box!r:.80}: pass left, top, right and bottom in pixels")
    return open_content(url), check_weight(described.get("weight", 1.0), "an image"), box


def open_content(content: str | bytes) -> PILImage.Image:
    """Open an image without decoding it: a `data:` URL, or the content of a file.

    Raises:
        ValueError: if it is none that can be read.
    """
    try:
        return open_image(content)
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        name = "the image" if isinstance(content, bytes) else describe(content[:40])
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is in none of the formats {', '.join(FORMATS or ())}" if unknown else error
        raise ValueError(f"cannot read {name}: {reason}") from error


def _plain(value: Any) -> Any:
    """Return a value of the metadata as JSON knows it."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


__all__ = [
    "MOST_PIXELS",
    "MOST_RESULTS",
    "REQUEST",
    "ParsedRequest",
    "answer",
    "answer_of",
    "as_plain",
    "open_content",
    "query_of",
    "read",
]
