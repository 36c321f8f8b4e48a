"""Searches by a server (`pvlf-hf serve`) with Python's standard library alone, and prints what was found.

It is a module beside the package, most of which imports PyTorch: `pvlf-hf search --server URL` answers before that is
done.
"""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

MOST_SECONDS = 120
"""Longest wait for an answer (our choice)."""


def ask(server: str, request: dict[str, Any]) -> dict[str, Any]:
    """Send a search to a server, and return its answer.

    Args:
        server: URL of the server.
        request: what `POST /search` takes, see `pvlf_hf.search.requests.REQUEST`.

    Raises:
        ValueError: if the server refuses the request, with its sentence; or does not answer.
    """
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"--server {server}: name a URL such as http://127.0.0.1:8000")
    url, content = f"{server.rstrip('/')}/search", json.dumps(request).encode()
    posted = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(posted, timeout=MOST_SECONDS) as answered:
            found = json.load(answered)
        if "results" in found:
            return found
    except urllib.error.HTTPError as error:
        if sentence := _sentence(error.read()):
            raise ValueError(sentence) from error
    except OSError as error:
        raise ValueError(f"{server} does not answer ({error}): start it by `pvlf-hf serve INDEX`") from error
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{server} is no server of `pvlf-hf serve`: name the URL that this prints")


def request_of(terms: dict[str, Any], settings: dict[str, Any], k: int, weights: Sequence[float]) -> dict[str, Any]:
    """Return the request of a search; arguments as those of `pvlf_hf.commands.gallery.search`.

    Raises:
        ValueError: if an image is no file that can be read, or a box is not of one image.
    """
    options, box = dict(settings), settings["box"]
    del options["box"]
    if box and len(terms["images"]) != 1:
        raise ValueError(
            f"box={box!r} is a part of one image, and the query has {len(terms['images'])}: pass one image"
        )
    images = [{"image": data_url(name), "weight": weight, "box": box} for name, weight in terms["images"]]
    terms = {**terms, "images": images}
    return {key: value for key, value in terms.items() if value} | options | {"k": k, "weights": list(weights)}


def data_url(name: str) -> str:
    """Return the content of a file as a `data:` URL, and such a URL as it is."""
    if name.startswith("data:"):
        return name
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name}: the server opens no URLs; download the image, and pass the file")
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read image {name!r}: {error}") from error
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def print_found(results: list[dict[str, Any]], offset: int) -> None:
    """Print the images that were found, one a line."""
    for rank, one in enumerate(results, 1 + offset):
        folded = f"  and {len(one['folded'])} like it" if "folded" in one else ""
        typer.echo(f"{rank:>3}  {one['score']:.4f}  {one['id']}{folded}")
    if not results:
        typer.echo("nothing found: no image passes the filter and the least score from this offset on", err=True)


def warn_of(unknown_words: Sequence[str]) -> None:
    """Say on stderr which words count for nothing."""
    if unknown_words:
        words = ", ".join(unknown_words)
        typer.echo(f"the model's tokenizer does not know {words}; the search uses the rest", err=True)


def search(
    server: str,
    terms: dict[str, Any],
    settings: dict[str, Any],
    k: int,
    weights: Sequence[float],
    as_json: bool,
) -> None:
    """Search by a server, and print the results as `pvlf_hf.commands.gallery.search` does.

    The server does not tell the paths of its files: with `as_json` they are null.
    """
    found = ask(server, request_of(terms, settings, k, weights))
    warn_of(found.get("unknown_words", []))
    if as_json:
        results = [one | {"path": None} for one in found["results"]]
        typer.echo(json.dumps({"results": results, "sheet": None}, indent=2))
    else:
        print_found(found["results"], settings["offset"])


def _sentence(body: bytes) -> str:
    """Return the sentence of a refusal, empty where there is none."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return ""


__all__ = ["ask", "data_url", "print_found", "request_of", "search", "warn_of"]
