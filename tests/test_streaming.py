"""Shards of triplets, streams in one process, in workers and in two real processes, and triplets from the Hub."""

import io
import json
import logging
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.utils import gather_object
from datasets import Dataset, Image
from PIL import Image as PILImage
from processes import run_in_processes
from squares import square_triplets
from tiny import make_model, make_processor

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments
from pvlf_hf.commands.arguments import leave
from pvlf_hf.data.streaming import find_shards, load_hub_triplets, stream_triplets, triplet_batches, write_shards
from pvlf_hf.data.triplets import TRIPLET_COLUMNS
from pvlf_hf.training.batches import PVLFCollator

ROWS = 30
COLOURS = ("red", "green", "blue", "black", "white", "yellow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def triplets(tmp_path):
    """Return thirty rows: captions of different lengths, target_id is the row; PNG, JPEG and palette images."""
    files = [tmp_path / f"{colour}.{'jpg' if n % 2 else 'png'}" for n, colour in enumerate(COLOURS)]
    for file in files:
        image = PILImage.new("RGB", (20, 16), file.stem)
        (image.convert("P") if file.stem == "blue" else image).save(file)
    columns = {
        "reference": [str(files[n % 6]) for n in range(ROWS)],
        "caption": ["the same but " + "more " * (n % 4) + "red" for n in range(ROWS)],
        "target": [str(files[(n + 1) % 6]) for n in range(ROWS)],
        "target_id": [str(n) for n in range(ROWS)],
        "note": ["left out"] * ROWS,
    }
    return Dataset.from_dict(columns).cast_column("reference", Image()).cast_column("target", Image())


def encoded(triplets):
    """Return the rows with images as bytes."""
    for column in ("reference", "target"):
        triplets = triplets.cast_column(column, Image(decode=False))
    rows = []
    for row in triplets:
        images = {c: row[c]["bytes"] or Path(row[c]["path"]).read_bytes() for c in ("reference", "target")}
        rows.append({"caption": row["caption"], "target_id": row["target_id"], **images})
    return rows


def ids(rows):
    return [int(row["target_id"]) for row in rows]


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_shards_contain_the_bytes_of_the_files(triplets, tmp_path, format):
    files = write_shards(triplets, tmp_path / "shards", 8, format)
    assert [file.name for file in files] == [f"triplets-0000{n}-of-00004.{format}" for n in range(4)]
    stream = stream_triplets(tmp_path / "shards", shuffle_buffer=0)
    assert stream.column_names == list(TRIPLET_COLUMNS)
    assert encoded(stream) == encoded(triplets)
    first = next(iter(stream))
    assert first["reference"].getpixel((0, 0)) == (255, 0, 0) and first["target"].format == "JPEG"


def test_the_tar_has_the_layout_of_webdataset(triplets, tmp_path):
    (file,) = write_shards(triplets, tmp_path / "shards", format="tar")
    with tarfile.open(file) as tar:
        assert tar.getnames()[:3] == ["000000000.reference.png", "000000000.target.png", "000000000.json"]
        assert json.load(tar.extractfile("000000029.json")) == {"caption": "the same but more red", "target_id": "29"}


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_writing_resumes_after_finished_shards(triplets, tmp_path, format):
    files = write_shards(triplets, tmp_path / "shards", 8, format)
    whole = [file.read_bytes() for file in files]
    files[2].unlink()
    files[2].with_name(f"{files[2].name}.partial").write_bytes(b"half")  # as an interrupted run leaves it
    files[0].write_bytes(b"finished, so not touched")
    assert write_shards(triplets, tmp_path / "shards", 8, format) == files
    assert [file.read_bytes() for file in files] == [b"finished, so not touched", *whole[1:]]
    assert not list((tmp_path / "shards").glob("*.partial"))


def test_invalid_shard_settings_raise(triplets, tmp_path):
    write_shards(triplets, tmp_path / "shards", 8)
    for other, size in ((triplets, 9), (triplets.select(range(29)), 8)):
        with pytest.raises(ValueError, match="shards holds shards of other triplets or another size"):
            write_shards(other, tmp_path / "shards", size)
    with pytest.raises(ValueError, match=r"triplets: missing column\(s\) \['target_id'\]"):
        write_shards(triplets.remove_columns("target_id"), tmp_path / "a")
    for settings in ({"format": "zip"}, {"rows_per_shard": 0}):
        with pytest.raises(ValueError, match="choose 'parquet' or 'tar', and at least one row"):
            write_shards(triplets, tmp_path / "b", **settings)
    (tmp_path / "blue.png").unlink()
    with pytest.raises(ValueError, match="image of row 1 cannot be read: .*blue.png"):
        write_shards(triplets, tmp_path / "c")


def test_shards_are_listed_once(triplets, tmp_path):
    folder = tmp_path / "shards"
    files = [str(file) for file in write_shards(triplets, folder, 8)]
    assert find_shards(folder) == find_shards(f"{folder}/") == find_shards(f"{folder}/*.parquet") == files
    assert find_shards([files[2], f"{folder}/*-0000[12]-*"]) == [files[2], files[1]]
    assert find_shards("https://example.org/a.tar?download=1") == ["https://example.org/a.tar?download=1"]
    write_shards(triplets, tmp_path / "tar", 30, "tar")[0].rename(folder / "same-rows.tar")
    with pytest.raises(ValueError, match="shards holds .parquet and .tar shards, maybe of the same rows"):
        find_shards(folder)
    assert len(find_shards([f"{folder}/*.tar", files[0]])) == 2
    for nothing in (f"{tmp_path}/nowhere", f"{folder}/*.webp", f"{folder}/one.parquet"):
        with pytest.raises(ValueError, match=f"no shards: '{nothing}'".replace("*", r"\*")):
            stream_triplets(nothing)


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_shards_are_read_from_a_server(triplets, tmp_path, format):
    files = write_shards(triplets, tmp_path / "shards", 15, format)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "shards"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_port}/{file.name}" for file in files]
    try:
        assert encoded(stream_triplets(urls, shuffle_buffer=0)) == encoded(triplets)
        with pytest.raises(ValueError, match=f"shard {urls[0]}.gone.{format} cannot be read"):
            stream_triplets(f"{urls[0]}.gone.{format}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_damaged_shards_raise_with_their_path(triplets, tmp_path, format):
    files = write_shards(triplets, tmp_path / "shards", 8, format)
    files[2].write_bytes(files[2].read_bytes()[:-4000])
    with pytest.raises(ValueError, match=f"{files[2].name} cannot be read"):
        list(stream_triplets(tmp_path / "shards"))
    files[2].write_text("<html>404</html>")
    with pytest.raises(ValueError, match=f"{files[2].name} cannot be read"):
        stream_triplets(files[2])


def test_shards_without_a_column_raise(triplets, tmp_path):
    triplets.remove_columns("caption").to_parquet(tmp_path / "lacking.parquet")
    with pytest.raises(ValueError, match=r"lacking.parquet has no \['caption'\]; it has \['note', 'reference'"):
        stream_triplets(tmp_path / "lacking.parquet")
    (tar,) = write_shards(triplets, tmp_path / "tar", format="tar")
    for lost, message in (("reference", r"has no \['reference'\]"), ("000000007.target", "row 7 has no target")):
        with tarfile.open(tar) as old, tarfile.open(tmp_path / f"{lost}.tar", "w") as new:
            for member in old:
                if lost not in member.name:
                    new.addfile(member, old.extractfile(member))
        with pytest.raises(ValueError, match=f"{lost}.tar .*{message}"):
            list(stream_triplets(tmp_path / f"{lost}.tar"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_has_each_row_once_in_another_order(triplets, tmp_path, workers):
    write_shards(triplets, tmp_path / "shards", 6)

    def passes(seed):
        stream = stream_triplets(tmp_path / "shards", shuffle_buffer=10, seed=seed)
        batches = triplet_batches(stream, batch_size=1 if workers else 5, collate=ids, num_workers=workers)
        rows = sum(islice(batches, 60 if workers else 12), [])
        return rows[:30], rows[30:]

    first, second = passes(seed=0)
    if workers == 0:
        assert sorted(first) == sorted(second) == list(range(ROWS))
    else:  # five shards: the workers' passes differ in length
        assert set(first + second) == set(range(ROWS))
    assert first != second and first != list(range(ROWS))
    assert passes(seed=0) == (first, second) != passes(seed=1)


def arguments(folder, **settings):
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        **settings,
    }
    return PVLFTrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings)


@pytest.mark.slow
def test_trainer_resumes_a_stream_where_it_stopped(triplets, tmp_path):
    """Stop in the second pass and resume there; a pass has less than four steps."""
    write_shards(triplets, tmp_path / "shards", 8)

    def train(folder, resume=None):
        stream = stream_triplets(tmp_path / "shards", shuffle_buffer=10)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=5, learning_rate=1e-3)
        trainer = PVLFTrainer(make_model(), args, stream, processing_class=make_processor())
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, dict(trainer.model.named_parameters())

    losses, weights = train("whole")
    again, resumed = train("again", str(tmp_path / "whole" / "checkpoint-5"))
    assert len(losses) == 8 and again == losses
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_stream_without_max_steps_or_with_batch_by_raises(triplets, tmp_path):
    write_shards(triplets, tmp_path / "shards", 8)
    stream = stream_triplets(tmp_path / "shards")
    wrong = {"max_steps has to be specified": {"max_steps": -1}, "batch_by='note' needs": {"batch_by": "note"}}
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            PVLFTrainer(make_model(), arguments(tmp_path, **settings), stream, processing_class=make_processor())


@pytest.mark.slow
def test_two_processes_share_the_rows(triplets, tmp_path):
    for shards in (4, 3, 1):
        write_shards(triplets, tmp_path / f"{shards}", -(-ROWS // shards), "tar" if shards == 3 else "parquet")
    (shares, trained, logged), (_, _, also_logged) = run_in_processes(2, train_in_this_process, tmp_path)
    assert len(shares) == 4
    for first, second in shares:
        assert sorted(first + second) == list(range(ROWS))
        assert abs(len(first) - len(second)) <= 2
    for share, rows in zip(shares[0], trained, strict=True):
        assert rows[: len(share)] == share and len(rows) == 20  # five steps of four: more than a pass
    for shards in (3, 1):
        assert f"{shards} shards for 2 processes: every process reads all of them" in logged + also_logged
    assert "4 shards for" not in logged + also_logged


def train_in_this_process(folder):
    """Return the rows of all processes' shares, those of the first that the models see, and what this one logged."""
    logged = io.StringIO()
    logging.getLogger("pvlf_hf").addHandler(logging.StreamHandler(logged))
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    streams = [stream_triplets(folder / str(n), buffer) for n, buffer in ((4, 10), (4, 0), (3, 10), (1, 0))]
    args = arguments(folder, max_steps=5, per_device_train_batch_size=4, ddp_find_unused_parameters=False)
    processor = make_processor()
    collator = Numbered(processor)
    trainer = Recorder(make_model(), args, streams[0], processing_class=processor, data_collator=collator)
    trainer.train()
    shares = zip(*gather_object([[ids(stream) for stream in streams]]), strict=True)
    outcome = list(shares), gather_object([trainer.rows]), logged.getvalue()
    leave()
    return outcome


class Numbered(PVLFCollator):
    """Collator that adds the row numbers to a batch."""

    def __call__(self, rows):
        return {**super().__call__(rows), "rows": torch.tensor(ids(rows))}


class Recorder(PVLFTrainer):
    """Trainer that records the rows it trains on."""

    rows: list

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows = [*getattr(self, "rows", []), *inputs.pop("rows").tolist()]
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture
def hub_folder(triplets, tmp_path):
    """Return a folder of Parquet files as on the Hub, with other column names."""
    theirs = triplets.remove_columns("target_id").rename_columns({"reference": "source", "note": "text"})
    embedded = theirs.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    embedded.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    return tmp_path / "hub"


@pytest.mark.reliability(
    9,
    "A data set read from a folder has the current content of its files, whatever their modification times",
    broken=("src/pvlf_hf/data/streaming.py", "cache_dir=cache", "cache_dir=None"),
)
def test_rewritten_folder_is_read_again(hub_folder, figure):
    (file,) = hub_folder.rglob("*.parquet")

    def captions():
        return load_hub_triplets(str(hub_folder), columns={"reference": "source"})["caption"][:]

    before, status = captions(), file.stat()
    assert captions() == before
    rows = Dataset.from_parquet(str(file), cache_dir=str(hub_folder.parent / "cache"))
    rows.map(lambda row: {"caption": row["caption"].swapcase()}).to_parquet(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert captions() == [caption.swapcase() for caption in before] != before
    figure("a Parquet file rewritten at the same time: the new captions")


@pytest.mark.reliability(
    9,
    "Shards of images that have since been replaced are refused when writing resumes",
    broken=("src/pvlf_hf/data/streaming.py", "if _digest(_embedded(part, start)) != written[file.name]:", "if False:"),
)
@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_shards_of_replaced_images_are_refused(tmp_path, format, figure):
    triplets = square_triplets(tmp_path, ["red", "blue", "lime"], lambda _, target: f"make it {target}")
    first, *_ = write_shards(triplets, tmp_path / "shards", 2, format)
    file = tmp_path / "blue.png"
    status, raw = file.stat(), file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=f"{first.name} holds other images than these triplets, which have"):
        write_shards(triplets, tmp_path / "shards", 2, format)
    file.write_bytes(raw)
    write_shards(triplets, tmp_path / "shards", 2, format)
    figure("one bit of one image: refused")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_triplets_load(hub_folder, triplets, streaming):
    def load(**columns):
        return load_hub_triplets(str(hub_folder), columns={"reference": "source", **columns}, streaming=streaming)

    loaded = load()
    assert loaded.column_names == list(TRIPLET_COLUMNS)
    assert next(iter(loaded))["target"].format == "JPEG"
    rows, expected = encoded(loaded), encoded(triplets)
    for column in ("reference", "caption", "target"):
        assert [row[column] for row in rows] == [row[column] for row in expected]
    for a in range(12):  # six images, each the target of every sixth row
        assert [rows[a]["target_id"] == row["target_id"] for row in rows] == [a % 6 == b % 6 for b in range(ROWS)]
    for column in ("caption", "target_id"):
        assert {row[column] for row in load(**{column: "text"})} == {"left out"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, r"hub: missing column\(s\) \['reference'\]; it has \['source', 'caption', 'target', 'text'\]"),
        ({"reference": "picture"}, r"missing column\(s\) \['picture'\]"),
        ({"reference": "source", "target_id": "id"}, r"missing column\(s\) \['id'\]"),
        ({"source": "reference"}, r"columns=\['source'\]: keys are"),
        ({"reference": "text"}, "column 'text' is Value.*but reference must be images"),
        ({"reference": "source", "caption": "target"}, "column 'target' is Image.*but caption must be text"),
    ],
)
def test_wrong_hub_columns_raise(hub_folder, columns, message):
    with pytest.raises(ValueError, match=message):
        load_hub_triplets(str(hub_folder), columns=columns)
