"""Filters of a search: which rows of the metadata pass, as text such as `price < 50 and brand in ("Acme", "Zen")`.

A filter is an expression of column names, comparisons (`==`, `!=`, `<`, `<=`, `>`, `>=`, chained for a range as in
`10 <= price < 50`), `in` and `not in` with a list, `is null` and `is not null`, `and`, `or`, `not`, parentheses,
numbers, quoted texts, `true`, `false`. A date is a text: `exif_date >= "2024-06-01"`. A column whose name is no word
is written `col("unit price")`. As in SQL, a comparison with a missing value does not pass.

It is read as a Python expression, of which only the above is taken, and carried out by pyarrow.
"""

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Filter: TypeAlias = str | Any
"""A filter as text, or an expression of `pyarrow.compute`."""

COMPARISONS: dict[type, Any] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}

CONSTANTS = {"null": None, "true": True, "false": False}

EXAMPLE = 'price < 50 and brand in ("Acme", "Zen") and sold is null'

MOST_CHARACTERS = 10_000
"""Longest text of a filter (our choice)."""


def passing_rows(condition: Filter, metadata: pa.Table | None) -> np.ndarray:
    """Return the rows that a filter lets pass, int64, ascending.

    Args:
        condition: the filter.
        metadata: one row an image; None where the gallery has no metadata.

    Raises:
        ValueError: if there is no metadata or no such column, the filter cannot be read, or it compares values of
            types that cannot be compared.
    """
    if metadata is None:
        raise ValueError(
            f"filter {condition!r:.200}: this gallery has no metadata; index it with a table of it: "
            "`pvlf-hf index PHOTOS --path INDEX --metadata table.csv`, or Gallery.from_folder(..., metadata=...)"
        )
    import pyarrow.dataset as ds  # brings pandas, which a search without a filter does not wait for

    with applied(condition, metadata.schema) as expression:
        passes = ds.dataset(metadata).to_table(columns={"passes": expression})["passes"].combine_chunks()
        return np.flatnonzero(pc.fill_null(passes, False).to_numpy(zero_copy_only=False))


@contextmanager
def applied(condition: Filter, schema: pa.Schema) -> Iterator[pc.Expression]:
    """Yield the expression of a filter, to be applied to a table within the block.

    Raises:
        ValueError: if the filter cannot be read or applied, as [`passing_rows`].
    """
    expression = parse_filter(condition, schema) if isinstance(condition, str) else condition
    if not isinstance(expression, pc.Expression):
        raise ValueError(
            f"filter={condition!r:.200}: pass a text such as {EXAMPLE!r}, or a pyarrow.compute.Expression"
        )
    try:
        yield expression
    except (pa.ArrowException, TypeError) as error:
        missing = "No match for FieldRef" in str(error)
        reason = _columns(schema) if missing else f"its columns are {_types(schema)}"
        raise ValueError(
            f"filter {condition!s:.200} cannot be applied ({str(error).splitlines()[0]}): {reason}"
        ) from error


def parse_filter(
    text: str, schema: pa.Schema, reader: "Callable[[str, pa.Schema], FilterReader] | None" = None
) -> Any:
    """Turn the text of a filter into an expression.

    Args:
        text: the filter.
        schema: of the metadata.
        reader: makes the expression; by default one of pyarrow.

    Raises:
        ValueError: if it cannot be read, or names a column that is not in the schema.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the filter has {len(text):,} characters, more than {MOST_CHARACTERS:,}: make it shorter")
    reader = reader or FilterReader
    sql = re.sub(r"\bis\s+not\s+null\b", "is not None", text.strip(), flags=re.I)
    sql = re.sub(r"\bis\s+null\b", "is None", sql, flags=re.I)
    try:
        tree = ast.parse(sql, mode="eval")
        return reader(text, schema).condition(tree.body)
    except (SyntaxError, RecursionError, MemoryError, UnicodeEncodeError) as error:
        raise ValueError(f"filter {text!r:.200} cannot be read ({error}): write it like {EXAMPLE!r}") from error


class FilterReader:
    """Reader of the nodes of a filter, which makes an expression of pyarrow.

    A subclass makes another kind of expression, which knows `&`, `|` and `~`, by `is_true`, `is_null`, `is_in` and
    `compare`.
    """

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema

    def condition(self, node: ast.AST) -> Any:
        """Make the expression of a condition."""
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            joined = parts[0]
            for part in parts[1:]:
                joined = joined & part if isinstance(node.op, ast.And) else joined | part
            return joined
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [self.comparison(*three) for three in zip(sides, node.ops, sides[1:], strict=False)]
            joined = parts[0]
            for part in parts[1:]:
                joined = joined & part
            return joined
        if (name := self.column(node)) is not None and pa.types.is_boolean(self.schema.field(name).type):
            return self.is_true(name)
        raise self.unreadable(node)

    def is_true(self, name: str) -> Any:
        """Make the condition that a column of booleans is true."""
        return pc.field(name)

    def is_null(self, name: str) -> Any:
        """Make the condition that the value of a column is missing."""
        return pc.field(name).is_null()

    def is_in(self, name: str, values: pa.Array) -> Any:
        """Make the condition that the value of a column is one of some."""
        unknown = pa.scalar(None, pa.bool_())  # `isin` itself says no where the value is missing
        return pc.if_else(pc.field(name).is_valid(), pc.field(name).isin(values), unknown)

    def compare(self, operator: type, left: str | pa.Scalar, right: str | pa.Scalar) -> Any:
        """Compare columns, given by name, and values."""
        return COMPARISONS[operator](*(pc.field(one) if isinstance(one, str) else one for one in (left, right)))

    def comparison(self, left: ast.AST, operator: ast.cmpop, right: ast.AST) -> Any:
        """Make the condition of one comparison."""
        name = self.column(left)
        if isinstance(operator, ast.Is | ast.IsNot):
            if name is None or not (isinstance(right, ast.Constant) and right.value is None):
                raise self.unreadable(right)
            return self.is_null(name) if isinstance(operator, ast.Is) else ~self.is_null(name)
        if isinstance(operator, ast.In | ast.NotIn):
            if name is None or not isinstance(right, ast.List | ast.Tuple | ast.Set):
                raise self.unreadable(right)
            found = self.is_in(name, self.values(right.elts, self.schema.field(name)))
            return found if isinstance(operator, ast.In) else ~found
        other = self.column(right)
        if name is None and other is None:
            raise self.unreadable(left)
        typed = self.schema.field(name or other).type
        a, b = (c if c is not None else self.value(n, typed) for c, n in ((name, left), (other, right)))
        return self.compare(type(operator), a, b)

    def column(self, node: ast.AST) -> str | None:
        """Return the column that a node names, None where it is something else."""
        if isinstance(node, ast.Name):
            name = node.id
            if name in CONSTANTS and name not in self.schema.names:
                return None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "col":
            if len(node.args) != 1 or not isinstance(node.args[0], ast.Constant):
                raise self.unreadable(node)
            name = str(node.args[0].value)
        else:
            return None
        if name not in self.schema.names:
            columns = _columns(self.schema)
            raise ValueError(f"filter {self.text!r:.200} names {name!r}, which is not a column: {columns}")
        return name

    def constant(self, node: ast.AST) -> Any:
        """Return the value that a node writes."""
        if isinstance(node, ast.Name) and node.id in CONSTANTS:
            return CONSTANTS[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.constant(node.operand)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool):
            return node.value
        raise self.unreadable(node)

    def values(self, nodes: list[ast.expr], field: pa.Field) -> pa.Array:
        """Return the constants of a list, of the type of the column that they are compared with."""
        constants = [self.constant(node) for node in nodes]
        try:
            return pa.array(constants).cast(field.type)
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(
                f"filter {self.text!r:.200}: not all of {constants} can be compared with {field.name!r}, which is "
                f"{field.type}"
            ) from error

    def value(self, node: ast.AST, typed: pa.DataType) -> pa.Scalar:
        """Return a constant; a text that is compared with a date as that date."""
        value = self.constant(node)
        if isinstance(value, str) and pa.types.is_temporal(typed):
            try:
                return pa.scalar(value).cast(typed)
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"filter {self.text!r:.200}: {value!r} is no date; write 2024-06-01 or 2024-06-01 18:30:00"
                ) from error
        try:
            return pa.scalar(value)
        except OverflowError as error:
            raise ValueError(
                f"filter {self.text!r:.200}: {value} is too large, whole numbers have at most 64 bits"
            ) from error

    def unreadable(self, node: ast.AST) -> ValueError:
        """Return the error to raise where a node is not of the language."""
        part = ast.unparse(node)
        return ValueError(f"filter {self.text!r:.200} cannot be read at {part!r:.80}: write it like {EXAMPLE!r}")


def _columns(schema: pa.Schema) -> str:
    return f"the columns are {schema.names}"


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


__all__ = ["Filter", "FilterReader", "applied", "parse_filter", "passing_rows"]
