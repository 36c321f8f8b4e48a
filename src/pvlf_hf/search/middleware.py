"""ASGI middleware for a server that strangers may reach: limits request size and rate, and which files may be named.

Gradio would fetch any public URL that a request names, as an image to search by or as a file to serve, and reads
requests of any length; a demo needs neither.
"""

import json
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from transformers.utils import logging

MAX_UPLOAD, MAX_REQUEST = 20 * 2**20, 64 * 2**10
"""Most bytes of an uploaded file, enough for a phone's photograph, and of any other request (our choice)."""

MAX_API = 32 * 2**20
"""Most bytes of a request to the JSON interface (our choice): such a photograph in base64."""

REQUESTS_PER_MINUTE = 240
"""Requests that one client may send (our choice): moving a slider for half a minute takes as many."""

CLIENTS = 10_000
"""Clients tracked before entries older than a minute are evicted (our choice)."""


LOOPBACK = ["127.0.0.1", "localhost"]

logger = logging.get_logger(__name__)


def guards(
    host: str, folder: Path | None, per_minute: int = REQUESTS_PER_MINUTE, api: Collection[str] = ()
) -> list[Middleware]:
    """Return the middleware of a server that listens on a host; other arguments as [`Guard`]."""
    guards = [Middleware(Guard, folder=folder, per_minute=per_minute, api=api)]
    if host in LOOPBACK:  # against DNS rebinding: a foreign page reaches this machine by a name of its own
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK))
    else:
        logger.warning(f"the server listens on {host}: whoever reaches this machine sees the gallery's images")
    return guards


class Guard:
    """ASGI middleware that refuses requests that are too many, too large or name foreign files.

    Args:
        app: the server.
        folder: holds uploads and thumbnails, the only files that a request may name; None where it may name none.
        per_minute: requests that a client may send in a minute; pages and images are not counted.
        api: paths of the JSON interface, which takes images in its requests and names no files.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        folder: Path | None,
        per_minute: int = REQUESTS_PER_MINUTE,
        api: Collection[str] = (),
    ) -> None:
        self.app, self.folder, self.per_minute, self.api = app, folder, per_minute, api
        self.times: dict[str, deque[float]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable, send: Callable) -> None:
        """Pass a request on, or answer it with 400, 403, 411, 413 or 429."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self._refuse(scope)
        if refusal is None and scope["method"] == "POST" and not self._takes_files(scope["path"]):
            body = await _read(receive)
            refusal, receive = self._refuse_body(body), _replay(body, receive)
        if refusal is None:
            return await self.app(scope, receive, send)
        status, sentence = refusal
        key = "error" if scope["path"] in self.api else "detail"  # which Gradio's page shows
        await JSONResponse({key: sentence}, status)(scope, receive, send)

    def _takes_files(self, path: str) -> bool:
        return path in self.api or path.endswith("/upload")

    def _refuse(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        named = re.search("/(?:file|proxy)[=/](.*)", scope["path"], re.DOTALL)
        if named and not self._is_ours(named[1]):
            return 403, "only images of this gallery are served"
        if scope["method"] != "POST":
            return None
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return 411, "the request needs a Content-Length header"
        takes_files = self._takes_files(scope["path"])
        limit = MAX_API if scope["path"] in self.api else MAX_UPLOAD + MAX_REQUEST if takes_files else MAX_REQUEST
        if len(length) > 12 or int(length) > limit:
            return 413, f"this is larger than {limit >> 10:,} KB: send a smaller image, or a shorter text"
        if self._is_too_fast(scope["client"][0] if scope["client"] else ""):
            return 429, f"more than {self.per_minute} requests a minute: wait a moment, then go on"
        return None

    def _refuse_body(self, body: bytes) -> tuple[int, str] | None:
        try:
            values = [json.loads(body)]
        except (ValueError, RecursionError):
            return 400, "the request is not valid JSON"
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if isinstance(path := value.get("path"), str) and not self._is_ours(path):  # so Gradio names a file
                    return 403, "a request may only name images that were uploaded here: upload the image itself"
                values += value.values()
            elif isinstance(value, list):
                values += value
        return None

    def _is_ours(self, path: str) -> bool:
        try:
            return self.folder is not None and Path(path).resolve().is_relative_to(self.folder)
        except ValueError:  # no path at all
            return False

    def _is_too_fast(self, client: str) -> bool:
        now = time.monotonic()
        if len(self.times) > CLIENTS:
            self.times = {name: times for name, times in self.times.items() if times[-1] > now - 60}
        times = self.times.setdefault(client, deque(maxlen=self.per_minute))
        if len(times) == self.per_minute and times[0] > now - 60:
            return True
        times.append(now)
        return False


async def _read(receive: Callable) -> bytes:
    """Read the body; the server checks its length against the announced one."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Callable) -> Callable:
    """Return a `receive` that gives a body again, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again


__all__ = ["LOOPBACK", "MAX_API", "MAX_REQUEST", "MAX_UPLOAD", "REQUESTS_PER_MINUTE", "Guard", "guards"]
