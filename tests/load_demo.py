"""Test the web demo under load (`python tests/load_demo.py`), and take its screenshots (`--screenshots`).

Starts the demo in its own process, as a Hub Space would, on EmojiCIR. Fifty clients then send valid and invalid
requests for a minute; every result is compared with that of the gallery itself. Each client is one behind a
proxy on this machine (`X-Forwarded-For`), because the server counts requests by address.
"""

import argparse
import asyncio
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
from PIL import Image
from transformers import AutoModel, AutoProcessor

from pvlf_hf import Gallery, load_emoji_pictures
from pvlf_hf.digests import sequence_digest
from pvlf_hf.search.demo_session import SHOWN, weights_of
from pvlf_hf.search.middleware import REQUESTS_PER_MINUTE

CARD = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"
CHROMIUM = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
TEXTS = ["as a woman", "dark skin", "make this one a horse", "not red but blue", "a flag", "half past two"]
API = "/gradio_api"
ONE_THREAD = ThreadPoolExecutor(1)  # a gallery answers one query at a time


class Refused(Exception):
    """The server refused a request with a message."""


class Client:
    """Client of one visitor, with the page's protocol: it joins the queue and waits for the outcome."""

    def __init__(self, url, name, number=0):
        self.http = httpx.AsyncClient(
            base_url=url,
            headers={"X-Forwarded-For": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"},
            timeout=60,
        )
        self.session, self.config = name, None

    async def __aenter__(self):
        self.config = (await self.http.get("/config")).json()
        return self

    async def __aexit__(self, *_):
        await self.http.aclose()

    async def post(self, path, **body):
        """Send a POST request; raise [`Refused`] if it is refused."""
        answer = await self.http.post(API + path, **body)
        if 400 <= answer.status_code < 500 or answer.status_code == 503:
            sentence = answer.json()["detail"] if "json" in answer.headers["content-type"] else answer.text
            raise Refused(answer.status_code, sentence)
        answer.raise_for_status()
        return answer.json()

    async def call(self, name, *values, event=None):
        """Send an event of the page; return the updated outputs by component number."""
        (function,) = (d for d in self.config["dependencies"] if d["api_name"] == name)
        given = iter(values)
        stateful = {c["id"] for c in self.config["components"] if c["type"] == "state"}
        data = [None if number in stateful else next(given, "") for number in function["inputs"]]
        body = {"data": data, "fn_index": function["id"], "session_hash": self.session, "event_data": event}
        joined = (await self.post("/queue/join", json=body))["event_id"]
        async with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": self.session}) as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed" and message["event_id"] == joined:
                    if not message["success"]:
                        raise Refused(message["output"]["error"])
                    return dict(zip(function["outputs"], message["output"]["data"], strict=True))
        raise ConnectionError("the stream ended before the answer")

    def component(self, elem_id):
        return next(c["id"] for c in self.config["components"] if c["props"].get("elem_id") == elem_id)

    async def upload(self, name, content):
        """Upload a file and make it the reference image."""
        (path,) = await self.post("/upload", files={"files": (name, content)})
        file = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return (await self.call("take", file))[self.component("reference")]

    async def results(self, name, *values, event=None):
        """Return the grid after an event: names of the files shown, and captions."""
        grid = (await self.call(name, *values, event=event))[self.component("grid")]["value"]
        return [(Path(cell["image"]["path"]).stem, cell["caption"]) for cell in grid]


def expected(gallery, image, text, balance=0.0, left_out=()):
    """Return the names of files, and captions, that the page should show."""
    both = image is not None and text is not None
    query = gallery.query(image, text, explain=both)
    weights = weights_of(balance) if both else (0, 1, 0)
    found = gallery.search(query=query, k=SHOWN, weights=weights, exclude=left_out)
    captions = [f"{rank} · {score:.2f}" for rank, score in enumerate(found.scores, 1)]
    return [(sequence_digest(i), caption) for i, caption in zip(found.ids, captions, strict=True)]


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Report:
    """Outcomes of all requests."""

    counts: Counter = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    sentences: set[str] = field(default_factory=set)

    @property
    def good(self):
        """Return whether all requests got correct results or a refusal with a message, and there are some of both."""
        return set(self.counts) == {"right", "refused"}

    def __str__(self):
        times = sorted(self.times)
        slow = times[int(0.95 * len(times))]
        return (
            f"{sum(self.counts.values())} requests: {dict(self.counts)}; a search took "
            f"{statistics.median(times):.2f} s (median), {slow:.2f} s (95 %)"
        )


class Visitor:
    """Visitor that sends valid and invalid requests and counts the outcomes."""

    def __init__(self, client, gallery, luck, report):
        self.client, self.gallery, self.luck = client, gallery, luck
        self.counts, self.times, self.sentences = report.counts, report.times, report.sentences

    async def check(self, wanted, name, *values, event=None):
        start = time.monotonic()
        found = await self.client.results(name, *values, event=event)
        self.times.append(time.monotonic() - start)
        wanted = await asyncio.get_running_loop().run_in_executor(ONE_THREAD, wanted)
        self.counts["right" if found == wanted else "wrong"] += 1
        return found

    async def search_and_refine(self):
        """Search with an uploaded image and a text, move the slider, refine a result, and go back: five answers."""
        luck, find = self.luck, remembered(self.gallery)
        mine, text, more = luck.choice(self.gallery.ids), luck.choice(TEXTS), luck.choice(TEXTS)
        own = sequence_digest(mine)
        balance = luck.choice([-0.5, 0.0, 0.7])
        image = self.gallery.image(mine)
        await self.client.upload(f"{own}.png", png(image))
        await self.check(lambda: find(own, text, 0.0, False), "search", text, 0)
        found = await self.check(lambda: find(own, text, balance, False), "weigh", balance)
        position = luck.randrange(len(found))
        await self.client.call("pick", event={"index": position, "value": None})
        await self.check(lambda: find(found[position][0], more, balance, True), "search", more, balance)
        back = {"index": 0, "value": None}
        await self.check(lambda: find(own, text, balance, False), "back", balance, event=back)
        await self.client.call("drop")  # then the text alone
        await self.check(lambda: find(None, more, 0.0, False), "search", more, balance)

    async def look(self):
        """Load an image of the start page, which must hold pixels and no metadata."""
        grid = (await self.client.call("start"))[self.client.component("grid")]["value"]
        answer = await self.client.http.get(f"{API}/file={self.luck.choice(grid)['image']['path']}")
        with Image.open(io.BytesIO(answer.content)) as image:
            right = answer.status_code == 200 and not image.getexif() and image.format == "WEBP"
        self.counts["right" if right else "wrong"] += 1

    async def misbehave(self):
        """Send requests that must be refused."""
        client = self.client
        passwd = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}

        async def too_fast():
            async with Client(str(client.http.base_url), "hasty", self.luck.randrange(1000, 10**5)) as hasty:
                for _ in range(REQUESTS_PER_MINUTE + 1):
                    try:
                        await hasty.post("/queue/join", content=b"{")
                    except Refused as refused:
                        if refused.args[0] != 400:
                            raise

        async def no_length():
            async def parts():
                yield b"{}"

            await client.post("/queue/join", content=parts())

        async def steal(file):
            answer = await client.http.get(f"{API}/file={file}")
            if answer.status_code == 403:
                raise Refused(answer.json()["detail"])

        await client.call("start")
        await client.call("drop")
        bad = [
            lambda: client.call("search", "  ", 0),
            lambda: client.call("search", "a flag", 99),
            lambda: client.upload("junk.png", b"no image at all"),
            lambda: client.upload("half.png", png(Image.new("RGB", (64, 64), "red"))[:70]),
            lambda: client.call("pick", event={"index": 999, "value": None}),
            lambda: client.call("back", 0, event={"index": 7, "value": None}),
            lambda: client.call("take", passwd),
            lambda: client.call("take", passwd | {"path": "http://example.com/image.png"}),
            lambda: client.post("/upload", files={"files": ("huge.png", bytes(21 * 2**20))}),
            lambda: client.post("/queue/join", content=b"x" * 2**17),
            lambda: client.post("/queue/join", content=b"{"),
            lambda: client.post("/queue/join", json={"data": [], "fn_index": 0}),
            no_length,
            lambda: steal("/etc/passwd"),
            lambda: steal("http://example.com/"),
            lambda: steal(f"{CARD}/config.json"),
        ]
        for ask in [*self.luck.sample(bad, 4), *([too_fast] if self.luck.random() < 0.05 else [])]:
            try:
                await ask()
                self.counts["not refused"] += 1
            except Refused as refused:
                self.counts["refused" if len(str(refused.args[-1])) > 12 else "refused without a sentence"] += 1
                self.sentences.add(refused.args[-1])


@cache
def remembered(gallery):
    """Return a function that computes expected answers, each once; the name of its file identifies an image."""
    ids = {sequence_digest(image_id): image_id for image_id in gallery.ids}

    @cache
    def find(name, text, balance, left_out):
        image_id = None if name is None else ids[name]
        image = None if name is None else gallery.image(image_id)
        return expected(gallery, image, text, balance, [image_id] if left_out else ())

    return find


async def visit(url, gallery, number, until, report):
    """Run one client until the time is over; requests without an answer count as lost."""
    luck = random.Random(number)
    async with Client(url, f"visitor-{number}-{time.time_ns()}", number) as client:
        visitor = Visitor(client, gallery, luck, report)
        while time.monotonic() < until:
            try:
                await luck.choice(
                    [visitor.search_and_refine, visitor.search_and_refine, visitor.look, visitor.misbehave]
                )()
            except Exception as error:
                report.counts["lost"] += 1
                print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)


def load(url, gallery, clients=50, seconds=60.0):
    """Send a mixture of requests from many clients at once.

    Args:
        url: URL of the demo.
        gallery: gallery of the same model and images to compare with, not the object that the server uses.
        clients: number of concurrent clients.
        seconds: duration during which new requests are started.
    """

    async def all_of_them():
        until = time.monotonic() + seconds
        report = Report()
        await asyncio.gather(*(visit(url, gallery, number, until, report) for number in range(clients)))
        return report

    return asyncio.run(all_of_them())


@contextmanager
def served(**environment):
    """Start the demo in its own process; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"PVLF_MODEL": str(CARD), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "pvlf_hf.search.web_demo"]
    with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if "http" in line:
                    break
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def chromium():
    """Yield a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        yield browser
        browser.close()


def screenshots(url, folder):
    """Take the README's screenshots: an example and a refinement of its second result, on desktop and phone."""
    with chromium() as browser:
        for name, width in (("web_demo", 1280), ("web_demo_mobile", 390)):
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.goto(url)
            page.get_by_role("button", name="a man").click()
            page.get_by_text("1 · ").first.wait_for()
            page.locator("#grid button").nth(1).click()
            page.wait_for_function("document.querySelector('#text textarea, #text input').value == ''")
            page.get_by_label("but …").fill("a firefighter")
            page.get_by_role("button", name="Search").click()
            page.locator("#trail").get_by_text("a firefighter").wait_for()
            page.wait_for_timeout(1000)  # animations finish
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=folder / f"{name}.png", full_page=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--screenshots", action="store_true", help=f"only draw the images in {CARD.name}")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with served() as url:
        if args.screenshots:
            return screenshots(url, CARD)
        model, processor = AutoModel.from_pretrained(CARD).eval(), AutoProcessor.from_pretrained(CARD)
        gallery = Gallery.from_dataset(load_emoji_pictures(["Goog"]), model, processor, progress=False)
        report = load(url, gallery, args.clients, args.seconds)
    print(report, *sorted(report.sentences), sep="\n")
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
