"""Kills, full disks and read-only folders: no finished work is lost, and no partial file is read."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from squares import make_benchmark, square_triplets
from tiny import make_model
from transformers import TrainerCallback

from pvlf_hf import (
    EmbeddingStore,
    Gallery,
    PVLFTrainer,
    PVLFTrainingArguments,
    cache_features,
    evaluate,
    write_results,
)
from pvlf_hf.evaluation.results import read_results

COLOURS = ["red", "green", "blue", "black", "white", "yellow", "purple", "orange"]


# ---- kills ----


def kill(*arguments):
    """Return a function that runs `kill.py` as a script and returns the last line of its output."""
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "Error" in line][-1]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.reliability(
    1,
    "Training, evaluation, gallery and feature cache killed (SIGKILL) and started again: no partial file, no "
    "finished work repeated, weights, index and metrics bit-equal to an uninterrupted run",
    broken=("src/pvlf_hf/training/atomic_checkpoints.py", "def _save_checkpoint(", "def _not_save_checkpoint("),
)
def test_killed_runs_resume_bit_equal(figure):
    summary = kill("--kills=4", "--seed=1", "--kinds", "train", "evaluate", "gallery", "cache")
    figure(f"{summary.split(',')[0]}, all results bit-equal to runs left alone, no unreadable file")


@pytest.mark.slow
@pytest.mark.reliability(
    1,
    "A finished run that is started again takes no further step",
    broken=(
        "src/pvlf_hf/training/atomic_checkpoints.py",
        "if self.state.global_step < self.state.max_steps:",
        "if True:",
    ),
)
def test_finished_run_is_not_trained_again(squares, tiny_processor, tmp_path, figure):
    whole = train(squares, tiny_processor, tmp_path / "run", 3)
    again = train(squares, tiny_processor, tmp_path / "run", 3)
    assert again.state.global_step == 3
    assert_same_weights(whole.model, again.model)
    figure("3 of 3 steps, weights bit-equal")


class Killed(BaseException):
    """Exception in place of a kill; no code catches it."""


class FirstIsBest(TrainerCallback):
    """Callback that records the first checkpoint as the best, and kills a folder's deletion after its first file."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_save(self, args, state, control, **_):
        state.best_global_step, state.best_model_checkpoint = 1, f"{args.output_dir}/checkpoint-1"
        if state.global_step == state.max_steps:
            self.monkeypatch.setattr(shutil, "rmtree", self.delete)

    def delete(self, folder, **_):
        if files := [file for file in Path(folder).rglob("*") if file.is_file()]:
            files[0].unlink()
            raise Killed


@pytest.mark.reliability(
    1,
    "A run killed at its end, while all checkpoints but the best are deleted (`save_total_limit=1`), leaves "
    "none half deleted",
    broken=("src/pvlf_hf/training/atomic_checkpoints.py", "def _finalize_training(", "def _not_finalize_training("),
)
def test_failed_save_leaves_no_partial_checkpoint(squares, tiny_processor, tmp_path, monkeypatch, figure):
    with pytest.raises(Killed):
        train(squares, tiny_processor, tmp_path, 3, [FirstIsBest(monkeypatch)], save_total_limit=1)
    files = {folder.name: {file.name for file in folder.iterdir()} for folder in tmp_path.glob("checkpoint-*")}
    assert files.keys() == {"checkpoint-1"}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} < files["checkpoint-1"]
    figure("1 of 1 whole")


@pytest.mark.reliability(
    1,
    "`results.json` marks a finished run: a run killed before it has written the values of its queries has none",
    broken=("src/pvlf_hf/evaluation/results.py", "file.unlink(missing_ok=True)", "pass"),
)
def test_results_and_queries_belong_to_one_run(tiny_model, tiny_processor, tmp_path, monkeypatch, figure):
    evaluation = evaluate(tiny_model, tiny_processor, make_benchmark(), progress=False)
    file = tmp_path / "results.json"
    write_results(file, [evaluation], run=1)

    rename = Path.replace
    for name in ("results_per_query.json", "results.json"):

        def killed(partial, target, name=name):
            if target.name == name:
                raise KeyboardInterrupt
            return rename(partial, target)

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_results(file, [evaluation], run=2)
        assert not file.exists()
    figure("2 places, 0 results")


# ---- full disks and folders that are read-only ----


def mount(folder, *options):
    return (
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True).returncode == 0
    )


@pytest.fixture
def disk(tmp_path):
    """Yield a file system of 16 MiB, or an ordinary folder where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and mount(folder, "-o", "size=16m")
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(disk, spare):
    """Leave room for `spare` bytes, or for none; yield the reason that writing fails."""
    if disk.is_mount():
        filler = disk / "filler"
        with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                os.write(file.fileno(), bytes(4096))
        os.truncate(filler, filler.stat().st_size - spare)
        yield "a full disk"
        filler.unlink()
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        yield "no file beyond 100 bytes"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@contextmanager
def read_only(disk, spare):
    """Remove write permission; root loses it only where a file system can be mounted."""
    if os.geteuid() == 0:
        if not disk.is_mount():
            pytest.skip("root may write everywhere, and nothing can be mounted here")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield "mounted read-only"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return
    folders = [disk, *(path for path in disk.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield "without write permission"
    for folder in folders:
        folder.chmod(0o755)


@pytest.fixture
def squares(tmp_path):
    (tmp_path / "squares").mkdir()
    return square_triplets(tmp_path / "squares", COLOURS, lambda _, target: f"but {target}")


def train(squares, processor, folder, steps, callbacks=(), **settings):
    settings |= {"per_device_train_batch_size": 8, "save_steps": 1, "use_cpu": True, "disable_tqdm": True}
    args = PVLFTrainingArguments(str(folder), max_steps=steps, **settings)
    trainer = PVLFTrainer(make_model(), args, squares, processing_class=processor, callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return trainer


def assert_same_weights(model, other):
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert ours.equal(theirs), name


def contents(folder):
    """Return the bytes of every file except locks and the filler."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ("lock", "filler")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


class Training:
    """Training of three steps: two are done; only a part of the third checkpoint fits."""

    spare = 400 * 1024

    def __init__(self, squares, model, processor, folder):
        self.squares, self.processor, self.folder = squares, processor, folder

    def first(self):
        train(self.squares, self.processor, self.folder, 2)

    def rest(self):
        return load_of(train(self.squares, self.processor, self.folder, 3).model)


class Evaluating:
    """Evaluation by the text alone, after an evaluation by the model."""

    spare = 0

    def __init__(self, squares, model, processor, folder):
        self.made, self.folder = (model, processor, make_benchmark()), folder

    def run(self, *methods):
        store = EmbeddingStore(self.folder / "embeddings")
        evaluations = [evaluate(*self.made, method, progress=False, store=store) for method in methods]
        write_results(self.folder / "results.json", evaluations)
        return read_results(self.folder / "results.json")

    def first(self):
        self.run("composed")

    def rest(self):
        return self.run("composed", "text")


class Indexing:
    """Indexing of four more images in a gallery of four."""

    spare = 0

    def __init__(self, squares, model, processor, folder):
        self.files = [cell["path"] for cell in squares.to_dict()["reference"][::7]]  # one of each colour
        self.made, self.folder = (model, processor), folder

    def first(self, number=4):
        return Gallery.from_images(self.files[:number], *self.made, path=self.folder, progress=False)

    def rest(self):
        found = self.first(8)
        return found.ids, found.embeds.tolist()


class Caching:
    """Caching of all images after some are cached."""

    spare = 0

    def __init__(self, squares, model, processor, folder):
        self.squares, self.made, self.folder = squares, (model, processor), folder
        model.set_finetuning("frozen")

    def first(self, number=7):
        rows = self.squares.select(range(number))
        return cache_features(*self.made, rows, self.folder, progress=False)

    def rest(self):
        rows, collator = self.first(56)
        return [collator.images[digest].tolist() for digest in rows["target"]]


def load_of(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


WORK = [Training, Evaluating, Indexing, Caching]


def hinder(hindrance, disk, tmp_path, squares, tiny_model, tiny_processor):
    """Stop each job half-way by a hindrance, then finish it; return the hindrance."""
    hindrances = set()
    for kind in WORK:
        alone, work = (kind(squares, tiny_model, tiny_processor, root / kind.__name__) for root in (tmp_path, disk))
        alone.first()
        expected = alone.rest()
        work.first()
        before = contents(work.folder)
        with hindrance(disk, kind.spare) as how, pytest.raises(OSError, match=f"{disk}.*(free disk space|free some)"):
            work.rest()
        after = contents(work.folder)
        assert {name: after.get(name) for name in before} == before, f"{kind.__name__}: not as it was"
        assert not [name for name in after if "partial" in name or "_unfinished" in name], kind.__name__
        assert work.rest() == expected, kind.__name__
        hindrances.add(how)
    return f"{len(WORK)} kinds of work; " + ", ".join(hindrances)


@pytest.mark.slow
@pytest.mark.reliability(
    1,
    "A full disk while training, evaluating, indexing or caching: an error that names the folder and the "
    "remedy, existing files unchanged, and the same results once there is space",
    broken=(
        "src/pvlf_hf/embeddings/embedding_store.py",
        "    with whole(file) as partial:",
        "    with __import__('contextlib').nullcontext(file) as partial:",
    ),
)
def test_full_disk_keeps_the_last_checkpoint(disk, tmp_path, squares, tiny_model, tiny_processor, figure):
    figure(hinder(full, disk, tmp_path, squares, tiny_model, tiny_processor))


@pytest.mark.slow
@pytest.mark.reliability(
    1,
    "A folder without write permission: an error that names the folder and the remedy, existing files unchanged",
    broken=(
        "src/pvlf_hf/training/atomic_checkpoints.py",
        "    except (OSError, SafetensorError, RuntimeError) as error:",
        "    except RuntimeError as error:",
    ),
)
def test_read_only_folder_raises(disk, tmp_path, squares, tiny_model, tiny_processor, figure):
    figure(hinder(read_only, disk, tmp_path, squares, tiny_model, tiny_processor))
