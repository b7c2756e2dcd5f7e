"""Read JSON that anybody may have written: bounded, strict, with typed fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar


def parse_json(content: str | bytes) -> Any:
    """A JSON text as Python objects, strictly: no NaN, no name twice in one object, no nesting without end.

    Raises:
        ValueError: it is not such a text.
    """
    try:
        parsed = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_no_name_twice)
        _check_depth(parsed)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return parsed


def parse_object(content: str | bytes, schema: int) -> dict[str, Any]:
    """A JSON object whose "schema" is that number, by `parse_json`.

    Raises:
        ValueError: it is no such object.
    """
    body = parse_json(content)
    if not isinstance(body, dict):
        raise ValueError("it is not an object")
    if body.get("schema") != schema or isinstance(body["schema"], bool):
        raise ValueError(f"its schema is not {schema}")
    return body


def _check_depth(value: Any, most: int = 20) -> None:
    if most == 0:
        raise RecursionError
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        if isinstance(item, (dict, list)):
            _check_depth(item, most - 1)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return row


def plain_json(value: object) -> str:
    """The JSON form of a value that the encoder does not know (enums give their value)."""
    if isinstance(value, Enum):
        return str(value.value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_E = TypeVar("_E", bound=Enum)


class Reader:
    """Takes typed values out of one JSON object; every doubt is a ValueError that names the place."""

    def __init__(self, row: Any, place: str) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not an object")
        self._row: dict[str, Any] = row
        self._place = place

    def has(self, name: str) -> bool:
        """Whether something is there under a name."""
        return name in self._row

    def value(self, name: str) -> Any:
        """What is there under a name."""
        if name not in self._row:
            raise ValueError(f"{self._place} has no {name}")
        return self._row[name]

    def _wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self._place}: {name} is not {wanted}")

    def text(self, name: str, most: int = 1000) -> str:
        """A printable text of at most so many characters."""
        value = self.value(name)
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise self._wrong(name, "a printable text of bearable length")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A list of texts; none where the name is not there, as in what an earlier moefix wrote."""
        values = self._row.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) and len(value) <= most for value in values):
            raise self._wrong(name, "a list of texts")
        return tuple(values)

    def whole(self, name: str, least: int = 0, most: int = 1 << 31) -> int:
        """A whole number between these bounds, both included."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.value(name)
        # A huge int compares with a float exactly, and so never overflows here.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e15 < value < 1e15:
            raise self._wrong(name, "a number of bearable size")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or null."""
        return None if self.value(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def pair(self, name: str) -> tuple[int, int]:
        """Two whole numbers."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) != 2:
            raise self._wrong(name, "a pair")
        inner = Reader({str(place): item for place, item in enumerate(value)}, f"{self._place}: {name}")
        return inner.whole("0", most=1 << 20), inner.whole("1", most=1 << 20)

    def one_of(self, name: str, kind: type[_E]) -> _E:
        """A member of an enum, by its value."""
        value = self.value(name)
        if not isinstance(value, str) or value not in {member.value for member in kind}:
            raise self._wrong(name, f"a {kind.__name__}")
        return kind(value)

    def inner(self, name: str) -> Reader:
        """An object within this one."""
        return Reader(self.value(name), f"{self._place}: {name}")

    def each(self, name: str) -> Iterator[Reader]:
        """The objects of a list."""
        rows = self.value(name)
        if not isinstance(rows, list):
            raise self._wrong(name, "a list")
        return (Reader(row, f"{self._place}: {name}[{place}]") for place, row in enumerate(rows))

    def only(self, names: set[str]) -> None:
        """Refuse a name that nobody writes: it would be lost in silence."""
        strange = sorted(set(self._row) - names)
        if strange:
            raise ValueError(f"{self._place} has an unknown part {strange[0][:40]!r}")


def field_names(kind: type) -> set[str]:
    """The names of a dataclass's fields."""
    return {field.name for field in fields(kind)}
