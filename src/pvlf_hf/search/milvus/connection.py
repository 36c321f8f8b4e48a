"""Connects to Milvus, and says what went wrong there in a sentence with its remedy.

A database is a file ending in .db (Milvus Lite, in this process, which alone can use the file) or the URL of a server.
A request is repeated for `timeout` seconds while a server does not answer; then it fails. The engine of a file is in
this process, and is waited for.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from time import monotonic, sleep
from typing import Any, TypeVar
from urllib.parse import urlsplit

OLDEST = (2, 5)
"""First version of Milvus that stores missing values and filters by them."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 3.0
"""Seconds between two attempts, doubled each time up to the longest (our choice)."""

FIRST_ANSWER = 10.0
"""Seconds that a server has to answer when it is first called, as by pymilvus's default."""

SERVE = "`milvus-lite server --data-dir FILE.db --max-workers 1`"
"""Command that lets several processes use a file, one request at a time: Milvus Lite orders no simultaneous writes."""

FULL = re.compile(r"No space left|File too large|Disk quota|disk space|Errno (27|28|122)\b", re.I)
REFUSED = re.compile(r"quota|deny|memory limit|RESOURCE_EXHAUSTED|rate limit", re.I)
GONE = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|Retry timeout|Retry run out|[Ff]ail(ed to|) connect|Connection refused"
    r"|No channel in handler"
)
RELEASED = re.compile(r"state 'released'|not loaded", re.I)

WRONG_INPUT = (6, 1100)
"""Codes of errors of Milvus about what a request says; their texts name columns, and mean nothing else."""

T = TypeVar("T")

_WRITING: defaultdict[str, Any] = defaultdict(RLock)


class MilvusDatabase:
    """An open database.

    Args:
        uri: a file ending in .db, or a server's URL (`http://user:password@host:19530/database`).
        timeout: seconds for which a request to a server is repeated.

    Attributes:
        client: a `pymilvus.MilvusClient`.
        name: the file, or the server's host, without the password.
        version: of the server.
        is_lite: whether that is Milvus Lite, in a file or served.
        collection: name of the one that requests are about; Milvus Lite does not load it again after a restart.

    Raises:
        ImportError: if `pymilvus` (for a file also `milvus-lite`) is not installed.
        ValueError: if the database cannot be opened, or the server is too old.
    """

    def __init__(self, uri: str, timeout: float = 60) -> None:
        self.uri, self.timeout, self._broken = str(uri), timeout, False
        self.is_file = "://" not in self.uri
        self.name = self.uri if self.is_file else str(urlsplit(self.uri).hostname)
        self.collection: str | None = None
        _check_uri(self.uri, self.is_file)
        remedy = (
            f"one process at a time can use a Milvus file: end the other, serve the file to both ({SERVE}), choose "
            "another file, or run a cluster"
            if self.is_file
            else "check the URL, the login, and that the cluster is running"
        )
        try:
            self.client = _connect(self.uri, min(timeout, FIRST_ANSWER))
            self.version = str(self.client.get_server_version(timeout=timeout))
            self.client.list_collections(timeout=timeout)
        except Exception as error:  # the client raises errors of gRPC and of Milvus Lite
            reason = self._hidden(_reason(error))
            raise ValueError(f"the Milvus database {self.name} cannot be opened ({reason}): {remedy}") from error
        self.is_lite = self.version.startswith("milvus_lite")
        if self.is_lite:  # it has no timestamps, of which the client would warn whenever all images are read
            logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(logging.ERROR)
        found = re.match(r"v?(\d+)\.(\d+)", self.version)
        if found and tuple(map(int, found.groups())) < OLDEST:
            raise ValueError(
                f"the server {self.name} is Milvus {self.version}, which stores no missing values: use Milvus "
                f"{_oldest()} or later"
            )

    @property
    def deadline(self) -> float | None:
        """Seconds that a server has to answer a request; None for a file."""
        return None if self.is_file else self.timeout

    def request(self, what: str, send: Callable[[Any], T]) -> T:
        """Send a request, and again, on a new connection, while the server does not answer; `timeout` seconds in all.

        Args:
            what: what the request does, for errors.
            send: sends it by a client; sent twice it must do the same as once.

        Raises:
            ConnectionError: if the server does not answer, and others as [`~MilvusDatabase.doing`].
        """
        import grpc
        from pymilvus import MilvusException

        end, pause, loaded = monotonic() + self.timeout, FIRST_PAUSE, False
        while True:
            try:
                if self._broken:
                    self.client = _connect(self.uri, max(0.1, end - monotonic()))
                    self._broken = False
                return send(self.client)
            except (MilvusException, grpc.RpcError) as error:
                if self.collection and not loaded and RELEASED.search(_reason(error)):
                    self.client.load_collection(self.collection, timeout=self.deadline)
                    loaded = True
                    continue
                self._broken = self._broken or _is(GONE, error)
                if not self._broken or monotonic() + pause > end:
                    raise self.explained(what, error) from error
            sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Turn errors of the client within the block into a sentence with its remedy.

        Raises:
            ConnectionError: if the server does not answer.
            OSError: if it has no space, or refuses to write.
            ValueError: if it refuses what was requested.
        """
        import grpc
        from pymilvus import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError) as error:
            raise self.explained(what, error) from error

    def explained(self, what: str, error: Exception) -> Exception:
        """Return the error to raise where Milvus raised one."""
        reason, where = self._hidden(_reason(error)), f"Milvus ({self.name}) cannot {what}"
        again = "and run again: what is stored stays, and is not written again"
        if _is(FULL, error):
            self.reopen()
            return OSError(f"{where}, its disk is full ({reason}): free disk space there, {again}")
        if "UNIMPLEMENTED" in reason:
            return ValueError(
                f"{where}: the server's version, {self.version}, does not know this request ({reason}): use Milvus "
                f"{_oldest()} or later"
            )
        if _is(REFUSED, error):
            return OSError(
                f"{where}: it refuses to for now ({reason}): free memory or disk space there or raise its "
                f"quota, {again}"
            )
        if _is(GONE, error):
            return ConnectionError(
                f"{where}: it has not answered within {self.timeout:g} s ({reason}): check that it is running and "
                f"can be reached, {again}"
            )
        return ValueError(f"{where}: it says {reason!r}")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let one thread at a time write to a file within the block; a server orders writes itself."""
        if not self.is_file:
            yield
            return
        with _WRITING[str(Path(self.uri).absolute())]:
            yield

    def reopen(self) -> None:
        """Open a file anew, which a failed write has left at an unknown point; its log is read up to that point."""
        if not self.is_file:
            return
        from milvus_lite.server_manager import server_manager_instance

        self.client.close()
        server_manager_instance.release_server(self.uri)
        self._broken = True  # the next request connects

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def _hidden(self, reason: str) -> str:
        """Leave the password of the URL out of a text."""
        password = None if self.is_file else urlsplit(self.uri).password
        return reason.replace(password, "***") if password else reason


def _check_uri(uri: str, is_file: bool) -> None:
    if find_spec("pymilvus") is None or (is_file and find_spec("milvus_lite") is None):
        raise ImportError("index='milvus' needs its client: pip install pymilvus milvus-lite")
    if is_file and not uri.endswith(".db"):
        raise ValueError(f"uri={uri!r}: name a file that ends in .db, or a cluster's URL, such as http://host:19530")
    if is_file and not Path(uri).absolute().parent.is_dir():
        raise ValueError(f"uri={uri!r}: there is no folder {Path(uri).absolute().parent}; make it first")


def _connect(uri: str, timeout: float) -> Any:
    """Make a client with a connection of its own.

    In pymilvus, and in gRPC below it, connections that are shared stay broken once a server was away.
    """
    from pymilvus import MilvusClient

    own = {"grpc.use_local_subchannel_pool": 1, "grpc.max_reconnect_backoff_ms": 1000}
    if uri.endswith(".db"):  # in this process, which answers no pings while it is at work
        own["grpc.keepalive_time_ms"] = 3_600_000
    return MilvusClient(uri=uri, timeout=timeout, dedicated=True, grpc_options=own)


def _oldest() -> str:
    return ".".join(map(str, OLDEST))


def _is(kind: re.Pattern[str], error: Exception) -> bool:
    """Return whether an error is of a kind."""
    return getattr(error, "code", None) not in WRONG_INPUT and kind.search(_reason(error)) is not None


def _reason(error: Exception) -> str:
    """Return the first line of what an error says."""
    code = getattr(error, "code", None)
    status = str(code()) if callable(code) else ""
    message = getattr(error, "message", None) or (error.details() if hasattr(error, "details") else None) or str(error)
    return " ".join(part for part in (status, str(message).strip().partition("\n")[0][:400]) if part)


__all__ = ["SERVE", "MilvusDatabase"]
