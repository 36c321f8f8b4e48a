"""A web page to search a gallery with: a picture, what should be different, and on from any of the results.

`pvlf-hf demo` opens it. As a Hub Space (SDK Gradio, requirements `pvlf-hf[demo,emoji]`) its `app.py` is

    ```python
    from pvlf_hf.web_demo import main

    main()
    ```

which, like `python -m pvlf_hf.search.web_demo`, reads the environment: `PVLF_MODEL`, a Hub name or folder;
`PVLF_GALLERY`, a folder of images, EmojiCIR without it; Gradio's own `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.

The server listens on this machine only unless told otherwise, one request at a time reaches the model, a [`Guard`]
bounds what a client may send, and every picture shown is encoded anew, so that places and names in EXIF stay behind.
"""

import html
import os
import random
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image as PILImage
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from ..data.emoji_cir.dataset import TEST_VENDOR, load_emoji_pictures
from ..digests import sequence_digest
from ..models.image_processing_pvlf import open_picture, to_rgb
from .gallery import Gallery
from .middleware import MAX_UPLOAD, Guard
from .query import FUSION, Explanation, Query, Weights

try:
    import gradio as gr
    from gradio.utils import get_upload_folder
except ImportError as error:
    raise ImportError('the web demo needs Gradio: `pip install "pvlf-hf[demo]"`') from error

SHOWN = 12
"""Pictures in the grid (ours)."""

LONGEST, THUMBNAIL, MAX_PIXELS = 1024, 400, 64 * 10**6
"""Pixels: of the longer side of an upload, of which models look at 224 to 384, and of what is shown; of a picture that
is opened at all (ours)."""

WAITING, SESSIONS, KEPT = 100, 1000, 600
"""Requests that may wait, visitors that are remembered, seconds that uploaded files stay (ours)."""

EXAMPLES = (
    ("Goog/grinning_face_with_smiling_eyes", "an astonished face"),
    ("Goog/woman_pilot_dark_skin_tone", "a man"),
    ("Goog/seven-thirty", "at half past eight"),
    ("Goog/hibiscus", "make this one a palm tree"),
    ("Goog/blue_square", "purple"),
    ("Goog/woman_astronaut", "skin medium"),
)
"""Pictures of EmojiCIR and what to change, worded as in its test split."""

CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#examples {flex-wrap: wrap; gap: 8px}
#examples button {flex: 0 1 auto; white-space: normal}
#grid .grid-wrap, #trail .grid-wrap {min-height: 0; max-height: none}
#trail .gallery-item {width: auto}
#grid .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 8px}
#grid .thumbnail-item, #trail .thumbnail-item {background: white; display: flex; align-items: center}
#grid .thumbnail-item {flex-direction: column; aspect-ratio: 5 / 6}
#grid .thumbnail-item img {flex: 1; min-height: 0; padding: 4px}
#grid .caption-label, #trail .caption-label {position: static; border: 0; background: none; color: #555}
#grid .caption-label {opacity: 1 !important}
#trail {border: 0}
#trail .grid-container {display: flex; flex-wrap: wrap; padding: 0; gap: 8px}
#trail .thumbnail-item {width: auto; height: 56px; aspect-ratio: auto; padding: 0 4px}
#trail .thumbnail-item img {width: 44px; height: 44px}
#trail .caption-label {max-width: 180px}
#balance .tab-like-container {display: none}
#balance .min_value, #balance .max_value {display: inline; font-size: 0}
#balance .min_value::before {content: "picture"; font-size: 13px}
#balance .max_value::before {content: "words"; font-size: 13px}
@media (max-width: 640px) {#grid .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr))}}
"""

LOOPBACK = ["127.0.0.1", "localhost"]

UPLOADS = "GRADIO_TEMP_DIR"
"""Of the environment: the folder of all files that Gradio keeps."""

ASK_ON = "() => document.querySelector('#text textarea, #text input').focus()"

LOOK = "() => innerWidth > 640 || document.querySelector('#heading').scrollIntoView({behavior: 'smooth'})"
"""On a phone the results stand below what was asked."""

logger = logging.get_logger(__name__)

Reference = PILImage.Image | str | None
"""The visitor's own picture, the id of one in the gallery, or none."""


class Why(NamedTuple):
    """Of an [`Explanation`] what the page shows: how much each part weighs, and where the model looked."""

    shares: dict[str, float]
    looked_at: PILImage.Image


@dataclass(frozen=True)
class Step:
    """One search of a session; its query is searched again with other weights, without an encoder."""

    reference: Reference
    query: Query = field(repr=False)
    why: Why | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Session:
    """What one visitor has done and sees; visitors share nothing but the model and the gallery.

    Args:
        steps: the chain of refinements.
        reference: of the next search.
        shown: ids of the pictures in the grid.
        scores: of the pictures in the grid, none while they are a random few to start from.
    """

    steps: tuple[Step, ...] = ()
    reference: Reference = None
    shown: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


class Searcher:
    """What the page can do, each time from one session to the next.

    Args:
        gallery: what is searched.
        folder: for the pictures that are shown.
    """

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        self.gallery, self.folder = gallery, folder
        self.row_of = {image_id: row for row, image_id in enumerate(gallery.ids)}

    def browse(self) -> Session:
        """A few pictures to start from, others each time."""
        return Session(shown=tuple(random.sample(self.gallery.ids, min(SHOWN, len(self.gallery)))))

    def pick(self, session: Session, place: int) -> Session:
        """A picture of the grid becomes the reference."""
        if not 0 <= place < len(session.shown):
            raise ValueError("this picture is no longer shown: search again, or start over")
        return replace(session, reference=session.shown[place])

    def search(self, session: Session, text: str, balance: float) -> Session:
        """Searches by the reference and the words.

        From the reference of the last step that step is replaced, from one of its results the chain goes on.
        """
        reference, text = session.reference, text.strip()
        if reference is None and not text:
            raise ValueError("nothing to search by: drop or pick a picture, say what to look for, or both")
        picture = self.gallery.picture(reference) if isinstance(reference, str) else reference
        query = self.gallery.query(picture, text or None, explain=picture is not None and bool(text))
        why = self._why(query, query.why[0]) if query.why else None
        step = Step(reference, replace(query, images=(), why=()), why)  # without megabytes of pixels and attention
        again = session.steps and session.steps[-1].reference == reference
        steps = (*(session.steps[:-1] if again else session.steps), step)
        return self.weigh(replace(session, steps=steps), balance)

    def weigh(self, session: Session, balance: float) -> Session:
        """Searches the last query with other weights; no encoder runs."""
        if not session.steps:
            return session
        step = session.steps[-1]
        weights = weights_of(balance) if has_both(step.query) else FUSION
        itself = [step.reference] if isinstance(step.reference, str) and len(self.gallery) > 1 else []
        result = self.gallery.search(query=step.query, k=SHOWN, weights=weights, exclude=itself)
        return replace(session, shown=tuple(result.ids), scores=tuple(result.scores))

    def back(self, session: Session, place: int, balance: float) -> Session:
        """Returns to a step of the chain; later ones are gone."""
        if not 0 <= place < len(session.steps):
            raise ValueError("this step is gone: search again, or start over")
        steps = session.steps[: place + 1]
        return self.weigh(replace(session, steps=steps, reference=steps[-1].reference), balance)

    def file(self, reference: Reference) -> str | None:
        """A picture as it is shown, a WebP file made when first asked for; of the gallery's, the name is the row."""
        if reference is None:
            return None
        if isinstance(reference, str):
            name = str(self.row_of[reference])
        else:
            name = sequence_digest(str(reference.size), reference.tobytes())
        file = self.folder / f"{name}.webp"
        if not file.exists():
            picture = self.gallery.picture(reference) if isinstance(reference, str) else reference
            temporary = file.with_suffix(".partial")
            clean(picture, THUMBNAIL).save(temporary, "WEBP", quality=90)
            temporary.replace(file)  # at once: another visitor may be loading it
        return str(file)

    def _why(self, query: Query, explanation: Explanation) -> Why:
        total = sum(map(abs, explanation.weights))
        shares = {
            name if weight >= 0 else f"less of the {name}": abs(weight) / total
            for name, weight in zip(("picture", "fusion of both", "words"), explanation.weights, strict=True)
        }
        seen = self.gallery.processor.process_targets(query.images[0])["pixel_values"]  # (1, 3, height, width)
        seen = (seen - seen.min()) / (seen.max() - seen.min()).clamp(min=1e-6)
        attention = explanation.patches()[None, None]  # (1, 1, rows, columns)
        light, seen = (F.interpolate(x, (256, 256), mode="bilinear")[0] for x in (attention / attention.max(), seen))
        pixels = (255 * seen * (0.25 + 0.75 * light)).byte().permute(1, 2, 0).numpy()
        return Why(shares, PILImage.fromarray(pixels))


def weights_of(balance: float) -> Weights:
    """From the picture alone, -1, over the model's own composition, 0, to the words alone, 1."""
    return max(-balance, 0.0), 1 - abs(balance), max(balance, 0.0)


def has_both(query: Query) -> bool:
    """Whether there is a picture and a text to weigh."""
    return query.image_embeds is not None and query.text_embeds is not None


def open_upload(path: str | Path | None) -> PILImage.Image:
    """Opens an uploaded picture: RGB, upright, without metadata, at most `LONGEST` pixels wide and high.

    Raises:
        ValueError: if it is no picture, or a huge one.
    """
    try:
        with open_picture(Path(path or "").resolve()) as picture:  # absolute, so that a name is never an address
            if picture.width * picture.height <= MAX_PIXELS:
                return clean(picture, LONGEST)
            size = f"{picture.width} x {picture.height}"
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        raise ValueError(
            "this file is not a picture that can be read, or far too large: try a JPEG, PNG or WebP file"
        ) from error
    raise ValueError(f"this picture has {size} pixels, more than {MAX_PIXELS:,}: make it smaller first")


def clean(picture: PILImage.Image, longest: int) -> PILImage.Image:
    """Pixels and nothing else: Pillow hands EXIF on with a picture, and Gradio writes it into the file it shows."""
    rgb = to_rgb(picture)
    rgb.thumbnail((longest, longest))
    return PILImage.fromarray(np.asarray(rgb))


class Page:
    """The page: its components, and what happens when they are used.

    Args:
        searcher: does what is asked.
        examples: ids of pictures and what to change.
    """

    def __init__(self, searcher: Searcher, examples: Sequence[tuple[str, str]]) -> None:
        self.searcher, self.examples = searcher, examples
        with gr.Blocks(title="PVLF", analytics_enabled=False, delete_cache=(60, KEPT)) as self.blocks:
            self._lay_out()
            self._connect()
        # One at a time: the model and its tokenizer are switched while they encode. Nobody skips the queue.
        self.blocks.queue(max_size=WAITING, api_open=False)

    def _lay_out(self) -> None:
        number = f"{len(self.searcher.gallery):,}"
        self.session = gr.State(Session())
        gr.Markdown(f"# This picture, *but* …\nSearch {number} pictures by a picture and what should be different.")
        still: dict[str, Any] = {"interactive": False, "buttons": []}
        strip = still | {"allow_preview": False, "object_fit": "scale-down"}
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.reference = gr.Image(
                    label="This picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=240,
                    placeholder="Drop a picture here, or pick one",
                    elem_id="reference",
                )
                self.text = gr.Textbox(
                    label="but …", placeholder="what should be different", max_length=300, elem_id="text"
                )
                with gr.Row():
                    self.button = gr.Button("Search", variant="primary", min_width=100, elem_id="search")
                    self.over = gr.Button("Start over", min_width=100, elem_id="over")
                self.balance = gr.Slider(
                    -1,
                    1,
                    0,
                    step=0.1,
                    label="Closer to the",
                    elem_id="balance",
                    buttons=[],
                )
            with gr.Column(scale=5, min_width=280):
                with gr.Row(elem_id="examples", visible=bool(self.examples)):
                    self.buttons = [
                        gr.Button(text, icon=self.searcher.file(image_id), size="sm", min_width=0)
                        for image_id, text in self.examples
                    ]
                self.trail = gr.Gallery(show_label=False, visible=False, elem_id="trail", **strip)
                self.heading = gr.Markdown(elem_id="heading")
                self.grid = gr.Gallery(show_label=False, elem_id="grid", **strip)
                with gr.Accordion("Why these?", open=False, visible=False, elem_id="why") as self.panel, gr.Row():
                    self.shares = gr.Label(label="What the query is made of", show_heading=False, min_width=200)
                    self.looked_at = gr.Image(label="Where the model looked", height=230, min_width=200, **still)

    def _connect(self) -> None:
        session, balance, reference = self.session, self.balance, self.reference
        why = [self.panel, self.shares, self.looked_at]
        results = [session, self.grid, self.heading, self.trail, balance, *why]
        everything = [*results, reference, self.text]
        begin, go = [self.blocks.load, self.over.click], [self.button.click, self.text.submit]
        _listen("start", begin, self.start, [], everything)
        # Unprocessed: what is no picture gets a sentence of ours.
        _listen("take", [reference.upload], self.take, [session, reference], [*results, reference], preprocess=False)
        _listen("drop", [reference.clear], self.drop, [session], results)
        picked = _listen("pick", [self.grid.select], self.pick, [session], [session, reference, self.text])
        picked.then(None, js=ASK_ON)
        searched = _listen("search", go, self.search, [session, self.text, balance], results)
        searched.success(None, js=LOOK)
        _listen("weigh", [balance.input], self.weigh, [session, balance], results, show_progress="hidden")
        _listen("back", [self.trail.select], self.back, [session, balance], everything)
        for number, button in enumerate(self.buttons):
            act = partial(self.example, number)
            _listen(f"example_{number}", [button.click], act, [], everything).success(None, js=LOOK)

    def start(self) -> dict[Any, Any]:
        """Pictures to start from."""
        return self._show(self.searcher.browse(), reference=None, text="", balance=0)

    def example(self, number: int) -> dict[Any, Any]:
        """The search of an example."""
        reference, text = self.examples[number]
        session = self.searcher.search(Session(reference=reference), text, 0)
        return self._show(session, reference=self.searcher.file(reference), text=text, balance=0)

    def take(self, session: Session, upload: dict[str, Any] | None) -> dict[Any, Any]:
        """The visitor gave a picture."""
        picture = open_upload((upload or {}).get("path"))
        return self._show(replace(session, steps=(), reference=picture), reference=self.searcher.file(picture))

    def drop(self, session: Session) -> dict[Any, Any]:
        """The visitor took the picture away."""
        return self._show(replace(session, steps=(), reference=None))

    def pick(self, session: Session, event: gr.SelectData) -> dict[Any, Any]:
        """A picture of the grid was clicked."""
        session = self.searcher.pick(session, event.index)
        return {self.session: session, self.reference: self.searcher.file(session.reference), self.text: ""}

    def search(self, session: Session, text: str, balance: float) -> dict[Any, Any]:
        """The search."""
        return self._show(self.searcher.search(session, text, balance))

    def weigh(self, session: Session, balance: float) -> dict[Any, Any]:
        """The slider moved."""
        return self._show(self.searcher.weigh(session, balance))

    def back(self, session: Session, balance: float, event: gr.SelectData) -> dict[Any, Any]:
        """An earlier step was clicked."""
        session = self.searcher.back(session, event.index, balance)
        step = session.steps[-1]
        return self._show(session, reference=self.searcher.file(step.reference), text=step.query.text or "")

    def _show(self, session: Session, **values: Any) -> dict[Any, Any]:
        """Everything that follows from a session, and the values of components that are named."""
        file, steps = self.searcher.file, session.steps
        captions = [f"{place} · {score:.2f}" for place, score in enumerate(session.scores, 1)]
        files: list[Any] = [file(image_id) for image_id in session.shown]
        self.grid.keep_in_cache.update(files)  # of the gallery's pictures each is made once
        why = steps[-1].why if steps else None
        blank = PILImage.new("RGB", (8, 8), "white")
        slider = {"value": values.pop("balance")} if "balance" in values else {}
        shown = {
            self.session: session,
            self.grid: gr.Gallery(list(zip(files, captions, strict=True)) if captions else files, selected_index=None),
            self.heading: "Nearest first. Click one to go on from it."
            if captions
            else "Try one of the searches above, or pick a picture to start from.",
            self.trail: gr.Gallery(
                [(file(step.reference or blank), step.query.text or "more like it") for step in steps],
                visible=len(steps) > 0,
                selected_index=None,
            ),
            self.balance: gr.Slider(interactive=not steps or has_both(steps[-1].query), **slider),
            self.panel: gr.Accordion(visible=why is not None),
            self.shares: why.shares if why else None,
            self.looked_at: why.looked_at if why else None,
        }
        return shown | {getattr(self, name): value for name, value in values.items()}


def _listen(name: str, events: Sequence[Any], act: Callable[..., Any], *places: Any, **options: Any) -> Any:
    """All visitors' events pass one by one; of those that one visitor sends faster than that, the last counts."""
    return gr.on(
        events,
        _in_sentences(act),
        *places,
        api_name=name,
        api_visibility="undocumented",
        trigger_mode="always_last",
        concurrency_id="gallery",
        concurrency_limit=1,
        **options,
    )


def _in_sentences(act: Callable[..., Any]) -> Callable[..., Any]:
    """What a `ValueError` says reaches the visitor."""

    @wraps(act)
    def wrapped(*args: Any) -> Any:
        try:
            return act(*args)
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), duration=8, print_exception=False) from error

    return wrapped


def build(gallery: Gallery, examples: Sequence[tuple[str, str]] | None = None) -> gr.Blocks:
    """Makes the page.

    Args:
        gallery: what is searched.
        examples: ids of pictures and what to change; by default those of `EXAMPLES` whose pictures the gallery has.
    """
    folder = Path(get_upload_folder(), f"shown-{uuid4().hex}").resolve()  # names are rows: each page has its own
    folder.mkdir(parents=True)
    known = set(gallery.ids)
    chosen = [example for example in EXAMPLES if example[0] in known] if examples is None else examples
    return Page(Searcher(gallery, folder), chosen).blocks


@contextmanager
def serve(gallery: Gallery, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serves the page while the context lasts, and gives its address; what visitors uploaded goes with it.

    Args:
        gallery: what is searched.
        host: address to listen on; by default only this machine can reach the page.
        port: the first free one from 7860 by default.

    Raises:
        ValueError: if host and port cannot be listened on.
    """
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:
        where = host if port is None else f"{host}, port {port}"
        raise ValueError(f"cannot listen on {where} ({error}): choose another port, or leave it out") from error
    before = os.environ.get(UPLOADS)
    with TemporaryDirectory(prefix="pvlf-demo-") as folder:
        os.environ[UPLOADS] = folder
        page = build(gallery)
        guards = [Middleware(Guard, folder=Path(folder).resolve())]
        if host in LOOPBACK:  # a page elsewhere that gives this machine a name of its own does not get in by it
            guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK))
        else:
            logger.warning(f"the demo listens on {host}: whoever reaches this machine sees the gallery's pictures")
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=MAX_UPLOAD,
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": guards},
                theme=gr.themes.Default(
                    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=CSS,
                footer_links=[],
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                prevent_thread_lock=True,
                quiet=True,
            )
            yield url
        finally:
            page.close(verbose=False)
            if before is None:
                del os.environ[UPLOADS]
            else:
                os.environ[UPLOADS] = before


def launch(gallery: Gallery, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = True) -> None:
    """Serves the page until interrupted; arguments and errors as [`serve`].

    Args:
        gallery: what is searched.
        host: address to listen on.
        port: the first free one from 7860 by default.
        open_browser: open the page.
    """
    ended, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():  # the only one that may
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # in order: nothing of the visitors' is left behind
    try:
        with serve(gallery, host, port) as url:
            sys.stdout.write(f"{len(gallery)} pictures at {url} (Ctrl+C ends it)\n")
            sys.stdout.flush()
            if open_browser:
                webbrowser.open(url)
            ended.wait()
    except KeyboardInterrupt:
        pass
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Serves what the environment names, as a Hub Space does; see the top of this file."""
    if "SPACE_ID" in os.environ:  # only its proxy reaches a Space, and says on whose behalf
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "*")
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT")
    try:
        launch(_named_gallery(), host, int(port) if port else None, open_browser=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _named_gallery() -> Gallery:
    name, pictures = os.environ.get("PVLF_MODEL"), os.environ.get("PVLF_GALLERY")
    if not name:
        raise ValueError("PVLF_MODEL is not set: name a PVLF model, a folder or one on the Hub")
    model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    if pictures:
        return Gallery.from_folder(pictures, model, processor)
    return Gallery.from_dataset(load_emoji_pictures([TEST_VENDOR]), model, processor)


__all__ = ["build", "launch", "main", "serve"]


if __name__ == "__main__":
    main()
