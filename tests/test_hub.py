"""Round trips over a Hub: one process publishes; another, with neither the package nor a cache, uses the result."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from error_bounds import squares_error
from forked import WITHOUT_PACKAGE, run_python
from hub_server import serving
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
TOKENS = {"hf_owner": ("you", True), "hf_reader": ("you", False), "hf_other": ("someone", True)}
FIGURES = {"recall@1": 0.25, "recall_subset@1": 0.5}

PUBLISH = """
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, create_repo, create_tag, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import save_file
from tiny import make_model, make_processor

from pvlf_hf.checkpoints.model_card import render_card, write_card

folder = Path(sys.argv[1])
image, results = Image.open(folder / "image.png"), json.loads((folder / "results.json").read_text())
processor, models = make_processor(), {name: make_model(seed=seed) for seed, name in enumerate(["first", "second"])}
outputs = {}
for name, model in models.items():
    with torch.no_grad():
        outputs[name] = model(**processor(images=image, text="the same but red", target_images=image)).similarity
save_file(outputs, folder / "published.safetensors")

# In parts: a commit each for model, processor and card; a later version on a branch of its own.
for name in ("you/parts", "you/secret"):
    models["first"].push_to_hub(name, private=name == "you/secret")
    processor.push_to_hub(name)
    ModelCard(render_card(results, name)).push_to_hub(name)
create_tag("you/parts", tag="v1")
models["second"].push_to_hub("you/parts", revision="next")
processor.push_to_hub("you/parts")  # loads the card there and writes it again

# At once: a folder with model, processor, results, card and image.
models["first"].save_pretrained(folder / "whole")
processor.save_pretrained(folder / "whole")
(folder / "whole" / "results.json").write_text(json.dumps(results))
image.save(folder / "whole" / "retrievals.png")
write_card(folder / "whole", "you/whole", license="apache-2.0")
create_repo("you/whole")
upload_folder(repo_id="you/whole", folder_path=folder / "whole")

try:
    models["first"].push_to_hub("you/parts", token="hf_reader")
except HfHubHTTPError as error:
    (folder / "refusal.txt").write_text(str(error))
"""

MEASURED = """
import json
import sys
from pathlib import Path

from huggingface_hub import HfApi

from pvlf_hf.checkpoints.pushing import push_checkpoint

folder = Path(sys.argv[1]) / "measured"
protocol = {"name": "emoji-cir", "gallery": "all", "reference": "removed", "metrics": "cirr", "revision": "v1"}
metrics, counts = {"recall@1": 0.25, "recall@10": 0.5}, {"queries": 4, "gallery": 9}
evaluation = {"benchmark": "emoji-cir/test/plain", "method": "composed", "metrics": metrics, "counts": counts}
results = {"evaluations": [{**evaluation, "protocol": protocol}]}
(folder / "checkpoint-4").mkdir(parents=True)
(folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"of the run")
(folder / "config.json").write_text("{}")
(folder / "results.json").write_text(json.dumps(results))
ids = {"emoji-cir": "you/emoji-cir"}
pin = push_checkpoint(folder, "you/measured", hub_ids=ids, private=True, license="mit", base_model="you/base")
entries = HfApi().model_info("you/measured", expand=["evalResults"]).eval_results
(folder / "read.json").write_text(json.dumps([[e.dataset_id, e.task_id, e.value, e.source_url] for e in entries]))
(folder / "pin.txt").write_text(pin)
"""

STRANGER = (
    WITHOUT_PACKAGE
    + """
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, pipeline

folder, offline = Path(sys.argv[1]), sys.argv[2] == "offline"
image = Image.open(folder / "image.png")
outputs = {}


@torch.no_grad()
def load(name, **where):
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **where)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **where)
    output = model(**processor(images=image, text="the same but red", target_images=image))
    outputs["@".join([name, *where.values()])] = output.similarity


if not offline:
    for token in (False, "hf_other"):
        try:
            load("you/secret", token=token)
        except OSError as error:
            assert "you/secret" in str(error) and "private" in str(error), error
        else:
            raise SystemExit(f"you/secret was given to {token}")
for revision in ("main", "v1", "next"):
    load("you/parts", revision=revision)
load("you/whole")
load("you/secret", token="hf_owner")
for name in ("you/parts", "you/whole"):  # the pipeline's class travels with the model
    pipe = pipeline("composed-image-retrieval", model=name, trust_remote_code=True, gallery=[image], device="cpu")
    (found,) = pipe(image, text="the same but red")
    assert abs(found["score"] - outputs["you/whole"].item()) <= float(sys.argv[3]), found
if not offline:
    snippet = ModelCard.load("you/whole").text.split("```python")[1].split("```")[0]
    names = {"images": [image, image.rotate(90)], "image": image}
    exec(snippet, names)
    assert names["best"].shape == (1, 2)
save_file(outputs, folder / f"{sys.argv[2]}.safetensors")
"""
)

TRAIN = """
import json
import sys
from pathlib import Path

from datasets import Dataset, Image
from tiny import make_model, make_processor

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments

folder = sys.argv[1]
columns = {"reference": [folder + "/image.png"] * 4, "caption": ["red", "blue", "green", "dark"]}
columns |= {"target": columns["reference"], "target_id": columns["caption"]}
triplets = Dataset.from_dict(columns).cast_column("reference", Image()).cast_column("target", Image())


def make_trainer(name, token):
    args = PVLFTrainingArguments(
        f"{folder}/{name}",
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=1,
        hub_always_push=True,
        push_to_hub=True,
        hub_model_id=name,
        hub_token=token,
        disable_tqdm=True,
        use_cpu=True,
    )
    return PVLFTrainer(make_model(), args, triplets, processing_class=make_processor())


refusals = []
for name, token in (("you/parts", "hf_reader"), ("you/new", "hf_reader"), ("you/parts", "hf_other")):
    try:
        make_trainer(name, token)
    except ValueError as error:
        refusals.append(str(error))
Path(folder, "refusals.json").write_text(json.dumps(refusals))

trainer = make_trainer("you/trained", "hf_owner")
trainer.train()
trainer.push_to_hub("Trained")
trainer.push_to_hub("Measured", results=f"{folder}/results.json", license="apache-2.0")
"""


@pytest.fixture(scope="module")
def hub():
    """Yield a Hub: repositories named `parts` store weights as regular files, the others as large ones."""
    with serving(TOKENS, lfs=["you/whole/*.safetensors", "you/secret/*.safetensors", "*.png"]) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with an image and the results of a run."""
    folder = tmp_path_factory.mktemp("hub")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    protocol = {"name": "cirr-val", "gallery": "all", "revision": "abc"}
    counts = {"queries": 4, "gallery": 9}
    evaluation = {
        "benchmark": "cirr/val",
        "method": "pvlf",
        "metrics": FIGURES,
        "counts": counts,
        "protocol": protocol,
    }
    (folder / "results.json").write_text(json.dumps({"evaluations": [evaluation]}))
    return folder


def run(script, hub, home, *arguments, **environment):
    """Run a script as a user with this HF_HOME: endpoint and cache are read when the libraries are imported."""
    # Not sys.path: other tests may have added modules loaded by trust_remote_code.
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": path}
    done = run_python(["-c", script, *arguments], env={**known, **settings, **environment}, cwd=home)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def published(hub, folder, tmp_path_factory):
    run(PUBLISH, hub, tmp_path_factory.mktemp("owner"), folder, HF_TOKEN="hf_owner")
    return hub.repositories


@pytest.fixture(scope="module")
def stranger(hub, published, folder, tmp_path_factory):
    """Return the cache of a user who has loaded everything once."""
    home = tmp_path_factory.mktemp("stranger")
    run(STRANGER, hub, home, folder, "online", squares_error()["similarity"])
    return home


def test_downloaded_model_gives_the_same_outputs(published, stranger, folder):
    ours, theirs = load_file(folder / "published.safetensors"), load_file(folder / "online.safetensors")
    versions = {"you/parts@main": "first", "you/parts@v1": "first", "you/parts@next": "second", "you/whole": "first"}
    versions["you/secret@hf_owner"] = "first"
    assert not ours["first"].equal(ours["second"])
    assert {name: version for name in theirs for version in ours if theirs[name].equal(ours[version])} == versions


PUBLISH_METHODS = """
import sys
from pathlib import Path

import torch
from dual_encoders import save_dual_encoder
from error_bounds import rounding
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from pvlf_hf.training.methods import METHODS

folder = Path(sys.argv[1])
image, outputs, errors = Image.open(folder / "image.png"), {}, {}


def embed(model, inputs):
    return {"query": model.get_query_features(**inputs).pooler_output.detach()}


settings = {
    "pic2word": {"placeholder": "b"},
    "case": {"first_token": "cls", "reverse_token_id": 4},
    "compodiff": {"denoiser_layers": 1, "denoiser_heads": 2, "head_width": 32},
}
for method, own in settings.items():
    torch.manual_seed(0)
    save_dual_encoder("blip" if method == "case" else "clip", folder / method)
    model, processor = METHODS[method].make(method, str(folder / method), own)
    model.push_to_hub(f"you/{method}")
    processor.push_to_hub(f"you/{method}")
    inputs = processor.process_queries(image, "is red")
    outputs[f"{method}, built"] = model.eval().get_query_features(**inputs).pooler_output.detach().contiguous()
    loaded = AutoModel.from_pretrained(f"you/{method}")
    assert type(loaded) is type(model) and type(AutoProcessor.from_pretrained(f"you/{method}")) is type(processor)
    outputs[f"{method}, loaded"] = loaded.get_query_features(**inputs).pooler_output.detach().contiguous()
    errors[method] = torch.tensor(rounding(embed, model, dict(inputs), draws=4)["query"])
save_file(outputs, folder / "methods.safetensors")
save_file(errors, folder / "errors.safetensors")
"""

LOAD_METHODS = (
    WITHOUT_PACKAGE
    + """
import sys
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

folder, outputs = Path(sys.argv[1]), {}
for method in ("pic2word", "case", "compodiff"):
    model = AutoModel.from_pretrained(f"you/{method}", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(f"you/{method}", trust_remote_code=True)
    inputs = processor.process_queries(Image.open(folder / "image.png"), "is red")
    outputs[method] = model.get_query_features(**inputs).pooler_output.detach().contiguous()
save_file(outputs, folder / "without.safetensors")
"""
)


def test_methods_are_loaded_from_the_hub_with_and_without_the_package(hub, folder, tmp_path):
    run(PUBLISH_METHODS, hub, tmp_path, folder, HF_TOKEN="hf_owner")
    (tmp_path / "stranger").mkdir()
    run(LOAD_METHODS, hub, tmp_path / "stranger", folder)
    ours, theirs, errors = (load_file(folder / f"{name}.safetensors") for name in ("methods", "without", "errors"))
    for name, query in ours.items():  # loaded weights lie elsewhere in memory, which moves the last bit of a product
        method = name.partition(",")[0]
        torch.testing.assert_close(theirs[method], query, atol=errors[method].item(), rtol=0)
    assert {name.partition(",")[0] for name in ours} == {*theirs} and len(theirs) == 3


def test_cached_model_loads_offline(hub, stranger, folder):
    before = len(hub.requests)
    run(
        STRANGER,
        hub,
        stranger,
        folder,
        "offline",
        squares_error()["similarity"],
        HF_HUB_OFFLINE="1",
        HF_TOKEN="hf_owner",
    )
    assert len(hub.requests) == before
    online, offline = load_file(folder / "online.safetensors"), load_file(folder / "offline.safetensors")
    assert online.keys() == offline.keys()
    assert all(online[name].equal(offline[name]) for name in online)


def test_weights_upload_as_regular_and_large_files(hub, published):
    kinds = {name: its.commits[its.branches["main"]].files["model.safetensors"].lfs for name, its in published.items()}
    assert {name: kinds[name] for name in ("you/parts", "you/whole", "you/secret")} == {
        "you/parts": False,
        "you/whole": True,
        "you/secret": True,
    }
    assert any(request.startswith("PUT /large-files/") for request in hub.requests)


def test_push_commits_the_whole_folder_once(published, folder):
    repository = published["you/whole"]
    assert len(repository.history()) == 2  # the Hub's initial commit and ours
    files = repository.commits[repository.branches["main"]].files
    assert files.keys() == {path.name for path in (folder / "whole").iterdir()}
    assert {"modeling_pvlf.py", "processor_config.json", "results.json", "retrievals.png"} <= files.keys()
    assert all(file.content == (folder / "whole" / name).read_bytes() for name, file in files.items())


@pytest.mark.parametrize("name", ["you/parts", "you/whole", "you/secret"])
def test_pushed_card_states_the_results(published, name):
    repository = published[name]
    card = ModelCard(repository.commits[repository.branches["main"]].files["README.md"].content.decode())
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == FIGURES
    assert "composed-image-retrieval" in card.data.tags
    assert "| cirr/val | cirr-val | pvlf | 25.00 | 50.00 |" in card.text
    assert f'from_pretrained("{name}", trust_remote_code=True)' in card.text


def test_the_hub_reads_the_results(hub, folder, tmp_path):
    (folder / "measured").mkdir()
    run(MEASURED, hub, tmp_path, folder, HF_TOKEN="hf_owner")
    source = "https://huggingface.co/you/measured/blob/main/results.json"
    tasks = {"test-plain-recall_at_1": 25.0, "test-plain-recall_at_10": 50.0}
    expected = [["you/emoji-cir", task, value, source] for task, value in tasks.items()]
    assert json.loads((folder / "measured/read.json").read_text()) == expected
    pin = (folder / "measured/pin.txt").read_text()
    repository = hub.repositories["you/measured"]
    assert repository.private and pin in repository.commits and pin != repository.branches["main"]
    card = repository.commits[repository.branches["main"]].files["README.md"].content.decode()
    assert f'from_pretrained("you/measured", revision="{pin}", trust_remote_code=True)' in card
    assert "base_model: you/base" in card and "license: mit" in card
    files = {"config.json", "results.json", "README.md", ".eval_results/emoji-cir.yaml"}
    assert files == {*repository.commits[pin].files}  # nothing of the run's own checkpoints
    first = repository.commits[pin].files["README.md"].content.decode()
    assert 'Pass revision="<commit>"' in first  # what can be said before there is a commit


def test_read_only_token_raises(published, folder):
    refusal = (folder / "refusal.txt").read_text()
    assert "403 Forbidden: this token does not have the rights to write to you's repositories" in refusal


@pytest.fixture(scope="module")
def trained(hub, published, folder, tmp_path_factory):
    hub.delay = 0.5  # a delay longer than a step
    run(TRAIN, hub, tmp_path_factory.mktemp("trainer"), folder)
    hub.delay = 0.0
    return hub.repositories["you/trained"]


def test_trainer_pushes_during_training(trained):
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    assert trained.history() == ["initial commit", *steps, "Trained", "Measured"]
    files = trained.commits[trained.branches["main"]].files
    assert {"model.safetensors", "modeling_pvlf.py", "processor_config.json"} <= files.keys()
    assert not any(name.startswith("checkpoint-") for name in files)


@pytest.mark.reliability(
    1,
    "A push during training uploads a complete checkpoint of its step, even if the Hub is slower than a step",
    broken=(
        "src/pvlf_hf/training/atomic_checkpoints.py",
        "            self._finish_current_push()",
        "            pass",
    ),
)
def test_push_uploads_the_checkpoint_of_its_step(trained, folder, figure):
    pushed = {commit.message: commit.files for commit in trained.commits.values()}
    for step in (1, 2):
        written = folder / "you" / "trained" / f"checkpoint-{step}" / "model.safetensors"
        assert pushed[f"Training in progress, step {step}"]["model.safetensors"].content == written.read_bytes()
    figure("2 pushes, the bytes of their checkpoints")


def test_trainer_pushes_a_pvlf_card(trained):
    cards = {
        commit.message: ModelCard(commit.files["README.md"].content.decode())
        for commit in trained.commits.values()
        if "README.md" in commit.files
    }
    assert cards.keys() == {"Trained", "Measured"}
    assert cards["Trained"].data.eval_results is None and "Not measured." in cards["Trained"].text
    assert "| max_steps | 2 |" in cards["Trained"].text and "Run with python" in cards["Trained"].text
    assert len(cards["Measured"].data.eval_results) == len(FIGURES) and cards["Measured"].data.license == "apache-2.0"


def test_trainer_raises_before_the_first_step(trained, folder):
    refusals = json.loads((folder / "refusals.json").read_text())
    for refusal, name in zip(refusals, ("you/parts", "you/new", "you/parts"), strict=True):
        assert f"this token may not write to {name} on the Hub: log in with one that may" in refusal
        assert "The Hub says: this token does not have the rights" in refusal
