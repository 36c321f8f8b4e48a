"""Writes, checks and scores submission files for the servers of CIRR and CIRCO, which keep the test labels.

    pvlf-hf submit lint cirr_test1_recall.json circo_test.json

A file is a JSON object that maps each query to a ranked list of image ids. CIRR (<https://cirr.cecs.anu.edu.au>) takes
two files, `"metric": "recall"` (50 names per query) and `"recall_subset"` (3 names from the query's subset). CIRCO
(<https://circo.micc.unifi.it>) takes one (50 numbers per query).
"""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic_files import whole
from ..data.benchmark import CIRBenchmark, excluded_rows, query_ids
from ..data.circo import EXPECTED_COUNTS as CIRCO_COUNTS
from ..data.cirr import EXPECTED_COUNTS as CIRR_COUNTS
from ..embeddings.combined import CombinedQueries, top_k_of
from .metrics import CircoMetrics, metrics_named
from .ranking import ranks_from_lists
from .results import Evaluation

LENGTHS = {"recall": 50, "recall_subset": 3, "circo": 50}
"""Ids in each list, by type of file."""

MAX_BYTES = 5 * 10**6
"""Size in bytes beyond which CIRR's server refuses a file."""


def cirr_submission(
    benchmark: CIRBenchmark, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two files for CIRR's server: the first 50 of the ranking, and the first 3 of the subset.

    Args:
        benchmark: usually `load_cirr(root, "test1")`; needs `query_id` and `subset_ids`.
        query_embeds: `(queries, d)`, from [`~pvlf_hf.embeddings.encoding.embed`].
        gallery_embeds: `(gallery, d)`.

    Returns:
        The contents of the `recall` and of the `recall_subset` file.

    Raises:
        ValueError: if the benchmark is not CIRR's or lacks a column, or embeddings do not fit it.
    """
    _check(benchmark, "cirr", "subset_ids")
    ranked = _ranked(benchmark, query_embeds, gallery_embeds, len(benchmark.gallery))
    subsets = map(set, benchmark.queries["subset_ids"])
    in_subset = [[i for i in ids if i in subset] for ids, subset in zip(ranked, subsets, strict=True)]
    files = []
    for metric, lists in (("recall", ranked), ("recall_subset", in_subset)):
        answers = {q: ids[: LENGTHS[metric]] for q, ids in zip(query_ids(benchmark), lists, strict=True)}
        files.append({"version": "rc2", "metric": metric, **answers})
    return files[0], files[1]


def circo_submission(
    benchmark: CIRBenchmark, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor
) -> dict[str, Any]:
    """Return the content of the file for CIRCO's server: the first 50 of the ranking, as numbers.

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
    folder: str | Path, benchmark: CIRBenchmark, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor
) -> tuple[Path, Path]:
    """Write `cirr_test1_recall.json` and `cirr_test1_recall_subset.json`, see [`cirr_submission`]."""
    recall, subset = cirr_submission(benchmark, query_embeds, gallery_embeds)
    name = benchmark.name.replace("/", "_")
    return _write(Path(folder, f"{name}_recall.json"), recall), _write(
        Path(folder, f"{name}_recall_subset.json"), subset
    )


def write_circo_submission(
    folder: str | Path, benchmark: CIRBenchmark, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor
) -> Path:
    """Write `circo_test.json`, see [`circo_submission`]."""
    answers = circo_submission(benchmark, query_embeds, gallery_embeds)
    return _write(Path(folder, f"{benchmark.name.replace('/', '_')}.json"), answers)


def write_submissions(
    folder: str | Path, benchmark: CIRBenchmark, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor
) -> tuple[Path, ...]:
    """Write the files for the server of a benchmark's metrics and return their paths, none if it has no server.

    Arguments are those of [`cirr_submission`].
    """
    server = metrics_named(benchmark.protocol.metrics).server
    if server == "cirr":
        return write_cirr_submission(folder, benchmark, query_embeds, gallery_embeds)
    if server == "circo":
        return (write_circo_submission(folder, benchmark, query_embeds, gallery_embeds),)
    return ()


def score_submission(file: str | Path, benchmark: CIRBenchmark) -> dict[str, float]:
    """Compute the metrics of a submission file for a benchmark with known labels.

    Args:
        file: written by this package or any other.
        benchmark: with targets, such as `load_cirr(root, "val")`.

    Returns:
        Fractions by metric: `recall@k` or `recall_subset@k` for CIRR's files, `map@k` and `recall@k` for CIRCO's.

    Raises:
        ValueError: if the benchmark has no targets, or the file has problems, see [`lint_submission`].
    """
    return metrics_named(benchmark.protocol.metrics).means(_ranks_of_submission(file, benchmark))


def evaluate_submissions(files: Sequence[str | Path], benchmark: CIRBenchmark) -> Evaluation:
    """Score submission files of one method, of this package or any other, as an evaluation to compare.

    Args:
        files: one, or CIRR's two: `recall` and `recall_subset`.
        benchmark: with targets, such as `load_cirr(root, "val")`.

    Raises:
        ValueError: as [`score_submission`], and if two files are of one type.
    """
    columns: dict[str, tuple[Any, ...]] = {}
    for file in files:
        ranks = _ranks_of_submission(file, benchmark)
        if both := columns.keys() & ranks.keys():
            raise ValueError(f"{file} holds what another file of this method does ({sorted(both)}): pass one of them")
        columns |= ranks
    return Evaluation(
        benchmark=benchmark.name,
        method="composed",
        metrics=metrics_named(benchmark.protocol.metrics).means(columns),
        counts={"queries": len(benchmark.queries), "gallery": len(benchmark.gallery)},
        protocol=asdict(benchmark.protocol),
        dtype="not recorded",
        per_query={"query_id": tuple(query_ids(benchmark)), **columns},
    )


def _ranks_of_submission(file: str | Path, benchmark: CIRBenchmark) -> dict[str, tuple[Any, ...]]:
    """Return the per-query columns of a file, as the benchmark's metrics take them."""
    if not benchmark.has_targets:
        raise ValueError(f"{benchmark.name} has no targets; upload the file to the server to have it scored")
    if problems := list(filter(is_error, lint_submission(file, benchmark))):
        raise ValueError(f"{file} cannot be scored: " + "; ".join(problems))
    content = json.loads(Path(file).read_bytes())
    lists = [list(map(str, content[q])) for q in query_ids(benchmark)]
    targets = tuple(ranks_from_lists(lists, [[i] for i in benchmark.queries["target_id"]])[:, 0].tolist())
    file_type = _file_type(content, benchmark)
    if file_type == "circo":
        precisions = CircoMetrics.precisions(ranks_from_lists(lists, list(benchmark.queries["target_ids"])))
        return {"rank": targets, **precisions}
    return {"rank" if file_type == "recall" else "subset_rank": targets}


def lint_submission(file: str | Path, benchmark: CIRBenchmark | None = None) -> list[str]:
    """List what a server would refuse or score wrongly, each problem with its first query and the fix.

    Args:
        file: written by this package or any other.
        benchmark: the benchmark that the file is for; without it, a test split is assumed and ids are not looked up.

    Returns:
        Problems, an empty list if there are none. Those that begin with `"warning: "` occur in published files and
        may be accepted.
    """
    try:
        raw = Path(file).read_bytes()
        content = json.loads(raw, object_pairs_hook=_Pairs)
    except OSError as error:
        return [f"cannot be opened: {error}"]
    except (ValueError, RecursionError) as error:
        return [f"is not valid JSON ({error}): write it again, it may be truncated"]
    if not isinstance(content, _Pairs):
        return [f"is {_show(content)}, not an object of ranked lists by query: write {{query: [ids]}}"]
    problems = [] if len(raw) <= MAX_BYTES else [f"has {len(raw):,} bytes, more than {MAX_BYTES:,}: write no indent"]
    if repeated := [key for key, count in Counter(key for key, _ in content).items() if count > 1]:
        problems.append(f"has {len(repeated)} keys twice, first {_show(repeated[0])}: only the last counts, keep one")
    answers = dict(content)
    file_type = _file_type(answers, benchmark)
    lists = {key: value for key, value in answers.items() if file_type == "circo" or key not in ("version", "metric")}
    if file_type != "circo":
        problems += _head_problems(answers)
    problems += _query_problems(lists, file_type, benchmark)
    occurrences: dict[str, list[str]] = {}
    for query, problem, example in _list_problems(lists, file_type, benchmark):
        occurrences.setdefault(problem, []).append(f"in query {_show(query)}: {_show(example)}")
    return problems + [f"{problem} ({len(where)} times, first {where[0]})" for problem, where in occurrences.items()]


class _Pairs(list):
    """Key-value pairs of a JSON object, in which repeated keys can be detected."""


def _file_type(answers: dict[str, Any], benchmark: CIRBenchmark | None) -> str:
    """Return the type of file, a key of `LENGTHS`, from the benchmark or else from the content."""
    if benchmark is not None:
        is_circo = metrics_named(benchmark.protocol.metrics).server == "circo"
    else:
        firsts = [value[0] for value in answers.values() if isinstance(value, list) and value]
        has_names = any(isinstance(first, str) and "-img" in first for first in firsts)
        is_circo = not has_names and not {"version", "metric"} & answers.keys()
    if is_circo:
        return "circo"
    return "recall_subset" if answers.get("metric") == "recall_subset" else "recall"


def _head_problems(answers: dict[str, Any]) -> Iterator[str]:
    if answers.get("version") != "rc2":
        yield f"'version' is {_show(answers.get('version'))}: write \"rc2\""
    if answers.get("metric") not in ("recall", "recall_subset"):
        yield f'\'metric\' is {_show(answers.get("metric"))}: write "recall" or "recall_subset"'


def _query_problems(lists: dict[str, Any], file_type: str, benchmark: CIRBenchmark | None) -> Iterator[str]:
    if benchmark is not None:
        known = set(query_ids(benchmark))
        expected = len(known)
    elif file_type == "circo":
        expected = CIRCO_COUNTS["test"]
        known = {str(number) for number in range(expected)}
    else:
        expected, _ = CIRR_COUNTS["test1"]
        known = {key for key in lists if re.fullmatch("[0-9]+", key)}  # only the annotations say which numbers
    if unknown := sorted(lists.keys() - known):
        yield f"{len(unknown)} keys are not queries, first {_show(unknown[0])}: use the annotations' pairid or id"
    if (answered := len(lists) - len(unknown)) != expected:
        missing = sorted(known - lists.keys())
        first = f", first missing {_show(missing[0])}" if missing else ""
        yield f"answers {answered} of {expected} queries{first}: answer each query of the split once"


def _list_problems(
    lists: dict[str, Any], file_type: str, benchmark: CIRBenchmark | None
) -> Iterator[tuple[str, str, Any]]:
    """Yield query, problem and example for every problem of a ranked list."""
    length, rows, gallery = LENGTHS[file_type], {}, set()
    if benchmark is not None:
        gallery = set(benchmark.gallery["image_id"])
        columns = {"reference_id", "subset_ids"} & set(benchmark.queries.column_names)
        rows = dict(zip(query_ids(benchmark), benchmark.queries.select_columns(sorted(columns)), strict=True))
        removed = benchmark.protocol.reference == "removed"
        length = min(length, len(gallery) - removed)
    for query, ids in lists.items():
        if not isinstance(ids, list) or isinstance(ids, _Pairs):
            yield query, "an answer is not a list: write the ranked ids in [ ]", ids
            continue
        if bad := [i for i in ids if not _is_id(i, file_type)]:
            expected = "numbers" if file_type == "circo" else "names in quotation marks"
            yield query, f"ids must be {expected}", bad[0]
            continue
        if len(ids) != length:
            yield query, f"lists must hold {length} ids", f"{len(ids)} ids"
        if repeated := [i for i, count in Counter(ids).items() if count > 1]:
            yield query, "a list repeats an id: list it once, and one more image", repeated[0]
        check = _circo_id_problems if file_type == "circo" else _cirr_id_problems
        yield from ((query, problem, example) for problem, example in check(ids, benchmark is None))
        if query in rows:
            yield from (
                (query, problem, example)
                for problem, example in _query_id_problems(
                    list(map(str, ids)), file_type, rows[query], gallery, removed
                )
            )


def _is_id(value: Any, file_type: str) -> bool:
    if file_type != "circo":
        return isinstance(value, str)
    return type(value) is int or (isinstance(value, str) and bool(re.fullmatch("[0-9]+", value)))


def _circo_id_problems(ids: list[Any], is_test: bool) -> Iterator[tuple[str, Any]]:
    if strings := [i for i in ids if isinstance(i, str)]:
        yield "warning: ids are strings; published files have strings or numbers, numbers are safer", strings[0]
    if padded := [i for i in strings if i != "0" and i.startswith("0")]:
        yield "ids are padded with zeros as in file names: write the number", padded[0]


def _cirr_id_problems(ids: list[str], is_test: bool) -> Iterator[tuple[str, Any]]:
    if files := [i for i in ids if i.endswith((".png", ".jpg"))]:
        yield 'names have a file extension: write them without ".png"', files[0]
    if is_test and (others := [i for i in ids if not i.startswith("test1-")]):
        yield "names are not of the test1 split: rank its gallery", others[0]


def _query_id_problems(
    ids: list[str], file_type: str, row: dict[str, Any], gallery: set[str], removed: bool
) -> Iterator[tuple[str, Any]]:
    """Yield problem and example for ids that this query must not be answered with."""
    if unknown := [i for i in ids if i not in gallery]:
        yield "ids are not in the gallery: use the ids of the split file", unknown[0]
    if removed and row["reference_id"] in ids:
        yield "the reference is among the answers: take it out before ranking", row["reference_id"]
    if file_type == "recall_subset" and (outside := [i for i in ids if i not in row["subset_ids"]]):
        yield "ids are not in the query's subset: rank img_set.members alone", outside[0]


def _show(value: Any) -> str:
    """Abbreviate a JSON value for a message."""
    return reprlib.repr(value)


def is_error(problem: str) -> bool:
    """Return whether a problem makes the server refuse a file or score it wrongly; warnings do not."""
    return not problem.startswith("warning: ")


def _check(benchmark: CIRBenchmark, server: str, column: str) -> None:
    if metrics_named(benchmark.protocol.metrics).server != server or column not in benchmark.queries.column_names:
        raise ValueError(f"{benchmark.name} is not a benchmark for the {server} server, which needs {column}")


def _ranked(
    benchmark: CIRBenchmark, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, length: int
) -> list[list[str]]:
    """Return the first `length` gallery ids of each query's ranking, the same that the metrics are computed from."""
    exclude, names = excluded_rows(benchmark), list(benchmark.gallery["image_id"])
    if len(gallery_embeds) != len(names) or len(query_embeds) != len(benchmark.queries):
        raise ValueError(
            f"{len(query_embeds)} query and {len(gallery_embeds)} gallery embeddings for "
            f"{len(benchmark.queries)} queries and {len(names)} gallery images of {benchmark.name}"
        )
    k = min(length, len(names) - (exclude is not None))
    return [[names[row] for row in rows] for rows in top_k_of(query_embeds, gallery_embeds, k, exclude)[1].tolist()]


def _write(file: Path, content: dict[str, Any]) -> Path:
    with whole(file) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
    return file
