"""Tables of triplets are read unchanged, or refused with a message that names file, row, column and remedy."""

import json
import unicodedata
from datetime import date, datetime
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pvlf_hf import benchmark_from_triplets, load_triplets
from pvlf_hf.data.doctor import examine_triplets
from pvlf_hf.data.triplets import read_triplet_table

HEADER = "reference,caption,target\n"


@pytest.fixture
def folder(tmp_path):
    """Return a folder of different images, in which tests write their table."""
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        draw(tmp_path / "images" / name, number)
    return tmp_path / "images"


def draw(file, number):
    file.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (9, 9), (20 * number, 0, 0)).save(file, "PNG")


def write(folder, name, content):
    file = folder.parent / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def write_parquet(folder, **columns):
    file = folder.parent / "t.parquet"
    pq.write_table(pa.table({"reference": ["a.png"], "target": ["b.png"], **columns}), file)
    return file


def row(**cells):
    return json.dumps({"reference": "a.png", "caption": "red", "target": "b.png", **cells}) + "\n"


# ---- cells ----


@pytest.mark.reliability(
    9,
    "Table readers repair nothing: text that looks like a date or a number, and numbers, are returned as the "
    "file spells them, equally from CSV and JSON Lines",
    broken=("src/pvlf_hf/data/tables.py", "parse_int=str, parse_float=str, object_pairs_hook", "object_pairs_hook"),
)
def test_cells_keep_the_text_of_the_file(folder, figure):
    texts = ["2024-05-01", "2024-05-01T12:00:00Z", "12:30", "007", "1e3", "1_000", "NaN", "null", "None", "true", "#1"]
    numbers = ["2", "2.50", "1e5", "-0.0", "12345678901234567890123"]
    csv_file = write(folder, "t.csv", HEADER + "".join(f"a.png,{text},b.png\n" for text in texts + numbers))
    lines = [row(caption=text) for text in texts] + [row(caption="@").replace('"@"', number) for number in numbers]
    json_file = write(folder, "t.jsonl", "".join(lines))
    list_file = write(folder, "t.json", "[" + ",".join(lines) + "]")
    for file in (csv_file, json_file, list_file):
        assert read_triplet_table(file)["caption"] == texts + numbers, file
    figure(f"{len(texts + numbers)} cells, 3 kinds of file")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('["is red", "is short"]', r"is \['is red', 'is short'\], a list.*join its texts into one, or write a row"),
        ('{"en": "red"}', r"is {'en': 'red'}, a dict.*write the text alone"),
        ("true", "is True, a bool.*write it as text, in quotes"),
        ("NaN", "is nan, a float.*pandas writes missing cells so"),
        ('"a \\ud800"', r"contains '\\ud800', a lone surrogate"),
    ],
)
@pytest.mark.parametrize("column", ["reference", "caption", "target", "target_id"])
def test_cells_that_are_not_text_raise(folder, column, cell, message):
    line = row(**{column: "@"}).replace('"@"', cell)
    file = write(folder, "t.jsonl", row(target_id="1") * 2 + line)
    with pytest.raises(ValueError, match=rf"t.jsonl: column '{column}', data row 2 \(counted from 0\) {message}"):
        load_triplets(file, folder)
    (finding,) = examine_triplets(file, folder).findings
    assert (finding.kind, finding.severity) == (
        "annotations",
        "error",
    ) and f"'{column}', data row 2" in finding.message


@pytest.mark.parametrize(
    ("cell", "text"), [(7, "7"), (0.5, "0.5"), (Decimal("2.50"), "2.50"), ("2024-05-01", "2024-05-01")]
)
def test_numbers_in_parquet_become_text(folder, cell, text):
    assert read_triplet_table(write_parquet(folder, caption=[cell]))["caption"] == [text]
    cells = pa.array([str(cell)]).dictionary_encode()  # as pandas stores categories
    assert read_triplet_table(write_parquet(folder, caption=cells))["caption"] == [str(cell)]


@pytest.mark.parametrize(
    ("cell", "kind"),
    [(["is red"], "list"), (datetime(2024, 5, 1), "datetime"), (date(2024, 5, 1), "date"), (b"red", "bytes")],
)
def test_other_cells_in_parquet_raise(folder, cell, kind):
    with pytest.raises(
        ValueError, match=rf"column 'caption', data row 0 \(counted from 0\) is .*, a {kind}, but cells"
    ):
        load_triplets(write_parquet(folder, caption=[cell]), folder)


def test_images_in_parquet_raise_with_a_remedy(folder):
    columns = {"reference": [str(folder / "a.png")], "caption": ["red"], "target": [str(folder / "b.png")]}
    rows = datasets.Dataset.from_dict(columns)
    for column in ("reference", "target"):
        rows = rows.cast_column(column, datasets.Image())
    (folder.parent / "rows").mkdir()
    rows.to_parquet(folder.parent / "rows/t.parquet")
    with pytest.raises(
        ValueError, match="t.parquet: column 'reference' holds images.*from its folder with load_hub_trip"
    ):
        load_triplets(folder.parent / "rows/t.parquet", folder)
    # the format that load_hub_triplets reads
    loaded = datasets.load_dataset(str(folder.parent / "rows"), split="train")
    assert loaded[0]["reference"].size == (9, 9)


# ---- files ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            HEADER.replace(",", ";") + "a.png;red, or blue;b.png\n",
            r"separated by semicolons \(';'\), not by com",
        ),
        ("t.csv", HEADER.replace(",", "\t") + "a.png\tred\tb.png\n", r"separated by tabs \('\\t'\), not by commas"),
        (
            "t.csv",
            "Reference,Caption,Target\na.png,red,b.png\n",
            "case and blanks: 'Reference' must be 'reference', 'Cap",
        ),
        ("t.csv", "reference, caption,target\na.png,red,b.png\n", "case and blanks: ' caption' must be 'caption'"),
        ("t.csv", "reference,caption,target,Target_ID\na.png,red,b.png,1\n", "'Target_ID' must be 'target_id'"),
        (
            "t.csv",
            "image,caption,target\na.png,red,b.png\n",
            r"missing column\(s\) \['reference'\].*Rename the columns in",
        ),
        (
            "t.csv",
            "reference,caption,target,caption\na.png,red,b.png,blue\n",
            r"\['caption'\] are given more than once",
        ),
        (
            "t.csv",
            HEADER + "a.png,red, or blue,b.png\n",
            "row in line 2 has 4 cells, but the header has 3: a caption that",
        ),
        ("t.csv", HEADER + 'a.png,"red\ndress",b.png\na.png,red\n', "row in line 4 has 2 cells.*: a cell is missing"),
        ("t.csv", HEADER + 'a.png,red,b.png\na.png,"red,b.png\n', "row that begins in line 3.*A quote is not closed"),
        (
            "t.csv",
            HEADER + 'a.png,"a "red" dress",b.png\n',
            "row that begins in line 2.*one inside quotes is not doubled",
        ),
        ("t.csv", HEADER, "it has a header but no rows"),
        ("t.csv", "", "it is empty"),
        ("t.csv", (HEADER + "a.png,café,b.png\n").encode("latin-1"), r"not UTF-8 text \(byte b'\\xe9' at position"),
        ("t.csv", (HEADER + "a.png,red,b.png\n").encode("utf-16"), "it is UTF-16, but it must be UTF-8: save it as"),
        ("t.jsonl", row() + '{"reference": "a.png", "cap', "line 2 is not JSON, or cut off: .*, near '.*cap'"),
        (
            "t.jsonl",
            row() + '["a.png", "red", "b.png"]',
            r"data row 1 \(counted from 0\) is \['a.png', 'red', 'b.png'\], but",
        ),
        (
            "t.jsonl",
            row().replace('"caption"', '"target"'),
            r"line 1: 1 keys are given more than once, first: \['target'\]",
        ),
        ("t.json", json.dumps({"reference": "a.png"}, indent=2), "holds one object over several lines.*lines=True"),
        ("t.json", "[]", "it has no rows"),
        ("t.parquet", b"PAR1 cut off", "cannot be read as Parquet .*: write or fetch it again"),
        ("t.xlsx", "", r"cannot read .xlsx; use one of \['.csv', '.jsonl', '.json', '.parquet'\]"),
    ],
)
def test_unreadable_tables_raise_with_a_fitting_remedy(folder, name, content, message):
    file = write(folder, name, content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        load_triplets(file, folder)
    assert [finding.kind for finding in examine_triplets(file, folder).findings] == ["annotations"]


def test_equivalent_spellings_of_a_table_are_read(folder):
    rows = "a.png,red,b.png\n"
    for name, content in (
        ("T.CSV", HEADER + rows),
        ("bom.csv", "\ufeff" + HEADER + rows),
        ("crlf.csv", (HEADER + "\n" + rows + "\n\n").replace("\n", "\r\n")),
        ("quoted.csv", '"reference","caption","target","note"\n"a.png","red","b.png","a, b ""c"""\n'),
        ("T.JSONL", "\n" + row() + "\n"),
        ("bom.jsonl", "\ufeff" + row(note=["any", {"thing": 1}])),
        ("list.json", "[" + row() + "]"),
    ):
        cells = read_triplet_table(write(folder, name, content))
        assert cells == {"reference": ["a.png"], "caption": ["red"], "target": ["b.png"]}, name


def test_tables_are_read_without_a_cache(folder, monkeypatch):
    (folder.parent / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "file/cache")
    assert len(load_triplets(write(folder, "t.csv", HEADER + "a.png,red,b.png\n"), folder)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "images"), r"file is None \(NoneType\), but it takes a path"),
        ((["t.csv"], "images"), r"file is \['t.csv'\] \(list\), but it takes a path"),
        (("t.csv", 3), r"image_folder is 3 \(int\), but it takes a path"),
    ],
)
def test_paths_of_another_type_raise(arguments, message):
    with pytest.raises(TypeError, match=message):
        load_triplets(*arguments)


def test_missing_image_folder_raises(folder):
    file = write(folder, "t.csv", HEADER + "a.png,red,b.png\n")
    for image_folder in (folder / "nowhere", file):
        with pytest.raises(
            ValueError, match=f"{image_folder} is not a folder; pass the one that image names are relative to"
        ):
            load_triplets(file, image_folder)


# ---- image names ----


@pytest.mark.reliability(
    9,
    "An image's id is derived from its file, not from its spelling in the table: relative, absolute, through "
    "links, in either Unicode form",
    broken=(
        "src/pvlf_hf/data/image_files.py",
        "    return {name: own[os.path.realpath(folder / file)] for name, file in found.items()}",
        "    return {name: name for name in found}",
    ),
)
def test_spellings_of_one_file_are_one_item(folder, tmp_path, figure):
    (folder / "link.png").symlink_to("b.png")
    (folder / "more").symlink_to("sub")
    (tmp_path / "way").symlink_to(folder)
    spellings = {
        "b.png": ["b.png", "./b.png", "sub/../b.png", ".//b.png", str(folder / "b.png"), "link.png", " b.png"],
        "sub/c.png": ["sub/c.png", "sub//c.png", "sub\\c.png", "more/c.png", str(tmp_path / "way/sub/c.png")],
    }
    lines = [row(target=name, reference="a.png") for names in spellings.values() for name in names]
    for image_folder in (folder, tmp_path / "way"):
        triplets = load_triplets(write(folder, "t.jsonl", "".join(lines)), image_folder)
        expected = [file for file, names in spellings.items() for _ in names]
        assert triplets["target_id"][:] == triplets["target_image_id"][:] == expected
        gallery = benchmark_from_triplets("mine", triplets).gallery
        assert gallery["image_id"][:] == ["a.png", "b.png", "sub/c.png"]
    report = examine_triplets(folder.parent / "t.jsonl", folder)
    assert {finding.severity for finding in report.findings} == {"note"}
    assert report.counts[str(folder.parent / "t.jsonl")]["images"] == 3
    figure(f"{len(expected)} spellings of 2 files")


def test_links_that_lead_to_one_file_elsewhere_are_one_item(folder, tmp_path):
    draw(tmp_path / "far.png", 7)
    for name in ("one.png", "two.png"):
        (folder / name).symlink_to(tmp_path / "far.png")
    file = write(folder, "t.csv", HEADER + "a.png,red,two.png\na.png,red,one.png\n")
    assert load_triplets(file, folder, allow_links=True)["target_id"][:] == ["one.png"] * 2


def test_other_spellings_cannot_leave_the_folder(folder, tmp_path):
    draw(tmp_path / "secret.png", 8)
    (folder / "linked").symlink_to(tmp_path)
    for name, message in (
        ("..\\secret.png", "leave"),
        ("linked\\secret.png", "links that lead out"),
        (" linked/secret.png", "links"),
    ):
        with pytest.raises(ValueError, match=message):
            load_triplets(write(folder, "t.jsonl", row(target=name)), folder)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_other_systems_are_resolved(folder, form, caplog):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    draw(folder / unicodedata.normalize(form, "über/café ☕.png"), 4)
    name = unicodedata.normalize(other, "über\\café ☕.png ")
    file = write(folder, "t.jsonl", row(target=name))
    triplets = load_triplets(file, folder)
    assert triplets["target_id"][0] == unicodedata.normalize(form, "über/café ☕.png")
    assert triplets[0]["target"].getpixel((0, 0)) == (80, 0, 0)
    assert "1 image names are taken for files that differ from them in Unicode form" in caplog.text
    (finding,) = examine_triplets(file, folder).findings
    assert (finding.severity, finding.kind) == ("note", "misnamed") and finding.examples == (repr(name),)


@pytest.mark.parametrize(
    ("name", "there", "difference"),
    [
        ("A.PNG", "'a.png'", "letter case"),
        ("Sub/c.png", "'sub/c.png'", "folder"),
        ("c.png", "'sub/c.png'", "folder"),
        ("C:\\photos\\b.png", "'b.png'", "folder"),
        ("b.jpg", "'b.png'", "ending"),
        ("b", "'b.png'", "ending"),
        ("00b.png", "'b.png'", "leading zeros"),
        ("%62.png", "'b.png'", "Unicode form, escapes, blanks or invisible characters"),
        ("\u200bb.png", "'b.png'", "Unicode form, escapes, blanks or invisible characters"),
        ("\uff42.png", "'b.png'", "Unicode form, escapes, blanks or invisible characters"),
        ("'b.png'", "'b.png'", "Unicode form, escapes, blanks or invisible characters"),
    ],
)
def test_similar_names_are_suggested(folder, name, there, difference):
    file = write(folder, "t.jsonl", row(target=name))
    with pytest.raises(ValueError, match=r"1 of 2 images are not in .*images, first: \[") as caught:
        load_triplets(file, folder)
    assert f"there is {there}, which differs in {difference}." in str(caught.value)
    (finding,) = examine_triplets(file, folder).findings
    assert (finding.severity, finding.kind) == (
        "error",
        "misnamed",
    ) and f"differs in {difference}" in finding.examples[0]


def test_a_name_that_fits_two_files_is_not_guessed(folder):
    for number, form in enumerate(("NFC", "NFD")):
        draw(folder / unicodedata.normalize(form, "\u1ec7.png"), number)
    assert len(list(folder.glob("*.png"))) == 4
    third = "\u00ea\u0323.png"  # the same letter, neither composed nor decomposed
    with pytest.raises(ValueError, match="1 of 2 images are not in .*which differs in Unicode form"):
        load_triplets(write(folder, "t.jsonl", row(target=third)), folder)


def test_other_suffixes_are_other_images_where_both_are_named(folder):
    with pytest.raises(ValueError, match="first: .'b.jpg'.. Names must be given with their ending"):
        load_triplets(write(folder, "t.jsonl", row(target="b.jpg") + row()), folder)


def test_image_under_several_target_ids_warns(folder, caplog):
    load_triplets(write(folder, "t.jsonl", row(target_id=1) + row(target_id=2)), folder)
    assert "1 images are targets under more than one target_id" in caplog.text and "['b.png']" in caplog.text
