"""Filters as expressions that a Milvus server carries out, so that it searches only what passes.

Milvus's own `not` lets a missing value pass or fail by version, so none is written: each condition comes with its
opposite, and a comparison that a missing value could pass says that the value is there. Whole numbers are compared
with whole numbers, which all versions take.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from ..filters import EXAMPLE, Filter, FilterReader, parse_filter
from .schema import StoreSchema, as_stored, kind_of

Text = str | bool
"""An expression, or True or False where it is settled."""

OPERATORS: dict[str, str] = {"Eq": "==", "NotEq": "!=", "Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">="}
OPPOSITES = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


class MilvusCondition(NamedTuple):
    """Condition as two expressions: where it holds, and where it does not; neither where a value is missing."""

    holds: Text
    fails: Text

    def __and__(self, other: "MilvusCondition") -> "MilvusCondition":
        return MilvusCondition(_join("and", self.holds, other.holds), _join("or", self.fails, other.fails))

    def __or__(self, other: "MilvusCondition") -> "MilvusCondition":
        return MilvusCondition(_join("or", self.holds, other.holds), _join("and", self.fails, other.fails))

    def __invert__(self) -> "MilvusCondition":
        return MilvusCondition(self.fails, self.holds)


def milvus_filter(condition: Filter | None, schema: StoreSchema) -> Text:
    """Translate a filter; True where all images pass, False where none can.

    Raises:
        ValueError: if it cannot be read, names no column of the store, or cannot be carried out by Milvus.
    """
    if condition is None:
        return True
    if not isinstance(condition, str):
        raise ValueError(
            f"filter={condition!s:.200}: a Milvus store takes a filter as text, such as {EXAMPLE!r}, which its server "
            "carries out"
        )
    if not len(schema.columns):
        raise ValueError(
            f"filter {condition!r:.200}: this gallery has no metadata; index it with a table of it: "
            "Gallery.from_folder(..., metadata=...), under another name"
        )
    return parse_filter(condition, schema.columns, partial(_MilvusReader, store=schema)).holds


class _MilvusReader(FilterReader):
    """Reader of the nodes of a filter, which makes conditions of Milvus."""

    def __init__(self, text: str, schema: pa.Schema, store: StoreSchema) -> None:
        super().__init__(text, schema)
        self.store = store

    def is_true(self, name: str) -> MilvusCondition:
        field = self.store.field_of(name)
        return MilvusCondition(f"{field} == true", f"{field} == false")

    def is_null(self, name: str) -> MilvusCondition:
        field = self.store.field_of(name)
        return MilvusCondition(f"{field} is null", f"{field} is not null")

    def is_in(self, name: str, values: pa.Array) -> MilvusCondition:
        field, known = self.store.field_of(name), values.drop_null()
        there = f"{field} is not null"
        if not len(known):
            return MilvusCondition(False, there)
        listed = ", ".join(map(_constant, as_stored(known).to_pylist()))
        return MilvusCondition(f"{field} in [{listed}]", f"({there} and {field} not in [{listed}])")

    def compare(self, operator: type, left: str | pa.Scalar, right: str | pa.Scalar) -> MilvusCondition:
        sign = OPERATORS[operator.__name__]
        if not isinstance(left, str):
            left, right, sign = right, left, MIRRORED[sign]
        assert isinstance(left, str)
        if isinstance(right, str):
            return self._compare_columns(left, sign, right)
        field, typed = self.store.field_of(left), self.schema.field(left).type
        if not right.is_valid:  # as in SQL, nothing equals null
            return MilvusCondition(False, False)
        value = right.as_py()
        self._check_comparable(left, sign, right)
        if kind_of(typed) == "whole":
            return _compare_whole(field, sign, value)
        stored = float(value) if kind_of(typed) == "number" else as_stored(pa.array([value], typed))[0].as_py()
        constant = _constant(stored)
        return MilvusCondition(_compared(field, sign, constant), _compared(field, OPPOSITES[sign], constant))

    def _check_comparable(self, name: str, sign: str, value: pa.Scalar) -> None:
        typed = self.schema.field(name).type
        kind, given = kind_of(typed), value.as_py()
        is_number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
        fits = {
            "text": isinstance(given, str),
            "boolean": isinstance(given, bool) and sign in ("==", "!="),
            "whole": is_number and abs(given) < 2**63,
            "number": is_number,
            "date": value.type == typed,
        }
        if not fits[kind]:
            raise ValueError(
                f"filter {self.text!r:.200} cannot be applied: it compares {name!r}, which is {typed}, with {given!r} "
                f"by {sign}; its columns are {', '.join(f'{one.name} ({one.type})' for one in self.schema)}"
            )

    def _compare_columns(self, left: str, sign: str, right: str) -> MilvusCondition:
        kinds = [kind_of(self.schema.field(name).type) for name in (left, right)]
        same = self.schema.field(left).type == self.schema.field(right).type
        if not (same and kinds[0] != "boolean") and not {*kinds} <= {"whole", "number"}:
            raise ValueError(
                f"filter {self.text!r:.200} compares {left!r} with {right!r}, which Milvus does not, since they are "
                f"{self.schema.field(left).type} and {self.schema.field(right).type}: compare each with a value"
            )
        a, b = self.store.field_of(left), self.store.field_of(right)
        there = f"{a} is not null and {b} is not null"
        return MilvusCondition(f"({there} and {a} {sign} {b})", f"({there} and {a} {OPPOSITES[sign]} {b})")


def _compare_whole(field: str, sign: str, value: int | float) -> MilvusCondition:
    """Compare whole numbers with a number that may have a fraction."""
    if float(value).is_integer() or isinstance(value, int):
        constant = str(int(value))
        return MilvusCondition(_compared(field, sign, constant), _compared(field, OPPOSITES[sign], constant))
    there, below = f"{field} is not null", f"{field} <= {math.floor(value)}"
    above = f"{field} >= {math.ceil(value)}"
    if sign in ("==", "!="):
        return MilvusCondition(False, there) if sign == "==" else MilvusCondition(there, False)
    return MilvusCondition(below, above) if sign in ("<", "<=") else MilvusCondition(above, below)


def _compared(field: str, sign: str, constant: str) -> str:
    comparison = f"{field} {sign} {constant}"
    return f"({field} is not null and {comparison})" if sign == "!=" else comparison


def _constant(value: Any) -> str:
    """Write a value as Milvus reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'
    return repr(value)


def _join(word: str, left: Text, right: Text) -> Text:
    settled = word == "or"  # what settles the whole: True of an `or`, False of an `and`
    if settled in (left, right):
        return settled
    parts = [part for part in (left, right) if isinstance(part, str)]
    return f"({f' {word} '.join(parts)})" if len(parts) == 2 else parts[0] if parts else not settled


__all__ = ["milvus_filter"]
