"""Kill jobs that write files, restart them until they finish, and compare with the outcome of an uninterrupted run.

    python tests/kill.py --kills 30 --seed 0

Training, training with pushes, evaluation, indexing and feature caching run in a process each. The process gets
SIGKILL, in turn at a random time and at a random file operation (writes are short: random times rarely hit one).
After every kill, all files that are not marked as unfinished are read. Exits with 1 if a file cannot be read, or if a
restart fails, repeats finished work, or ends with other weights, index or metrics, bit for bit.

Processes are forked from one that has imported everything, so that kills hit the job itself. Kills by time depend on
the machine, those by file operation only on the seed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import monotonic

from hub_server import serving

TESTS = Path(__file__).parent
SCRIPTS = TESTS.parent / "train_scripts"
KINDS = ("train", "push", "evaluate", "gallery", "cache")
IMPORTS = [
    "pvlf_hf.training.trainer",
    "pvlf_hf.search.gallery",
    "pvlf_hf.data.protocols",
    "pvlf_hf.evaluation.submission",
    "transformers.trainer",
]
COLOURS = ["red", "green", "blue", "black", "white", "yellow", "purple", "orange"]
STEPS, IMAGES, ROWS = 10, 96, 8
REPOSITORY = "you/model"

# Work that a kill may lose: steps between checkpoints, images between writes.
LOSES = {"train": 1, "push": 1, "evaluate": ROWS, "gallery": ROWS, "cache": ROWS}


# ---- the jobs, each in its own process ----


def work(kind, folder, inputs, tell, dies_at):
    """Run a job; send `begin`, then 1 a step or n for n encoded images, and last the number of file operations."""
    log = (folder / "log.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.chdir(folder)  # the same paths in every run: the compared files contain them
    begin = globals()[kind]
    operations = count_file_operations(folder, dies_at)
    tell.send("begin")
    begin(inputs, tell)
    tell.send(f"operations {operations[0]}")


def count_file_operations(folder, dies_at):
    """Count operations that change files in the folder; kill the process before operation `dies_at`."""
    counted = [0]

    def hook(event, arguments):
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        changes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and isinstance(arguments[0], str | Path) and folder in (folder / arguments[0]).parents:
            counted[0] += 1
            if counted[0] == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def count_images(tell):
    """Send the number of images of every forward pass of an image encoder."""
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import BlipVisionModel

    def hook(module, inputs, output):
        if isinstance(module, BlipVisionModel):
            tell.send(len(output.last_hidden_state))

    register_module_forward_hook(hook)


def train(inputs, tell, *more):
    from pvlf_hf import PVLFTrainer

    step = PVLFTrainer.training_step

    def told_step(*arguments, **options):
        loss = step(*arguments, **options)
        tell.send(1)
        return loss

    PVLFTrainer.training_step = told_step
    script = str(SCRIPTS / "train_pvlf.py")
    settings = f"""--model={inputs / "blip"} --train_file={inputs / "triplets.csv"} --image_folder={inputs / "photos"}
        --validation_file={inputs / "triplets.csv"} --output_dir=run --fusion_heads=4 --fusion_ffn_size=40
        --per_device_train_batch_size=8 --max_steps={STEPS} --save_steps=1 --save_total_limit=2
        --eval_strategy=steps --eval_steps=4 --metric_for_best_model=eval_recall@1 --logging_steps=1
        --learning_rate=0.001 --disable_tqdm=True"""
    sys.argv = [script, *settings.split(), *more]
    runpy.run_path(script, run_name="__main__")


def push(inputs, tell):
    more = ["--push_to_hub", f"--hub_model_id={REPOSITORY}", "--hub_token=hf_owner", "--hub_always_push"]
    train(inputs, tell, *more)


def evaluate(inputs, tell):
    from pvlf_hf.embeddings import embedding_store

    embedding_store.SAVE_EVERY = ROWS
    count_images(tell)
    script = str(SCRIPTS / "evaluate_pvlf.py")
    settings = f"""--model {inputs / "pvlf"} --protocols cirr-val fashioniq cirr-test1 --methods composed text
        --data_root {inputs / "data"} --output_dir run --no_check_counts --batch_size {ROWS}"""
    sys.argv = [script, *settings.split()]
    runpy.run_path(script, run_name="__main__")


def gallery(inputs, tell):
    from transformers import AutoModel, AutoProcessor

    from pvlf_hf import Gallery
    from pvlf_hf.search import indexing as gallery_encoding

    gallery_encoding.SAVE_EVERY = ROWS
    count_images(tell)
    made = [kind.from_pretrained(inputs / "pvlf") for kind in (AutoModel, AutoProcessor)]
    options = {"path": "run", "batch_size": ROWS, "progress": False}
    found = Gallery.from_folder(inputs / "gallery", *made, **options).search(text="red", k=5)
    Path("found.json").write_text(json.dumps([found.ids, found.scores]))


def cache(inputs, tell):
    from transformers import AutoModel, AutoProcessor

    from pvlf_hf import cache_features, load_triplets
    from pvlf_hf.training import feature_cache

    feature_cache.SHARD_BYTES = 1  # a shard a batch
    count_images(tell)
    model, processor = (kind.from_pretrained(inputs / "pvlf") for kind in (AutoModel, AutoProcessor))
    model.set_finetuning("frozen")
    triplets = load_triplets(inputs / "many.csv", inputs / "gallery")
    rows, collator = cache_features(model, processor, triplets, "run", ROWS, progress=False)
    content = [(d, collator.images[d].numpy().tobytes()) for d in sorted({*rows["reference"], *rows["target"]})]
    Path("found.json").write_text(json.dumps([(d, hashlib.sha256(raw).hexdigest()) for d, raw in content]))


# ---- files and outcomes ----


def read(file):
    """Return the content of a file; raise if it is incomplete."""
    import pyarrow.parquet as pq
    import torch
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).numpy().tobytes() for name in opened.keys()}
            return sorted((opened.metadata() or {}).items()), tensors
    if file.suffix in (".pt", ".pth", ".bin"):
        return bits(torch.load(file, weights_only=False))
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return without_speed(json.loads(file.read_text())) if file.suffix == ".json" else file.read_bytes()


def without_speed(value):
    """Return JSON content without durations."""
    if isinstance(value, dict):
        return {k: without_speed(v) for k, v in value.items() if not k.endswith(("_runtime", "_per_second", "_ms"))}
    return [without_speed(v) for v in value] if isinstance(value, list) else value


def bits(value):
    """Return a nested value with its tensors as bytes."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value.numpy().tobytes() if hasattr(value, "numpy") else repr(value)


def finished(folder):
    """Yield the files that are not marked as unfinished."""
    for file in sorted(folder.rglob("*")):
        marked = file.suffix == ".partial" or "_unfinished" in file.parts or file.name in ("log.txt", "lock")
        if file.is_file() and not marked:
            yield file


def unfinished(folder):
    return [file for file in folder.rglob("*") if file.suffix == ".partial" or file.name == "_unfinished"]


def check_files(folder):
    """Read all finished files after a kill; checkpoints must also have all their parts."""
    for file in finished(folder):
        # Files that the Trainer copies out of a checkpoint to push them are not a complete model until the end.
        if folder.name != "push" or file.parent.name != "run" or file.name.startswith("results"):
            read(file)
    parts = [sorted(file.name for file in path.iterdir()) for path in folder.glob("run/checkpoint-*")]
    assert all(names == max(parts, key=len) for names in parts), f"{folder}: checkpoints that lack files: {parts}"
    assert all("trainer_state.json" in names for names in parts), f"{folder}: a checkpoint without its state: {parts}"


def outcome(folder, hub):
    """Return all that must be equal: files except those with random names or times, and the content of the Hub."""
    facts = {str(f.relative_to(folder)): read(f) for f in finished(folder) if f.name != "training_args.bin"}
    if folder.name == "cache":
        facts = {name: content for name, content in facts.items() if not name.endswith(".safetensors")}
    for repository in hub.repositories.values():
        for commit in repository.commits.values():
            for name, file in commit.files.items():
                pushed = folder.parent / Path(name).name
                pushed.write_bytes(file.content)
                facts[f"hub/{name}"] = None if name == "training_args.bin" else read(pushed)
    return facts


# ---- killing ----


@contextmanager
def prepared():
    """Make inputs and a Hub on the loopback interface; yield both, and the context that starts processes."""
    with tempfile.TemporaryDirectory() as root, serving({"hf_owner": ("you", True)}, ["*.safetensors"]) as hub:
        hub.handle_error = lambda *_: None  # clients are killed on purpose
        os.environ.pop("HF_HUB_OFFLINE", None)
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": f"{root}/hf"}
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        process = context.Process(target=make_inputs, args=(Path(root),))
        process.start()
        process.join()
        yield Path(root), hub, context


def make_inputs(root):
    import numpy as np
    from miniatures import make_cirr, make_fashioniq
    from PIL import Image
    from tiny import make_model, make_processor
    from transformers import BlipForImageTextRetrieval

    model, processor = make_model(), make_processor()
    model.save_pretrained(root / "pvlf")
    processor.save_pretrained(root / "pvlf")
    blip = BlipForImageTextRetrieval(model.config.vl_config)
    for name in (*model.backbone.vision_modules, *model.backbone.text_modules):
        setattr(blip, name, getattr(model.backbone, name))
    blip.save_pretrained(root / "blip")
    processor.tokenizer.save_pretrained(root / "blip")
    for folder in ("photos", "gallery"):
        (root / folder).mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 32), colour).save(root / "photos" / f"{colour}.png")
    rows = [f"{a}.png,but {b},{b}.png" for a in COLOURS for b in COLOURS if a != b]
    (root / "triplets.csv").write_text("\n".join(["reference,caption,target", *rows]))
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 40, 40, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(root / "gallery" / f"{number}.png")
    rows = [f"{n}.png,but red,{n + 1}.png" for n in range(0, IMAGES, 2)]
    (root / "many.csv").write_text("\n".join(["reference,caption,target", *rows]))
    make_cirr(root / "data" / "cirr")
    make_fashioniq(root / "data" / "fashioniq")


class Killer:
    """One kind of job, killed and restarted repeatedly."""

    def __init__(self, kind, root, hub, context):
        self.kind, self.root, self.hub, self.context = kind, root, hub, context
        self.kills = self.amid_a_write = self.runs = self.results = self.units = self.redone = 0
        self.moments = {"time": 0, "operation": 0}
        self.folder = root / "alone" / kind
        hub.repositories.clear()
        self.alone = self.start()
        self.expected = outcome(self.folder, hub)
        assert self.expected and not unfinished(self.folder)

    def __str__(self):
        """Summarize all cycles in a line."""
        return (
            f"{self.kind}: {self.kills} kills ({self.moments['time']} by the clock, {self.moments['operation']} at a "
            f"file operation; {self.amid_a_write} amid a write), {self.results} results equal, {self.redone} of "
            f"{self.units} units done again; left alone {self.alone[1]:.1f} s, {self.alone[3]} file operations"
        )

    def start(self, seconds=None, dies_at=None):
        """Run until the end or the kill; return whether the job finished, seconds, units done and file operations."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=work, args=(self.kind, self.folder, self.root, theirs, dies_at))
        process.start()
        theirs.close()
        units, operations, began, ended = 0, 0, None, None
        try:
            while True:
                if began and seconds is not None and not ours.poll(max(0, seconds + began - monotonic())):
                    process.kill()
                    seconds = None  # messages sent before the kill are still read
                    continue
                message = ours.recv()
                if message == "begin":
                    began = monotonic()
                elif isinstance(message, int):
                    units += message
                else:
                    operations, ended = int(message.split()[1]), monotonic()
        except EOFError:
            process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(f"{self.kind} failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
        return process.exitcode == 0, (ended or monotonic()) - (began or monotonic()), units, operations

    def cycle(self, random, most):
        """Restart and kill the job, at most `most` times, until it finishes; then compare."""
        _, seconds, expected_units, operations = self.alone
        self.folder = self.root / f"cycle{self.runs}" / self.kind
        self.hub.repositories.clear()
        kills = units = 0
        done = False
        while not done:
            self.runs += 1
            by = ("operation", "time")[(self.kills + kills) % 2]
            moment = (
                {"dies_at": random.randint(1, operations)}
                if by == "operation"
                else {"seconds": random.uniform(0, seconds)}
            )
            done, _, new_units, _ = self.start(**moment if kills < most else {})
            units += new_units
            if not done:
                kills += 1
                self.moments[by] += 1
                self.amid_a_write += bool(unfinished(self.folder))
                check_files(self.folder)
        self.kills += kills
        self.units += units
        redone = units - expected_units
        self.redone += redone
        assert redone <= kills * LOSES[self.kind], f"{self.kind}: {redone} done again after {kills} kills"
        again = self.start()[2]  # the job has finished: this run has nothing to do
        assert again == 0, f"{self.kind}: {again} done again by a run that was finished"
        result = outcome(self.folder, self.hub)
        differ = [name for name in {*result, *self.expected} if result.get(name) != self.expected.get(name)]
        assert not differ, f"{self.kind}: other than without kills: {sorted(differ)}"
        assert not unfinished(self.folder), f"{self.kind}: left {unfinished(self.folder)}"
        self.results += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    random, killers = Random(args.seed), []
    with prepared() as (root, hub, context):
        for number, kind in enumerate(args.kinds):
            killer, quota = Killer(kind, root, hub, context), len(range(number, args.kills, len(args.kinds)))
            while killer.kills < quota:
                killer.cycle(random, min(3, quota - killer.kills))
            print(killer, flush=True)
            killers.append(killer)
    print(
        f"{sum(k.kills for k in killers)} kills, {sum(k.amid_a_write for k in killers)} amid a write; "
        f"{sum(k.results for k in killers)} results bit-equal to runs left alone; no unreadable file"
    )


if __name__ == "__main__":
    main()
