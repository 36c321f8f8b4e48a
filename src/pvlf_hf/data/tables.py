"""Reads tables, CSV, JSON Lines and Parquet, cell by cell: nothing is inferred, repaired or left out.

Every cell comes out as text. Numbers keep the spelling that they have in the file, text that looks like a number or a
date stays as it is, and a cell that is neither text nor a number is refused.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .checks import names_alike, surrogate_problem

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""Separators of tables called CSV other than commas."""

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

Columns = dict[str, list[Any]]


def read_table(
    file: Path, required: Sequence[str], optional: Sequence[str] = (), lists: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Read some columns of a table.

    Args:
        file: `.csv` (commas, UTF-8, a header), `.jsonl` or `.json` (an object a line, or a list of them), `.parquet`.
        required: names of columns that it must have.
        optional: names of columns that it may have; all others are ignored.
        lists: optional columns whose cells may be lists, which are returned as JSON.

    Returns:
        The columns, cells as text. Missing cells, such as null in JSON, are empty.

    Raises:
        ValueError: if the file cannot be read, has no rows or lacks a column, or a cell is neither text nor a number;
            names file, row and column, and the remedy.
    """
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise ValueError(f"{file}: cannot read {file.suffix or 'a file without ending'}; use one of {list(_READERS)}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it should list {', '.join(required)} of each row")
    try:
        columns = read(file, required, optional)
        if not next(iter(columns.values())):
            raise ValueError("it has a header but no rows" if file.suffix.lower() == ".csv" else "it has no rows")
        for name in {*lists} & columns.keys():
            columns[name] = [json.dumps(cell) if isinstance(cell, list) else cell for cell in columns[name]]
        return {name: [_as_text(name, row, cell) for row, cell in enumerate(columns[name])] for name in columns}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {_encoding_problem(file, error)}") from error
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {error}") from error


def iterate_table(
    file: Path, required: Sequence[str], optional: Sequence[str] = (), rows_at_once: int = 10_000
) -> Iterator[dict[str, list[str]]]:
    """Read a table block by block, in bounded memory (but `.json`, a list, which is read as a whole).

    Args:
        file: see [`read_table`].
        required: names of columns that it must have.
        optional: names of columns that it may have; missing ones are empty.
        rows_at_once: rows of a block.

    Yields:
        The columns of a block, cells as text.

    Raises:
        ValueError: as [`read_table`]; rows before the faulty one have been read by then.
    """
    stream = _ROW_READERS.get(file.suffix.lower())
    names, first = (*required, *optional), 0
    if stream is None or not file.is_file():
        columns = read_table(file, required, optional)
        count = len(next(iter(columns.values())))
        for start in range(0, count, rows_at_once):
            part = {name: cells[start : start + rows_at_once] for name, cells in columns.items()}
            yield {name: part.get(name) or [""] * len(part[required[0]]) for name in names}
        return
    try:
        rows = stream(file, required, optional)
        while block := list(islice(rows, rows_at_once)):
            yield {name: [_as_text(name, first + at, row.get(name)) for at, row in enumerate(block)] for name in names}
            first += len(block)
        if not first:
            raise ValueError("it has no rows")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {_encoding_problem(file, error)}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {error}") from error


def _csv_records(file: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    rows = _csv_rows(file, required, optional)
    header = next(rows, None)
    if header is None:
        raise ValueError("it is empty")
    for row in rows:
        yield dict(zip(header, row, strict=True))


def _json_records(file: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        row = 0
        for number, line in enumerate(stream, 1):
            if line.strip():
                record = _parse(line, f"line {number}")
                if not isinstance(record, dict):
                    raise ValueError(f"data row {row} (counted from 0) is {record!r:.80}, but it must be an object")
                if row == 0:
                    _check_names(list(record), required, [name for name in optional if name in record])
                yield record
                row += 1


def _parquet_records(file: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    parquet, names = _open_parquet(file, required, optional)
    for batch in parquet.iter_batches(columns=names):
        yield from batch.to_pylist()


def _read_csv(file: Path, required: Sequence[str], optional: Sequence[str]) -> Columns:
    rows = list(_csv_rows(file, required, optional))
    if not rows:
        raise ValueError("it is empty")
    header, *body = rows
    return {name: [row[header.index(name)] for row in body] for name in (*required, *optional) if name in header}


def _csv_rows(file: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[list[str]]:
    """Yield the header and the rows of a CSV, without blank lines."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] = []
        start = 1
        try:
            for row in reader:
                if not _is_blank(row):
                    if not header:
                        _check_header(row, required, optional)
                        header = row
                    elif len(row) != len(header):
                        raise ValueError(_count_problem(start, len(row), len(header)))
                    yield row
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"the row that begins in line {start} cannot be read ({error}). A quote is not closed, or one inside "
                'quotes is not doubled, as in "a ""red"" dress"'
            ) from error


def _is_blank(row: list[str]) -> bool:
    """Return whether a line holds nothing, as opposed to empty cells."""
    return not row or (len(row) == 1 and not row[0].strip())


def _check_header(header: list[str], required: Sequence[str], optional: Sequence[str]) -> None:
    for separator, name in _SEPARATORS.items():
        cells = [cell.strip('" ').casefold() for cell in ",".join(header).split(separator)]
        if set(required) <= set(cells) and not set(required) <= set(header):
            raise ValueError(f"its cells are separated by {name} ({separator!r}), not by commas: save it with commas")
    _check_names(header, required, optional)


def _count_problem(line: int, cells: int, expected: int) -> str:
    remedy = "a caption that contains commas must be quoted" if cells > expected else "a cell is missing"
    return f"the row in line {line} has {cells} cells, but the header has {expected}: {remedy}"


def _read_json(file: Path, required: Sequence[str], optional: Sequence[str]) -> Columns:
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        records = _parse(text, "it")
    else:
        lines = enumerate(text.split("\n"), 1)
        records = [_parse(line, f"line {number}", text) for number, line in lines if line.strip()]
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"data row {row} (counted from 0) is {record!r:.80}, but it must be an object")
    names = list(dict.fromkeys(name for record in records for name in record))
    if not records:
        raise ValueError("it has no rows")
    _check_names(names, required, optional)
    return {name: [record.get(name) for record in records] for name in (*required, *optional) if name in names}


def _parse(text: str, where: str, whole: str = "") -> Any:
    """Parse JSON, leaving numbers as they are spelled."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        try:
            is_one_object = isinstance(json.loads(whole, parse_int=str), dict)
        except ValueError:
            is_one_object = False
        if is_one_object:
            raise ValueError(
                "it holds one object over several lines, but each row must be an object in a line of its own; pandas "
                'writes that with to_json(file, orient="records", lines=True)'
            ) from error
        near = error.doc[max(error.pos - 30, 0) : error.pos + 30]
        raise ValueError(f"{where} is not JSON, or cut off: {error.msg}, near {near!r}") from error
    except ValueError as error:  # of `object_of`
        raise ValueError(f"{where}: {error}") from error


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object; for `object_pairs_hook`, which alone sees keys that are given twice.

    Raises:
        ValueError: if a key is given twice: the parser alone would keep the last.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = [key for key in content if names.count(key) > 1]
        raise ValueError(f"{len(repeated)} keys are given more than once, first: {repeated[:3]}")
    return content


def _read_parquet(file: Path, required: Sequence[str], optional: Sequence[str]) -> Columns:
    parquet, names = _open_parquet(file, required, optional)
    try:
        return parquet.read(names).to_pydict()
    except Exception as error:
        raise ValueError(f"it cannot be read to its end ({error}): write or fetch it again") from error


def _open_parquet(file: Path, required: Sequence[str], optional: Sequence[str]) -> tuple[pq.ParquetFile, list[str]]:
    """Open a Parquet file; return it and the names of the columns to read."""
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ValueError(f"it cannot be read as Parquet ({error}): write or fetch it again") from error
    _check_names(schema.names, required, optional)
    names = [name for name in (*required, *optional) if name in schema.names]
    for name in names:
        column_type = schema.field(name).type
        if pa.types.is_struct(column_type) and {"bytes", "path"} & {field.name for field in column_type}:
            raise ValueError(
                f"column {name!r} holds images, in data row 0 and after, but it must hold file names. A table "
                "with the images inside is a data set: load it from its folder with load_hub_triplets"
            )
    return parquet, names


def _check_names(names: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> None:
    """Raise a `ValueError` if a required name is missing, or a name is repeated or differs in case or blanks only."""
    if repeated := [name for name in (*required, *optional) if list(names).count(name) > 1]:
        raise ValueError(f"column(s) {repeated} are given more than once; it has {list(names)}")
    missing = [name for name in required if name not in names]
    alike = names_alike([name for name in (*required, *optional) if name not in names], names)
    if not missing and not alike:
        return
    if alike:
        pairs = ", ".join(f"{found!r} must be {name!r}" for name, found in alike.items())
        remedy = f"Names are compared letter by letter, with their case and blanks: {pairs}."
    else:
        remedy = "Rename the columns in the file."
    raise ValueError(f"missing column(s) {missing or list(alike)}; it has {list(names)}. {remedy}")


def _as_text(column: str, row: int, cell: object) -> str:
    """Return a cell as text.

    Raises:
        ValueError: if it is neither text nor a number; names column, row and remedy.
    """
    if cell is None:
        return ""
    is_number = isinstance(cell, int | Decimal) or (isinstance(cell, float) and isfinite(cell))
    if isinstance(cell, bool) or not (isinstance(cell, str) or is_number):
        remedy = next(
            (text for cell_type, text in _REMEDIES.items() if isinstance(cell, cell_type)), "convert it to text"
        )
        raise ValueError(
            f"column {column!r}, data row {row} (counted from 0) is {cell!r:.80}, a {type(cell).__name__}, but cells "
            f"must be text or numbers: {remedy}"
        )
    text = str(cell)
    if problem := surrogate_problem(text):
        raise ValueError(f"column {column!r}, data row {row} (counted from 0) {problem}")
    return text


_REMEDIES: dict[type, str] = {
    list: "join its texts into one, or write a row for each",
    dict: "write the text alone",
    bool: "write it as text, in quotes",
    float: "pandas writes missing cells so; fill them, or drop the rows",
    bytes: "decode it to text",
}
"""Remedy for a cell whose type is not text, by that type."""


def _encoding_problem(file: Path, error: UnicodeDecodeError) -> str:
    with file.open("rb") as stream:
        if stream.read(2) in _UTF_16:
            return 'it is UTF-16, but it must be UTF-8: save it as "CSV UTF-8"'
    found = error.object[error.start : error.start + 1]
    return f'it is not UTF-8 text (byte {found!r} at position {error.start}): save it as UTF-8, in Excel "CSV UTF-8"'


_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Columns]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}

_ROW_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Iterator[dict[str, Any]]]] = {
    ".csv": _csv_records,
    ".jsonl": _json_records,
    ".parquet": _parquet_records,
}
"""Readers of one row at a time, by the ending of the file."""


__all__ = ["iterate_table", "object_of", "read_table"]
