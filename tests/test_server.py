"""`pvlf-hf serve`: real servers and real clients, answers compared with those of the gallery itself."""

import base64
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_bounds import squares_error
from PIL import Image
from squares import COLOURS, draw, save_squares
from test_search_options import ROWS, TEXT, data_url, make_training_free
from tiny import VOCABULARY, make_model
from transformers import BertTokenizer
from typer.testing import CliRunner

from pvlf_hf import Gallery, PVLFImageProcessor, PVLFProcessor
from pvlf_hf.search.requests import REQUEST
from pvlf_hf.search.shard_sets import gallery_to_shards
from pvlf_hf.search.sharded_gallery import ShardedGallery
from pvlf_hf.search.shards import write_part
from pvlf_hf.search.terms import MOST_TERMS
from pvlf_hf_cli import app as command_line

uvicorn = pytest.importorskip("uvicorn")
server_module = pytest.importorskip("pvlf_hf.search.server")
workers_module = pytest.importorskip("pvlf_hf.search.workers")

WORDS = {"b": "dress", "c": "stripes", "d": "sleeves"}
"""Letters of the tiny vocabulary, and words of the examples in the help that take their place."""


CLIENT = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def made():
    vocabulary = {WORDS.get(word, word): number for word, number in VOCABULARY.items()}
    images = PVLFImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return make_model(), PVLFProcessor(images, BertTokenizer(vocab=vocabulary))


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """Nine squares, their metadata, the model and an index, as files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "photos").mkdir()
    save_squares(folder / "photos")
    lines = [",".join("" if ROWS[c][row] is None else str(ROWS[c][row]) for c in ROWS) for row in range(9)]
    (folder / "table.csv").write_text("\n".join([",".join(ROWS), *lines]))
    for part in made:
        part.save_pretrained(folder / "model")
    where = {"path": folder / "index", "metadata": folder / "table.csv", "progress": False}
    Gallery.from_folder(folder / "photos", *made, **where)
    return folder


@pytest.fixture(scope="module")
def gallery(files, made):
    return Gallery.load(files / "index", *made)


@contextmanager
def served(gallery, **options):
    """A server in a thread of this process: its address, its service and uvicorn."""
    services = []

    class Service(server_module.Service):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            services.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "Service", Service)
        app = server_module.create_app(gallery, "tiny", **{"page": False, **options})
    with running(app) as (address, server):
        yield address, services[0], server


@contextmanager
def running(app):
    """A server of an application, in a thread of this process: its address, and uvicorn."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(gallery):
    with served(gallery) as (address, _, _):
        yield address


@pytest.fixture
def gate(made):
    """Holds the text encoder back while it is closed, and fails for texts that say `hat`; counts the rows it sees."""

    class Gate:
        def __init__(self):
            self.open, self.entered, self.rows = threading.Event(), threading.Event(), []

        def __call__(self, _, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.rows.append(len(ids))
            self.entered.set()
            assert self.open.wait(30)
            if (ids == VOCABULARY["hat"]).any():
                raise RuntimeError("no hats")

    gate = Gate()
    hook = made[0].backbone.text_encoder.register_forward_pre_hook(gate, with_kwargs=True)
    yield gate
    gate.open.set()
    hook.remove()


def ask(url, request, path="/search"):
    return CLIENT.post(url + path, json=request)


def check(answer, gallery, **arguments):
    """The answer has the images and scores that the gallery finds, up to the rounding of batches."""
    assert answer.status_code == 200, answer.text
    results, error = answer.json()["results"], 2 * squares_error()["similarity"]
    everything = gallery.search(**{**arguments, "k": 9})
    expected = dict(zip(everything.ids, everything.scores, strict=True))
    scores = [one["score"] for one in results]
    assert scores == pytest.approx([expected[one["id"]] for one in results], abs=error)
    assert scores == pytest.approx(everything.scores[: len(scores)], abs=error)  # the best of them, in order
    assert len(results) == min(arguments.get("k", 10), len(expected))


# --- answers --------------------------------------------------------------------------------------------------------


def query(number):
    """One of many queries, all different: as a request, and as Python asks it."""
    luck = random.Random(number)
    row, texts = (
        luck.randrange(9),
        luck.sample(["red", "the blue dress", "dark but not green", "more hats", "a dog"], 2),
    )
    weighted = {texts[0]: 1 + number / 100, texts[1]: luck.choice([0.5, -0.5])}
    plain = {"k": luck.randrange(1, 10)} | luck.choice([{}, {"filter": "price < 65"}, {"exclude": ["red.png"]}])
    image = {"images": [data_url(draw(row))]}, {"image": draw(row)}
    ids = {"ids": {COLOURS[row] + ".png": 1.5}}
    terms = luck.choice([({}, {}), image, (ids, ids)])
    return terms[0] | {"texts": weighted} | plain, terms[1] | {"texts": weighted} | plain


@pytest.mark.reliability(
    5,
    "64 clients of `pvlf-hf serve` at once, all queries different and encoded in batches: each gets its own answer",
    broken=("src/pvlf_hf/search/batching.py", "part.split(sizes)", "part.roll(1, 0).split(sizes)"),
)
def test_concurrent_clients_get_their_own_answers(gallery, figure):
    queries = [query(number) for number in range(64)]
    with served(gallery) as (url, service, _), ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda one: ask(url, one[0]), queries))
        batches, rows = service.thread.batches, service.thread.rows
    for answer, (_, python) in zip(answers, queries, strict=True):
        check(answer, gallery, **python)
    assert batches < rows / 4  # it did compute in batches
    figure("64 queries, all different, 0 wrong")


def test_a_request_searches_as_python_does(url, gallery):
    big = Image.new("RGB", (64, 96), "black")
    big.paste(draw(3), (20, 40))
    request = {
        "images": [{"image": data_url(big), "weight": 2, "box": [20, 40, 52, 72]}],
        "texts": {TEXT: 1, "dog": -1},
    }
    settings = {"k": 3, "offset": 1, "min_score": -1, "fold": 0.9999, "filter": "price > 15 or price is null"}
    said = ask(url, request | settings).json()
    found = gallery.search([(draw(3), 2)], texts={TEXT: 1, "dog": -1}, **settings)
    assert [one["id"] for one in said["results"]] == found.ids and said["offset"] == 1
    assert set(said["results"][0]["metadata"]) == {*ROWS} - {"file_name"} and "unknown_words" not in said
    assert ask(url, {"text": "red zebra"}).json()["unknown_words"] == ["zebra"]
    assert ask(url, {"text": "red", "filter": "price < 0"}).json()["results"] == []


def test_a_form_searches_as_json_does(url, gallery):
    images = [("image", (f"{row}.png", png(draw(row)), "image/png")) for row in (0, 4)]
    fields = {"text": TEXT, "k": "3", "filter": "price < 65", "exclude": '["red.png"]', "weights": "[0.5, 1, 0]"}
    answer = httpx.post(url + "/search", files=images, data=fields)
    same = {"k": 3, "filter": "price < 65", "exclude": ["red.png"], "weights": (0.5, 1, 0)}
    check(answer, gallery, image=[draw(0), draw(4)], text=TEXT, **same)
    check(httpx.post(url + "/search", files=images[1:]), gallery, image=draw(4))


def test_a_batch_answers_each_query_for_itself(url, gallery):
    queries = [query(number) for number in range(40)]
    wrong = {"ids": ["nobody"]}
    answers = ask(
        url,
        {"queries": [*(one for one, _ in queries[:20]), wrong, *(one for one, _ in queries[20:])]},
        "/search/batch",
    )
    assert answers.status_code == 200
    answers = answers.json()["answers"]
    assert "ids names ['nobody'], which are not in the gallery" in answers.pop(20)["error"]
    for answer, (_, python) in zip(answers, queries, strict=True):
        check(httpx.Response(200, json=answer), gallery, **python)


def test_embeddings_have_the_common_form(url, gallery):
    composed = {"images": [data_url(draw(1))], "text": TEXT}
    inputs = [TEXT, data_url(draw(0)), composed, {"ids": ["lime.png"]}]
    said = ask(url, {"input": inputs, "model": "tiny", "user": "me"}, "/v1/embeddings").json()
    rows = [
        gallery.query(text=TEXT),
        gallery.query(draw(0)),
        gallery.query(draw(1), TEXT),
        gallery.query(ids=["lime.png"]),
    ]
    expected = np.stack([one.embed().numpy() for one in rows])
    assert said.keys() == {"object", "data", "model", "usage"} and said["object"] == "list" and said["model"] == "tiny"
    assert [(one["object"], one["index"]) for one in said["data"]] == [("embedding", row) for row in range(4)]
    found = np.array([one["embedding"] for one in said["data"]])
    assert found == pytest.approx(expected, abs=squares_error()["query_embeds"])
    assert said["usage"] == {"prompt_tokens": 12, "total_tokens": 12}  # four words and two ends, twice
    same = ask(url, {"input": inputs, "encoding_format": "base64", "dimensions": 32}, "/v1/embeddings").json()["data"]
    packed = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in same]
    assert np.stack(packed) == pytest.approx(expected, abs=squares_error()["query_embeds"])
    assert len(ask(url, {"input": TEXT}, "/v1/embeddings").json()["data"]) == 1


def test_a_composition_that_is_no_embedding_is_searched_by_and_not_embedded(files):
    gallery = Gallery.from_folder(files / "photos", *make_training_free(composition="product"), progress=False)
    with served(gallery) as (url, _, _):
        check(ask(url, {"images": [data_url(draw(0))], "text": TEXT}), gallery, image=draw(0), text=TEXT)
        refused = ask(url, {"input": {"images": [data_url(draw(0))], "text": TEXT}}, "/v1/embeddings")
        assert refused.status_code == 422 and "embed image and text separately" in refused.json()["error"]
        assert ask(url, {"input": TEXT}, "/v1/embeddings").status_code == 200


def test_a_server_answers_from_the_index_that_it_loaded(files, made, tmp_path):
    shutil.copytree(files / "photos", tmp_path / "photos")
    where = {"path": tmp_path / "index", "progress": False}
    Gallery.from_folder(tmp_path / "photos", *made, **where)
    loaded = Gallery.load(tmp_path / "index", *made)
    before = loaded.search(draw(0), TEXT, k=9)
    with served(loaded) as (url, _, _):
        (tmp_path / "photos" / "red.png").unlink()
        draw(1).rotate(90).save(tmp_path / "photos" / "zebra.png")
        assert len(Gallery.from_folder(tmp_path / "photos", *made, **where)) == 9
        answer = ask(url, {"images": [data_url(draw(0))], "text": TEXT, "k": 9}).json()["results"]
        assert sorted(one["id"] for one in answer) == sorted(before.ids)
        error = ask(url, {"ids": ["red.png"], "text": TEXT}).json()["error"]  # PVLF reads its file
        assert "cannot be opened" in error and str(tmp_path) not in error
        assert ask(url, {"ids": ["red.png"]}).status_code == 200


# --- shards and databases --------------------------------------------------------------------------------------------


def asked(url, number):
    """Ask every kind of question, one at a time, so that nothing is encoded in a batch with others."""
    request, _ = query(number)
    return ask(url, request | {"fold": 0.9999, "offset": number % 3}).json()


@pytest.mark.parametrize("vectors", ["float32", "int8"])
def test_shards_are_served_as_they_are_searched(url, gallery, files, made, vectors, monkeypatch):
    """Over HTTP as by Python, and where nothing is rounded as a gallery of the same embeddings, to the last bit."""
    location = f"memory://served-{vectors}"
    gallery_to_shards(files / "index", location, vectors, rows=4)
    shards, apps = ShardedGallery.open(location, *made), []
    monkeypatch.setattr(workers_module, "serve", lambda make, *_: apps.append(make("127.0.0.1", False)))
    where = ["--model", files / "model", "--milvus", "photos.db"]
    refused = call("serve", location, *where)
    assert refused.exit_code == 1 and "holds shards, which no --milvus searches" in refused.stderr
    assert (
        "numbers of their own: leave --vectors out" in call("serve", location, *where[:2], "--vectors", "int8").stderr
    )
    assert call("serve", location, *where[:2], "--memory", "100MB").exit_code == 0
    with running(apps[0]) as (address, _):
        assert CLIENT.get(address + "/health").json()["images"] == 9
        for number in range(12):
            said = asked(address, number)
            assert said == asked(url, number) or vectors == "int8"
            asks = query(number)[1] | {"fold": 0.9999, "offset": number % 3}
            check(httpx.Response(200, json=said), shards, **asks)
        by_id = ask(address, {"ids": {"red.png": 1, "lime.png": -0.5}, "k": 9}).json()["results"]
        found = shards.search(ids={"red.png": 1, "lime.png": -0.5}, k=9)
        assert [(one["id"], one["score"]) for one in by_id] == list(zip(found.ids, found.scores, strict=True))
        for request, said in [
            ({"ids": ["nobody"]}, "ids names ['nobody'], which are not in the gallery"),
            ({"text": "red", "exclude": ["nobody"]}, "exclude names ['nobody']"),
            ({"text": "red", "filter": "prise < 5"}, "'prise', which is not a column: the columns are ['price'"),
        ]:
            answer = ask(address, request)
            assert answer.status_code == 422 and said in answer.json()["error"]


def test_a_gallery_in_int8_is_served_with_the_same_answers(url, files, monkeypatch):
    apps = []
    monkeypatch.setattr(workers_module, "serve", lambda make, *_: apps.append(make("127.0.0.1", False)))
    assert call("serve", files / "index", "--model", files / "model", "--vectors", "int8").exit_code == 0
    with running(apps[0]) as (address, _):
        assert [asked(address, number) for number in range(12)] == [asked(url, number) for number in range(12)]


def test_a_database_is_served_by_one_worker(url, files, made, monkeypatch, tmp_path):
    pytest.importorskip("milvus_lite")
    apps = []
    monkeypatch.setattr(workers_module, "serve", lambda make, *_: apps.append(make("127.0.0.1", False)))
    where = ["serve", files / "index", "--model", files / "model", "--milvus", tmp_path / "photos.db"]
    refused = call(*where, "--workers", 2)
    assert refused.exit_code == 1 and "which one process at a time can use, and --workers 2 makes" in refused.stderr
    assert "holds none: leave --memory out" in call(*where[:4], "--memory", "1GB").stderr
    assert "there is no database" in call(*where).stderr  # which a server does not make
    Gallery.load(files / "index", *made, index="milvus", uri=str(tmp_path / "photos.db")).close()
    assert call(*where).exit_code == 0
    with running(apps[0]) as (address, _):
        assert CLIENT.get(address + "/health").json()["images"] == 9
        assert [asked(address, number) for number in range(12)] == [asked(url, number) for number in range(12)]


@pytest.mark.reliability(
    5,
    "Where shards are replaced under `pvlf-hf serve`, no search answers from them: 503 until it starts again",
    broken=("src/pvlf_hf/search/shards.py", "if not same:", "if False:"),
)
def test_shards_that_are_replaced_are_not_searched(files, made, tmp_path, figure):
    shards = gallery_to_shards(files / "index", tmp_path / "shards", rows=4)
    request = {"ids": ["white.png"], "k": 9, "filter": "price < 65"}
    with served(ShardedGallery.open(tmp_path / "shards", *made, memory="60MB")) as (url, _, _):
        before = ask(url, request).json()["results"]
        first = tmp_path / "shards" / shards.parts[0].name
        shutil.copy(first, first.with_name("part-9.parquet"))
        assert ask(url, request).json()["results"] == before  # a part that is added is not seen
        table = pq.read_table(first)  # the same images with each other's embeddings: a file of the same layout
        turned = table["embedding"].combine_chunks().take(pa.array([1, 0, 3, 2]))
        place = table.schema.get_field_index("embedding")
        write_part(
            first.parent, first.name, table.set_column(place, table.schema.field(place), turned), shards.made_by
        )
        for path, asks in (("/search", request), ("/search/batch", {"queries": [request]})):
            refused = ask(url, asks, path)
            assert refused.status_code == 503 and "cannot be read at the moment" in refused.json()["error"]
            assert str(tmp_path) not in refused.text and refused.headers["retry-after"] == "10"
        assert CLIENT.get(url + "/health").status_code == 200
    first.with_name("part-9.parquet").unlink()
    opened = ShardedGallery.open(tmp_path / "shards", *made)
    with served(opened) as (url, _, _):
        after = [(one["id"], one["score"]) for one in ask(url, request).json()["results"]]
    found = opened.search(ids=["white.png"], k=9, filter="price < 65")
    assert after == list(zip(found.ids, found.scores, strict=True)) != [(one["id"], one["score"]) for one in before]
    figure("a part of the same layout: 503; after a new start its images")


# --- bad input ------------------------------------------------------------------------------------------------------

WRONG = [
    ({"words": "red"}, 422, "has keys ['words'], which are unknown: valid keys are ['text'"),
    ({}, 422, "nothing to search by: pass an image, a text or both"),
    ([], 422, "the request is a list: pass an object"),
    ({"text": " "}, 422, "text is empty"),
    ({"text": ["red"]}, 422, "text is ['red']: pass a text"),
    ({"text": "小狗"}, 422, "tokenizer knows no word of '小狗'"),
    (
        {"texts": {str(n): 1 for n in range(10_000)}},
        422,
        "the query has 10,000 images, texts and ids: pass at most 32",
    ),
    ({"text": "red \ud800"}, 422, "contains '\\ud800', a lone surrogate"),
    ({"text": "red", "filter": "price < '\ud800'"}, 422, "filter"),
    ({"texts": {"red": -1}}, 422, "only says what to avoid"),
    ({"ids": ["nobody"]}, 422, "ids names ['nobody'], which are not in the gallery"),
    ({"ids": 5}, 422, "ids is 5: pass a list of ids"),
    ({"ids": [["red.png"]]}, 422, "pass a list of ids"),
    ({"text": "red", "exclude": [{}]}, 422, "exclude is [{}]: pass a list of ids"),
    ({"text": "red", "filter": "prise < 5"}, 422, "names 'prise', which is not a column: the columns are ['price'"),
    ({"text": "red", "filter": "price <"}, 422, "cannot be read"),
    ({"text": "red", "k": 10**6}, 422, "k=1000000: pass at most 1000"),
    ({"text": "red", "k": "ten"}, 422, "k='ten': pass a whole number"),
    ({"text": "red", "offset": -1}, 422, "offset=-1"),
    ({"text": "red", "weights": "heavy"}, 422, "weights='heavy': pass three numbers"),
    ({"text": "red", "min_score": "high"}, 422, "min_score='high'"),
    ({"images": ["/etc/passwd"]}, 422, "pass its content as a data: URL"),
    ({"images": ["http://127.0.0.1/x.png"]}, 422, "pass its content as a data: URL"),
    ({"images": ["data:image/png;base64,AAAA"]}, 422, "cannot read image 'data:image/png"),
    ({"images": [{"image": data_url(draw(0)), "box": [0, 0, 33, 9]}]}, 422, "not within the image, which is 32 x 32"),
    ({"images": [{"image": data_url(draw(0)), "box": 5}]}, 422, "box=5: pass left, top, right and bottom"),
    ({"images": [{"image": data_url(draw(0)), "weight": "2"}]}, 422, "the weight of 'an image' is '2'"),
    ({"images": [data_url(draw(0))] * (MOST_TERMS + 1)}, 422, "a list of at most 32 images"),
    (b"{", 400, "the request is not valid JSON"),
    (b"[" * 60_000, 400, "the request is not valid JSON"),
    (b"\xff", 400, "the request is not valid JSON"),
    (b'{"k": ' + b"9" * 5000 + b"}", 400, "the request is not valid JSON"),
]


@pytest.mark.reliability(
    5,
    "Whatever is wrong with a request to `pvlf-hf serve`, it answers 4xx with a sentence, names no path and no code",
    broken=(
        "src/pvlf_hf/search/server.py",
        'return Answer({"error": str(error)}, 422)',
        'return Answer({"error": "no"})',
    ),
)
def test_bad_requests_are_refused_with_a_sentence(url, figure):
    refused = []
    for content, status, said in WRONG:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        refused.append(
            (httpx.post(url + "/search", content=body, headers={"Content-Type": "application/json"}), status, said)
        )
    forms = [
        ({"files": {"picture": png(draw(0))}}, 422, "a file named 'picture': name each of them image"),
        ({"files": {"image": b"no image"}}, 422, "cannot read the image: it is in none of the formats"),
        ({"files": {"image": png(draw(0))}, "data": {"k": "five"}}, 422, "k='five' is not valid JSON"),
        ({"files": {"image": png(draw(0))}, "data": {"words": "red"}}, 422, "has keys ['words']"),
        ({"files": {"image": png(draw(0))}, "data": {"text": ["red", "blue"]}}, 422, "the form has 'text' twice"),
        ({"files": [("image", png(draw(0)))] * (MOST_TERMS + 1)}, 400, "Too many files"),
        ({"data": {"text": "red"}}, 415, "send application/json, or a form with images"),
        ({"content": b"red"}, 415, "send application/json"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
    ]
    refused += [(httpx.post(url + "/search", **form), status, said) for form, status, said in forms]
    batches = [{}, {"queries": []}, {"queries": [{}] * 257}, {"queries": 5}, {"queries": [{}], "k": 1}, []]
    refused += [(ask(url, one, "/search/batch"), 422, "a list of 1 to 256 searches") for one in batches]
    for one, said in [
        ({}, "pass an object with input"),
        ({"input": "red", "n": 1}, "pass an object with input"),
        ({"input": []}, "input has 0 parts: pass 1 to 256"),
        ({"input": [5]}, "input holds 5: pass texts, data: URLs"),
        ({"input": {"text": "red", "k": 5}}, "input holds"),
        ({"input": "red", "model": "other"}, "model='other': pass 'tiny', or leave it out"),
        ({"input": "red", "dimensions": 7}, "dimensions=7: pass 32"),
        ({"input": "red", "encoding_format": "int8"}, "encoding_format='int8': pass 'base64'"),
    ]:
        refused.append((ask(url, one, "/v1/embeddings"), 422, said))
    refused += [
        (httpx.get(url + "/search"), 405, "does not take GET"),
        (httpx.get(url + "/nothing"), 404, "see /docs"),
    ]
    for answer, status, said in refused:
        assert answer.status_code == status, (answer.text, said)
        assert said in answer.json()["error"] and answer.json().keys() == {"error"}
        assert (
            "Traceback" not in answer.text and "site-packages" not in answer.text and "object at 0x" not in answer.text
        )
    assert ask(url, {"text": "red"}).status_code == 200
    figure(f"{len(refused)} requests, refused")


@pytest.mark.reliability(
    5,
    "The images of one request to `pvlf-hf serve` are not decoded if they have more than 64 million pixels together",
    broken=("src/pvlf_hf/search/requests.py", "if parsed.pixels > MOST_PIXELS:", "if False:"),
)
def test_huge_images_are_not_decoded(url, figure):
    flat = png(Image.new("L", (6000, 6000)))
    refused = CLIENT.post(url + "/search", files=[("image", flat)] * 2)
    assert refused.status_code == 422 and "have 72,000,000 pixels, more than 64,000,000" in refused.json()["error"]
    figure("twice 6,000 x 6,000")


def test_the_guards_of_the_demo_apply(gallery):
    with served(gallery, per_minute=5) as (url, _, _):
        host, port = httpx.URL(url).host, httpx.URL(url).port
        for length, status, said in [
            (str(2**25 + 1), 413, "larger than 32,768 KB"),
            (None, 411, "Content-Length header"),
        ]:
            connection = HTTPConnection(host, port)
            connection.putrequest("POST", "/search")
            for name, value in (("Content-Type", "application/json"), ("Content-Length", length)):
                if value:
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.status == status and said in json.load(answer)["error"]
            connection.close()
        assert httpx.get(url + "/health", headers={"Host": "pictures.example.com"}).status_code == 400
        codes = [ask(url, {"text": "red"}) for _ in range(6)]
        assert [one.status_code for one in codes] == [200] * 5 + [429]
        assert "more than 5 requests a minute" in codes[-1].json()["error"]


# --- load -----------------------------------------------------------------------------------------------------------


def wait_until(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.reliability(
    5,
    "A request that fails in the encoder fails alone: those of its batch are answered",
    broken=("src/pvlf_hf/search/batching.py", "self._answer([call])", "call.future.set_exception(error)"),
)
def test_an_error_fails_no_neighbour(gallery, gate, figure):
    texts = ["red", "the blue dress", "a red hat", "dark", "not green"]
    expected = {text: gallery.query(text=text) for text in texts if open_for(gate) and "hat" not in text}
    gate.open.clear()
    gate.entered.clear()
    gate.rows.clear()
    with served(gallery) as (url, service, _), ThreadPoolExecutor(8) as clients:
        first = clients.submit(ask, url, {"text": "blue"})
        assert gate.entered.wait(20)
        others = [clients.submit(ask, url, {"text": text}) for text in texts]
        wait_until(lambda: service.thread._waiting.qsize() == len(texts))
        gate.open.set()
        answers = dict(zip(texts, (one.result() for one in others), strict=True))
        assert first.result().status_code == 200 and 5 in gate.rows  # all in one batch, which failed
        failed = answers.pop("a red hat")
        assert failed.status_code == 500 and "its log says why" in failed.json()["error"] and "hats" not in failed.text
        for text, answer in answers.items():
            check(answer, gallery, query=expected[text])
        figure(f"a batch of {len(texts)}, 1 failed")


def open_for(gate):
    gate.open.set()
    return True


def test_a_full_queue_answers_503(gallery, gate, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_ADMITTED", 3)
    with served(gallery) as (url, service, _), ThreadPoolExecutor(8) as clients:
        waiting = [clients.submit(ask, url, {"text": "red"}) for _ in range(3)]
        wait_until(lambda: service.admitted == 3)
        refused = [ask(url, {"text": "blue"}), ask(url, {"input": "blue"}, "/v1/embeddings")]
        gate.open.set()
        for answer in refused:
            assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
            assert answer.json() == {"error": "3 queries wait already: send it again in a moment"}
        assert [one.result().status_code for one in waiting] == [200] * 3
        assert ask(url, {"queries": [{"text": "red"}] * 4}, "/search/batch").status_code == 503
        assert ask(url, {"queries": [{"text": "red"}] * 3}, "/search/batch").status_code == 200
        assert (service.admitted, service.bytes) == (0, 0)


def test_a_request_whose_client_has_gone_is_not_computed(gallery, gate):
    with served(gallery) as (url, service, _), ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, url, {"text": "red"})
        assert gate.entered.wait(20)
        body = b'{"text": "blue"}'
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as connection:
            head = ["POST /search HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "", ""]
            connection.sendall("\r\n".join(head).encode() + body)
            wait_until(lambda: service.thread._waiting.qsize() == 1)
        for _ in range(3):
            assert httpx.get(url + "/health").status_code == 200  # the server has seen that it is closed
        gate.open.set()
        assert first.result().status_code == 200
        wait_until(lambda: service.admitted == 0)
        assert gate.rows == [1] and service.thread.rows == 1


def test_a_server_that_ends_answers_what_it_has_taken(gallery, gate):
    with served(gallery) as (url, service, server), ThreadPoolExecutor(2) as clients:
        taken = clients.submit(ask, url, {"text": "red"})
        assert gate.entered.wait(20)
        server.should_exit = True
        wait_until(lambda: refuses(url))
        gate.open.set()
        check(taken.result(), gallery, text="red")


def refuses(url):
    try:
        httpx.get(url + "/health")
    except httpx.HTTPError:
        return True
    return False


def test_a_budget_is_never_exceeded():
    budget, used, most = server_module.Budget(10), [0], [0]
    lock = threading.Lock()

    def work(number):
        with budget.taking(number % 7):
            with lock:
                used[0] += number % 7
                most[0] = max(most[0], used[0])
            time.sleep(0.001)
            with lock:
                used[0] -= number % 7

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(100)))
    assert 6 <= most[0] <= 10 and budget._free == 10


# --- descriptions, page, command line -------------------------------------------------------------------------------


def test_health_and_descriptions(url):
    health = httpx.get(url + "/health").json()
    assert (health["status"], health["model"], health["images"]) == ("ready", "tiny", 9)
    described = httpx.get(url + "/openapi.json").json()
    assert described["paths"].keys() == {"/search", "/search/batch", "/v1/embeddings", "/health"}
    content = described["paths"]["/search"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["properties"].keys() == {*REQUEST}
    assert content["multipart/form-data"]["schema"]["properties"].keys() == {*REQUEST} - {"images"} | {"image"}
    for path in ("/search", "/search/batch", "/v1/embeddings"):
        of_path = described["paths"][path]["post"]
        example = of_path["requestBody"]["content"]["application/json"]["schema"]["example"]
        if "..." not in json.dumps(example):
            assert ask(url, example, path).status_code == 200
        assert {"200", "422", "503"} <= of_path["responses"].keys()
    page = httpx.get(url, follow_redirects=True)
    assert page.url.path == "/docs" and all(f"{path}</code>" in page.text for path in described["paths"])
    assert "<script" not in page.text and "http:" not in page.text and "https:" not in page.text
    assert all(f"<code>{key}</code>" in page.text for key in REQUEST)


@pytest.mark.slow
def test_the_page_is_mounted_and_guarded(gallery, made, tmp_path):
    """Its events by Gradio's own protocol, beside searches over HTTP; nothing is left behind."""
    import asyncio

    from load_demo import Client, Refused, expected

    async def visit(url):
        async with Client(f"{url}/page", "visitor") as client:
            await client.upload("mine.png", png(draw(2)))
            found = await client.results("search", TEXT, 0)
            assert httpx.post(url + "/search", json={"text": "red"}).status_code == 200
            with pytest.raises(Refused, match="403"):
                await client.call("take", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}})
            return found

    with served(gallery, page=True) as (url, _, _):
        assert httpx.get(url, follow_redirects=True).text.count("gradio") > 1
        found = asyncio.run(visit(url))
        refused = httpx.get(f"{url}/page/gradio_api/file=/etc/passwd")
        assert refused.status_code == 403
        large = httpx.post(f"{url}/page/gradio_api/call/search", content=b"x" * 2**17)
        assert large.status_code == 413 and "larger than 64 KB" in large.json()["detail"]
        folder = os.environ["GRADIO_TEMP_DIR"]
    assert found == expected(Gallery.from_folder(gallery_photos(gallery), *made, progress=False), draw(2), TEXT)
    assert "GRADIO_TEMP_DIR" not in os.environ and not Path(folder).exists()


def gallery_photos(gallery):
    return Path(gallery.paths[0]).parent


def call(*arguments):
    return CliRunner().invoke(command_line, [*map(str, arguments)])


def test_the_command_line_finds_the_same_by_a_server(url, files, monkeypatch):
    local = ["search", files / "index", "--model", files / "model"]
    red = files / "photos" / "red.png"
    for asked in (
        ["--image", red, "--text", TEXT, "-k", 4],
        [
            "--image",
            f"2:{red}",
            "--text",
            TEXT,
            "--text",
            "-0.5:dog",
            "--filter",
            "price > 15 or price is null",
            "--json",
        ],
        ["--id", "red.png", "--id", "-blue.png", "--fold", -1, "--offset", 0],
        ["--image", red, "--box", "0,0,16,16", "--weights", "1,0,0", "--min-score", 0.1, "--offset", 2],
        ["--text", "red zebra", "-k", 2],
        ["--text", "red", "--filter", "price < 0"],
        ["--text", "red", "--filter", "prise < 0"],
        ["--id", "nobody"],
        [],
        ["--id", "red.png", "--box", "0,0,9,9"],
        ["--image", files / "nothing.png"],
    ):
        here, there = call(*local, *asked), call("search", "--server", url, *asked)
        assert there.exit_code == here.exit_code, there.output
        if "--json" in asked:
            pair = [json.loads(done.stdout) for done in (here, there)]
            scores = [[one.pop("score") for one in found["results"]] for found in pair]
            paths = [[one.pop("path") for one in found["results"]] for found in pair]
            assert scores[1] == pytest.approx(scores[0], abs=2 * squares_error()["similarity"])
            assert all(paths[0]) and paths[1] == [None] * len(paths[0]) and pair[0] == pair[1]
        else:
            assert there.stdout == here.stdout
            said = [[one for one in done.stderr.splitlines() if one and "%|" not in one] for done in (here, there)]
            assert said[1] == said[0][-1:]  # but for Transformers' own
    monkeypatch.setenv("PVLF_MODEL", "elsewhere")  # of the local search
    assert call("search", "--server", url, "--text", "red").exit_code == 0


def test_arguments_that_no_server_heeds_are_refused(url, files, tmp_path):
    server = ["search", "--server", url, "--text", "red"]
    for wrong, said in (
        ([files / "index"], "INDEX: the server has its own index"),
        (["--model", files / "model"], "--model: the server has its own model"),
        (["--sheet", tmp_path / "a.png"], "--sheet: it is drawn from the files of the images"),
        (["--explain"], "--explain: a server does not explain"),
        (["--composition", "sum"], "--composition: the server has its own model"),
    ):
        done = call(*server, *wrong)
        assert done.exit_code == 2 and said in done.stderr, done.output
    assert "INDEX: it is needed, unless a --server" in call("search", "--text", "red", "--model", "m").stderr
    assert "--model: it is needed, unless a --server" in call("search", files / "index", "--text", "red").stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    for address, said in (
        (closed, "does not answer (<urlopen error"),
        ("localhost:8000", "name a URL such as http://127.0.0.1:8000"),
        (url + "/docs", "there is no /docs/search here"),
    ):
        done = call("search", "--server", address, "--text", "red")
        assert done.exit_code == 1 and said in done.stderr and "Traceback" not in done.stderr
    done = call("search", "--server", url, "--image", "http://127.0.0.1/x.png")
    assert done.exit_code == 1 and "download the image, and pass the file" in done.stderr


# --- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def started(files, *arguments):
    """`pvlf-hf serve` as a process of its own, and its address."""
    command = [sys.executable, "-m", "pvlf_hf_cli", "serve", files / "index", "--model", files / "model", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, re.search(r"http://\S+:\d+", process.stdout.readline())[0]
        finally:
            process.terminate()
    assert process.returncode == 0


def timed(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def until_ready(url):
    httpx.get(url + "/health", timeout=httpx.Timeout(5, read=120)).raise_for_status()


@pytest.mark.slow
def test_examples_of_the_help_run_and_no_torch_is_imported(files, tmp_path, monkeypatch):
    """The lines of `pvlf-hf serve --help` as they stand, but for the port."""
    shutil.copy(files / "photos" / "red.png", tmp_path / "dress.jpg")
    monkeypatch.chdir(tmp_path)
    help_lines = [line.strip() for line in call("serve", "--help").stdout.splitlines()]
    (curl,) = (line for line in help_lines if line.startswith("curl "))
    start = help_lines.index("import requests")
    with started(files, "--port", "0") as (_, url):
        until_ready(url)
        curl = curl.replace("http://127.0.0.1:8000", url)
        found = json.loads(subprocess.run(shlex.split(curl), capture_output=True, check=True).stdout)
        assert len(found["results"]) == 5
        code = "\n".join(help_lines[start : start + 3]).replace("http://127.0.0.1:8000", url)
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert "'metadata': {'price': " in said
        assert min(timed(lambda: CLIENT.get(url + "/health")) for _ in range(20)) < 0.035  # no delayed acknowledgement
        search = [
            "-X",
            "importtime",
            "-m",
            "pvlf_hf_cli",
            "search",
            "--server",
            url,
            "--image",
            "dress.jpg",
            "-k",
            "1",
        ]
        done = subprocess.run([sys.executable, *search], capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == "red.png"
        assert not re.search(r"\b(torch|transformers|numpy|pvlf_hf)\b", done.stderr)


@pytest.mark.parametrize("sends", [True, False])
def test_a_server_that_ends_answers_connections_it_has_accepted(sends):
    """A client that connected just before is answered; one that never sends a request is closed."""

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    protocol = workers_module.PatientProtocol
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="off", http=protocol))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        with socket.create_connection(listener.getsockname(), timeout=30) as client:
            wait_until(lambda: server.server_state.connections)
            server.should_exit = True
            time.sleep(0.4)  # the server looks every 0.1 s whether it is to end
            if sends:
                client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            start, answer = time.perf_counter(), b"".join(iter(lambda: client.recv(4096), b""))  # until it is closed
        thread.join(30)
    assert not thread.is_alive() and time.perf_counter() - start < 30
    assert (answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"ok")) if sends else answer == b""


@pytest.mark.slow
def test_workers_are_replaced_without_a_gap(files, made, tmp_path):
    """Two workers, an index that changes under them, and SIGHUP: no request fails, and the new index is served."""
    shutil.copytree(files / "photos", tmp_path / "photos")
    Gallery.from_folder(tmp_path / "photos", *made, path=tmp_path / "index", progress=False)
    (tmp_path / "model").symlink_to(files / "model")
    with started(tmp_path, "--port", "0", "--workers", "2") as (process, url):
        until_ready(url)
        assert "/docs" in httpx.get(url).headers["location"]  # no page
        done, counts = threading.Event(), []

        def visit(number):
            """A connection for each request: a server that ends closes those that are idle."""
            with httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
                while not done.is_set():
                    answer = client.post(url + "/search", json={"images": [data_url(draw(number))], "k": 1})
                    assert answer.json()["results"][0]["id"] == f"{COLOURS[number]}.png"
                    counts.append(client.get(url + "/health").json()["images"])
                    time.sleep(0.1)  # leave the processor to the workers

        with ThreadPoolExecutor(2) as clients:
            visits = [clients.submit(visit, number) for number in range(2)]
            try:
                draw(0).rotate(90).save(tmp_path / "photos" / "zebra.png")
                Gallery.from_folder(tmp_path / "photos", *made, path=tmp_path / "index", progress=False)
                wait_until(lambda: len(counts) > 20)
                assert 9 in counts  # of a worker that was ready before
                process.send_signal(signal.SIGHUP)
                wait_until(lambda: {*counts[-40:]} == {10}, seconds=200)
            finally:
                done.set()
            assert [one.result() for one in visits] == [None] * 2


def test_a_server_that_cannot_start_says_why(files, tmp_path):
    for workers in (1, 2):
        done = call("serve", files / "index", "--model", tmp_path, "--port", 0, "--workers", workers)
        assert done.exit_code == 1 and "error: no model" in done.stderr and not done.stdout
    wanted = ["serve", files / "index", "--model", files / "model", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = call(*wanted, taken.getsockname()[1])
        assert done.exit_code == 1 and "choose another port" in done.stderr
    done = call("serve", tmp_path, "--model", files / "model")
    assert done.exit_code == 1 and "is not an index: build it with `pvlf-hf index" in done.stderr
    assert call(*wanted, 70_000).exit_code == 2


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
