"""Searches by plain values: what a server or a script gets as JSON and answers as JSON.

Example:
    ```python
    answer(gallery, {"text": "in blue", "images": [{"image": "data:image/png;base64,..."}], "filter": "price < 50"})
    ```
"""

import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from PIL import Image as PILImage

from .query import FUSION
from .result import SearchResult
from .terms import MOST_TERMS, open_reference

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


def answer(gallery: Any, request: Mapping[str, Any], uploads: Sequence[PILImage.Image] = ()) -> dict[str, Any]:
    """Search a gallery by a request of plain values.

    No file of this machine and no web address is opened for it: images come in `data:` URLs, as ids, or as `uploads`.

    Args:
        gallery: a [`Gallery`].
        request: see `REQUEST`.
        uploads: further reference images, already decoded, such as the parts of a multipart form.

    Returns:
        `results`, each with `id`, `score`, `metadata` where there is some, and `folded` ids of near-duplicates where
        there are some; and `offset`.

    Raises:
        ValueError: as [`Gallery.search`], and if the request has other keys or values.
    """
    return as_plain(find(gallery, request, uploads), request.get("offset") or 0)


def find(gallery: Any, request: Mapping[str, Any], uploads: Sequence[PILImage.Image] = ()) -> SearchResult:
    """Search a gallery as [`answer`] does, and return the result itself."""
    if not isinstance(request, Mapping):
        raise ValueError(f"the request is a {type(request).__name__}: pass an object with keys such as {[*REQUEST]}")
    if unknown := sorted({*request} - {*REQUEST}):
        raise ValueError(f"the request has keys {unknown}, which there are not: its keys are {[*REQUEST]}")
    given: dict[str, Any] = {key: value for key, value in request.items() if value is not None}
    if isinstance(k := given.get("k"), int) and k > MOST_RESULTS:
        raise ValueError(f"k={k}: pass at most {MOST_RESULTS}, and an offset for those after them")
    listed = given.pop("images", [])
    if not isinstance(listed, list) or len(listed) + len(uploads) > MOST_TERMS:
        raise ValueError(f"images: pass a list of at most {MOST_TERMS} images")
    images = [*((upload, 1.0) for upload in uploads), *(_image(gallery.processor, one) for one in listed)]
    for name in ("filter", "text"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name} is {given[name]!r:.80}: pass a text")
    weights = given.pop("weights", FUSION)
    return gallery.search(images or None, weights=weights, **given)


def as_plain(result: SearchResult, offset: int = 0) -> dict[str, Any]:
    """Return a result in plain values, see [`answer`]."""
    gallery = result.gallery
    rows: list[dict[str, Any]] = [
        {"id": image_id, "score": score} for image_id, score in zip(result.ids, result.scores, strict=True)
    ]
    if gallery.metadata is not None:
        found = gallery.metadata.take([gallery.row_of(image_id) for image_id in result.ids])
        for row, values in zip(rows, found.to_pylist(), strict=True):
            row["metadata"] = {name: _plain(value) for name, value in values.items()}
    for row in rows:
        if row["id"] in result.folded:
            row["folded"] = result.folded[row["id"]]
    return {"results": rows, "offset": offset}


def _image(processor: Any, one: Any) -> tuple[PILImage.Image, float]:
    """Open an image of a request."""
    described: Any = {"image": one} if isinstance(one, str) else one
    if not isinstance(described, Mapping) or not {"image"} <= {*described} <= {"image", "weight", "box"}:
        raise ValueError(f"images holds {one!r:.80}: pass data: URLs, or objects with image, weight and box")
    url = described["image"]
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"images holds {url!r:.80}: pass its content as a data: URL, or search by ids")
    return open_reference(processor, url, described.get("box")), described.get("weight", 1.0)


def _plain(value: Any) -> Any:
    """Return a value of the metadata as JSON knows it."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


__all__ = ["MOST_RESULTS", "REQUEST", "answer", "as_plain", "find"]
