"""Pairs of near captions: against TF-IDF of all pairs in plain NumPy; determinism, resumption, bad input."""

import builtins
import json
import random
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from pvlf_hf.data.making import near_pairs as module
from pvlf_hf.data.making import pairs as pairs_module
from pvlf_hf.data.making import pipeline
from pvlf_hf.data.making.edits import find_swap, write_caption
from pvlf_hf.data.making.near_pairs import near_pairs
from pvlf_hf.data.making.pairs import index_captions
from pvlf_hf.data.making.pipeline import Making, make_triplets
from pvlf_hf.data.making.vocabulary import load_vocabulary

pytestmark = pytest.mark.skipif(
    find_spec("inflect") is None or find_spec("sklearn") is None, reason="needs inflect and scikit-learn"
)

COLOURS, THINGS = ("red", "blue", "green", "white"), ("car", "dress", "house", "boat", "lamp", "cup")
PLACES = ("market", "village", "harbour", "museum", "garden", "workshop", "station")


@pytest.fixture(scope="module")
def english():
    return load_vocabulary("en")


def fifty_captions():
    draw = random.Random(0)
    captions = []
    for _ in range(50):
        number = draw.choice(("", "two ", "three "))
        head = draw.choice(("picture", "photo", ""))
        captions.append(
            f"{head} {number}{draw.choice(COLOURS)} {draw.choice(THINGS[:3])} near {draw.choice(THINGS)} "
            f"in {draw.choice(PLACES)} {draw.choice(('', 'morning', 'evening'))}"
        )
    return captions


def index_of(captions, folder, vocabulary):
    folder.mkdir(exist_ok=True)
    table = folder / "t.jsonl"
    table.write_text("".join(json.dumps({"image": f"{n}.png", "caption": c}) + "\n" for n, c in enumerate(captions)))
    return index_captions(table, folder / "captions", vocabulary, progress=False)


def plain(captions, vocabulary, least=module.LEAST_COSINE, most=module.NEAR_OF_SLOT):
    """Swap every listed word for every other of its class, and compare with every caption by dense TF-IDF."""
    read = [vocabulary.read(caption) for caption in captions]
    nouns = [[w for w, letter in zip(c.words, c.classes, strict=True) if letter == "X"] for c in read]
    words = sorted({word for own in nouns for word in own})
    counts = np.array([[own.count(word) for word in words] for own in nouns], float)
    idf = np.log((1 + len(captions)) / (1 + (counts > 0).sum(0))) + 1
    dense = counts * idf
    norm = np.sqrt((dense**2).sum(1, keepdims=True))
    dense = np.divide(dense, norm, out=np.zeros_like(dense), where=norm > 0)

    def class_of(caption, at):
        letter = caption.classes[at]
        return {"A": vocabulary.attribute_of.get(caption.words[at])}.get(letter, letter) if letter in "NAPV" else None

    def thing(caption, at):
        """Return the last noun of those that follow a colour or a number, behind further ones."""
        if caption.classes[at] not in "NA":
            return None
        at += 1
        while at < len(caption.words) and caption.classes[at] in "NA":
            at += 1
        last = None
        while at < len(caption.words) and caption.classes[at] in "XP":
            last, at = caption.words[at], at + 1
        return last

    def listed(caption):
        return [at for at in range(len(caption.words)) if class_of(caption, at)]

    found = []
    for a, one in enumerate(read):
        for place, at in enumerate(listed(one)):
            close = []
            for b, two in enumerate(read):
                if a == b or len(listed(one)) != len(listed(two)):
                    continue
                to = listed(two)[place]
                old, new = one.words[at], two.words[to]
                agree = all(
                    one.words[i] == two.words[j]
                    for n, (i, j) in enumerate(zip(listed(one), listed(two), strict=True))
                    if n != place
                )
                same = class_of(one, at) == class_of(two, to) and thing(one, at) == thing(two, to)
                joined = (*one.words[:at], "_", *one.words[at + 1 :]) == (*two.words[:to], "_", *two.words[to + 1 :])
                cosine = round(float(dense[a] @ dense[b]), 9)
                if agree and same and old != new and not joined and cosine >= least:
                    close.append((-cosine, b, new))
            for _, b, new in sorted(close)[:most]:
                found.append((a, b, tuple(c for _, c, its in sorted(close) if its != new)[: pairs_module.NEGATIVES]))
    return found


@pytest.mark.parametrize("slots_at_once", [1000, 7])
@pytest.mark.parametrize("least", [0.3, 0.6])
def test_pairs_equal_a_dense_comparison_of_all(tmp_path, english, monkeypatch, slots_at_once, least):
    monkeypatch.setattr(module, "SLOTS_AT_ONCE", slots_at_once)
    monkeypatch.setattr(module, "LEAST_COSINE", least)
    captions = fifty_captions()
    pairs = list(near_pairs(index_of(captions, tmp_path, english), 0, english))
    expected = plain(captions, english, least)
    assert len(expected) > 15 and any(negatives for _, _, negatives in expected)
    assert Counter((p.reference, p.target, p.negatives) for p in pairs) == Counter(expected)
    assert [p.reference for p in pairs] == sorted(p.reference for p in pairs)
    assert {p.source for p in pairs} == {"near captions"} and {p.key for p in pairs} == {None}


def test_the_new_word_is_in_the_target_and_the_old_one_is_not(tmp_path, english):
    captions = fifty_captions()
    for pair in near_pairs(index_of(captions, tmp_path, english), 0, english):
        edit = find_swap(english.read(captions[pair.reference]), english.read(captions[pair.target]), english)
        change = edit.changes[0]
        old, new = edit.reference.words[change.old[0]], edit.target.words[change.new[0]]
        assert old in captions[pair.reference] and new in captions[pair.target] and new != old
        assert edit.kind in ("attribute", "cardinality")


@pytest.mark.parametrize(
    ("reference", "target", "kind", "caption"),
    [
        ("a red car on a street", "in the street a blue car near trees", "attribute", "change the red car to blue"),
        ("two dogs on grass", "grass with a path and three dogs", "cardinality", "three dogs instead of two"),
        ("a man in a park at night", "in a dark park a man at night", None, None),  # another listed word
        ("a red car on a street", "a street with a blue boat", None, None),  # another thing
        ("a red car on a street", "a street with a wooden car", None, None),  # another class
        ("a red car in a street", "the street with a red car", None, None),  # nothing is swapped
        ("a dark car near a red house", "near a red house a blue car", None, None),  # the other order
    ],
)
def test_one_swap_is_said_whatever_else_differs(english, reference, target, kind, caption):
    edit = find_swap(english.read(reference), english.read(target), english)
    assert (edit and edit.kind) == kind
    assert edit is None or caption in {write_caption(edit, english, str(n)) for n in range(40)}


def test_words_of_many_captions_are_not_counted_as_shared(tmp_path, english, monkeypatch):
    index = index_of(
        [f"{COLOURS[n % 4]} car parked by station entrance{' photo' * (n % 3)}" for n in range(30)], tmp_path, english
    )
    assert list(near_pairs(index, 0, english))
    monkeypatch.setattr(module, "MOST_CAPTIONS_OF_WORD", 6)
    assert list(near_pairs(index, 0, english)) == []


def test_captions_meet_within_their_block_only(tmp_path, english, monkeypatch):
    captions = fifty_captions()
    monkeypatch.setattr(pairs_module, "ROWS_OF_BLOCK", 25)
    index = index_of(captions, tmp_path, english)
    for block in (0, 1):
        own = {(p.reference - 25 * block, p.target - 25 * block) for p in near_pairs(index, block, english)}
        assert own == {(a, b) for a, b, _ in plain(captions[25 * block : 25 * block + 25], english)} != set()
    with pytest.raises(ValueError, match=r"block=2: the table has 2 blocks of captions, counted from 0"):
        list(near_pairs(index, 2, english))


@pytest.mark.parametrize(
    "captions",
    [["", " "], ["red", "blue"], ["a dog", "a cat"], ["красная машина"] * 2, ["red car"]],
    ids=["empty", "no noun", "nothing listed", "another script", "one"],
)
def test_tables_without_near_captions_give_no_pair(tmp_path, english, captions):
    assert list(near_pairs(index_of(captions, tmp_path, english), 0, english)) == []


@pytest.fixture
def catalogue(tmp_path):
    """Return a folder of images whose captions no key joins."""
    folder = tmp_path / "catalogue"
    index_of(fifty_captions(), folder, load_vocabulary("en"))
    for number in range(50):
        image = Image.new("RGB", (32, 32), (5 * number, 90, 200 - 4 * number))
        image.paste((200 - 4 * number, 9, 5 * number), (number % 20, number % 9, number % 20 + 9, 20))
        image.save(folder / f"{number}.png")
    return folder


def make(catalogue, output, **settings):
    return make_triplets(
        catalogue / "t.jsonl", catalogue, output, Making(check_images=False, near=True, **settings), progress=False
    )


def test_triplets_of_near_captions_are_counted_and_repeatable(catalogue, tmp_path):
    report = make(catalogue, tmp_path / "a.jsonl")
    make(catalogue, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    near = [row for row in rows if row["source"] == "near captions"]
    assert report.measures["sources"]["near captions"] == len(near) > 5
    for row in near:
        assert row["kind"] in ("attribute", "cardinality") and row["negatives"][0] == row["reference"]
        assert row["target"] not in row["negatives"]
    make_triplets(catalogue / "t.jsonl", catalogue, tmp_path / "c.jsonl", Making(check_images=False), progress=False)
    assert "near captions" not in (tmp_path / "c.jsonl").read_text(), "it is an option"


def test_near_captions_stay_within_a_group(catalogue, tmp_path):
    rows = [json.loads(line) for line in (catalogue / "t.jsonl").read_text().splitlines()]
    (catalogue / "t.jsonl").write_text(
        "".join(json.dumps({**row, "artist": str(n % 2)}) + "\n" for n, row in enumerate(rows))
    )
    make(catalogue, tmp_path / "a.jsonl", group="artist")
    made = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    near = [row for row in made if row["source"] == "near captions"]
    assert near and all((int(r["reference"][:-4]) - int(r["target"][:-4])) % 2 == 0 for r in near)
    index = index_captions(catalogue / "t.jsonl", tmp_path / "w", load_vocabulary("en"), 0, (), "artist", False)
    assert all((p.reference - p.target) % 2 == 0 for p in near_pairs(index, 0, load_vocabulary("en"), "artist"))


def test_an_interrupted_run_resumes_behind_the_last_block(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "ROWS_OF_BLOCK", 25)
    make(catalogue, tmp_path / "whole.jsonl")
    run, ran = pipeline._Stages.run, []

    def interrupted(self, name, produce):
        if name == "near-00001" and name not in ran:
            ran.append(name)
            raise KeyboardInterrupt
        return run(self, name, lambda: ran.append(f"ran {name}") or produce())

    monkeypatch.setattr(pipeline._Stages, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(catalogue, tmp_path / "resumed.jsonl")
    make(catalogue, tmp_path / "resumed.jsonl")
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert ran.count("ran near-00000") == ran.count("ran near-00001") == 1, "a finished block was done again"


def test_without_scikit_learn_the_extra_is_named(tmp_path, english, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    index = index_of(fifty_captions(), tmp_path, english)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pvlf-hf\[triplets\]"):
        list(near_pairs(index, 0, english))
