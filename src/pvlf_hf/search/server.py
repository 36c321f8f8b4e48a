"""Serves a gallery over HTTP: `POST /search`, `/search/batch` and `/v1/embeddings`, `GET /health`, and the web page.

Requests and answers are JSON; a search also takes a form with images (`multipart/form-data`). What cannot be answered
gets a status of 4xx or 503 and `{"error": "what is wrong and what to do"}`. The page `/docs` describes all of it, as
`/openapi.json` does for other programs; `/page` is the web demo, where Gradio is installed.

Every request has a thread, which reads it and decodes its images; [`ComputeThread`] encodes those that arrive together
in one batch. The demo's [`Guard`] limits what a client may send, and the server answers 503 with `Retry-After` when
`MOST_ADMITTED` queries wait. It answers from the gallery as it was when it was loaded. Images may be in memory, in
shards or in a database ([`ImageSearch`]): while shards cannot be read, or a database is away, answers are 503.
"""

import asyncio
import base64
import copy
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from transformers.utils import logging

from ..models.image_processing_pvlf import MAX_BYTES
from .api_page import api_page, described
from .batching import Abandoned, BatchedModel, Budget, ComputeThread, LockedTokenizer
from .image_search import ImageSearch
from .middleware import MAX_REQUEST, guards
from .query import Query
from .requests import MOST_PIXELS, REQUEST, ParsedRequest, answer_of, open_content, query_of, read
from .terms import MOST_TERMS

try:
    from anyio import CapacityLimiter, to_thread
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError('the server needs FastAPI: `pip install "pvlf-hf[serve]"`') from error

logger = logging.get_logger(__name__)

MOST_QUERIES, MOST_ADMITTED = 256, 512
"""Queries of a batch, or inputs to embed, and those that are in work or wait at the same time (our choice)."""

MOST_BYTES = 2**29
"""Bytes of the requests that are in work or wait at the same time (our choice)."""

THREADS = 32
"""Requests that are read and decoded at the same time (our choice)."""

PER_MINUTE = 6000
"""Requests that one client may send in a minute (our choice): a hundred a second."""

API = ("/search", "/search/batch", "/v1/embeddings")

EMBEDDED = ("text", "texts", "images", "ids")
"""Keys of a request that its query is made of."""

GONE = 499
"""Status of a request whose client has gone, as nginx has it; nobody receives it."""


class Answer(JSONResponse):
    """JSON in ASCII: any text of a request can be said again in a refusal, lone surrogates too."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of an answer."""
        return json.dumps(content, allow_nan=False).encode()


class Service:
    """Answers of a server, within a `with` block.

    Args:
        gallery: what is searched; its model is not changed.
        name: of the model.
    """

    def __init__(self, gallery: ImageSearch, name: str) -> None:
        self.name, self.thread = name, ComputeThread()
        self.gallery, processor = copy.copy(gallery), copy.copy(gallery.processor)
        padding = processor.tokenizer.pad_token_id
        self.gallery.model = BatchedModel(gallery.model, self.thread, padding)  # type: ignore[assignment]
        self.gallery.processor, processor.tokenizer = processor, LockedTokenizer(processor.tokenizer)
        self.pixels, self.threads = Budget(2 * MOST_PIXELS), CapacityLimiter(THREADS)
        self.admitted = self.bytes = 0

    def __enter__(self) -> "Service":
        self.thread.__enter__()
        self.thread.run(self.gallery.prepare)  # once, before the first request
        return self

    def __exit__(self, *_: Any) -> None:
        self.thread.__exit__()

    async def search(self, request: Request) -> Answer:
        """Find the images that a query of images, texts and indexed images is nearest to.

        Send JSON, or a form whose files are named image and whose fields have the same names as the keys of the JSON
        (text and filter as they are, all others in JSON: k=5, ids=["a.jpg"]). Weights and boxes of images need JSON.

        Answers {"results": [{"id", "score", "metadata", "folded"}, ...], "offset"}, best first; metadata and folded,
        the ids of near-duplicates, where there are some; and "unknown_words" of the texts, which count for nothing.
        """
        with self._admitted(request):
            body, uploads = await self._read(request)
            (found,) = await self._run(request, partial(self._answer, body, uploads))
        return Answer(found)

    async def batch(self, request: Request) -> Answer:
        """Answer several searches, {"queries": [...]}, each as POST /search takes it.

        Answers {"answers": [...]} in their order, each as POST /search does, or {"error"} for one that is refused.
        """
        with self._admitted(request):
            body, _ = await self._read(request, forms=False)
            queries = body.get("queries") if isinstance(body, dict) and len(body) == 1 else None
            if not isinstance(queries, list) or not 1 <= len(queries) <= MOST_QUERIES:
                raise ValueError(f'pass {{"queries": [...]}}, a list of 1 to {MOST_QUERIES} searches')
            with self._admitted(request, len(queries) - 1):
                answers = await self._run(request, *(partial(self._answer_or_error, one) for one in queries))
        return Answer({"answers": answers})

    async def embeddings(self, request: Request) -> Answer:
        """Embed texts and images, in the form that clients of the common embeddings endpoint send and expect.

        {"input": ..., "model", "encoding_format": "float" or "base64"}: the input is a text, an image as a data: URL,
        or a list of them. Here it may also be a query that is composed: an object with text, texts, images or ids as
        POST /search takes them. The model may be left out; dimensions is that of the embeddings; user is not read.

        Answers {"object": "list", "data": [{"object": "embedding", "index", "embedding"}, ...], "model", "usage"}.
        Embeddings have length 1; usage counts the tokens of texts.
        """
        with self._admitted(request):
            body, _ = await self._read(request, forms=False)
            inputs, as_base64 = self._inputs(body)
            with self._admitted(request, len(inputs) - 1):
                embedded = await self._run(request, *(partial(self._embed, one, as_base64) for one in inputs))
        data = [{"object": "embedding", "index": row, "embedding": one} for row, (one, _) in enumerate(embedded)]
        tokens = sum(number for _, number in embedded)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Answer({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def health(self) -> dict[str, Any]:
        """Return whether the server is ready, its model and the number of images; and what the encoder has done."""
        images = await to_thread.run_sync(len, self.gallery)  # a database counts them
        done = {"batches": self.thread.batches, "rows": self.thread.rows, "seconds": self.thread.seconds}
        return {"status": "ready", "model": self.name, "images": images, "encoder": done}

    @contextmanager
    def _admitted(self, request: Request, queries: int = 1) -> Iterator[None]:
        """Count queries and bytes within the block; raise a 503 if there are too many."""
        size = int(request.headers["content-length"]) if queries == 1 else 0  # the guard wants it
        if self.admitted + queries > MOST_ADMITTED or self.bytes + size > MOST_BYTES:
            sentence = f"{self.admitted} queries wait already: send it again in a moment"
            raise HTTPException(503, sentence, {"Retry-After": "1"})
        self.admitted, self.bytes = self.admitted + queries, self.bytes + size
        try:
            yield
        finally:
            self.admitted, self.bytes = self.admitted - queries, self.bytes - size

    async def _read(self, request: Request, forms: bool = True) -> tuple[Any, list[bytes]]:
        """Return the values of a request, and its files."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return await to_thread.run_sync(_parsed, await request.body()), []
        if kind == "multipart/form-data" and forms:
            limits: dict[str, int] = {
                "max_files": MOST_TERMS,
                "max_fields": len(REQUEST),
                "max_part_size": MAX_REQUEST,
            }
            async with request.form(**limits) as form:
                return await to_thread.run_sync(_form_values, form.multi_items())
        others = ", or a form with images as multipart/form-data" if forms else ""
        raise HTTPException(415, f"the content is {kind or 'of no type'!r}: send application/json{others}")

    async def _run(self, request: Request, *works: Callable[[], Any]) -> list[Any]:
        """Run what a request needs, each part in a thread, unless its client goes."""
        gone = threading.Event()
        watching = asyncio.create_task(_watch(request, gone))
        try:
            runs = (to_thread.run_sync(self._attend, work, gone, limiter=self.threads) for work in works)
            return list(await asyncio.gather(*runs))
        finally:
            watching.cancel()

    def _attend(self, work: Callable[[], Any], gone: threading.Event) -> Any:
        with self.thread.present(gone):
            if gone.is_set():
                raise Abandoned
            return work()

    def _answer(self, request: Any, uploads: list[bytes]) -> dict[str, Any]:
        parsed = read(self.gallery.processor, request, [open_content(content) for content in uploads])
        query = self._query(parsed)
        return answer_of(parsed, self.thread.run(partial(self.gallery.search, query=query, **parsed.settings)))

    def _answer_or_error(self, request: Any) -> dict[str, Any]:
        try:
            return self._answer(request, [])
        except OSError:  # not this search alone
            raise
        except ValueError as error:
            return {"error": str(error)}

    def _query(self, parsed: ParsedRequest) -> Query:
        """Encode a query; its decoded images are gone afterwards."""
        with self.pixels.taking(parsed.pixels):
            return replace(query_of(self.gallery, parsed), images=())

    def _inputs(self, body: Any) -> tuple[list[dict[str, Any]], bool]:
        """Return the inputs to embed as searches, and whether embeddings are wanted in base64."""
        known = {"input", "model", "encoding_format", "dimensions", "user"}
        if not isinstance(body, dict) or not {"input"} <= {*body} <= known:
            raise ValueError(f"pass an object with input, and at most the keys {sorted(known)}")
        expected = {
            "model": (None, self.name),
            "encoding_format": (None, "float", "base64"),
            "dimensions": (None, self.gallery.model.embedding_width),
        }
        for key, values in expected.items():
            if body.get(key) not in values:
                raise ValueError(f"{key}={body[key]!r:.80}: pass {values[-1]!r}, or leave it out")
        given = body["input"]
        inputs = given if isinstance(given, list) else [given]
        if not 1 <= len(inputs) <= MOST_QUERIES:
            raise ValueError(f"input has {len(inputs):,} parts: pass 1 to {MOST_QUERIES}")
        return list(map(_as_search, inputs)), body.get("encoding_format") == "base64"

    def _embed(self, request: dict[str, Any], as_base64: bool) -> tuple[list[float] | str, int]:
        """Embed one input: its embedding, and the number of tokens of its texts."""
        processor = self.gallery.processor
        parsed = read(processor, request)
        query = self._query(parsed)
        if query.combine is not None:
            raise ValueError("this model's composition scores by two similarities: embed image and text separately")
        embedding = query.embed().numpy().astype("<f4")
        texts = [text for text in (parsed.terms.get("text"), *parsed.terms.get("texts", ())) if text]
        limits = {"truncation": True, "max_length": processor.max_text_length}
        tokens = sum(len(processor.tokenizer(text, **limits)["input_ids"]) for text in texts)
        return base64.b64encode(embedding.tobytes()).decode() if as_base64 else embedding.tolist(), tokens


def create_app(
    gallery: ImageSearch, name: str, host: str = "127.0.0.1", per_minute: int = PER_MINUTE, page: bool = True
) -> FastAPI:
    """Make the ASGI application.

    Args:
        gallery: the gallery to search.
        name: of the model, as answers say it.
        host: address that the server listens on; on this machine's own it answers to no other name.
        per_minute: requests that a client may send in a minute.
        page: mount the web demo at /page, where Gradio is installed. It needs all requests of a visitor to reach the
            same process.
    """
    service, stack = Service(gallery, name), ExitStack()
    folder = None
    if page and (page := find_spec("gradio") is not None):
        from . import web_demo

        folder = stack.enter_context(web_demo.upload_folder())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with stack, service:
            yield

    app = FastAPI(
        title="pvlf-hf",
        version=version("pvlf-hf"),
        description=f"Composed image retrieval: {len(gallery):,} images, model {name}.",
        docs_url=None,  # it would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        middleware=guards(host, folder, per_minute, API),
    )
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    for path, endpoint in zip(API, (service.search, service.batch, service.embeddings), strict=True):
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=described(path), response_class=Answer)
    app.add_api_route("/health", service.health, methods=["GET"])
    hidden: dict[str, Any] = {"methods": ["GET"], "include_in_schema": False}
    app.add_api_route("/docs", lambda: HTMLResponse(api_page(app.openapi())), **hidden)
    app.add_api_route("/", lambda: RedirectResponse("/page" if page else "/docs"), **hidden)
    if page:
        web_demo.mount(app, service.gallery, "/page")
    return app


async def _watch(request: Request, gone: threading.Event) -> None:
    """Note when the client of a request that was read has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is not valid JSON ({error}): see /docs") from error


def _form_values(items: list[tuple[str, str | UploadFile]]) -> tuple[dict[str, Any], list[bytes]]:
    """Return the values of a form as those of JSON, and the contents of its files."""
    values: dict[str, Any] = {}
    files = []
    for name, value in items:
        if isinstance(value, UploadFile):
            if name != "image":
                raise ValueError(f"the form has a file named {name!r:.80}: name each of them image")
            files.append(value.file.read(MAX_BYTES))
        elif name in values:
            raise ValueError(f"the form has {name!r:.80} twice: pass it once; several texts go to texts, in JSON")
        elif name in ("text", "filter") or name not in REQUEST:
            values[name] = value
        else:
            try:
                values[name] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}={value!r:.80} is not valid JSON ({error}): see /docs") from error
    return values, files


def _as_search(one: Any) -> dict[str, Any]:
    """Return an input to embed as a search."""
    if isinstance(one, str):
        return {"images": [one]} if one.startswith("data:") else {"text": one}
    if not isinstance(one, dict) or not {*one} <= {*EMBEDDED}:
        raise ValueError(f"input holds {one!r:.80}: pass texts, data: URLs, or objects with the keys {[*EMBEDDED]}")
    return one


def _refuse(_: Request, error: Exception) -> Answer:
    return Answer({"error": str(error)}, 422)


def _postpone(_: Request, error: Exception) -> Answer:
    logger.error(f"the images cannot be read: {error}")
    sentence = "the images cannot be read at the moment, and the server's log says why: try again later"
    return Answer({"error": sentence}, 503, headers={"Retry-After": "10"})


def _refuse_status(request: Request, error: StarletteHTTPException) -> Answer:
    sentences = {
        404: f"there is no {request.url.path} here: see /docs",
        405: f"{request.url.path} does not take {request.method}: see /docs",
    }
    sentence = sentences.get(error.status_code, error.detail)
    return Answer({"error": sentence}, error.status_code, headers=error.headers)


def _fail(_: Request, error: Exception) -> Answer:
    return Answer({"error": "the server failed at this request, and its log says why"}, 500)


def _leave(_: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


HANDLERS: dict[type[Exception], Callable[..., Response]] = {
    OSError: _postpone,
    ValueError: _refuse,
    StarletteHTTPException: _refuse_status,
    Abandoned: _leave,
    ClientDisconnect: _leave,
    Exception: _fail,
}

__all__ = ["Service", "create_app"]
