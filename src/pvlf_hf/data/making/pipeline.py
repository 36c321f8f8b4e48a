"""Makes training triplets of a table of images and captions: pairs, edits, captions, filters, report.

Every stage is a function of this folder that can be used alone. Here they follow each other, with their results in a
folder beside the output, so that an interrupted run resumes. The same table, seed and settings give the same triplets.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from ...atomic_files import whole
from ...digests import content_digest, id_number, sequence_digest
from ..checks import as_path, check_integer
from .edits import Edit, find_edit, find_swap, write_caption
from .image_signatures import ImageChecks
from .measures import measure
from .near_pairs import SOURCE, near_pairs
from .pairs import CaptionIndex, Pair, find_pairs, index_captions
from .screening import Limits, Row, Screen, TargetIds, allowances, balanced
from .triplet_report import TripletReport, opener, report_on
from .vocabulary import Vocabulary, load_vocabulary

SURPLUS = 4
"""Edits that are looked for in place of one, where a number is requested: of one change, and of two (our choice)."""

ATTEMPTS = 3
"""Wordings that are tried for a pair, where a caption has been used often enough (our choice)."""

DIRECT_SHARE = 0.05
"""Largest share of direct addressing, the target's caption itself: it teaches to ignore the image."""

VERSION = "1"
"""Version of the pipeline; work of another version is done again."""

Judged = Iterator[tuple[Row, str | None]]
"""Rows, each with the reason why it is left out, or None."""


class Miner(Protocol):
    """Level 1: a dual encoder that finds further pairs and verifies rows, see `pvlf_hf.search.mining`."""

    settings: dict[str, Any]

    def pairs(self, index: CaptionIndex, vocabulary: Vocabulary, seed: int) -> Iterator[Pair]:
        """Yield pairs that no key joins."""

    def verify(self, rows: Iterable[Row]) -> Judged:
        """Yield rows with `score_text` and `score_pair`, and the reason where an edit is not true of its target."""

    def modality(self, rows: Iterable[Row]) -> dict[str, dict[str, float]]:
        """Return R@10 by kind of the image alone, the text alone, and both."""


class Writer(Protocol):
    """Level 2: a language model that writes relative captions, see `pvlf_hf.data.making.instruct`."""

    settings: dict[str, Any]

    def write(self, rows: Iterable[Row]) -> Judged:
        """Yield rows with another caption, and the reason where the model wrote none that can be used."""


@dataclass(frozen=True)
class Making:
    """Settings of [`make_triplets`] that decide which triplets are made.

    Args:
        count: number of triplets; None for all that are found.
        language: `"en"`, `"de"`, or the path of a word list.
        seed: decides which pairs and wordings are taken.
        limits: limits of uses, kinds and lengths.
        direct_share: share of direct addressing, at most `DIRECT_SHARE`.
        held_out: folders of benchmark images, copies of which are left out.
        check_images: open the images of every triplet: left out are those that are missing, broken or look the same.
        kept_columns: columns of the table that go into the output, of both images.
        group: column, such as an artist or an album, of which reference and target have the same value.
        near: pair further captions that are alike but for a listed word, see [`near_pairs`]; needs scikit-learn.

    Raises:
        ValueError: if a setting is out of range.
    """

    count: int | None = None
    language: str = "en"
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    direct_share: float = 0.0
    held_out: tuple[str, ...] = ()
    check_images: bool = True
    kept_columns: tuple[str, ...] = ("licence", "license")
    group: str | None = None
    near: bool = False

    def __post_init__(self) -> None:
        check_integer("seed", self.seed)
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count}: request at least one triplet, or None for all that are found")
        if not 0 <= self.direct_share <= DIRECT_SHARE:
            raise ValueError(
                f"direct_share={self.direct_share} must be from 0 to {DIRECT_SHARE}: a caption that describes the "
                "target teaches to ignore the reference"
            )
        if self.held_out and not self.check_images:
            raise ValueError("held_out compares images, which check_images=False does not open: leave one of them out")


def make_triplets(
    table: str | Path,
    image_folder: str | Path,
    output: str | Path,
    settings: Making | None = None,
    miner: Miner | None = None,
    writer: Writer | None = None,
    rejected: str | Path | None = None,
    progress: bool = True,
) -> TripletReport:
    """Make training triplets of images and their captions.

    Args:
        table: CSV, JSON Lines or Parquet with the columns `image` (file name inside `image_folder`) and `caption`. An
            image may have several rows.
        image_folder: the folder of the images.
        output: JSON Lines, which [`load_triplets`] reads; written whole or not at all. The report lies beside it, in
            `{output}.report.md`, `.json` and `.html`, and the work of an interrupted run in `{output}.work`.
        settings: settings of the triplets.
        miner: finds further pairs and verifies all; None for captions alone.
        writer: writes the relative captions anew; None for the wordings of the word list.
        rejected: JSON Lines of the rows that were left out, each with its `reason`.
        progress: show progress bars.

    Returns:
        The report.

    Raises:
        ValueError: if the table cannot be read, or there is not one triplet; the message, and the report, say why and
            what to change.
    """
    table, image_folder = as_path("table", table), as_path("image_folder", image_folder)
    output, settings = as_path("output", output), settings or Making()
    if output.suffix != ".jsonl":
        raise ValueError(f"output is {output.name}: name a file that ends in .jsonl, since a triplet has lists")
    if not table.is_file():
        raise ValueError(f"{table}: no such file; it should list image and caption of each row")
    vocabulary = load_vocabulary(settings.language)
    held_out = map(Path, settings.held_out)
    checks = ImageChecks(image_folder, held_out, progress) if settings.check_images else None
    facts = {"table": table.name, "version": VERSION} | asdict(settings)
    facts |= {name: part.settings for name, part in (("miner", miner), ("writer", writer)) if part is not None}
    work = output.with_name(output.name + ".work")
    _claim(work, table, facts)
    columns: dict[str, Any] = {"kept_columns": settings.kept_columns, "group": settings.group, "progress": progress}
    index = index_captions(table, work / "captions", vocabulary, settings.seed, **columns)
    with closing(index):
        stages = _Stages(work, rejected is not None)
        last, reasons, size = (
            _run(stages, index, vocabulary, settings, checks, miner, writer, progress),
            index.rejected,
            len(index),
        )
    reasons = reasons + stages.reasons
    name = output.with_name(output.name + ".report")
    if rejected is not None:
        _write_rows(as_path("rejected", rejected), stages.rejected())
    if not _write_rows(output, _with_target_ids(last), if_any=True):
        advice = advice_on_nothing(reasons, size)
        report = TripletReport(
            output.name, measure((), vocabulary), rejected=dict(reasons), settings=facts, advice=advice
        )
        report.write(name)
        raise ValueError(f"no triplet could be made of {table}, so {output} was not written.\n{report}")
    modality = miner.modality(read_jsonl(output)) if miner is not None else {}
    report = report_on(output, vocabulary, modality=modality, rejected=dict(reasons), settings=facts)
    report.write(name, opener(image_folder))
    shutil.rmtree(work)
    return report


def _run(
    stages: "_Stages",
    index: CaptionIndex,
    vocabulary: Vocabulary,
    settings: Making,
    checks: ImageChecks | None,
    miner: Miner | None,
    writer: Writer | None,
    progress: bool,
) -> Path:
    """Run the stages; return the rows of the last one."""
    sources: list[tuple[str, Callable[[], Iterator[Pair]]]] = [
        (f"made-{part:05}", partial(find_pairs, index, part)) for part in range(index.parts())
    ]
    if settings.near:
        blocks = range(len(index.starts) - 1)
        sources += [(f"near-{n:05}", partial(near_pairs, index, n, vocabulary, settings.group)) for n in blocks]
    if miner is not None:
        sources.append(("mined", partial(miner.pairs, index, vocabulary, settings.seed)))
    made = []
    for name, pairs in tqdm(sources, "pairing captions", disable=not progress):
        made.append(stages.run(name, partial(make_rows, index, pairs, vocabulary, settings)))
    rows = (row for file in made for row in read_jsonl(file))
    bar = tqdm(rows, "screening", unit="triplet", disable=not progress)
    last = stages.run("screened", partial(screened, bar, settings, vocabulary, checks))
    if miner is not None:
        last = stages.run("verified", partial(miner.verify, read_jsonl(last)))
    last = stages.run("balanced", partial(_balanced, last, settings))
    return last if writer is None else stages.run("written", partial(writer.write, read_jsonl(last)))


def _claim(work: Path, table: Path, facts: dict[str, Any]) -> None:
    """Keep the work of a run of the same table and settings; remove that of another."""
    with table.open("rb") as stream:
        content = content_digest(iter(lambda: stream.read(2**20), b""))
    digest = sequence_digest(content, json.dumps(facts, sort_keys=True))
    marker = work / "settings"
    if work.exists() and (not marker.is_file() or marker.read_text() != digest):
        shutil.rmtree(work)
    with whole(marker) as file:
        file.write_text(digest)


class _Stages:
    """Results of the stages of a run, in files; a stage whose file is there is not run again."""

    def __init__(self, work: Path, keep_rejected: bool) -> None:
        self.work, self.keep_rejected = work, keep_rejected
        self.names: list[str] = []

    def run(self, name: str, produce: Callable[[], Judged]) -> Path:
        """Write the rows that a stage keeps, and why it left out others; return the file of the rows."""
        self.names.append(name)
        kept, facts = self.work / f"{name}.jsonl", self.work / f"{name}.reasons.json"
        if not facts.is_file():
            reasons: Counter[str] = Counter()
            out = self.work / f"{name}.rejected.jsonl"
            with whole(kept) as file, whole(out) as left, file.open("w") as rows, left.open("w") as others:
                for row, reason in produce():
                    if reason is None:
                        rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                        continue
                    reasons[reason] += 1
                    if self.keep_rejected:
                        others.write(json.dumps({"reason": reason, **row}, ensure_ascii=False) + "\n")
            with whole(facts) as file:  # last: it marks the stage as done
                file.write_text(json.dumps(reasons))
        return kept

    @property
    def reasons(self) -> Counter[str]:
        """Rows that the stages left out, by reason."""
        files = (self.work / f"{name}.reasons.json" for name in self.names)
        return sum((Counter(json.loads(file.read_text())) for file in files), Counter())

    def rejected(self) -> Iterator[Row]:
        """Yield the rows that were left out."""
        for name in self.names:
            yield from read_jsonl(self.work / f"{name}.rejected.jsonl")


def read_jsonl(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file that this module wrote."""
    with file.open() as stream:
        yield from map(json.loads, stream)


def _write_rows(file: Path, rows: Iterable[Row], if_any: bool = False) -> int:
    """Write rows as JSON Lines; return their number. With `if_any` no file is written where there are none."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None and if_any:
        return 0
    count = 0
    with whole(file) as partial_file, partial_file.open("w") as stream:
        for row in chain([] if first is None else [first], rows):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def make_rows(
    index: CaptionIndex, pairs: Callable[[], Iterable[Pair]], vocabulary: Vocabulary, settings: Making
) -> Judged:
    """Yield the triplets of pairs: the stages edits and captions.

    Args:
        index: captions of the table.
        pairs: returns the pairs.
        vocabulary: reads captions and words edits.
        settings: with a `count`, no more than `SURPLUS` times as many edits of one change are looked for, and of two.

    Yields:
        Rows with `reference`, `caption`, `target`, `kind`, `source`, `key`, `reference_caption`, `target_caption`,
        `negatives` and the kept columns; images whose uses are exhausted are passed over before an edit is written.
    """
    screen = Screen(settings.limits)
    most = None if settings.count is None else SURPLUS * settings.count
    looked_for: Counter[bool] = Counter()
    read = lru_cache(2**16)(vocabulary.read)
    rows = lru_cache(2**16)(index.__getitem__)
    for pair in pairs():
        has_two = pair.key is not None and pair.key >= 0
        if most is not None and looked_for[has_two] >= most:
            continue
        reference, target = rows(pair.reference), rows(pair.target)
        if settings.group and reference.get(settings.group) != target.get(settings.group):
            continue
        if reference["image"] == target["image"] or screen.used_up(reference["image"], target["image"]):
            continue
        looked_for[has_two] += 1
        find = find_swap if pair.source == SOURCE else find_edit
        edit = find(read(reference["caption"]), read(target["caption"]), vocabulary)
        if edit is None:
            continue
        row: Row = {}
        reason: str | None = None
        for attempt in range(ATTEMPTS):  # another wording, where one is used up
            row = _make_row(pair, reference, target, edit, attempt, vocabulary, settings)
            if (reason := screen.reason(row)) is None:
                break
        if reason is not None:
            yield row, reason
            continue
        row["negatives"] = list(dict.fromkeys([row["reference"], *(rows(one)["image"] for one in pair.negatives)]))
        if row["target"] in row["negatives"]:
            row["negatives"].remove(row["target"])
        yield row, None


def _make_row(
    pair: Pair,
    reference: dict[str, str],
    target: dict[str, str],
    edit: Edit,
    attempt: int,
    vocabulary: Vocabulary,
    settings: Making,
) -> Row:
    """Make the row of a pair; each attempt draws its wording anew."""
    ids = f"{settings.seed}/{reference['image']}/{target['image']}"
    is_direct = id_number(f"{ids}/direct") % 10_000 < 10_000 * settings.direct_share
    key = pair.key if pair.key is not None else id_number(" ".join(edit.target.words))
    row = {
        "reference": reference["image"],
        "caption": target["caption"] if is_direct else write_caption(edit, vocabulary, f"{ids}/{attempt}"),
        "target": target["image"],
        "kind": "direct" if is_direct else edit.kind,
        "source": pair.source,
        "key": f"{key & (2**64 - 1):016x}",
        "reference_caption": reference["caption"],
        "target_caption": target["caption"],
        "target_words": id_number(" ".join(edit.target.words)),
    }
    for side, cells in (("reference", reference), ("target", target)):
        row |= {f"{side}_{name}": cells[name] for name in settings.kept_columns if name in cells}
    return row


def screened(rows: Iterable[Row], settings: Making, vocabulary: Vocabulary, checks: ImageChecks | None) -> Judged:
    """Yield rows and why they are left out: the stage filters. Negatives that cannot be opened are dropped."""
    screen = Screen(settings.limits, checks.problem if checks else None, vocabulary.leaks)
    for row in rows:
        reason = screen.reason(row)
        if reason is None and checks is not None:
            row["negatives"] = [name for name in row["negatives"] if checks.problem_of(name) is None]
        yield row, reason


def _balanced(file: Path, settings: Making) -> Judged:
    found = Counter(row["kind"] for row in read_jsonl(file))
    return balanced(read_jsonl(file), allowances(found, settings.count, settings.limits))


def _with_target_ids(file: Path) -> Iterator[Row]:
    """Yield rows with `target_id`, equal for equal images and for images of equal captions, see [`TargetIds`]."""
    ids = TargetIds()
    for row in read_jsonl(file):
        ids.join(row["target"], row["target_words"])
    for row in read_jsonl(file):
        del row["target_words"]
        head = {name: row.pop(name) for name in ("reference", "caption", "target")}
        yield head | {"target_id": ids.id_of(head["target"])} | row


REMEDIES = {
    "empty caption": "fill the column caption: describe each image in a sentence",
    "caption of more": "shorten the captions to a sentence or two",
    "caption in another script": "choose the captions' language by --language, a word list",
    "no image named": "fill the column image with the names of the files",
    "image not in": "pass by --images the folder that the names in the column image are relative to",
    "image cannot": "replace the images that cannot be read; `pvlf-hf doctor` names them",
    "reference and target look": "the images of each pair look the same: remove copies",
    "copy of": "all images are in the benchmark: train on others",
}
"""Advice by the start of the reason why rows were left out."""


def advice_on_nothing(reasons: Counter[str], rows: int) -> tuple[str, ...]:
    """Return what to change about a table of which no triplet could be made."""
    advice = [f"{rows} rows were read" + (": a triplet needs two images" if rows == 1 else "")]
    for reason, number in reasons.most_common():
        advice += [f"{number}: {reason}: {text}" for start, text in REMEDIES.items() if reason.startswith(start)]
    if rows > 1:
        advice.append(
            "no two images have captions that differ in a phrase or two, as 'a red dress' and 'a blue dress' do, or "
            "the rows above were all that do: describe like images by like sentences, and no two by the same, or let "
            "a dual encoder find pairs (--model)"
        )
    return tuple(advice)


__all__ = ["Judged", "Making", "Miner", "Writer", "make_rows", "make_triplets", "read_jsonl", "screened"]
