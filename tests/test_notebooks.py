"""The committed notebooks, executed: their committed outputs are what they print and draw.

python tests/test_notebooks.py --write    # executes them and writes their outputs, after a change
"""

import argparse
import base64
import io
import os
import re
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from dual_encoders import save_dual_encoder
from forked import Forked, run_python
from hub_server import serving
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STAND_IN = "someone/blip-emoji-tiny"
"""Name on the Hub of the tests of the encoder that stands in for one of photographs."""

STAND_INS = {STAND_IN: FOLDER.parent / "model_cards" / "blip-emoji-tiny"}

SHORTER = {"6_methods": {"PVLF_STEPS": "1", "PVLF_BATCH": "16"}, "7_your_catalogue": {"PVLF_STEPS": "2"}}
"""Variables of notebooks that train for minutes; their text does not depend on them, only what their sheets show."""

DECIMAL = re.compile(r"[-+]?\d+\.\d+")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ForkedKernel(LocalProvisioner):
    """A kernel in a fork of the process that has imported Hugging Face's libraries."""

    async def launch_kernel(self, cmd, **kwargs):
        command = cmd[cmd.index("-m") :]
        files, where = [os.devnull, os.devnull], {"env": kwargs["env"], "cwd": kwargs["cwd"]}
        self.process = Forked(command, files, **where, libraries=True)
        self.pid = self.process.pid
        return self.connection_info


def execute(path, hub, **variables):
    """Return a copy with new outputs, executed in the notebook's folder by its own kernel: one thread, no network.

    Args:
        path: file of the notebook.
        hub: variables of [`hub_environment`] for a Hub with `STAND_IN`.
        variables: others.
    """
    notebook = nbformat.read(path, as_version=4)
    factory = KernelProvisionerFactory.instance(default_provisioner_name="forked")
    factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:ForkedKernel", factory.GROUP_NAME)
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={}, record_timing=False)
    client.resources["metadata"] = {"path": str(path.resolve().parent)}
    own = {**hub, "PVLF_ENCODER": STAND_IN} if path.stem == "5_your_photos" else {"HF_HUB_OFFLINE": "1"}
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", **own, **variables})
    return notebook


@contextmanager
def hub_environment(checkpoints):
    """Yield the variables by which a process downloads checkpoints, folders by name, from a Hub on this machine."""
    with serving({}) as hub, TemporaryDirectory() as cache:
        for name, folder in checkpoints.items():
            hub.publish(name, folder)
        yield {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "0"}


def printed(cell):
    """Return the text outputs of a cell, by output channel."""
    text = {}
    for output in cell.get("outputs", ()):
        where, what = (
            (output.name, output.text) if "text" in output else (output.output_type, output.data["text/plain"])
        )
        text[where] = text.get(where, "") + what
    return text


def images(cell):
    encoded = [output.data["image/png"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())]
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in encoded]


def same_text(one, other):
    """Return whether texts are equal; decimals may differ as far as other rounding changes a training."""
    assert DECIMAL.sub("#", one) == DECIMAL.sub("#", other)
    numbers = [[float(number) for number in DECIMAL.findall(text)] for text in (one, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.05)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Publish the stand-in and random encoders of each family; return the variables that name their Hub."""
    folder = tmp_path_factory.mktemp("encoders")
    for family in ENCODERS.values():
        save_dual_encoder(family, folder / family)
    with hub_environment({**STAND_INS, **{name: folder / family for name, family in ENCODERS.items()}}) as variables:
        yield variables


@pytest.mark.slow
@each_notebook
def test_notebook_reproduces_its_committed_outputs(path, hub):
    committed = nbformat.read(path, as_version=4)
    for before, after in zip(committed.cells, execute(path, hub, **SHORTER.get(path.stem, {})).cells, strict=True):
        assert printed(before).keys() == printed(after).keys(), before.source
        for where, text in printed(after).items():
            same_text(printed(before)[where], text)
        sizes = [[image.size for image in images(cell)] for cell in (before, after)]
        assert len(sizes[0]) == len(sizes[1])
        for one, other in zip(*sizes, strict=True):
            assert one == pytest.approx(other, rel=0.1), before.source


@each_notebook
def test_committed_outputs_are_one_run_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(len(images(cell)) for cell in code) >= 2
    for cell in code:
        shown = printed(cell)
        assert shown.keys() <= {"stdout", "display_data", "execute_result"}, shown  # no warnings, no errors
        machine = re.search(r"(?<![\w.])/(?:\w+/)+|\bat 0x|it/s\]", "".join(shown.values()))
        assert not machine, f"{machine.group()!r} is of one machine or run"
    assert path.stat().st_size < 500_000


ENCODERS = {
    "openai/clip-vit-base-patch32": "clip",
    "Salesforce/blip-itm-base-coco": "blip",
    "google/siglip2-base-patch16-256": "siglip",
    "facebook/metaclip-2-worldwide-b32": "metaclip_2",
    "BAAI/AltCLIP": "altclip",
}
"""Names of encoders on the Hub, and their families; the first is the one that the notebook names."""

TEN_MINUTES = """
import os
import sys
import warnings
from pathlib import Path

import nbformat

import pvlf_hf

warnings.simplefilter("ignore")
KINDS = {"heart", "artist", "astronaut", "bald", "cook", "detective", "farmer", "golfing"}
emoji = pvlf_hf.load_emoji_pictures(["Goog"])
emoji = emoji.select([row for row, name in enumerate(emoji["name"]) if KINDS & {*name.split()}])
pvlf_hf.load_emoji_pictures = lambda artists: emoji
cells = [cell.source for cell in nbformat.read(sys.argv[1], as_version=4).cells if cell.cell_type == "code"]
for encoder in (None, *sys.argv[2:]):
    if encoder:
        os.environ["PVLF_ENCODER"] = encoder
    names = {}
    for cell in cells:
        exec(cell, names)
    same = names["same_index"].embeds.equal(names["anew"].embeds)
    print("searched", names["ENCODER"], len(names["first"].ids), same)
"""


@pytest.mark.slow
def test_ten_minutes_of_a_newcomer_with_each_family_from_the_hub(hub):
    """Execute the notebook with a random encoder of each family, under the name of a published one, on few images.

    The first run sets no name, so that the encoder is the one that a person gets.
    """
    env = {**os.environ, "PVLF_STEPS": "3", **hub}
    env.pop("PVLF_ENCODER", None)
    command = ["-c", TEN_MINUTES, FOLDER / "5_your_photos.ipynb", *[*ENCODERS][1:]]
    done = run_python(command, env=env, cwd=FOLDER, timeout=900, libraries=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^searched (\S+) (\d+) (\w+)$", done.stdout, re.MULTILINE)
    assert found == [(name, "6", "True") for name in ENCODERS]


METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def write(path):
    """Execute a notebook and save its outputs: one stream of text a cell, images as small PNG."""
    with hub_environment(STAND_INS) as hub:
        notebook = execute(path, hub)
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells, 1):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{number}"
        streams = [output for output in cell.get("outputs", ()) if output.output_type == "stream"]
        for output in streams[1:]:
            streams[0].text += output.text
            cell.outputs.remove(output)
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                output.data.pop("image/jpeg", None)
                output.data["image/png"] = small_png(output.data["image/png"])
    nbformat.write(notebook, path)


def small_png(image):
    """Return the image with at most 256 colours."""
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", required=True, help="execute the notebooks, keep their outputs"
    )
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="by default all")
    for path in parser.parse_args().notebooks:
        write(path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
