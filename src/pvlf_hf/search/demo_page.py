"""Layout and event handlers of the web demo's page."""

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from PIL import Image as PILImage
from transformers.utils import logging

from .demo_session import MAX_PIXELS, MOST_UPLOADS, Searcher, SearchForm, Session, has_both, open_upload
from .middleware import MAX_UPLOAD

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the web demo needs Gradio: `pip install "pvlf-hf[demo]"`') from error

logger = logging.get_logger(__name__)

WAITING, KEPT = 100, 600
"""Requests that may wait, and seconds that uploaded files are kept (our choice)."""

CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#examples {flex-wrap: wrap; gap: 8px}
#examples button {flex: 0 1 auto; white-space: normal}
#grid .grid-wrap, .strip .grid-wrap {min-height: 0; max-height: none}
.strip .gallery-item {width: auto}
#grid .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 8px}
#grid .thumbnail-item, .strip .thumbnail-item {background: white; display: flex; align-items: center}
#grid .thumbnail-item {flex-direction: column; aspect-ratio: 5 / 6}
#grid .thumbnail-item img {flex: 1; min-height: 0; padding: 4px}
#grid .caption-label, .strip .caption-label {position: static; border: 0; background: none; color: #555}
#grid .caption-label {opacity: 1 !important}
.strip {border: 0}
.strip .grid-container {display: flex; flex-wrap: wrap; padding: 0; gap: 8px}
.strip .thumbnail-item {width: auto; height: 56px; aspect-ratio: auto; padding: 0 4px}
.strip .thumbnail-item img {width: 44px; height: 44px}
.strip .caption-label {max-width: 180px}
#balance .tab-like-container {display: none}
#balance .min_value, #balance .max_value {display: inline; font-size: 0}
#balance .min_value::before {content: "image"; font-size: 13px}
#balance .max_value::before {content: "text"; font-size: 13px}
@media (max-width: 640px) {#grid .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr))}}
"""

ASK_ON = "() => document.querySelector('#text textarea, #text input').focus()"

LOOK = "() => innerWidth > 640 || document.querySelector('#heading').scrollIntoView({behavior: 'smooth'})"
"""Scrolls to the results, which are below the query on a phone."""


class Page:
    """Components of the page and their event handlers.

    Args:
        searcher: carries out what a visitor asks for.
        examples: ids of images and what to change.
    """

    def __init__(self, searcher: Searcher, examples: Sequence[tuple[str, str]]) -> None:
        self.searcher, self.examples = searcher, examples
        with gr.Blocks(title="PVLF", analytics_enabled=False, delete_cache=(60, KEPT)) as self.blocks:
            self._lay_out()
            self._connect()
        # One request at a time, since each takes all cores; no event bypasses the queue.
        self.blocks.queue(max_size=WAITING, api_open=False)

    def _lay_out(self) -> None:
        number = f"{len(self.searcher.gallery):,}"
        self.session = gr.State(Session())
        gr.Markdown(f"# This image, *but* …\nSearch {number} images by an image and what should be different.")
        still: dict[str, Any] = {"interactive": False, "buttons": []}
        images = still | {"allow_preview": False, "object_fit": "scale-down"}
        strip = images | {"elem_classes": "strip"}
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.reference = gr.Image(
                    label="This image",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=240,
                    placeholder="Drop an image here, or pick one",
                    elem_id="reference",
                )
                self.text = gr.Textbox(
                    label="but …", placeholder="what should be different", max_length=300, elem_id="text"
                )
                self.without = gr.Textbox(
                    label="and not …", placeholder="what to avoid", max_length=300, elem_id="without"
                )
                columns = self.searcher.gallery.metadata_names
                self.filter = gr.Textbox(
                    label="Only where …",
                    placeholder='price < 50 and brand in ("Acme", "Zen")',
                    info=f"columns: {', '.join(columns)}",
                    max_length=1000,
                    visible=bool(columns),
                    elem_id="filter",
                )
                with gr.Accordion("More ways to ask", open=False, elem_id="more"):
                    self._lay_out_more(strip)
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
                self.grid = gr.Gallery(show_label=False, elem_id="grid", **images)
                with gr.Row(visible=False, elem_id="pages") as self.pages:
                    self.earlier, self.later = (gr.Button(one, size="sm") for one in ("Earlier", "Later"))
                with gr.Accordion("Why these?", open=False, visible=False, elem_id="why") as self.panel, gr.Row():
                    self.shares = gr.Label(label="What the query is made of", show_heading=False, min_width=200)
                    self.attention = gr.Image(label="Where the model looked", height=230, min_width=200, **still)

    def _lay_out_more(self, strip: dict[str, Any]) -> None:
        """Lay out the fields that most visitors leave empty, and a strip of images."""
        with gr.Row():
            self.more = gr.Button("More like this image", size="sm", min_width=100)
            self.less = gr.Button("Less like it", size="sm", min_width=100)
        lines: dict[str, Any] = {"lines": 1, "max_lines": 6}
        self.like = gr.Textbox(
            label="Like these images",
            info="one a line: a.jpg, 2:b.jpg, -c.jpg. The buttons add the image above. Your own: up to "
            f"{MOST_UPLOADS}, each at most {MAX_UPLOAD // 2**20} MB and {MAX_PIXELS // 10**6} million pixels",
            max_length=10_000,
            elem_id="like",
            **lines,
        )
        self.uploads = gr.Gallery(show_label=False, visible=False, elem_id="uploads", **strip)
        self.also = gr.Textbox(
            label="Further texts", info="one a line: red, 2:red, -stripes", max_length=2000, elem_id="also", **lines
        )
        self.part = gr.Textbox(
            label="Only this part of the image",
            info="left, top, right, bottom in percent: 25, 0, 75, 50",
            max_length=100,
            elem_id="part",
        )
        with gr.Row():
            self.least = gr.Textbox(label="Least score", placeholder="0.3", max_length=20, min_width=100)
            self.fold = gr.Textbox(label="Fold duplicates from", placeholder="0.98", max_length=20, min_width=100)

    def _connect(self) -> None:
        session, balance, reference = self.session, self.balance, self.reference
        why = [self.panel, self.shares, self.attention]
        results = [session, self.grid, self.heading, self.trail, self.pages, self.uploads, balance, *why]
        fields = [self.text, *(getattr(self, name) for name in SearchForm._fields)]
        everything = [*results, reference, *fields]
        begin, go = [self.blocks.load, self.over.click], [self.button.click, *(one.submit for one in fields)]
        _listen("start", begin, self.start, [], everything)
        # Unprocessed, so that a file that is not an image gets our own message.
        _listen("take", [reference.upload], self.take, [session, reference], [*results, reference], preprocess=False)
        _listen("drop", [reference.clear], self.drop, [session], results)
        picked = _listen("pick", [self.grid.select], self.pick, [session], [session, reference, self.text])
        picked.then(None, js=ASK_ON)
        searched = _listen("search", go, self.search, [session, self.text, balance, *fields[1:]], results)
        searched.success(None, js=LOOK)
        for name, button, weight in (("more", self.more, 1.0), ("less", self.less, -1.0)):
            act = partial(self.add, weight)
            _listen(name, [button.click], act, [session, self.like], [session, reference, self.like, self.uploads])
        for name, button, pages in (("earlier", self.earlier, -1), ("later", self.later, 1)):
            turned = _listen(name, [button.click], partial(self.turn, pages), [session, balance], results)
            turned.success(None, js=LOOK)
        _listen("weigh", [balance.input], self.weigh, [session, balance], results, show_progress="hidden")
        _listen("back", [self.trail.select], self.back, [session, balance], everything)
        for number, button in enumerate(self.buttons):
            act = partial(self.example, number)
            _listen(f"example_{number}", [button.click], act, [], everything).success(None, js=LOOK)

    def start(self) -> dict[Any, Any]:
        """Show images to start from."""
        return self._show(self.searcher.browse(), reference=None, text="", balance=0, **SearchForm()._asdict())

    def example(self, number: int) -> dict[Any, Any]:
        """Search for an example."""
        reference, text = self.examples[number]
        session = self.searcher.search(Session(reference=reference), text, 0)
        shown = {"reference": self.searcher.file(reference), "text": text, "balance": 0}
        return self._show(session, **shown, **SearchForm()._asdict())

    def take(self, session: Session, upload: dict[str, Any] | None) -> dict[Any, Any]:
        """Take the visitor's own image."""
        image = open_upload((upload or {}).get("path"))
        return self._show(replace(session, steps=(), reference=image), reference=self.searcher.file(image))

    def drop(self, session: Session) -> dict[Any, Any]:
        """Drop the reference."""
        return self._show(replace(session, steps=(), reference=None))

    def pick(self, session: Session, event: gr.SelectData) -> dict[Any, Any]:
        """Make the clicked image of the grid the reference."""
        session = self.searcher.pick(session, event.index)
        return {self.session: session, self.reference: self.searcher.file(session.reference), self.text: ""}

    def add(self, weight: float, session: Session, like: str) -> dict[Any, Any]:
        """Move the reference to the images to search by, or away from."""
        session, like = self.searcher.like(session, like, weight)
        return {
            self.session: session,
            self.reference: None,
            self.like: like,
            self.uploads: self._show_uploads(session),
        }

    def search(self, session: Session, text: str, balance: float, *entries: str) -> dict[Any, Any]:
        """Search by the reference, the text and the fields of [`SearchForm`] that the visitor entered."""
        return self._show(self.searcher.search(session, text, balance, *entries))

    def turn(self, pages: int, session: Session, balance: float) -> dict[Any, Any]:
        """Show earlier or later results."""
        return self._show(self.searcher.turn(session, balance, pages))

    def weigh(self, session: Session, balance: float) -> dict[Any, Any]:
        """Weigh the last query as the slider says."""
        return self._show(self.searcher.weigh(session, balance))

    def back(self, session: Session, balance: float, event: gr.SelectData) -> dict[Any, Any]:
        """Return to the step that was clicked."""
        session = self.searcher.back(session, event.index, balance)
        step = session.steps[-1]
        reference = self.searcher.file(step.reference)
        return self._show(session, reference=reference, text=step.text, **step.form._asdict())

    def _show(self, session: Session, **values: Any) -> dict[Any, Any]:
        """Return the value of every component that follows from a session, and the values given by name."""
        file, steps = self.searcher.file, session.steps
        found = enumerate(zip(session.scores, session.folded, strict=True), session.offset + 1)
        captions = [f"{rank} · {score:.2f}" + f" +{alike}" * bool(alike) for rank, (score, alike) in found]
        files: list[Any] = [file(image_id) for image_id in session.shown]
        self.grid.keep_in_cache.update(files)  # each image of the gallery is made once
        why = steps[-1].why if steps else None
        blank = PILImage.new("RGB", (8, 8), "white")
        slider = {"value": values.pop("balance")} if "balance" in values else {}
        shown = {
            self.session: session,
            self.grid: gr.Gallery(list(zip(files, captions, strict=True)) if captions else files, selected_index=None),
            self.heading: "Nearest first. Click one to go on from it."
            if captions
            else "No image passes the filter and reaches the least score."
            if steps and not session.shown
            else "Try one of the searches above, or pick an image to start from.",
            self.trail: gr.Gallery(
                [(file(step.seen or blank), step.query.text or "more like it") for step in steps],
                visible=len(steps) > 0,
                selected_index=None,
            ),
            self.pages: gr.Row(visible=bool(captions)),
            self.uploads: self._show_uploads(session),
            self.balance: gr.Slider(interactive=not steps or has_both(steps[-1].query), **slider),
            self.panel: gr.Accordion(visible=why is not None),
            self.shares: why.shares if why else None,
            self.attention: why.attention if why else None,
        }
        return shown | {getattr(self, name): value for name, value in values.items()}

    def _show_uploads(self, session: Session) -> gr.Gallery:
        """Return the visitor's own images that are searched by, under their names."""
        shown = [(self.searcher.file(image), name) for name, image in session.uploads.items()]
        return gr.Gallery(shown, visible=bool(shown), selected_index=None)


def _listen(name: str, events: Sequence[Any], act: Callable[..., Any], *components: Any, **options: Any) -> Any:
    """Connect a handler; events of all visitors run one at a time, of one visitor's rapid events only the last."""
    return gr.on(
        events,
        _with_messages(act),
        *components,
        api_name=name,
        api_visibility="undocumented",
        trigger_mode="always_last",
        concurrency_id="gallery",
        concurrency_limit=1,
        **options,
    )


def _with_messages(act: Callable[..., Any]) -> Callable[..., Any]:
    """Show the visitor the message of a `ValueError`; that images cannot be read is none of theirs."""

    @wraps(act)
    def wrapped(*args: Any) -> Any:
        try:
            return act(*args)
        except OSError as error:
            logger.error(f"the images cannot be read: {error}")
            message = "the images cannot be read at the moment: try again later"
            raise gr.Error(message, duration=8, print_exception=False) from error
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), duration=8, print_exception=False) from error

    return wrapped


__all__ = ["Page"]
