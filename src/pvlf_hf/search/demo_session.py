"""State of the web demo: what a visitor has done, and every step from one state to the next."""

import math
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import UnidentifiedImageError
from torch.nn import functional as F

from ..digests import sequence_digest
from ..models.image_processing_pvlf import open_image, to_rgb
from .image_search import ImageSearch
from .query import FUSION, Explanation, Query, Weights
from .terms import labelled, read_labelled

SHOWN, MOST_UPLOADS = 12, 4
"""Images in the grid, and the visitor's own images that may be searched by beside the reference (our choice: each is
kept in memory)."""

LONGEST, THUMBNAIL, MAX_PIXELS = 1024, 400, 64 * 10**6
"""Pixels (our choice): the longer side that uploads are reduced to (models see 224 to 384), the longer side of images
shown, and the most pixels of an image that is opened."""

Reference = PILImage.Image | str | None
"""The visitor's own image, the id of one in the gallery, or none."""


class Why(NamedTuple):
    """Parts of an [`Explanation`] that the page shows: the weights as shares, and the attention over the image."""

    shares: dict[str, float]
    attention: PILImage.Image


class SearchForm(NamedTuple):
    """Form of a search: a visitor's entries beside the reference and the text, as they were typed.

    Args:
        without: text to lead away from.
        filter: condition on columns of the gallery's metadata.
        also: further texts, one a line, weighed as on the command line: `2:red`, `-stripes`.
        like: ids of images in the gallery and names of the visitor's own, one a line, weighed alike.
        part: left, top, right and bottom of the part of the reference to search by, in percent of it.
        least: least score of a result.
        fold: cosine from which near-duplicates are folded.
    """

    without: str = ""
    filter: str = ""
    also: str = ""
    like: str = ""
    part: str = ""
    least: str = ""
    fold: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the ranking, see [`Gallery.search`]."""
        return {
            "filter": self.filter or None,
            "min_score": _number(self.least, "the least score"),
            "fold": _number(self.fold, "the cosine of near-duplicates"),
        }


@dataclass(frozen=True)
class Step:
    """One search of a session. Its query can be searched again with other weights, without running an encoder.

    Args:
        reference: the reference as a whole.
        seen: the part of it that was searched by.
        query: the encoded query.
        text: what should be different.
        form: what else was entered.
        why: explanation, where the model gives one.
    """

    reference: Reference
    seen: Reference
    query: Query = field(repr=False)
    text: str = ""
    form: SearchForm = SearchForm()
    why: Why | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Session:
    """State of one visitor; visitors share nothing but the model and the gallery.

    Args:
        steps: the chain of refinements.
        reference: the reference of the next search.
        shown: ids of the images in the grid.
        scores: cosines of the images in the grid; empty while they are random images to start from.
        folded: number of near-duplicates folded into each.
        offset: results that earlier pages have shown.
        uploads: the visitor's own images that are searched by beside the reference, by the names that they were given.
    """

    steps: tuple[Step, ...] = ()
    reference: Reference = None
    shown: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    folded: tuple[int, ...] = ()
    offset: int = 0
    uploads: dict[str, PILImage.Image] = field(default_factory=dict)


class Searcher:
    """Actions of the page, each from one session to the next.

    Args:
        gallery: what is searched.
        folder: where the files of displayed images are written.
    """

    def __init__(self, gallery: ImageSearch, folder: Path) -> None:
        self.gallery, self.folder = gallery, folder

    def browse(self) -> Session:
        """Show a few random images to start from."""
        return Session(shown=tuple(self.gallery.some_ids(SHOWN)))

    def pick(self, session: Session, position: int) -> Session:
        """Make an image of the grid the reference."""
        if not 0 <= position < len(session.shown):
            raise ValueError("this image is no longer shown: search again, or start over")
        return replace(session, reference=session.shown[position])

    def like(self, session: Session, like: str, weight: float) -> tuple[Session, str]:
        """Move the reference to the images to search by, weight 1, or away from, -1; return them one a line."""
        if session.reference is None:
            raise ValueError("drop an image or pick one first: click one of the results")
        weights = _weights(like)
        uploads = _named_uploads(session, weights)
        name = self._name_of(session.reference, uploads, weights)
        if not isinstance(session.reference, str):
            uploads[name] = session.reference
        lines = [line for line in _lines(like) if read_labelled(line)[0] != name]
        added = labelled(name, weight)
        if read_labelled(added) != (name, weight):  # its id begins as a weight does
            added = f"{weight:g}:{name}"
        return replace(session, reference=None, uploads=uploads), "\n".join([*lines, added])

    def _name_of(
        self, reference: PILImage.Image | str, uploads: dict[str, PILImage.Image], weights: dict[str, float]
    ) -> str:
        """Return the id of an image of the gallery, or the name of the visitor's own, a new one unless it has one.

        Raises:
            ValueError: if as many uploads as are allowed are searched by already.
        """
        if isinstance(reference, str):
            return reference
        if found := [name for name, image in uploads.items() if image == reference]:
            return found[0]
        if len(uploads.keys() & weights) >= MOST_UPLOADS:
            raise ValueError(f"{MOST_UPLOADS} of your own images are searched by already: remove a line of them first")
        names = (f"your image {number}" for number in count(1))
        return next(name for name in names if name not in uploads and name not in self.gallery)

    def search(self, session: Session, text: str, balance: float, *entries: str) -> Session:
        """Search by the reference and the text.

        A search from the reference of the last step replaces that step; one from a result of it continues the chain.

        Args:
            session: the visitor's session.
            text: what should be different, or what to look for.
            balance: see [`weights_of`].
            *entries: fields of [`SearchForm`].
        """
        reference, text, form = session.reference, text.strip(), SearchForm(*(one.strip() for one in entries))
        texts, like = _weights(form.also), _weights(form.like)
        if reference is None and not text and not texts and not like:
            raise ValueError("nothing to search by: drop or pick an image, say what to look for, or both")
        image = self.gallery.image(reference) if isinstance(reference, str) else reference
        seen = reference
        if form.part:
            image = part_of(image, form.part)
            seen = clean(image, LONGEST)
        more = texts | ({form.without: -1.0} if form.without else {})
        alone = not any(weight > 0 for weight in (*more.values(), *like.values()))
        explain = self.gallery.model.explains and image is not None and bool(text) and alone
        ids = {name: weight for name, weight in like.items() if name not in session.uploads}
        own = [(session.uploads[name], weight) for name, weight in like.items() if name not in ids]
        images = own if image is None else [(image, 1.0), *own]
        query = self.gallery.query(images or None, text or None, explain, texts=more or None, ids=ids or None)
        why = self._why(query, query.why[0]) if query.why else None
        query = replace(query, images=(), why=())  # without megabytes of pixels and attention
        step = Step(reference, seen, query, text, form, why)
        again = session.steps and session.steps[-1].reference == reference
        steps = (*(session.steps[:-1] if again else session.steps), step)
        session = replace(session, steps=steps)
        return self.weigh(replace(session, uploads=_named_uploads(session, like)), balance)

    def weigh(self, session: Session, balance: float) -> Session:
        """Search the last query with other weights; no encoder runs."""
        return self._rank(session, balance, 0) if session.steps else session

    def turn(self, session: Session, balance: float, pages: int) -> Session:
        """Turn to a later page of the results, or to an earlier one."""
        if not session.steps or (offset := session.offset + pages * SHOWN) < 0:
            raise ValueError("there are no earlier results" if session.steps else "search first")
        turned = self._rank(session, balance, offset)
        if not turned.shown:
            raise ValueError("there are no further results")
        return turned

    def _rank(self, session: Session, balance: float, offset: int) -> Session:
        step = session.steps[-1]
        weights = weights_of(balance) if has_both(step.query) else FUSION
        itself = [step.reference] if isinstance(step.reference, str) and len(self.gallery) > 1 else []
        settings = {"k": SHOWN, "offset": offset, "weights": weights, "exclude": itself, **step.form.settings}
        result = self.gallery.search(query=step.query, **settings)
        folded = tuple(len(result.folded.get(image_id, [])) for image_id in result.ids)
        return replace(session, shown=tuple(result.ids), scores=tuple(result.scores), folded=folded, offset=offset)

    def back(self, session: Session, position: int, balance: float) -> Session:
        """Return to a step of the chain and drop the later ones."""
        if not 0 <= position < len(session.steps):
            raise ValueError("this step is gone: search again, or start over")
        steps = session.steps[: position + 1]
        return self.weigh(replace(session, steps=steps, reference=steps[-1].reference), balance)

    def file(self, reference: Reference) -> str | None:
        """Return the WebP file of an image, named by a digest of its id or its pixels; it is written on first use."""
        if reference is None:
            return None
        if isinstance(reference, str):
            name = sequence_digest(reference)
        else:
            name = sequence_digest(str(reference.size), reference.tobytes())
        file = self.folder / f"{name}.webp"
        if not file.exists():
            image = self.gallery.preview(reference) if isinstance(reference, str) else reference
            temporary = file.with_suffix(".partial")
            clean(image, THUMBNAIL).save(temporary, "WEBP", quality=90)
            temporary.replace(file)  # at once: another visitor may be loading it
        return str(file)

    def _why(self, query: Query, explanation: Explanation) -> Why:
        total = sum(map(abs, explanation.weights))
        shares = {
            name if weight >= 0 else f"less of the {name}": abs(weight) / total
            for name, weight in zip(("image", "fusion of both", "text"), explanation.weights, strict=True)
        }
        seen = self.gallery.processor.process_targets(query.images[0])["pixel_values"]  # (1, 3, height, width)
        seen = (seen - seen.min()) / (seen.max() - seen.min()).clamp(min=1e-6)
        attention = explanation.patches()[None, None]  # (1, 1, rows, columns)
        light, seen = (F.interpolate(x, (256, 256), mode="bilinear")[0] for x in (attention / attention.max(), seen))
        pixels = (255 * seen * (0.25 + 0.75 * light)).byte().permute(1, 2, 0).numpy()
        return Why(shares, PILImage.fromarray(pixels))


def weights_of(balance: float) -> Weights:
    """Return weights from the image alone, -1, over the model's own composition, 0, to the text alone, 1."""
    return max(-balance, 0.0), 1 - abs(balance), max(balance, 0.0)


def has_both(query: Query) -> bool:
    """Return whether there are an image and a text to weigh, by a composition that is an embedding."""
    return query.image_embeds is not None and query.text_embeds is not None and query.combine is None


def part_of(image: PILImage.Image | None, part: str) -> PILImage.Image:
    """Crop an image to a part in percent, `left, top, right, bottom`.

    Raises:
        ValueError: if there is no image, or the part is none or not within it.
    """
    if image is None:
        raise ValueError("there is no image to search a part of: drop or pick one, or clear the part")
    try:
        left, top, right, bottom = (float(one) / 100 for one in part.replace(",", " ").split())
    except ValueError:
        left = top = right = bottom = 0.0
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"the part {part!r:.80} is not within the image: enter left, top, right and bottom in percent, 0 to 100, "
            "such as 25, 0, 75, 50"
        )
    width, height = image.size
    x, y = min(round(left * width), width - 1), min(round(top * height), height - 1)
    return image.crop((x, y, max(round(right * width), x + 1), max(round(bottom * height), y + 1)))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _weights(entered: str) -> dict[str, float]:
    """Return the weight of each text or image that was entered, one a line."""
    return dict(map(read_labelled, _lines(entered)))


def _named_uploads(session: Session, like: dict[str, float]) -> dict[str, PILImage.Image]:
    """Return the uploads that are still needed: those to search by now, and those of the chain's steps."""
    named = set(like).union(*(_weights(step.form.like) for step in session.steps))
    return {name: image for name, image in session.uploads.items() if name in named}


def _number(entered: str, what: str) -> float | None:
    """Return a number that was entered, None where none was."""
    try:
        number = float(entered) if entered else None
    except ValueError:
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{what} is {entered!r:.80}: enter a number, such as 0.3, or clear it")
    return number


def open_upload(path: str | Path | None) -> PILImage.Image:
    """Open an uploaded image: RGB, upright, without metadata, at most `LONGEST` pixels wide and high.

    Raises:
        ValueError: if it is not an image, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with open_image(Path(path or "").resolve()) as image:  # absolute, so that a name is never a URL
            if image.width * image.height <= MAX_PIXELS:
                return clean(image, LONGEST)
            size = f"{image.width} x {image.height}"
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        why = f" ({error})" if isinstance(error, UnidentifiedImageError) else ""  # others may name files of the server
        raise ValueError(
            f"this file is not an image that can be read, or far too large: try a JPEG, PNG or WebP file{why}"
        ) from error
    raise ValueError(f"this image has {size} pixels, more than {MAX_PIXELS:,}: make it smaller first")


def clean(image: PILImage.Image, longest: int) -> PILImage.Image:
    """Keep nothing but pixels: Pillow hands EXIF on with an image, and Gradio writes it into the file it shows."""
    rgb = to_rgb(image)
    rgb.thumbnail((longest, longest))
    return PILImage.fromarray(np.asarray(rgb))


__all__ = ["MAX_PIXELS", "MOST_UPLOADS", "SHOWN", "SearchForm", "Searcher", "Session", "open_upload", "weights_of"]
