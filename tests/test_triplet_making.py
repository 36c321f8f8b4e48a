"""Triplets of captions: pairs, edits, captions, filters, report; determinism, resumption, bad input."""

import json
import random
from importlib.util import find_spec

import pytest
from error_bounds import MEAN_ERROR
from PIL import Image
from typer.testing import CliRunner

import pvlf_hf_cli
from pvlf_hf.data.making import pairs as pairs_module
from pvlf_hf.data.making import pipeline
from pvlf_hf.data.making.edits import find_edit, write_caption
from pvlf_hf.data.making.image_signatures import ImageChecks
from pvlf_hf.data.making.measures import faults_of, measure, read_rows, repeated_in_batch
from pvlf_hf.data.making.pairs import find_pairs, index_captions
from pvlf_hf.data.making.pipeline import Making, make_triplets
from pvlf_hf.data.making.screening import Limits, Screen, TargetIds, allowances
from pvlf_hf.data.making.triplet_report import report_on
from pvlf_hf.data.making.vocabulary import load_vocabulary
from pvlf_hf.data.tables import iterate_table, read_table
from pvlf_hf.data.triplets import load_triplets

pytestmark = pytest.mark.skipif(find_spec("inflect") is None, reason="needs inflect")

COLOURS = ("red", "blue", "green", "white")
THINGS = ("car", "dress", "house")


@pytest.fixture(scope="module")
def english():
    return load_vocabulary("en")


@pytest.fixture(scope="module")
def german():
    return load_vocabulary("de")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Return a table of twelve captioned images, three things in four colours, and a thirteenth with another."""
    folder = tmp_path_factory.mktemp("catalogue")
    rows = [
        {"image": f"{c}-{t}.png", "caption": f"a {c} {t} on a table", "licence": "CC0"}
        for t in THINGS
        for c in COLOURS
    ]
    rows.append({"image": "hat.png", "caption": "a red car on a table with a hat", "licence": "MIT"})
    for number, row in enumerate(rows):
        image = Image.new("RGB", (32, 32), row["image"].split("-")[0] if "-" in row["image"] else "black")
        image.paste((10 * number, 90, 200 - 10 * number), (number, 4, number + 8, 20))
        image.save(folder / row["image"])
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make(catalogue, output, progress=False, rejected=None, **settings):
    table = catalogue / "captions.jsonl"
    return make_triplets(table, catalogue, output, Making(**settings), rejected=rejected, progress=progress)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def captions_of(reference, target, vocabulary, number=12):
    edit = find_edit(vocabulary.read(reference), vocabulary.read(target), vocabulary)
    return edit and edit.kind, {write_caption(edit, vocabulary, str(n)) for n in range(number)} if edit else None


@pytest.mark.parametrize(
    ("reference", "target", "kind", "caption"),
    [
        ("a red car on a street", "a blue car on a street", "attribute", "change the red car to blue"),
        ("a dog on grass", "three dogs on grass", "cardinality", "three dogs instead of one"),
        ("two dogs on grass", "one dog on grass", "cardinality", "one dog instead of two"),
        ("a woman", "a woman with an umbrella", "addition", "add an umbrella"),
        ("a woman with a hat", "a woman", "removal", "remove the hat"),
        ("a man in a park", "a man in a park at night", "addition", "the same, but at night"),
        ("a man riding a horse", "a man riding an elephant", "replacement", "replace the horse with an elephant"),
        ("a plate of apples", "a plate of oranges", "replacement", "oranges instead of apples"),
        ("palm tree", "fir tree", "replacement", "a fir tree instead of a palm tree"),
        ("a man walking", "a man running", "action", "running instead of walking"),
        ("a new house", "an old house", "comparative", "an older house"),
        ("flag of Kuwait", "flag of Syria", "replacement", "Syria instead of Kuwait"),
        ("a small dog near a lake", "a small cat near a river", "conjunction", None),
    ],
)
def test_what_changes_is_said(reference, target, kind, caption, english):
    found, captions = captions_of(reference, target, english, 40)
    assert found == kind
    assert caption is None or caption in captions
    assert not any(faults_of(one, english) for one in captions)


def test_no_edit_where_nothing_changes_or_all(english):
    assert captions_of("a red car", "the red car", english) == (None, None)
    assert captions_of("a b c d e f g", "t u v w x y z a", english)[0] in (None, "replacement")
    far = captions_of("a man with a dog near two lakes", "food lies on tables under lamps", english)[0]
    assert far in (None, "replacement", "conjunction")


def test_german_captions(german):
    kind, captions = captions_of("Ein roter Apfel auf dem Tisch", "Ein grüner Apfel auf dem Tisch", german)
    assert kind == "attribute" and "grün statt rot" in captions
    assert captions_of("eine Frau mit einem Hut", "eine Frau", german)[1] >= {"ohne Hut"}
    assert captions_of("zwei Hunde", "drei Hunde", german)[0] == "cardinality"
    assert captions_of("eine Katze auf dem Sofa", "ein Hund auf dem Sofa", german)[1] >= {"Hund statt Katze"}


def test_a_word_list_of_ones_own(tmp_path, english):
    with pytest.raises(ValueError, match=r"no word list for language 'xx': choose from \['de', 'en'\]"):
        load_vocabulary("xx")
    (tmp_path / "xx.json").write_text('{"language": "xx"}')
    with pytest.raises(ValueError, match="the word list lacks 'mass'|lacks 'wordings'"):
        load_vocabulary(tmp_path / "xx.json")
    (tmp_path / "xx.json").write_text("[1")
    with pytest.raises(ValueError, match="cannot be read as a word list"):
        load_vocabulary(tmp_path / "xx.json")


def brute_force(captions):
    """Return the pairs of captions that differ in one word, compared word by word."""
    words = [caption.split() for caption in captions]
    return {
        (a, b)
        for a in range(len(words))
        for b in range(len(words))
        if a != b
        and len(words[a]) == len(words[b])
        and sum(x != y for x, y in zip(words[a], words[b], strict=True)) == 1
    }


@pytest.mark.parametrize("records_of_part", [10**6, 40])
def test_one_word_pairs_equal_a_comparison_of_all(tmp_path, english, monkeypatch, records_of_part):
    monkeypatch.setattr(pairs_module, "RECORDS_OF_PART", records_of_part)
    monkeypatch.setattr(pairs_module, "ROWS_OF_BLOCK", 7)
    draw = random.Random(0)
    pool = [("red", "blue", "green"), ("cat", "dog", "bird", "fish"), ("tree", "lamp", "boat")]
    captions = sorted({" ".join(draw.choice(words) for words in pool) for _ in range(22)})
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"{n}.png,{c}\n" for n, c in enumerate(captions)))
    index = index_captions(table, tmp_path / "work", english, progress=False)
    assert (index.parts() > 3) == (records_of_part == 40)
    found = {(pair.reference, pair.target) for pair in find_pairs(index)}
    one_word = {pair for pair in found if pair in brute_force(captions)}
    assert one_word == brute_force(captions)
    assert [index[n]["caption"] for n in range(len(index))] == captions
    for pair in find_pairs(index):
        assert {pair.reference, pair.target}.isdisjoint(set(pair.negatives) - {pair.reference})


def test_an_interrupted_first_pass_resumes_behind_the_last_block(tmp_path, english, monkeypatch):
    monkeypatch.setattr(pairs_module, "ROWS_OF_BLOCK", 4)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"{n}.png,a {COLOURS[n % 4]} car\n" for n in range(10)))
    pairs = list(find_pairs(index_captions(table, tmp_path / "work", english, progress=False)))
    (tmp_path / "work" / "block-00002.json").unlink()  # killed before the last block was whole
    (tmp_path / "work" / "keys-00002.npy").write_bytes(b"cut off")
    first = (tmp_path / "work" / "keys-00000.npy").stat().st_mtime_ns
    assert list(find_pairs(index_captions(table, tmp_path / "work", english, progress=False))) == pairs
    assert (tmp_path / "work" / "keys-00000.npy").stat().st_mtime_ns == first, "a whole block was done again"


def test_common_keys_are_dropped_and_pairs_of_a_key_capped(tmp_path, english, monkeypatch):
    monkeypatch.setattr(pairs_module, "PAIRS_OF_KEY", 5)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"{n}.png,thing{n} lamp\n" for n in range(30)))
    index = index_captions(table, tmp_path / "a", english, progress=False)
    assert len(list(find_pairs(index))) == 10
    monkeypatch.setattr(pairs_module, "MOST_CAPTIONS_OF_KEY", 29)
    assert list(find_pairs(index)) == []


def test_triplets_of_a_catalogue(catalogue, tmp_path):
    output = tmp_path / "triplets.jsonl"
    report = make(catalogue, output, rejected=tmp_path / "rejected.jsonl")
    rows = rows_of(output)
    assert report.measures["rows"] == len(rows) >= 20
    assert {"attribute", "replacement"} <= {row["kind"] for row in rows}
    for row in rows:
        assert row["reference"] != row["target"] and row["negatives"][0] == row["reference"]
        assert row["target"] not in row["negatives"]
        assert row["target_licence"] == ("MIT" if row["target"] == "hat.png" else "CC0")
    assert max(report.measures["targets"]["most_used"].values()) <= 5
    assert sum(report.rejected.values()) == len(rows_of(tmp_path / "rejected.jsonl"))
    assert all(row["reason"] in report.rejected for row in rows_of(tmp_path / "rejected.jsonl"))
    assert not (tmp_path / "triplets.jsonl.work").exists()
    loaded = load_triplets(output, catalogue)
    assert loaded["caption"][:] == [row["caption"] for row in rows]
    assert loaded["target_id"][:] == [row["target_id"] for row in rows]


def test_the_seed_decides(catalogue, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        make(catalogue, file, seed=seed, count=12)
    first, again, other = (file.read_text() for file in files)
    assert first == again != other
    assert len(first.splitlines()) <= 12


@pytest.mark.parametrize("stage", ["made-00000", "screened", "balanced"])
def test_an_interrupted_run_resumes(catalogue, tmp_path, monkeypatch, stage):
    whole_run, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    make(catalogue, whole_run)
    run, started = pipeline._Stages.run, []

    def interrupted(self, name, produce):
        if name == stage and stage not in started:
            started.append(name)
            raise KeyboardInterrupt
        return run(self, name, lambda: started.append(f"ran {name}") or produce())

    monkeypatch.setattr(pipeline._Stages, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(catalogue, resumed)
    assert not resumed.exists()
    make(catalogue, resumed)
    assert resumed.read_bytes() == whole_run.read_bytes()
    assert started.count("ran made-00000") == 1, "a finished stage ran again"


def test_near_duplicates_broken_images_and_copies_of_a_benchmark_are_left_out(catalogue, tmp_path):
    (tmp_path / "gallery").mkdir()
    image = Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256), 99)]
    )
    image.save(tmp_path / "red-car.png")
    image.resize((100, 100)).save(tmp_path / "gallery" / "q.jpg", quality=90)
    image.save(tmp_path / "copy.png")
    image.rotate(90).save(tmp_path / "blue-car.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    checks = ImageChecks(tmp_path, [tmp_path / "gallery"], progress=False)
    assert checks.problem("blue-car.png", "red-car.png") == "copy of a benchmark's image"
    checks = ImageChecks(tmp_path, progress=False)
    assert checks.problem("blue-car.png", "red-car.png") is None
    assert checks.problem("copy.png", "red-car.png") == "reference and target look the same"
    assert checks.problem("broken.png", "red-car.png").startswith("image cannot be read")
    assert checks.problem("../x.png", "red-car.png") == "image not in the folder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        ImageChecks(tmp_path, [tmp_path / "empty"], progress=False)


def test_pairs_stay_within_a_group(catalogue, tmp_path):
    rows = rows_of(catalogue / "captions.jsonl")
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps({**row, "artist": n % 2}) + "\n" for n, row in enumerate(rows)))
    make_triplets(table, catalogue, tmp_path / "out.jsonl", Making(group="artist"), progress=False)
    artist = {row["image"]: n % 2 for n, row in enumerate(rows)}
    made = rows_of(tmp_path / "out.jsonl")
    assert made and all(artist[row["reference"]] == artist[row["target"]] for row in made)
    with pytest.raises(ValueError, match="missing column"):
        make_triplets(table, catalogue, tmp_path / "out.jsonl", Making(group="album"), progress=False)


def test_limits():
    screen = Screen(Limits(target_uses=2, caption_uses=None, reference_uses=None))
    row = {"reference": "a", "target": "t", "caption": "make it red"}
    assert [screen.reason({**row, "reference": name}) for name in "abc"] == [None, None, "target used 2 times already"]
    assert Screen(Limits()).reason({**row, "target": "a"}) == "reference is the target"
    assert "fewer than 2" in Screen(Limits()).reason({**row, "caption": "red"})
    with pytest.raises(ValueError, match="caption_uses=0 would keep no triplet"):
        Limits(caption_uses=0)


def test_kinds_are_balanced():
    found = {"a": 1000, "b": 500, "c": 10, "d": 90}
    assert allowances(found, None, Limits()) == {"a": 400, "b": 400, "c": 10, "d": 90}
    assert sum(allowances(found, 100, Limits()).values()) <= 100
    assert max(allowances(found, 100, Limits()).values()) == 25
    assert allowances({"a": 7}, None, Limits()) == {"a": 7}


def test_equal_captions_and_equal_images_share_a_target_id():
    ids = TargetIds()
    for image, words in (("b", 1), ("a", 1), ("a", 2), ("c", 2), ("d", 3)):
        ids.join(image, words)
    assert [ids.id_of(name) for name in "abcd"] == ["a", "a", "a", "d"]


BAD = {
    "one row": ([("red-car.png", "a red car")], "a triplet needs two images"),
    "equal captions": ([("red-car.png", "a car"), ("blue-car.png", "a car")], "no two by the same"),
    "empty captions": ([("red-car.png", " "), ("blue-car.png", "")], "describe each image in a sentence"),
    "long captions": ([("red-car.png", "red " * 500), ("blue-car.png", "blue " * 500)], "shorten the captions"),
    "another script": ([("red-car.png", "красная машина"), ("blue-car.png", "синяя машина")], "--language"),
    "images missing": ([("x.png", "a red car"), ("y.png", "a blue car")], "--images"),
    "nothing alike": ([("red-car.png", "a dog sleeps"), ("blue-car.png", "two boats at sea in a storm")], "--model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_report(case, catalogue, tmp_path):
    rows, remedy = BAD[case]
    table, output = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    table.write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in rows))
    with pytest.raises(ValueError, match="no triplet could be made") as error:
        make_triplets(table, catalogue, output, progress=False)
    assert remedy in str(error.value)
    assert remedy in (tmp_path / "out.jsonl.report.md").read_text()
    assert not output.exists()


def test_settings_that_have_no_effect_are_refused(catalogue, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        make(catalogue, tmp_path / "out.csv")
    with pytest.raises(ValueError, match="direct_share"):
        Making(direct_share=0.5)
    with pytest.raises(ValueError, match="held_out"):
        Making(held_out=("x",), check_images=False)
    with pytest.raises(ValueError, match="count=0"):
        Making(count=0)
    with pytest.raises(ValueError, match="no such file"):
        make_triplets(tmp_path / "none.csv", catalogue, tmp_path / "out.jsonl")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".json"])
def test_a_table_read_in_blocks_equals_the_whole(tmp_path, ending):
    from datasets import Dataset

    data = Dataset.from_dict({"image": [f"{n}.png" for n in range(11)], "caption": [f"a, {n}" for n in range(11)]})
    file = tmp_path / f"t{ending}"
    if ending == ".json":
        file.write_text(json.dumps(data.to_list()))
    else:
        {".csv": data.to_csv, ".jsonl": data.to_json, ".parquet": data.to_parquet}[ending](file)
    blocks = list(iterate_table(file, ("image", "caption"), ("licence",), rows_at_once=4))
    assert [len(block["image"]) for block in blocks] == [4, 4, 3]
    joined = {name: [cell for block in blocks for cell in block[name]] for name in ("image", "caption", "licence")}
    assert joined == {**read_table(file, ("image", "caption")), "licence": [""] * 11}
    with pytest.raises(ValueError, match=r"missing column\(s\) \['x'\]"):
        list(iterate_table(file, ("image", "x")))


# ---- report ----


def test_measures_are_those_of_a_small_set(english):
    rows = [
        {
            "reference": "a",
            "caption": "make the the car red",
            "target": "b",
            "reference_caption": "a blue car",
            "target_caption": "a red car",
        },
        {"reference": "c", "caption": "Addition - add an hat", "target": "b", "kind": "addition"},
    ]
    found = measure(rows, english)
    assert found["rows"] == 2 and found["targets"] == {"distinct": 1, "most_used": {"b": 2}}
    assert found["repeated_in_batch"]["target"]["64"] == pytest.approx(1, rel=MEAN_ERROR)
    assert found["repeated_in_batch"]["caption"]["64"] == 0
    assert found["faults"] == dict.fromkeys(
        ["a for an, or an for a", "a word twice in a row", "names its kind", "two articles"], 0.5
    )
    assert found["overlap"] == 1 and found["cycle"] == {"precision": 1 / 3, "recall": 1}


def test_repetition_in_a_batch_is_that_of_random_batches():
    draw = random.Random(0)
    uses = [5, 3, 3] + [1] * 60
    rows = [value for value, number in enumerate(uses) for _ in range(number)]
    hits = sum(len({*(batch := draw.sample(rows, 8))}) < len(batch) for _ in range(20_000))
    assert repeated_in_batch(uses, 8) == pytest.approx(hits / 20_000, abs=0.02)  # an approximation


PUBLISHED = {
    "laion_template_info.json": [{"ref_image_id": 42, "relative_cap": "no dog.", "tgt_image_id": 7}],
    "laion_llm_info.json": {"0000042": {"tgt_image_id": 7, "relative_cap": "Remove the dog", "tgt_cap": "a lawn"}},
    "lasco_train.json": [
        {"qid": 1, "query-image": [1, "a.jpg"], "query-text": "no dog", "target-image": [2, "b.jpg"]}
    ],
    "cap.rc2.train.json": [{"pairid": 1, "reference": "dev-1", "target_hard": "dev-2", "caption": "no dog"}],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_reported_on_as_they_are(name, tmp_path, english):
    (tmp_path / name).write_text(json.dumps(PUBLISHED[name]))
    report = report_on(tmp_path / name, english)
    assert report.measures["rows"] == 1 and report.measures["targets"]["distinct"] == 1
    assert ("overlap" in report.measures) == ("llm" in name)
    assert "# Triplets" in str(report) and "<table>" in report.page()


def test_other_files_are_refused_by_their_columns(tmp_path):
    (tmp_path / "x.json").write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match=r"columns \['a'\], but triplets have"):
        list(read_rows(tmp_path / "x.json"))


def test_the_page_shows_images_and_escapes_captions(catalogue, tmp_path):
    from pvlf_hf.data.making.triplet_report import opener

    file = tmp_path / "t.csv"
    file.write_text(
        'reference,caption,target\nred-car.png,"make it <b>blue</b>",blue-car.png\n../x,now gone,none.png\n'
    )
    page = report_on(file, load_vocabulary("en")).page(opener(catalogue))
    assert page.count("data:image/jpeg") == 2 and "<b>" not in page and "../x (StopIteration)" in page


def test_commands(catalogue, tmp_path):
    output = tmp_path / "out.jsonl"
    table = str(catalogue / "captions.jsonl")
    runner = CliRunner()
    done = runner.invoke(
        pvlf_hf_cli.app,
        ["triplets", table, "--images", str(catalogue), "--output", str(output), "--count", "10", "--json"],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["measures"]["rows"] == len(rows_of(output)) <= 10
    for ending in ("md", "json", "html"):
        assert (tmp_path / f"out.jsonl.report.{ending}").is_file()
    done = runner.invoke(
        pvlf_hf_cli.app, ["report", str(output), "--images", str(catalogue), "--output", str(tmp_path / "again")]
    )
    assert done.exit_code == 0 and "## Kinds" in done.stdout
    assert (tmp_path / "again.html").read_text().count("data:image/jpeg") == 2 * len(rows_of(output))
