"""Examines annotations and image files: reports what is missing, damaged, misnamed or double, and its effects.

A data set is examined as [`Tree`]s, see `doctor.py`; what is wrong becomes the [`Finding`]s of a [`Report`].
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..digests import content_digest
from .annotations import named_images, paths_in
from .image_files import similar_files, unreadable

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

_TOKENS = {"BLIP": 35, "CLIP": 77}
"""Tokens of a caption that reach the model, special ones included."""


@dataclass(frozen=True)
class Finding:
    """One kind of defect in a data set.

    Args:
        severity: `"error"`: evaluation or training stops, or the numbers do not compare; `"warning"`: the numbers are
            affected; `"note"`: as published, or harmless.
        kind: `"annotations"`, `"counts"`, `"unlisted"`, `"missing"`, `"misnamed"`, `"empty file"`, `"corrupt"`,
            `"duplicate"`, `"blank caption"`, `"long caption"` or `"loader"`.
        where: part of the data set, e.g. `"fashioniq/val/dress"`.
        message: description of the defect.
        effect: its effect on training or metrics.
        examples: the first few cases.
    """

    severity: Severity
    kind: str
    where: str
    message: str
    effect: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Result of an examination; `str(report)` is for reading, `asdict(report)` for JSON.

    Args:
        subject: name of the data set.
        counts: numbers of rows, images and files, by part of the data set.
        findings: findings, in the order of the examination.
    """

    subject: str
    counts: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there are no errors."""
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
    """Rows of one gallery or training set, and the image files that they need.

    Args:
        name: name of the part, e.g. `"cirr/val"`.
        rows: queries or triplets with `reference_id`, `caption` and, where known, `target_id`, `target_ids`,
            `negative_ids`, `subset_ids`.
        images: by image id, the file names it may have, relative to one of the folders; those of references that
            are outside of the gallery, too.
        folders: folders that may hold the images.
        load: function that loads it as evaluation or training would, leaving out missing images.
        expected: published numbers of `"queries"` (or `"triplets"`), `"images"` and what `counted` has.
        is_training: whether rows are training triplets and not queries.
        findings: findings about the annotations themselves.
        counted: numbers of other things, such as `"sessions"`.
        count_findings: findings about numbers that `expected` does not cover; left out with those.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    images: Mapping[str, Sequence[str]]
    folders: Sequence[Path]
    load: Callable[[], Any]
    expected: Mapping[str, int] = field(default_factory=dict)
    is_training: bool = False
    findings: tuple[Finding, ...] = ()
    counted: Mapping[str, int] = field(default_factory=dict)
    count_findings: tuple[Finding, ...] = ()

    @property
    def row_type(self) -> str:
        """Plural noun for the rows."""
        return "triplets" if self.is_training else "queries"


def examine_trees(
    subject: str, read: Callable[[], list[Tree]], tokenizer: PreTrainedTokenizerBase | None, check_counts: bool
) -> Report:
    """Examine a data set.

    Args:
        subject: name of the data set.
        read: function that reads its annotations; its `OSError` or `ValueError` becomes a finding.
        tokenizer: tokenizer that counts the tokens of captions; without it they are estimated.
        check_counts: report numbers of rows and images that are not the published ones.
    """
    try:
        trees = read()
    except (OSError, ValueError) as error:
        finding = Finding("error", "annotations", subject.split()[0], str(error), "nothing can be loaded")
        return Report(subject, {}, (finding,))
    findings: list[Finding] = []
    counts = {}
    for tree in trees:
        paths = max((paths_in(folder, tree.images) for folder in tree.folders), key=len)
        of_files = {"images": len(tree.images), "files": len(paths)}
        counts[tree.name] = {tree.row_type: len(tree.rows), **tree.counted, **of_files}
        findings += tree.findings
        if check_counts:
            findings += [*_examine_counts(tree, counts[tree.name]), *tree.count_findings]
        unlisted = _examine_listing(tree)
        findings += unlisted + _examine_names(tree, paths) + _examine_files(tree, paths)
        findings += _examine_captions(tree, tokenizer)
        if not unlisted and any(all(i in paths for i in named_images(row)) for row in tree.rows):
            findings += _examine_loading(tree)
    return Report(subject, counts, tuple(findings))


def other_count(severity: Severity, where: str, message: str) -> Finding:
    """Return the finding that there are other numbers of rows or images than published."""
    effect = "the annotations are not the published ones, so the numbers do not compare with published ones"
    return Finding(severity, "counts", where, message, effect)


def partly_rewritten(where: str, problem: str | None) -> tuple[Finding, ...]:
    """Return the finding that a file rewrites a part of a split, if there is a problem."""
    effect = "if it is a part of the published file, the numbers do not compare with published ones"
    return () if problem is None else (Finding("warning", "counts", where, problem, effect),)


def _examine_counts(tree: Tree, counts: Mapping[str, int]) -> list[Finding]:
    return [
        other_count("error", tree.name, f"{counts[what]} {what}, published are {expected}")
        for what, expected in tree.expected.items()
        if counts[what] != expected
    ]


def _examine_listing(tree: Tree) -> list[Finding]:
    every = (i for row in tree.rows for i in (*named_images(row), *row.get("negative_ids", ())))
    unlisted = dict.fromkeys(i for i in every if i not in tree.images)
    if not unlisted:
        return []
    message = f"{len(unlisted)} images that rows name are not in the gallery's list"
    return [Finding("error", "unlisted", tree.name, message, _effect(tree, unlisted), first_of(unlisted))]


def _examine_names(tree: Tree, paths: Mapping[str, str]) -> list[Finding]:
    missing = [i for i in tree.images if i not in paths]
    if not missing:
        return []
    similar = similar_files(tree.folders, [tree.images[i][0] for i in missing], set(paths.values()))
    misnamed = {i: similar[tree.images[i][0]] for i in missing if tree.images[i][0] in similar}
    findings = []
    if lost := [i for i in missing if i not in misnamed]:
        message = f"{len(lost)} of {len(tree.images)} images have no file"
        names = first_of(tree.images[i][0] for i in lost)
        findings.append(Finding("error", "missing", tree.name, message, _effect(tree, lost), names))
    if misnamed:
        message = f"{len(misnamed)} images seem to have another name or folder than in the annotations"
        pairs = first_of(
            f"{file}, which differs in {difference}, instead of {tree.images[i][0]}"
            for i, (file, difference) in misnamed.items()
        )
        effect = f"rename them; without: {_effect(tree, misnamed)}"
        findings.append(Finding("error", "misnamed", tree.name, message, effect, pairs))
    return findings


def _examine_files(tree: Tree, paths: Mapping[str, str]) -> list[Finding]:
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        read = list(tqdm(pool.map(_examine_file, paths.values()), f"reading {tree.name}", len(paths), unit="image"))
    of_id = dict(zip(paths, read, strict=True))
    findings = []
    if empty := [i for i, (_, reason) in of_id.items() if reason == "empty"]:
        message, effect = f"{len(empty)} files are empty", f"reading stops there; without: {_effect(tree, empty)}"
        findings.append(Finding("error", "empty file", tree.name, message, effect, first_of(paths[i] for i in empty)))
    if corrupt := {i: reason for i, (_, reason) in of_id.items() if reason not in (None, "empty")}:
        message = f"{len(corrupt)} images cannot be decoded"
        effect = f"reading stops there; without: {_effect(tree, corrupt)}"
        examples = first_of(f"{paths[i]} ({reason})" for i, reason in corrupt.items())
        findings.append(Finding("error", "corrupt", tree.name, message, effect, examples))
    same = defaultdict(list)
    for i, (content, reason) in of_id.items():
        if reason is None:
            same[content].append(i)
    return findings + _examine_duplicates(tree, [ids for ids in same.values() if len(ids) > 1])


def _examine_file(file: str) -> tuple[str, str | None]:
    """Return the digest of a file, and what is wrong with the image, or None."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return "", str(error)
    return content_digest([content]), unreadable(Path(file)) if content else "empty"


def _examine_duplicates(tree: Tree, groups: list[list[str]]) -> list[Finding]:
    if not groups:
        return []
    twins = {i: set(group) - {i} for group in groups for i in group}
    positives = [set(row.get("target_ids", ())) | {row["target_id"]} for row in tree.rows if "target_id" in row]
    touched = sum(any(twins.get(i, set()) - ids for i in ids) for ids in positives)
    effect = f"equal images tie and keep gallery order, by which {touched} of {len(positives)} targets are ranked"
    if tree.is_training:
        effect = f"{touched} of {len(positives)} triplets have a target that is also a negative, under its other id"
    message = f"{len(twins)} images have only {len(groups)} different contents"
    return [Finding("warning", "duplicate", tree.name, message, effect, first_of(" = ".join(g[:3]) for g in groups))]


def _examine_captions(tree: Tree, tokenizer: PreTrainedTokenizerBase | None) -> list[Finding]:
    captions = [row["caption"] for row in tree.rows]
    if tokenizer is None:
        how = " (an estimate from words and punctuation: pass a tokenizer to count)"
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
            findings.append(Finding("note", "long caption", tree.name, message, effect, first_of(map(repr, long), 1)))
    return findings


def _examine_loading(tree: Tree) -> list[Finding]:
    try:
        tree.load()
    except ValueError as error:
        return [Finding("error", "loader", tree.name, str(error), "it cannot be loaded")]
    return []


def _effect(tree: Tree, lost: Iterable[str]) -> str:
    """Return the effect on the numbers if some images are left out."""
    lost, rows = set(lost), len(tree.rows)
    hit = sum(not lost.isdisjoint(named_images(row)) for row in tree.rows)
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
        f"{hit} of {rows} queries cannot be scored: counted as misses, recall can reach at most "
        f"{100 * (rows - hit) / rows:.2f} %; {easier}"
    )


def first_of(examples: Iterable[str], number: int = 3) -> tuple[str, ...]:
    """Return the first examples, and dots if there are more."""
    listed = list(examples)
    return (*listed[:number], "...") if len(listed) > number else tuple(listed)
