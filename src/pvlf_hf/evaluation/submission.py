"""Files for the servers of CIRR and CIRCO, which keep the labels of their test splits; and a check of such files.

    pvlf-hf submit lint cirr_test1_recall.json circo_test.json

A file is a JSON object of ranked lists of image ids by query. CIRR takes two, `"metric": "recall"` (50 names) and
`"recall_subset"` (3 of the query's group), <https://cirr.cecs.anu.edu.au>; CIRCO takes one (50 numbers),
<https://circo.micc.unifi.it>.
"""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic_files import whole
from ..data.benchmark import CIRBenchmark, excluded_rows, query_ids
from ..data.circo import EXPECTED_COUNTS as CIRCO_COUNTS
from ..data.cirr import EXPECTED_COUNTS as CIRR_COUNTS
from ..embeddings.similarity import top_k
from .metrics import METRICS, CircoMetrics, metrics_named
from .ranking import ranks_from_lists

LENGTHS = {"recall": 50, "recall_subset": 3, "circo": 50}
"""Answers to a query in each kind of file."""

MAX_BYTES = 5 * 10**6
"""CIRR's server refuses more."""


def cirr_submission(
    benchmark: CIRBenchmark, query_embeds: Tensor, gallery_embeds: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the files for CIRR's server hold: the first 50 of the ranking, and the first 3 of the group in it.

    Args:
        benchmark: usually `load_cirr(root, "test1")`; needs `query_id` and `subset_ids`.
        query_embeds: `(queries, d)`, from [`~pvlf_hf.embeddings.encoding.embed`].
        gallery_embeds: `(gallery, d)`.

    Raises:
        ValueError: if the benchmark lacks a column, or embeddings do not fit it.
    """
    _check(benchmark, "cirr", "subset_ids")
    ranked = _ranked(benchmark, query_embeds, gallery_embeds, len(benchmark.gallery))
    groups = map(set, benchmark.queries["subset_ids"])
    in_group = [[i for i in ids if i in group] for ids, group in zip(ranked, groups, strict=True)]
    files = []
    for metric, lists in (("recall", ranked), ("recall_subset", in_group)):
        answers = {q: ids[: LENGTHS[metric]] for q, ids in zip(query_ids(benchmark), lists, strict=True)}
        files.append({"version": "rc2", "metric": metric, **answers})
    return files[0], files[1]


def circo_submission(benchmark: CIRBenchmark, query_embeds: Tensor, gallery_embeds: Tensor) -> dict[str, Any]:
    """What the file for CIRCO's server holds: the first 50 of the ranking, as numbers.

    Args:
        benchmark: usually `load_circo(root, "test")`; needs `query_id`.
        query_embeds: `(queries, d)`, from [`~pvlf_hf.embeddings.encoding.embed`].
        gallery_embeds: `(gallery, d)`.

    Raises:
        ValueError: if the benchmark is not CIRCO's, or embeddings do not fit it.
    """
    _check(benchmark, "circo", "query_id")
    ranked = _ranked(benchmark, query_embeds, gallery_embeds, LENGTHS["circo"])
    return {q: list(map(int, ids)) for q, ids in zip(query_ids(benchmark), ranked, strict=True)}


def write_cirr_submission(
    folder: str | Path, benchmark: CIRBenchmark, query_embeds: Tensor, gallery_embeds: Tensor
) -> tuple[Path, Path]:
    """Writes `cirr_test1_recall.json` and `cirr_test1_recall_subset.json`; arguments as [`cirr_submission`]."""
    recall, subset = cirr_submission(benchmark, query_embeds, gallery_embeds)
    name = benchmark.name.replace("/", "_")
    return _write(Path(folder, f"{name}_recall.json"), recall), _write(
        Path(folder, f"{name}_recall_subset.json"), subset
    )


def write_circo_submission(
    folder: str | Path, benchmark: CIRBenchmark, query_embeds: Tensor, gallery_embeds: Tensor
) -> Path:
    """Writes `circo_test.json`; arguments as [`circo_submission`]."""
    answers = circo_submission(benchmark, query_embeds, gallery_embeds)
    return _write(Path(folder, f"{benchmark.name.replace('/', '_')}.json"), answers)


def write_submissions(
    folder: str | Path, benchmark: CIRBenchmark, query_embeds: Tensor, gallery_embeds: Tensor
) -> tuple[Path, ...]:
    """Writes the files for a benchmark's evaluation server and returns their paths; none if there is no server.

    Arguments are those of [`write_cirr_submission`].
    """
    server = metrics_named(benchmark.protocol.metrics).server
    if server == "cirr":
        return write_cirr_submission(folder, benchmark, query_embeds, gallery_embeds)
    if server == "circo":
        return (write_circo_submission(folder, benchmark, query_embeds, gallery_embeds),)
    return ()


def score_submission(file: str | Path, benchmark: CIRBenchmark) -> dict[str, float]:
    """Metrics of a file's ranked lists, where the labels are known.

    Args:
        file: ours or another's.
        benchmark: with targets, such as `load_cirr(root, "val")`.

    Returns:
        Fractions: `recall@k`; `recall_subset@k`; or CIRCO's `map@k` and `recall@k`; by what the file holds.

    Raises:
        ValueError: if the benchmark has no targets, or the file has problems, see [`lint_submission`].
    """
    if not benchmark.has_targets:
        raise ValueError(f"{benchmark.name} has no targets; upload the file to the server to have it scored")
    if problems := list(filter(is_error, lint_submission(file, benchmark))):
        raise ValueError(f"{file} cannot be scored: " + "; ".join(problems))
    content = json.loads(Path(file).read_bytes())
    lists = [list(map(str, content[q])) for q in query_ids(benchmark)]
    targets = ranks_from_lists(lists, [[i] for i in benchmark.queries["target_id"]])[:, 0]
    kind = _kind(content, benchmark)
    if kind == "circo":
        precisions = CircoMetrics.precisions(ranks_from_lists(lists, list(benchmark.queries["target_ids"])))
        return METRICS["circo"].means({"rank": targets.tolist(), **precisions})
    return METRICS["cirr"].means({"rank" if kind == "recall" else "subset_rank": targets.tolist()})


def lint_submission(file: str | Path, benchmark: CIRBenchmark | None = None) -> list[str]:
    """What a server would refuse or score wrongly, each with the first query it is in and the fix.

    Args:
        file: ours or another's.
        benchmark: what it answers; without it, the test splits are assumed and ids are not looked up.

    Returns:
        Problems; those that begin with `"warning: "` occur in published files and may be accepted. None: fine.
    """
    try:
        raw = Path(file).read_bytes()
        content = json.loads(raw, object_pairs_hook=_Pairs)
    except OSError as error:
        return [f"cannot be opened: {error}"]
    except (ValueError, RecursionError) as error:
        return [f"is not JSON that can be read ({error}): write it again, it may be cut off"]
    if not isinstance(content, _Pairs):
        return [f"is {_show(content)}, not an object of ranked lists by query: write {{query: [ids]}}"]
    problems = [] if len(raw) <= MAX_BYTES else [f"has {len(raw):,} bytes, more than {MAX_BYTES:,}: write no indent"]
    if repeated := [key for key, count in Counter(key for key, _ in content).items() if count > 1]:
        problems.append(f"has {len(repeated)} keys twice, first {_show(repeated[0])}: only the last counts, keep one")
    answers = dict(content)
    kind = _kind(answers, benchmark)
    lists = {key: value for key, value in answers.items() if kind == "circo" or key not in ("version", "metric")}
    if kind != "circo":
        problems += _head_problems(answers)
    problems += _query_problems(lists, kind, benchmark)
    found: dict[str, list[str]] = {}
    for query, problem, shown in _answer_problems(lists, kind, benchmark):
        found.setdefault(problem, []).append(f"in query {_show(query)}: {_show(shown)}")
    return problems + [f"{problem} ({len(places)} times, first {places[0]})" for problem, places in found.items()]


class _Pairs(list):
    """A JSON object with the keys that occur twice, which a dictionary would swallow."""


def _kind(answers: dict[str, Any], benchmark: CIRBenchmark | None) -> str:
    """Which of `LENGTHS` a file is meant to be."""
    if benchmark is not None:
        is_circo = metrics_named(benchmark.protocol.metrics).server == "circo"
    else:
        firsts = [value[0] for value in answers.values() if isinstance(value, list) and value]
        named = any(isinstance(first, str) and "-img" in first for first in firsts)
        is_circo = not named and not {"version", "metric"} & answers.keys()
    if is_circo:
        return "circo"
    return "recall_subset" if answers.get("metric") == "recall_subset" else "recall"


def _head_problems(answers: dict[str, Any]) -> Iterator[str]:
    if answers.get("version") != "rc2":
        yield f"'version' is {_show(answers.get('version'))}: write \"rc2\""
    if answers.get("metric") not in ("recall", "recall_subset"):
        yield f'\'metric\' is {_show(answers.get("metric"))}: write "recall" or "recall_subset"'


def _query_problems(lists: dict[str, Any], kind: str, benchmark: CIRBenchmark | None) -> Iterator[str]:
    if benchmark is not None:
        known = set(query_ids(benchmark))
        expected = len(known)
    elif kind == "circo":
        expected = CIRCO_COUNTS["test"]
        known = {str(number) for number in range(expected)}
    else:
        expected, _ = CIRR_COUNTS["test1"]
        known = {key for key in lists if re.fullmatch("[0-9]+", key)}  # which numbers, only the annotations tell
    if unknown := sorted(lists.keys() - known):
        yield f"{len(unknown)} keys are no queries, first {_show(unknown[0])}: use the annotations' pairid or id"
    if (answered := len(lists) - len(unknown)) != expected:
        lacks = sorted(known - lists.keys())
        first = f", first missing {_show(lacks[0])}" if lacks else ""
        yield f"answers {answered} of {expected} queries{first}: answer each query of the split once"


def _answer_problems(
    lists: dict[str, Any], kind: str, benchmark: CIRBenchmark | None
) -> Iterator[tuple[str, str, Any]]:
    """Query, problem, and what is shown of it."""
    length, rows, gallery = LENGTHS[kind], {}, set()
    if benchmark is not None:
        gallery = set(benchmark.gallery["image_id"])
        columns = {"reference_id", "subset_ids"} & set(benchmark.queries.column_names)
        rows = dict(zip(query_ids(benchmark), benchmark.queries.select_columns(sorted(columns)), strict=True))
        removed = benchmark.protocol.reference == "removed"
        length = min(length, len(gallery) - removed)
    for query, answers in lists.items():
        if not isinstance(answers, list) or isinstance(answers, _Pairs):
            yield query, "an answer is not a list: write the ranked ids in [ ]", answers
            continue
        if bad := [i for i in answers if not _is_id(i, kind)]:
            what = "numbers" if kind == "circo" else "names in quotation marks"
            yield query, f"ids must be {what}", bad[0]
            continue
        if len(answers) != length:
            yield query, f"lists must hold {length} ids", f"{len(answers)} ids"
        if repeated := [i for i, count in Counter(answers).items() if count > 1]:
            yield query, "a list repeats an id: list it once, and one more image", repeated[0]
        check = _circo_id_problems if kind == "circo" else _cirr_id_problems
        yield from ((query, problem, shown) for problem, shown in check(answers, benchmark is None))
        if query in rows:
            yield from (
                (query, problem, shown)
                for problem, shown in _place_problems(list(map(str, answers)), kind, rows[query], gallery, removed)
            )


def _is_id(value: Any, kind: str) -> bool:
    if kind != "circo":
        return isinstance(value, str)
    return type(value) is int or (isinstance(value, str) and bool(re.fullmatch("[0-9]+", value)))


def _circo_id_problems(ids: list[Any], is_test: bool) -> Iterator[tuple[str, Any]]:
    if strings := [i for i in ids if isinstance(i, str)]:
        yield "warning: ids are strings, published files have both: better write whole numbers", strings[0]
    if filled := [i for i in strings if i != "0" and i.startswith("0")]:
        yield "ids are filled with zeros as in file names: write the number", filled[0]


def _cirr_id_problems(ids: list[str], is_test: bool) -> Iterator[tuple[str, Any]]:
    if endings := [i for i in ids if i.endswith((".png", ".jpg"))]:
        yield 'names have an ending: write them without ".png"', endings[0]
    if is_test and (others := [i for i in ids if not i.startswith("test1-")]):
        yield "names are not of the test1 split: rank its gallery", others[0]


def _place_problems(
    ids: list[str], kind: str, row: dict[str, Any], gallery: set[str], removed: bool
) -> Iterator[tuple[str, Any]]:
    """Ids that are not what they should be for this query."""
    if strangers := [i for i in ids if i not in gallery]:
        yield "ids are not in the gallery: use the ids of the split file", strangers[0]
    if removed and row["reference_id"] in ids:
        yield "the reference is among the answers: take it out before ranking", row["reference_id"]
    if kind == "recall_subset" and (outside := [i for i in ids if i not in row["subset_ids"]]):
        yield "ids are not of the query's group: rank img_set.members alone", outside[0]


def _show(value: Any) -> str:
    """A short form of whatever JSON holds."""
    return reprlib.repr(value)


def is_error(problem: str) -> bool:
    """Whether a server would refuse the file, or the numbers would be wrong."""
    return not problem.startswith("warning: ")


def _check(benchmark: CIRBenchmark, server: str, column: str) -> None:
    if metrics_named(benchmark.protocol.metrics).server != server or column not in benchmark.queries.column_names:
        raise ValueError(f"{benchmark.name} is not a benchmark for the {server} server, which needs {column}")


def _ranked(benchmark: CIRBenchmark, query_embeds: Tensor, gallery_embeds: Tensor, most: int) -> list[list[str]]:
    """Gallery ids of each query, best first: the ranking that the metrics see."""
    exclude, names = excluded_rows(benchmark), list(benchmark.gallery["image_id"])
    if len(gallery_embeds) != len(names) or len(query_embeds) != len(benchmark.queries):
        raise ValueError(
            f"{len(query_embeds)} query and {len(gallery_embeds)} gallery embeddings for "
            f"{len(benchmark.queries)} queries and {len(names)} gallery images of {benchmark.name}"
        )
    k = min(most, len(names) - (exclude is not None))
    return [[names[row] for row in rows] for rows in top_k(query_embeds, gallery_embeds, k, exclude)[1].tolist()]


def _write(file: Path, content: dict[str, Any]) -> Path:
    with whole(file) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
    return file
