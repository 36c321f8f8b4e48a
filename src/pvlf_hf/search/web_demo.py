"""Web demo: search a gallery by an image and what should be different, and refine from any result.

`pvlf-hf demo` opens it. As a Hub Space (SDK Gradio, requirements `pvlf-hf[demo,emoji]`) its `app.py` is

    ```python
    from pvlf_hf.search.web_demo import main

    main()
    ```

which, like `python -m pvlf_hf.search.web_demo`, reads the environment: `PVLF_MODEL`, as `--model`;
`PVLF_GALLERY`, a folder of images, EmojiCIR without it; Gradio's own `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.

The server listens on this machine only, unless configured otherwise. One request at a time reaches the model, and a
[`Guard`] limits what a client may send. Every image shown is re-encoded, so that EXIF data is never served.
"""

import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from ..checkpoints.loading import load_model
from ..data.emoji_cir.dataset import TEST_VENDOR, load_emoji_pictures
from .demo_page import CSS, Page
from .demo_session import Searcher
from .gallery import Gallery
from .image_search import ImageSearch
from .middleware import MAX_UPLOAD, guards

try:
    import gradio as gr
    from fastapi import FastAPI
    from gradio.utils import get_upload_folder
except ImportError as error:
    raise ImportError('the web demo needs Gradio: `pip install "pvlf-hf[demo]"`') from error

SESSIONS = 1000
"""Visitors whose sessions are kept (our choice)."""

EXAMPLES = (
    ("Goog/grinning_face_with_smiling_eyes", "an astonished face"),
    ("Goog/woman_pilot_dark_skin_tone", "a man"),
    ("Goog/seven-thirty", "at half past eight"),
    ("Goog/hibiscus", "make this one a palm tree"),
    ("Goog/blue_square", "purple"),
    ("Goog/woman_astronaut", "skin medium"),
)
"""Images of EmojiCIR and what to change, in the captions of its test split."""

UPLOADS = "GRADIO_TEMP_DIR"
"""Environment variable that names the folder of all files that Gradio keeps."""


def build(gallery: ImageSearch, examples: Sequence[tuple[str, str]] | None = None) -> gr.Blocks:
    """Make the page.

    Args:
        gallery: what is searched, in memory, in shards or in a database.
        examples: ids of images and what to change; by default those of `EXAMPLES` whose images the gallery has.
    """
    folder = Path(
        get_upload_folder(), f"shown-{uuid4().hex}"
    ).resolve()  # files are named by ids, so each page has its own
    folder.mkdir(parents=True)
    if examples is None:
        known = set(gallery.known([image_id for image_id, _ in EXAMPLES]))
        examples = [example for example in EXAMPLES if example[0] in known]
    return Page(Searcher(gallery, folder), examples).blocks


@contextmanager
def serve(gallery: ImageSearch, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page while the context lasts, and yield its URL; uploads are deleted at the end.

    Args:
        gallery: the gallery to search.
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
    with upload_folder() as folder:
        page = build(gallery)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": guards(host, folder)},
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                **_look(),
            )
            yield url
        finally:
            page.close(verbose=False)


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Yield the folder of all files that Gradio keeps within the block; they are deleted at its end."""
    before = os.environ.get(UPLOADS)
    with TemporaryDirectory(prefix="pvlf-demo-") as folder:
        os.environ[UPLOADS] = folder
        try:
            yield Path(folder).resolve()
        finally:
            if before is None:
                del os.environ[UPLOADS]
            else:
                os.environ[UPLOADS] = before


def mount(app: FastAPI, gallery: ImageSearch, path: str) -> None:
    """Add the page to a server, within [`upload_folder`]; the server's own middleware guards it."""
    page = build(gallery)
    page.state_session_capacity = SESSIONS
    gr.mount_gradio_app(app, page, path, **_look())


def _look() -> dict[str, Any]:
    """Return how Gradio shows the page, and what it leaves out."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    shown = {"theme": gr.themes.Default(primary_hue="indigo", **fonts), "css": CSS, "footer_links": []}
    left_out = ("ssr_mode", "pwa", "mcp_server", "enable_monitoring")
    return shown | dict.fromkeys(left_out, False) | {"max_file_size": MAX_UPLOAD}


def launch(gallery: ImageSearch, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = True) -> None:
    """Serve the page until interrupted; arguments and errors as [`serve`].

    Args:
        gallery: the gallery to search.
        host: address to listen on.
        port: the first free one from 7860 by default.
        open_browser: open the page.
    """
    ended, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():  # the only thread that may
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # so that no upload is left behind
    try:
        with serve(gallery, host, port) as url:
            sys.stdout.write(f"{len(gallery)} images at {url} (Ctrl+C ends it)\n")
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
    """Serve the gallery that the environment names, as a Hub Space does; see the top of this file."""
    if "SPACE_ID" in os.environ:  # only the Hub's proxy reaches a Space, and names the client
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "*")
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT")
    try:
        launch(_named_gallery(), host, int(port) if port else None, open_browser=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _named_gallery() -> Gallery:
    name, images = os.environ.get("PVLF_MODEL"), os.environ.get("PVLF_GALLERY")
    if not name:
        raise ValueError("PVLF_MODEL is not set: name a PVLF model, a folder or one on the Hub")
    model, processor = load_model(name)
    if images:
        return Gallery.from_folder(images, model, processor)
    return Gallery.from_dataset(load_emoji_pictures([TEST_VENDOR]), model, processor)


__all__ = ["build", "launch", "main", "mount", "serve", "upload_folder"]


if __name__ == "__main__":
    main()
