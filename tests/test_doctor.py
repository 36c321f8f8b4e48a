"""The doctor finds every kind of damage planted in a healthy data set, and nothing else."""

import json
import os
import re
import shutil

import datasets
import pytest
from miniatures import MAKERS as ALL_MAKERS
from miniatures import make_all, make_circo, make_cirr, make_fashioniq, make_icir, make_laion_cir, write_json
from tiny import make_processor
from typer.testing import CliRunner

from pvlf_hf.data import circled, edir, icir
from pvlf_hf.data.cirr import load_cirr
from pvlf_hf.data.doctor import (
    examine,
    examine_circo,
    examine_cirr,
    examine_fashioniq,
    examine_laion_cir,
    examine_triplets,
)
from pvlf_hf.data.protocols import DATA_SETS
from pvlf_hf_cli import Subject, app

MAKERS = {"laion-cir": make_laion_cir, "cirr": make_cirr, "fashioniq": make_fashioniq, "circo": make_circo}
EXAMINERS = {
    "laion-cir": examine_laion_cir,
    "cirr": examine_cirr,
    "fashioniq": examine_fashioniq,
    "circo": examine_circo,
}
CAPTIONS = {
    "laion-cir": ("laion_combined_info.json", "relative_cap"),
    "cirr": ("cirr/captions/cap.rc2.val.json", "caption"),
    "circo": ("annotations/val.json", "relative_caption"),
}
IMAGES = {
    "laion-cir": "[0-9]*.png",
    "cirr": "dev/*.png",
    "fashioniq": "images/B00D1*.png",
    "circo": "COCO2017_unlabeled/unlabeled2017/*.jpg",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image_files(subject, root):
    return sorted(root.glob(IMAGES[subject]))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


@pytest.mark.parametrize("subject", MAKERS)
def test_healthy_data_sets_have_no_findings(subject, tmp_path):
    root = MAKERS[subject](tmp_path)
    report = EXAMINERS[subject](root, check_counts=False)
    assert report.findings == () and report.healthy
    assert sum(counts["files"] for counts in report.counts.values()) == {"fashioniq": 36, "circo": 18}.get(
        subject, len(image_files(subject, root))
    )
    published = EXAMINERS[subject](root)
    assert {finding.kind for finding in published.findings} == (set() if subject == "laion-cir" else {"counts"})


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def page(file):
    file.write_text("<html>404</html>")


def folder(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def other_ending(file):
    file.rename(file.with_suffix(".webp"))


def no_zeros(file):
    file.rename(file.with_name("0" + file.name.lstrip("0")))


def lower(file):
    file.rename(file.with_name(file.name.lower()))


def other_folder(file):
    (file.parent / "more").mkdir()
    file.rename(file.parent / "more" / file.name)


def double(file):
    other = sorted(file.parent.glob(f"*{file.suffix}"))
    shutil.copy(file, other[other.index(file) - 1])


@pytest.mark.parametrize("subject", MAKERS)
@pytest.mark.parametrize(
    ("damage", "kind", "severity"),
    [
        (remove, "missing", "error"),
        (empty, "empty file", "error"),
        (cut, "corrupt", "error"),
        (page, "corrupt", "error"),
        (folder, "corrupt", "error"),
        (dangling, "corrupt", "error"),
        (other_ending, "misnamed", "error"),
        (other_folder, "misnamed", "error"),
        (double, "duplicate", "warning"),
    ],
)
def test_damaged_files_are_reported(subject, damage, kind, severity, tmp_path):
    root = MAKERS[subject](tmp_path)
    file = image_files(subject, root)[5]
    damage(file)
    report = EXAMINERS[subject](root, check_counts=False)
    (finding,) = report.findings
    assert (finding.kind, finding.severity) == (kind, severity)
    assert file.stem.lstrip("0") in finding.examples[0] and len(finding.examples) == 1
    assert report.healthy == (severity == "warning")


@pytest.mark.parametrize(
    ("subject", "number", "damage"), [("laion-cir", 1, no_zeros), ("circo", 1, no_zeros), ("fashioniq", 1, lower)]
)
def test_misnamed_files_are_reported(subject, number, damage, tmp_path):
    root = MAKERS[subject](tmp_path)
    file = image_files(subject, root)[number]
    damage(file)
    (finding,) = EXAMINERS[subject](root, check_counts=False).findings
    assert finding.kind == "misnamed" and finding.examples[0].endswith(f" instead of {file.name}")


@pytest.mark.parametrize("number", [2, 13])
def test_effects_count_rows_that_the_loader_skips(number, tmp_path):
    root = make_cirr(tmp_path)
    files = json.loads((root / "cirr/image_splits/split.rc2.val.json").read_text())
    (root / list(files.values())[number]).unlink()
    lost = 10 - len(load_cirr(root, allow_missing=True, check_counts=False).queries)
    (finding,) = examine_cirr(root, check_counts=False).findings
    easier = "without 1 of the gallery's 14 images the ranking of the other queries is easier than published"
    limit = (
        f"{lost} of 10 queries cannot be scored: counted as misses, recall can reach at most {100 - 10 * lost}.00 %"
    )
    assert finding.effect == (f"{limit}; {easier}" if number == 2 else easier)
    assert (lost > 0) == (number == 2)


def test_effects_on_training_and_submissions_are_reported(tmp_path):
    root = make_cirr(make_laion_cir(tmp_path))
    (root / "0000001.png").unlink()  # reference of one template row, target of another
    assert examine_laion_cir(root).findings[0].effect == "2 of 16 triplets cannot be trained on"
    shutil.copy(root / "0062438.png", root / "0124875.png")
    assert "2 of 16 triplets have a target that is also a negative" in examine_laion_cir(root).findings[1].effect
    files = sorted(root.glob("test1/*.png"))
    files[0].unlink()
    assert "queries cannot be ranked, and a submission without" in (
        examine_cirr(root, "test1", check_counts=False).findings[0].effect
    )


def test_duplicates_count_the_targets_that_they_affect(tmp_path):
    root = make_circo(tmp_path)
    first = json.loads((root / "annotations/val.json").read_text())[1]["gt_img_ids"]
    one, other = (root / f"COCO2017_unlabeled/unlabeled2017/{i:012d}.jpg" for i in first[:2])
    shutil.copy(one, other)
    rows = json.loads((root / "annotations/val.json").read_text())
    touched = sum(len(set(row["gt_img_ids"]) & set(first[:2])) == 1 for row in rows)  # both: either may be found first
    (finding,) = examine_circo(root, check_counts=False).findings
    assert 0 < touched < 6 and f"by which {touched} of 6 targets are ranked" in finding.effect


@pytest.mark.parametrize("subject", CAPTIONS)
def test_long_and_blank_captions_are_reported(subject, tmp_path):
    root = MAKERS[subject](tmp_path)
    name, key = CAPTIONS[subject]
    edit(root / name, lambda rows: rows[3].update({key: "the same but red and " * 8}))  # 40 words, 42 tokens
    for tokenizer in (None, make_processor().tokenizer):
        (finding,) = EXAMINERS[subject](root, tokenizer=tokenizer, check_counts=False).findings
        assert (finding.kind, finding.severity) == ("long caption", "note")
        assert "captions exceed the 35 tokens that BLIP reads" in finding.message and finding.message.startswith(
            "1 of"
        )
        assert ("estimate" in finding.message) == (tokenizer is None)
    edit(root / name, lambda rows: rows[3].update({key: "a " * 33}))  # 35 tokens are read
    assert EXAMINERS[subject](root, tokenizer=tokenizer, check_counts=False).findings == ()
    edit(root / name, lambda rows: rows[3].update({key: " "}))
    (finding,) = EXAMINERS[subject](root, check_counts=False).findings
    assert finding.kind == "annotations" and f"row 3: {key} is ' '" in finding.message


def test_fashioniq_rows_with_one_caption_are_reported(tmp_path):
    root = make_fashioniq(tmp_path)
    edit(root / "captions/cap.shirt.val.json", lambda rows: rows[2].update(captions=["is red", " ."]))
    (finding,) = examine_fashioniq(root, check_counts=False).findings
    assert (finding.kind, finding.where, finding.examples) == ("blank caption", "fashioniq/val/shirt", ("row 2",))


def test_unlisted_images_and_unreadable_annotations_are_reported(tmp_path):
    root = make_cirr(tmp_path)
    listing = root / "cirr/image_splits/split.rc2.val.json"
    name = json.loads((root / "cirr/captions/cap.rc2.val.json").read_text())[0]["target_hard"]
    edit(listing, lambda files: files.pop(name))
    (finding,) = examine_cirr(root, check_counts=False).findings
    assert (finding.kind, finding.examples) == ("unlisted", (name,)) and "cannot be scored" in finding.effect
    listing.write_text("{")
    assert [f.kind for f in examine_cirr(root).findings] == ["annotations"]
    assert "cap.rc2.val.json is not under" in examine_cirr(root / "nowhere").findings[0].message


def test_loader_errors_are_reported(tmp_path):
    root = make_cirr(tmp_path)
    edit(
        root / "cirr/captions/cap.rc2.val.json",
        lambda rows: rows[0].update(reference=rows[0]["target_hard"]),
    )
    (finding,) = examine_cirr(root, check_counts=False).findings
    assert finding.kind == "loader" and "have their reference as target" in finding.message


@pytest.fixture
def table(tmp_path):
    root = make_laion_cir(tmp_path / "images")
    names = [file.name for file in image_files("laion-cir", root)]
    rows = [f"{a},make it red,{b}" for a, b in zip(names, names[1:], strict=False)]
    file = tmp_path / "triplets.csv"
    file.write_text("\n".join(["reference,caption,target", *rows]) + "\n")
    return file


@pytest.mark.parametrize(
    ("damage", "kinds"),
    [(None, []), (remove, ["missing"]), (other_ending, ["misnamed"]), (cut, ["corrupt"]), (double, ["duplicate"])],
)
def test_damaged_images_of_own_triplets_are_reported(table, damage, kinds):
    folder = table.parent / "images"
    if damage:
        damage(image_files("laion-cir", folder)[5])
    report = examine_triplets(table, folder)
    assert [finding.kind for finding in report.findings] == kinds
    assert report.counts[str(table)]["triplets"] == 15


def test_own_triplets_outside_the_folder_are_reported(table):
    shutil.copy(next((table.parent / "images").glob("*.png")), table.parent / "secret.png")
    table.write_text(table.read_text() + "../secret.png,red,0000001.png\n")
    kinds = [finding.kind for finding in examine_triplets(table, table.parent / "images").findings]
    assert "loader" in kinds


def test_doctor_command_prints_text_and_json(table, tmp_path):
    def doctor(*arguments):
        done = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
        return done.exit_code, done.stdout

    root, images = make_cirr(tmp_path / "cirr"), table.parent / "images"
    code, text = doctor("cirr", root, "--partial")
    assert code == 0 and "0 errors, 0 warnings, 0 notes\ncirr/val: 10 queries, 14 images, 14 files" in text
    code, text = doctor("cirr", root, "--split", "test1")
    assert code == 1 and "2 errors" in text
    assert "\nERROR cirr/test1, counts: 8 queries, published are 4148\n    the annotations" in text
    make_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    cut(image_files("laion-cir", images)[0])
    options = ["--images", images, "--tokenizer", tmp_path / "tokenizer", "--json"]
    code, text = doctor("triplets", table, *options)
    report = json.loads(text)
    assert code == 1 and report["healthy"] is False and [f["kind"] for f in report["findings"]] == ["corrupt"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["cirr", "x", "--split", "test"], 1, "error: unknown split 'test': cirr has train, val, test1"),
        (["cir", "x"], 2, "'cir' is not one of 'laion-cir', 'cirr', 'fashioniq', 'circo', 'icir', "),
        (["cirr", "x", "--tokenizer", "/nowhere"], 1, "error: no tokenizer in /nowhere"),
    ],
)
def test_invalid_arguments_end_the_command_with_an_error(options, code, message):
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exit_code == code and message in done.stderr and not done.stdout


def test_every_data_set_is_examined_by_name(tmp_path):
    assert [subject.value for subject in Subject] == [*ALL_MAKERS, "triplets"] == [*DATA_SETS, "triplets"]
    for name in ("laion-cir", "cirr"):  # the data sets have different splits
        root = MAKERS[name](tmp_path / name)
        assert examine(name, root, check_counts=False) == EXAMINERS[name](root, check_counts=False)
    with pytest.raises(ValueError, match="unknown data set 'cir'; choose from .*'laion-cir'"):
        examine("cir", tmp_path)


# ---- the data sets of 2025 and 2026 ----

# By name: an image of a gallery, and the annotation that an error is planted in.
NEWER = {
    "icir": ("database/big_ben/big_ben_3.jpg", "query_files.csv"),
    "pinpoint": ("images/0ea*.jpg", "pinpoint_licensed.parquet"),
    "circled": ("../circo/COCO2017_unlabeled/unlabeled2017/000000500029.jpg", "data/cirr_val.json"),
    "genecis": ("val2017/000000000721.jpg", "genecis/focus_object.json"),
    "refined-cirr": ("../cirr/dev/dev-1261-1-img1.png", "refined_cirr.val.json"),
    "refined-fashioniq": ("../fashioniq/images/B00D1Y8X11.png", "refined_fiq.dress.val.json"),
    "l-cirr": ("../cirr/dev/dev-1261-1-img1.png", "cap.rc2.val.json"),
    "edir": ("imgs_mc/501_007464816_2.png", "corpus.jsonl"),
}


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("newer"))


@pytest.mark.parametrize("name", NEWER)
def test_newer_data_sets_are_examined(newer, name, tmp_path):
    def report(**options):
        return examine(name, data / name, **options)

    data = shutil.copytree(newer, tmp_path / "data", copy_function=os.link)
    always = {"layout"} if name == "l-cirr" else set()
    healthy = report(check_counts=False)
    assert {finding.kind for finding in healthy.findings} == always
    assert all(counts["files"] == counts["images"] for counts in healthy.counts.values())
    assert {finding.kind for finding in report().findings} == {"counts", *always}
    image, annotation = NEWER[name]
    next((data / name).glob(image)).unlink()
    findings = report(check_counts=False).findings
    assert {finding.kind for finding in findings} == {"missing", *always}
    assert "easier than published" in findings[-1].effect
    file = data / name / annotation
    file.unlink()
    file.write_bytes(b"{")
    (finding,) = report().findings
    assert finding.kind == "annotations" and file.name in finding.message


# By data set: the part that is examined, and what is said of its numbers.
COUNTED = {
    "icir": (
        "icir/test",
        ["5 queries, published are 1883", "2 instances, published are 202", "14 images.*about 750,000"],
    ),
    "circled": (
        "circled/circo_val",
        ["4 sessions, published are 54", "10 queries, published are 141", "18 images, published are 123403"],
    ),
    "edir": (
        "edir/test",
        ["5 queries, published are 5000", "11 gallery images, published are 28645", "2 subcat.*, published are 15"],
    ),
    "refined-cirr": ("refined-cirr/val", ["6 of the 10 queries of CIRR's val split", "14 images, published are 2297"]),
    "refined-fashioniq": (
        "refined-fashioniq/val/dress",
        ["12 images, published are 3817", "5 of the 6 queries of FashionIQ's dress"],
    ),
    "l-cirr": ("l-cirr/val", ["5 of the 10 queries of CIRR's val split", "14 images, published are 2297"]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_numbers_are_compared_with_those_published(newer, name, tmp_path):
    data = shutil.copytree(newer, tmp_path / "data", copy_function=shutil.copy)
    if name == "refined-fashioniq":
        edit(data / name / "refined_fiq.dress.val.json", lambda rows: rows.pop())
    where, expected = COUNTED[name]
    found = [f for f in examine(name, data / name).findings if f.kind == "counts" and f.where == where]
    assert len(found) == len(expected)
    for message in expected:
        (finding,) = [f for f in found if re.search(message, f.message)]
        assert finding.severity == ("warning" if "queries of" in message else "error")


def test_published_numbers_give_no_findings(newer, monkeypatch):
    monkeypatch.setattr(circled, "EXPECTED_COUNTS", {"cirr_val": (2, 2, 0, 0, 0)})
    monkeypatch.setattr(circled.cirr, "EXPECTED_COUNTS", {"val": (10, 14)})
    monkeypatch.setattr(edir, "EXPECTED_COUNTS", {"queries": 5, "gallery images": 11, "subcategories": 2})
    monkeypatch.setattr(icir, "EXPECTED_COUNTS", {"queries": 5, "instances": 2})
    monkeypatch.setattr(icir, "ABOUT_IMAGES", 14)
    for name in ("edir", "icir"):
        assert examine(name, newer / name).findings == ()
    assert examine("circled", newer / "circled", "cirr_val").findings == ()
    circled.load_circled(newer / "circled", "cirr_val")
    for loader, name in ((edir.load_edir, "edir"), (icir.load_icir, "icir")):
        loader(newer / name)


def test_sessions_of_circled_are_those_of_its_card():
    published = {subset: circled.expected_counts(subset) for subset in circled.SUBSETS}
    assert sum(counts["sessions"] for counts in published.values()) == 22608
    averages = {subset: round(counts["queries"] / counts["sessions"], 2) for subset, counts in published.items()}
    assert averages["fashioniq_dress_val"] == 2.73 and averages["cirr_train"] == 2.5 and averages["circo_val"] == 2.61


def test_pairs_that_fashioniq_does_not_have_are_reported(newer, tmp_path):
    data = shutil.copytree(newer, tmp_path / "data", copy_function=shutil.copy)
    edit(data / "refined-fashioniq/refined_fiq.val.json", lambda rows: rows[3].update(target="B000000000"))
    findings = examine("refined-fashioniq", data / "refined-fashioniq", check_counts=False).findings
    assert [finding.where for finding in findings] == [f"refined-fashioniq/val/{name}" for name in ("shirt", "toptee")]
    assert findings[0].severity == "error" and findings[0].message.startswith("1 rows of ")
    assert findings[0].examples[0].startswith("row 3 (") and "B000000000" in findings[0].examples[0]


def test_shards_that_are_not_unpacked_are_reported(tmp_path):
    report = examine("icir", make_icir(tmp_path, packed=True), check_counts=False)
    assert [finding.kind for finding in report.findings] == ["packed", "missing"]
