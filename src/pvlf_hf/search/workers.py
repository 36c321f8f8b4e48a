"""Runs the server's application in one or several processes, which are replaced without losing a request."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

try:
    import uvicorn
    from fastapi import FastAPI
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.supervisors import Multiprocess
except ImportError as error:
    raise ImportError('the server needs FastAPI and uvicorn: `pip install "pvlf-hf[serve]"`') from error

GRACE, START = 10, 120
"""Seconds that requests may take when the server ends, and that a worker may take to start (our choice)."""

FIRST_REQUEST = 1.0
"""Seconds that an ending worker waits for the request of a connection that has sent none (our choice)."""


class PatientProtocol(H11Protocol):
    """A connection that an ending worker closes after its first request.

    uvicorn closes a connection at once whose request has not arrived yet: its client, which connected a moment before
    the worker ended, would read "connection reset". Here the request is waited for and answered.
    """

    _deadline: float | None = None

    def shutdown(self) -> None:
        """Close the connection when its request is answered, or when none arrives in `FIRST_REQUEST` seconds."""
        now = self.loop.time()
        self._deadline = self._deadline or now + FIRST_REQUEST
        if self.transport.is_closing():
            return
        if self.cycle is None and now < self._deadline:
            self.loop.call_later(0.02, self.shutdown)
        else:
            super().shutdown()


def serve(make: Callable[[str, bool], FastAPI], host: str, port: int, workers: int = 1) -> None:
    """Serve an application until interrupted.

    Args:
        make: makes the application for a host, with the web page or without; of several workers each calls it, in a
            process of its own.
        host: address to listen on.
        port: port; 0 for a free one.
        workers: processes.

    Raises:
        ValueError: if host and port cannot be listened on, and as `make`.
    """
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): choose another port") from error
    listener.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )  # else an answer waits 40 ms for the client's system
    url = f"http://{host}:{listener.getsockname()[1]}"
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": GRACE}
    options["http"] = PatientProtocol
    before = signal.getsignal(signal.SIGTERM)
    try:
        app = make(host, workers == 1)  # of several workers too, so that what is wrong is said before they start
        print_url(url, f", {workers} workers" if workers > 1 else "")
        if threading.current_thread() is threading.main_thread():  # the only thread that may
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
        if workers == 1:
            uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])
        else:
            del app
            # Threads of several processes that wait for the same cores make each other slower.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
            options |= {"factory": True, "workers": workers, "timeout_worker_healthcheck": START}
            Multiprocess(uvicorn.Config(partial(_of_worker, make, host), **options), sockets=[listener]).run()
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def print_url(url: str, more: str = "") -> None:
    """Print where the server is."""
    sys.stdout.write(f"serving at {url}{more}; {url}/docs describes it (Ctrl+C ends it)\n")
    sys.stdout.flush()


def _of_worker(make: Callable[[str, bool], FastAPI], host: str) -> FastAPI:
    """Make the application of one of several workers; where the index has become unusable, say so and end."""
    try:
        return make(host, False)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(3)  # uvicorn starts a worker again unless it ends like this
