"""Laion-CIR: training triplets that TransAgg made of LAION-COCO images, by templates and by a language model.

Annotations and images are on the authors' drive, see <https://github.com/Code-kunkun/ZS-CIR>.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from .annotations import check_counts_of, check_records, find_file, make_triplets, numbered, read_json
from .benchmark import NamedProtocol
from .checks import as_path, check_choice
from .examination import Tree

SUBSETS = ("template", "llm", "combined")

SPLITS = SUBSETS

EXPECTED_COUNTS = {"template": 16000, "llm": 16000}
"""Number of triplets; that of the published `combined` is not known exactly (about 32,000)."""

FILE_PATHS = ("{}", "files/{}", "data/files/{}")

IMAGE_FOLDERS = (".", "images", "laion_cir_{}")


def load_laion_cir(
    root: str | Path, subset: str = "combined", allow_missing: bool = False, check_counts: bool = True
) -> Dataset:
    """Load the training triplets.

    Args:
        root: has `laion_<subset>_info.json` (also in `files/` or `data/files/`) and the images, `0000042.png` (also
            in `images/` or `laion_cir_<subset>/`).
        subset: from `SUBSETS`. Where the file of `"combined"` is absent, it is `template` followed by `llm`.
        allow_missing: leave out triplets whose images are absent, with a warning, instead of raising.
        check_counts: raise unless `template` and `llm` have 16,000 triplets each.

    Returns:
        Columns `reference`, `target` (`datasets.Image`, decoded lazily), `reference_id`, `target_id` (the ids, filled
        with zeros to seven digits), `caption` (as annotated; TransAgg does not lower-case them either).

    Raises:
        ValueError: if the subset is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("subset", subset, SUBSETS)
    root = as_path("root", root)
    paths = [path.format(f"laion_{subset}_info.json") for path in FILE_PATHS]
    if subset == "combined" and not any((root / path).is_file() for path in paths):
        parts = [load_laion_cir(root, part, allow_missing, check_counts) for part in ("template", "llm")]
        return concatenate_datasets(parts)
    rows = read_triplets(find_file(root, paths))
    name = f"laion-cir/{subset}"
    if check_counts and subset in EXPECTED_COUNTS:
        check_counts_of(name, triplets=(len(rows), EXPECTED_COUNTS[subset]))
    images = {row[column]: [f"{row[column]}.png"] for row in rows for column in ("reference_id", "target_id")}
    folders = [root / folder.format(subset) for folder in IMAGE_FOLDERS]
    return make_triplets(name, rows, images, folders, allow_missing)


def read_triplets(file: Path) -> list[dict[str, str]]:
    """Read triplets in either published form: a list, or an object whose keys are the references."""
    content: Any = read_json(file, list | dict)
    fields: dict[str, Any] = {"tgt_image_id": str | int, "relative_cap": str}
    if isinstance(content, dict):
        check_records(file, {f"reference {key}": record for key, record in content.items()}, fields)
        content = [{"ref_image_id": key, **record} for key, record in content.items()]
    check_records(file, numbered(content), {"ref_image_id": str | int, **fields})
    return [
        {
            "reference_id": str(record["ref_image_id"]).zfill(7),
            "caption": record["relative_cap"],
            "target_id": str(record["tgt_image_id"]).zfill(7),
        }
        for record in content
    ]


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: a subset, or the parts of the combined one, as the loader takes them."""
    combined = any((root / path.format("laion_combined_info.json")).is_file() for path in FILE_PATHS)
    return [
        _read_tree(root, part) for part in (("template", "llm") if split == "combined" and not combined else (split,))
    ]


def _read_tree(root: Path, part: str) -> Tree:
    rows = read_triplets(find_file(root, [path.format(f"laion_{part}_info.json") for path in FILE_PATHS]))
    return Tree(
        f"laion-cir/{part}",
        rows,
        {row[column]: [f"{row[column]}.png"] for row in rows for column in ("reference_id", "target_id")},
        [root / folder.format(part) for folder in IMAGE_FOLDERS],
        lambda: load_laion_cir(root, part, allow_missing=True, check_counts=False),
        {"triplets": EXPECTED_COUNTS[part]} if part in EXPECTED_COUNTS else {},
        is_training=True,
    )


PROTOCOLS: dict[str, NamedProtocol] = {}
"""Nothing is evaluated on training triplets."""
