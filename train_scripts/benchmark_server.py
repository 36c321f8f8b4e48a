"""Latency and throughput of `pvlf-hf serve`, side by side with plain Gradio calls.

    python train_scripts/benchmark_server.py                          # seven minutes on two idle cores
    python train_scripts/benchmark_server.py --seconds 2 --rounds 1   # to check that it runs

Two servers on this machine search the same gallery of emoji with the tiny model: `pvlf-hf serve`, and a `gr.Interface`
of the same search with Gradio's own queue. In turn, for each number of clients, as many threads send a reference image
and a text again and again, each waiting for its answer. The clients take part of the same cores. The encoder's share
is the time of its forward passes of all the time that was measured. `--write` renews the table of PERFORMANCE.md.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from measuring import described, machine, write_between
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from pvlf_hf import Gallery, load_emoji_pictures
from pvlf_hf.evaluation.results import environment

TINY = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"
TEXTS = ["as a woman", "dark skin", "make this one a horse", "not red but blue", "a flag", "half past two"]
FOUND = 10

GRADIO = """
import sys
import gradio
from transformers import AutoModel, AutoProcessor
from pvlf_hf import Gallery

index, model, port = sys.argv[1:]
made = AutoModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
gallery = Gallery.load(index, *made)

def search(image, text):
    return gallery.search(image, text).ids

gradio.Interface(search, [gradio.Image(type="pil"), "text"], "json").launch(server_port=int(port), quiet=True)
"""


class Query(NamedTuple):
    """A query, and the images that the gallery itself finds."""

    image: bytes
    text: str
    ids: list[str]


Ask = Callable[[HTTPConnection, Query], list[str]]
"""Sends a query over a connection, and returns the ids that were found."""


def ask_server(connection: HTTPConnection, query: Query) -> list[str]:
    """Send one request."""
    content, kind = form({"image": query.image, "text": query.text.encode(), "k": str(FOUND).encode()})
    found = sent(connection, "POST", "/search", content, kind)
    return [one["id"] for one in json.loads(found)["results"]]


def ask_gradio(connection: HTTPConnection, query: Query) -> list[str]:
    """Upload the image, call the function, and wait for its result, as Gradio's clients do."""
    content, kind = form({"files": query.image})
    (path,) = json.loads(sent(connection, "POST", "/gradio_api/upload", content, kind))
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    called = json.dumps({"data": [file, query.text]}).encode()
    event = json.loads(sent(connection, "POST", "/gradio_api/call/search", called, "application/json"))["event_id"]
    said = sent(connection, "GET", f"/gradio_api/call/search/{event}").decode()
    lines = said.partition("event: complete\n")[2].splitlines()
    if not lines:
        raise RuntimeError(f"Gradio answers {said:.200}")
    return json.loads(lines[0].removeprefix("data: "))[0]


def form(parts: dict[str, bytes]) -> tuple[bytes, str]:
    """Return a form with its type; all parts but texts and numbers are files."""
    lines = []
    for name, content in parts.items():
        file = f'; filename="{name}.png"\r\nContent-Type: image/png' if content.startswith(b"\x89PNG") else ""
        lines.append(f'--limit\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content)
    return b"\r\n".join([*lines, b"--limit--\r\n"]), "multipart/form-data; boundary=limit"


def sent(connection: HTTPConnection, method: str, path: str, content: bytes = b"", kind: str = "") -> bytes:
    """Return the content of an answer."""
    connection.request(method, path, content, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path} answers {answer.status}: {body[:200]!r}")
    return body


@contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """Run a server, from the time that it answers on."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError(f"{command[1:4]} ended with {process.returncode}") from None
                    time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def measured(address: str, ask: Ask, queries: list[Query], clients: int, seconds: float) -> list[float]:
    """Return the latencies of all requests that so many clients send in that time."""
    until = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        connection, latencies, row = HTTPConnection(address, timeout=300), [], number
        while (start := time.perf_counter()) < until:
            query = queries[row % len(queries)]
            if ask(connection, query) != query.ids:
                raise RuntimeError(f"{address} finds other images than the gallery for {query.text!r}")
            latencies.append(time.perf_counter() - start)
            row += 1
        connection.close()
        return latencies

    with ThreadPoolExecutor(clients) as threads:
        return [one for latencies in threads.map(client, range(clients)) for one in latencies]


def encoder(address: str) -> dict[str, float]:
    """Return what the encoder of `pvlf-hf serve` has done so far."""
    connection = HTTPConnection(address)
    return json.loads(sent(connection, "GET", "/health"))["encoder"]


def make_queries(folder: Path, images: int) -> list[Query]:
    """Write the index of a gallery of emoji, and return queries whose best images are far apart."""
    model, processor = AutoModel.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)
    emoji = load_emoji_pictures(["Goog"])
    emoji = emoji.select(range(min(images, len(emoji))))
    gallery = Gallery.from_dataset(emoji, model, processor, folder / "index")
    queries = []
    for row in range(0, len(emoji), max(1, len(emoji) // 40)):
        text, image, stream = TEXTS[row % len(TEXTS)], gallery.image(gallery.ids[row]), BytesIO()
        image.save(stream, "PNG")
        found = gallery.search(image, text, k=FOUND + 1)
        if all(a - b > 1e-5 for a, b in zip(found.scores, found.scores[1:], strict=False)):  # more than rounding
            queries.append(Query(stream.getvalue(), text, found.ids[:FOUND]))
    return queries


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure both servers in turn, and return a row for each and each number of clients."""
    queries = make_queries(folder, args.images)
    ports, index = (free_port(), free_port()), str(folder / "index")
    serve = [sys.executable, "-m", "pvlf_hf_cli", "serve", index, "--model", str(TINY), "--per-minute", "100000000"]
    gradio = [sys.executable, "-c", GRADIO, index, str(TINY), str(ports[1])]
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(lambda: defaultdict(float, latencies=[]))
    with started([*serve, "--port", str(ports[0])], ports[0]) as first, started(gradio, ports[1]) as second:
        ways = {"`pvlf-hf serve`": (first, ask_server), "Gradio": (second, ask_gradio)}
        for address, ask in ways.values():
            measured(address, ask, queries, 1, args.seconds)  # both warm
        for clients in args.clients:
            for _ in tqdm(range(args.rounds), desc=f"{clients} clients", unit="round"):
                for name, (address, ask) in ways.items():
                    row, before, start = found[name, clients], encoder(first), time.perf_counter()
                    row["latencies"] += measured(address, ask, queries, clients, args.seconds)
                    row["seconds"] += time.perf_counter() - start
                    for key, value in encoder(first).items():
                        row[f"encoder {key}"] += value - before[key]
    return [{"way": name, "clients": clients, **row} for (name, clients), row in found.items()]


def markdown(rows: list[dict[str, Any]], images: int) -> str:
    """Render the rows."""
    heads = ["", "clients", "requests a second", "p50, ms", "p95, ms", "encoder's share", "rows a batch"]
    lines = [f"**A reference image and a text, {images:,} images**", ""]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        latencies = [1000 * one for one in row["latencies"]]
        p95 = statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0]
        cells = [row["way"], row["clients"], f"{len(latencies) / row['seconds']:.1f}"]
        cells += [f"{statistics.median(latencies):.0f}", f"{p95:.0f}"]
        batches = row["encoder batches"]
        cells += (
            [f"{row['encoder seconds'] / row['seconds']:.2f}", f"{row['encoder rows'] / batches:.1f}"]
            if batches
            else ["", ""]
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print Markdown and write JSON."""
    parser = argparse.ArgumentParser(
        "benchmark_server.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="numbers of clients (1 8 64)")
    parser.add_argument("--seconds", type=float, default=20, help="of one measurement (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--images", type=int, default=3633, help="most images of the gallery (default: all 3,633)")
    parser.add_argument("--write", action="store_true", help="renew the table of PERFORMANCE.md")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs") / "benchmark_server")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = machine("tiny")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, Path(folder))
    text = markdown(rows, args.images)
    print(text, described(facts), sep="\n")
    written = {"machine": facts, "environment": environment(), "rows": rows}
    (args.output_dir / "results.json").write_text(json.dumps(written, indent=2) + "\n")
    if args.write:
        start, end = "<!-- server: written by benchmark_server.py -->", "<!-- end of server -->"
        write_between(start, end, described(facts), text)


if __name__ == "__main__":
    main()
