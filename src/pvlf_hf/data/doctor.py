"""Examines data sets before a GPU hour is spent on them: which there are, and how each is read.

pvlf-hf doctor cirr data/cirr --split val --tokenizer Salesforce/blip-itm-base-coco
pvlf-hf doctor triplets my/triplets.csv --images my/images --json
"""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import annotations, circo, cirr, fashioniq, laion_cir
from .checks import as_path
from .examination import Finding, Report, Tree, examine_trees, first_of
from .image_files import RESPELLED, check_image_files, escapes_folder, find_files, is_respelled
from .triplets import read_triplet_table


def examine_cirr(
    root: str | Path, split: str = "val", tokenizer: PreTrainedTokenizerBase | None = None, check_counts: bool = True
) -> Report:
    """Examine a split of CIRR.

    Args:
        root: see [`~pvlf_hf.data.cirr.load_cirr`].
        split: see there.
        tokenizer: the model's tokenizer, to count the tokens of captions; without it they are estimated.
        check_counts: report numbers of queries and images that are not the published ones.
    """
    root = as_path("root", root)

    def read() -> list[Tree]:
        rows, images, _ = cirr.read_annotations(root, split, check_counts=False)
        return [
            Tree(
                f"cirr/{split}",
                rows,
                images,
                [root / folder for folder in cirr.IMAGE_FOLDERS],
                lambda: cirr.load_cirr(root, split, allow_missing=True, check_counts=False),
                dict(zip(("queries", "images"), cirr.EXPECTED_COUNTS[split], strict=True)),
            )
        ]

    return examine_trees(f"cirr {root}", read, tokenizer, check_counts)


def examine_fashioniq(
    root: str | Path, split: str = "val", tokenizer: PreTrainedTokenizerBase | None = None, check_counts: bool = True
) -> Report:
    """Examine a split of the three categories of FashionIQ; arguments as in [`examine_cirr`]."""
    root = as_path("root", root)

    def read_category(category: str) -> Tree:
        rows, images, _ = fashioniq.read_annotations(root, category, split, "and", check_counts=False)
        texts, _, _ = fashioniq.read_annotations(root, category, split, "separate", check_counts=False)
        name = f"fashioniq/{split}/{category}"
        blank = [number for number, row in enumerate(texts) if len(row["caption"]) < 2]
        finding = Finding(
            *("warning", "blank caption", name, f"{len(blank)} rows have one caption and not two"),
            "their text says half of what others do, and begins or ends with 'and'",
            first_of(f"row {number}" for number in blank),
        )
        return Tree(
            name,
            rows,
            images,
            [root / folder for folder in fashioniq.IMAGE_FOLDERS],
            lambda: fashioniq.load_fashioniq(root, category, split, allow_missing=True, check_counts=False),
            dict(zip(("queries", "images"), fashioniq.EXPECTED_COUNTS[split][category], strict=True)),
            findings=(finding,) if blank else (),
        )

    return examine_trees(
        f"fashioniq {root}", lambda: [read_category(c) for c in fashioniq.CATEGORIES], tokenizer, check_counts
    )


def examine_circo(
    root: str | Path, split: str = "val", tokenizer: PreTrainedTokenizerBase | None = None, check_counts: bool = True
) -> Report:
    """Examine a split of CIRCO and its gallery of 123,403 images; arguments as in [`examine_cirr`]."""
    root = as_path("root", root)

    def read() -> list[Tree]:
        file = annotations.find_file(root, [f"annotations/{split}.json", f"{split}.json"])
        rows = circo.read_queries(file, has_targets=split == "val")
        images = circo.read_images(annotations.find_file(root, circo.IMAGE_LISTS))
        return [
            Tree(
                f"circo/{split}",
                rows,
                images,
                [root / folder for folder in circo.IMAGE_FOLDERS],
                lambda: circo.load_circo(root, split, allow_missing=True, check_counts=False),
                {"queries": circo.EXPECTED_COUNTS[split], "images": circo.EXPECTED_IMAGES},
            )
        ]

    return examine_trees(f"circo {root}", read, tokenizer, check_counts)


def examine_laion_cir(
    root: str | Path,
    subset: str = "combined",
    tokenizer: PreTrainedTokenizerBase | None = None,
    check_counts: bool = True,
) -> Report:
    """Examine training triplets of Laion-CIR.

    Args:
        root: see [`~pvlf_hf.data.laion_cir.load_laion_cir`].
        subset: see there.
        tokenizer: see [`examine_cirr`].
        check_counts: see [`examine_cirr`].
    """
    root = as_path("root", root)

    def read_part(part: str) -> Tree:
        paths = [path.format(f"laion_{part}_info.json") for path in laion_cir.FILE_PATHS]
        rows = laion_cir.read_triplets(annotations.find_file(root, paths))
        return Tree(
            f"laion-cir/{part}",
            rows,
            {row[column]: [f"{row[column]}.png"] for row in rows for column in ("reference_id", "target_id")},
            [root / folder.format(part) for folder in laion_cir.IMAGE_FOLDERS],
            lambda: laion_cir.load_laion_cir(root, part, allow_missing=True, check_counts=False),
            {"triplets": laion_cir.EXPECTED_COUNTS[part]} if part in laion_cir.EXPECTED_COUNTS else {},
            is_training=True,
        )

    def read() -> list[Tree]:
        # The loader, too, takes the two parts where the file of the combined set is absent.
        combined = any((root / p.format("laion_combined_info.json")).is_file() for p in laion_cir.FILE_PATHS)
        parts = ("template", "llm") if subset == "combined" and not combined else (subset,)
        return [read_part(part) for part in parts]

    return examine_trees(f"laion-cir {root}", read, tokenizer, check_counts)


def examine_triplets(
    file: str | Path, image_folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Report:
    """Examine a user's own triplets.

    Args:
        file: see [`~pvlf_hf.data.triplets.load_triplets`].
        image_folder: see there.
        tokenizer: see [`examine_cirr`].
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


_EXAMINERS: dict[str, tuple[Callable[..., Report], tuple[str, ...]]] = {
    "laion-cir": (examine_laion_cir, laion_cir.SUBSETS),
    "cirr": (examine_cirr, cirr.SPLITS),
    "fashioniq": (examine_fashioniq, fashioniq.SPLITS),
    "circo": (examine_circo, circo.SPLITS),
}


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
        subject: `"laion-cir"`, `"cirr"`, `"fashioniq"`, `"circo"` or `"triplets"`.
        path: the data set's folder; the table of triplets.
        split: the split, or the subset of laion-cir; by default `"val"` or `"combined"`.
        image_folder: folder of the images of triplets; by default that of the table.
        tokenizer: folder or Hub name of a model, see [`examine_cirr`].
        check_counts: see [`examine_cirr`].

    Raises:
        ValueError: if the data set, the split or the tokenizer does not exist.
    """
    if subject not in (*_EXAMINERS, "triplets"):
        raise ValueError(f"unknown data set {subject!r}; choose from {[*_EXAMINERS, 'triplets']}")
    try:
        counter = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {tokenizer}: {error}") from error
    if subject == "triplets":
        return examine_triplets(path, image_folder or as_path("path", path).parent, counter)
    examiner, splits = _EXAMINERS[subject]
    split = split or ("val" if "val" in splits else "combined")
    if split not in splits:
        raise ValueError(f"unknown split {split!r}: {subject} has {', '.join(splits)}")
    return examiner(path, split, counter, check_counts=check_counts)
