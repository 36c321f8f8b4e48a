"""Readers of untrusted files, as functions of a file's content: images, annotations, tables, submissions.

`tests/test_hostile.py` runs them on a few edited inputs, `tests/fuzz.py` on many, guided by coverage.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from miniatures import circled_session, circo_row, cirr_row, genecis_row, pinpoint_row
from PIL import Image

from pvlf_hf import PVLFImageProcessor
from pvlf_hf.data import circled, circo, cirr, edir, fashioniq, genecis, icir, laion_cir, pinpoint, refined_cirr
from pvlf_hf.data.triplets import read_triplet_table
from pvlf_hf.evaluation.submission import lint_submission
from pvlf_hf.models.image_processing_pvlf import FORMATS


def read_image(file):
    PVLFImageProcessor(size={"shortest_edge": 32}, crop_size=32)(str(file))


def read_cirr(file):
    cirr.read_queries(file, has_targets=True)
    cirr.read_queries(file, has_targets=False)


def read_cirr_gallery(file):
    read_cirr_gallery_of(file.parent / "cirr", file.read_bytes())


def read_cirr_gallery_of(root, listing):
    (root / "captions").mkdir(parents=True, exist_ok=True)
    (root / "image_splits").mkdir(exist_ok=True)
    (root / "captions/cap.rc2.val.json").write_bytes(CIRR[0])
    (root / "image_splits/split.rc2.val.json").write_bytes(listing)
    cirr.read_annotations(root, "val", check_counts=False)


def read_fashioniq(file):
    root = file.parent / "fashioniq"
    for folder, content in (("captions/cap", file.read_bytes()), ("image_splits/split", FASHIONIQ_GALLERY[0])):
        listing = root / f"{folder}.dress.val.json"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_bytes(content)
    for style in fashioniq.CAPTION_STYLES:
        fashioniq.read_annotations(root, "dress", "val", style, check_counts=False)


def read_circo(file):
    circo.read_queries(file, has_targets=True)
    circo.read_queries(file, has_targets=False)


def read_icir(file):
    for number in range(2):
        names = ["query_files.csv", "database_files.csv"]
        (file.parent / names[1 - number]).write_bytes(ICIR[1 - number])
        shutil.copy(file, file.parent / names[number])
        try:
            icir.read_annotations(file.parent)
        except ValueError:
            continue


def read_shard(file):
    shard = file.parent / "shards/webdataset/query/query-000000.tar"
    shard.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, shard)
    icir.unpack_shards(file.parent / "shards")


def read_circled(file):
    shutil.copy(file, file.parent / "circo_val.json")
    listing = file.parent / "circo/image_info_unlabeled2017.json"
    listing.parent.mkdir(exist_ok=True)
    listing.write_bytes(text({"images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(18)]})[0])
    circled.read_sessions(file.parent, "circo_val", listing.parent)


def read_genecis(file):
    for task in ("focus_object", "focus_attribute"):
        shutil.copy(file, file.parent / f"{task}.json")
        try:
            genecis.read_annotations(file.parent, task)
        except ValueError:
            continue


def read_edir(file):
    files = [file.parent / name for name in edir.FILES]
    for number in range(3):
        for other, content in zip(files, EDIR, strict=True):
            other.write_bytes(content)
        shutil.copy(file, files[number])
        try:
            edir.read_queries(*files)
        except ValueError:
            continue


def read_refined(file):
    read_cirr_gallery_of(file.parent / "cirr", text({name: f"./dev/{name}.png" for name in NAMES})[0])
    refined_cirr.rewrite(file, file.parent / "cirr", {"is_refined": bool}, check_counts=False, only_refined=True)


def shard():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for ending, content in (("jpg", b"image"), ("json", b'{"img_path": "icir/query/a.jpg"}')):
            member = tarfile.TarInfo(f"0.{ending}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return [stream.getvalue()]


def pinpoint_table():
    stream = io.BytesIO()
    names = [f"{n:032x}" for n in range(20)]
    pq.write_table(pa.Table.from_pylist([pinpoint_row(n, names, names) for n in range(6)]), stream)
    return [stream.getvalue()]


def read_table(ending):
    def read_it(file):
        named = file.with_suffix(ending)
        shutil.copy(file, named)
        read_triplet_table(named)

    return read_it


def lint(file):
    assert all(isinstance(problem, str) for problem in lint_submission(file))


def images():
    """Yield the bytes of a small image in each format and in each mode that the format supports."""
    values = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in FORMATS:
        for mode in ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16", "F"):
            image = Image.fromarray(values, "RGBA").convert("L" if mode == "I;16" else mode if mode != "F" else "L")
            if mode in ("I;16", "F"):
                image = Image.fromarray(np.asarray(image).astype(np.uint16 if mode == "I;16" else np.float32))
            more = {"save_all": True, "append_images": [image.copy()]} if format in ("GIF", "TIFF", "WEBP") else {}
            stream = io.BytesIO()
            try:
                image.save(stream, format, **more, **({"exif": exif} if format in ("JPEG", "PNG", "TIFF") else {}))
            except (KeyError, OSError, ValueError):  # Pillow lacks the format, or the format lacks the mode
                continue
            yield stream.getvalue()


def table(ending):
    rows = [
        {"reference": f"{n}.png", "caption": 'the same but "red", or', "target": "a/b.png", "target_id": str(n)}
        for n in range(3)
    ]
    stream = io.BytesIO()
    data = datasets.Dataset.from_list(rows)
    if ending == ".parquet":
        pq.write_table(data.data.table, stream)
    else:
        (data.to_csv if ending == ".csv" else data.to_json)(stream)
    return [stream.getvalue()]


def text(*contents):
    return [json.dumps(content).encode() for content in contents]


NAMES = [f"dev-{n}-0-img0" for n in range(12)]
CIRR = text([cirr_row("val", n, NAMES) for n in range(3)])
CIRR_TEST = text([cirr_row("test1", n, NAMES) for n in range(3)])
FASHIONIQ_GALLERY = text(["B001", "B002", "B003"])
LAION = {"ref_image_id": 42, "relative_cap": "the same but red", "tgt_image_id": "0000043"}
SUBMISSION = ["test1-0-0-img0", "test1-1-0-img0", "test1-2-0-img0"]

ICIR = [b"icir/query/a/0.jpg,at night,a\n", b"icir/database/a/1.jpg,at night,a\nicir/database/a/2.jpg,,a\n"]
EDIR = [
    b'{"id": "q", "image": "r.jpg", "text": "red", "metadata": {"subcategory": "color"}}\n',
    b'{"id": "a.png", "image": "a.png"}\n{"id": "b.png", "image": "b.png"}\n',
    b'{"qid": "q", "pos": ["a.png"], "neg": ["b.png"]}\n',
]
IMAGES = [[{"val_image_id": n} for n in range(9)], [{"image_id": n, "instance_bbox": [n, 1, 2, 3]} for n in range(9)]]

TARGETS = {
    "image": (read_image, lambda: list(images())),
    "laion-cir": (laion_cir.read_triplets, lambda: text([LAION] * 2, {"42": LAION})),
    "cirr": (read_cirr, lambda: CIRR + CIRR_TEST),
    "cirr-gallery": (read_cirr_gallery, lambda: text({name: f"./dev/{name}.png" for name in NAMES})),
    "fashioniq": (
        read_fashioniq,
        lambda: text([{"target": "B001", "candidate": "B002", "captions": ["is red", " has 2 sleeves.,?"]}] * 2),
    ),
    "circo": (read_circo, lambda: text(*([circo_row(s, n, list(range(18))) for n in range(2)] for s in ("val", "t")))),
    "circo-gallery": (circo.read_images, lambda: text({"images": [{"id": 1, "file_name": "000000000001.jpg"}]})),
    "icir": (read_icir, lambda: ICIR),
    "icir-shard": (read_shard, shard),
    "pinpoint": (pinpoint.read_queries, pinpoint_table),
    "pinpoint-index": (pinpoint.read_index, lambda: [b"0123456789abcdef\nfedcba9876543210\n"]),
    "circled": (read_circled, lambda: text([circled_session("circo_val", n, list(range(18))) for n in range(2)])),
    "genecis": (read_genecis, lambda: text(*([genecis_row(n, images) for n in range(2)] for images in IMAGES))),
    "edir": (read_edir, lambda: EDIR),
    "refined-cirr": (
        read_refined,
        lambda: text([{**cirr_row("val", n, NAMES), "is_refined": n > 0} for n in range(3)]),
    ),
    "csv": (read_table(".csv"), lambda: table(".csv")),
    "jsonl": (read_table(".jsonl"), lambda: table(".jsonl")),
    "parquet": (read_table(".parquet"), lambda: table(".parquet")),
    "submission": (
        lint,
        lambda: text(
            {"version": "rc2", "metric": "recall", "1": SUBMISSION},
            {"version": "rc2", "metric": "recall_subset", "1": SUBMISSION},
            {"0": [1, 2, 3], "1": ["4", "05"]},
        ),
    ),
}
"""By name: what reads a file, raising nothing but `ValueError`, and contents to start from."""

ODDITIES = [None, True, -1, 1e999, 10**30, "", "\ud800", "\u202e", "../x", "\0", [], [[]], {}, {"a": [1]}, "x" * 999]


def edited(content, chance):
    """Return JSON with one value replaced, removed or duplicated; None if the content is not JSON."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return None
    node, parent = tree, None
    while isinstance(node, dict | list) and node and (parent is None or chance.random() < 0.8):
        parent, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        return None
    what = chance.randrange(4)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.append(node)
    elif what == 2 and isinstance(parent, dict):
        parent[str(chance.choice(ODDITIES))] = node
    else:
        parent[key] = chance.choice(ODDITIES)
    return json.dumps(tree).encode()


def read(name, content, folder):
    """Run a target on one input; a `ValueError` is a valid answer."""
    file = Path(folder, "input")
    file.write_bytes(content)
    try:
        TARGETS[name][0](file)
    except ValueError:
        pass
