"""Examines data sets before a GPU hour is spent on them: which there are, and how each is read.

pvlf-hf doctor cirr data/cirr --split val --tokenizer Salesforce/blip-itm-base-coco
pvlf-hf doctor triplets my/triplets.csv --images my/images --json
"""

from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checks import as_path
from .examination import Finding, Report, Tree, examine_trees, first_of
from .image_files import RESPELLED, check_image_files, escapes_folder, find_files, is_respelled
from .protocols import DATA_SETS
from .triplets import read_triplet_table


def examine_data_set(
    name: str,
    root: str | Path,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    check_counts: bool = True,
) -> Report:
    """Examine a split of a published data set.

    Args:
        name: from `DATA_SETS`.
        root: folder of the data set, see its loader.
        split: the split, or the subset of laion-cir or circled; by default `"val"`, or else the last.
        tokenizer: the model's tokenizer, to count the tokens of captions; without it they are estimated.
        check_counts: report numbers of queries and images that are not the published ones.

    Raises:
        ValueError: if there is no such split.
    """
    data_set, root = DATA_SETS[name], as_path("root", root)
    split = split or ("val" if "val" in data_set.SPLITS else data_set.SPLITS[-1])
    if split not in data_set.SPLITS:
        raise ValueError(f"unknown split {split!r}: {name} has {', '.join(data_set.SPLITS)}")
    return examine_trees(f"{name} {root}", lambda: data_set.read_trees(root, split), tokenizer, check_counts)


examine_laion_cir, examine_cirr, examine_fashioniq, examine_circo = (
    partial(examine_data_set, name) for name in ("laion-cir", "cirr", "fashioniq", "circo")
)


def examine_triplets(
    file: str | Path, image_folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Report:
    """Examine a user's own triplets.

    Args:
        file: see [`~pvlf_hf.data.triplets.load_triplets`].
        image_folder: see there.
        tokenizer: see [`examine_data_set`].
    """
    file, folder = as_path("file", file), as_path("image_folder", image_folder).resolve()

    def read() -> list[Tree]:
        cells = read_triplet_table(file)
        names = list(dict.fromkeys([*cells["reference"], *cells["target"]]))
        file_of = find_files(folder, names)
        ids = {name: file_of.get(name, name) for name in names}
        rows = [
            {"reference_id": ids[reference], "caption": caption, "target_id": ids[target]}
            for reference, caption, target in zip(cells["reference"], cells["caption"], cells["target"], strict=True)
        ]
        images = {i: [i] for i in ids.values()}

        def load() -> None:
            loadable = [name for name in names if name in file_of or escapes_folder(folder, name)]
            check_image_files(folder, loadable, open_them=False)

        findings = _examine_spelling(str(file), folder, list(file_of))
        return [Tree(str(file), rows, images, [folder], load, is_training=True, findings=findings)]

    return examine_trees(f"triplets {file}", read, tokenizer, check_counts=False)


def _examine_spelling(where: str, folder: Path, names: list[str]) -> tuple[Finding, ...]:
    other = [name for name in names if is_respelled(folder, name)]
    if not other:
        return ()
    message = f"{len(other)} image names are taken for files {RESPELLED}"
    effect = "none here; other programs may not find the files"
    return (Finding("note", "misnamed", where, message, effect, first_of(map(repr, other))),)


def examine(
    subject: str,
    path: str | Path,
    split: str | None = None,
    image_folder: str | Path | None = None,
    tokenizer: str | None = None,
    check_counts: bool = True,
) -> Report:
    """Examine a data set by name.

    Args:
        subject: a name in `DATA_SETS`, or `"triplets"`.
        path: the data set's folder; the table of triplets.
        split: see [`examine_data_set`].
        image_folder: folder of the images of triplets; by default that of the table.
        tokenizer: folder or Hub name of a model, see [`examine_data_set`].
        check_counts: see [`examine_data_set`].

    Raises:
        ValueError: if the data set, the split or the tokenizer does not exist.
    """
    if subject not in (*DATA_SETS, "triplets"):
        raise ValueError(f"unknown data set {subject!r}; choose from {[*DATA_SETS, 'triplets']}")
    try:
        counter = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {tokenizer}: {error}") from error
    if subject == "triplets":
        return examine_triplets(path, image_folder or as_path("path", path).parent, counter)
    return examine_data_set(subject, path, split, counter, check_counts)
