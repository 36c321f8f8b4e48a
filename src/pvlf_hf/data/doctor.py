"""Examines a data set before a GPU hour is spent on it.

Which files are missing, damaged, misnamed or double, which captions are cut off, and what does that to the numbers?

    pvlf-hf doctor cirr data/cirr --split val --tokenizer Salesforce/blip-itm-base-coco
    pvlf-hf doctor triplets my/triplets.csv --images my/images --json
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL.Image
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data import annotations, circo, cirr, fashioniq, laion_cir
from ..digests import content_digest
from .image_files import check_image_files, unreadable
from .triplets import read_triplet_table

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

_TOKENS = {"BLIP": 35, "CLIP": 77}
"""Tokens of a caption that reach the model, special ones included."""


@dataclass(frozen=True)
class Finding:
    """One kind of trouble.

    Args:
        severity: `"error"`: evaluation or training stops, or the numbers do not compare; `"warning"`: the numbers are
            touched; `"note"`: as published, good to know.
        kind: names it: `"annotations"`, `"counts"`, `"unlisted"`, `"missing"`, `"misnamed"`, `"empty file"`,
            `"corrupt"`, `"duplicate"`, `"blank caption"`, `"long caption"` or `"loader"`.
        where: the part of the data set, e.g. `"fashioniq/val/dress"`.
        message: what is the matter.
        effect: what it does to training or metrics.
        examples: the first few of them.
    """

    severity: Severity
    kind: str
    where: str
    message: str
    effect: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What an examination found; `str(report)` is for reading, `asdict(report)` for JSON.

    Args:
        subject: what was examined.
        counts: of rows, images and files found, by part of the data set.
        findings: in the order in which they were found.
    """

    subject: str
    counts: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def __str__(self) -> str:
        number = Counter(finding.severity for finding in self.findings)
        lines = [f"{self.subject}: " + ", ".join(f"{number[severity]} {severity}s" for severity in SEVERITIES)]
        for where, counts in self.counts.items():
            lines.append(f"{where}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
        for finding in sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity)):
            examples = f": {', '.join(finding.examples)}" if finding.examples else ""
            lines.append(f"\n{finding.severity.upper()} {finding.where}, {finding.kind}: {finding.message}{examples}")
            lines.append(f"    {finding.effect}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Tree:
    """What the annotations of one gallery or training set ask for.

    Args:
        name: e.g. `"cirr/val"`.
        rows: queries or triplets with `reference_id`, `caption` and, where known, `target_id`, `target_ids`,
            `subset_ids`.
        images: by image id, the file names it may have, relative to one of the folders.
        folders: where the images may be.
        load: loads it as evaluation or training would, without what is missing.
        expected: published numbers by what they count, `"queries"` (or `"triplets"`) and `"images"`.
        is_training: whether rows are training triplets and not queries.
        findings: about the annotations, if there is anything to say already.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    images: Mapping[str, Sequence[str]]
    folders: Sequence[Path]
    load: Callable[[], Any]
    expected: Mapping[str, int] = field(default_factory=dict)
    is_training: bool = False
    findings: tuple[Finding, ...] = ()

    @property
    def rows_are(self) -> str:
        """What a row is called."""
        return "triplets" if self.is_training else "queries"


def examine_cirr(
    root: str | Path, split: str = "val", tokenizer: PreTrainedTokenizerBase | None = None, check_counts: bool = True
) -> Report:
    """Examines a split of CIRR.

    Args:
        root: see [`~pvlf_hf.data.cirr.load_cirr`].
        split: likewise.
        tokenizer: the model's, to count the tokens of captions; estimated from the words without it.
        check_counts: find fault with numbers of queries and images that are not the published ones.
    """

    def read() -> list[Tree]:
        rows, images, _ = cirr.read_annotations(Path(root), split, check_counts=False)
        return [
            Tree(
                f"cirr/{split}",
                rows,
                images,
                [Path(root) / folder for folder in cirr.IMAGE_FOLDERS],
                lambda: cirr.load_cirr(root, split, allow_missing=True, check_counts=False),
                dict(zip(("queries", "images"), cirr.EXPECTED_COUNTS[split], strict=True)),
            )
        ]

    return _examine(f"cirr {root}", read, tokenizer, check_counts)


def examine_fashioniq(
    root: str | Path, split: str = "val", tokenizer: PreTrainedTokenizerBase | None = None, check_counts: bool = True
) -> Report:
    """Examines a split of the three categories of FashionIQ; arguments as of [`examine_cirr`]."""

    def read_category(category: str) -> Tree:
        rows, images, _ = fashioniq.read_annotations(Path(root), category, split, "separate", check_counts=False)
        name = f"fashioniq/{split}/{category}"
        blank = [str(n) for n, row in enumerate(rows) if not all(text.strip(".?, ") for text in row["caption"])]
        finding = Finding(
            *("warning", "blank caption", name, f"{len(blank)} rows have one caption and not two"),
            "their text says half of what others do, and ends or begins with 'and'",
            _first(f"row {number}" for number in blank),
        )
        return Tree(
            name,
            [{**row, "caption": fashioniq.compose_captions(row["caption"])} for row in rows],
            images,
            [Path(root) / folder for folder in fashioniq.IMAGE_FOLDERS],
            lambda: fashioniq.load_fashioniq(root, category, split, allow_missing=True, check_counts=False),
            dict(zip(("queries", "images"), fashioniq.EXPECTED_COUNTS[split][category], strict=True)),
            findings=(finding,) if blank else (),
        )

    return _examine(
        f"fashioniq {root}", lambda: [read_category(c) for c in fashioniq.CATEGORIES], tokenizer, check_counts
    )


def examine_circo(
    root: str | Path, split: str = "val", tokenizer: PreTrainedTokenizerBase | None = None, check_counts: bool = True
) -> Report:
    """Examines a split of CIRCO and its gallery of 123,403 images; arguments as of [`examine_cirr`]."""

    def read() -> list[Tree]:
        file = annotations.find_file(Path(root), [f"annotations/{split}.json", f"{split}.json"])
        rows = circo.read_queries(file, has_targets=split == "val")
        images = circo.read_images(annotations.find_file(Path(root), circo.IMAGE_LISTS))
        return [
            Tree(
                f"circo/{split}",
                rows,
                images,
                [Path(root) / folder for folder in circo.IMAGE_FOLDERS],
                lambda: circo.load_circo(root, split, allow_missing=True, check_counts=False),
                {"queries": circo.EXPECTED_COUNTS[split], "images": circo.EXPECTED_IMAGES},
            )
        ]

    return _examine(f"circo {root}", read, tokenizer, check_counts)


def examine_laion_cir(
    root: str | Path,
    subset: str = "combined",
    tokenizer: PreTrainedTokenizerBase | None = None,
    check_counts: bool = True,
) -> Report:
    """Examines training triplets of Laion-CIR.

    Args:
        root: see [`~pvlf_hf.data.laion_cir.load_laion_cir`].
        subset: likewise.
        tokenizer: see [`examine_cirr`].
        check_counts: likewise.
    """

    def read_part(part: str) -> Tree:
        places = [place.format(f"laion_{part}_info.json") for place in laion_cir.FILE_PLACES]
        rows = laion_cir.read_triplets(annotations.find_file(Path(root), places))
        return Tree(
            f"laion-cir/{part}",
            rows,
            {row[column]: [f"{row[column]}.png"] for row in rows for column in ("reference_id", "target_id")},
            [Path(root) / folder.format(part) for folder in laion_cir.IMAGE_FOLDERS],
            lambda: laion_cir.load_laion_cir(root, part, allow_missing=True, check_counts=False),
            {"triplets": laion_cir.EXPECTED_COUNTS[part]} if part in laion_cir.EXPECTED_COUNTS else {},
            is_training=True,
        )

    def read() -> list[Tree]:
        # As the loader does where the file of the combined set is absent.
        combined = any((Path(root) / p.format("laion_combined_info.json")).is_file() for p in laion_cir.FILE_PLACES)
        parts = ("template", "llm") if subset == "combined" and not combined else (subset,)
        return [read_part(part) for part in parts]

    return _examine(f"laion-cir {root}", read, tokenizer, check_counts)


def examine_triplets(
    file: str | Path, image_folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Report:
    """Examines a user's own triplets.

    Args:
        file: see [`~pvlf_hf.data.triplets.load_triplets`].
        image_folder: likewise.
        tokenizer: see [`examine_cirr`].
    """
    folder = Path(image_folder).resolve()

    def read() -> list[Tree]:
        cells = read_triplet_table(Path(file))
        names = {"reference_id": cells["reference"], "caption": cells["caption"], "target_id": cells["target"]}
        rows = [dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)]
        images = {row[column]: [row[column]] for row in rows for column in ("reference_id", "target_id")}

        def load() -> None:
            there = [name for name in images if (folder / name).is_file()]
            check_image_files(folder, there, open_them=False)

        return [Tree(str(file), rows, images, [folder], load, is_training=True)]

    return _examine(f"triplets {file}", read, tokenizer, check_counts=False)


def _examine(
    subject: str, read: Callable[[], list[Tree]], tokenizer: PreTrainedTokenizerBase | None, check_counts: bool
) -> Report:
    try:
        trees = read()
    except (OSError, ValueError) as error:
        finding = Finding("error", "annotations", subject.split()[0], str(error), "nothing can be loaded")
        return Report(subject, {}, (finding,))
    findings: list[Finding] = []
    counts = {}
    for tree in trees:
        paths = max((annotations.paths_in(folder, tree.images) for folder in tree.folders), key=len)
        counts[tree.name] = {tree.rows_are: len(tree.rows), "images": len(tree.images), "files": len(paths)}
        findings += tree.findings
        if check_counts:
            findings += _examine_counts(tree, counts[tree.name])
        unlisted = _examine_listing(tree)
        findings += unlisted + _examine_names(tree, paths) + _examine_files(tree, paths)
        findings += _examine_captions(tree, tokenizer)
        if not unlisted and any(all(i in paths for i in annotations.named_images(row)) for row in tree.rows):
            findings += _examine_loading(tree)
    return Report(subject, counts, tuple(findings))


def _examine_counts(tree: Tree, counts: Mapping[str, int]) -> list[Finding]:
    effect = "the annotations are not the published ones, so the numbers do not compare with published ones"
    return [
        Finding("error", "counts", tree.name, f"{counts[what]} {what}, published are {expected}", effect)
        for what, expected in tree.expected.items()
        if counts[what] != expected
    ]


def _examine_listing(tree: Tree) -> list[Finding]:
    unlisted = dict.fromkeys(i for row in tree.rows for i in annotations.named_images(row) if i not in tree.images)
    if not unlisted:
        return []
    message = f"{len(unlisted)} images that rows name are not in the gallery's list"
    return [Finding("error", "unlisted", tree.name, message, _effect(tree, unlisted), _first(unlisted))]


def _examine_names(tree: Tree, paths: Mapping[str, str]) -> list[Finding]:
    missing = [i for i in tree.images if i not in paths]
    if not missing:
        return []
    likely = _likely_files(tree, missing, set(paths.values()))
    findings = []
    if lost := [i for i in missing if i not in likely]:
        message = f"{len(lost)} of {len(tree.images)} images have no file"
        names = _first(tree.images[i][0] for i in lost)
        findings.append(Finding("error", "missing", tree.name, message, _effect(tree, lost), names))
    if likely:
        message = f"{len(likely)} images seem to have another name or folder than the annotations give them"
        pairs = _first(f"{found} instead of {tree.images[i][0]}" for i, found in likely.items())
        effect = f"rename them; without: {_effect(tree, likely)}"
        findings.append(Finding("error", "misnamed", tree.name, message, effect, pairs))
    return findings


def _likely_files(tree: Tree, missing: Iterable[str], taken: set[str]) -> dict[str, str]:
    """By id of a missing image, a file whose name differs in case, ending, leading zeros or folder only."""

    def core(name: str) -> str:
        return Path(name).stem.lower().lstrip("0")

    roots = [f for f in tree.folders if f.is_dir() and not any(f != g and f.is_relative_to(g) for g in tree.folders)]
    files = (file for root in roots for file in root.rglob("*") if file.is_file() and str(file) not in taken)
    of_core = {
        core(file.name): str(file) for file in files if file.suffix.lower() in PIL.Image.registered_extensions()
    }
    return {i: of_core[core(tree.images[i][0])] for i in missing if core(tree.images[i][0]) in of_core}


def _examine_files(tree: Tree, paths: Mapping[str, str]) -> list[Finding]:
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        looked_at = list(tqdm(pool.map(_look_at, paths.values()), f"reading {tree.name}", len(paths), unit="image"))
    of_id = dict(zip(paths, looked_at, strict=True))
    findings = []
    if empty := [i for i, (_, reason) in of_id.items() if reason == "empty"]:
        message, effect = f"{len(empty)} files are empty", f"reading stops there; without: {_effect(tree, empty)}"
        findings.append(Finding("error", "empty file", tree.name, message, effect, _first(paths[i] for i in empty)))
    if corrupt := {i: reason for i, (_, reason) in of_id.items() if reason not in (None, "empty")}:
        message = f"{len(corrupt)} pictures cannot be decoded"
        effect = f"reading stops there; without: {_effect(tree, corrupt)}"
        examples = _first(f"{paths[i]} ({reason})" for i, reason in corrupt.items())
        findings.append(Finding("error", "corrupt", tree.name, message, effect, examples))
    same = defaultdict(list)
    for i, (content, reason) in of_id.items():
        if reason is None:
            same[content].append(i)
    return findings + _examine_duplicates(tree, [ids for ids in same.values() if len(ids) > 1])


def _look_at(file: str) -> tuple[str, str | None]:
    """Digest of a file, and what is wrong with the picture if anything is."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return "", str(error)
    return content_digest([content]), unreadable(Path(file)) if content else "empty"


def _examine_duplicates(tree: Tree, groups: list[list[str]]) -> list[Finding]:
    if not groups:
        return []
    twins = {i: set(group) - {i} for group in groups for i in group}
    answers = [set(row.get("target_ids", ())) | {row["target_id"]} for row in tree.rows if "target_id" in row]
    touched = sum(any(twins.get(answer, set()) - right for answer in right) for right in answers)
    effect = f"equal pictures tie and stand in gallery order, by which {touched} of {len(answers)} targets are ranked"
    if tree.is_training:
        effect = f"{touched} of {len(answers)} triplets have a target that is also a negative, under its other id"
    message = f"{len(twins)} images are {len(groups)} pictures, byte for byte"
    return [Finding("warning", "duplicate", tree.name, message, effect, _first(" = ".join(g[:3]) for g in groups))]


def _examine_captions(tree: Tree, tokenizer: PreTrainedTokenizerBase | None) -> list[Finding]:
    captions = [row["caption"] for row in tree.rows]
    if tokenizer is None:
        how = " (an estimate from words and punctuation: give a tokenizer to count)"
        lengths, limits = [len(re.findall(r"\w+|[^\w\s]", caption)) + 2 for caption in captions], _TOKENS
    else:
        backbone = "CLIP" if tokenizer.cls_token is None else "BLIP"  # BERT has [CLS]
        how, limits = "", {backbone: _TOKENS[backbone]}
        lengths = [len(tokens) for tokens in tokenizer(captions, verbose=False)["input_ids"]]
    findings = []
    for backbone, limit in limits.items():
        if long := [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]:
            message = f"{len(long)} of {len(captions)} captions exceed the {limit} tokens that {backbone} reads{how}"
            effect = "their ends do not reach the model, as in published evaluations"
            findings.append(Finding("note", "long caption", tree.name, message, effect, _first(map(repr, long), 1)))
    return findings


def _examine_loading(tree: Tree) -> list[Finding]:
    try:
        tree.load()
    except ValueError as error:
        return [Finding("error", "loader", tree.name, str(error), "it cannot be loaded")]
    return []


def _effect(tree: Tree, lost: Iterable[str]) -> str:
    """What the numbers are without some images."""
    lost, rows = set(lost), len(tree.rows)
    hit = sum(not lost.isdisjoint(annotations.named_images(row)) for row in tree.rows)
    if tree.is_training:
        return f"{hit} of {rows} triplets cannot be trained on"
    easier = (
        f"without {len(lost)} of the gallery's {len(tree.images)} images the ranking of the other queries is easier "
        "than published"
    )
    if not hit:
        return easier
    if not any("target_id" in row for row in tree.rows):
        return f"{hit} of {rows} queries cannot be ranked, and a submission without them is not complete; {easier}"
    return (
        f"{hit} of {rows} queries cannot be scored: counted as not found, recall can reach at most "
        f"{100 * (rows - hit) / rows:.2f} %; {easier}"
    )


def _first(examples: Iterable[str], number: int = 3) -> tuple[str, ...]:
    listed = list(examples)
    return (*listed[:number], "...") if len(listed) > number else tuple(listed)


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
    """Examines a data set by name.

    Args:
        subject: `"laion-cir"`, `"cirr"`, `"fashioniq"`, `"circo"` or `"triplets"`.
        path: the data set's folder; of triplets the table.
        split: of laion-cir the subset; by default `"val"` or `"combined"`.
        image_folder: of triplets; by default that of the table.
        tokenizer: folder or Hub name of a model, see [`examine_cirr`].
        check_counts: see [`examine_cirr`].

    Raises:
        ValueError: if there is no such data set or split, or no tokenizer of this name.
    """
    if subject not in (*_EXAMINERS, "triplets"):
        raise ValueError(f"unknown data set {subject!r}; choose from {[*_EXAMINERS, 'triplets']}")
    try:
        counter = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {tokenizer}: {error}") from error
    if subject == "triplets":
        return examine_triplets(path, image_folder or Path(path).parent, counter)
    examiner, splits = _EXAMINERS[subject]
    split = split or ("val" if "val" in splits else "combined")
    if split not in splits:
        raise ValueError(f"unknown split {split!r}: {subject} has {', '.join(splits)}")
    return examiner(path, split, counter, check_counts=check_counts)
